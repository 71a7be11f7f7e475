//! The operator and an agent on a real kube-apiserver, over etcd and over kine: from apply to a placed
//! deployment, and what is written while nothing happens.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, its helpers too"
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use freehold_crds::{InferenceNode, ModelDeployment, SYSTEM_NAMESPACE};
use freehold_node_agent::{Agent, AgentConfig};
use freehold_operator::{LeaderElection, Operator, OperatorConfig};
use freehold_tests::api_server::{ApiServer, Storage, install};
use freehold_tests::named::is_named;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client};
use serde_json::json;
use tokio_util::sync::CancellationToken;

/// Whatever is waited for has happened by then, or never will.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the cluster is watched at rest, unless `FREEHOLD_TEST_REST_SECONDS` says otherwise.
const REST_SECONDS: u64 = 20;
/// An operator with leader election renews its Lease every 5 s and an agent its own every 10 s; a status is told
/// again every 5 minutes. A fifth more is room for what falls on an edge of the window.
const WRITES_PER_SECOND_AT_REST: f64 = (1.0 / 5.0 + 1.0 / 10.0) * 1.2;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn works_and_rests_over_etcd() {
    works_and_rests(Storage::Etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn works_and_rests_over_kine() {
    works_and_rests(Storage::Kine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn works_and_rests_on_the_embedded_control_plane() {
    let options = freehold_control_plane::Options {
        data_dir: None,
        crds: freehold_crds::all(),
    };
    let control_plane = freehold_control_plane::ControlPlane::open(options).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let revision = || BTreeMap::from([("changes".to_owned(), control_plane.revision())]);
    let counted = || std::future::ready(revision());
    works(&control_plane.client(), folder.path(), "embedded", 0.0, counted).await;
}

async fn works_and_rests(storage: Storage) {
    if is_named() && storage == Storage::Kine {
        println!("skipped: the named cluster has one storage, which the other test met");
        return;
    }
    let begun = Instant::now();
    let server = ApiServer::start(storage).await.unwrap();
    println!("{storage:?}: ready in {:.1?}", begun.elapsed());
    let client = server.client().await.unwrap();
    install(&client, &freehold_crds::all()).await.unwrap();
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let system = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM_NAMESPACE}});
    namespaces
        .patch(
            SYSTEM_NAMESPACE,
            &PatchParams::apply("person"),
            &Patch::Apply(&system),
        )
        .await
        .unwrap();
    if is_named() {
        // Others write there too: only what is of our own kinds is surely ours.
        let counted = || async {
            let mut counts = writes(&client).await;
            counts.retain(|what, _| what.ends_with(" freehold.dev"));
            counts
        };
        return works(&client, server.folder(), "named cluster", 0.0, counted).await;
    }
    let name = format!("{storage:?}");
    // The API server's own Lease is not ours: it renews it every 10 s.
    works(&client, server.folder(), &name, 1.0 / 10.0, || writes(&client)).await;
    for id in server.process_ids() {
        println!("  process {id}: {} MiB resident", resident(id));
    }
}

async fn works<F: Future<Output = BTreeMap<String, u64>>>(
    client: &Client,
    folder: &Path,
    name: &str,
    own: f64,
    writes: impl Fn() -> F,
) {
    let shutdown = CancellationToken::new();
    let config = OperatorConfig {
        leader_election: Some(LeaderElection::default()),
        metrics_listen: None,
        identity: "tests".to_owned(),
    };
    let operator = Operator::start(config, client.clone(), shutdown.clone())
        .await
        .unwrap();
    let mut config = AgentConfig::new("machine", folder.join("agent"));
    config.gateway_listen = ([127, 0, 0, 1], 0).into();
    let agent = Agent::start(config, client.clone(), shutdown.clone())
        .await
        .unwrap();

    let nodes: Api<InferenceNode> = Api::all(client.clone());
    until(&nodes, "machine", "told its inventory", |node: &InferenceNode| {
        node.status
            .as_ref()
            .is_some_and(|status| status.inventory.memory_bytes > 0)
    })
    .await;
    // A file that is not there: the agent says so, the deployment tells why, and all of it comes to rest.
    let applied = Instant::now();
    let deployments: Api<ModelDeployment> = Api::namespaced(client.clone(), "default");
    let deployment = json!({
        "apiVersion": "freehold.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "chat", "namespace": "default"},
        "spec": {"model": {"path": "/nowhere/model.gguf", "size": "1Mi"}},
    });
    deployments
        .patch("chat", &PatchParams::apply("person"), &Patch::Apply(&deployment))
        .await
        .unwrap();
    until(
        &nodes,
        "machine",
        "was given the deployment",
        |node: &InferenceNode| {
            node.spec
                .assignments
                .iter()
                .any(|assignment| assignment.deployment == "chat")
        },
    )
    .await;
    let planned = applied.elapsed();
    until(
        &deployments,
        "chat",
        "told of its Ready condition",
        |deployment: &ModelDeployment| {
            let conditions = deployment.status.as_ref().map(|status| &status.conditions);
            conditions.is_some_and(|conditions| {
                conditions
                    .iter()
                    .any(|c| c.type_ == "Ready" && c.status == "False")
            })
        },
    )
    .await;

    deployments
        .delete("chat", &DeleteParams::default())
        .await
        .unwrap();
    until(
        &nodes,
        "machine",
        "was rid of the deployment",
        |node: &InferenceNode| node.spec.assignments.is_empty(),
    )
    .await;
    let asked = std::env::var("FREEHOLD_TEST_REST_SECONDS").ok();
    let window = Duration::from_secs(asked.map_or(REST_SECONDS, |text| text.parse().unwrap()));
    // What the last change still has to say is said.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = writes().await;
    tokio::time::sleep(window).await;
    let after = writes().await;
    let written: BTreeMap<&String, u64> = after
        .iter()
        .map(|(what, count)| (what, count - before.get(what).copied().unwrap_or(0)))
        .filter(|(_, count)| *count > 0)
        .collect();
    let total: u64 = written.values().sum();
    #[expect(clippy::cast_precision_loss, reason = "counts of a minute")]
    let per_second = total as f64 / window.as_secs_f64() - own;
    println!(
        "{name}: apply to assignment {planned:.2?}, at rest {per_second:.2} writes/s in {window:?}: {written:?}"
    );
    assert!(
        per_second <= WRITES_PER_SECOND_AT_REST,
        "{per_second} writes a second at rest: {written:?}"
    );
    shutdown.cancel();
    agent.join().await;
    operator.join().await.unwrap();
}

async fn until<K>(api: &Api<K>, name: &str, what: &str, holds: impl Fn(&K) -> bool + Clone)
where
    K: kube::Resource<DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned
        + Send
        + Sync
        + 'static,
{
    let condition = |object: Option<&K>| object.is_some_and(&holds);
    let waited = tokio::time::timeout(PATIENCE, await_condition(api.clone(), name, condition)).await;
    match waited {
        Ok(found) => drop(found.unwrap()),
        Err(_) => panic!("{name} never {what}; last seen: {:#?}", api.get_opt(name).await),
    }
}

/// Writes so far by verb and resource, as the API server counts them.
async fn writes(client: &Client) -> BTreeMap<String, u64> {
    let request = http::Request::get("/metrics").body(Vec::new()).unwrap();
    let text = client.request_text(request).await.unwrap();
    let mut counts = BTreeMap::new();
    for line in text
        .lines()
        .filter(|line| line.starts_with("apiserver_request_total{"))
    {
        let label = |name: &str| {
            let (_, rest) = line.split_once(&format!("{name}=\"")).unwrap_or_default();
            rest.split('"').next().unwrap_or_default().to_owned()
        };
        let verb = label("verb");
        if matches!(verb.as_str(), "POST" | "PUT" | "PATCH" | "APPLY" | "DELETE") {
            let count = line
                .rsplit(' ')
                .next()
                .and_then(|text| text.parse::<f64>().ok())
                .unwrap_or(0.0);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
            let count = count as u64;
            let mut what = verb;
            for name in ["resource", "subresource", "group"] {
                let word = label(name);
                if !word.is_empty() {
                    what = format!("{what} {word}");
                }
            }
            *counts.entry(what).or_insert(0) += count;
        }
    }
    counts
}

fn resident(process: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) / 1024
}
