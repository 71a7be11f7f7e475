//! Properties of the plan and regressions of R's review. NEVER COMPILED (build freeze): goes to
//! crds/rules/tests/properties.rs. The tests under "open" fail on the code of 11b9977.

use freehold_crds::governance_policy::{ModelFormat, SupplyChainRules};
use freehold_crds::inference_node::{Assignment, Instance, Phase};
use freehold_crds::model_deployment::{HuggingFaceSource, ModelSource};
use freehold_crds::{GovernancePolicy, GovernancePolicySpec, ModelDeployment, ModelDeploymentSpec};
use freehold_rules::check::check;
use freehold_rules::plan::{FleetInput, NodeInput, plan};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, Time};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn deployment(name: &str, age: i64, model: ModelSource) -> ModelDeployment {
    let spec = ModelDeploymentSpec {
        model: Some(model),
        ..ModelDeploymentSpec::default()
    };
    let mut deployment = ModelDeployment::new(name, spec);
    deployment.metadata.namespace = Some("default".into());
    deployment.metadata.creation_timestamp = Some(Time(Timestamp::from_second(1_700_000_000 - age).unwrap()));
    deployment
}

fn path(path: &str, size_mib: Option<u64>) -> ModelSource {
    ModelSource {
        path: Some(path.into()),
        size: size_mib.map(|size| format!("{size}Mi").as_str().into()),
        ..ModelSource::default()
    }
}

fn node(name: &str, mib: u64, gpu: bool) -> NodeInput {
    let mut node = NodeInput {
        name: name.into(),
        ..NodeInput::default()
    };
    node.labels
        .insert("pool".into(), if gpu { "gpu" } else { "cpu" }.into());
    node.status.inventory.allocatable_bytes = mib * MIB;
    node
}

fn policy(name: &str, rules: SupplyChainRules) -> GovernancePolicy {
    let mut spec = GovernancePolicySpec::default();
    spec.rules.supply_chain = Some(rules);
    GovernancePolicy::new(name, spec)
}

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

// ---- open: each fails until its finding is mended ----

fn running_old(mib: u64) -> NodeInput {
    let mut node = node("a", mib, false);
    node.spec.assignments.push(Assignment {
        name: "default.chat.old".into(),
        namespace: "default".into(),
        deployment: "chat".into(),
        revision: "old".into(),
        model: path("/old.gguf", None),
        memory_bytes: 400 * MIB,
        ..Assignment::default()
    });
    node.status.instances.push(Instance {
        name: "default.chat.old".into(),
        phase: Phase::Ready,
        ..Instance::default()
    });
    node
}

#[test] // finding 1
fn an_old_revision_serves_on_while_the_new_one_fits_nowhere() {
    let input = FleetInput {
        deployments: vec![deployment("chat", 0, path("/new.gguf", Some(2048)))],
        nodes: vec![running_old(1024)],
        ..FleetInput::default()
    };
    let made = plan(&input, now());
    assert!(made.nodes["a"].assignments.iter().any(|a| a.revision == "old"));
}

#[test] // finding 4
fn formats_that_exclude_each_other_allow_nothing() {
    let only = |format| SupplyChainRules {
        allowed_formats: vec![format],
        ..SupplyChainRules::default()
    };
    let input = FleetInput {
        deployments: vec![deployment("chat", 0, path("/models/x", None))],
        policies: vec![
            policy("a", only(ModelFormat::Gguf)),
            policy("b", only(ModelFormat::Safetensors)),
        ],
        nodes: vec![node("a", 1024, false)],
        ..FleetInput::default()
    };
    assert!(plan(&input, now()).nodes["a"].assignments.is_empty());
}

#[test] // finding 5
fn allowed_sources_cannot_be_left_by_dots_or_a_mirror() {
    let hub = |file: &str, endpoint: Option<&str>| ModelSource {
        hugging_face: Some(HuggingFaceSource {
            repository: "Good/x".into(),
            file: file.into(),
            revision: "main".into(),
            endpoint: endpoint.map(Into::into),
        }),
        ..ModelSource::default()
    };
    for model in [
        path("/srv/models/../../home/u/m.gguf", None),
        hub("m.gguf", Some("http://evil.example")),
        hub("../../../../Evil/y/resolve/main/m.gguf", None),
    ] {
        let allowed = vec!["hf://Good/*".to_owned(), "file:///srv/models/*".to_owned()];
        let input = FleetInput {
            deployments: vec![deployment("chat", 0, model.clone())],
            policies: vec![policy(
                "a",
                SupplyChainRules {
                    allowed_sources: allowed,
                    ..SupplyChainRules::default()
                },
            )],
            nodes: vec![node("a", 1024, false)],
            ..FleetInput::default()
        };
        assert!(plan(&input, now()).nodes["a"].assignments.is_empty(), "{model:?}");
    }
}
