//! The fleet as it is known now: from the shelves to the planner's input.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use freehold_crds::conditions;
use freehold_crds::inference_node::InferenceNodeSpec;
use freehold_crds::{GovernancePolicy, HealthProbe, InferenceNode, ModelDeployment, ObjectKey};
use freehold_rules::plan::{FleetInput, NodeInput, Plan};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Node};
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::{Resource, ResourceExt};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::liveness::{Heartbeats, Judgement, judge};
use crate::shelf::Shelf;

/// Everything that the operator watches.
#[derive(Clone)]
pub(crate) struct Shelves {
    pub(crate) deployments: Shelf<DeserializeGuard<ModelDeployment>>,
    pub(crate) policies: Shelf<DeserializeGuard<GovernancePolicy>>,
    pub(crate) probes: Shelf<DeserializeGuard<HealthProbe>>,
    pub(crate) nodes: Shelf<DeserializeGuard<InferenceNode>>,
    pub(crate) leases: Shelf<Lease>,
    pub(crate) namespaces: Shelf<PartialObjectMeta<Namespace>>,
    /// The cluster's machines, for `kubectl cordon` and `drain`; empty where the API has none.
    pub(crate) machines: Shelf<Node>,
    pub(crate) heartbeats: Arc<Heartbeats>,
    /// A machine without a Lease and without work is forgotten after this time.
    pub(crate) forget_after: Duration,
}

impl Shelves {
    /// Empty shelves. `news` is woken by what may change the plan; heartbeats seldom do, so whoever
    /// watches the Leases wakes it where they do.
    pub(crate) fn new(news: &Arc<Notify>, forget_after: Duration) -> Self {
        Self {
            deployments: Shelf::new(Arc::clone(news)),
            policies: Shelf::new(Arc::clone(news)),
            probes: Shelf::new(Arc::clone(news)),
            nodes: Shelf::new(Arc::clone(news)),
            leases: Shelf::new(Arc::default()),
            namespaces: Shelf::new(Arc::clone(news)),
            machines: Shelf::new(Arc::clone(news)),
            heartbeats: Arc::default(),
            forget_after,
        }
    }
}

/// The fleet at one moment.
pub(crate) struct Snapshot {
    pub(crate) input: FleetInput,
    pub(crate) judgement: Judgement,
    /// Machines that have been silent for so long, without a Lease, that they may be forgotten.
    pub(crate) forgettable: BTreeSet<String>,
    /// Deployments that exist and do not read as such.
    pub(crate) unreadable_deployments: BTreeSet<ObjectKey>,
    /// Policies that exist, do not read as such, and were never seen in a form that does.
    pub(crate) unknown_policies: Vec<String>,
}

/// The last readable form of each policy. A policy that turns unreadable keeps holding as it was: a
/// rule must not fall because of a typing error in it.
pub(crate) type LastPolicies = BTreeMap<String, GovernancePolicy>;

/// Reads the shelves.
pub(crate) fn snapshot(shelves: &Shelves, last_policies: &mut LastPolicies, now: Instant) -> Snapshot {
    let mut unreadable_deployments = BTreeSet::new();
    let mut deployments = Vec::new();
    for object in shelves.deployments.state() {
        match &object.0 {
            Ok(deployment) => deployments.push(deployment.clone()),
            Err(_) => {
                let namespace = object.namespace().unwrap_or_default();
                unreadable_deployments.insert(ObjectKey::new(namespace, object.name_any()));
            }
        }
    }
    let mut unknown_policies = Vec::new();
    let mut policies: LastPolicies = BTreeMap::new();
    for object in shelves.policies.state() {
        let name = object.name_any();
        match (&object.0, last_policies.remove(&name)) {
            (Ok(policy), _) => policies.insert(name, policy.clone()),
            (Err(_), Some(last)) => policies.insert(name, last),
            (Err(_), None) => {
                unknown_policies.push(name);
                None
            }
        };
    }
    last_policies.clone_from(&policies);
    let probes = shelves.probes.state();
    let nodes = shelves.nodes.state();
    let nodes: Vec<&InferenceNode> = nodes.iter().filter_map(|node| node.0.as_ref().ok()).collect();

    let silences = silences(shelves, &nodes, now);
    let judgement = judge(&silences, shelves.forget_after);
    let nodes = nodes
        .into_iter()
        .map(|node| node_input(node, &judgement, shelves))
        .collect();
    let namespaces = shelves.namespaces.state();
    Snapshot {
        input: FleetInput {
            deployments,
            policies: policies.into_values().collect(),
            probes: probes
                .iter()
                .filter_map(|probe| probe.0.as_ref().ok().cloned())
                .collect(),
            nodes,
            namespaces: namespaces
                .iter()
                .map(|namespace| (namespace.name_any(), namespace.labels().clone()))
                .collect(),
        },
        judgement,
        forgettable: silences
            .into_iter()
            .filter(|(node, silence)| *silence >= shelves.forget_after && shelves.lease(node).is_none())
            .map(|(node, _)| node)
            .collect(),
        unreadable_deployments,
        unknown_policies,
    }
}

impl Shelves {
    /// The Lease of a machine.
    pub(crate) fn lease(&self, node: &str) -> Option<Arc<Lease>> {
        self.leases.get(Some(freehold_crds::SYSTEM_NAMESPACE), node)
    }
}

fn silences(shelves: &Shelves, nodes: &[&InferenceNode], now: Instant) -> BTreeMap<String, Duration> {
    let names: BTreeSet<String> = nodes.iter().map(|node| node.name_any()).collect();
    let was_silent = |name: &str| {
        let node = nodes.iter().find(|node| node.name_any() == name);
        let conditions = node
            .and_then(|node| node.status.as_ref())
            .map(|status| &status.conditions);
        conditions.is_some_and(|conditions| {
            conditions
                .iter()
                .any(|c| c.type_ == conditions::REACHABLE && c.status == "False")
        })
    };
    let mut silences = shelves
        .heartbeats
        .silences(now, names.iter().map(String::as_str), was_silent);
    silences.retain(|name, _| {
        let known = names.contains(name) || shelves.lease(name).is_some();
        if !known {
            shelves.heartbeats.forget(name);
        }
        known
    });
    silences
}

fn node_input(node: &InferenceNode, judgement: &Judgement, shelves: &Shelves) -> NodeInput {
    let name = node.name_any();
    let machine = shelves.machines.get(None, &name);
    let unschedulable = machine.and_then(|machine| machine.spec.as_ref()?.unschedulable);
    NodeInput {
        labels: node.labels().clone(),
        liveness: judgement.by_node.get(&name).copied().unwrap_or_default(),
        generation: node.meta().generation.unwrap_or_default(),
        spec: node.spec.clone(),
        status: node.status.clone().unwrap_or_default(),
        deleting: node.meta().deletion_timestamp.is_some(),
        cordoned: unschedulable == Some(true) || freehold_rules::labels::cordon(node.labels()),
        name,
    }
}

/// Leaves alone what a deployment holds that exists and does not read as such: its assignments, its
/// names, and the rules over it. Whoever broke it meant to change it, not to stop it.
pub(crate) fn keep_unreadable(plan: &mut Plan, input: &FleetInput, unreadable: &BTreeSet<ObjectKey>) {
    for node in &input.nodes {
        if let Some(planned) = plan.nodes.get_mut(&node.name) {
            for key in unreadable {
                keep(planned, &node.spec, key);
            }
        }
    }
}

fn keep(planned: &mut InferenceNodeSpec, held: &InferenceNodeSpec, key: &ObjectKey) {
    let assignments = held
        .assignments
        .iter()
        .filter(|a| a.namespace == key.namespace && a.deployment == key.name);
    planned.assignments.extend(assignments.cloned());
    for route in &held.routes {
        let own = route.namespace == key.namespace && route.deployment == key.name;
        if own && planned.routes.iter().all(|other| other.name != route.name) {
            planned.routes.push(route.clone());
        }
    }
    let selected = key.to_string();
    for policy in held.policies.iter().filter(|p| p.deployments.contains(&selected)) {
        match planned.policies.iter_mut().find(|p| p.name == policy.name) {
            Some(planned) => planned.deployments.push(selected.clone()),
            None => {
                let mut policy = policy.clone();
                policy.deployments = vec![selected.clone()];
                planned.policies.push(policy);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use freehold_crds::inference_node::{Assignment, CompiledPolicy, Route};

    use super::*;

    #[test]
    fn unreadable_deployment_keeps_its_place_its_name_and_the_rules_over_it() {
        let key = ObjectKey::new("default", "chat");
        let held = InferenceNodeSpec {
            assignments: vec![Assignment {
                name: "default.chat.1".into(),
                namespace: "default".into(),
                deployment: "chat".into(),
                ..Assignment::default()
            }],
            routes: vec![Route {
                name: "chat".into(),
                namespace: "default".into(),
                deployment: "chat".into(),
                ..Route::default()
            }],
            policies: vec![CompiledPolicy {
                name: "keys".into(),
                deployments: vec!["default/chat".into(), "default/gone".into()],
                ..CompiledPolicy::default()
            }],
            ..InferenceNodeSpec::default()
        };
        let mut planned = InferenceNodeSpec::default();
        keep(&mut planned, &held, &key);
        assert_eq!(planned.assignments, held.assignments);
        assert_eq!(planned.routes, held.routes);
        assert_eq!(planned.policies[0].deployments, ["default/chat"]);
    }
}
