//! A machine joins: its Lease is there, its object is not yet.

use freehold_crds::{InferenceNode, InferenceNodeSpec};
use k8s_openapi::api::coordination::v1::Lease;
use kube::core::DeserializeGuard;
use kube::{Resource, ResourceExt};
use tracing::info;

use super::KIND;
use super::dereference::labels_of;
use crate::controller::{Context, ReconcileObject, ask};
use crate::metrics::Kind;
use crate::story::Story;
use crate::writes;

/// Makes an InferenceNode with the labels of the Lease and nothing to do yet.
pub(super) async fn register(lease: &Lease, context: &Context) -> Result<(), ReconcileObject> {
    let name = lease.name_any();
    let (labels, spec) = (labels_of(lease), InferenceNodeSpec::default());
    let made = writes::apply::<DeserializeGuard<InferenceNode>>(&context.client, &name, &labels, &spec);
    let made = ask("make", KIND, &name, made).await?;
    context.metrics.writes.get_or_create(&Kind { kind: KIND }).inc();
    info!(name, "Registered a machine");
    let story = Story::new(
        false,
        "NodeJoined",
        "Register",
        format!("the agent on {name} sends heartbeats"),
    );
    context.events.tell(&made.object_ref(&()), [story]);
    context.shelves.nodes.wrote(made);
    Ok(())
}
