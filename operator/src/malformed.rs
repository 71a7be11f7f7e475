//! Objects that do not read as their kind: told so in their own status, and otherwise left alone.
//!
//! The API server's validation keeps most of them out. What remains was written under an older or a
//! newer CRD than this operator's.

use std::fmt::Debug;
use std::sync::PoisonError;

use freehold_crds::conditions::{self, reason};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::Resource;
use kube::core::DeserializeGuard;
use kube::core::error_boundary::InvalidObject;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::controller::{Context, ReconcileObject, ask};
use crate::metrics::Kind;
use crate::shelf::Shelf;
use crate::story::Story;
use crate::writes::{apply_status, read_raw};

/// Tells in the status of an object that it does not read as its kind, and why.
pub(crate) async fn update_status<K>(
    context: &Context,
    kind: &'static str,
    shelf: &Shelf<DeserializeGuard<K>>,
    invalid: &InvalidObject,
) -> Result<(), ReconcileObject>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (namespace, name) = (
        invalid.metadata.namespace.as_deref(),
        invalid.metadata.name.as_deref().unwrap_or_default(),
    );
    let key = format!("{kind} {}/{name}", namespace.unwrap_or_default());
    let told = |version: Option<&String>| {
        let mut told = context.malformed.lock().unwrap_or_else(PoisonError::into_inner);
        match version {
            Some(version) => told.insert(key.clone(), version.clone()),
            None => told.get(&key).cloned(),
        }
    };
    let version = invalid.metadata.resource_version.as_ref();
    if version.is_some() && told(None).as_ref() == version {
        return Ok(());
    }
    // The object did not read as its kind, so its status is read as plain JSON.
    let raw: Option<Value> = ask(
        "read",
        kind,
        name,
        read_raw::<K>(&context.client, namespace, name),
    )
    .await?;
    let Some(raw) = raw else { return Ok(()) };
    let present = raw.pointer("/status/conditions").cloned().unwrap_or_default();
    let present: Vec<Condition> = serde_json::from_value(present).unwrap_or_default();
    let conditions = conditions(invalid, &present);
    if conditions.iter().all(|condition| present.contains(condition)) {
        told(version);
        return Ok(());
    }
    let status = json!({"observedGeneration": invalid.metadata.generation, "conditions": conditions});
    let written = apply_status::<DeserializeGuard<K>>(&context.client, namespace, name, &status);
    let Some(written) = ask("write the status of", kind, name, written).await? else {
        return Ok(());
    };
    context.metrics.writes.get_or_create(&Kind { kind }).inc();
    told(written.meta().resource_version.as_ref());
    let note = conditions.first().map_or_else(String::new, |c| c.message.clone());
    let story = Story::new(true, reason::INVALID_SPEC, conditions::STALLED, note);
    context.events.tell(&written.object_ref(&()), [story]);
    shelf.wrote(written);
    Ok(())
}

fn conditions(invalid: &InvalidObject, present: &[Condition]) -> Vec<Condition> {
    let message = format!(
        "this version of Freehold cannot read the object: {}; correct that field, or upgrade the operator together with its CRDs",
        invalid.error
    );
    let now = Time(crate::planner::now());
    [(conditions::READY, "False"), (conditions::STALLED, "True")]
        .into_iter()
        .map(|(type_, status)| {
            let before = present.iter().find(|c| c.type_ == type_ && c.status == status);
            Condition {
                type_: type_.to_owned(),
                status: status.to_owned(),
                reason: reason::INVALID_SPEC.to_owned(),
                message: message.clone(),
                last_transition_time: before.map_or_else(|| now.clone(), |c| c.last_transition_time.clone()),
                observed_generation: invalid.metadata.generation,
            }
        })
        .collect()
}
