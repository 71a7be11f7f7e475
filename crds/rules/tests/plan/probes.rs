//! What machines are told of replicas elsewhere.

use freehold_crds::health_probe::{Check, ProgressCheck, Remediation, RemediationAction};
use freehold_crds::inference_node::{Phase, ReplicaCount};
use freehold_crds::{HealthProbe, HealthProbeSpec};
use freehold_rules::plan::Liveness;

use crate::build::{World, deployment, instance, node, path};

fn fleet(min_healthy_percent: u32) -> World {
    let mut chat = deployment("chat", 0, path("/m.gguf", Some(100)));
    chat.spec.replicas = 3;
    let nodes = ["a", "b", "c"].map(|name| node(name, 1024, false));
    let mut world = World::new(vec![chat], nodes.to_vec());
    let mut probe = HealthProbe::new(
        "pulse",
        HealthProbeSpec {
            checks: vec![Check {
                name: "moves".to_owned(),
                progress: Some(ProgressCheck::default()),
                ..Check::default()
            }],
            remediation: Remediation {
                action: RemediationAction::Restart,
                min_healthy_percent,
                ..Remediation::default()
            },
            ..HealthProbeSpec::default()
        },
    );
    probe.metadata.namespace = Some("default".to_owned());
    world.input.probes.push(probe);
    world.settle();
    world
}

fn elsewhere(world: &World, node: &str) -> Option<ReplicaCount> {
    let node = world.input.nodes.iter().find(|n| n.name == node).unwrap();
    node.spec.probes[0].elsewhere
}

#[test]
fn a_floor_for_the_fleet_counts_the_replicas_of_the_other_machines() {
    let mut world = fleet(50);
    let two_of_two = ReplicaCount { healthy: 2, all: 2 };
    assert_eq!(elsewhere(&world, "a"), Some(two_of_two));
    // One is silent, one is loading again.
    world.input.nodes[1].liveness = Liveness::Silent;
    world.settle();
    assert_eq!(elsewhere(&world, "a"), Some(ReplicaCount { healthy: 1, all: 2 }));
    assert_eq!(
        elsewhere(&world, "b"),
        Some(two_of_two),
        "of the others, not of itself"
    );
    world.agents = Box::new(|assignment| instance(assignment, Phase::Loading));
    world.answer();
    world.settle();
    assert_eq!(elsewhere(&world, "a"), Some(ReplicaCount { healthy: 0, all: 2 }));
}

#[test]
fn without_a_floor_no_spec_changes_with_the_health_of_others() {
    assert_eq!(elsewhere(&fleet(0), "a"), None);
}
