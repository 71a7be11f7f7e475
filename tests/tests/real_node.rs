//! A real node: a pod runs on it, from an image that came from no registry.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, its helpers too"
)]

use std::time::{Duration, Instant};

use freehold_tests::api_server::Storage;
use freehold_tests::node::{NAME, Node};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use kube::runtime::wait::{await_condition, conditions};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root, and `tests/cluster/parts.py CACHE control node`"]
async fn a_pod_runs_on_a_real_node() {
    let begun = Instant::now();
    let node = Node::start(Storage::Kine).await.unwrap();
    let ready = begun.elapsed();
    let client = node.server.client().await.unwrap();
    let pods: Api<Pod> = Api::namespaced(client, "default");
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "waits"},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [
            {"name": "waits", "image": "localhost/pause:1", "imagePullPolicy": "Never"},
        ]},
    });
    let created = Instant::now();
    // The account that a pod speaks as is made by a controller, which may need a moment.
    let pod: Pod = serde_json::from_value(pod).unwrap();
    let made = async {
        while pods.create(&PostParams::default(), &pod).await.is_err() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(PATIENCE, made).await.unwrap();
    let running = await_condition(pods.clone(), "waits", conditions::is_pod_running());
    let found = tokio::time::timeout(PATIENCE, running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    println!(
        "node ready in {ready:.1?}, pod running {:.1?} after its creation",
        created.elapsed()
    );
    assert_eq!(found.spec.unwrap().node_name.as_deref(), Some(NAME));
    assert!(
        found
            .status
            .unwrap()
            .pod_ip
            .is_some_and(|ip| ip.starts_with("10.99.0."))
    );
    pods.delete("waits", &DeleteParams::default()).await.unwrap();
    let gone = await_condition(pods, "waits", |pod: Option<&Pod>| pod.is_none());
    tokio::time::timeout(PATIENCE, gone).await.unwrap().unwrap();
}
