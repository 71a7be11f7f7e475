//! The chart's NetworkPolicies where the network keeps them: with kube-router, as in k3s.

use std::path::Path;
use std::process::Command;

use freehold_tests::child::Program;

use crate::example::hub;
use crate::traffic::Desk;
use crate::world::{Chart, World, condition, network_of};
use crate::{answers, installs, leaves_what_the_user_owns};

/// A port that no policy names.
const OTHER: u16 = 9099;
/// Tries once to connect. Both a refusal and silence are an end by then.
const CONNECTS: &str = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)";
/// Takes connections.
const LISTENS: &str =
    "import socket, sys, time\ns = socket.create_server((\"\", int(sys.argv[1])))\nwhile True: s.accept()";

/// The network of a component's pod, and its address.
fn inside(world: &World, component: &str, node: &str) -> (Vec<String>, String) {
    let pod = world.pod(component, Some(node)).unwrap();
    let address = pod["status"]["podIP"].as_str().unwrap().to_owned();
    (network_of(world.node(node), &address), address)
}

/// Whether a program in this network reaches an address.
fn reaches(network: &[String], address: &str, port: u16) -> bool {
    let mut command = Command::new("nsenter");
    command.args(network).args(["python3", "-c", CONNECTS, address]);
    let said = command.arg(port.to_string()).output().unwrap();
    let errors = String::from_utf8_lossy(&said.stderr);
    let expected = said.status.success() || errors.contains("timed out") || errors.contains("refused");
    assert!(expected, "{errors}");
    said.status.success()
}

fn listens(world: &World, network: &[String]) -> Program {
    let mut arguments = network.to_vec();
    arguments.extend(["python3", "-c", LISTENS, &OTHER.to_string()].map(str::to_owned));
    let folder = world.cluster.server.folder();
    Program::start("listener", Path::new("/usr/bin/nsenter"), &arguments, folder).unwrap()
}

async fn until_reached(
    world: &World,
    what: &str,
    from: &[String],
    (address, port): (&str, u16),
    wanted: bool,
) {
    let look = || {
        if reaches(from, address, port) == wanted {
            Ok(())
        } else {
            Err(format!("{address}:{port} is reached: {}", !wanted))
        }
    };
    world.until(what, look).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root, the images, and some minutes: just e2e"]
async fn the_chart_works_where_the_network_keeps_policies_and_they_hold() {
    let mut world = World::make(2).await;
    world.cluster.keep_policies().unwrap();
    let (_hub, hub_address) = hub(&world);
    world.restrict(&hub_address);
    // With its policies, as the values have it; agents and operator reach the API server, `helm test` them.
    installs(&world, Chart::Ours, &[]).await;
    let desk = Desk::on(&world, "node-2").await;
    let (hub_host, hub_port) = hub_address
        .trim_start_matches("http://")
        .rsplit_once(':')
        .unwrap();
    let hub_place = (hub_host, hub_port.parse::<u16>().unwrap());

    // Nothing out: the hub is on a private network, which no policy names. A person's own pod gets there.
    let (agent, agent_address) = inside(&world, "node-agent", "node-1");
    let home = desk.network();
    until_reached(&world, "a pod of nobody's reaches the hub", home, hub_place, true).await;
    until_reached(&world, "an agent does not", &agent, hub_place, false).await;
    // Nothing in: a port that is not named is closed from outside, though somebody listens.
    let _listener = listens(&world, &agent);
    let other = (agent_address.as_str(), OTHER);
    until_reached(
        &world,
        "the agent reaches itself",
        &agent,
        ("127.0.0.1", OTHER),
        true,
    )
    .await;
    until_reached(
        &world,
        "others do not reach what no policy names",
        home,
        other,
        false,
    )
    .await;
    until_reached(&world, "but its gateway", home, (&agent_address, 11480), true).await;

    let folder = freehold_tests::folder().join("../manifests/examples/demo");
    world
        .person
        .kubectl(&["apply", "-f", folder.to_str().unwrap()], "")
        .unwrap();
    let look = || {
        let model = world.model("smollm2");
        let told = model["status"].to_string();
        if condition(&model, "Ready") == "False" && told.contains("failed to fetch") {
            Ok(told)
        } else {
            Err(told)
        }
    };
    let (told, _) = world.until("that it cannot be fetched is told", look).await;
    println!("{told}");

    // One line of values opens the way.
    let sources =
        format!("networkPolicy.modelSources=[{{\"cidr\":\"{hub_host}/32\",\"ports\":[{hub_port}]}}]");
    world.helm("upgrade", Chart::Ours, &["--set-json", &sources]);
    let on = world
        .until_ready(
            "with a policy for the hub it is fetched and answers",
            "smollm2",
            1,
        )
        .await;
    answers(&desk, &world, &world.service(), "smollm2").await;
    // Through another machine's gateway, too.
    let away = ["node-1", "node-2"]
        .into_iter()
        .find(|node| on[0] != *node)
        .unwrap();
    answers(&desk, &world, &world.gateway(away), "smollm2").await;

    // Only clients that are named.
    let clients = "networkPolicy.clients=[{\"namespaceSelector\":{},\"podSelector\":{\"matchLabels\":{\"may\":\"ask\"}}}]";
    world.helm(
        "upgrade",
        Chart::Ours,
        &["--set-json", &sources, "--set-json", clients],
    );
    let (_, agent_address) = inside(&world, "node-agent", "node-1");
    let gateway = (agent_address.as_str(), 11480);
    until_reached(
        &world,
        "who is not named does not reach a gateway",
        home,
        gateway,
        false,
    )
    .await;
    world
        .person
        .kubectl(&["label", "pod", "desk", "may=ask"], "")
        .unwrap();
    until_reached(&world, "who is named does", home, gateway, true).await;
    answers(&desk, &world, &world.service(), "smollm2").await;
    answers(&desk, &world, &world.gateway(away), "smollm2").await;

    // That it was the policies: without them every way is open.
    world.helm("upgrade", Chart::Ours, &["--set", "networkPolicy.enabled=false"]);
    let (agent, agent_address) = inside(&world, "node-agent", "node-1");
    let _listener = listens(&world, &agent);
    until_reached(
        &world,
        "without policies an agent reaches the hub",
        &agent,
        hub_place,
        true,
    )
    .await;
    let other = (agent_address.as_str(), OTHER);
    until_reached(&world, "and is reached where it listens", home, other, true).await;

    let mut own = vec![
        "StorageClass <none> by-hand".to_owned(),
        "GovernancePolicy <none> house-rules".to_owned(),
        "HealthProbe default answers".to_owned(),
    ];
    own.extend(
        world
            .cluster
            .nodes
            .iter()
            .map(|node| format!("PersistentVolume <none> volume-of-{}", node.name)),
    );
    leaves_what_the_user_owns(&world, &own).await;
}
