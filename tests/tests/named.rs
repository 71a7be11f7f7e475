//! The suites on a cluster that is there already, as on a reader's own k3s: over SQLite, with controllers and a node.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, its helpers too"
)]

use std::process::Command;
use std::time::{Duration, Instant};

use freehold_tests::api_server::{ApiServer, Storage};
use freehold_tests::cluster::Cluster;
use freehold_tests::named::{NamedCluster, played};
use freehold_tests::person::Person;
use serde_json::{Value, json};

/// What runs on any cluster. The others start, cut off and kill machines of their own.
const SUITES: [&str; 3] = ["conformance", "chart", "real_api"];
/// What is deleted is gone by then.
const PATIENCE: Duration = Duration::from_secs(600);
/// What the cluster holds of the tests' own afterwards.
const KINDS: &str = "crd,ns,clusterroles,clusterrolebindings,validatingadmissionpolicies,nodes";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root, and `tests/cluster/parts.py CACHE control node`"]
async fn the_suites_run_on_a_named_cluster_and_leave_it_as_it_was() {
    let cluster = Cluster::start(Storage::Kine, 1).await.unwrap();
    let kubeconfig = cluster.server.kubeconfig();
    let person = Person::new(Some(kubeconfig));
    let held = || {
        let said = person.kubectl(&["get", KINDS, "-o", "name"], "").unwrap();
        said.lines()
            .map(str::to_owned)
            .collect::<std::collections::BTreeSet<_>>()
    };
    let before = held();
    let mut command = Command::new(std::env::var_os("CARGO").unwrap());
    // What cargo told this test would make its own builds look outdated.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_") && !matches!(&*text, "CARGO_HOME" | "CARGO_TARGET_DIR") {
            command.env_remove(&name);
        }
    }
    // As ./tests/run builds: nothing is built again.
    command.args(["test", "--workspace"]);
    for suite in SUITES {
        command.args(["--test", suite]);
    }
    command.args(["--", "--test-threads=1", "--nocapture"]);
    command.env("FREEHOLD_TEST_KUBECONFIG", kubeconfig);
    let mut child = command.spawn().unwrap();
    let passed = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.success();
        }
        let pods = person.get(&["pods", "-A", "-l", "app.kubernetes.io/name=freehold"]);
        let strays: Vec<String> = pods
            .iter()
            .map(|pod| format!("{} on {}", pod["metadata"]["name"], pod["spec"]["nodeName"]))
            .collect();
        if !strays.is_empty() {
            // Killed, it would clean up nothing: its own end is waited for.
            child.wait().unwrap();
            panic!("the chart's pods were to start nowhere: {strays:?}");
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    assert!(passed, "the suites failed, see above");
    // Hundreds of namespaces are taken away by a controller, one after the other.
    let begun = Instant::now();
    while before != held() && begun.elapsed() < PATIENCE {
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    assert_eq!(
        before,
        held(),
        "the suites left something, or took something away"
    );
}

/// A cluster whose owner calls machines as anybody would, with work on them that nobody else may touch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_named_cluster_keeps_its_machines_and_what_runs_there() {
    let server = ApiServer::start_with(Storage::Kine, &[], &[]).await.unwrap();
    let person = Person::new(Some(server.kubeconfig()));
    let node =
        |name: &str| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}).to_string();
    let pod = |name: &str, node: &str, labels: Value| {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default", "labels": labels},
            "spec": {"nodeName": node, "containers": [{"name": "a", "image": "a"}]}})
        .to_string()
    };
    // No controller runs here that would make it.
    person
        .kubectl(&["create", "serviceaccount", "default"], "")
        .unwrap();
    for name in ["machine", "other", "node-1"] {
        person.kubectl(&["create", "-f", "-"], &node(name)).unwrap();
        let pod = pod(&format!("of-{name}"), name, json!({}));
        person.kubectl(&["create", "-f", "-"], &pod).unwrap();
    }
    let held = || -> Vec<String> {
        let kinds = "nodes,pods,crd,validatingadmissionpolicies,validatingadmissionpolicybindings";
        let found = person.get(&[kinds, "-A"]);
        let text = |object: &Value| format!("{} {}", object["kind"], object["metadata"]);
        let mut held: Vec<String> = found.iter().map(text).collect();
        held.sort();
        held
    };
    let before = held();
    let named = NamedCluster::of(server.kubeconfig().to_owned()).await.unwrap();
    let ours = json!({"app.kubernetes.io/name": "freehold"});
    let refused = person.kubectl(&["create", "-f", "-"], &pod("stray", "node-1", ours.clone()));
    assert!(refused.unwrap_err().contains("off real machines"));
    // What a test plays, and takes away.
    let machine = played("machine");
    person.kubectl(&["create", "-f", "-"], &node(&machine)).unwrap();
    person
        .kubectl(&["create", "-f", "-"], &pod("agent", &machine, ours))
        .unwrap();
    drop(named);
    assert_eq!(before, held());

    // A name that is taken is nobody's to delete.
    person.kubectl(&["create", "-f", "-"], &node(&machine)).unwrap();
    let refused = NamedCluster::of(server.kubeconfig().to_owned())
        .await
        .unwrap_err();
    assert!(format!("{refused:#}").contains(&machine), "{refused:#}");
    let there = person.get(&["nodes"]);
    assert!(
        there
            .iter()
            .any(|node| node["metadata"]["name"] == machine.as_str()),
        "{there:?}"
    );
}
