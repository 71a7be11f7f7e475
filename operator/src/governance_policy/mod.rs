//! The GovernancePolicy controller: what the plan made of it, as its status.

mod story;
mod update_status;

use std::sync::Arc;

use freehold_crds::GovernancePolicy;
use kube::core::DeserializeGuard;

use crate::controller::{Context, Controller, ReconcileObject, was_planned};
use crate::fleet::Shelves;
use crate::malformed;
use crate::shelf::Shelf;

pub(crate) struct GovernancePolicies;

impl Controller for GovernancePolicies {
    type Object = DeserializeGuard<GovernancePolicy>;
    const KIND: &'static str = "GovernancePolicy";

    fn shelf(shelves: &Shelves) -> &Shelf<Self::Object> {
        &shelves.policies
    }

    async fn reconcile(object: Arc<Self::Object>, context: Arc<Context>) -> Result<(), ReconcileObject> {
        let Some(planned) = context.planned() else {
            return Ok(());
        };
        match &object.0 {
            Err(invalid) => {
                malformed::update_status(&context, Self::KIND, Self::shelf(&context.shelves), invalid).await
            }
            Ok(policy) if !was_planned(policy, planned.input.policies.iter()) => Ok(()),
            Ok(policy) => update_status::update_status(policy, &planned, &context).await,
        }
    }
}
