//! What is worth telling of a deployment.

use freehold_crds::common::Violation;
use freehold_crds::conditions::reason;
use freehold_crds::{Enforcement, GovernancePolicy, ModelDeploymentStatus};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Resource;

use crate::story::{Story, of_conditions};

/// The API takes actions of at most 128 characters.
const LONGEST_ACTION: usize = 128;

/// The stories between two statuses.
pub(super) fn stories(old: Option<&ModelDeploymentStatus>, new: &ModelDeploymentStatus) -> Vec<Story> {
    let nothing = ModelDeploymentStatus::default();
    let old = old.unwrap_or(&nothing);
    let placements = new
        .instances
        .iter()
        .filter(|i| old.instances.iter().all(|o| o.name != i.name));
    let placements = placements.map(|instance| {
        let why = new.plan.iter().find(|reason| reason.node == instance.node);
        let why = why.map_or_else(String::new, |reason| format!(": {}", reason.reason));
        let note = format!("revision {} goes to {}{why}", instance.revision, instance.node);
        Story::new(false, "Planned", format!("Place {}", instance.name), note)
    });
    let violations = new
        .violations
        .iter()
        .filter(|v| !old.violations.contains(v))
        .map(violation);
    let mut stories: Vec<Story> = placements.chain(violations).collect();
    // A violation was told with its field and remedy; the condition only repeats it.
    let conditions = of_conditions(&old.conditions, &new.conditions);
    let told = |reason: &str| stories.iter().any(|story| story.reason == reason);
    let fresh: Vec<Story> = conditions
        .into_iter()
        .filter(|story| !told(&story.reason))
        .collect();
    stories.extend(fresh);
    stories
}

fn violation(violation: &Violation) -> Story {
    let Violation {
        policy,
        rule,
        object: _,
        field,
        evidence,
        remedy,
        enforcement,
    } = violation;
    let outcome = match enforcement {
        Enforcement::Enforce => "forbids",
        Enforcement::Audit => "records",
    };
    let note = format!("policy {policy} {outcome} {field}: {evidence} ({rule}); {remedy}");
    let related = ObjectReference {
        api_version: Some(GovernancePolicy::api_version(&()).into_owned()),
        kind: Some(GovernancePolicy::kind(&()).into_owned()),
        name: Some(policy.clone()),
        ..ObjectReference::default()
    };
    Story {
        related: Some(related),
        ..Story::new(
            true,
            reason::POLICY_VIOLATION,
            rule.chars().take(LONGEST_ACTION).collect::<String>(),
            note,
        )
    }
}

#[cfg(test)]
mod tests {
    use freehold_crds::model_deployment::{DeploymentInstance, PlanReason};

    use super::*;

    #[test]
    fn placement_is_told_with_its_reason_and_once() {
        let new = ModelDeploymentStatus {
            instances: vec![DeploymentInstance {
                name: "pi.1".into(),
                node: "pi".into(),
                revision: "1".into(),
                ..DeploymentInstance::default()
            }],
            plan: vec![PlanReason {
                node: "pi".into(),
                decision: "Chosen".into(),
                reason: "412 MiB fits in 2 GiB free".into(),
            }],
            ..ModelDeploymentStatus::default()
        };
        let told = stories(None, &new);
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].note, "revision 1 goes to pi: 412 MiB fits in 2 GiB free");
        assert_eq!(stories(Some(&new), &new), []);
    }

    #[test]
    fn violation_names_field_evidence_and_remedy() {
        let new = ModelDeploymentStatus {
            violations: vec![Violation {
                policy: "strict".into(),
                rule: "spec.supplyChain.requireDigest".into(),
                object: "default/chat".into(),
                field: "spec.model.sha256".into(),
                evidence: "no digest".into(),
                remedy: "set it".into(),
                enforcement: Enforcement::Enforce,
            }],
            ..ModelDeploymentStatus::default()
        };
        let told = stories(None, &new);
        assert_eq!(
            told[0].note,
            "policy strict forbids spec.model.sha256: no digest (spec.supplyChain.requireDigest); set it"
        );
        assert!(told[0].warning);
    }
}
