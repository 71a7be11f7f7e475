//! Real nodes: pods run on them, from an image that came from no registry, and reach each other.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, its helpers too"
)]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use freehold_tests::api_server::Storage;
use freehold_tests::child::Program;
use freehold_tests::cluster::Cluster;
use freehold_tests::node::Node;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use kube::runtime::wait::{await_condition, conditions};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);

/// Creates a pod that waits, on this node.
async fn waits(pods: &Api<Pod>, name: &str, node: &str) -> Pod {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"nodeName": node, "terminationGracePeriodSeconds": 1, "containers": [
            {"name": "waits", "image": "localhost/pause:1", "imagePullPolicy": "Never"},
        ]},
    });
    // The account that a pod speaks as is made by a controller, which may need a moment.
    let pod: Pod = serde_json::from_value(pod).unwrap();
    let made = async {
        while pods.create(&PostParams::default(), &pod).await.is_err() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(PATIENCE, made).await.unwrap();
    let running = await_condition(pods.clone(), name, conditions::is_pod_running());
    let found = tokio::time::timeout(PATIENCE, running).await;
    found.unwrap().unwrap().unwrap()
}

fn ip(pod: &Pod) -> String {
    pod.status.as_ref().unwrap().pod_ip.clone().unwrap()
}

/// What stands before a program that shall run in the network of the node's only pod.
fn network_of_pod(node: &Node) -> Vec<String> {
    let tasks = node.containerd(&["task", "ls"]).unwrap();
    let process = tasks.lines().nth(1).unwrap().split_whitespace().nth(1).unwrap();
    vec![format!("--net=/proc/{process}/ns/net"), "--".to_owned()]
}

/// What a pod hears from an address, once it hears anything.
async fn hears(node: &Node, url: &str, wanted: &str) {
    let begun = Instant::now();
    loop {
        let mut arguments = network_of_pod(node);
        arguments.extend(["curl", "-sk", "--max-time", "2", url].map(str::to_owned));
        let output = Command::new("nsenter").args(arguments).output().unwrap();
        if String::from_utf8_lossy(&output.stdout).contains(wanted) {
            println!("{} heard {url} within {:.1?}", node.name, begun.elapsed());
            return;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "{url}: {output:?}\n{}",
            node.last_words()
        );
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root, and `tests/cluster/parts.py CACHE control node`"]
async fn pods_run_on_real_nodes_and_reach_each_other_and_services() {
    let begun = Instant::now();
    let cluster = Cluster::start(Storage::Kine, 2).await.unwrap();
    let ready = begun.elapsed();
    let client = cluster.server.client().await.unwrap();
    let pods: Api<Pod> = Api::namespaced(client, "default");
    let created = Instant::now();
    let one = waits(&pods, "one", "node-1").await;
    println!(
        "two nodes ready in {ready:.1?}, a pod running {:.1?} after its creation",
        created.elapsed()
    );
    let other = waits(&pods, "other", "node-2").await;
    assert!(ip(&one).starts_with("10.99.1.") && ip(&other).starts_with("10.99.2."));
    // The pod does not listen: a server in its network does.
    let mut arguments = network_of_pod(&cluster.nodes[1]);
    arguments.extend(["python3", "-m", "http.server", "8000"].map(str::to_owned));
    let folder = cluster.server.folder();
    let _served = Program::start("served", Path::new("/usr/bin/nsenter"), &arguments, folder).unwrap();
    hears(
        &cluster.nodes[0],
        &format!("http://{}:8000/", ip(&other)),
        "Directory listing",
    )
    .await;
    // By kube-proxy, from a pod.
    for node in &cluster.nodes {
        hears(node, "https://10.43.0.1/version", "gitVersion").await;
    }

    pods.delete("one", &DeleteParams::default()).await.unwrap();
    let gone = await_condition(pods, "one", |pod: Option<&Pod>| pod.is_none());
    tokio::time::timeout(PATIENCE, gone).await.unwrap().unwrap();
}
