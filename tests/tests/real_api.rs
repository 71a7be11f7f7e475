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
/// Nothing written for this long is rest: twice what the operator waits before it tries anything again.
const QUIET: Duration = Duration::from_secs(4);

/// What is written while nothing happens: the method and the resource as the API server counts them, who writes it,
/// and how long lies between two such writes at least.
const AT_REST: [(&str, &str, Duration); 4] = [
    (
        LEASE_REPLACED,
        "an operator with leader election",
        Duration::from_secs(5),
    ),
    (LEASE_REPLACED, "the API server", Duration::from_secs(10)),
    (LEASE_APPLIED, "an agent", Duration::from_secs(10)),
    (
        STATUS_APPLIED,
        "an agent that tells its status again",
        Duration::from_secs(300),
    ),
];
const LEASE_REPLACED: &str = "PUT leases coordination.k8s.io";
const LEASE_APPLIED: &str = "APPLY leases coordination.k8s.io";
const STATUS_APPLIED: &str = "APPLY inferencenodes status freehold.dev";
/// Groups in which the operator and the agent write. In others the API server does, to itself.
const OURS: [&str; 3] = [" freehold.dev", " coordination.k8s.io", " events.k8s.io"];

/// Who counts the writes.
#[derive(Clone, Copy, PartialEq)]
enum Counted {
    /// Each kind for itself, by the API server.
    Real,
    /// Each kind for itself, and of our own groups alone: others write there too.
    Named,
    /// All in one, by the embedded control plane, which renews nothing of its own.
    Embedded,
}

/// The most that `window` can hold of what is written every so often: each writer's whole periods, and one more,
/// since the window may begin right before a write and end right after one.
fn most(counted: Counted, window: Duration) -> BTreeMap<&'static str, u64> {
    let mut most = BTreeMap::new();
    for (what, who, period) in AT_REST {
        let what = match counted {
            Counted::Embedded if who == "the API server" => continue,
            Counted::Embedded => "changes",
            Counted::Named if !what.ends_with(OURS[0]) => continue,
            Counted::Real | Counted::Named => what,
        };
        *most.entry(what).or_insert(0) += window.as_secs() / period.as_secs() + 1;
    }
    most
}

/// What was written beyond that; and what was not written that must have been, without which nothing was counted.
fn beyond(counted: Counted, window: Duration, written: &BTreeMap<String, u64>) -> Vec<String> {
    let most = most(counted, window);
    let mut beyond = Vec::new();
    for (what, count) in written {
        let limit = most.get(what.as_str()).copied().unwrap_or(0);
        if *count > limit {
            beyond.push(format!("{count} times {what}, where {window:?} can hold {limit}"));
        }
    }
    let beats = [LEASE_REPLACED, LEASE_APPLIED, "changes"];
    for what in most.keys().filter(|what| beats.contains(what)) {
        if !written.contains_key(*what) {
            beyond.push(format!("not once {what}"));
        }
    }
    beyond
}

#[test]
fn a_write_too_many_is_told_from_one_on_the_edge() {
    let window = Duration::from_secs(20);
    let written = |counts: &[(&str, u64)]| counts.iter().map(|(what, n)| ((*what).to_owned(), *n)).collect();
    let beyond = |counts| beyond(Counted::Real, window, &written(counts));
    // Each of the three on both edges: 0.55 writes a second, and yet at rest.
    let edges = [(LEASE_REPLACED, 5 + 3), (LEASE_APPLIED, 3), (STATUS_APPLIED, 1)];
    assert_eq!(beyond(&edges), Vec::<String>::new());
    // Half the rate in all, and an agent that beats twice as often as it should.
    let hasty = [(LEASE_REPLACED, 1), (LEASE_APPLIED, 4)];
    assert_eq!(beyond(&hasty).len(), 1, "{:?}", beyond(&hasty));
    let talkative = [
        (LEASE_REPLACED, 6),
        (LEASE_APPLIED, 2),
        ("APPLY modeldeployments status freehold.dev", 1),
    ];
    assert_eq!(beyond(&talkative).len(), 1, "{:?}", beyond(&talkative));
    assert_eq!(beyond(&[]).len(), 2, "what counts nothing proves nothing");
}

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
    works(
        &control_plane.client(),
        folder.path(),
        "embedded",
        Counted::Embedded,
        counted,
    )
    .await;
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
        let counted = || writes(&client, &OURS[..1]);
        return works(&client, server.folder(), "named cluster", Counted::Named, counted).await;
    }
    let name = format!("{storage:?}");
    works(&client, server.folder(), &name, Counted::Real, || {
        writes(&client, &OURS)
    })
    .await;
    for id in server.process_ids() {
        println!("  process {id}: {} MiB resident", resident(id));
    }
}

async fn works<F: Future<Output = BTreeMap<String, u64>>>(
    client: &Client,
    folder: &Path,
    name: &str,
    counted: Counted,
    writes: impl Fn() -> F,
) {
    let shutdown = CancellationToken::new();
    let config = OperatorConfig {
        leader_election: Some(LeaderElection::default()),
        metrics_listen: None,
        identity: "tests".to_owned(),
        forget_after: freehold_operator::FORGET_AFTER,
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
    let since = |before: &BTreeMap<String, u64>, after: BTreeMap<String, u64>| -> BTreeMap<String, u64> {
        let counts = after.into_iter().map(|(what, count)| {
            let count = count - before.get(&what).copied().unwrap_or(0);
            (what, count)
        });
        counts.filter(|(_, count)| *count > 0).collect()
    };
    // What the last change still has to say is said: a few seconds hold nothing but heartbeats.
    let applied = Instant::now();
    loop {
        let before = writes().await;
        tokio::time::sleep(QUIET).await;
        let mut written = since(&before, writes().await);
        written.retain(|what, _| what != LEASE_REPLACED && what != LEASE_APPLIED);
        // The embedded one counts all in one: more than every writer's one is news.
        let heartbeats = if counted == Counted::Embedded { 2 } else { 0 };
        if written.values().sum::<u64>() <= heartbeats {
            break;
        }
        assert!(
            applied.elapsed() < PATIENCE,
            "it never came to rest; last written: {written:?}"
        );
    }
    let before = writes().await;
    let begun = Instant::now();
    tokio::time::sleep(window).await;
    let after = writes().await;
    // A machine that is busy elsewhere sleeps for longer than it was asked to.
    let window = begun.elapsed();
    let written = since(&before, after);
    #[expect(clippy::cast_precision_loss, reason = "counts of a minute")]
    let per_second = written.values().sum::<u64>() as f64 / window.as_secs_f64();
    println!(
        "{name}: apply to assignment {planned:.2?}, at rest {per_second:.2} writes/s in {window:.1?}: {written:?}"
    );
    let beyond = beyond(counted, window, &written);
    assert!(beyond.is_empty(), "{beyond:?}; written: {written:?}");
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

/// Writes so far by verb and resource, as the API server counts them, in these groups.
async fn writes(client: &Client, groups: &[&str]) -> BTreeMap<String, u64> {
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
            if groups.iter().any(|group| what.ends_with(group)) {
                *counts.entry(what).or_insert(0) += count;
            }
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
