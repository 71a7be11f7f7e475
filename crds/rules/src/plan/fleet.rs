//! The machines while a plan is made: what is reserved on each so far.

use std::collections::{BTreeMap, BTreeSet};

use freehold_crds::inference_node::{Accelerator, Assignment, Instance};
use freehold_crds::model_deployment::ModelFacts;
use freehold_crds::{Device, ObjectKey};

use super::{FleetInput, Liveness, NodeInput};

/// One machine and the assignments that are planned for it so far.
pub(super) struct Machine<'a> {
    pub(super) node: &'a NodeInput,
    pub(super) planned: Vec<Assignment>,
}

/// The machines by name.
pub(super) struct Fleet<'a> {
    pub(super) machines: BTreeMap<&'a str, Machine<'a>>,
    /// The deployments whose place is known: what they held and do not hold in the plan is free.
    settled: BTreeSet<ObjectKey>,
}

impl<'a> Fleet<'a> {
    pub(super) fn new(input: &'a FleetInput) -> Self {
        let machines = input.nodes.iter().map(|node| {
            (
                node.name.as_str(),
                Machine {
                    node,
                    planned: Vec::new(),
                },
            )
        });
        Self {
            machines: machines.collect(),
            settled: BTreeSet::new(),
        }
    }

    /// A deployment has been planned, or is on its way out.
    pub(super) fn settle(&mut self, key: &ObjectKey) {
        self.settled.insert(key.clone());
    }

    /// Memory of a machine that `newcomer` may take: what models may take, less what is planned, and less
    /// what others hold now and have not been planned yet (they keep their place, for now).
    pub(super) fn free_bytes(&self, machine: &Machine<'_>, newcomer: &ObjectKey) -> u64 {
        let planned: u64 = machine.planned.iter().map(|a| a.memory_bytes).sum();
        let others = machine.node.spec.assignments.iter().filter(|held| {
            let holder = ObjectKey::new(&held.namespace, &held.deployment);
            holder != *newcomer && !self.settled.contains(&holder)
        });
        let held: u64 = others.map(|a| a.memory_bytes).sum();
        let allocatable = machine.node.status.inventory.allocatable_bytes;
        allocatable.saturating_sub(planned).saturating_sub(held)
    }

    /// Facts of an assignment's model, from whichever machine has read it.
    pub(super) fn facts(&self, assignment: &str) -> Option<&'a ModelFacts> {
        self.machines
            .values()
            .find_map(|machine| machine.instance(assignment)?.model.as_ref())
    }
}

impl<'a> Machine<'a> {
    /// What the agent says of an assignment that it was given with the spec of now; what it said before is
    /// of the past.
    pub(super) fn current(&self, assignment: &str) -> Option<&'a Instance> {
        let assigned = self.node.spec.assignments.iter().any(|a| a.name == assignment);
        self.instance(assignment)
            .filter(|_| assigned && self.has_taken_up_its_spec())
    }

    pub(super) fn has_taken_up_its_spec(&self) -> bool {
        self.node.status.observed_generation.unwrap_or(0) >= self.node.generation
    }

    pub(super) fn instance(&self, assignment: &str) -> Option<&'a Instance> {
        self.node
            .status
            .instances
            .iter()
            .find(|instance| instance.name == assignment)
    }

    /// What the machine holds of a deployment now.
    pub(super) fn holds(&self, key: &ObjectKey) -> Vec<&'a Assignment> {
        let held = self.node.spec.assignments.iter();
        held.filter(|a| a.namespace == key.namespace && a.deployment == key.name)
            .collect()
    }

    /// Whether anything can be placed here anew.
    pub(super) fn takes_new(&self) -> Result<(), String> {
        if self.node.deleting {
            return Err("the machine is leaving".to_owned());
        }
        if self.node.cordoned {
            return Err("it is cordoned".to_owned());
        }
        match self.node.liveness {
            Liveness::Alive => {}
            Liveness::Silent | Liveness::Lost => return Err("its heartbeat stopped".to_owned()),
        }
        if self.node.status.inventory.allocatable_bytes == 0 {
            return Err("it has not told its memory yet".to_owned());
        }
        Ok(())
    }

    /// Whether what is here may stay.
    pub(super) fn keeps(&self) -> bool {
        !self.node.deleting && self.node.liveness != Liveness::Lost
    }

    pub(super) fn has_device(&self, device: Device) -> Result<(), String> {
        let found = self
            .node
            .status
            .inventory
            .devices
            .iter()
            .filter(|accelerator| accelerator.kind == device);
        match device {
            Device::Auto | Device::Cpu => Ok(()),
            Device::Cuda | Device::Metal => {
                let usable = found.clone().any(|accelerator| accelerator.usable);
                if usable {
                    return Ok(());
                }
                let mut found = found;
                Err(match found.next() {
                    Some(Accelerator {
                        name,
                        reason: Some(reason),
                        ..
                    }) => format!("its {device:?} device, {name}, cannot be used: {reason}"),
                    Some(_) => format!("its agent was built without support for {device:?}"),
                    None => format!("it has no {device:?} device"),
                })
            }
        }
    }
}
