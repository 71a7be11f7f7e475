//! Lints a plan against its invariants. A plan with a breach is not applied: it would be our own mistake.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::labels;
use crate::plan::{FleetInput, Plan};
use crate::validate::key_of;

/// An invariant that a plan does not keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Breach {
    /// The machine.
    pub node: String,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}: {}", self.node, self.message)
    }
}

/// Every breach, none in a sound plan.
#[must_use]
pub fn check(plan: &Plan, input: &FleetInput) -> Vec<Breach> {
    let nodes: BTreeMap<&str, _> = input
        .nodes
        .iter()
        .map(|node| (node.name.as_str(), node))
        .collect();
    let mut breaches = Vec::new();
    for (name, spec) in &plan.nodes {
        let mut breach = |message: String| {
            breaches.push(Breach {
                node: name.clone(),
                message,
            })
        };
        let Some(node) = nodes.get(name.as_str()) else {
            breach("is not known".to_owned());
            continue;
        };
        let reserved: u64 = spec.assignments.iter().map(|a| a.memory_bytes).sum();
        let held: u64 = node.spec.assignments.iter().map(|a| a.memory_bytes).sum();
        let allocatable = node.status.inventory.allocatable_bytes;
        // What stands there already may exceed a machine that shrank; a plan must not make it worse.
        if reserved > allocatable && reserved > held {
            breach(format!("{reserved} bytes are reserved of {allocatable}"));
        }
        let mut seen = BTreeSet::new();
        for assignment in &spec.assignments {
            if !seen.insert(&assignment.name) {
                breach(format!("assignment {} stands there twice", assignment.name));
            }
            let owner = input.deployments.iter().find(|d| {
                let key = key_of(*d);
                key.namespace == assignment.namespace && key.name == assignment.deployment
            });
            let Some(owner) = owner else {
                breach(format!("assignment {} belongs to no deployment", assignment.name));
                continue;
            };
            let selector = owner.spec.placement.node_selector.as_ref();
            if selector.is_some_and(|selector| !labels::matches(selector, &node.labels)) {
                breach(format!(
                    "assignment {} is forbidden by spec.placement.nodeSelector",
                    assignment.name
                ));
            }
            for policy in input
                .policies
                .iter()
                .filter(|p| crate::govern::selects(p, owner, &input.namespaces))
            {
                let enforced = policy.spec.enforcement == freehold_crds::Enforcement::Enforce;
                let residency = policy
                    .spec
                    .rules
                    .residency
                    .as_ref()
                    .and_then(|r| r.node_selector.as_ref());
                if enforced && residency.is_some_and(|selector| !labels::matches(selector, &node.labels)) {
                    breach(format!(
                        "assignment {} is forbidden by the residency of a policy",
                        assignment.name
                    ));
                }
            }
        }
        let mut names = BTreeSet::new();
        for route in &spec.routes {
            if !names.insert(&route.name) {
                breach(format!("the name {} stands there twice", route.name));
            }
            for backend in &route.backends {
                let target = plan.nodes.get(&backend.node);
                if !target.is_some_and(|t| t.assignments.iter().any(|a| a.name == backend.assignment)) {
                    breach(format!(
                        "the name {} leads to {} on {}, which is not planned",
                        route.name, backend.assignment, backend.node
                    ));
                }
            }
        }
    }
    breaches
}
