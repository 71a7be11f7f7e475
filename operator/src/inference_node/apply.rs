//! Brings a machine's labels and spec to what they shall be.

use std::sync::Arc;

use freehold_crds::InferenceNode;
use kube::api::{DeleteParams, Preconditions};
use kube::core::DeserializeGuard;
use kube::{Api, ResourceExt};
use tracing::info;

use super::KIND;
use super::dereference::{Wanted, owned_labels};
use crate::compare::same;
use crate::controller::{Context, ReconcileObject, ask};
use crate::metrics::Kind;
use crate::writes;

/// Applies labels and spec where they differ from what is there.
pub(super) async fn apply(
    node: &InferenceNode,
    wanted: &Wanted<'_>,
    context: &Context,
) -> Result<(), ReconcileObject> {
    if wanted.labels == owned_labels(&node.metadata) && same(wanted.spec, &node.spec) {
        return Ok(());
    }
    let name = node.name_any();
    let applied =
        writes::apply::<DeserializeGuard<InferenceNode>>(&context.client, &name, &wanted.labels, wanted.spec);
    let applied = ask("apply", KIND, &name, applied).await?;
    context.metrics.writes.get_or_create(&Kind { kind: KIND }).inc();
    info!(
        name,
        generation = applied.metadata_generation(),
        assignments = wanted.spec.assignments.len(),
        "Applied spec"
    );
    context.shelves.nodes.wrote(applied);
    Ok(())
}

/// Deletes the object of a machine that is gone and holds nothing.
pub(super) async fn forget(
    object: &Arc<DeserializeGuard<InferenceNode>>,
    node: &InferenceNode,
    context: &Context,
) -> Result<(), ReconcileObject> {
    let name = node.name_any();
    let api: Api<InferenceNode> = Api::all(context.client.clone());
    // Whatever changed since must be looked at again first.
    let parameters = DeleteParams {
        preconditions: Some(Preconditions {
            uid: node.uid(),
            resource_version: node.resource_version(),
        }),
        ..DeleteParams::default()
    };
    match ask("delete", KIND, &name, api.delete(&name, &parameters)).await {
        Ok(_) => info!(name, "Forgot a machine that has been gone for long"),
        Err(ReconcileObject::Write {
            source: kube::Error::Api(status),
            ..
        }) if status.code == 404 => {}
        Err(error) => return Err(error),
    }
    context.metrics.writes.get_or_create(&Kind { kind: KIND }).inc();
    context.shelves.heartbeats.forget(&name);
    context.shelves.nodes.deleted(object);
    Ok(())
}

trait Generation {
    fn metadata_generation(&self) -> Option<i64>;
}

impl<K: kube::Resource> Generation for K {
    fn metadata_generation(&self) -> Option<i64> {
        self.meta().generation
    }
}
