//! Status of a GovernancePolicy: the gap report.

use freehold_crds::conditions::{self, reason};
use freehold_crds::governance_policy::{GovernancePolicyStatus, PolicyRules};
use freehold_crds::{Enforcement, GovernancePolicy};
use jiff::Timestamp;
use kube::ResourceExt;

use super::Conditions;
use crate::govern;
use crate::plan::{FleetInput, Plan};
use crate::validate::{key_of, validate_policy};

/// Violations that a status holds; the count tells of the rest.
const VIOLATIONS_LISTED: usize = 100;

/// The status of `policy` under `plan`.
#[must_use]
pub fn policy_status(
    policy: &GovernancePolicy,
    plan: &Plan,
    input: &FleetInput,
    now: Timestamp,
) -> GovernancePolicyStatus {
    let name = policy.name_any();
    let old = policy.status.clone().unwrap_or_default();
    let selected = input
        .deployments
        .iter()
        .filter(|d| govern::selects(policy, d, &input.namespaces));
    let selected: Vec<_> = selected
        .filter(|d| d.metadata.deletion_timestamp.is_none())
        .map(|d| key_of(d))
        .collect();
    let violations = selected
        .iter()
        .filter_map(|key| plan.deployments.get(key))
        .flat_map(|planned| &planned.violations);
    let mut violations: Vec<_> = violations
        .filter(|violation| violation.policy == name)
        .cloned()
        .collect();
    violations.sort_by(|a, b| (&a.object, &a.rule, &a.field).cmp(&(&b.object, &b.rule, &b.field)));
    let gaps = govern::gaps(policy);
    let enforced = policy.spec.enforcement == Enforcement::Enforce;

    let mut set = Conditions::new(&old.conditions, policy.metadata.generation, now);
    match validate_policy(policy) {
        Err(errors) => {
            let message = errors
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join("; ");
            set.set(
                conditions::READY,
                Some(false),
                reason::INVALID_SPEC,
                message.clone(),
            );
            set.set(conditions::STALLED, Some(true), reason::INVALID_SPEC, message);
        }
        Ok(()) => {
            let how = if enforced { "enforced" } else { "recorded" };
            let message = match (policy.spec.rules == PolicyRules::default(), selected.len()) {
                (true, _) => "the policy has no rules: it allows everything".to_owned(),
                (_, 0) => "selects no deployment".to_owned(),
                (_, count) => format!("{how} for {count} deployments, {} violations", violations.len()),
            };
            set.set(conditions::READY, Some(true), reason::AS_EXPECTED, message);
        }
    }
    if gaps.is_empty() {
        set.set(
            conditions::FULLY_ENFORCED,
            Some(true),
            reason::AS_EXPECTED,
            "this version holds every rule that is set",
        );
    } else {
        let held = if enforced {
            "what the policy selects is held back"
        } else {
            "violations are recorded"
        };
        set.set(
            conditions::FULLY_ENFORCED,
            Some(false),
            reason::NOT_SUPPORTED,
            format!("this version cannot hold {}; {held}", gaps.join(", ")),
        );
    }
    let violation_count = u32::try_from(violations.len()).unwrap_or(u32::MAX);
    violations.truncate(VIOLATIONS_LISTED);
    GovernancePolicyStatus {
        observed_generation: policy.metadata.generation,
        conditions: set.finish(),
        deployments: u32::try_from(selected.len()).unwrap_or(u32::MAX),
        violation_count,
        violations,
        gaps,
    }
}
