//! From placements to the specs of the machines: assignments, rules, probes and routes.

use std::collections::{BTreeMap, BTreeSet};

use freehold_crds::conditions::reason;
use freehold_crds::health_probe::RemediationAction;
use freehold_crds::inference_node::{
    Assignment, Backend, CompiledPolicy, CompiledProbe, InferenceNodeSpec, Phase, ProbeState, ReplicaCount,
    Route,
};
use freehold_crds::{GovernancePolicy, HealthProbe, ModelDeployment, ObjectKey};
use kube::ResourceExt;

use super::fleet::Fleet;
use super::{DeploymentPlan, FleetInput, Liveness, NodeInput, Placed, Plan};
use crate::govern;
use crate::labels;
use crate::validate::{key_of, validate_probe};

/// Fills in `plan.nodes`.
pub(super) fn compile(
    input: &FleetInput,
    deployments: &[&ModelDeployment],
    live: &BTreeSet<ObjectKey>,
    fleet: Fleet<'_>,
    plan: &mut Plan,
) {
    let deployments: Vec<&ModelDeployment> = deployments
        .iter()
        .copied()
        .filter(|d| live.contains(&key_of(*d)))
        .collect();
    let policies = policies(input, &deployments);
    let nodes: BTreeMap<&str, &NodeInput> = fleet
        .machines
        .iter()
        .map(|(name, machine)| (*name, machine.node))
        .collect();
    for (name, machine) in fleet.machines {
        let mut assignments = machine.planned;
        assignments.sort_by(|a, b| a.name.cmp(&b.name));
        let mut probes = probes(input, &deployments, &assignments);
        for probe in &mut probes {
            probe.elsewhere = elsewhere(name, probe, plan, &nodes);
        }
        let routes = routes(name, &deployments, plan, &nodes);
        plan.nodes.insert(
            name.to_owned(),
            InferenceNodeSpec {
                // A machine that has told nothing yet has only just come, or come back: what is planned
                // for it is not what it shall do, and what it does is better than nothing.
                planned: machine.node.spec.planned || machine.node.status.inventory.allocatable_bytes > 0,
                assignments,
                policies: policies.clone(),
                probes,
                routes,
            },
        );
    }
}

/// The rules that hold while requests are served; what holds at placement is done with.
fn policies(input: &FleetInput, deployments: &[&ModelDeployment]) -> Vec<CompiledPolicy> {
    let compiled = input.policies.iter().filter_map(|policy: &GovernancePolicy| {
        let mut selected: Vec<String> = deployments
            .iter()
            .filter(|deployment| govern::selects(policy, deployment, &input.namespaces))
            .map(|deployment| key_of(*deployment).to_string())
            .collect();
        selected.sort();
        let mut rules = policy.spec.rules.clone();
        (rules.supply_chain, rules.residency, rules.content) = (None, None, None);
        rules.expressions.clear();
        (!selected.is_empty()).then(|| CompiledPolicy {
            name: policy.name_any(),
            generation: policy.metadata.generation.unwrap_or(0),
            enforcement: policy.spec.enforcement,
            deployments: selected,
            rules,
        })
    });
    let mut compiled: Vec<CompiledPolicy> = compiled.collect();
    compiled.sort_by(|a, b| a.name.cmp(&b.name));
    compiled
}

/// Whether a probe selects a deployment.
pub(crate) fn probe_selects(probe: &HealthProbe, deployment: &ModelDeployment) -> bool {
    let none = BTreeMap::new();
    let labels = deployment.metadata.labels.as_ref().unwrap_or(&none);
    probe.namespace() == deployment.namespace()
        && probe
            .spec
            .selector
            .as_ref()
            .is_none_or(|selector| labels::matches(selector, labels))
}

fn probes(
    input: &FleetInput,
    deployments: &[&ModelDeployment],
    assignments: &[Assignment],
) -> Vec<CompiledProbe> {
    let here = |deployment: &ModelDeployment| {
        let key = key_of(deployment);
        assignments
            .iter()
            .any(|a| a.namespace == key.namespace && a.deployment == key.name)
    };
    let compiled = input
        .probes
        .iter()
        .filter(|probe| validate_probe(probe).is_ok())
        .filter_map(|probe| {
            let mut selected: Vec<String> = deployments
                .iter()
                .filter(|d| probe_selects(probe, d) && here(d))
                .map(|d| d.name_any())
                .collect();
            selected.sort();
            let namespace = probe.namespace().unwrap_or_default();
            (!selected.is_empty()).then(|| CompiledProbe {
                name: format!("{namespace}.{}", probe.name_any()),
                namespace,
                probe: probe.name_any(),
                deployments: selected,
                checks: probe.spec.checks.clone(),
                period_seconds: probe.spec.period_seconds,
                failure_threshold: probe.spec.failure_threshold,
                success_threshold: probe.spec.success_threshold,
                remediation: probe.spec.remediation.clone(),
                elsewhere: None,
            })
        });
    let mut compiled: Vec<CompiledProbe> = compiled.collect();
    compiled.sort_by(|a, b| a.name.cmp(&b.name));
    compiled
}

/// The probe's replicas on other machines, counted where the watchdog needs them: only a probe that may
/// restart something and has a floor for the fleet, so that other specs stay as they are.
fn elsewhere(
    node: &str,
    probe: &CompiledProbe,
    plan: &Plan,
    nodes: &BTreeMap<&str, &NodeInput>,
) -> Option<ReplicaCount> {
    let asks =
        probe.remediation.action == RemediationAction::Restart && probe.remediation.min_healthy_percent > 0;
    if !asks {
        return None;
    }
    let mut count = ReplicaCount::default();
    for deployment in &probe.deployments {
        let key = ObjectKey::new(&probe.namespace, deployment);
        let planned = plan.deployments.get(&key);
        let placements = planned.into_iter().flat_map(|planned| &planned.placements);
        for placed in placements.filter(|placed| placed.node != node) {
            let machine = nodes.get(placed.node.as_str());
            count.all += 1;
            count.healthy += u32::from(machine.is_some_and(|machine| is_well(machine, placed, probe)));
        }
    }
    Some(count)
}

/// Whether a replica on another machine answers, as far as is known, and passes the probe.
fn is_well(machine: &NodeInput, placed: &Placed, probe: &CompiledProbe) -> bool {
    let mut instances = machine.status.instances.iter();
    let instance = instances.find(|instance| instance.name == placed.assignment);
    machine.liveness == Liveness::Alive
        && instance.is_some_and(|instance| {
            let mut results = instance.probes.iter().filter(|result| result.probe == probe.name);
            matches!(instance.phase, Phase::Ready | Phase::Idle)
                && results.all(|result| result.state != ProbeState::Failing)
        })
}

/// The names that the gateway of `node` answers to: its own workers first.
fn routes(
    node: &str,
    deployments: &[&ModelDeployment],
    plan: &Plan,
    nodes: &BTreeMap<&str, &NodeInput>,
) -> Vec<Route> {
    let mut routes = Vec::new();
    for deployment in deployments {
        let key = key_of(*deployment);
        let Some(planned) = plan.deployments.get(&key) else {
            continue;
        };
        let created = deployment
            .metadata
            .creation_timestamp
            .as_ref()
            .map_or(0, |time| time.0.as_second());
        let mut backends: Vec<Backend> = planned
            .placements
            .iter()
            .filter_map(|placed| {
                let machine = nodes.get(placed.node.as_str())?;
                let local = placed.node == node;
                let address = if local {
                    None
                } else {
                    machine.status.gateway_address.clone()
                };
                let reachable = local || (machine.liveness == Liveness::Alive && address.is_some());
                reachable.then(|| Backend {
                    node: placed.node.clone(),
                    assignment: placed.assignment.clone(),
                    address,
                })
            })
            .collect();
        // Stable: within the machine and among the others the plan's own order stays, newest revision first.
        backends.sort_by_key(|backend| backend.node != node);
        for name in &planned.names {
            routes.push(Route {
                name: name.clone(),
                namespace: key.namespace.clone(),
                deployment: key.name.clone(),
                created,
                backends: backends.clone(),
                refusal: refusal(planned),
            });
        }
    }
    routes.sort_by(|a, b| a.name.cmp(&b.name));
    routes
}

/// What a client is told of a name that nothing stands behind.
fn refusal(planned: &DeploymentPlan) -> Option<String> {
    let obstacle = planned
        .obstacle
        .as_ref()
        .filter(|_| planned.placements.is_empty())?;
    // Free memory changes with every plan; a machine's spec must not change with it.
    if obstacle.reason == reason::NO_ROOM {
        return Some(format!(
            "{}: no machine has room for it; the status of the deployment shows the arithmetic",
            obstacle.reason
        ));
    }
    Some(format!("{}: {}", obstacle.reason, obstacle.message))
}
