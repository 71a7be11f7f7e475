//! What the policies say of placements.

use freehold_crds::governance_policy::{ModelFormat, ResidencyRules, SupplyChainRules};
use freehold_crds::inference_node::Phase;
use freehold_crds::model_deployment::{HuggingFaceSource, ModelSource, RolloutStrategy};
use freehold_crds::{Enforcement, GovernancePolicy, GovernancePolicySpec};
use freehold_rules::plan::{FleetInput, plan};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::build::{World, deployment, instance, node, now, path, policy};

#[test]
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

#[test]
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

fn only_gpu(enforcement: Enforcement) -> GovernancePolicy {
    let mut spec = GovernancePolicySpec {
        enforcement,
        ..GovernancePolicySpec::default()
    };
    spec.rules.residency = Some(ResidencyRules {
        node_selector: Some(LabelSelector {
            match_labels: Some([("pool".to_owned(), "gpu".to_owned())].into()),
            match_expressions: None,
        }),
        ..ResidencyRules::default()
    });
    GovernancePolicy::new("stay", spec)
}

#[test]
fn residency_that_is_only_recorded_is_recorded() {
    let mut world = World::new(
        vec![deployment("chat", 0, path("/m.gguf", Some(100)))],
        vec![node("a", 1024, false)],
    );
    world.input.policies.push(only_gpu(Enforcement::Audit));
    world.settle();
    let status = world.status("chat");
    assert_eq!(status.ready_replicas, 1, "it runs all the same");
    let violation = &status.violations[0];
    assert_eq!(
        (
            violation.policy.as_str(),
            violation.rule.as_str(),
            violation.evidence.as_str(),
            violation.enforcement
        ),
        (
            "stay",
            "spec.residency.nodeSelector",
            "placed on a, without pool=gpu",
            Enforcement::Audit
        )
    );
    assert_eq!(
        world.condition("chat", "PolicyCompliant").unwrap().0,
        "False PolicyViolation"
    );
    // On a machine that fits there is nothing to record.
    world.input.nodes = vec![node("b", 1024, true)];
    world.settle();
    assert_eq!(world.status("chat").violations, []);
}

#[test]
fn a_rollback_asks_the_policies_of_now() {
    let mut chat = deployment("chat", 0, path("/old/m.gguf", Some(100)));
    chat.spec.rollout.strategy = RolloutStrategy::Replace;
    let mut world = World::new(vec![chat], vec![node("a", 1024, false)]);
    world.settle();
    let denied = SupplyChainRules {
        denied_sources: vec!["file:///old/*".to_owned()],
        ..SupplyChainRules::default()
    };
    world.input.policies.push(policy("no-old", denied));
    world.agents = Box::new(|assignment| instance(assignment, Phase::Failed));
    world.edit("chat", |spec| spec.model = Some(path("/new/m.gguf", Some(100))));
    world.settle();
    assert!(
        world.models("a").is_empty(),
        "what a policy forbids is not put back"
    );
    let (stalled, message) = world.condition("chat", "Stalled").unwrap();
    assert_eq!(stalled, "True RolledBack");
    assert!(
        message.contains("cannot serve: policy no-old forbids it"),
        "{message}"
    );
    assert_eq!(world.status("chat").violations[0].field, "status.stable.model");
    let refusal = world.input.nodes[0].spec.routes[0].refusal.clone().unwrap();
    assert!(refusal.starts_with("PolicyViolation"), "{refusal}");
}

#[test]
fn a_revision_that_a_policy_forbids_does_not_serve_while_the_next_one_loads() {
    let mut world = World::new(
        vec![deployment("chat", 0, path("/old/m.gguf", Some(100)))],
        vec![node("a", 1024, false)],
    );
    world.settle();
    world.agents = Box::new(|assignment| instance(assignment, Phase::Loading));
    let denied = SupplyChainRules {
        denied_sources: vec!["file:///old/*".to_owned()],
        ..SupplyChainRules::default()
    };
    world.input.policies.push(policy("no-old", denied));
    world.edit("chat", |spec| spec.model = Some(path("/new/m.gguf", Some(100))));
    world.settle();
    assert_eq!(world.models("a"), ["/new/m.gguf"]);
}
