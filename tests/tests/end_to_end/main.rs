//! The whole of it on three real nodes: the images, the chart, a model, and what befalls them.
//!
//! `just e2e` builds the images and runs this. Every figure that it prints is one of docs/benchmarks.md.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, its helpers too"
)]

mod figures;
mod traffic;
mod world;

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use traffic::{Desk, Traffic};
use world::{World, condition, places};

/// What the operator takes for silence, and a little.
const SILENCE: Duration = Duration::from_secs(40 + 15);
/// No model moves before this: 90 s after the last heartbeat, which came at most 12 s before the cut.
const GRACE: Duration = Duration::from_secs(90 - 12);

async fn installs(world: &World, more: &[&str]) {
    let begun = Instant::now();
    world.helm("install", more);
    println!("helm install until every pod is ready: {:.1?}", begun.elapsed());
    for node in &world.cluster.nodes {
        world
            .until(&format!("{} has reported", node.name), || {
                let machines = world.person.get(&["inferencenodes"]);
                let here = machines
                    .iter()
                    .find(|m| m["metadata"]["name"] == node.name.as_str());
                here.filter(|machine| condition(machine, "Ready") == "True")
                    .map(drop)
                    .ok_or_else(|| format!("{machines:?}"))
            })
            .await;
    }
    let said = world.person.helm(
        &["test", "freehold", "-n", "freehold-system", "--timeout", "60s"],
        "",
    );
    assert!(said.good, "{}\n{}\n{}", said.out, said.errors, world.pods());
}

/// Kills processes at once.
fn kill(processes: &[u32]) {
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

async fn answers(desk: &Desk, world: &World, url: &str, model: &str) {
    let (said, _) = world
        .until(&format!("{model} answers at {url}"), || desk.ask(url, model))
        .await;
    assert!(said.contains("Paris"), "{said}");
}

/// A worker, an agent, the operator, the API server, a kubelet: killed in turn.
async fn survives(world: &mut World, desk: &Desk, traffic: &Traffic) {
    let node = places(&world.model("smollm2")).remove(0);
    let workers = world.processes(&node, "freehold-node-agent worker");
    assert_eq!(workers.len(), 1);
    kill(&workers);
    traffic.until_well(world, "a worker was killed", 5).await;
    world
        .until("the restart is told", || {
            let model = world.model("smollm2");
            let instances = model["status"]["instances"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            let told = instances
                .iter()
                .any(|i| i["node"] == node.as_str() && i["restarts"] == 1);
            if told {
                Ok(())
            } else {
                Err(model["status"].to_string())
            }
        })
        .await;
    world
        .until_ready("both replicas are ready again", "smollm2", 2)
        .await;

    for component in ["node-agent", "operator"] {
        let on = (component == "node-agent").then_some(node.as_str());
        let pod = world.pod(component, on).unwrap()["metadata"]["name"]
            .as_str()
            .unwrap()
            .to_owned();
        let arguments = [
            "delete",
            "pod",
            &pod,
            "-n",
            "freehold-system",
            "--grace-period=0",
            "--force",
        ];
        world.person.kubectl(&arguments, "").unwrap();
        traffic
            .until_well(world, &format!("the pod of the {component} was killed"), 20)
            .await;
        let look = || {
            let pod = world.pod(component, on).ok_or("there is none")?;
            if condition(&pod, "Ready") == "True" {
                Ok(())
            } else {
                Err(pod["status"].to_string())
            }
        };
        world.until(&format!("another {component} is there"), look).await;
        world.until_ready("the model is ready", "smollm2", 2).await;
    }

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

/// Every pod is replaced while people ask.
async fn is_upgraded(world: &World, traffic: &Traffic) {
    let before = traffic.count();
    let begun = Instant::now();
    world.helm(
        "upgrade",
        &[
            "--set",
            "nodeAgent.podLabels.upgraded=yes",
            "--set",
            "operator.podLabels.upgraded=yes",
        ],
    );
    let label = ["pods", "-n", "freehold-system", "-l", "upgraded=yes"];
    let look = || {
        let pods = world.person.get(&label);
        let ready = pods
            .iter()
            .filter(|pod| condition(pod, "Ready") == "True")
            .count();
        if ready == world.cluster.nodes.len() + 1 {
            Ok(())
        } else {
            Err(format!("{ready} are ready"))
        }
    };
    world.until("every pod is a new one", look).await;
    world.until_ready("the model is ready", "smollm2", 2).await;
    traffic.until_well(world, "the chart was upgraded", 10).await;
    let after = traffic.count();
    println!(
        "chart upgraded in {:.0} s under traffic: {} of {} questions failed",
        begun.elapsed().as_secs_f64(),
        after.0 - before.0,
        after.1 - before.1
    );
    assert_eq!(after.0, before.0, "questions failed");
}

/// Until now nobody of Freehold's asked the API server for more than it was granted, or was refused anything.
fn keeps_to_its_rights(world: &World) {
    let beyond = world.cluster.server.beyond_grants(&world.person, (0, 0)).unwrap();
    assert!(beyond.is_empty(), "{beyond:#?}");
}

async fn leaves_what_the_user_owns(world: &World) {
    keeps_to_its_rights(world);
    world
        .person
        .helm(
            &[
                "uninstall",
                "freehold",
                "--namespace",
                "freehold-system",
                "--wait",
            ],
            "",
        )
        .unwrap();
    let look = || {
        let pods = world.person.get(&["pods", "-n", "freehold-system"]);
        if pods.is_empty() {
            Ok(())
        } else {
            Err(format!("{} pods", pods.len()))
        }
    };
    world.until("no pod is left", look).await;
    assert_eq!(
        world.person.get(&["modeldeployments", "-A"]).len(),
        1,
        "the user's own stays"
    );
    let kinds = "deployments,daemonsets,services,serviceaccounts,clusterroles,clusterrolebindings,roles,rolebindings,networkpolicies,validatingadmissionpolicies,validatingadmissionpolicybindings";
    let left = world
        .person
        .get(&[kinds, "-A", "-l", "app.kubernetes.io/name=freehold"]);
    assert_eq!(left.len(), 0, "{left:?}");
    // By name, for not everything bears the label.
    let kinds = "configmaps,secrets,leases,poddisruptionbudgets,endpointslices,controllerrevisions,replicasets,jobs,persistentvolumeclaims,serviceaccounts,resourcequotas";
    let names = |namespace: &str| {
        let said = world
            .person
            .kubectl(&["get", kinds, "-n", namespace, "-o", "name"], "")
            .unwrap();
        said.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    // The cluster puts its own into every namespace; Leases are told in docs/install.md with the way to remove them.
    let mut left: Vec<_> = names("freehold-system")
        .into_iter()
        .filter(|name| {
            !matches!(
                name.as_str(),
                "configmap/kube-root-ca.crt" | "serviceaccount/default"
            )
        })
        .collect();
    let machines = world.cluster.nodes.iter().map(|node| node.name.as_str());
    for name in machines.chain(["freehold-operator"]) {
        left.retain(|left| *left != format!("lease.coordination.k8s.io/{name}"));
    }
    assert_eq!(left, Vec::<String>::new());
    for node in &world.cluster.nodes {
        assert_eq!(world.processes(&node.name, "freehold-"), Vec::<u32>::new());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root, the images, and some minutes: just e2e"]
async fn a_model_on_three_machines_outlives_what_befalls_them() {
    let mut world = World::make(3).await;
    installs(&world, &[]).await;
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
    leaves_what_the_user_owns(&world).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root, the images, and some minutes: just e2e"]
async fn an_upgrade_leaves_no_question_unanswered() {
    let world = World::make(3).await;
    installs(&world, &[]).await;
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
    is_upgraded(&world, &traffic).await;
    drop(traffic);
    leaves_what_the_user_owns(&world).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root and the images: just e2e-short"]
async fn a_model_on_a_machine_answers_and_comes_back() {
    let world = World::make(2).await;
    installs(&world, &[]).await;
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
    leaves_what_the_user_owns(&world).await;
}

/// The only operator is on the machine that is cut off: another one takes over, and tells.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root, the images, and some minutes: just e2e"]
async fn an_operator_that_is_cut_off_is_replaced() {
    let world = World::make(2).await;
    installs(&world, &["--set", "operator.nodeSelector=null"]).await;
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
    let look = || match condition(&world.machine(&node), "Reachable").as_str() {
        "False" => Ok(()),
        other => Err(other.to_owned()),
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
    keeps_to_its_rights(&world);
}
