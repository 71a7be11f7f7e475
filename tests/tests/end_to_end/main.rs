//! The whole of it on three real nodes: the images, the chart, a model, and what befalls them.
//!
//! `just e2e` builds the images and runs this. Every figure that it prints is one of docs/benchmarks.md.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, its helpers too"
)]

mod deaths;
mod example;
mod figures;
mod host;
mod life;
mod policies;
mod told;
mod traffic;
mod world;

use std::time::{Duration, Instant};

use deaths::{kill, survives};
use life::leaves_what_the_user_owns;
use serde_json::Value;
use traffic::Desk;
use world::{Chart, World, condition, places};

/// What the operator takes for silence, and a little.
const SILENCE: Duration = Duration::from_secs(40 + 15);
/// No model moves before this: 90 s after the last heartbeat, which came at most 12 s before the cut.
const GRACE: Duration = Duration::from_secs(90 - 12);

async fn installs(world: &World, chart: Chart, more: &[&str]) {
    let begun = Instant::now();
    world.helm("install", chart, more);
    println!("helm install until every pod is ready: {:.1?}", begun.elapsed());
    for node in &world.cluster.nodes {
        world.until_reported(&node.name).await;
    }
    // The chart before asks for an image that is not here.
    if matches!(chart, Chart::Ours) {
        let words = ["test", "freehold", "-n", "freehold-system", "--timeout", "60s"];
        let said = world.person.helm(&words, "");
        assert!(said.good, "{}\n{}\n{}", said.out, said.errors, world.pods());
    }
}

async fn answers(desk: &Desk, world: &World, url: &str, model: &str) {
    let (said, _) = world
        .until(&format!("{model} answers at {url}"), || desk.ask(url, model))
        .await;
    assert!(said.contains("Paris"), "{said}");
}

/// By label, and by memory: what does not fit is told, with the arithmetic.
async fn is_placed(world: &World) {
    world.deploy(
        "upstairs",
        "  placement: {nodeSelector: {matchLabels: {room: attic}}}\n",
    );
    let on = world
        .until_ready("a model of the attic is ready", "upstairs", 1)
        .await;
    assert_eq!(on, ["node-3"]);
    world.deploy(
        "large",
        "  placement: {memory: 350Mi, nodeSelector: {matchLabels: {room: attic}}}\n",
    );
    let look = || {
        let model = world.model("large");
        let status = model["status"].to_string();
        let told =
            condition(&model, "Ready") == "False" && status.contains("memory") && status.contains("node-3");
        if told { Ok(places(&model)) } else { Err(status) }
    };
    let (on, _) = world.until("what does not fit is told", look).await;
    assert_eq!(on, Vec::<String>::new());
    // Room is made, and it comes.
    world
        .person
        .kubectl(&["delete", "modeldeployment", "upstairs"], "")
        .unwrap();
    world.until_ready("it comes once there is room", "large", 1).await;
    world
        .person
        .kubectl(&["delete", "modeldeployment", "large"], "")
        .unwrap();
}

/// A cable is pulled, and put back.
async fn is_cut_off(world: &World, desk: &Desk) {
    world.deploy(
        "solo",
        "  placement: {nodeSelector: {matchLabels: {room: house}}}\n",
    );
    let node = world
        .until_ready("a model on one machine is ready", "solo", 1)
        .await
        .remove(0);
    let gateway = world.gateway("node-3");
    answers(desk, world, &gateway, "solo").await;
    let both = desk.traffic(world, "both", &gateway, "smollm2");
    both.until_well(world, "before the cut", 3).await;

    world
        .cluster
        .network
        .connect(&world.node(&node).space, false)
        .unwrap();
    let cut = Instant::now();
    let away = both.until_well(world, &format!("{node} was cut off"), 30).await;
    assert!(away < SILENCE, "routed away after {away:?}");
    let look = || {
        let machine = world.machine(&node);
        match condition(&machine, "Reachable").as_str() {
            "False" => Ok(cut.elapsed()),
            other => Err(other.to_owned()),
        }
    };
    world.until("its silence is told", look).await;
    let look = || match condition(&world.model("solo"), "Ready").as_str() {
        "False" => Ok(()),
        other => Err(other.to_owned()),
    };
    world.until("nobody says that its model answers", look).await;
    let look = || {
        let model = world.model("solo");
        let moved = condition(&model, "Ready") == "True" && !places(&model).contains(&node);
        if moved {
            Ok(cut.elapsed())
        } else {
            Err(model["status"].to_string())
        }
    };
    let (moved, _) = world.until("its model has moved", look).await;
    println!("moved {:.0} s after the cut", moved.as_secs_f64());
    assert!(moved >= GRACE, "moved after {moved:?}");
    answers(desk, world, &gateway, "solo").await;

    world
        .cluster
        .network
        .connect(&world.node(&node).space, true)
        .unwrap();
    let look = || {
        let machine = world.machine(&node);
        let names = machine["status"]["instances"].to_string();
        let back = condition(&machine, "Reachable") == "True" && !names.contains("default.solo");
        if back {
            Ok(())
        } else {
            Err(machine["status"].to_string())
        }
    };
    world
        .until("it is back, without the model that moved", look)
        .await;
    world
        .until_ready("both replicas are ready again", "smollm2", 2)
        .await;
    both.until_well(world, "it is back", 10).await;
    world
        .person
        .kubectl(&["delete", "modeldeployment", "solo"], "")
        .unwrap();
}

/// A machine is drained: its model moves without a question unanswered, what only it can serve stays.
async fn is_drained(world: &World, desk: &Desk) {
    world.deploy(
        "solo",
        "  placement: {nodeSelector: {matchLabels: {room: house}}}\n",
    );
    let node = world
        .until_ready("a model on one machine is ready", "solo", 1)
        .await
        .remove(0);
    let traffic = desk.traffic(world, "drain", &world.gateway("node-3"), "solo");
    traffic.until_well(world, "before the drain", 5).await;
    let before = traffic.count();
    let begun = Instant::now();
    let drain = [
        "drain",
        &node,
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        "--timeout=60s",
    ];
    world.person.kubectl(&drain, "").unwrap();
    let look = || {
        let model = world.model("solo");
        let moved = condition(&model, "Ready") == "True" && !places(&model).contains(&node);
        if moved {
            Ok(())
        } else {
            Err(model["status"].to_string())
        }
    };
    world.until("its model serves on another", look).await;
    println!(
        "moved {:.1} s after the drain began",
        begun.elapsed().as_secs_f64()
    );
    traffic.until_well(world, "it was drained", 10).await;
    let after = traffic.count();
    assert_eq!(after.0, before.0, "questions failed");
    let both = world
        .until_ready("what no other can take stays", "smollm2", 2)
        .await;
    assert!(both.contains(&node), "{both:?}");
    world.person.kubectl(&["uncordon", &node], "").unwrap();
    world.deploy(
        "pair",
        "  replicas: 2\n  placement: {nodeSelector: {matchLabels: {room: house}}}\n",
    );
    let on = world
        .until_ready("once uncordoned it takes models again", "pair", 2)
        .await;
    assert!(on.contains(&node), "{on:?}");
    world
        .person
        .kubectl(&["delete", "modeldeployment", "solo", "pair"], "")
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root, the images, and some minutes: just e2e"]
async fn a_model_on_three_machines_outlives_what_befalls_them() {
    let mut world = World::make(3).await;
    installs(&world, Chart::Ours, &[]).await;
    let desk = Desk::on(&world, "node-3").await;
    let begun = Instant::now();
    world.deploy(
        "smollm2",
        "  replicas: 2\n  placement: {nodeSelector: {matchLabels: {room: house}}}\n",
    );
    let on = world
        .until_ready("from kubectl apply to Ready", "smollm2", 2)
        .await;
    println!("{:.1?} in all", begun.elapsed());
    assert_eq!(on, ["node-1", "node-2"]);
    let service = world.service();
    answers(&desk, &world, &service, "smollm2").await;
    // Any machine's gateway reaches it.
    for node in ["node-1", "node-2", "node-3"] {
        answers(&desk, &world, &world.gateway(node), "smollm2").await;
    }
    figures::at_rest(&world, &on, Duration::from_secs(60)).await;

    let traffic = desk.traffic(&world, "service", &service, "smollm2");
    traffic.until_well(&world, "nothing has happened yet", 5).await;
    survives(&mut world, &desk, &traffic).await;
    drop(traffic);
    is_placed(&world).await;
    is_drained(&world, &desk).await;
    is_cut_off(&world, &desk).await;
    leaves_what_the_user_owns(&world, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root and the images: just e2e-short"]
async fn a_model_on_a_machine_answers_and_comes_back() {
    let mut world = World::make(2).await;
    installs(&world, Chart::Ours, &[]).await;
    let desk = Desk::on(&world, "node-2").await;
    world.deploy(
        "smollm2",
        "  placement: {nodeSelector: {matchLabels: {room: house}}}\n",
    );
    let on = world
        .until_ready("from kubectl apply to Ready", "smollm2", 1)
        .await;
    assert_eq!(on, ["node-1"]);
    answers(&desk, &world, &world.service(), "smollm2").await;
    answers(&desk, &world, &world.gateway("node-2"), "smollm2").await;
    let traffic = desk.traffic(&world, "service", &world.service(), "smollm2");
    traffic.until_well(&world, "nothing has happened yet", 3).await;
    kill(&world.processes("node-1", "freehold-node-agent worker"));
    traffic.until_well(&world, "the worker was killed", 5).await;
    drop(traffic);
    if host::is_possible() {
        host::is_of_the_fleet(&mut world, &desk).await;
    } else {
        println!("a machine beside the nodes: skipped, for there is no systemd here");
    }
    leaves_what_the_user_owns(&world, &[]).await;
}

/// The only operator is on the machine that is cut off: another one takes over, and tells.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root, the images, and some minutes: just e2e"]
async fn an_operator_that_is_cut_off_is_replaced() {
    let world = World::make(2).await;
    installs(&world, Chart::Ours, &["--set", "operator.nodeSelector=null"]).await;
    let on = |pod: &Value| pod["spec"]["nodeName"].as_str().unwrap().to_owned();
    let node = on(&world.pod("operator", None).unwrap());
    world
        .cluster
        .network
        .connect(&world.node(&node).space, false)
        .unwrap();
    let cut = Instant::now();
    let look = || {
        let pod = world.pod("operator", None).ok_or("there is none")?;
        let elsewhere = on(&pod) != node && condition(&pod, "Ready") == "True";
        if elsewhere {
            Ok(())
        } else {
            Err(pod["status"].to_string())
        }
    };
    world.until("another operator is there", look).await;
    let look = || {
        let machine = world.machine(&node);
        let told = ["Reachable", "Reconciling"].map(|kind| condition(&machine, kind));
        if told == ["False", "True"] {
            Ok(())
        } else {
            Err(told.join(", "))
        }
    };
    world.until("it tells that the machine is silent", look).await;
    println!("told {:.0} s after the cut", cut.elapsed().as_secs_f64());
    world
        .cluster
        .network
        .connect(&world.node(&node).space, true)
        .unwrap();
    let look = || match condition(&world.machine(&node), "Reachable").as_str() {
        "True" => Ok(()),
        other => Err(other.to_owned()),
    };
    world.until("it is back", look).await;
}
