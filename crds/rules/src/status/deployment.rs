//! Status of a ModelDeployment.

use std::collections::BTreeSet;

use freehold_crds::conditions::{self, reason};
use freehold_crds::energy::EnergyReport;
use freehold_crds::inference_node::{Instance, Phase, ProbeState};
use freehold_crds::model_deployment::{DeploymentInstance, HealthSummary, ModelDeploymentStatus, Rollback};
use freehold_crds::{Enforcement, ModelDeployment};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::Conditions;
use crate::energy::deployment_energy;
use crate::plan::memory::mib;
use crate::plan::{DeploymentPlan, FleetInput, Liveness, NodeInput, Placed, Plan, withheld_text};
use crate::validate::key_of;

/// The status of `deployment` under `plan`.
#[must_use]
pub fn deployment_status(
    deployment: &ModelDeployment,
    plan: &Plan,
    input: &FleetInput,
    now: Timestamp,
) -> ModelDeploymentStatus {
    let none = DeploymentPlan::default();
    let planned = plan.deployments.get(&key_of(deployment)).unwrap_or(&none);
    let old = deployment.status.clone().unwrap_or_default();
    let replicas = replicas(planned, input);
    let ready: BTreeSet<&str> = replicas
        .iter()
        .filter(|r| r.serves())
        .map(|r| r.placed.node.as_str())
        .collect();
    let current: BTreeSet<&str> = replicas
        .iter()
        .filter(|r| r.serves() && r.wanted(planned))
        .map(|r| r.placed.node.as_str())
        .collect();
    let nodes: BTreeSet<&str> = planned
        .placements
        .iter()
        .map(|placed| placed.node.as_str())
        .collect();
    let facts = replicas
        .iter()
        .filter(|r| r.wanted(planned))
        .find_map(|r| r.instance?.model.clone());
    let generation = deployment.metadata.generation;
    let stable_revision = old.stable.as_ref().map(|stable| stable.revision.as_str());
    let verdict = verdict(planned, &replicas, current.len(), ready.len(), stable_revision);
    let wanted_ready = planned.wanted > 0 && current.len() >= planned.wanted as usize;
    let stable = if wanted_ready && planned.rolled_back.is_none() {
        planned.template.clone().or(old.stable.clone())
    } else {
        old.stable.clone()
    };

    let mut set = Conditions::new(&old.conditions, generation, now);
    set.set(
        conditions::READY,
        Some(verdict.ready),
        verdict.reason,
        verdict.message.clone(),
    );
    set.set_if(
        !verdict.ready && !verdict.stalled && verdict.reason != reason::SUSPENDED,
        conditions::RECONCILING,
        verdict.reason,
        verdict.message.clone(),
    );
    set.set_if(
        verdict.stalled,
        conditions::STALLED,
        verdict.reason,
        verdict.message,
    );
    policy_condition(&mut set, planned);
    if let Some(facts) = &facts {
        let message = if facts.verified {
            "the bytes have the digest that the spec asks for"
        } else {
            "the spec asks for no digest: set spec.model.sha256"
        };
        set.set(
            conditions::MODEL_VERIFIED,
            Some(facts.verified),
            reason::AS_EXPECTED,
            message,
        );
    }
    let degraded = replicas.iter().find_map(|r| r.instance?.device_reason.clone());
    set.set_if(
        degraded.is_some(),
        conditions::ACCELERATOR_DEGRADED,
        "OtherDevice",
        degraded.unwrap_or_default(),
    );
    let health = health(&replicas);
    if !health.is_empty() {
        let failing: Vec<String> = health
            .iter()
            .filter(|h| h.state == "Failing")
            .map(|h| {
                format!(
                    "{}/{} on {}: {}",
                    h.probe,
                    h.check,
                    h.node,
                    h.message.clone().unwrap_or_default()
                )
            })
            .collect();
        let known = health.iter().any(|h| h.state != "Unknown");
        match (failing.is_empty(), known) {
            (false, _) => set.set(
                conditions::HEALTHY,
                Some(false),
                reason::PROBE_FAILED,
                failing.join("; "),
            ),
            (true, true) => set.set(
                conditions::HEALTHY,
                Some(true),
                reason::AS_EXPECTED,
                "every check passes",
            ),
            (true, false) => set.set(
                conditions::HEALTHY,
                None,
                reason::NO_RESULT,
                "no check has a result yet",
            ),
        }
    }
    let suspended = replicas
        .iter()
        .find_map(|r| r.instance?.probes.iter().find(|p| p.suspended));
    let message = suspended
        .map(|p| {
            format!(
                "probe {} spent its budget of restarts; the watchdog holds",
                p.probe
            )
        })
        .unwrap_or_default();
    set.set_if(
        suspended.is_some(),
        conditions::REMEDIATION_SUSPENDED,
        reason::BUDGET_SPENT,
        message,
    );

    ModelDeploymentStatus {
        observed_generation: generation,
        conditions: set.finish(),
        replicas: count(nodes.len()),
        ready_replicas: count(ready.len()),
        replica_summary: Some(format!("{}/{}", ready.len(), planned.wanted)),
        node_summary: Some(nodes.iter().copied().collect::<Vec<_>>().join(","))
            .filter(|text| !text.is_empty()),
        names: planned.names.clone(),
        endpoints: if planned.names.is_empty() {
            Vec::new()
        } else {
            endpoints(input)
        },
        model: facts.or_else(|| planned.facts.clone()),
        memory: planned.memory.clone(),
        revision: planned.revision.clone(),
        revision_since: revision_since(planned, &old, now),
        rollback: planned.rolled_back.as_ref().map(|message| Rollback {
            revision: planned.revision.clone().unwrap_or_default(),
            generation,
            message: message.clone(),
        }),
        stable,
        instances: replicas.iter().map(Replica::to_status).collect(),
        plan: planned.reasons.clone(),
        violations: planned.violations.clone(),
        health,
        energy: energy(&replicas),
    }
}

fn energy(replicas: &[Replica<'_>]) -> Option<EnergyReport> {
    let told: Vec<_> = replicas
        .iter()
        .filter_map(|replica| {
            let instance = replica.instance?;
            // Before it has run there is nothing to say of it.
            (instance.device.is_some() || instance.energy.is_some()).then_some(())?;
            let meter = replica.node.and_then(|node| node.status.energy.as_ref());
            Some((replica.placed.node.as_str(), meter, instance.energy))
        })
        .collect();
    deployment_energy(&told)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Since when the spec asks for its revision; anew where one that was taken back is tried again.
fn revision_since(planned: &DeploymentPlan, old: &ModelDeploymentStatus, now: Timestamp) -> Option<Time> {
    planned.revision.as_ref()?;
    let tried_again = old.rollback.is_some() && planned.rolled_back.is_none();
    let since = old
        .revision_since
        .clone()
        .filter(|_| old.revision == planned.revision && !tried_again);
    // Kubernetes writes times in whole seconds; a finer one would never compare equal to itself.
    since.or_else(|| Timestamp::from_second(now.as_second()).ok().map(Time))
}

/// One placement with what its machine says.
struct Replica<'a> {
    placed: &'a Placed,
    node: Option<&'a NodeInput>,
    instance: Option<&'a Instance>,
}

impl Replica<'_> {
    fn alive(&self) -> bool {
        self.node.is_some_and(|node| node.liveness == Liveness::Alive)
    }

    fn phase(&self) -> Phase {
        self.instance.map_or(Phase::Pending, |instance| instance.phase)
    }

    fn serves(&self) -> bool {
        self.alive() && matches!(self.phase(), Phase::Ready | Phase::Idle)
    }

    /// Of the revision that the spec asks for.
    fn wanted(&self, planned: &DeploymentPlan) -> bool {
        planned.revision.as_deref() == Some(self.placed.revision.as_str())
    }

    fn message(&self) -> String {
        if !self.alive() {
            return format!("no heartbeat from {}", self.placed.node);
        }
        let Some(instance) = self.instance else {
            return format!("waiting for the agent on {}", self.placed.node);
        };
        let progress = instance.progress.as_ref().map(|progress| {
            let left = progress
                .seconds_left
                .map(|seconds| format!(", {seconds} s left"))
                .unwrap_or_default();
            match progress.bytes_total {
                0 => format!("{} so far", mib(progress.bytes_done)),
                total => format!(
                    "{} % ({} of {}{left})",
                    progress.bytes_done * 100 / total,
                    mib(progress.bytes_done),
                    mib(total)
                ),
            }
        });
        let what = match instance.phase {
            Phase::Pending => "waiting",
            Phase::Fetching => "fetching",
            Phase::Verifying => "verifying",
            Phase::Loading => "loading",
            Phase::Ready => "ready",
            Phase::Idle => "asleep until the first request",
            Phase::Draining => "draining",
            Phase::Backoff => "trying again",
            Phase::Failed => "failed",
            Phase::Refused => "refused",
        };
        let mut text = format!("{}: {what}", self.placed.node);
        if let Some(progress) = progress {
            text = format!("{text} {progress}");
        }
        if let Some(detail) = instance.message.as_ref().filter(|detail| !detail.is_empty()) {
            text = format!("{text}: {detail}");
        }
        text
    }

    fn to_status(&self) -> DeploymentInstance {
        DeploymentInstance {
            name: format!("{}.{}", self.placed.node, self.placed.revision),
            node: self.placed.node.clone(),
            revision: self.placed.revision.clone(),
            phase: format!("{:?}", self.phase()),
            message: Some(self.message()).filter(|_| self.phase() != Phase::Ready || !self.alive()),
            restarts: self.instance.map_or(0, |instance| instance.restarts),
        }
    }
}

fn replicas<'a>(planned: &'a DeploymentPlan, input: &'a FleetInput) -> Vec<Replica<'a>> {
    let replicas = planned.placements.iter().map(|placed| {
        let node = input.nodes.iter().find(|node| node.name == placed.node);
        let instance =
            node.and_then(|node| node.status.instances.iter().find(|i| i.name == placed.assignment));
        Replica {
            placed,
            node,
            instance,
        }
    });
    let mut replicas: Vec<Replica<'_>> = replicas.collect();
    replicas.sort_by(|a, b| a.placed.cmp(b.placed));
    replicas
}

struct Verdict {
    ready: bool,
    stalled: bool,
    reason: &'static str,
    message: String,
}

/// The one sentence about a deployment.
fn verdict(
    planned: &DeploymentPlan,
    replicas: &[Replica<'_>],
    current: usize,
    serving: usize,
    stable: Option<&str>,
) -> Verdict {
    let wanted = planned.wanted as usize;
    let not = |stalled, reason, message| Verdict {
        ready: false,
        stalled,
        reason,
        message,
    };
    if let Some(why) = &planned.rolled_back {
        let stable = after_rollback(planned, replicas, serving, stable.unwrap_or_default());
        let message = format!("{why}; {stable}; change the spec to try again");
        return not(true, reason::ROLLED_BACK, message);
    }
    if let Some(obstacle) = planned
        .obstacle
        .as_ref()
        .filter(|o| o.stalled || o.reason == reason::SUSPENDED)
    {
        return not(obstacle.stalled, obstacle.reason, obstacle.message.clone());
    }
    if wanted == 0 {
        return Verdict {
            ready: true,
            stalled: false,
            reason: reason::AS_EXPECTED,
            message: "spec.replicas is 0: nothing is placed".to_owned(),
        };
    }
    if current >= wanted {
        let idle = replicas
            .iter()
            .filter(|r| r.wanted(planned))
            .all(|r| r.phase() == Phase::Idle);
        if !planned.withheld.is_empty() {
            let message = format!(
                "{current} of {wanted} replicas serve as {}; {}",
                planned.names.join(", "),
                withheld_text(&planned.withheld)
            );
            return not(true, reason::NAME_TAKEN, message);
        }
        let (reason, message) = if idle {
            (reason::IDLE, "asleep; the first request wakes it".to_owned())
        } else {
            (reason::SERVING, format!("{current} of {wanted} replicas serve"))
        };
        let notes = planned.notes.iter().map(|note| format!("; {note}"));
        return Verdict {
            ready: true,
            stalled: false,
            reason,
            message: message + &notes.collect::<String>(),
        };
    }
    let waiting: Vec<&Replica<'_>> = replicas
        .iter()
        .filter(|r| r.wanted(planned) && !r.serves())
        .collect();
    let words = waiting
        .iter()
        .map(|replica| replica.message())
        .collect::<Vec<_>>()
        .join("; ");
    let serving_text = if serving > 0 {
        format!("; {serving} of {wanted} replicas serve meanwhile")
    } else {
        String::new()
    };
    // A permanent failure is the same on every machine: only a change of spec or source ends it.
    let failed = waiting
        .iter()
        .find(|r| r.phase() == Phase::Failed && r.alive())
        .and_then(|r| r.instance);
    if let Some(instance) = failed {
        return not(
            true,
            known_reason(instance.reason.as_deref()),
            format!("{words}{serving_text}"),
        );
    }
    if let Some(obstacle) = &planned.obstacle {
        return not(
            false,
            obstacle.reason,
            format!("{}{serving_text}", obstacle.message),
        );
    }
    let reason = match waiting.first().map(|r| (r.alive(), r.phase())) {
        Some((false, _)) => reason::NODE_SILENT,
        Some((_, Phase::Fetching | Phase::Verifying)) => reason::FETCHING,
        Some((_, Phase::Loading)) => reason::LOADING,
        Some((_, Phase::Backoff | Phase::Refused)) => {
            known_reason(waiting.first().and_then(|r| r.instance?.reason.as_deref()))
        }
        _ => reason::PROGRESSING,
    };
    not(false, reason, format!("{words}{serving_text}"))
}

/// What became of the last good revision once another was taken back.
fn after_rollback(
    planned: &DeploymentPlan,
    replicas: &[Replica<'_>],
    serving: usize,
    stable: &str,
) -> String {
    if let Some(obstacle) = &planned.obstacle {
        return format!(
            "revision {stable}, the last good one, cannot serve: {}",
            obstacle.message
        );
    }
    let wanted = planned.wanted as usize;
    if serving >= wanted {
        let names = planned.names.join(", ");
        return format!("revision {stable} serves on as {names}, {serving} of {wanted} replicas");
    }
    let waiting = replicas.iter().filter(|replica| !replica.serves());
    let words: Vec<String> = waiting.map(Replica::message).collect();
    let words = if words.is_empty() {
        "no machine has room for it".to_owned()
    } else {
        words.join("; ")
    };
    format!("revision {stable} is put back, {serving} of {wanted} replicas serve ({words})")
}

/// An agent's reason, if it is one that we know; conditions carry nothing else.
fn known_reason(reason: Option<&str>) -> &'static str {
    use conditions::reason as known;
    let all = [
        known::DIGEST_MISMATCH,
        known::INVALID_MODEL,
        known::FETCH_FAILED,
        known::DISK_FULL,
        known::INSUFFICIENT_MEMORY,
        known::CRASHED,
        known::INVALID_SPEC,
        known::NOT_SUPPORTED,
        known::PROBE_FAILED,
        known::POLICY_VIOLATION,
    ];
    all.into_iter()
        .find(|known| reason == Some(*known))
        .unwrap_or(known::PROGRESSING)
}

fn policy_condition(set: &mut Conditions<'_>, planned: &DeploymentPlan) {
    let enforced = planned
        .violations
        .iter()
        .filter(|v| v.enforcement == Enforcement::Enforce)
        .count();
    match planned.violations.first() {
        None => set.set(
            conditions::POLICY_COMPLIANT,
            Some(true),
            reason::AS_EXPECTED,
            "every policy that selects it is met",
        ),
        Some(first) => {
            let how = if enforced > 0 {
                "held back"
            } else {
                "recorded, not enforced"
            };
            let message = format!(
                "{} rules are broken ({how}); first: policy {}, {} at {}: {}; {}",
                planned.violations.len(),
                first.policy,
                first.rule,
                first.field,
                first.evidence,
                first.remedy
            );
            set.set(
                conditions::POLICY_COMPLIANT,
                Some(false),
                reason::POLICY_VIOLATION,
                message,
            );
        }
    }
}

fn health(replicas: &[Replica<'_>]) -> Vec<HealthSummary> {
    let results = replicas.iter().flat_map(|replica| {
        replica
            .instance
            .into_iter()
            .flat_map(|instance| &instance.probes)
            .map(|result| HealthSummary {
                probe: result
                    .probe
                    .split_once('.')
                    .map_or(result.probe.as_str(), |(_, name)| name)
                    .to_owned(),
                check: result.check.clone(),
                node: replica.placed.node.clone(),
                state: state_name(result.state).to_owned(),
                message: result.message.clone(),
            })
    });
    results.collect()
}

pub(super) fn state_name(state: ProbeState) -> &'static str {
    match state {
        ProbeState::Unknown => "Unknown",
        ProbeState::Healthy => "Healthy",
        ProbeState::Failing => "Failing",
    }
}

/// Gateways that are heard from; each routes to every name.
fn endpoints(input: &FleetInput) -> Vec<String> {
    let alive = input.nodes.iter().filter(|node| node.liveness == Liveness::Alive);
    let addresses: BTreeSet<String> = alive
        .filter_map(|node| node.status.gateway_address.clone())
        .collect();
    addresses
        .into_iter()
        .map(|address| format!("{}/v1", address.trim_end_matches('/')))
        .collect()
}
