//! What is worth telling of a probe.

use freehold_crds::HealthProbeStatus;

use crate::story::{Story, of_conditions};

/// The stories between two statuses.
pub(super) fn stories(old: Option<&HealthProbeStatus>, new: &HealthProbeStatus) -> Vec<Story> {
    let before = old.map_or(&[][..], |old| &old.conditions);
    of_conditions(before, &new.conditions)
}
