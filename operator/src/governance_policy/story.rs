//! What is worth telling of a policy.

use freehold_crds::GovernancePolicyStatus;
use freehold_crds::conditions::reason;

use crate::story::{Story, of_conditions};

/// The stories between two statuses.
pub(super) fn stories(old: Option<&GovernancePolicyStatus>, new: &GovernancePolicyStatus) -> Vec<Story> {
    let nothing = GovernancePolicyStatus::default();
    let old = old.unwrap_or(&nothing);
    let mut stories = of_conditions(&old.conditions, &new.conditions);
    let fresh = new.violations.iter().filter(|v| !old.violations.contains(v));
    stories.extend(fresh.map(|violation| {
        let note = format!(
            "{} breaks {}: {} is {}",
            violation.object, violation.rule, violation.field, violation.evidence
        );
        Story::new(true, reason::POLICY_VIOLATION, violation.object.clone(), note)
    }));
    stories
}
