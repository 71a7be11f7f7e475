//! Placing one deployment: which revision, on which machines, beside or in place of the one before.

mod machines;
mod rollout;

use std::collections::{BTreeMap, BTreeSet};

use freehold_crds::common::Violation;
use freehold_crds::conditions::reason;
use freehold_crds::inference_node::Assignment;
use freehold_crds::model_deployment::{MemoryEstimate, ModelFacts, StableRevision};
use freehold_crds::{Enforcement, GovernancePolicy, ModelDeployment, ObjectKey};
use jiff::Timestamp;

use super::fleet::Fleet;
use super::memory;
use super::{DeploymentPlan, FleetInput, Obstacle, Withheld, revision_name};
use crate::govern::{self, Decision};
use crate::labels;
use crate::validate::{Candidate, ValidatedDeployment, validate_deployment};

/// Plans one deployment and reserves its memory in `fleet`.
pub(super) fn place(
    deployment: &ModelDeployment,
    input: &FleetInput,
    fleet: &mut Fleet<'_>,
    taken: &mut BTreeMap<String, ObjectKey>,
    now: Timestamp,
    replan_at: &mut Option<Timestamp>,
) -> DeploymentPlan {
    let mut planned = DeploymentPlan {
        wanted: deployment.spec.replicas,
        ..DeploymentPlan::default()
    };
    let valid = match validate_deployment(deployment) {
        Ok(valid) => valid,
        Err(errors) => {
            let supported = errors.iter().any(|error| !error.not_supported);
            let reason = if supported {
                reason::INVALID_SPEC
            } else {
                reason::NOT_SUPPORTED
            };
            let message = errors
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join("; ");
            planned.obstacle = Some(Obstacle {
                reason,
                message,
                stalled: true,
            });
            return planned;
        }
    };
    take_names(&valid, taken, &mut planned);
    if planned.names.is_empty() {
        planned.obstacle = Some(Obstacle {
            reason: reason::NAME_TAKEN,
            message: withheld_text(&planned.withheld),
            stalled: true,
        });
        return planned;
    }
    let policies: Vec<&GovernancePolicy> = input
        .policies
        .iter()
        .filter(|policy| govern::selects(policy, deployment, &input.namespaces))
        .collect();
    let decisions: Vec<Decision> = valid
        .candidates
        .iter()
        .map(|candidate| govern::deployment(deployment, candidate, &policies))
        .collect();
    let Some(first) = decisions.iter().position(Decision::allowed) else {
        planned.violations = decisions
            .into_iter()
            .flat_map(|decision| decision.violations)
            .collect();
        planned.obstacle = forbidden(&planned.violations);
        return planned;
    };
    if deployment.spec.suspend || deployment.spec.replicas == 0 {
        planned.violations.clone_from(&decisions[first].violations);
        if deployment.spec.suspend {
            let message = "held by its owner; set spec.suspend: false to go on".to_owned();
            planned.obstacle = Some(Obstacle {
                reason: reason::SUSPENDED,
                message,
                stalled: false,
            });
        }
        return planned;
    }
    Placing {
        deployment,
        valid: &valid,
        policies: &policies,
        decisions: &decisions,
        fleet,
        now,
        replan_at,
    }
    .run(planned)
}

/// The obstacle that enforced violations are, if there is one among them.
fn forbidden(violations: &[Violation]) -> Option<Obstacle> {
    let enforced = violations
        .iter()
        .find(|v| v.enforcement == Enforcement::Enforce)?;
    Some(Obstacle {
        reason: reason::POLICY_VIOLATION,
        message: format!(
            "policy {} forbids it: {} at {} ({}); {}",
            enforced.policy, enforced.rule, enforced.field, enforced.evidence, enforced.remedy
        ),
        stalled: true,
    })
}

/// Each name goes to the oldest that asks for it; who asks too late goes without that one and keeps the rest.
fn take_names(
    valid: &ValidatedDeployment,
    taken: &mut BTreeMap<String, ObjectKey>,
    planned: &mut DeploymentPlan,
) {
    for name in &valid.names {
        match taken.get(name) {
            Some(holder) => planned.withheld.push(Withheld {
                name: name.clone(),
                holder: holder.clone(),
            }),
            None => {
                taken.insert(name.clone(), valid.key.clone());
                planned.names.push(name.clone());
            }
        }
    }
}

/// What a person reads of names that are withheld.
pub(crate) fn withheld_text(withheld: &[Withheld]) -> String {
    let names = withheld
        .iter()
        .map(|Withheld { name, holder }| format!("the name {name:?} belongs to {holder}, which is older"));
    format!(
        "{}; rename this deployment or its alias",
        names.collect::<Vec<_>>().join("; ")
    )
}

/// One template that could run: a candidate of the spec, or the last good revision.
struct Template<'a> {
    candidate: &'a Candidate,
    decision: &'a Decision,
    revision: String,
    assignment: Assignment,
    facts: Option<ModelFacts>,
    memory: Option<MemoryEstimate>,
}

struct Placing<'a, 'f> {
    deployment: &'a ModelDeployment,
    valid: &'a ValidatedDeployment,
    policies: &'a [&'a GovernancePolicy],
    decisions: &'a [Decision],
    fleet: &'a mut Fleet<'f>,
    now: Timestamp,
    replan_at: &'a mut Option<Timestamp>,
}

impl Placing<'_, '_> {
    fn run(mut self, mut planned: DeploymentPlan) -> DeploymentPlan {
        let allowed = self
            .valid
            .candidates
            .iter()
            .zip(self.decisions)
            .filter(|(_, decision)| decision.allowed());
        let mut templates: Vec<Template<'_>> = allowed
            .map(|(candidate, decision)| self.template(candidate, decision))
            .collect();
        // Variants: the best that has a machine; where none has, the last (smallest) tells what is missing.
        let last = templates.len() - 1;
        let chosen = templates
            .iter()
            .position(|template| !self.rank(template).0.is_empty())
            .unwrap_or(last);
        let template = templates.swap_remove(chosen);
        planned.revision = Some(template.revision.clone());
        planned.variant.clone_from(&template.candidate.variant);
        planned.violations.clone_from(&template.decision.violations);
        planned.memory.clone_from(&template.memory);
        planned.facts.clone_from(&template.facts);
        planned.template = Some(StableRevision {
            revision: template.revision.clone(),
            model: template.candidate.model.clone(),
            engine: self.valid.engine.clone(),
        });
        planned.notes.extend(self.cut_context(&template));
        if let Some(why) = self.rolled_back(&template) {
            planned.rolled_back = Some(why);
            self.keep_stable(&mut planned);
            return planned;
        }
        let (machines, mut reasons) = self.rank(&template);
        if let Some(variant) = &planned.variant {
            for reason in &mut reasons {
                reason.reason = format!("variant {variant}: {}", reason.reason);
            }
        }
        let wanted = self.deployment.spec.replicas as usize;
        for name in machines {
            let placed = planned
                .placements
                .iter()
                .map(|p| &p.node)
                .collect::<BTreeSet<_>>()
                .len();
            let decision = if placed >= wanted { Err("Spare") } else { Ok(()) };
            let Some(reason) = reasons.iter_mut().find(|reason| reason.node == name) else {
                continue;
            };
            match decision {
                Err(spare) => reason.decision = spare.to_owned(),
                Ok(()) => self.assign(&name, &template, &mut planned, reason),
            }
        }
        self.leave_cordoned(&template, wanted, &mut planned, &mut reasons);
        self.keep_serving(&template, wanted, &mut planned);
        planned.reasons = reasons;
        let placed = planned
            .placements
            .iter()
            .map(|p| &p.node)
            .collect::<BTreeSet<_>>()
            .len();
        if placed < wanted {
            planned.obstacle = Some(self.no_room(placed, wanted, &planned.reasons));
        }
        self.record_residency(template.decision, &mut planned);
        planned
    }

    /// A context longer than the model's own is cut to it, and that is said.
    fn cut_context(&self, template: &Template<'_>) -> Option<String> {
        let own = template.facts.as_ref()?.context_length;
        let asked = self.valid.engine.context_length?;
        (own > 0 && asked > own).then(|| {
            format!(
                "spec.engine.contextLength {asked} is cut to {own} tokens, the longest that the model has"
            )
        })
    }

    /// Residency that is only recorded forbids no machine: where a replica stands against it, that is a
    /// violation all the same.
    fn record_residency(&self, decision: &Decision, planned: &mut DeploymentPlan) {
        for (policy, selector) in &decision.recorded_selectors {
            let against: BTreeSet<&str> = planned
                .placements
                .iter()
                .filter_map(|placed| self.fleet.machines.get_key_value(placed.node.as_str()))
                .filter(|(_, machine)| !labels::matches(selector, &machine.node.labels))
                .map(|(name, _)| *name)
                .collect();
            if against.is_empty() {
                continue;
            }
            let machines = against.into_iter().collect::<Vec<_>>().join(", ");
            let asked = labels::describe(selector);
            planned.violations.push(Violation {
                policy: policy.clone(),
                rule: "spec.residency.nodeSelector".to_owned(),
                object: self.valid.key.to_string(),
                field: "spec.placement.nodeSelector".to_owned(),
                evidence: format!("placed on {machines}, without {asked}"),
                remedy: format!("set spec.placement.nodeSelector to machines with {asked}"),
                enforcement: Enforcement::Audit,
            });
        }
    }

    fn template<'t>(&self, candidate: &'t Candidate, decision: &'t Decision) -> Template<'t> {
        let spec = &self.deployment.spec;
        let device = spec.placement.device;
        let revision = revision_name(&candidate.model, &self.valid.engine, device);
        let name = assignment_name(&self.valid.key, &revision);
        // What was learnt of this revision before is remembered in status, so that a model that fits nowhere
        // is not fetched again and again to find that out.
        let status = self.deployment.status.as_ref();
        let remembered = status.filter(|status| status.revision.as_deref() == Some(revision.as_str()));
        let remembered = remembered
            .and_then(|status| status.model.clone())
            .filter(|facts| facts.weight_bytes > 0);
        let facts = self.fleet.facts(&name).cloned().or(remembered).or_else(|| {
            let size = candidate.size_bytes?;
            Some(ModelFacts {
                file_bytes: size,
                weight_bytes: size,
                ..ModelFacts::default()
            })
        });
        let memory = facts
            .as_ref()
            .map(|facts| memory::estimate(facts, &self.valid.engine, self.valid.memory_override));
        let memory_bytes = memory
            .as_ref()
            .map_or_else(|| self.valid.memory_override.unwrap_or(0), |m| m.total_bytes);
        let assignment = Assignment {
            name,
            namespace: self.valid.key.namespace.clone(),
            deployment: self.valid.key.name.clone(),
            revision: revision.clone(),
            model: candidate.model.clone(),
            engine: self.valid.engine.clone(),
            device,
            activation: spec.activation.clone(),
            memory_bytes,
            allowed_formats: decision.allowed_formats.clone().unwrap_or_default(),
        };
        Template {
            candidate,
            decision,
            revision,
            assignment,
            facts,
            memory,
        }
    }
}

fn assignment_name(key: &ObjectKey, revision: &str) -> String {
    format!("{}.{}.{revision}", key.namespace, key.name)
}
