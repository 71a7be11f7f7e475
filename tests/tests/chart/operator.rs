//! Operator and agents with the chart's own rights: they work, are refused nothing, and use each verb that they were
//! granted.

use std::path::Path;
use std::time::{Duration, Instant};

use freehold_node_agent::credential::Credential;
use freehold_node_agent::{Agent, AgentConfig};
use freehold_operator::{LeaderElection, Operator, OperatorConfig};
use freehold_tests::api_server::{ApiServer, Storage, install};
use freehold_tests::named::{is_named, played};
use freehold_tests::person::Person;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::agents::{fleet, token};

const NAMESPACE: &str = "freehold-system";
const VALUES: &str = "hostAgents: [mac]";
const HOST: &str = "freehold-host-mac";
/// Whatever is waited for has happened by then, or never will.
const PATIENCE: Duration = Duration::from_secs(60);
/// So soon a machine is forgotten here that has neither Lease nor work.
const FORGET_AFTER: Duration = Duration::from_secs(3);

/// Waits until `look` finds nothing more to wait for; what it found last is told if it always does.
async fn until(what: &str, mut look: impl FnMut() -> Option<String>) {
    let begun = Instant::now();
    while let Some(last) = look() {
        assert!(
            begun.elapsed() < PATIENCE,
            "{what}: not within {PATIENCE:?}; last seen: {last}"
        );
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// Kinds as a later version might have them: every choice has grown by one that this version does not know.
fn later_kinds() -> Vec<CustomResourceDefinition> {
    fn loosen(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                if let Some(Value::Array(values)) = fields.get_mut("enum") {
                    values.push(json!("FromTheFuture"));
                }
                fields.values_mut().for_each(loosen);
            }
            Value::Array(items) => items.iter_mut().for_each(loosen),
            _ => {}
        }
    }
    let mut kinds = serde_json::to_value(freehold_crds::all()).unwrap();
    loosen(&mut kinds);
    serde_json::from_value(kinds).unwrap()
}

/// What this version reads, of each kind that people write: kind, name, spec.
const SOUND: [(&str, &str, &str); 3] = [
    (
        "ModelDeployment",
        "chat",
        "model: {path: /nowhere/model.gguf, size: 1Mi}",
    ),
    ("GovernancePolicy", "careful", "limits: {maxOutputTokens: 100}"),
    (
        "HealthProbe",
        "answers",
        "checks: [{name: advances, progress: {stallSeconds: 60}}]",
    ),
];

/// What it does not read, in two forms: the second is the same story told again.
const STRANGE: [(&str, &str, [&str; 2]); 3] = [
    (
        "ModelDeployment",
        "strange-chat",
        [
            "model: {path: /a.gguf}\nplacement: {device: FromTheFuture}",
            "model: {path: /b.gguf}\nplacement: {device: FromTheFuture}\nrollout: {strategy: FromTheFuture}",
        ],
    ),
    (
        "GovernancePolicy",
        "strange-policy",
        [
            "enforcement: FromTheFuture",
            "enforcement: FromTheFuture\naudit: {onFailure: FromTheFuture}",
        ],
    ),
    (
        "HealthProbe",
        "strange-probe",
        [
            "checks: [{name: a, progress: {stallSeconds: 60}}]\nremediation: {action: FromTheFuture}",
            "checks: [{name: b, progress: {stallSeconds: 60}}]\nremediation: {action: FromTheFuture}",
        ],
    ),
];

fn wish(kind: &str, name: &str, spec: &str) -> String {
    let spec: Value = serde_yaml::from_str(spec).unwrap();
    let mut object = json!({"apiVersion": "freehold.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec});
    if kind != "GovernancePolicy" {
        object["metadata"]["namespace"] = json!("default");
    }
    object.to_string()
}

/// What an object's status lacks to be about its newest generation.
fn untold(person: &Person, kind: &str, name: &str) -> Option<String> {
    let object = person.get(&[kind, name, "-n", "default"]).remove(0);
    let told = object["status"]["observedGeneration"] == object["metadata"]["generation"]
        && object["status"]["conditions"]
            .as_array()
            .is_some_and(|conditions| !conditions.is_empty());
    (!told).then(|| object.to_string())
}

async fn tells_of_what_people_write(person: &Person) {
    for (kind, name, spec) in SOUND {
        person
            .kubectl(&["apply", "-f", "-"], &wish(kind, name, spec))
            .unwrap();
        until(&format!("the status of {kind} {name}"), || {
            untold(person, kind, name)
        })
        .await;
    }
    // Objects that this version does not read, and the same story again.
    for round in 0..2 {
        for (kind, name, specs) in STRANGE {
            let wish = wish(kind, name, specs[round]);
            // The API server takes a moment to take to a new schema.
            until(&format!("{kind} {name} is taken"), || {
                let said = person.kubectl(&["apply", "-f", "-"], &wish);
                (!said.good).then_some(said.errors)
            })
            .await;
            until(&format!("the status of {kind} {name}"), || {
                untold(person, kind, name)
            })
            .await;
        }
    }
    until("an event that happened again", || {
        let events = person.get(&["events.events.k8s.io", "-A"]);
        let again = events.iter().any(|event| event["series"]["count"].is_number());
        (!again).then(|| json!(events).to_string())
    })
    .await;
}

/// A machine that joins, has nothing to do, and is gone.
async fn forgets_a_machine(person: &Person) {
    let ghost = played("ghost");
    let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": ghost,
        "namespace": NAMESPACE, "labels": {"app.kubernetes.io/component": "node-agent"}},
        "spec": {"holderIdentity": ghost, "renewTime": "2026-01-01T00:00:00.000000Z"}});
    person.kubectl(&["apply", "-f", "-"], &lease.to_string()).unwrap();
    let known = || {
        let said = person
            .kubectl(&["get", "inferencenodes", "-o", "name"], "")
            .unwrap();
        (said.contains(&ghost), said)
    };
    until("a machine with a Lease gets an object", || {
        let (known, said) = known();
        (!known).then_some(said)
    })
    .await;
    person
        .kubectl(&["delete", "lease", &ghost, "-n", NAMESPACE], "")
        .unwrap();
    until("a machine without one is forgotten", || {
        let (known, said) = known();
        known.then_some(said)
    })
    .await;
}

/// An agent in the cluster and one outside, which keeps its own token fresh.
async fn agents(
    server: &ApiServer,
    person: &Person,
    folder: &Path,
    shutdown: &CancellationToken,
) -> [Agent; 2] {
    let machine = played("machine");
    let token_file = folder.join("token");
    let of_host = person
        .kubectl(&["create", "token", HOST, "-n", NAMESPACE], "")
        .unwrap();
    std::fs::write(&token_file, of_host.trim()).unwrap();
    let credential = Credential {
        token_file,
        renew_after: Some(Duration::from_secs(1)),
    };
    let mut agents = Vec::new();
    for (node, token, credential) in [
        (machine.as_str(), token(person, &machine), None),
        ("mac", of_host.trim().to_owned(), Some(credential)),
    ] {
        let mut config = AgentConfig::new(node, folder.join(node));
        config.gateway_listen = ([127, 0, 0, 1], 0).into();
        config.credential = credential;
        let client = server.client_of(&token).await.unwrap();
        agents.push(Agent::start(config, client, shutdown.clone()).await.unwrap());
    }
    agents.try_into().unwrap_or_else(|_| panic!("there are two"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_chart_grants_is_what_is_used() {
    if is_named() {
        println!("skipped: this reads the API server's audit log, and a named cluster keeps that to itself");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let server = ApiServer::start(Storage::Kine).await.unwrap();
    let person = Person::new(Some(server.kubeconfig()));
    fleet(&person, VALUES);
    install(&server.client().await.unwrap(), &later_kinds())
        .await
        .unwrap();

    let operator_token = person
        .kubectl(&["create", "token", "freehold-operator", "-n", NAMESPACE], "")
        .unwrap();
    let shutdown = CancellationToken::new();
    let config = OperatorConfig {
        leader_election: Some(LeaderElection::default()),
        metrics_listen: None,
        identity: "tests".to_owned(),
        forget_after: FORGET_AFTER,
    };
    let client = server.client_of(operator_token.trim()).await.unwrap();
    let operator = Operator::start(config, client, shutdown.clone()).await.unwrap();
    let agents = agents(&server, &person, folder.path(), &shutdown).await;

    tells_of_what_people_write(&person).await;
    forgets_a_machine(&person).await;

    // Heartbeats come, and a token is renewed, in their own time.
    let accounts = ["freehold-operator", "freehold-node-agent", HOST];
    let idle = || -> Vec<String> {
        let of = |account| (account, server.idle_grants(&person, account).unwrap());
        let idle = accounts.into_iter().map(of);
        idle.flat_map(|(account, verbs)| verbs.into_iter().map(move |verb| format!("{account}: {verb}")))
            .collect()
    };
    until("every verb that is granted is used", || {
        let idle = idle();
        (!idle.is_empty()).then(|| format!("never used: {idle:?}"))
    })
    .await;
    shutdown.cancel();
    for agent in agents {
        agent.join().await;
    }
    operator.join().await.unwrap();

    println!("{accounts:?} used every verb that the chart grants them");
    let beyond = server.beyond_grants(&person, (0, 0)).unwrap();
    assert!(beyond.is_empty(), "{beyond:?}");
}
