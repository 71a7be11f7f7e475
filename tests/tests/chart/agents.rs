//! What an agent may write: its own Lease and its own status, and nothing in a thousand tries beyond.

use freehold_tests::api_server::{ApiServer, Storage};
use http::{Method, Request};
use kube::Client;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

use freehold_tests::person::{Person, chart};

const GROUP: &str = "/apis/freehold.dev/v1alpha1";
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/freehold-system/leases";
const TRIES: usize = 1000;

/// Installs the chart and two machines, each with an agent's pod. Nothing runs them.
pub fn fleet(person: &Person, values: &str) {
    let chart = chart();
    let arguments = [
        "install",
        "freehold",
        chart.to_str().unwrap(),
        "--namespace",
        "freehold-system",
        "--create-namespace",
    ];
    person.helm(&arguments, values).unwrap();
    for node in ["machine", "other"] {
        let node_object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}});
        person
            .kubectl(&["apply", "-f", "-"], &node_object.to_string())
            .unwrap();
        let pod = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("agent-{node}"), "namespace": "freehold-system"},
            "spec": {"serviceAccountName": "freehold-node-agent", "nodeName": node,
                "containers": [{"name": "agent", "image": "agent"}]}});
        person.kubectl(&["apply", "-f", "-"], &pod.to_string()).unwrap();
    }
}

/// The token that the kubelet of this machine would put into the agent's pod.
pub fn token(person: &Person, node: &str) -> String {
    let pod = format!("agent-{node}");
    let arguments = [
        "create",
        "token",
        "freehold-node-agent",
        "-n",
        "freehold-system",
        "--bound-object-kind",
        "Pod",
        "--bound-object-name",
        &pod,
    ];
    person.kubectl(&arguments, "").unwrap().trim().to_owned()
}

/// The code of an answer.
async fn code(client: &Client, method: &str, path: &str, body: &Value) -> u16 {
    let form = match method {
        "APPLY" => "application/apply-patch+yaml",
        "PATCH" => "application/merge-patch+json",
        _ => "application/json",
    };
    let method = match method {
        "APPLY" => "PATCH",
        other => other,
    };
    let request = Request::builder()
        .method(Method::from_bytes(method.as_bytes()).unwrap())
        .uri(path)
        .header("Content-Type", form)
        .body(body.to_string().into_bytes())
        .unwrap();
    match client.request_text(request).await {
        Ok(_) => 200,
        Err(kube::Error::Api(status)) => status.code,
        Err(other) => panic!("{method} {path}: {other}"),
    }
}

fn lease(name: &str, holder: &str) -> Value {
    json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": 40}})
}

fn status(name: &str, conditions: &Value) -> Value {
    json!({"apiVersion": "freehold.dev/v1alpha1", "kind": "InferenceNode", "metadata": {"name": name},
        "status": {"conditions": conditions}})
}

const APPLY: &str = "?fieldManager=agent&force=true";

/// Something that an agent of `machine` has no business with: method, path, body.
fn mischief() -> impl Strategy<Value = (String, String, Value)> {
    let others = prop_oneof![
        Just("other"),
        Just("freehold-operator"),
        Just("nobody"),
        Just("machin"),
        Just("machine2")
    ];
    let method = prop_oneof![Just("APPLY"), Just("PATCH"), Just("PUT"), Just("DELETE")];
    let kind = prop_oneof![
        Just("modeldeployments"),
        Just("governancepolicies"),
        Just("healthprobes")
    ];
    let reachable = json!([{"type": "Reachable", "status": "True", "reason": "Mine", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
    let path = |method: &str, path: String| {
        if method == "APPLY" {
            format!("{path}{APPLY}")
        } else {
            path
        }
    };
    prop_oneof![
        // Another machine's status, spec and Lease; its own spec.
        (method.clone(), others.clone()).prop_map(move |(method, name)| {
            let body = status(name, &json!([]));
            (
                method.to_owned(),
                path(method, format!("{GROUP}/inferencenodes/{name}/status")),
                body,
            )
        }),
        (method.clone(), prop_oneof![others.clone(), Just("machine")]).prop_map(move |(method, name)| {
            let body = json!({"apiVersion": "freehold.dev/v1alpha1", "kind": "InferenceNode",
                "metadata": {"name": name}, "spec": {"assignments": []}});
            (
                method.to_owned(),
                path(method, format!("{GROUP}/inferencenodes/{name}")),
                body,
            )
        }),
        (method.clone(), others.clone()).prop_map(move |(method, name)| {
            (
                method.to_owned(),
                path(method, format!("{LEASES}/{name}")),
                lease(name, name),
            )
        }),
        // In another's name, the other way round, or deleted.
        others.clone().prop_map(|name| (
            "APPLY".to_owned(),
            format!("{LEASES}/machine{APPLY}"),
            lease("machine", name)
        )),
        others
            .clone()
            .prop_map(|name| ("POST".to_owned(), LEASES.to_owned(), lease(name, "machine"))),
        Just(("DELETE".to_owned(), format!("{LEASES}/machine"), Value::Null)),
        // The operator's word about itself.
        Just((
            "APPLY".to_owned(),
            format!("{GROUP}/inferencenodes/machine/status{APPLY}"),
            status("machine", &reachable)
        )),
        // What people want, and what became of it.
        (method, kind, prop_oneof![Just(""), Just("/status")]).prop_map(move |(method, kind, part)| {
            let body = json!({"metadata": {"name": "x"}, "spec": {}, "status": {}});
            (
                method.to_owned(),
                path(method, format!("{GROUP}/namespaces/default/{kind}/x{part}")),
                body,
            )
        }),
        // Everything else in the cluster.
        prop_oneof![
            Just(("GET", "/api/v1/secrets")),
            Just(("GET", "/api/v1/namespaces/freehold-system/secrets/hub")),
            Just(("GET", "/api/v1/pods")),
            Just(("GET", "/api/v1/namespaces/default/configmaps")),
            Just(("POST", "/api/v1/namespaces/default/pods")),
            Just((
                "POST",
                "/api/v1/namespaces/freehold-system/serviceaccounts/freehold-operator/token"
            )),
            Just((
                "POST",
                "/api/v1/namespaces/freehold-system/serviceaccounts/freehold-node-agent/token"
            )),
            Just(("DELETE", "/api/v1/nodes/other")),
            Just((
                "DELETE",
                "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/modeldeployments.freehold.dev"
            )),
            Just((
                "DELETE",
                "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/freehold-node-agent"
            )),
            Just(("POST", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings")),
        ]
        .prop_map(|(method, path)| (
            method.to_owned(),
            path.to_owned(),
            json!({"metadata": {"name": "x"}})
        )),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_writes_its_own_and_in_a_thousand_tries_nothing_else() {
    let server = ApiServer::start(Storage::Etcd).await.unwrap();
    let person = Person::new(Some(server.kubeconfig()));
    fleet(&person, "hostAgents: [mac]");
    let owner = server.client().await.unwrap();
    for name in ["machine", "other", "mac"] {
        let node = json!({"apiVersion": "freehold.dev/v1alpha1", "kind": "InferenceNode", "metadata": {"name": name}, "spec": {}});
        person.kubectl(&["apply", "-f", "-"], &node.to_string()).unwrap();
        assert_eq!(
            code(
                &owner,
                "APPLY",
                &format!("{LEASES}/{name}{APPLY}"),
                &lease(name, name)
            )
            .await,
            200
        );
    }
    let agent = server.client_of(&token(&person, "machine")).await.unwrap();
    let own_status = format!("{GROUP}/inferencenodes/machine/status{APPLY}");
    let own_lease = format!("{LEASES}/machine{APPLY}");
    // Policies take a moment to be in force; until then nothing proves anything.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while code(
        &agent,
        "APPLY",
        &format!("{LEASES}/other{APPLY}"),
        &lease("other", "other"),
    )
    .await
        == 200
    {
        assert!(
            std::time::Instant::now() < deadline,
            "the admission policy never came into force"
        );
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    assert_eq!(
        code(&agent, "APPLY", &own_status, &status("machine", &json!([]))).await,
        200
    );
    assert_eq!(
        code(&agent, "APPLY", &own_lease, &lease("machine", "machine")).await,
        200
    );

    let mut runner = TestRunner::new(Config::default());
    let mut codes = std::collections::BTreeMap::<u16, usize>::new();
    for _ in 0..TRIES {
        let (method, path, body) = mischief().new_tree(&mut runner).unwrap().current();
        let code = code(&agent, &method, &path, &body).await;
        assert!(
            matches!(code, 400..=499) && code != 429,
            "{method} {path} was answered {code}: {body}"
        );
        *codes.entry(code).or_default() += 1;
    }
    println!("{TRIES} attempts of an agent beyond its own objects, by answer: {codes:?}");
    assert!(
        codes.get(&403).is_some_and(|refused| *refused > TRIES * 9 / 10),
        "{codes:?}"
    );

    // The same for a machine outside the cluster, whose account bears its name.
    let arguments = ["create", "token", "freehold-host-mac", "-n", "freehold-system"];
    let host = server
        .client_of(person.kubectl(&arguments, "").unwrap().trim())
        .await
        .unwrap();
    let path = |name: &str| format!("{LEASES}/{name}{APPLY}");
    assert_eq!(
        code(&host, "APPLY", &path("mac"), &lease("mac", "mac")).await,
        200
    );
    assert_eq!(
        code(&host, "APPLY", &path("other"), &lease("other", "other")).await,
        403
    );
    let tokens = |name: &str| format!("/api/v1/namespaces/freehold-system/serviceaccounts/{name}/token");
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}});
    assert_eq!(
        code(&host, "POST", &tokens("freehold-host-mac"), &request).await,
        200
    );
    assert_eq!(
        code(&host, "POST", &tokens("freehold-operator"), &request).await,
        403
    );

    // A token that tells no machine writes nothing at all.
    let arguments = ["create", "token", "freehold-node-agent", "-n", "freehold-system"];
    let bare = server
        .client_of(person.kubectl(&arguments, "").unwrap().trim())
        .await
        .unwrap();
    assert_eq!(
        code(&bare, "APPLY", &own_lease, &lease("machine", "machine")).await,
        403
    );
}
