//! The status that the plan and the agents' words make.

use freehold_crds::ModelDeployment;
use freehold_rules::status::deployment_status;

use super::ModelDeployments;
use super::story::stories;
use crate::controller::{self, Context, Controller, ReconcileObject};
use crate::planner::{Planned, now};

pub(super) async fn update_status(
    deployment: &ModelDeployment,
    planned: &Planned,
    context: &Context,
) -> Result<(), ReconcileObject> {
    let old = deployment.status.as_ref();
    let new = deployment_status(deployment, &planned.plan, &planned.input, now());
    let shelf = ModelDeployments::shelf(&context.shelves);
    let stories = || stories(old, &new);
    controller::update_status(
        context,
        ModelDeployments::KIND,
        shelf,
        deployment,
        old,
        &new,
        stories,
    )
    .await
}
