//! Status of a HealthProbe.

use freehold_crds::HealthProbe;
use freehold_crds::conditions::{self, reason};
use freehold_crds::health_probe::{HealthProbeStatus, RemediationAction, TargetResult};
use freehold_crds::inference_node::ProbeState;
use jiff::Timestamp;
use kube::ResourceExt;

use super::Conditions;
use super::deployment::state_name;
use crate::plan::{FleetInput, Plan};
use crate::validate::validate_probe;

/// The status of `probe` under `plan`.
#[must_use]
pub fn probe_status(
    probe: &HealthProbe,
    plan: &Plan,
    input: &FleetInput,
    now: Timestamp,
) -> HealthProbeStatus {
    let name = format!("{}.{}", probe.namespace().unwrap_or_default(), probe.name_any());
    let old = probe.status.clone().unwrap_or_default();
    let (mut results, mut suspended) = (Vec::new(), None);
    let targeted = plan
        .nodes
        .values()
        .any(|spec| spec.probes.iter().any(|compiled| compiled.name == name));
    for node in &input.nodes {
        for instance in &node.status.instances {
            let assignment = node.spec.assignments.iter().find(|a| a.name == instance.name);
            let Some(assignment) = assignment else { continue };
            for result in instance.probes.iter().filter(|result| result.probe == name) {
                if result.suspended {
                    suspended = Some(format!(
                        "the budget of restarts is spent for {} on {}; raise spec.remediation.budget or find the cause",
                        assignment.deployment, node.name
                    ));
                }
                results.push(TargetResult {
                    deployment: assignment.deployment.clone(),
                    node: node.name.clone(),
                    check: result.check.clone(),
                    state: state_name(result.state).to_owned(),
                    message: result.message.clone(),
                    restarts: result.restarts,
                });
            }
        }
    }
    results.sort_by(|a, b| (&a.deployment, &a.node, &a.check).cmp(&(&b.deployment, &b.node, &b.check)));
    let healthy = results
        .iter()
        .filter(|r| r.state == state_name(ProbeState::Healthy))
        .count();
    let failing: Vec<&TargetResult> = results
        .iter()
        .filter(|r| r.state == state_name(ProbeState::Failing))
        .collect();
    let gaps = match probe.spec.remediation.action {
        RemediationAction::Relocate | RemediationAction::Rollback => vec![format!(
            "spec.remediation.action {:?}: this version only reports",
            probe.spec.remediation.action
        )],
        RemediationAction::None | RemediationAction::Restart => Vec::new(),
    };

    let mut set = Conditions::new(&old.conditions, probe.metadata.generation, now);
    match validate_probe(probe) {
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
        Ok(()) if !targeted => set.set(
            conditions::READY,
            Some(true),
            reason::AS_EXPECTED,
            "selects no deployment that is placed",
        ),
        Ok(()) => set.set(
            conditions::READY,
            Some(true),
            reason::AS_EXPECTED,
            format!("{} checks on every replica", probe.spec.checks.len()),
        ),
    }
    if let Some(first) = failing.first() {
        let message = format!(
            "{} of {} results fail; first: {} of {} on {}: {}",
            failing.len(),
            results.len(),
            first.check,
            first.deployment,
            first.node,
            first.message.clone().unwrap_or_default()
        );
        set.set(conditions::HEALTHY, Some(false), reason::PROBE_FAILED, message);
    } else if healthy > 0 {
        set.set(
            conditions::HEALTHY,
            Some(true),
            reason::AS_EXPECTED,
            format!("{healthy} of {} results are healthy", results.len()),
        );
    } else {
        set.set(
            conditions::HEALTHY,
            None,
            reason::NO_RESULT,
            "no check has a result yet",
        );
    }
    let holds = suspended.is_some();
    set.set_if(
        holds,
        conditions::REMEDIATION_SUSPENDED,
        reason::BUDGET_SPENT,
        suspended.unwrap_or_default(),
    );
    HealthProbeStatus {
        observed_generation: probe.metadata.generation,
        conditions: set.finish(),
        summary: Some(format!("{healthy}/{}", results.len())),
        results,
        gaps,
    }
}
