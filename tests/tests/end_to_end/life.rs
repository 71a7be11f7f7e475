//! The chart's life while people ask: installed as the version before, upgraded, rolled back, and taken away.

use std::time::Instant;

use crate::installs;
use crate::traffic::{Desk, Traffic};
use crate::world::{Chart, World, condition};

/// A release's change while people ask: every pod is another one, no question fails, and what is told is right.
async fn changes(world: &World, traffic: &Traffic, what: &str, version: &str, act: impl FnOnce()) {
    let before = traffic.count();
    let begun = Instant::now();
    let old: Vec<String> = world.pod_names();
    act();
    let look = || {
        let pods = world.person.get(&["pods", "-n", "freehold-system"]);
        let new = |pod: &&serde_json::Value| {
            let image = pod["spec"]["containers"][0]["image"].as_str().unwrap_or_default();
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            image.ends_with(&format!(":{version}"))
                && !old.iter().any(|old| old == name)
                && condition(pod, "Ready") == "True"
        };
        let new = pods.iter().filter(new).count();
        if new == pods.len() && new == world.cluster.nodes.len() + 1 {
            Ok(())
        } else {
            Err(format!("{new} of {} are", pods.len()))
        }
    };
    world.until("every pod is a new one", look).await;
    world.until_ready("the model is ready", "smollm2", 2).await;
    traffic.until_well(world, what, 10).await;
    let after = traffic.count();
    println!(
        "{what} in {:.0} s under traffic: {} of {} questions failed",
        begun.elapsed().as_secs_f64(),
        after.0 - before.0,
        after.1 - before.1
    );
    assert_eq!(after.0, before.0, "questions failed: {:#?}", traffic.problems());
    for node in &world.cluster.nodes {
        let machine = world.machine(&node.name);
        let told = ["Ready", "Reachable"].map(|kind| condition(&machine, kind));
        assert_eq!(told, ["True", "True"], "{}", machine["status"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root, the images, and some minutes: just e2e"]
async fn an_upgrade_and_a_rollback_leave_no_question_unanswered() {
    let world = World::make(3).await;
    installs(&world, Chart::Previous, &[]).await;
    let desk = Desk::on(&world, "node-3").await;
    world.deploy(
        "smollm2",
        "  replicas: 2\n  placement: {nodeSelector: {matchLabels: {room: house}}}\n",
    );
    world
        .until_ready("from kubectl apply to Ready", "smollm2", 2)
        .await;
    let traffic = desk.traffic(&world, "service", &world.service(), "smollm2");
    traffic.until_well(&world, "nothing has happened yet", 5).await;
    let upgrade = || world.helm("upgrade", Chart::Ours, &[]);
    changes(&world, &traffic, "the chart was upgraded", "0.1.0", upgrade).await;
    let rollback = || {
        let words = "rollback freehold 1 --namespace freehold-system --wait --timeout 120s";
        let words: Vec<&str> = words.split(' ').collect();
        world.person.helm(&words, "").unwrap();
    };
    changes(&world, &traffic, "the chart was rolled back", "0.0.1", rollback).await;
    drop(traffic);
    leaves_what_the_user_owns(&world, &[]).await;
}

/// Until now nobody of Freehold's asked the API server for more than it was granted, or was refused anything.
pub fn keeps_to_its_rights(world: &World) {
    let mut beyond = world.cluster.server.beyond_grants(&world.person, (0, 0)).unwrap();
    // With a machine that has left, its account and its roles are gone; they were compared before it left.
    let accounts = world.person.get(&["serviceaccounts", "-n", "freehold-system"]);
    let is_there = |complaint: &String| {
        let account = complaint.split(' ').next().unwrap_or_default();
        !account.starts_with("freehold-host-")
            || accounts.iter().any(|there| there["metadata"]["name"] == account)
    };
    beyond.retain(is_there);
    assert!(beyond.is_empty(), "{beyond:#?}");
}

/// Uninstalls. What the cluster then holds more than before the install is what docs/install.md tells of, the
/// person's model and pod, and `own`.
pub async fn leaves_what_the_user_owns(world: &World, own: &[String]) {
    keeps_to_its_rights(world);
    let uninstall = [
        "uninstall",
        "freehold",
        "--namespace",
        "freehold-system",
        "--wait",
    ];
    world.person.helm(&uninstall, "").unwrap();
    let mut stays: Vec<String> = [
        // With them everybody's objects; the API server makes the APIService of it.
        "APIService <none> v1alpha1.freehold.dev",
        "CustomResourceDefinition <none> governancepolicies.freehold.dev",
        "CustomResourceDefinition <none> healthprobes.freehold.dev",
        "CustomResourceDefinition <none> inferencenodes.freehold.dev",
        "CustomResourceDefinition <none> modeldeployments.freehold.dev",
        "ModelDeployment default smollm2",
        "Pod default desk",
        // For machines that may beat there still, and what the cluster puts into every namespace.
        "Namespace <none> freehold-system",
        "ConfigMap freehold-system kube-root-ca.crt",
        "ServiceAccount freehold-system default",
        "Lease freehold-system freehold-operator",
    ]
    .map(str::to_owned)
    .to_vec();
    for node in &world.cluster.nodes {
        stays.push(format!("InferenceNode <none> {}", node.name));
        stays.push(format!("Lease freehold-system {}", node.name));
    }
    stays.extend_from_slice(own);
    stays.sort();
    let look = || {
        let (more, less) = world.more();
        // An API server that was started again has another name, and its old Lease ends an hour later; kubelets tell of
        // themselves when they come to it.
        let clusters = ["Lease kube-system apiserver-", "Lease kube-node-lease "];
        let more: Vec<String> = more
            .into_iter()
            .filter(|held| !clusters.iter().any(|own| held.starts_with(own)))
            .collect();
        if more == stays && less.is_empty() {
            Ok(())
        } else {
            Err(format!(
                "more than before: {more:#?}\nexpected: {stays:#?}\nless: {less:#?}"
            ))
        }
    };
    world.until("only what the user owns is left", look).await;
    for node in &world.cluster.nodes {
        assert_eq!(world.processes(&node.name, "freehold-"), Vec::<u32>::new());
    }
}
