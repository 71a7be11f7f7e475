//! What an agent may write: its own Lease and its own status, and nothing in a thousand tries beyond.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use freehold_tests::api_server::{ApiServer, Storage};
use freehold_tests::named::played;
use freehold_tests::person::{Person, chart};
use http::{Method, Request};
use kube::Client;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

const GROUP: &str = "/apis/freehold.dev/v1alpha1";
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/freehold-system/leases";
const ACCOUNTS: &str = "/api/v1/namespaces/freehold-system/serviceaccounts";
const TRIES: usize = 1000;
/// An admission policy that is not in force by then never will be.
const IN_FORCE: Duration = Duration::from_secs(60);

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
    for node in [played("machine"), played("other")] {
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

/// The code of an answer, and what was said.
async fn ask(client: &Client, method: &str, path: &str, body: &Value) -> (u16, String) {
    let form = match method {
        "APPLY" => "application/apply-patch+yaml",
        "PATCH" => "application/merge-patch+json",
        _ => "application/json",
    };
    let (method, path) = match method {
        "APPLY" => ("PATCH", format!("{path}{APPLY}")),
        other => (other, path.to_owned()),
    };
    let request = Request::builder()
        .method(Method::from_bytes(method.as_bytes()).unwrap())
        .uri(&path)
        .header("Content-Type", form)
        .body(if body.is_null() {
            Vec::new()
        } else {
            body.to_string().into_bytes()
        })
        .unwrap();
    match client.request_text(request).await {
        Ok(said) => (200, said),
        Err(kube::Error::Api(status)) => (status.code, status.message),
        Err(other) => panic!("{method} {path}: {other}"),
    }
}

async fn code(client: &Client, method: &str, path: &str, body: &Value) -> u16 {
    ask(client, method, path, body).await.0
}

fn lease(name: &str, holder: &str) -> Value {
    json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": 40}})
}

fn lease_path(name: &str) -> String {
    format!("{LEASES}/{name}")
}

fn node(name: &str) -> Value {
    json!({"apiVersion": "freehold.dev/v1alpha1", "kind": "InferenceNode", "metadata": {"name": name}, "spec": {}})
}

fn status(name: &str, conditions: &Value) -> Value {
    json!({"apiVersion": "freehold.dev/v1alpha1", "kind": "InferenceNode", "metadata": {"name": name},
        "status": {"conditions": conditions}})
}

fn status_path(name: &str) -> String {
    format!("{GROUP}/inferencenodes/{name}/status")
}

const APPLY: &str = "?fieldManager=agent&force=true";

fn condition(type_: &str) -> Value {
    json!([{"type": type_, "status": "True", "reason": "Mine", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z"}])
}

/// An object that is there, which an agent of `machine` has no business with; and what it would like to say there.
#[derive(Clone, Debug)]
struct Victim {
    path: String,
    wish: Value,
}

impl Victim {
    fn new(path: String, wish: Value) -> Self {
        Self { path, wish }
    }

    /// The whole of it, as it would be replaced.
    async fn whole(&self, owner: &Client) -> Value {
        let (code, said) = ask(owner, "GET", &self.path, &Value::Null).await;
        assert_eq!(code, 200, "{}: {said}", self.path);
        let mut whole: Value = serde_json::from_str(&said).unwrap();
        for (name, part) in self.wish.as_object().into_iter().flatten() {
            if name == "spec" || name == "status" {
                whole[name] = part.clone();
            }
        }
        whole
    }
}

/// Everything that stands in the way of an agent of `machine`, whose names are as near to its own as can be.
fn victims(machine: &str, others: &[String]) -> Vec<Victim> {
    let mut victims = Vec::new();
    let assigned = |name: &str| {
        let mut node = node(name);
        node["spec"] = json!({"assignments": []});
        node
    };
    for name in others {
        victims.push(Victim::new(status_path(name), status(name, &condition("Ready"))));
        victims.push(Victim::new(
            format!("{GROUP}/inferencenodes/{name}"),
            assigned(name),
        ));
        victims.push(Victim::new(lease_path(name), lease(name, name)));
        victims.push(Victim::new(lease_path(name), lease(name, machine)));
        // Its own Lease, in another's name.
        victims.push(Victim::new(lease_path(machine), lease(machine, name)));
    }
    // Its own spec, and the operator's word about itself.
    victims.push(Victim::new(
        format!("{GROUP}/inferencenodes/{machine}"),
        assigned(machine),
    ));
    victims.push(Victim::new(
        status_path(machine),
        status(machine, &condition("Reachable")),
    ));
    // What people want, and what became of it.
    for (path, kind, spec) in WANTED {
        let mut wish = wanted(kind, spec);
        wish["spec"] = serde_yaml::from_str(spec).unwrap();
        victims.push(Victim::new(format!("{GROUP}/{path}/x"), wish));
        let told = json!({"apiVersion": "freehold.dev/v1alpha1", "kind": kind, "metadata": {"name": "x"},
            "status": {"conditions": condition("Ready")}});
        victims.push(Victim::new(format!("{GROUP}/{path}/x/status"), told));
    }
    victims
}

/// What a person made: path, kind, spec.
const WANTED: [(&str, &str, &str); 3] = [
    (
        "namespaces/default/modeldeployments",
        "ModelDeployment",
        "model: {path: /m.gguf}",
    ),
    (
        "governancepolicies",
        "GovernancePolicy",
        "limits: {maxOutputTokens: 100}",
    ),
    (
        "namespaces/default/healthprobes",
        "HealthProbe",
        "checks: [{name: advances, progress: {stallSeconds: 60}}]",
    ),
];

fn wanted(kind: &str, spec: &str) -> Value {
    let spec: Value = serde_yaml::from_str(spec).unwrap();
    json!({"apiVersion": "freehold.dev/v1alpha1", "kind": kind, "metadata": {"name": "x"}, "spec": spec})
}

/// Everything else in the cluster: method, path, body.
fn elsewhere(other: &str) -> Vec<(&'static str, String, Value)> {
    let token = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"},
        "spec": {"nodeName": other, "containers": [{"name": "a", "image": "a"}]}});
    let rights = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "freehold-x"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"kind": "ServiceAccount", "name": "freehold-node-agent", "namespace": "freehold-system"}]});
    let admission = "/apis/admissionregistration.k8s.io/v1";
    let get = |path: &str| ("GET", path.to_owned(), Value::Null);
    let delete = |path: String| ("DELETE", path, Value::Null);
    vec![
        get("/api/v1/secrets"),
        get("/api/v1/namespaces/freehold-system/secrets/hub"),
        get("/api/v1/pods"),
        get("/api/v1/namespaces/default/configmaps"),
        ("POST", "/api/v1/namespaces/default/pods".to_owned(), pod),
        (
            "POST",
            format!("{ACCOUNTS}/freehold-operator/token"),
            token.clone(),
        ),
        ("POST", format!("{ACCOUNTS}/freehold-node-agent/token"), token),
        ("POST", LEASES.to_owned(), lease("newcomer", "newcomer")),
        ("POST", format!("{GROUP}/inferencenodes"), node("newcomer")),
        delete(format!("/api/v1/nodes/{other}")),
        delete(
            "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/modeldeployments.freehold.dev"
                .to_owned(),
        ),
        delete(format!(
            "{admission}/validatingadmissionpolicies/freehold-node-agent"
        )),
        delete(format!(
            "{admission}/validatingadmissionpolicybindings/freehold-node-agent"
        )),
        (
            "POST",
            "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings".to_owned(),
            rights,
        ),
    ]
}

/// An attempt: method, path, body.
type Attempt = (&'static str, String, Value);

/// Attempts on all of that, in every way that there is.
async fn attempts(owner: &Client, machine: &str, others: &[String]) -> Vec<Attempt> {
    let mut all = elsewhere(&others[0]);
    for victim in victims(machine, others) {
        let whole = victim.whole(owner).await;
        all.push(("APPLY", victim.path.clone(), victim.wish.clone()));
        all.push(("PATCH", victim.path.clone(), victim.wish.clone()));
        all.push(("PUT", victim.path.clone(), whole));
        if !victim.path.ends_with("/status") {
            all.push(("DELETE", victim.path, Value::Null));
        }
    }
    all
}

/// What an agent could do harm to, as it stands.
fn standing(person: &Person) -> BTreeMap<String, Value> {
    let mut all = person.get(&["inferencenodes,governancepolicies"]);
    all.extend(person.get(&["modeldeployments,healthprobes", "-n", "default"]));
    all.extend(person.get(&["leases,secrets,serviceaccounts", "-n", "freehold-system"]));
    let named = |object: Value| {
        (
            format!("{} {}", object["kind"], object["metadata"]["name"]),
            object,
        )
    };
    all.into_iter().map(named).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_writes_its_own_and_in_a_thousand_tries_nothing_else() {
    let server = ApiServer::start(Storage::Etcd).await.unwrap();
    let person = Person::new(Some(server.kubeconfig()));
    fleet(&person, "hostAgents: [mac]");
    let owner = server.client().await.unwrap();
    let machine = played("machine");
    let others = [
        played("other"),
        "freehold-operator".to_owned(),
        "nobody".to_owned(),
        machine[..machine.len() - 1].to_owned(),
        format!("{machine}2"),
    ];
    let apply = |object: &Value| {
        let all = ["apply", "--server-side", "-f", "-"];
        person.kubectl(&all, &object.to_string()).unwrap();
    };
    for name in others.iter().chain([&machine, &"mac".to_owned()]) {
        apply(&node(name));
        let made = code(&owner, "APPLY", &lease_path(name), &lease(name, name)).await;
        assert_eq!(made, 200, "{name}");
    }
    for (_, kind, spec) in WANTED {
        apply(&wanted(kind, spec));
    }
    apply(
        &json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub", "namespace": "freehold-system"},
        "stringData": {"token": "hf"}}),
    );
    // Where no controller runs, nobody makes it.
    apply(
        &json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "default"}}),
    );

    let agent = server.client_of(&token(&person, &machine)).await.unwrap();
    // Policies take a moment to be in force; until then nothing proves anything.
    let begun = Instant::now();
    loop {
        let other = &others[0];
        let last = ask(&agent, "APPLY", &lease_path(other), &lease(other, other)).await;
        if last.0 == 403 {
            break;
        }
        assert!(
            begun.elapsed() < IN_FORCE,
            "the admission policy never came into force; last seen: {last:?}"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let told = code(
        &agent,
        "APPLY",
        &status_path(&machine),
        &status(&machine, &json!([])),
    )
    .await;
    assert_eq!(told, 200);
    let beat = code(&agent, "APPLY", &lease_path(&machine), &lease(&machine, &machine)).await;
    assert_eq!(beat, 200);

    let before = standing(&person);
    let attempts = attempts(&owner, &machine, &others).await;
    // Each of them would do something, if only another asked.
    for (method, path, body) in &attempts {
        if *method == "GET" || path.ends_with("/token") {
            assert_eq!(code(&owner, method, path, body).await, 200, "{method} {path}");
            continue;
        }
        let dry = match *method {
            // The path of an apply has its own parameters.
            "APPLY" => continue,
            _ => format!("{path}?dryRun=All"),
        };
        let (code, said) = ask(&owner, method, &dry, body).await;
        assert_eq!(code, 200, "{method} {path}: {said}");
    }
    let mut runner = TestRunner::new(Config::default());
    let distinct = attempts.len();
    let one = select(attempts);
    for _ in 0..TRIES {
        let (method, path, body) = one.new_tree(&mut runner).unwrap().current();
        let (code, said) = ask(&agent, method, &path, &body).await;
        assert_eq!(code, 403, "{method} {path} was answered {said}: {body}");
    }
    println!("{TRIES} attempts ({distinct} kinds) of an agent beyond its own objects: all refused");
    let after = standing(&person);
    let names = |all: &BTreeMap<String, Value>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&before), names(&after));
    for (name, object) in &before {
        assert_eq!(object, &after[name], "{name} is not as it was");
    }

    // The same for a machine outside the cluster, whose account bears its name.
    let arguments = ["create", "token", "freehold-host-mac", "-n", "freehold-system"];
    let host = server
        .client_of(person.kubectl(&arguments, "").unwrap().trim())
        .await
        .unwrap();
    assert_eq!(
        code(&host, "APPLY", &lease_path("mac"), &lease("mac", "mac")).await,
        200
    );
    for other in &others {
        let refused = code(&host, "APPLY", &lease_path(other), &lease(other, other)).await;
        assert_eq!(refused, 403, "{other}");
    }
    let tokens = |name: &str| format!("{ACCOUNTS}/{name}/token");
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}});
    assert_eq!(
        code(&host, "POST", &tokens("freehold-host-mac"), &request).await,
        200
    );
    for account in ["freehold-operator", "freehold-node-agent"] {
        assert_eq!(code(&host, "POST", &tokens(account), &request).await, 403);
    }

    // A token that tells no machine writes nothing at all.
    let arguments = ["create", "token", "freehold-node-agent", "-n", "freehold-system"];
    let bare = server
        .client_of(person.kubectl(&arguments, "").unwrap().trim())
        .await
        .unwrap();
    assert_eq!(
        code(&bare, "APPLY", &lease_path(&machine), &lease(&machine, &machine)).await,
        403
    );
}
