//! A worker, an agent, the operator, the API server, a kubelet: killed in turn. Serving goes on, and every status
//! that was told meanwhile, not only the last, fits what happened.

use std::process::Command;
use std::time::Duration;

use crate::answers;
use crate::told::{Watches, of_machine, of_model};
use crate::traffic::{Desk, Traffic};
use crate::world::{World, condition, places};

const MODEL: [&str; 2] = ["modeldeployment", "smollm2"];
const TRUE: &str = "True";

/// Kills processes at once.
pub fn kill(processes: &[u32]) {
    for process in processes {
        assert!(
            Command::new("kill")
                .args(["-KILL", &process.to_string()])
                .status()
                .unwrap()
                .success()
        );
    }
}

pub async fn survives(world: &mut World, desk: &Desk, traffic: &Traffic) {
    let node = places(&world.model("smollm2")).remove(0);
    a_worker(world, &node, traffic).await;
    an_agent(world, &node, traffic).await;
    the_operator(world, &node, traffic).await;
    the_api_server(world, desk, traffic).await;
    a_kubelet(world, &node, traffic).await;
}

/// The worker's end is told with its cause and counted, and for as long as it is gone nobody says that it answers.
async fn a_worker(world: &World, node: &str, traffic: &Traffic) {
    let watches = Watches::of(world, "worker", &[&MODEL, &["inferencenode", node]]).await;
    let workers = world.processes(node, "freehold-node-agent worker");
    assert_eq!(workers.len(), 1);
    kill(&workers);
    traffic.until_well(world, "a worker was killed", 5).await;
    let last = || {
        let model = world.model("smollm2");
        let told = of_model(&model, node) == (TRUE.to_owned(), 2, 1, "Ready".to_owned());
        if told {
            Ok(())
        } else {
            Err(model["status"].to_string())
        }
    };
    world
        .until("both replicas are ready again, and the restart is told", last)
        .await;
    let look = || {
        let story = watches.story(0, |model| of_model(model, node));
        if story
            .last()
            .is_some_and(|(_, ready, restarts, _)| (*ready, *restarts) == (2, 1))
        {
            Ok(story)
        } else {
            Err(format!("{story:?}"))
        }
    };
    let (model, _) = world.until("the watch has seen it", look).await;
    let machine = watches.story(1, of_machine);
    println!("told of the model: {model:?}\ntold by the machine: {machine:?}");
    for (_, ready, restarts, phase) in &model {
        // Ready with the count of before is the worker that was killed; the next one bears the next count.
        assert_eq!(*ready == 2, phase == "Ready", "{model:?}");
        assert!(*restarts <= 1);
    }
    let fell = model.iter().position(|(_, ready, ..)| *ready == 1);
    let fell = fell.unwrap_or_else(|| panic!("nobody was told that one was gone: {model:?}"));
    assert!(
        model[..fell].iter().all(|(.., restarts, _)| *restarts == 0),
        "{model:?}"
    );
    assert!(
        model[fell..]
            .iter()
            .all(|(_, ready, restarts, _)| *ready == 1 || *restarts == 1),
        "{model:?}"
    );
    let told = machine.last().unwrap();
    assert!(
        told.3.contains("signal 9") || told.3.contains("SIGKILL"),
        "{told:?}"
    );
    assert!(
        machine.iter().all(|(reachable, ..)| reachable == TRUE),
        "{machine:?}"
    );
}

fn delete_at_once(world: &World, pod: &str) {
    let words = [
        "delete",
        "pod",
        pod,
        "-n",
        "freehold-system",
        "--grace-period=0",
        "--force",
    ];
    world.person.kubectl(&words, "").unwrap();
}

/// Deletes a component's pod without grace, and waits for another one that is ready.
async fn replaces(world: &World, component: &str, node: Option<&str>, traffic: &Traffic) {
    let name = |pod: &serde_json::Value| pod["metadata"]["name"].as_str().unwrap().to_owned();
    let old = name(&world.pod(component, node).unwrap());
    delete_at_once(world, &old);
    let why = format!("the pod of the {component} was killed");
    traffic.until_well(world, &why, 20).await;
    let look = || {
        let pod = world.pod(component, node).ok_or("there is none")?;
        if name(&pod) != old && condition(&pod, "Ready") == TRUE {
            Ok(())
        } else {
            Err(pod["status"].to_string())
        }
    };
    world.until(&format!("another {component} is there"), look).await;
}

/// Nobody can tell that an agent is gone before its heartbeat is late, and that is after its successor came: so the
/// machine stays reachable, and the successor says itself that its model is not there yet.
async fn an_agent(world: &World, node: &str, traffic: &Traffic) {
    let lease = ["lease", node, "--namespace=freehold-system"];
    let watches = Watches::of(world, "agent", &[&MODEL, &["inferencenode", node], &lease]).await;
    replaces(world, "node-agent", Some(node), traffic).await;
    let look = || {
        let story = watches.story(0, |model| of_model(model, node));
        // The new agent counts anew, for its worker is the first that it started.
        if story.len() > 1
            && story
                .last()
                .is_some_and(|(ready, count, ..)| ready == TRUE && *count == 2)
        {
            Ok(story)
        } else {
            Err(format!("{story:?}"))
        }
    };
    let (model, _) = world.until("its model's way back was told", look).await;
    let machine = watches.story(1, of_machine);
    println!("told of the model: {model:?}\ntold by the machine: {machine:?}");
    for (_, ready, _, phase) in &model {
        assert_eq!(*ready == 2, phase == "Ready", "{model:?}");
    }
    assert!(
        model.iter().any(|(_, ready, ..)| *ready == 1),
        "one was gone: {model:?}"
    );
    let phases: Vec<&str> = machine.iter().map(|(_, phase, ..)| phase.as_str()).collect();
    assert_eq!(
        (phases.first(), phases.last()),
        (Some(&"Ready"), Some(&"Ready")),
        "{machine:?}"
    );
    assert!(phases.iter().any(|phase| *phase != "Ready"), "{machine:?}");
    // What was told of its silence fits its heartbeats.
    let beats = watches.story(2, |lease| {
        lease["spec"]["renewTime"].as_str().unwrap_or_default().to_owned()
    });
    let ages = told_ages(&beats);
    println!("seconds between heartbeats: {ages:?}");
    assert!(!ages.is_empty(), "it beat again: {beats:?}");
    let was_late = ages.iter().any(|age| *age > 40.0);
    let was_told = machine.iter().any(|(reachable, ..)| reachable == "False");
    assert_eq!(was_late, was_told, "{ages:?}: {machine:?}");
}

/// Seconds from one to the next.
fn told_ages(times: &[String]) -> Vec<f64> {
    let at = |text: &String| -> f64 {
        let time: k8s_openapi::jiff::Timestamp = text.parse().unwrap();
        time.as_microsecond() as f64 / 1e6
    };
    times.windows(2).map(|pair| at(&pair[1]) - at(&pair[0])).collect()
}

/// While nobody plans, nothing changes: neither is anything told, nor is it told anew by the successor.
async fn the_operator(world: &World, node: &str, traffic: &Traffic) {
    let lease = ["lease", "freehold-operator", "--namespace=freehold-system"];
    let watches = Watches::of(world, "operator", &[&MODEL, &["inferencenode", node], &lease]).await;
    replaces(world, "operator", None, traffic).await;
    let look = || {
        let holders = watches.story(2, |lease| lease["spec"]["holderIdentity"].to_string());
        let new = holders.len() > 1 && holders.last() != holders.first();
        if new {
            Ok(holders)
        } else {
            Err(format!("{holders:?}"))
        }
    };
    let (holders, _) = world.until("another operator is in office", look).await;
    println!("in office: {holders:?}");
    // It is at work: it carries out an edit, and tells of it.
    let touch = [
        "annotate",
        "modeldeployment",
        "smollm2",
        "--overwrite",
        "touched=yes",
    ];
    world.person.kubectl(&touch, "").unwrap();
    world.until_ready("the model is ready", "smollm2", 2).await;
    let model = watches.story(0, |model| of_model(model, node));
    let machine = watches.story(1, of_machine);
    assert_eq!((model.len(), machine.len()), (1, 1), "{model:?} {machine:?}");
}

async fn the_api_server(world: &mut World, desk: &Desk, traffic: &Traffic) {
    let before = traffic.count();
    world.cluster.server.kill();
    tokio::time::sleep(Duration::from_secs(15)).await;
    let during = traffic.count();
    println!(
        "API server down for 15 s: {} of {} questions failed",
        during.0 - before.0,
        during.1 - before.1
    );
    assert!(
        during.1 > before.1 && during.0 == before.0,
        "serving needs no API server"
    );
    world.cluster.server.start_again().await.unwrap();
    world
        .until_ready("the API server is back, and the model ready", "smollm2", 2)
        .await;
    world.deploy(
        "second",
        "  placement: {nodeSelector: {matchLabels: {room: house}}}\n",
    );
    world
        .until_ready("an edit after that is carried out", "second", 1)
        .await;
    answers(desk, world, &world.service(), "second").await;
    world
        .person
        .kubectl(&["delete", "modeldeployment", "second"], "")
        .unwrap();
}

async fn a_kubelet(world: &mut World, node: &str, traffic: &Traffic) {
    let index = world
        .cluster
        .nodes
        .iter()
        .position(|found| found.name == node)
        .unwrap();
    let before = traffic.count();
    world.cluster.nodes[index].kill_kubelet();
    tokio::time::sleep(Duration::from_secs(15)).await;
    let during = traffic.count();
    println!(
        "kubelet down for 15 s: {} of {} questions failed",
        during.0 - before.0,
        during.1 - before.1
    );
    assert!(
        during.1 > before.1 && during.0 == before.0,
        "serving needs no kubelet"
    );
    world.cluster.nodes[index].start_kubelet().unwrap();
    world.cluster.until_ready().await.unwrap();
    world
        .until_ready("the kubelet is back, and the model ready", "smollm2", 2)
        .await;
}
