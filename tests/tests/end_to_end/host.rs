//! A machine beside the nodes, joined by the command, and pods' agents: one fleet, as far as the network lets them.

use std::path::Path;
use std::time::Instant;

use freehold_tests::machine::Machine;
use freehold_tests::network::Space;
use freehold_tests::parts::{cache, own};
use freehold_tests::person::{Said, ask};

use crate::answers;
use crate::life::keeps_to_its_rights;
use crate::traffic::Desk;
use crate::world::{MODEL, World};

const NAME: &str = "shed";
const PODS: &str = "10.99.0.0/16";

/// Whether this machine has what a machine beside the nodes is made of.
pub fn is_possible() -> bool {
    Path::new("/lib/systemd/systemd").is_file()
}

fn on(world: &World, command: &[&str], input: &str) -> Said {
    Said::of(&world.machine.as_ref().unwrap().run(command, input).unwrap())
}

/// `smollm2` is served by a pod of node-1, the desk stands on node-2.
pub async fn is_of_the_fleet(world: &mut World, desk: &Desk) {
    let space = joins(world).await;
    let host = world.gateway(NAME);
    assert_eq!(host, format!("http://{}:11480", space.address));
    world.deploy(
        "outside",
        "  placement: {nodeSelector: {matchLabels: {room: shed}}}\n",
    );
    let places = world
        .until_ready("a model beside the nodes is ready", "outside", 1)
        .await;
    assert_eq!(places, [NAME]);

    // A pod of the cluster reaches it at the Service, at a pod's gateway, and where it is.
    for url in [world.service(), world.gateway("node-1"), host.clone()] {
        answers(desk, world, &url, "outside").await;
    }
    // The other way round needs a way to the pods' addresses, which most networks give to nodes alone.
    let enter = space.enter();
    let (refused, took) = world
        .until("it is told that pods cannot be reached", || {
            let said = ask(&enter, &host, "smollm2");
            match said {
                Err(why) if why.contains("node-1, cannot answer now: it cannot be reached") => Ok(why),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    println!("asked for a pod's model without a way there: {refused} ({took:.1?})");
    space.ip(&["route", "delete", "unreachable", PODS]).unwrap();
    for node in &world.cluster.nodes {
        let via = node.space.address.to_string();
        space
            .ip(&["route", "add", &node.pod_subnet(), "via", &via])
            .unwrap();
    }
    let look = || ask(&enter, &host, "smollm2");
    let (said, _) = world.until("with a way there a pod's model answers", look).await;
    assert!(said.contains("Paris"), "{said}");
    leaves(world);
}

async fn joins(world: &mut World) -> Space {
    let programs = own("freehold-node-agent").unwrap();
    let programs = programs.parent().unwrap();
    let space = world.cluster.network.space().unwrap();
    space.ip(&["route", "add", "unreachable", PODS]).unwrap();
    let machine = Machine::start(&space, programs).unwrap();
    let file = cache().join("models").join(MODEL);
    machine.put(&file, &format!("/models/{MODEL}")).unwrap();
    let token = world
        .person
        .run(&programs.join("freehold"), &["node", "token", NAME], "")
        .unwrap();
    world.machine = Some(machine);
    let begun = Instant::now();
    let join = [
        "/opt/freehold/freehold",
        "node",
        "join",
        "--token",
        "-",
        "--label",
        "room=shed",
    ];
    on(world, &join, &token).unwrap();
    println!("joined in {:.1?}", begun.elapsed());
    world.until_reported(NAME).await;
    space
}

fn leaves(world: &mut World) {
    // While its roles are there to compare with.
    keeps_to_its_rights(world);
    let delete = ["delete", "modeldeployment", "outside"];
    world.person.kubectl(&delete, "").unwrap();
    let machine = world.machine.as_ref().unwrap();
    let kubeconfig = machine.administers(&world.cluster.server).unwrap();
    let leave = [
        "/opt/freehold/freehold",
        "node",
        "leave",
        "--purge",
        "--kubeconfig",
        kubeconfig,
    ];
    on(world, &leave, "").unwrap();
    world.machine = None;
}
