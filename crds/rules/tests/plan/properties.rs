//! What holds for every plan, whatever the fleet.

use freehold_rules::check::check;
use freehold_rules::plan::{FleetInput, plan};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use proptest::prelude::*;

use crate::build::{deployment, node, now, path};

fn fleet() -> impl Strategy<Value = FleetInput> {
    let deployments = prop::collection::vec(
        (0_i64..1000, 1_u64..900, 0_u32..4, any::<bool>(), any::<bool>()),
        0..8,
    );
    let nodes = prop::collection::vec((0_u64..2000, any::<bool>()), 0..6);
    (deployments, nodes).prop_map(|(deployments, nodes)| FleetInput {
        deployments: deployments
            .into_iter()
            .enumerate()
            .map(|(index, (age, size, replicas, gpu, malformed))| {
                let mut made = deployment(&format!("d{index}"), age, path("/m.gguf", Some(size)));
                made.spec.replicas = replicas;
                if gpu {
                    made.spec.placement.node_selector = Some(LabelSelector {
                        match_labels: Some([("pool".to_owned(), "gpu".to_owned())].into()),
                        match_expressions: None,
                    });
                }
                if malformed {
                    made.spec.model.as_mut().unwrap().url = Some("https://x/y".into());
                }
                made
            })
            .collect(),
        nodes: nodes
            .into_iter()
            .enumerate()
            .map(|(i, (mib, gpu))| node(&format!("n{i}"), mib, gpu))
            .collect(),
        ..FleetInput::default()
    })
}

proptest! {
    #[test]
    fn a_plan_is_sound_and_applied_needs_no_second(mut input in fleet()) {
        let first = plan(&input, now());
        prop_assert!(check(&first, &input).is_empty());
        for (name, spec) in &first.nodes {
            let node = input.nodes.iter_mut().find(|node| &node.name == name).unwrap();
            let reserved: u64 = spec.assignments.iter().map(|a| a.memory_bytes).sum();
            prop_assert!(reserved <= node.status.inventory.allocatable_bytes);
            node.spec = spec.clone();
        }
        prop_assert_eq!(first.nodes, plan(&input, now()).nodes);
    }

    #[test]
    fn the_order_of_the_input_changes_nothing(input in fleet()) {
        let mut turned = input.clone();
        turned.deployments.reverse();
        turned.nodes.reverse();
        prop_assert_eq!(plan(&input, now()), plan(&turned, now()));
    }

    #[test]
    fn a_smaller_fleet_never_uses_a_forbidden_machine(mut input in fleet(), keep in 0_usize..6) {
        input.nodes.truncate(keep);
        let made = plan(&input, now());
        for owner in input.deployments.iter().filter(|d| d.spec.placement.node_selector.is_some()) {
            let name = owner.metadata.name.as_deref().unwrap();
            for node in input.nodes.iter().filter(|node| node.labels["pool"] != "gpu") {
                prop_assert!(made.nodes[&node.name].assignments.iter().all(|a| a.deployment != name));
            }
        }
    }

    #[test]
    fn a_malformed_deployment_moves_nobody(input in fleet()) {
        let mut sound = input.clone();
        sound.deployments.retain(|d| d.spec.model.as_ref().unwrap().url.is_none());
        prop_assert_eq!(plan(&input, now()).nodes, plan(&sound, now()).nodes);
    }
}
