//! Statuses of every phase as files, for kstatus itself to judge: see `tests/chart/kstatus`.
//!
//! An object that the operator has not seen yet has the status that the kind's definition gives it.
//!
//! `FREEHOLD_RECORD=1 cargo test -p freehold-rules --test plan recorded` writes them; without, they are compared.

use std::collections::BTreeMap;
use std::path::Path;

use freehold_crds::conditions::{READY, reason};
use freehold_crds::governance_policy::{ExpressionRule, SupplyChainRules};
use freehold_crds::health_probe::{Check, InferenceCheck};
use freehold_crds::inference_node::{InferenceNodeStatus, Instance, Phase};
use freehold_crds::{HealthProbe, HealthProbeSpec, InferenceNode, InferenceNodeSpec};
use freehold_rules::plan::Liveness;
use freehold_rules::status::{node_conditions, policy_status, probe_status};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serde_json::{Value, json};

use crate::build::{World, deployment, instance, node, now, path, policy};

/// Files by name, each with what kstatus must say.
type Recorded = BTreeMap<String, Value>;

fn chat() -> World {
    let mut chat = deployment("chat", 0, path("/m.gguf", Some(100)));
    chat.metadata.generation = Some(1);
    World::new(vec![chat], vec![node("a", 1024, false)])
}

fn record(recorded: &mut Recorded, name: &str, expected: &str, object: &impl serde::Serialize) {
    recorded.insert(name.to_owned(), json!({"expected": expected, "object": object}));
}

/// `chat` after it settled in this world.
fn settled(recorded: &mut Recorded, name: &str, expected: &str, mut world: World) {
    world.settle();
    record(recorded, name, expected, world.find("chat"));
}

/// Every phase that the kind's schema knows.
fn phases() -> Vec<Phase> {
    let schema = serde_json::to_value(schemars::schema_for!(Phase)).unwrap();
    let mut names = Vec::new();
    // A variant with a comment is an entry of its own.
    for variant in schema["oneOf"].as_array().unwrap() {
        names.extend(variant.get("const").cloned());
        names.extend(variant["enum"].as_array().into_iter().flatten().cloned());
    }
    assert!(names.len() >= 10, "{schema}");
    names
        .into_iter()
        .map(|name| serde_json::from_value(name).unwrap())
        .collect()
}

/// What kstatus must say of a model whose only instance is in a phase, and what the agent gives as reason.
fn judged(phase: Phase) -> (&'static str, Option<&'static str>) {
    match phase {
        Phase::Ready | Phase::Idle => ("Current", None),
        Phase::Pending | Phase::Fetching | Phase::Verifying | Phase::Loading | Phase::Draining => {
            ("InProgress", None)
        }
        Phase::Backoff => ("InProgress", Some("Crashed")),
        Phase::Failed => ("Failed", Some("DigestMismatch")),
        Phase::Refused => ("InProgress", Some("InsufficientMemory")),
    }
}

fn instances(recorded: &mut Recorded) {
    for phase in phases() {
        let (expected, reason) = judged(phase);
        let mut world = chat();
        world.agents = Box::new(move |assignment| Instance {
            reason: reason.map(str::to_owned),
            message: reason.map(|_| "what the agent says of it".to_owned()),
            ..instance(assignment, phase)
        });
        let name = format!("model-{}", format!("{phase:?}").to_lowercase());
        settled(recorded, &name, expected, world);
    }
}

/// As the API server gives an object that the operator has not seen: by the default of the kind's status.
fn unseen<S: serde::de::DeserializeOwned>(kind: &str) -> Option<S> {
    let kinds = freehold_crds::all();
    let kind = kinds.iter().find(|found| found.spec.names.kind == kind).unwrap();
    let schema = serde_json::to_value(&kind.spec.versions[0].schema).unwrap();
    let default = &schema["openAPIV3Schema"]["properties"]["status"]["default"];
    Some(serde_json::from_value(default.clone()).unwrap())
}

fn circumstances(recorded: &mut Recorded) {
    let mut world = chat();
    world.find("chat").status = unseen("ModelDeployment");
    record(recorded, "model-unseen", "InProgress", world.find("chat"));

    let mut world = chat();
    world.input.nodes.clear();
    settled(recorded, "model-without-machines", "InProgress", world);

    let mut world = chat();
    world.input.nodes = vec![node("a", 50, false)];
    settled(recorded, "model-without-room", "InProgress", world);

    let mut world = chat();
    world.settle();
    world.input.nodes[0].liveness = Liveness::Silent;
    settled(recorded, "model-on-a-silent-machine", "InProgress", world);

    let mut world = chat();
    world.edit("chat", |spec| spec.model = None);
    settled(recorded, "model-invalid", "Failed", world);

    let mut world = chat();
    let rules = SupplyChainRules {
        require_digest: true,
        ..SupplyChainRules::default()
    };
    world.input.policies.push(policy("digests", rules));
    settled(recorded, "model-forbidden", "Failed", world);

    // kstatus has no word for what its owner holds back: Argo CD's health in manifests/argocd has.
    let mut world = chat();
    world.edit("chat", |spec| spec.suspend = true);
    settled(recorded, "model-suspended", "InProgress", world);

    let mut world = chat();
    world.edit("chat", |spec| spec.replicas = 0);
    settled(recorded, "model-of-no-replicas", "Current", world);

    // The new revision loads while the old one serves.
    let mut world = chat();
    world.settle();
    world.agents = Box::new(|assignment| {
        let old = assignment.model.path.as_deref() == Some("/m.gguf");
        instance(assignment, if old { Phase::Ready } else { Phase::Loading })
    });
    world.edit("chat", |spec| spec.model = Some(path("/new.gguf", Some(100))));
    settled(recorded, "model-changing", "InProgress", world);

    // The new revision failed and the old one was put back: it serves, and the spec is not carried out.
    let mut world = chat();
    world.settle();
    world.agents = Box::new(|assignment| {
        let old = assignment.model.path.as_deref() == Some("/m.gguf");
        instance(assignment, if old { Phase::Ready } else { Phase::Failed })
    });
    world.edit("chat", |spec| spec.model = Some(path("/new.gguf", Some(100))));
    settled(recorded, "model-rolled-back", "Failed", world);

    let mut world = chat();
    world.settle();
    let deleted = world.find("chat");
    deleted.metadata.deletion_timestamp = Some(Time(now()));
    deleted.metadata.finalizers = Some(vec!["freehold.dev/example".to_owned()]);
    record(recorded, "model-deleted", "Terminating", deleted);
}

fn policies_and_probes(recorded: &mut Recorded) {
    let mut world = chat();
    world.settle();
    let plan = world.plan();

    let mut rules = policy("digests", SupplyChainRules::default());
    rules.metadata.generation = Some(1);
    rules.status = unseen("GovernancePolicy");
    record(recorded, "policy-unseen", "InProgress", &rules);
    rules.status = Some(policy_status(&rules, &plan, &world.input, now()));
    record(recorded, "policy-held", "Current", &rules);
    rules.spec.rules.expressions.push(ExpressionRule {
        name: "broken".to_owned(),
        expression: "object.spec.".to_owned(),
        ..ExpressionRule::default()
    });
    rules.status = Some(policy_status(&rules, &plan, &world.input, now()));
    record(recorded, "policy-invalid", "Failed", &rules);

    let check = Check {
        name: "capital".to_owned(),
        inference: Some(InferenceCheck {
            prompt: "The capital of France is".to_owned(),
            expect: Some("(?i)paris".to_owned()),
            ..InferenceCheck::default()
        }),
        ..Check::default()
    };
    let mut probe = HealthProbe::new(
        "answers",
        HealthProbeSpec {
            checks: vec![check],
            ..HealthProbeSpec::default()
        },
    );
    probe.metadata.namespace = Some("default".to_owned());
    probe.metadata.generation = Some(1);
    probe.status = unseen("HealthProbe");
    record(recorded, "probe-unseen", "InProgress", &probe);
    probe.status = Some(probe_status(&probe, &plan, &world.input, now()));
    record(recorded, "probe-held", "Current", &probe);
    for check in &mut probe.spec.checks {
        check.inference.as_mut().unwrap().expect = Some("(".to_owned());
    }
    probe.status = Some(probe_status(&probe, &plan, &world.input, now()));
    record(recorded, "probe-invalid", "Failed", &probe);
}

/// A machine: its agent's word, and what the operator says beside it.
fn machines(recorded: &mut Recorded) {
    let mut machine = InferenceNode::new("a", InferenceNodeSpec::default());
    machine.metadata.generation = Some(1);
    machine.status = unseen("InferenceNode");
    record(recorded, "machine-unseen", "InProgress", &machine);
    let cases = [
        ("heard", Liveness::Alive, true, "Current"),
        ("stopping", Liveness::Alive, false, "InProgress"),
        ("silent", Liveness::Silent, true, "InProgress"),
        ("lost", Liveness::Lost, true, "InProgress"),
        // From the status of the silent one: what is no longer true goes.
        ("heard-again", Liveness::Alive, true, "Current"),
    ];
    for (name, liveness, ready, expected) in cases {
        let old = machine.status.take().unwrap_or_default().conditions;
        let mut conditions = node_conditions(&old, liveness, 40, now());
        let later = now() + jiff::SignedDuration::from_secs(60);
        assert_eq!(
            node_conditions(&conditions, liveness, 40, later),
            conditions,
            "told again"
        );
        conditions.push(Condition {
            type_: READY.to_owned(),
            status: if ready { "True" } else { "False" }.to_owned(),
            reason: if ready { reason::AS_EXPECTED } else { "Stopping" }.to_owned(),
            message: "the agent runs".to_owned(),
            last_transition_time: Time(now()),
            observed_generation: Some(1),
        });
        machine.status = Some(InferenceNodeStatus {
            observed_generation: Some(1),
            conditions,
            ..InferenceNodeStatus::default()
        });
        record(recorded, &format!("machine-{name}"), expected, &machine);
    }
}

#[test]
fn recorded_statuses_are_those_of_this_code() {
    let mut recorded = Recorded::new();
    instances(&mut recorded);
    circumstances(&mut recorded);
    policies_and_probes(&mut recorded);
    machines(&mut recorded);

    let folder =
        Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../tests/chart/kstatus/recorded");
    let write = std::env::var_os("FREEHOLD_RECORD").is_some();
    if write {
        std::fs::create_dir_all(&folder).unwrap();
    }
    for (name, value) in &recorded {
        let file = folder.join(format!("{name}.json"));
        let text = format!("{}\n", serde_json::to_string_pretty(value).unwrap());
        if write {
            std::fs::write(&file, &text).unwrap();
        }
        let found = std::fs::read_to_string(&file).unwrap_or_default();
        assert_eq!(
            found, text,
            "{name} differs: run this test with FREEHOLD_RECORD=1 and judge it anew"
        );
    }
    let files = std::fs::read_dir(&folder).unwrap().count();
    assert_eq!(
        files,
        recorded.len(),
        "a file of a phase that is no more lies in {folder:?}"
    );
}
