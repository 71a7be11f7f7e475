//! Machines that fall silent, alone and together, and an operator that hears nobody.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, its helpers too"
)]

mod common;

use common::{World, condition, let_pass, node_condition};
use freehold_crds::InferenceNode;
use kube::api::DeleteParams;
use kube::runtime::wait::await_condition;
use tokio::time::Instant;

fn routed_to(node: &InferenceNode, target: &str) -> bool {
    node.spec
        .routes
        .iter()
        .any(|route| route.backends.iter().any(|backend| backend.node == target))
}

#[tokio::test(start_paused = true)]
async fn a_silent_machine_is_routed_around_and_then_replaced() {
    let world = World::new();
    let agents = ["a", "b", "c"].map(|name| (name, world.agent(name)));
    let operator = world.operator().await;
    world.deploy("chat").await;
    world.until_ready("chat").await;
    let home = world.until_placed("chat").await;
    let silenced = agents.iter().find(|(name, _)| *name == home).unwrap();
    let witness = agents.iter().find(|(name, _)| *name != home).unwrap().0;
    world
        .until(&world.nodes(), witness, "routed to the home", |node| {
            routed_to(node, &home)
        })
        .await;

    silenced.1.silence(true);
    let since = Instant::now();
    world
        .until(
            &world.nodes(),
            witness,
            "routed around the silent machine",
            |node| !routed_to(node, &home),
        )
        .await;
    let routed_around = since.elapsed().as_secs();
    // The last heartbeat was up to 10 s before.
    assert!((30..=41).contains(&routed_around), "after {routed_around} s");
    assert_eq!(world.assigned(&home).await, ["chat"], "nothing is moved yet");
    world
        .until(&world.nodes(), &home, "was called unreachable", |node| {
            node_condition(node, "Reachable").as_deref() == Some("False")
        })
        .await;
    let silent = world.nodes().get(&home).await.unwrap();
    let reconciling = node_condition(&silent, "Reconciling");
    assert_eq!(
        reconciling.as_deref(),
        Some("True"),
        "the agent's last word is no news"
    );
    let chat = world
        .until(&world.deployments(), "chat", "told of the silence", |d| {
            condition(d, "Ready") == Some(("False".into(), "NodeSilent".into()))
        })
        .await;
    assert!(since.elapsed().as_secs() < 80);
    drop(chat);

    let chat = world
        .until(&world.deployments(), "chat", "was moved", |d| {
            let nodes = d.status.as_ref().and_then(|s| s.node_summary.clone());
            nodes.is_some_and(|nodes| nodes != home)
        })
        .await;
    let moved = since.elapsed().as_secs();
    assert!((80..=91).contains(&moved), "after {moved} s");
    drop(chat);
    world.until_ready("chat").await;

    silenced.1.silence(false);
    world
        .until(&world.nodes(), &home, "was heard again", |node| {
            node_condition(node, "Reachable").as_deref() == Some("True")
        })
        .await;
    let heard = world.nodes().get(&home).await.unwrap();
    assert_eq!(node_condition(&heard, "Reconciling"), None);
    world
        .until(&world.nodes(), &home, "let go of what was moved", |node| {
            node.spec.assignments.is_empty()
        })
        .await;
    operator.stop().await;
    let events = world.events(&home).await;
    for reason in ["NodeJoined", "NodeSilent", "NodeHeard"] {
        assert!(events.iter().any(|(r, ..)| r == reason), "{reason} in {events:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_moves_while_most_of_the_fleet_is_silent() {
    let world = World::new();
    let agents = ["a", "b", "c"].map(|name| (name, world.agent(name)));
    let _operator = world.operator().await;
    world.deploy("chat").await;
    world.until_ready("chat").await;
    let home = world.until_placed("chat").await;
    let other = agents.iter().find(|(name, _)| *name != home).unwrap();
    for (name, agent) in &agents {
        agent.silence(*name == home || *name == other.0);
    }
    let_pass(3600).await;
    assert_eq!(world.assigned(&home).await, ["chat"]);
    for (_, agent) in &agents {
        agent.silence(false);
    }
    world.until_ready("chat").await;
    assert_eq!(world.until_placed("chat").await, home);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_was_silent_before_the_start_gets_no_new_credit() {
    let world = World::new();
    let agents = ["a", "b", "c"].map(|name| (name, world.agent(name)));
    let first = world.operator().await;
    world.deploy("chat").await;
    world.until_ready("chat").await;
    let home = world.until_placed("chat").await;
    agents
        .iter()
        .find(|(name, _)| *name == home)
        .unwrap()
        .1
        .silence(true);
    world
        .until(&world.nodes(), &home, "was called unreachable", |node| {
            node_condition(node, "Reachable").as_deref() == Some("False")
        })
        .await;
    first.stop().await;
    let since = Instant::now();
    let _second = world.operator().await;
    world
        .until(&world.deployments(), "chat", "was moved", |d| {
            let nodes = d.status.as_ref().and_then(|s| s.node_summary.clone());
            nodes.is_some_and(|nodes| nodes != home)
        })
        .await;
    let moved = since.elapsed().as_secs();
    assert!((49..=52).contains(&moved), "after {moved} s, not 90");
}

#[tokio::test(start_paused = true)]
async fn an_operator_that_was_cut_off_blames_no_machine() {
    let world = World::new();
    let _agents = ["a", "b", "c"].map(|name| world.agent(name));
    let operator = world.operator().await;
    world.deploy("chat").await;
    world.until_ready("chat").await;
    let home = world.until_placed("chat").await;
    let_pass(60).await;
    let before = operator.line.writes();
    operator.line.cut(true);
    let_pass(900).await;
    operator.line.cut(false);
    let_pass(300).await;
    assert_eq!(world.until_placed("chat").await, home);
    let node = world.nodes().get(&home).await.unwrap();
    assert_eq!(node_condition(&node, "Reachable").as_deref(), Some("True"));
    world.until_ready("chat").await;
    assert_eq!(
        operator.line.writes(),
        before,
        "not even for a moment is anything routed away"
    );
    // Work goes on.
    world.deploy("later").await;
    world.until_ready("later").await;
}

#[tokio::test(start_paused = true)]
async fn a_machine_without_lease_and_work_is_forgotten_after_ten_minutes() {
    let world = World::new();
    let _stays = world.agent("stays");
    let leaves = world.agent("leaves");
    let _operator = world.operator().await;
    world.until(&world.nodes(), "leaves", "joined", |_| true).await;
    leaves.silence(true);
    drop(leaves);
    world
        .leases()
        .delete("leaves", &DeleteParams::default())
        .await
        .unwrap();
    let since = Instant::now();
    let_pass(500).await;
    assert!(world.nodes().get_opt("leaves").await.unwrap().is_some());
    await_condition(world.nodes(), "leaves", common::gone::<InferenceNode>())
        .await
        .unwrap();
    let forgotten = since.elapsed().as_secs();
    assert!((580..=601).contains(&forgotten), "after {forgotten} s");
    assert!(world.nodes().get_opt("stays").await.unwrap().is_some());
}
