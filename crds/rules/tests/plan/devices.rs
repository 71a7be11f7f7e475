//! Devices that are asked for: found, or told why not.

use freehold_crds::Device;
use freehold_crds::inference_node::{Accelerator, Instance, Phase};

use crate::build::{World, deployment, instance, node, path};

fn asking_for_cuda(accelerators: Vec<Accelerator>) -> World {
    let mut chat = deployment("chat", 0, path("/a.gguf", Some(100)));
    chat.spec.placement.device = Device::Cuda;
    let mut machine = node("a", 2048, true);
    machine.status.inventory.devices = accelerators;
    World::new(vec![chat], vec![machine])
}

fn gpu(usable: bool, reason: Option<&str>) -> Accelerator {
    Accelerator {
        kind: Device::Cuda,
        name: "GPU".to_owned(),
        usable,
        reason: reason.map(str::to_owned),
        ..Accelerator::default()
    }
}

#[test]
fn a_worker_that_fell_back_is_told_with_its_reason() {
    let mut world = asking_for_cuda(vec![gpu(true, None)]);
    world.agents = Box::new(|assignment| Instance {
        device: Some(Device::Cpu),
        device_reason: Some("Cuda did not take the model (out of memory); it runs on the CPU".to_owned()),
        ..instance(assignment, Phase::Ready)
    });
    world.settle();
    let (status, message) = world.condition("chat", "AcceleratorDegraded").unwrap();
    assert_eq!(status, "True OtherDevice");
    assert!(message.contains("out of memory"), "{message}");
    assert_eq!(world.condition("chat", "Ready").unwrap().0, "True Serving");
}

#[test]
fn a_device_in_use_is_no_condition() {
    let mut world = asking_for_cuda(vec![gpu(true, None)]);
    world.settle();
    assert_eq!(world.condition("chat", "AcceleratorDegraded"), None);
}

#[test]
fn a_device_that_cannot_be_used_says_what_is_missing() {
    let reason = "the program of --gpu-worker, /w, does not start: libcublas.so.13 is missing";
    let mut world = asking_for_cuda(vec![gpu(false, Some(reason))]);
    world.settle();
    let plan = world.status("chat").plan;
    assert!(plan[0].reason.contains("libcublas.so.13"), "{plan:?}");
    let mut world = asking_for_cuda(Vec::new());
    world.settle();
    assert!(world.status("chat").plan[0].reason.contains("no Cuda device"));
}
