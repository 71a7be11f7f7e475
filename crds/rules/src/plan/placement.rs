//! Placing one deployment: which revision, on which machines, beside or in place of the one before.

use std::collections::{BTreeMap, BTreeSet};

use freehold_crds::conditions::{self, reason};
use freehold_crds::inference_node::{Assignment, Phase};
use freehold_crds::model_deployment::{
    MemoryEstimate, ModelFacts, PlanReason, RolloutStrategy, StableRevision,
};
use freehold_crds::{GovernancePolicy, ModelDeployment, ObjectKey};
use jiff::{SignedDuration, Timestamp};

use super::fleet::{Fleet, Machine};
use super::memory::{self, mib};
use super::{DeploymentPlan, FleetInput, Obstacle, Placed, revision_name};
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
    let clash = valid.names.iter().find_map(|name| Some((name, taken.get(name)?)));
    if let Some((name, holder)) = clash {
        let message = format!(
            "the name {name:?} belongs to {holder}, which is older; rename this deployment or its alias"
        );
        planned.obstacle = Some(Obstacle {
            reason: reason::NAME_TAKEN,
            message,
            stalled: true,
        });
        return planned;
    }
    taken.extend(valid.names.iter().map(|name| (name.clone(), valid.key.clone())));
    planned.names.clone_from(&valid.names);
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
        let enforced = planned
            .violations
            .iter()
            .find(|v| v.enforcement == freehold_crds::Enforcement::Enforce);
        let message = enforced.map_or_else(String::new, |v| {
            format!(
                "policy {} forbids it: {} at {} ({}); {}",
                v.policy, v.rule, v.field, v.evidence, v.remedy
            )
        });
        planned.obstacle = Some(Obstacle {
            reason: reason::POLICY_VIOLATION,
            message,
            stalled: true,
        });
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
        decisions: &decisions,
        fleet,
        now,
        replan_at,
    }
    .run(planned)
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
        if let Some(why) = self.rolled_back(&template) {
            planned.rolled_back = Some(why);
            self.keep_stable(&template, &mut planned);
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
        planned
    }

    /// Where the new revision finds no machine, the old one serves on where it is and still may be: a
    /// change that cannot be carried out takes nothing down.
    fn keep_serving(&mut self, template: &Template<'_>, wanted: usize, planned: &mut DeploymentPlan) {
        let selectors: Vec<_> = template
            .decision
            .node_selectors
            .iter()
            .map(|(_, selector)| selector)
            .chain(&self.deployment.spec.placement.node_selector)
            .collect();
        let names: Vec<String> = self
            .fleet
            .machines
            .keys()
            .map(|name| (*name).to_owned())
            .collect();
        for name in names {
            let used: BTreeSet<&String> = planned.placements.iter().map(|p| &p.node).collect();
            if used.len() >= wanted {
                return;
            }
            let Some(machine) = self.fleet.machines.get_mut(name.as_str()) else {
                continue;
            };
            let may_stay = machine.keeps()
                && selectors
                    .iter()
                    .all(|selector| labels::matches(selector, &machine.node.labels));
            if !may_stay || used.contains(&name) {
                continue;
            }
            let old: Vec<Assignment> = machine
                .holds(&self.valid.key)
                .into_iter()
                .filter(|a| a.revision != template.revision)
                .cloned()
                .collect();
            for assignment in old {
                planned.placements.push(Placed {
                    node: name.clone(),
                    revision: assignment.revision.clone(),
                    assignment: assignment.name.clone(),
                });
                machine.planned.push(assignment);
            }
        }
    }

    fn no_room(&self, placed: usize, wanted: usize, reasons: &[PlanReason]) -> Obstacle {
        if reasons.is_empty() {
            let message =
                "no machine is known yet: start an agent (freehold up, or the Helm chart's DaemonSet)"
                    .to_owned();
            return Obstacle {
                reason: reason::NO_NODES,
                message,
                stalled: false,
            };
        }
        let rejected: Vec<String> = reasons
            .iter()
            .filter(|r| r.decision == "Rejected")
            .map(|r| format!("{}: {}", r.node, r.reason))
            .collect();
        let message = format!(
            "{placed} of {wanted} replicas have a machine; {}",
            if rejected.is_empty() {
                "one machine runs at most one replica".to_owned()
            } else {
                rejected.join("; ")
            }
        );
        Obstacle {
            reason: reason::NO_ROOM,
            message,
            stalled: false,
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

    /// The machines that may take the template, best first, and a reason for every machine.
    fn rank(&self, template: &Template<'_>) -> (Vec<String>, Vec<PlanReason>) {
        let key = &self.valid.key;
        let settled = |held: &Assignment| {
            self.fleet
                .machines
                .values()
                .any(|m| m.planned.iter().any(|p| p.name == held.name))
        };
        let mut fit: Vec<(bool, std::cmp::Reverse<u64>, String)> = Vec::new();
        let mut reasons = Vec::new();
        for (name, machine) in &self.fleet.machines {
            let held = machine.holds(key);
            let holds = !held.is_empty() && machine.keeps();
            let free = machine.free_bytes(key, &settled);
            let verdict = self.may_run(machine, template, holds, free);
            let (decision, why) = match verdict {
                Ok(why) => {
                    fit.push((!holds, std::cmp::Reverse(free), (*name).to_owned()));
                    (if holds { "Kept" } else { "Chosen" }, why)
                }
                Err(why) => ("Rejected", why),
            };
            reasons.push(PlanReason {
                node: (*name).to_owned(),
                decision: decision.to_owned(),
                reason: why,
            });
        }
        fit.sort();
        (fit.into_iter().map(|(_, _, name)| name).collect(), reasons)
    }

    fn may_run(
        &self,
        machine: &Machine<'_>,
        template: &Template<'_>,
        holds: bool,
        free: u64,
    ) -> Result<String, String> {
        if !holds {
            machine.takes_new()?;
        }
        let labels = &machine.node.labels;
        if let Some(selector) = &self.deployment.spec.placement.node_selector
            && !labels::matches(selector, labels)
        {
            return Err(format!(
                "its labels do not fit spec.placement.nodeSelector ({})",
                labels::describe(selector)
            ));
        }
        for (policy, selector) in &template.decision.node_selectors {
            if !labels::matches(selector, labels) {
                return Err(format!(
                    "policy {policy} keeps the model to machines with {}",
                    labels::describe(selector)
                ));
            }
        }
        machine.has_device(self.deployment.spec.placement.device)?;
        let refused = machine
            .instance(&template.assignment.name)
            .filter(|instance| instance.phase == Phase::Refused);
        match &template.memory {
            Some(estimate) if estimate.total_bytes > free => Err(format!(
                "{} does not fit in {} free of {}",
                estimate.arithmetic,
                mib(free),
                mib(machine.node.status.inventory.allocatable_bytes)
            )),
            Some(estimate) => Ok(format!("{} fits in {} free", estimate.arithmetic, mib(free))),
            None if template.assignment.memory_bytes > free => Err(format!(
                "spec.placement.memory reserves {} and {} are free",
                mib(template.assignment.memory_bytes),
                mib(free)
            )),
            None => match refused.and_then(|instance| instance.message.clone()) {
                Some(message) => Err(message),
                None => Ok(format!(
                    "the model's size is not known before it is fetched; {} are free",
                    mib(free)
                )),
            },
        }
    }

    /// Puts the template on a machine, beside or in place of what is there.
    fn assign(
        &mut self,
        name: &str,
        template: &Template<'_>,
        planned: &mut DeploymentPlan,
        reason: &mut PlanReason,
    ) {
        let key = self.valid.key.clone();
        let strategy = self.deployment.spec.rollout.strategy;
        let settled_names: BTreeSet<String> = self
            .fleet
            .machines
            .values()
            .flat_map(|m| m.planned.iter().map(|p| p.name.clone()))
            .collect();
        let Some(machine) = self.fleet.machines.get_mut(name) else {
            return;
        };
        let held = machine.holds(&key);
        let phase = machine
            .instance(&template.assignment.name)
            .map(|instance| instance.phase);
        let ready = matches!(phase, Some(Phase::Ready | Phase::Idle));
        let others: Vec<Assignment> = held
            .iter()
            .filter(|a| a.revision != template.revision)
            .map(|a| (*a).clone())
            .collect();
        let here = held.iter().any(|a| a.revision == template.revision);
        let free = machine.free_bytes(&key, &|held| settled_names.contains(&held.name));
        let old_bytes: u64 = others.iter().map(|a| a.memory_bytes).sum();
        // An unknown size is taken to be like the old one's.
        let new_bytes = if template.assignment.memory_bytes > 0 {
            template.assignment.memory_bytes
        } else {
            old_bytes
        };
        let room_for_both =
            self.deployment.spec.placement.surge && new_bytes.saturating_add(old_bytes) <= free;
        let (keep_old, add_new) = match strategy {
            _ if others.is_empty() => (false, true),
            _ if ready => (false, true),
            // A rollout under way goes on as it began, unless the real sizes turn out not to fit together.
            _ if here && room_for_both => (true, true),
            RolloutStrategy::Replace => (false, true),
            RolloutStrategy::Surge if !room_for_both => (true, false),
            RolloutStrategy::Auto if !room_for_both => (false, true),
            RolloutStrategy::Surge | RolloutStrategy::Auto => (true, true),
        };
        if add_new {
            machine.planned.push(template.assignment.clone());
            planned.placements.push(Placed {
                node: name.to_owned(),
                revision: template.revision.clone(),
                assignment: template.assignment.name.clone(),
            });
        }
        if keep_old {
            for old in others {
                planned.placements.push(Placed {
                    node: name.to_owned(),
                    revision: old.revision.clone(),
                    assignment: old.name.clone(),
                });
                machine.planned.push(old);
            }
        }
        if !add_new {
            let message = format!(
                "two revisions need {} and {} are free: free memory, or use spec.rollout.strategy Replace",
                mib(new_bytes.saturating_add(old_bytes)),
                mib(free)
            );
            reason.reason.clone_from(&message);
            planned.obstacle = Some(Obstacle {
                reason: reason::NO_ROOM,
                message,
                stalled: false,
            });
        }
    }

    /// Why the last good revision must serve in place of the one that the spec asks for.
    fn rolled_back(&mut self, template: &Template<'_>) -> Option<String> {
        let status = self.deployment.status.as_ref()?;
        let stable = status
            .stable
            .as_ref()
            .filter(|stable| stable.revision != template.revision)?;
        let same_revision = status.revision.as_deref() == Some(template.revision.as_str());
        let condition = |kind: &str| {
            status
                .conditions
                .iter()
                .find(|c| c.type_ == kind && c.status == "True")
        };
        if same_revision
            && let Some(stalled) = condition(conditions::STALLED).filter(|c| c.reason == reason::ROLLED_BACK)
        {
            return Some(stalled.message.clone());
        }
        let instances: Vec<_> = self
            .fleet
            .machines
            .values()
            .filter_map(|m| m.instance(&template.assignment.name))
            .collect();
        if let Some(failed) = instances.iter().find(|instance| instance.phase == Phase::Failed) {
            let why = failed.message.clone().unwrap_or_default();
            return Some(format!(
                "revision {} failed and revision {} serves on: {why}",
                template.revision, stable.revision
            ));
        }
        let ready = instances
            .iter()
            .any(|instance| matches!(instance.phase, Phase::Ready | Phase::Idle));
        let began = condition(conditions::RECONCILING)
            .filter(|_| same_revision)
            .map(|c| c.last_transition_time.0)?;
        if ready {
            return None;
        }
        let seconds = i64::from(self.deployment.spec.rollout.deadline_seconds);
        let deadline = began.checked_add(SignedDuration::from_secs(seconds)).ok()?;
        if self.now >= deadline {
            return Some(format!(
                "revision {} was not ready within {seconds} s (spec.rollout.deadlineSeconds) and revision {} serves on",
                template.revision, stable.revision
            ));
        }
        *self.replan_at = Some(self.replan_at.map_or(deadline, |at| at.min(deadline)));
        None
    }

    /// Places the last good revision, where it is or where it may be.
    fn keep_stable(&mut self, template: &Template<'_>, planned: &mut DeploymentPlan) {
        let Some(stable) = self
            .deployment
            .status
            .as_ref()
            .and_then(|status| status.stable.clone())
        else {
            return;
        };
        let candidate = Candidate {
            variant: None,
            field: "status.stable.model".to_owned(),
            model: stable.model.clone(),
            size_bytes: None,
        };
        let mut old = self.template(&candidate, template.decision);
        let name = assignment_name(&self.valid.key, &stable.revision);
        old.facts = self.fleet.facts(&name).cloned();
        old.memory = old
            .facts
            .as_ref()
            .map(|facts| memory::estimate(facts, &stable.engine, self.valid.memory_override));
        old.revision.clone_from(&stable.revision);
        old.assignment = Assignment {
            name: name.clone(),
            revision: stable.revision.clone(),
            engine: stable.engine.clone(),
            memory_bytes: old.memory.as_ref().map_or(0, |m| m.total_bytes),
            ..old.assignment
        };
        let (machines, reasons) = self.rank(&old);
        for node in machines.into_iter().take(self.deployment.spec.replicas as usize) {
            let Some(machine) = self.fleet.machines.get_mut(node.as_str()) else {
                continue;
            };
            let kept = machine
                .holds(&self.valid.key)
                .into_iter()
                .find(|a| a.name == name)
                .cloned();
            machine
                .planned
                .push(kept.unwrap_or_else(|| old.assignment.clone()));
            planned.placements.push(Placed {
                node,
                revision: stable.revision.clone(),
                assignment: name.clone(),
            });
        }
        planned.reasons = reasons;
    }
}

fn assignment_name(key: &ObjectKey, revision: &str) -> String {
    format!("{}.{}.{revision}", key.namespace, key.name)
}
