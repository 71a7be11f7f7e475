//! The suites on a cluster that is there already, as on a reader's own k3s: over SQLite, with controllers and a node.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, its helpers too"
)]

use std::process::Command;
use std::time::{Duration, Instant};

use freehold_tests::api_server::Storage;
use freehold_tests::cluster::Cluster;

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
    let held = || {
        let person = freehold_tests::person::Person::new(Some(kubeconfig));
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
    let passed = command.status().unwrap().success();
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
