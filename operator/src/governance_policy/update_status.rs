//! The status that the plan and the agents' words make.

use freehold_crds::GovernancePolicy;
use freehold_rules::status::policy_status;

use super::GovernancePolicies;
use super::story::stories;
use crate::controller::{self, Context, Controller, ReconcileObject};
use crate::planner::{Planned, now};

pub(super) async fn update_status(
    policy: &GovernancePolicy,
    planned: &Planned,
    context: &Context,
) -> Result<(), ReconcileObject> {
    let old = policy.status.as_ref();
    let new = policy_status(policy, &planned.plan, &planned.input, now());
    let shelf = GovernancePolicies::shelf(&context.shelves);
    let stories = || stories(old, &new);
    controller::update_status(
        context,
        GovernancePolicies::KIND,
        shelf,
        policy,
        old,
        &new,
        stories,
    )
    .await
}
