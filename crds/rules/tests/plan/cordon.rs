//! Machines that shall be emptied.

use freehold_crds::inference_node::Phase;

use crate::build::{World, deployment, instance, node, path};

/// One replica, on the larger machine, with a smaller one beside it.
fn serving() -> World {
    let mut chat = deployment("chat", 0, path("/chat.gguf", Some(100)));
    chat.metadata.generation = Some(1);
    let machines = vec![node("large", 2048, false), node("small", 1024, false)];
    let mut world = World::new(vec![chat], machines);
    world.settle();
    assert_eq!(world.models("large").len(), 1);
    world
}

fn cordon(world: &mut World, name: &str, cordoned: bool) {
    let mut machines = world.input.nodes.iter_mut();
    machines.find(|node| node.name == name).unwrap().cordoned = cordoned;
}

#[test]
fn a_cordoned_machine_serves_until_another_does() {
    let mut world = serving();
    cordon(&mut world, "large", true);
    world.agents = Box::new(|assignment| instance(assignment, Phase::Loading));
    let tell_ready = |world: &mut World, name: &str| {
        let node = world.input.nodes.iter_mut().find(|n| n.name == name).unwrap();
        node.status.instances[0].phase = Phase::Ready;
    };
    for _ in 0..3 {
        let made = world.round();
        tell_ready(&mut world, "large");
        assert_eq!((world.models("large").len(), world.models("small").len()), (1, 1));
        let reasons = &made.deployments.values().next().unwrap().reasons;
        let large = reasons.iter().find(|reason| reason.node == "large").unwrap();
        assert_eq!(large.decision, "Kept");
        assert!(large.reason.contains("until others do"), "{large:?}");
    }
    tell_ready(&mut world, "small");
    world.round();
    assert_eq!((world.models("large").len(), world.models("small").len()), (0, 1));
    assert_eq!(world.condition("chat", "Ready").unwrap().0, "True Serving");

    cordon(&mut world, "large", false);
    world.agents = Box::new(|assignment| instance(assignment, Phase::Ready));
    world.settle();
    assert_eq!(world.models("small").len(), 1, "what moved does not move back");
}

#[test]
fn a_cordoned_machine_gets_nothing_new() {
    let mut world = serving();
    cordon(&mut world, "large", true);
    cordon(&mut world, "small", true);
    world
        .input
        .deployments
        .push(deployment("second", 0, path("/second.gguf", Some(100))));
    world.settle();
    assert_eq!(
        world.models("large"),
        ["/chat.gguf"],
        "no other machine takes it: it stays"
    );
    let (state, message) = world.condition("second", "Ready").unwrap();
    assert!(state.starts_with("False"), "{state}");
    assert!(message.contains("large: it is cordoned"), "{message}");
}

#[test]
fn a_rollout_off_a_cordoned_machine_takes_nothing_down() {
    let mut world = serving();
    cordon(&mut world, "large", true);
    world.edit("chat", |spec| spec.model = Some(path("/new.gguf", Some(100))));
    world.agents = Box::new(|assignment| {
        let old = assignment.model.path.as_deref() == Some("/chat.gguf");
        instance(assignment, if old { Phase::Ready } else { Phase::Loading })
    });
    for _ in 0..3 {
        world.round();
        assert_eq!(world.models("large"), ["/chat.gguf"]);
        assert_eq!(world.models("small"), ["/new.gguf"]);
    }
    world.agents = Box::new(|assignment| instance(assignment, Phase::Ready));
    world.settle();
    assert_eq!((world.models("large").len(), world.models("small").len()), (0, 1));
}
