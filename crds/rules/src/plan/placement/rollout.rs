//! From one revision to the next on the machines: beside it, in its place, or back to the one before.

use std::collections::BTreeSet;

use freehold_crds::conditions::reason;
use freehold_crds::inference_node::{Assignment, Phase};
use freehold_crds::model_deployment::{ModelSource, PlanReason, RolloutStrategy};
use jiff::SignedDuration;

use super::super::fleet::Machine;
use super::super::memory::{self, mib};
use super::super::{DeploymentPlan, Obstacle, Placed};
use super::{Placing, Template, assignment_name, forbidden};
use crate::govern;
use crate::labels;
use crate::validate::Candidate;

impl Placing<'_, '_> {
    /// Puts the template on a machine, beside or in place of what is there.
    pub(super) fn assign(
        &mut self,
        name: &str,
        template: &Template<'_>,
        planned: &mut DeploymentPlan,
        reason: &mut PlanReason,
    ) {
        let key = self.valid.key.clone();
        let strategy = self.deployment.spec.rollout.strategy;
        let Some(machine) = self.fleet.machines.get(name) else {
            return;
        };
        let free = self.fleet.free_bytes(machine, &key);
        let held = machine.holds(&key);
        let phase = machine
            .instance(&template.assignment.name)
            .map(|instance| instance.phase);
        let ready = matches!(phase, Some(Phase::Ready | Phase::Idle));
        let others: Vec<Assignment> = held
            .iter()
            .filter(|a| a.revision != template.revision && self.policies_allow(a))
            .map(|a| (*a).clone())
            .collect();
        let here = held.iter().any(|a| a.revision == template.revision);
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
        let Some(machine) = self.fleet.machines.get_mut(name) else {
            return;
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

    /// A cordoned machine serves on until as many others do as are wanted: nothing is asked of nobody.
    pub(super) fn leave_cordoned(
        &mut self,
        template: &Template<'_>,
        wanted: usize,
        planned: &mut DeploymentPlan,
        reasons: &mut [PlanReason],
    ) {
        let name = &template.assignment.name;
        let answers = planned.placements.iter().filter(|placed| {
            let machine = self.fleet.machines.get(placed.node.as_str());
            let instance = machine.and_then(|machine| machine.current(&placed.assignment));
            placed.assignment == *name
                && instance.is_some_and(|instance| matches!(instance.phase, Phase::Ready | Phase::Idle))
        });
        let mut missing = wanted.saturating_sub(answers.count());
        let leaving = self.fleet.machines.iter().filter(|(node, machine)| {
            machine.node.cordoned && machine.keeps() && planned.placements.iter().all(|p| p.node != **node)
        });
        let leaving: Vec<(String, Vec<Assignment>)> = leaving
            .map(|(node, machine)| {
                let held = machine.holds(&self.valid.key).into_iter();
                let held = held.filter(|held| held.name == *name || self.policies_allow(held));
                ((*node).to_owned(), held.cloned().collect())
            })
            .filter(|(_, held): &(String, Vec<Assignment>)| !held.is_empty())
            .collect();
        for (node, held) in leaving {
            let Some(machine) = self.fleet.machines.get_mut(node.as_str()) else {
                continue;
            };
            if missing == 0 {
                return;
            }
            missing -= 1;
            for assignment in held {
                planned.placements.push(Placed {
                    node: node.clone(),
                    revision: assignment.revision.clone(),
                    assignment: assignment.name.clone(),
                });
                machine.planned.push(assignment);
            }
            if let Some(reason) = reasons.iter_mut().find(|reason| reason.node == node) {
                reason.decision = "Kept".to_owned();
                reason.reason = "it is cordoned, and serves until others do".to_owned();
            }
        }
    }

    /// Where the new revision finds no machine, the old one serves on where it is and still may be: a
    /// change that cannot be carried out takes nothing down.
    pub(super) fn keep_serving(
        &mut self,
        template: &Template<'_>,
        wanted: usize,
        planned: &mut DeploymentPlan,
    ) {
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
            let Some(machine) = self.fleet.machines.get(name.as_str()) else {
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
                .filter(|a| a.revision != template.revision && self.policies_allow(a))
                .cloned()
                .collect();
            let Some(machine) = self.fleet.machines.get_mut(name.as_str()) else {
                continue;
            };
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

    /// Whether the policies of now allow what stands there from before.
    fn policies_allow(&self, held: &Assignment) -> bool {
        let candidate = earlier(held.model.clone());
        govern::deployment(self.deployment, &candidate, self.policies).allowed()
    }

    /// Why the last good revision must serve in place of the one that the spec asks for.
    pub(super) fn rolled_back(&mut self, template: &Template<'_>) -> Option<String> {
        let status = self.deployment.status.as_ref()?;
        let stable = status.stable.as_ref()?;
        if stable.revision == template.revision {
            return None;
        }
        let before = status
            .rollback
            .as_ref()
            .filter(|rollback| rollback.revision == template.revision);
        if let Some(rollback) = before
            && rollback.generation == self.deployment.metadata.generation
        {
            return Some(rollback.message.clone());
        }
        let machines = || self.fleet.machines.values();
        let instances: Vec<_> = machines()
            .filter_map(|machine| machine.current(&template.assignment.name))
            .collect();
        if let Some(failed) = instances.iter().find(|instance| instance.phase == Phase::Failed) {
            let why = failed.message.clone().unwrap_or_default();
            return Some(format!("revision {} failed: {why}", template.revision));
        }
        // A machine without memory for it may be another's chance, or wait for the old revision to make
        // room. Where neither is so, waiting for the deadline would only prolong the pause in serving.
        let refused = instances.iter().find(|instance| instance.phase == Phase::Refused);
        if let Some(refused) = refused
            && instances.iter().all(|i| i.phase == Phase::Refused)
            && !machines().any(|machine| self.holds_another(machine, template))
        {
            let why = refused.message.clone().unwrap_or_default();
            return Some(format!("revision {} was refused: {why}", template.revision));
        }
        let ready = instances
            .iter()
            .any(|instance| matches!(instance.phase, Phase::Ready | Phase::Idle));
        // A revision that is tried anew gets its whole time: what the status says is of the try before.
        let began = status
            .revision_since
            .as_ref()
            .filter(|_| before.is_none() && status.revision.as_deref() == Some(template.revision.as_str()))?;
        if ready {
            return None;
        }
        let seconds = i64::from(self.deployment.spec.rollout.deadline_seconds);
        let deadline = began.0.checked_add(SignedDuration::from_secs(seconds)).ok()?;
        if self.now >= deadline {
            return Some(format!(
                "revision {} was not ready within {seconds} s (spec.rollout.deadlineSeconds)",
                template.revision
            ));
        }
        *self.replan_at = Some(self.replan_at.map_or(deadline, |at| at.min(deadline)));
        None
    }

    /// Whether another revision of the deployment stands on the machine, or is on its way out of it.
    fn holds_another(&self, machine: &Machine<'_>, template: &Template<'_>) -> bool {
        let ours = assignment_name(&self.valid.key, "");
        // Names of deployments may hold dots, names of revisions do not.
        let other = |name: &&String| {
            let revision = name.strip_prefix(&ours);
            revision.is_some_and(|revision| !revision.contains('.') && revision != template.revision)
        };
        let held = machine.node.spec.assignments.iter().map(|held| &held.name);
        let leaving = machine
            .node
            .status
            .instances
            .iter()
            .map(|instance| &instance.name);
        held.chain(leaving).any(|name| other(&name))
    }

    /// Places the last good revision where it is or where it may be, if the policies of now allow it.
    pub(super) fn keep_stable(&mut self, planned: &mut DeploymentPlan) {
        let Some(stable) = self
            .deployment
            .status
            .as_ref()
            .and_then(|status| status.stable.clone())
        else {
            return;
        };
        let candidate = earlier(stable.model.clone());
        let decision = govern::deployment(self.deployment, &candidate, self.policies);
        // What runs is what is judged.
        planned.violations.clone_from(&decision.violations);
        if let Some(obstacle) = forbidden(&decision.violations) {
            planned.obstacle = Some(obstacle);
            return;
        }
        let mut old = self.template(&candidate, &decision);
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
                .map(|kept| Assignment {
                    allowed_formats: old.assignment.allowed_formats.clone(),
                    ..kept.clone()
                });
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
        self.record_residency(&decision, planned);
    }
}

/// The model of an earlier revision, as the policies judge it.
fn earlier(model: ModelSource) -> Candidate {
    Candidate {
        variant: None,
        field: "status.stable.model".to_owned(),
        model,
        size_bytes: None,
    }
}
