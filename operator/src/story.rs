//! What is worth telling: the difference between two statuses, as events.

use freehold_crds::conditions::{self, reason};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Story {
    /// Whether someone should look.
    pub(crate) warning: bool,
    /// What happened, in one word.
    pub(crate) reason: String,
    /// What it happened to: a condition, a rule, a placement. Part of what makes two events one.
    pub(crate) action: String,
    /// What a person reads.
    pub(crate) note: String,
    /// The other object in it.
    pub(crate) related: Option<ObjectReference>,
}

impl Story {
    /// A story about one object.
    pub(crate) fn new(
        warning: bool,
        reason: impl Into<String>,
        action: impl Into<String>,
        note: impl Into<String>,
    ) -> Self {
        Self {
            warning,
            reason: reason.into(),
            action: action.into(),
            note: note.into(),
            related: None,
        }
    }
}

/// Reasons of a condition that is not as it should be, yet needs nobody: work goes on, or the owner wants it so.
const NO_CAUSE_FOR_ALARM: [&str; 7] = [
    reason::PROGRESSING,
    reason::FETCHING,
    reason::LOADING,
    reason::SUSPENDED,
    reason::NO_RESULT,
    reason::IDLE,
    reason::AS_EXPECTED,
];

/// Conditions that are bad when they are True.
const BAD_WHEN_TRUE: [&str; 3] = [
    conditions::STALLED,
    conditions::ACCELERATOR_DEGRADED,
    conditions::REMEDIATION_SUSPENDED,
];

/// What changed between two lists of conditions: each new status or reason once. What is well from the
/// start is no story, except that the object is Ready.
pub(crate) fn of_conditions(old: &[Condition], new: &[Condition]) -> Vec<Story> {
    let mut stories: Vec<Story> = Vec::new();
    // Reconciling repeats what Ready says.
    for condition in new.iter().filter(|c| c.type_ != conditions::RECONCILING) {
        let before = old.iter().find(|c| c.type_ == condition.type_);
        if before.is_some_and(|b| b.status == condition.status && b.reason == condition.reason) {
            continue;
        }
        let as_it_should = well(condition);
        if as_it_should && condition.type_ != conditions::READY && before.is_none_or(well) {
            continue;
        }
        let warning = !as_it_should && !NO_CAUSE_FOR_ALARM.contains(&condition.reason.as_str());
        let reason = if as_it_should && condition.reason == reason::SERVING {
            conditions::READY.to_owned()
        } else {
            condition.reason.clone()
        };
        // Ready and Stalled often say the same.
        if stories.iter().all(|s| s.reason != reason) {
            stories.push(Story::new(
                warning,
                reason,
                condition.type_.clone(),
                condition.message.clone(),
            ));
        }
    }
    stories
}

fn well(condition: &Condition) -> bool {
    match condition.status.as_str() {
        "True" => !BAD_WHEN_TRUE.contains(&condition.type_.as_str()),
        "False" => BAD_WHEN_TRUE.contains(&condition.type_.as_str()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    fn condition(type_: &str, status: &str, reason: &str) -> Condition {
        Condition {
            type_: type_.into(),
            status: status.into(),
            reason: reason.into(),
            message: format!("{type_} {status}"),
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
            observed_generation: None,
        }
    }

    fn told(old: &[Condition], new: &[Condition]) -> Vec<(String, bool)> {
        of_conditions(old, new)
            .into_iter()
            .map(|s| (s.reason, s.warning))
            .collect()
    }

    #[test]
    fn the_way_to_ready_is_told_without_alarm() {
        let fetching = [
            condition("Ready", "False", "Fetching"),
            condition("Reconciling", "True", "Fetching"),
        ];
        let serving = [
            condition("Ready", "True", "Serving"),
            condition("Healthy", "True", "AsExpected"),
        ];
        assert_eq!(told(&[], &fetching), [("Fetching".to_owned(), false)]);
        assert_eq!(told(&fetching, &fetching), []);
        assert_eq!(told(&fetching, &serving), [("Ready".to_owned(), false)]);
    }

    #[test]
    fn one_trouble_in_two_conditions_is_told_once() {
        let refused = [
            condition("Ready", "False", "PolicyViolation"),
            condition("Stalled", "True", "PolicyViolation"),
        ];
        assert_eq!(told(&[], &refused), [("PolicyViolation".to_owned(), true)]);
    }

    #[test]
    fn a_rollback_is_told_though_the_old_revision_serves() {
        let serving = [condition("Ready", "True", "Serving")];
        let rolled_back = [
            condition("Ready", "True", "Serving"),
            condition("Stalled", "True", "RolledBack"),
        ];
        assert_eq!(told(&serving, &rolled_back), [("RolledBack".to_owned(), true)]);
    }

    #[test]
    fn recovery_is_told() {
        let failing = [condition("Healthy", "False", "ProbeFailed")];
        let healthy = [condition("Healthy", "True", "AsExpected")];
        assert_eq!(told(&failing, &healthy), [("AsExpected".to_owned(), false)]);
    }
}
