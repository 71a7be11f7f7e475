//! The status that the plan and the agents' words make.

use freehold_crds::HealthProbe;
use freehold_rules::status::probe_status;

use super::HealthProbes;
use super::story::stories;
use crate::controller::{self, Context, Controller, ReconcileObject};
use crate::planner::{Planned, now};

pub(super) async fn update_status(
    probe: &HealthProbe,
    planned: &Planned,
    context: &Context,
) -> Result<(), ReconcileObject> {
    let old = probe.status.as_ref();
    let new = probe_status(probe, &planned.plan, &planned.input, now());
    let shelf = HealthProbes::shelf(&context.shelves);
    let stories = || stories(old, &new);
    controller::update_status(context, HealthProbes::KIND, shelf, probe, old, &new, stories).await
}
