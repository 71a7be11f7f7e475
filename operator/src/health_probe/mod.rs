//! The HealthProbe controller: what the plan made of it, as its status.

mod story;
mod update_status;

use std::sync::Arc;

use freehold_crds::HealthProbe;
use kube::core::DeserializeGuard;

use crate::controller::{Context, Controller, ReconcileObject, was_planned};
use crate::fleet::Shelves;
use crate::malformed;
use crate::shelf::Shelf;

pub(crate) struct HealthProbes;

impl Controller for HealthProbes {
    type Object = DeserializeGuard<HealthProbe>;
    const KIND: &'static str = "HealthProbe";

    fn shelf(shelves: &Shelves) -> &Shelf<Self::Object> {
        &shelves.probes
    }

    async fn reconcile(object: Arc<Self::Object>, context: Arc<Context>) -> Result<(), ReconcileObject> {
        let Some(planned) = context.planned() else {
            return Ok(());
        };
        match &object.0 {
            Err(invalid) => {
                malformed::update_status(&context, Self::KIND, Self::shelf(&context.shelves), invalid).await
            }
            Ok(probe) if !was_planned(probe, planned.input.probes.iter()) => Ok(()),
            Ok(probe) => update_status::update_status(probe, &planned, &context).await,
        }
    }
}
