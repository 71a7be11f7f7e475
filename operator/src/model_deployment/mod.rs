//! The ModelDeployment controller: what the plan made of it, as its status.

mod story;
mod update_status;

use std::sync::Arc;

use freehold_crds::ModelDeployment;
use kube::core::DeserializeGuard;

use crate::controller::{Context, Controller, ReconcileObject, was_planned};
use crate::fleet::Shelves;
use crate::malformed;
use crate::shelf::Shelf;

pub(crate) struct ModelDeployments;

impl Controller for ModelDeployments {
    type Object = DeserializeGuard<ModelDeployment>;
    const KIND: &'static str = "ModelDeployment";

    fn shelf(shelves: &Shelves) -> &Shelf<Self::Object> {
        &shelves.deployments
    }

    async fn reconcile(object: Arc<Self::Object>, context: Arc<Context>) -> Result<(), ReconcileObject> {
        let Some(planned) = context.planned() else {
            return Ok(());
        };
        match &object.0 {
            Err(invalid) => {
                malformed::update_status(&context, Self::KIND, Self::shelf(&context.shelves), invalid).await
            }
            Ok(deployment) if !was_planned(deployment, planned.input.deployments.iter()) => Ok(()),
            Ok(deployment) => update_status::update_status(deployment, &planned, &context).await,
        }
    }
}
