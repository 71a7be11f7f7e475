//! Objects that do not read as their kind, beside objects that do.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, its helpers too"
)]

mod common;

use common::{World, condition, deployment, let_pass};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};

/// CRDs as a newer version might have them: an enum has grown a value that this operator does not know.
fn newer_crds() -> Vec<CustomResourceDefinition> {
    let mut crds = serde_json::to_value(freehold_crds::all()).unwrap();
    loosen(&mut crds);
    serde_json::from_value(crds).unwrap()
}

fn loosen(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            if let Some(Value::Array(values)) = fields.get_mut("enum") {
                values.push(json!("FromTheFuture"));
            }
            fields.values_mut().for_each(loosen);
        }
        Value::Array(items) => items.iter_mut().for_each(loosen),
        _ => {}
    }
}

fn anything<K: kube::Resource<DynamicType = ()>>(
    world: &World,
    namespace: Option<&str>,
) -> Api<DynamicObject> {
    let resource = ApiResource::erase::<K>(&());
    match namespace {
        Some(namespace) => Api::namespaced_with(world.client.clone(), namespace, &resource),
        None => Api::all_with(world.client.clone(), &resource),
    }
}

async fn merge(api: &Api<DynamicObject>, name: &str, patch: Value) {
    api.patch(name, &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .unwrap();
}

/// Waits until the raw object is stalled; returns its message.
async fn until_stalled(api: &Api<DynamicObject>, name: &str) -> String {
    let stalled = |object: Option<&DynamicObject>| {
        let conditions = object.and_then(|o| o.data.pointer("/status/conditions")?.as_array());
        let stalled = conditions.and_then(|list| list.iter().find(|c| c["type"] == "Stalled"));
        stalled.is_some_and(|c| c["status"] == "True" && c["reason"] == "InvalidSpec")
    };
    let waiting = kube::runtime::wait::await_condition(api.clone(), name, stalled);
    let Ok(object) = tokio::time::timeout(common::PATIENCE, waiting).await else {
        panic!("{name} never stalled; last seen: {:#?}", api.get_opt(name).await);
    };
    let object = object.unwrap().unwrap();
    let conditions = object.data["status"]["conditions"].as_array().unwrap();
    let ready = conditions.iter().find(|c| c["type"] == "Ready").unwrap();
    ready["message"].as_str().unwrap().to_owned()
}

#[tokio::test(start_paused = true)]
async fn a_malformed_deployment_stalls_alone_and_says_why() {
    let world = World::with_crds(newer_crds());
    let _agent = world.agent("pi");
    let operator = world.operator().await;
    let api = anything::<freehold_crds::ModelDeployment>(&world, Some("default"));
    let mut strange = deployment("strange");
    strange["apiVersion"] = json!("freehold.dev/v1alpha1");
    strange["kind"] = json!("ModelDeployment");
    strange["spec"]["placement"] = json!({"device": "FromTheFuture"});
    api.patch("strange", &PatchParams::apply("person"), &Patch::Apply(&strange))
        .await
        .unwrap();
    world.deploy("sound").await;
    let message = until_stalled(&api, "strange").await;
    assert!(message.contains("FromTheFuture"), "{message}");
    world.until_ready("sound").await;

    let_pass(60).await;
    let before = operator.line.writes();
    world.deploy("later").await;
    world.until_ready("later").await;
    let_pass(600).await;
    let since = operator.line.writes().split_off(before.len());
    assert!(
        since.iter().all(|write| !write.contains("strange")),
        "it is told once: {since:?}"
    );

    merge(&api, "strange", json!({"spec": {"placement": {"device": "Cpu"}}})).await;
    let mended = world.until_ready("strange").await;
    assert_eq!(condition(&mended, "Stalled"), None);
}

#[tokio::test(start_paused = true)]
async fn a_running_deployment_that_turns_malformed_runs_on_under_its_rules() {
    let world = World::with_crds(newer_crds());
    let _agent = world.agent("pi");
    let _operator = world.operator().await;
    let policy = json!({"metadata": {"name": "calm"}, "spec": {"limits": {"requestsPerMinute": 60}}});
    world.apply(&world.policies(), &policy).await;
    world.deploy("chat").await;
    world.until_ready("chat").await;
    // The plan learns the model's true size once it is ready.
    let_pass(60).await;
    let before = world.nodes().get("pi").await.unwrap().spec;
    assert_eq!(before.policies[0].deployments, ["default/chat"]);
    let api = anything::<freehold_crds::ModelDeployment>(&world, Some("default"));
    merge(
        &api,
        "chat",
        json!({"spec": {"placement": {"device": "FromTheFuture"}}}),
    )
    .await;
    until_stalled(&api, "chat").await;
    world.deploy("later").await;
    world.until_ready("later").await;
    let after = world.nodes().get("pi").await.unwrap().spec;
    assert!(
        after.assignments.contains(&before.assignments[0]),
        "{:?}",
        after.assignments
    );
    assert!(
        after
            .routes
            .iter()
            .any(|route| route.name == "chat" && route.backends == before.routes[0].backends)
    );
    assert!(after.policies[0].deployments.contains(&"default/chat".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_turns_malformed_holds_as_it_was() {
    let world = World::with_crds(newer_crds());
    let _agent = world.agent("pi");
    let _operator = world.operator().await;
    let policy = json!({"metadata": {"name": "strict"}, "spec": {"supplyChain": {"requireDigest": true}}});
    world.apply(&world.policies(), &policy).await;
    world.deploy("chat").await;
    let held = |d: &freehold_crds::ModelDeployment| {
        condition(d, "Ready") == Some(("False".into(), "PolicyViolation".into()))
    };
    world
        .until(&world.deployments(), "chat", "was held back", held)
        .await;
    let api = anything::<freehold_crds::GovernancePolicy>(&world, None);
    merge(&api, "strict", json!({"spec": {"enforcement": "FromTheFuture"}})).await;
    until_stalled(&api, "strict").await;
    let_pass(60).await;
    assert!(held(&world.deployments().get("chat").await.unwrap()));
    assert_eq!(world.assigned("pi").await, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_policy_changes_nothing_that_runs_and_lets_nothing_new_in() {
    let world = World::with_crds(newer_crds());
    let _agent = world.agent("pi");
    let first = world.operator().await;
    world.deploy("runs").await;
    world.until_ready("runs").await;
    first.stop().await;
    let api = anything::<freehold_crds::GovernancePolicy>(&world, None);
    let policy = json!({"apiVersion": "freehold.dev/v1alpha1", "kind": "GovernancePolicy",
        "metadata": {"name": "strange"}, "spec": {"enforcement": "FromTheFuture", "supplyChain": {"requireDigest": true}}});
    api.patch("strange", &PatchParams::apply("person"), &Patch::Apply(&policy))
        .await
        .unwrap();
    let _second = world.operator().await;
    until_stalled(&api, "strange").await;
    world.deploy("new").await;
    let_pass(300).await;
    assert_eq!(world.assigned("pi").await, ["runs"]);
    merge(&api, "strange", json!({"spec": {"enforcement": "Audit"}})).await;
    world.until_ready("new").await;
}
