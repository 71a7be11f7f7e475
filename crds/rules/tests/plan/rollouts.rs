//! From one revision to the next, and back.

use freehold_crds::inference_node::{Assignment, Instance, Phase};
use freehold_crds::model_deployment::{ModelFacts, RolloutStrategy};
use freehold_rules::plan::{FleetInput, NodeInput, plan};

use crate::build::{Behaviour, MIB, World, deployment, instance, node, now, path};

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

#[test]
fn an_old_revision_serves_on_while_the_new_one_fits_nowhere() {
    let input = FleetInput {
        deployments: vec![deployment("chat", 0, path("/new.gguf", Some(2048)))],
        nodes: vec![running_old(1024)],
        ..FleetInput::default()
    };
    let made = plan(&input, now());
    assert!(made.nodes["a"].assignments.iter().any(|a| a.revision == "old"));
}

/// The model at `path` stands at `phase`, every other is ready.
fn except(path: &'static str, phase: Phase) -> Behaviour {
    Box::new(move |assignment| {
        if assignment.model.path.as_deref() == Some(path) {
            Instance {
                message: Some("it says why".to_owned()),
                ..instance(assignment, phase)
            }
        } else {
            instance(assignment, Phase::Ready)
        }
    })
}

fn serving() -> World {
    let mut chat = deployment("chat", 0, path("/old.gguf", Some(100)));
    chat.metadata.generation = Some(1);
    let mut world = World::new(vec![chat], vec![node("a", 1024, false)]);
    world.settle();
    world
}

fn roll_out(world: &mut World, to: &str) {
    let model = path(to, Some(100));
    world.edit("chat", |spec| spec.model = Some(model));
    world.settle();
}

#[test]
fn the_deadline_counts_from_this_revisions_beginning() {
    let mut world = serving();
    world.agents = except("/b.gguf", Phase::Loading);
    roll_out(&mut world, "/b.gguf");
    // Just before the end of its time another takes its place, and gets a whole one.
    world.second += 1790;
    world.agents = except("/c.gguf", Phase::Loading);
    world.edit("chat", |spec| spec.model = Some(path("/c.gguf", Some(100))));
    world.settle();
    world.second += 1790;
    world.settle();
    assert_eq!(world.status("chat").rollback, None);
    assert!(world.models("a").contains(&"/c.gguf".to_owned()));
    world.second += 10;
    world.settle();
    assert_eq!(world.models("a"), ["/old.gguf"]);
    let (stalled, message) = world.condition("chat", "Stalled").unwrap();
    assert_eq!(stalled, "True RolledBack");
    assert!(message.contains("was not ready within 1800 s"), "{message}");
}

#[test]
fn a_rollback_says_what_failed_and_what_serves() {
    let mut world = serving();
    let old = world.status("chat").revision.unwrap();
    world.agents = except("/broken.gguf", Phase::Failed);
    roll_out(&mut world, "/broken.gguf");
    let status = world.status("chat");
    let failed = status.revision.unwrap();
    assert_ne!(failed, old);
    let (ready, message) = world.condition("chat", "Ready").unwrap();
    assert_eq!(ready, "False RolledBack");
    assert_eq!(
        message,
        format!(
            "revision {failed} failed: it says why; revision {old} serves on as chat, 1 of 1 replicas; change the spec to try again"
        )
    );
    let rollback = status.rollback.unwrap();
    assert_eq!((rollback.revision, rollback.generation), (failed, Some(2)));
    assert_eq!(
        (status.ready_replicas, status.replica_summary.as_deref()),
        (1, Some("1/1"))
    );
    // The story stays the same, however often it is told.
    world.second += 86_400;
    world.settle();
    assert_eq!(world.condition("chat", "Ready").unwrap().1, message);
}

#[test]
fn any_change_of_the_spec_tries_the_revision_again_for_its_whole_time() {
    let mut world = serving();
    world.agents = except("/slow.gguf", Phase::Loading);
    roll_out(&mut world, "/slow.gguf");
    world.second += 1800;
    world.settle();
    assert_eq!(world.condition("chat", "Stalled").unwrap().0, "True RolledBack");
    // The same revision under a new generation.
    world.second += 5000;
    world.edit("chat", |spec| spec.rollout.deadline_seconds = 1801);
    world.settle();
    assert_eq!(world.condition("chat", "Stalled"), None);
    assert_eq!(world.status("chat").rollback, None);
    assert!(world.models("a").contains(&"/slow.gguf".to_owned()));
    world.second += 1800;
    world.settle();
    assert_eq!(world.status("chat").rollback, None, "its time is not over");
    world.agents = Box::new(|assignment| instance(assignment, Phase::Ready));
    world.answer();
    world.settle();
    assert_eq!(world.condition("chat", "Ready").unwrap().0, "True Serving");
    assert_eq!(world.models("a"), ["/slow.gguf"]);
}

#[test]
fn a_refused_revision_that_nothing_makes_room_for_is_rolled_back_at_once() {
    let mut world = serving();
    world.agents = except("/vast.gguf", Phase::Refused);
    world.edit("chat", |spec| {
        spec.rollout.strategy = RolloutStrategy::Replace;
        spec.model = Some(path("/vast.gguf", None));
    });
    world.settle();
    assert_eq!(world.models("a"), ["/old.gguf"]);
    let (stalled, message) = world.condition("chat", "Stalled").unwrap();
    assert_eq!(stalled, "True RolledBack");
    assert!(message.contains("was refused: it says why"), "{message}");
}

#[test]
fn a_refusal_beside_the_old_revision_makes_that_one_go_first() {
    let mut world = serving();
    // Both do not fit: what is known of the size once the bytes are here says so.
    let facts = ModelFacts {
        file_bytes: 800 * MIB,
        weight_bytes: 800 * MIB,
        ..ModelFacts::default()
    };
    world.agents = Box::new(move |assignment| {
        if assignment.model.path.as_deref() == Some("/big.gguf") {
            Instance {
                model: Some(facts.clone()),
                ..instance(assignment, Phase::Refused)
            }
        } else {
            instance(assignment, Phase::Ready)
        }
    });
    world.edit("chat", |spec| spec.model = Some(path("/big.gguf", None)));
    world.round();
    assert_eq!(world.models("a").len(), 2);
    // The agent has not taken up the spec that takes the old one away: its refusal is of before.
    let told = world.input.nodes[0].status.clone();
    world.round();
    assert_eq!(world.models("a"), ["/big.gguf"]);
    world.input.nodes[0].status = told;
    world.round();
    assert_eq!(world.status("chat").rollback, None);
    assert_eq!(world.models("a"), ["/big.gguf"]);
}

#[test]
fn memory_that_an_older_deployment_gives_up_is_used_in_the_same_plan() {
    let older = deployment("older", 100, path("/a.gguf", Some(700)));
    let younger = deployment("younger", 0, path("/b.gguf", Some(700)));
    let mut world = World::new(vec![older, younger], vec![node("a", 1024, false)]);
    world.settle();
    assert_eq!(world.models("a"), ["/a.gguf"]);
    world.edit("older", |spec| spec.replicas = 0);
    world.round();
    assert_eq!(world.models("a"), ["/b.gguf"], "one plan is enough");
}

#[test]
fn a_context_that_is_cut_is_said_to_be_cut() {
    let mut world = serving();
    world.agents = Box::new(|assignment| Instance {
        model: Some(ModelFacts {
            context_length: 2048,
            ..ModelFacts::default()
        }),
        ..instance(assignment, Phase::Ready)
    });
    world.edit("chat", |spec| spec.engine.context_length = Some(8192));
    world.settle();
    assert_eq!(
        world.condition("chat", "Ready").unwrap(),
        (
            "True Serving".to_owned(),
            "1 of 1 replicas serve; spec.engine.contextLength 8192 is cut to 2048 tokens, the longest that the model has".to_owned()
        )
    );
}
