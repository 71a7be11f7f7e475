//! Operator and agent with the chart's own rights: they work, and use what they were granted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use freehold_node_agent::{Agent, AgentConfig};
use freehold_operator::{LeaderElection, Operator, OperatorConfig};
use freehold_tests::api_server::{ApiServer, Storage};
use freehold_tests::named::is_named;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::agents::{fleet, token};
use freehold_tests::person::{Person, chart, objects};

const PATIENCE: Duration = Duration::from_secs(60);
/// Granted, and not used in the minute that this test takes.
const RARE: &[(&str, &str)] = &[
    (
        "operator",
        "delete freehold.dev/inferencenodes: after a machine has been gone for long",
    ),
    (
        "operator",
        "patch freehold.dev/inferencenodes/status: when a machine falls silent",
    ),
    (
        "operator",
        "get freehold.dev/modeldeployments: an object that does not read as its kind",
    ),
    ("operator", "get freehold.dev/governancepolicies: the same"),
    ("operator", "get freehold.dev/healthprobes: the same"),
    (
        "operator",
        "patch events.k8s.io/events: the same again within minutes",
    ),
];

/// Verb and resource, of everything that a service account is granted.
fn granted(manifest: &[Value], account: &str) -> BTreeSet<String> {
    let bound = manifest.iter().filter(|object| {
        object["kind"]
            .as_str()
            .is_some_and(|kind| kind.ends_with("Binding"))
            && object["subjects"]
                .as_array()
                .is_some_and(|subjects| subjects.iter().any(|subject| subject["name"] == account))
    });
    let roles: Vec<&Value> = bound.map(|binding| &binding["roleRef"]).collect();
    let mut granted = BTreeSet::new();
    for object in manifest {
        let wanted =
            |role: &&Value| role["kind"] == object["kind"] && role["name"] == object["metadata"]["name"];
        if !roles.iter().any(|role| wanted(&role)) {
            continue;
        }
        for rule in object["rules"].as_array().into_iter().flatten() {
            let words = |key: &str| -> Vec<String> {
                let list = rule[key].as_array().into_iter().flatten();
                list.map(|word| word.as_str().unwrap().to_owned()).collect()
            };
            for verb in words("verbs") {
                for resource in words("resources") {
                    granted.insert(format!("{verb} {}/{resource}", words("apiGroups")[0]));
                }
            }
        }
    }
    granted
}

/// Verb and resource, of everything that a service account asked for, and how often it was refused.
fn used(log: &str, account: &str) -> BTreeMap<String, u64> {
    let user = format!("system:serviceaccount:freehold-system:{account}");
    let mut used = BTreeMap::new();
    for line in log.lines() {
        let Ok(event) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        let about = &event["objectRef"];
        if event["user"]["username"] != user.as_str() || !about.is_object() {
            continue;
        }
        let mut name = format!(
            "{} {}/{}",
            event["verb"].as_str().unwrap(),
            about["apiGroup"].as_str().unwrap_or(""),
            about["resource"].as_str().unwrap()
        );
        if let Some(part) = about["subresource"].as_str() {
            name.push('/');
            name.push_str(part);
        }
        // An apply that makes an object is asked as a patch, and needs create as well.
        if event["verb"] == "patch" && event["responseStatus"]["code"] == 201 {
            used.entry(name.replacen("patch", "create", 1)).or_insert(0);
        }
        let refused = u64::from(event["responseStatus"]["code"] == 403);
        *used.entry(name).or_insert(0) += refused;
    }
    used
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "{what} never came true");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_chart_grants_is_enough_and_is_used() {
    if is_named() {
        println!("skipped: this reads the API server's audit log, and a named cluster keeps that to itself");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (policy, log) = (folder.path().join("policy.yaml"), folder.path().join("audit.log"));
    std::fs::write(
        &policy,
        "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules: [{level: Metadata, userGroups: [system:serviceaccounts]}]\n",
    )
    .unwrap();
    let arguments = [
        format!("--audit-policy-file={}", policy.display()),
        format!("--audit-log-path={}", log.display()),
        "--audit-log-mode=blocking".to_owned(),
    ];
    let server = ApiServer::start_with(Storage::Kine, &[], &arguments)
        .await
        .unwrap();
    let person = Person::new(Some(server.kubeconfig()));
    fleet(&person, "");
    let chart = chart();
    let manifest = [
        "template",
        "freehold",
        chart.to_str().unwrap(),
        "--namespace",
        "freehold-system",
    ];
    let manifest = objects(&person.helm(&manifest, "").unwrap());

    let operator_token = person
        .kubectl(
            &["create", "token", "freehold-operator", "-n", "freehold-system"],
            "",
        )
        .unwrap();
    let shutdown = CancellationToken::new();
    let config = OperatorConfig {
        leader_election: Some(LeaderElection::default()),
        metrics_listen: None,
        identity: "tests".to_owned(),
    };
    let client = server.client_of(operator_token.trim()).await.unwrap();
    let operator = Operator::start(config, client, shutdown.clone()).await.unwrap();
    let mut config = AgentConfig::new("machine", folder.path().join("agent"));
    config.gateway_listen = ([127, 0, 0, 1], 0).into();
    let client = server.client_of(&token(&person, "machine")).await.unwrap();
    let agent = Agent::start(config, client, shutdown.clone()).await.unwrap();

    let wishes = "apiVersion: freehold.dev/v1alpha1
kind: ModelDeployment
metadata: {name: chat, namespace: default}
spec: {model: {path: /nowhere/model.gguf, size: 1Mi}}
---
apiVersion: freehold.dev/v1alpha1
kind: GovernancePolicy
metadata: {name: careful}
spec: {limits: {maxOutputTokens: 100}}
---
apiVersion: freehold.dev/v1alpha1
kind: HealthProbe
metadata: {name: answers, namespace: default}
spec: {checks: [{name: advances, progress: {stallSeconds: 60}}]}
";
    let applied = person.kubectl(&["apply", "-f", "-"], wishes);
    assert!(applied.good, "{}", applied.errors);
    let told = |kind: &str, name: &str| {
        let object = person.get(&[kind, name, "-n", "default"]).remove(0);
        object["status"]["conditions"]
            .as_array()
            .is_some_and(|conditions| !conditions.is_empty())
    };
    for (kind, name) in [
        ("modeldeployment", "chat"),
        ("governancepolicy", "careful"),
        ("healthprobe", "answers"),
    ] {
        until(&format!("the status of {kind} {name}"), || told(kind, name)).await;
    }
    until("an assignment to the machine", || {
        let node = person.get(&["inferencenode", "machine"]).remove(0);
        node.pointer("/status/instances/0").is_some() || node.pointer("/spec/assignments/0").is_some()
    })
    .await;
    until("an event", || {
        !person.get(&["events.events.k8s.io", "-A"]).is_empty()
    })
    .await;
    // A Lease is made once and renewed every 5 s.
    tokio::time::sleep(Duration::from_secs(12)).await;
    shutdown.cancel();
    agent.join().await;
    operator.join().await.unwrap();

    let text = std::fs::read_to_string(&log).unwrap();
    for (role, account) in [
        ("operator", "freehold-operator"),
        ("agent", "freehold-node-agent"),
    ] {
        let (granted, used) = (granted(&manifest, account), used(&text, account));
        println!("{account}: {} verbs granted, {} used", granted.len(), used.len());
        let refused: Vec<_> = used.iter().filter(|(_, refused)| **refused > 0).collect();
        assert!(refused.is_empty(), "{account} was refused {refused:?}");
        let rare = |verb: &String| {
            RARE.iter()
                .any(|(whose, rare)| *whose == role && rare.starts_with(&format!("{verb}:")))
        };
        let idle: Vec<_> = granted
            .iter()
            .filter(|verb| !used.contains_key(*verb) && !rare(verb))
            .collect();
        assert!(
            idle.is_empty(),
            "{account} is granted and never uses {idle:?}; used: {used:?}"
        );
    }
}
