//! Which machines may take a revision, best first, and why the others may not.

use freehold_crds::conditions::reason;
use freehold_crds::inference_node::Phase;
use freehold_crds::model_deployment::PlanReason;

use super::super::Obstacle;
use super::super::fleet::Machine;
use super::super::memory::mib;
use super::{Placing, Template};
use crate::labels;

impl Placing<'_, '_> {
    pub(super) fn no_room(&self, placed: usize, wanted: usize, reasons: &[PlanReason]) -> Obstacle {
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

    /// The machines that may take the template, best first, and a reason for every machine.
    pub(super) fn rank(&self, template: &Template<'_>) -> (Vec<String>, Vec<PlanReason>) {
        let key = &self.valid.key;
        let mut fit: Vec<(bool, bool, std::cmp::Reverse<u64>, String)> = Vec::new();
        let mut reasons = Vec::new();
        for (name, machine) in &self.fleet.machines {
            let held = machine.holds(key);
            let holds = !held.is_empty() && machine.keeps();
            let free = self.fleet.free_bytes(machine, key);
            let verdict = self.may_run(machine, template, holds, free);
            let (decision, why) = match verdict {
                Ok(why) => {
                    let cordoned = machine.node.cordoned;
                    fit.push((cordoned, !holds, std::cmp::Reverse(free), (*name).to_owned()));
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
        (fit.into_iter().map(|(.., name)| name).collect(), reasons)
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
}
