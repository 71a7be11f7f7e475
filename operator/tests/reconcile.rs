//! From what people write to what machines do, and back.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, its helpers too"
)]

mod common;

use common::{World, condition, deployment, gone, instance, let_pass};
use freehold_crds::inference_node::{FetchProgress, Instance, Phase};
use freehold_crds::{GovernancePolicy, HealthProbe, InferenceNode, ModelDeployment};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::runtime::wait::await_condition;
use serde_json::json;

#[tokio::test(start_paused = true)]
async fn applied_deployment_is_assigned_and_becomes_ready() {
    let world = World::new();
    let _agent = world.agent("pi");
    let operator = world.operator().await;
    world.deploy("chat").await;
    let chat = world.until_ready("chat").await;

    let status = chat.status.clone().unwrap();
    assert_eq!(status.observed_generation, chat.metadata.generation);
    assert_eq!(status.replica_summary.as_deref(), Some("1/1"));
    assert_eq!(status.node_summary.as_deref(), Some("pi"));
    assert_eq!(status.names, ["chat"]);
    assert_eq!(status.endpoints, ["http://pi:11480/v1"]);
    assert_eq!(
        condition(&chat, "Reconciling"),
        None,
        "Reconciling is there only while it is true"
    );
    assert_eq!(condition(&chat, "Stalled"), None);

    let node = world.nodes().get("pi").await.unwrap();
    let revision = status.revision.unwrap();
    assert_eq!(node.spec.assignments.len(), 1);
    assert_eq!(node.spec.assignments[0].name, format!("default.chat.{revision}"));
    assert_eq!(node.spec.routes[0].backends[0].node, "pi");
    let labels = node.metadata.labels.unwrap();
    assert_eq!(
        labels.get("zone").map(String::as_str),
        Some("attic"),
        "labels come from the Lease"
    );
    assert_eq!(
        labels.get("kubernetes.io/hostname").map(String::as_str),
        Some("pi")
    );
    assert!(!labels.contains_key("app.kubernetes.io/component"));
    operator.stop().await;
}

#[tokio::test(start_paused = true)]
async fn deployment_waits_for_a_machine_and_says_so() {
    let world = World::new();
    let _operator = world.operator().await;
    world.deploy("chat").await;
    world
        .until(
            &world.deployments(),
            "chat",
            "told that no machine is known",
            |d| condition(d, "Ready") == Some(("False".into(), "NoNodes".into())),
        )
        .await;
    let _agent = world.agent("pi");
    world.until_ready("chat").await;
}

#[tokio::test(start_paused = true)]
async fn the_way_to_ready_is_told_in_status_and_events() {
    let world = World::new();
    let agent = world.agent("pi");
    agent.behave(|assignment| Instance {
        progress: Some(FetchProgress {
            bytes_done: 41 << 20,
            bytes_total: 100 << 20,
            seconds_left: Some(12),
        }),
        ..instance(assignment, Phase::Fetching)
    });
    let operator = world.operator().await;
    world.deploy("chat").await;
    let fetching = world
        .until(&world.deployments(), "chat", "was fetching", |d| {
            condition(d, "Ready") == Some(("False".into(), "Fetching".into()))
        })
        .await;
    let message = &fetching.status.unwrap().conditions[0].message;
    assert!(
        message.contains("41 %") && message.contains("12 s left"),
        "{message}"
    );
    agent.behave(|assignment| instance(assignment, Phase::Loading));
    world
        .until(&world.deployments(), "chat", "was loading", |d| {
            condition(d, "Ready") == Some(("False".into(), "Loading".into()))
        })
        .await;
    agent.behave(|assignment| instance(assignment, Phase::Ready));
    world.until_ready("chat").await;
    operator.stop().await;
    let events = world.events("chat").await;
    let reasons: Vec<&str> = events.iter().map(|(reason, ..)| reason.as_str()).collect();
    let place = |reason: &str| reasons.iter().position(|r| *r == reason);
    let story = ["Planned", "Fetching", "Loading", "Ready"].map(place);
    assert!(
        story.iter().all(Option::is_some) && story.is_sorted(),
        "{events:?}"
    );
    assert!(
        events.iter().all(|(_, _, times)| *times == 1),
        "each is told once: {events:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn steady_state_writes_nothing() {
    let world = World::new();
    let agents = [world.agent("a"), world.agent("b"), world.agent("c")];
    let operator = world.operator().await;
    for name in ["one", "two", "three"] {
        world.deploy(name).await;
    }
    let policy = json!({"metadata": {"name": "record"}, "spec": {
        "enforcement": "Audit",
        "supplyChain": {"requireDigest": true, "allowedLicences": ["MIT", "Apache-2.0"]},
        "access": {"keys": [
            {"name": "zoe", "sha256": "a".repeat(64), "models": ["two", "one"]},
            {"name": "ann", "sha256": "b".repeat(64)},
        ]},
    }});
    world.apply(&world.policies(), &policy).await;
    let probes: Api<HealthProbe> = Api::namespaced(world.client.clone(), "default");
    let probe = json!({"metadata": {"name": "pulse", "namespace": "default"}, "spec": {"checks": [
        {"name": "z", "progress": {}}, {"name": "a", "tokensPerSecond": {"minimum": 5}},
    ]}});
    world.apply(&probes, &probe).await;
    for name in ["one", "two", "three"] {
        world.until_ready(name).await;
    }
    let_pass(60).await;
    let (before, beats) = (
        operator.line.all_writes(),
        agents[0].heartbeats.load(std::sync::atomic::Ordering::SeqCst),
    );
    let_pass(3600).await;
    assert_eq!(
        operator.line.all_writes(),
        before,
        "the last writes: {:?}",
        operator.line.writes().iter().rev().take(5).collect::<Vec<_>>()
    );
    let beats = agents[0].heartbeats.load(std::sync::atomic::Ordering::SeqCst) - beats;
    assert!(beats >= 300, "heartbeats went on all the while, {beats} of them");
}

#[tokio::test(start_paused = true)]
async fn a_restarted_operator_changes_nothing() {
    let world = World::new();
    let _agent = world.agent("pi");
    let first = world.operator().await;
    world.deploy("chat").await;
    world.until_ready("chat").await;
    let_pass(60).await;
    first.stop().await;
    let told = world.events("chat").await;
    let second = world.operator().await;
    let_pass(600).await;
    assert_eq!(second.line.writes(), [""; 0]);
    assert_eq!(world.events("chat").await, told, "nothing is told again");
}

#[tokio::test(start_paused = true)]
async fn few_writes_lead_to_ready() {
    let world = World::new();
    let _agent = world.agent("pi");
    let operator = world.operator().await;
    world
        .until(&world.nodes(), "pi", "was heard", |node| {
            common::node_condition(node, "Reachable").as_deref() == Some("True")
        })
        .await;
    let_pass(60).await;
    let before = operator.line.writes().len();
    world.deploy("chat").await;
    world.until_ready("chat").await;
    let_pass(60).await;
    let writes = operator.line.writes().split_off(before);
    assert!(
        writes.len() <= 5,
        "a spec and a few statuses, not a storm: {writes:#?}"
    );
}

#[tokio::test(start_paused = true)]
async fn enforced_violation_keeps_a_deployment_unplaced_and_tells_the_remedy() {
    let world = World::new();
    let _agent = world.agent("pi");
    let operator = world.operator().await;
    let policy = |enforcement: &str| {
        json!({"metadata": {"name": "strict"}, "spec": {
            "enforcement": enforcement, "supplyChain": {"requireDigest": true},
        }})
    };
    world.apply(&world.policies(), &policy("Enforce")).await;
    world.deploy("chat").await;
    let held = world
        .until(&world.deployments(), "chat", "was held back", |d| {
            condition(d, "Ready") == Some(("False".into(), "PolicyViolation".into()))
        })
        .await;
    assert_eq!(
        condition(&held, "PolicyCompliant"),
        Some(("False".into(), "PolicyViolation".into()))
    );
    assert_eq!(
        condition(&held, "Stalled"),
        Some(("True".into(), "PolicyViolation".into()))
    );
    let violation = &held.status.as_ref().unwrap().violations[0];
    assert_eq!(
        (violation.policy.as_str(), violation.field.as_str()),
        ("strict", "spec.model.sha256")
    );
    let strict = world
        .until(
            &world.policies(),
            "strict",
            "counted the violation",
            |p: &GovernancePolicy| {
                p.status
                    .as_ref()
                    .is_some_and(|status| status.violation_count == 1)
            },
        )
        .await;
    assert_eq!(strict.status.unwrap().deployments, 1);
    let_pass(60).await;
    assert_eq!(world.assigned("pi").await, [""; 0], "it must not be placed");

    // The same rule, only recorded: it runs, and the record stays.
    world.apply(&world.policies(), &policy("Audit")).await;
    let chat = world.until_ready("chat").await;
    assert_eq!(chat.status.as_ref().unwrap().violations.len(), 1);
    assert_eq!(condition(&chat, "Stalled"), None);
    operator.stop().await;
    let events = world.events("chat").await;
    let told = events
        .iter()
        .find(|(reason, ..)| reason == "PolicyViolation")
        .expect("an event");
    assert!(
        told.1.contains("strict") && told.1.contains("spec.model.sha256") && told.1.contains("sha256sum"),
        "{told:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn deleting_a_deployment_takes_its_assignment_and_its_name_away() {
    let world = World::new();
    let _agent = world.agent("pi");
    let _operator = world.operator().await;
    world.deploy("chat").await;
    world.deploy("other").await;
    world.until_ready("chat").await;
    world.until_ready("other").await;
    world
        .deployments()
        .delete("chat", &DeleteParams::default())
        .await
        .unwrap();
    await_condition(world.deployments(), "chat", gone::<ModelDeployment>())
        .await
        .unwrap();
    let node = world
        .until(&world.nodes(), "pi", "let go of chat", |node: &InferenceNode| {
            node.spec.assignments.iter().all(|a| a.deployment != "chat")
        })
        .await;
    assert_eq!(node.spec.assignments.len(), 1);
    assert_eq!(node.spec.routes.len(), 1);
    world.until_ready("other").await;
}

#[tokio::test(start_paused = true)]
async fn a_status_or_spec_that_someone_overwrote_is_put_right() {
    let world = World::new();
    let _agent = world.agent("pi");
    let _operator = world.operator().await;
    world.deploy("chat").await;
    world.until_ready("chat").await;
    let lie = json!({"status": {"replicaSummary": "7/7"}});
    let person = PatchParams::default();
    world
        .deployments()
        .patch_status("chat", &person, &Patch::Merge(&lie))
        .await
        .unwrap();
    world
        .until(&world.deployments(), "chat", "told the truth again", |d| {
            d.status.as_ref().unwrap().replica_summary.as_deref() == Some("1/1")
        })
        .await;
    let emptied = json!({"spec": {"assignments": []}});
    world
        .nodes()
        .patch("pi", &person, &Patch::Merge(&emptied))
        .await
        .unwrap();
    world
        .until(&world.nodes(), "pi", "got its assignment back", |node| {
            node.spec.assignments.len() == 1
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn labels_that_people_set_on_a_machine_stay() {
    let world = World::new();
    let _agent = world.agent("pi");
    let _operator = world.operator().await;
    world
        .until(&world.nodes(), "pi", "was registered", |_| true)
        .await;
    let labelled = json!({"metadata": {"labels": {"room": "cellar"}}});
    world
        .nodes()
        .patch("pi", &PatchParams::default(), &Patch::Merge(&labelled))
        .await
        .unwrap();
    let mut selecting = deployment("chat");
    selecting["spec"]["placement"] = json!({"nodeSelector": {"matchLabels": {"room": "cellar"}}});
    world.apply(&world.deployments(), &selecting).await;
    world.until_ready("chat").await;
    let node = world.nodes().get("pi").await.unwrap();
    assert_eq!(
        node.metadata.labels.unwrap().get("room").map(String::as_str),
        Some("cellar")
    );
}

#[tokio::test(start_paused = true)]
async fn surge_keeps_the_old_revision_until_the_new_one_is_ready() {
    let world = World::new();
    let agent = world.agent("pi");
    let _operator = world.operator().await;
    world.deploy("chat").await;
    let old = world.until_ready("chat").await.status.unwrap().revision.unwrap();
    let first = old.clone();
    agent.behave(move |assignment| {
        let phase = if assignment.revision == first {
            Phase::Ready
        } else {
            Phase::Loading
        };
        instance(assignment, phase)
    });
    let mut next = deployment("chat");
    next["spec"]["model"]["path"] = json!("/models/better.gguf");
    world.apply(&world.deployments(), &next).await;
    let node = world
        .until(&world.nodes(), "pi", "held both revisions", |node| {
            node.spec.assignments.len() == 2
        })
        .await;
    let backends = &node.spec.routes[0].backends;
    assert_eq!(backends.len(), 2);
    assert!(
        !backends[0].assignment.ends_with(&old) && backends[1].assignment.ends_with(&old),
        "the new revision first, the old one while it is not ready: {backends:?}"
    );
    let_pass(60).await;
    assert_eq!(
        world.assigned("pi").await.len(),
        2,
        "the old one stays as long as it is needed"
    );
    agent.behave(|assignment| instance(assignment, Phase::Ready));
    let node = world
        .until(&world.nodes(), "pi", "dropped the old revision", |node| {
            node.spec.assignments.len() == 1
        })
        .await;
    assert_ne!(node.spec.assignments[0].revision, old);
    let chat = world.until_ready("chat").await.status.unwrap();
    assert_eq!(chat.stable.map(|stable| stable.revision), chat.revision);
}

#[tokio::test(start_paused = true)]
async fn a_revision_that_fails_is_rolled_back_and_told() {
    let world = World::new();
    let agent = world.agent("pi");
    let operator = world.operator().await;
    world.deploy("chat").await;
    let old = world.until_ready("chat").await.status.unwrap().revision.unwrap();
    let first = old.clone();
    agent.behave(move |assignment| {
        if assignment.revision == first {
            return instance(assignment, Phase::Ready);
        }
        Instance {
            reason: Some("InvalidModel".into()),
            message: Some("tensor 3 lies past the end of the file".into()),
            ..instance(assignment, Phase::Failed)
        }
    });
    let mut broken = deployment("chat");
    broken["spec"]["model"]["path"] = json!("/models/broken.gguf");
    world.apply(&world.deployments(), &broken).await;
    world
        .until(&world.deployments(), "chat", "was rolled back", |d| {
            condition(d, "Stalled") == Some(("True".into(), "RolledBack".into()))
        })
        .await;
    let node = world
        .until(&world.nodes(), "pi", "held the old revision alone", |node| {
            node.spec.assignments.len() == 1
        })
        .await;
    assert_eq!(node.spec.assignments[0].revision, old);
    let_pass(600).await;
    assert_eq!(
        world.nodes().get("pi").await.unwrap().spec,
        node.spec,
        "it does not try again by itself"
    );
    operator.stop().await;
    let events = world.events("chat").await;
    assert!(
        events.iter().any(|(reason, ..)| reason == "RolledBack"),
        "{events:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_fleet_of_many_settles_with_few_writes_each() {
    const MACHINES: usize = 10;
    const DEPLOYMENTS: usize = 50;
    let world = World::new();
    let _agents: Vec<_> = (0..MACHINES).map(|n| world.agent(&format!("m{n:02}"))).collect();
    let operator = world.operator().await;
    for n in 0..DEPLOYMENTS {
        world.deploy(&format!("d{n:03}")).await;
    }
    for n in 0..DEPLOYMENTS {
        world.until_ready(&format!("d{n:03}")).await;
    }
    let_pass(60).await;
    let settled = operator.line.writes();
    let statuses = settled
        .iter()
        .filter(|w| w.contains("/modeldeployments/"))
        .count();
    assert!(
        statuses <= 6 * DEPLOYMENTS,
        "{statuses} statuses for {DEPLOYMENTS} deployments"
    );
    let_pass(600).await;
    assert_eq!(
        operator.line.writes().len(),
        settled.len(),
        "and then nothing more"
    );
}

#[tokio::test(start_paused = true)]
async fn what_the_api_refuses_is_tried_again_with_growing_pauses() {
    let world = World::new();
    let _agent = world.agent("pi");
    let operator = world.operator().await;
    world
        .until(&world.nodes(), "pi", "was heard", |node| {
            common::node_condition(node, "Reachable").as_deref() == Some("True")
        })
        .await;
    let_pass(60).await;
    operator.line.refuse_writes(true);
    let before = operator.line.writes().len();
    world.deploy("chat").await;
    let_pass(600).await;
    let tries = operator.line.writes().len() - before;
    // A spec and a status, each after 1, 2, 4 … 60 s, halved by jitter at most.
    assert!((16..=60).contains(&tries), "{tries} tries in ten minutes");
    operator.line.refuse_writes(false);
    world.until_ready("chat").await;
}

#[tokio::test(start_paused = true)]
async fn a_machine_takes_over_a_changed_label_of_its_lease() {
    let world = World::new();
    let agent = world.agent("pi");
    let _operator = world.operator().await;
    world
        .until(&world.nodes(), "pi", "was registered", |_| true)
        .await;
    let_pass(60).await;
    // The agent is stopped, so that it does not put its own label back.
    drop(agent);
    let relabelled = json!({"metadata": {"labels": {"zone": null, "floor": "2"}}});
    let person = PatchParams::default();
    world
        .leases()
        .patch("pi", &person, &Patch::Merge(&relabelled))
        .await
        .unwrap();
    world
        .until(&world.nodes(), "pi", "took over the labels", |node| {
            let labels = node.metadata.labels.clone().unwrap_or_default();
            labels.get("floor").map(String::as_str) == Some("2") && !labels.contains_key("zone")
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_machine_whose_object_is_made_anew_gets_no_plan_before_it_has_told_what_it_has() {
    let world = World::new();
    let agent = world.agent("pi");
    let _operator = world.operator().await;
    world.deploy("chat").await;
    world.until_ready("chat").await;
    let before = world.nodes().get("pi").await.unwrap();
    assert!(before.spec.planned);
    // The agent hears and says nothing for a while, so that the new object stays as it was made.
    agent.silence(true);
    world
        .nodes()
        .delete("pi", &DeleteParams::default())
        .await
        .unwrap();
    let anew = |node: &InferenceNode| node.metadata.uid != before.metadata.uid;
    world.until(&world.nodes(), "pi", "was made anew", anew).await;
    let_pass(30).await;
    let made = world.nodes().get("pi").await.unwrap();
    assert_eq!(made.spec.assignments, []);
    assert!(!made.spec.planned, "an agent must not take this for its orders");
    agent.silence(false);
    let node = world
        .until(&world.nodes(), "pi", "was planned for", |node| node.spec.planned)
        .await;
    // By name: how much memory each takes is known more exactly once the agent has told of the model.
    let names = |node: &InferenceNode| -> Vec<String> {
        let names = node.spec.assignments.iter().map(|a| a.name.clone());
        names.collect()
    };
    assert_eq!(
        names(&node),
        names(&before),
        "the first plan that counts holds what was there"
    );
    world.until_ready("chat").await;
}
