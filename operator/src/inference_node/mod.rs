//! The InferenceNode controllers: each machine that sends heartbeats gets an object, each object the
//! spec that the plan has for it.
//!
//! The status is the agent's word, with one exception: whether the agent is heard, which a silent agent cannot tell
//! itself ([`freehold_rules::status::node_conditions`]).

mod apply;
mod dereference;
mod register;
mod update_status;

use std::sync::Arc;

use freehold_crds::InferenceNode;
use k8s_openapi::api::coordination::v1::Lease;
use kube::ResourceExt;
use kube::core::DeserializeGuard;
use tracing::warn;

use crate::controller::{Context, Controller, ReconcileObject};
use crate::fleet::Shelves;
use crate::shelf::Shelf;

const KIND: &str = "InferenceNode";

/// Gives each machine the spec that the plan has for it.
pub(crate) struct InferenceNodes;

impl Controller for InferenceNodes {
    type Object = DeserializeGuard<InferenceNode>;
    const KIND: &'static str = KIND;

    fn shelf(shelves: &Shelves) -> &Shelf<Self::Object> {
        &shelves.nodes
    }

    async fn reconcile(object: Arc<Self::Object>, context: Arc<Context>) -> Result<(), ReconcileObject> {
        let node = match &object.0 {
            Ok(node) => node,
            Err(invalid) => {
                // The status is not ours to write.
                warn!(
                    name = object.name_any(),
                    error = invalid.error,
                    "InferenceNode does not read as one"
                );
                return Ok(());
            }
        };
        let Some(planned) = context.planned() else {
            return Ok(());
        };
        let Some(wanted) = dereference::dereference(node, &planned, &context.shelves) else {
            return Ok(());
        };
        // Every machine has routes and rules; a machine that holds no model holds nothing that matters.
        if wanted.forget && node.spec.assignments.is_empty() {
            return apply::forget(&object, node, &context).await;
        }
        if planned.held_back.is_empty() {
            apply::apply(node, &wanted, &context).await?;
        }
        update_status::update_status(node, wanted.liveness, &context).await
    }
}

/// Makes an InferenceNode for each agent's Lease that has none.
pub(crate) struct AgentLeases;

impl Controller for AgentLeases {
    type Object = Lease;
    const KIND: &'static str = "Lease";

    fn shelf(shelves: &Shelves) -> &Shelf<Self::Object> {
        &shelves.leases
    }

    async fn reconcile(lease: Arc<Lease>, context: Arc<Context>) -> Result<(), ReconcileObject> {
        if context.shelves.nodes.get(None, &lease.name_any()).is_some() {
            return Ok(());
        }
        register::register(&lease, &context).await
    }
}
