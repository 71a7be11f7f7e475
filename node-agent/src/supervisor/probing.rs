//! The probes of an instance over time: when a round is due, what its results mean, what follows.

use std::collections::BTreeMap;
use std::time::Duration;

use freehold_crds::Enforcement;
use freehold_crds::inference_node::{Assignment, CompiledPolicy, CompiledProbe, ProbeResult, ProbeState};
use freehold_rules::health::{CheckState, Circumstances, Outcome, Remedy, RestartBook, Thresholds, remedy};
use freehold_rules::supervise::Event;
use tracing::{info, warn};

use super::instance::Instance;
use super::round::Round;
use super::{Message, Supervisor};

/// One probe on one instance.
#[derive(Debug)]
pub(super) struct Probing {
    compiled: CompiledProbe,
    /// When the next round is due; None while the instance is not ready.
    due: Option<Duration>,
    /// Number of the round under way.
    under_way: Option<u64>,
    checks: BTreeMap<String, CheckState>,
    book: RestartBook,
    suspended: Option<String>,
}

impl Probing {
    fn new(compiled: CompiledProbe, due: Option<Duration>) -> Self {
        Self {
            compiled,
            due,
            under_way: None,
            checks: BTreeMap::new(),
            book: RestartBook::default(),
            suspended: None,
        }
    }

    /// When a round is due.
    pub(super) fn due_at(&self) -> Option<Duration> {
        self.due.filter(|_| self.under_way.is_none())
    }

    fn take_up(&mut self, compiled: CompiledProbe) {
        if self.compiled == compiled {
            return;
        }
        self.checks.retain(|name, _| {
            let before = self.compiled.checks.iter().find(|check| check.name == *name);
            before.is_some() && before == compiled.checks.iter().find(|check| check.name == *name)
        });
        self.compiled = compiled;
    }

    fn observe(&mut self, now: Duration, results: Vec<(String, Outcome)>) {
        self.under_way = None;
        self.due = Some(now + Duration::from_secs(self.compiled.period_seconds.max(1).into()));
        let thresholds = Thresholds {
            failure: self.compiled.failure_threshold,
            success: self.compiled.success_threshold,
        };
        for (check, outcome) in results {
            self.checks.entry(check).or_default().observe(outcome, thresholds);
        }
    }

    fn failing(&self) -> bool {
        self.checks
            .values()
            .any(|check| check.state() == ProbeState::Failing)
    }

    /// What the status says.
    pub(super) fn results(&self, now: Duration) -> Vec<ProbeResult> {
        let window = Duration::from_secs(self.compiled.remediation.window_seconds.into());
        let result = |check: &freehold_crds::health_probe::Check| {
            let state = self.checks.get(&check.name);
            let failing = state.is_some_and(|state| state.state() == ProbeState::Failing);
            let suspended = self.suspended.as_ref().filter(|_| failing);
            let seen = state.and_then(CheckState::message);
            ProbeResult {
                probe: self.compiled.name.clone(),
                check: check.name.clone(),
                state: state.map_or(ProbeState::Unknown, CheckState::state),
                message: match (seen, suspended) {
                    (Some(seen), Some(why)) => Some(format!("{seen}; not restarted: {why}")),
                    (seen, _) => seen.map(str::to_owned),
                },
                restarts: self.book.within(now, window),
                suspended: suspended.is_some(),
            }
        };
        self.compiled.checks.iter().map(result).collect()
    }
}

impl Instance {
    /// A new worker is ready: every probe looks at it.
    pub(super) fn probes_begin(&mut self, now: Duration) {
        for probing in self.probes.values_mut() {
            probing.due = Some(now);
            probing.under_way = None;
            probing.checks.values_mut().for_each(CheckState::forget_count);
        }
    }
}

impl Supervisor {
    /// Gives every instance the probes that select it.
    pub(super) fn take_up_probes(&mut self) {
        let Some(accepted) = &self.accepted else { return };
        let now = self.started.elapsed();
        for instance in self.instances.values_mut() {
            let selecting: BTreeMap<_, _> = accepted
                .spec
                .probes
                .iter()
                .filter(|probe| selects(probe, &instance.assignment))
                .map(|probe| (probe.name.clone(), probe))
                .collect();
            instance.probes.retain(|name, _| selecting.contains_key(name));
            let ready = instance.watchdog.run().is_some();
            for (name, probe) in selecting {
                match instance.probes.get_mut(&name) {
                    Some(probing) => probing.take_up(probe.clone()),
                    None => {
                        instance
                            .probes
                            .insert(name, Probing::new(probe.clone(), ready.then_some(now)));
                    }
                }
            }
        }
    }

    pub(super) fn start_due_probes(&mut self, now: Duration) {
        for (name, instance) in &mut self.instances {
            let (Some(run), Some(worker), Some(ready)) =
                (instance.watchdog.run(), &instance.worker, &instance.ready)
            else {
                continue;
            };
            for (probe, probing) in &mut instance.probes {
                if probing.due_at().is_none_or(|due| due > now) {
                    continue;
                }
                self.epoch += 1;
                probing.under_way = Some(self.epoch);
                let round = Round {
                    name: format!("probe-{}-{}", self.epoch, probing.compiled.name),
                    checks: probing.compiled.checks.clone(),
                    socket: worker.socket.clone(),
                    task: ready.facts.task.clone(),
                    device: ready.device,
                    stalled_for: run.stalled_for(now),
                    beat: instance.beat.subscribe(),
                    data_dir: self.tools.data_dir.clone(),
                };
                let (messages, assignment) = (self.messages.clone(), name.clone());
                let (epoch, probe) = (self.epoch, probe.clone());
                tokio::spawn(async move {
                    let results = round.run().await;
                    let _ = messages
                        .send(Message::Probed {
                            assignment,
                            epoch,
                            probe,
                            results,
                        })
                        .await;
                });
            }
        }
    }

    pub(super) fn probed(&mut self, name: &str, epoch: u64, probe: &str, results: Vec<(String, Outcome)>) {
        let now = self.now();
        let replicas = self
            .instances
            .values()
            .filter_map(|instance| instance.probes.get(probe));
        let (mut healthy, mut all) = (0_u32, 0_u32);
        for probing in replicas {
            all += 1;
            healthy += u32::from(!probing.failing());
        }
        let policies = self
            .accepted
            .as_ref()
            .map(|accepted| accepted.spec.policies.as_slice())
            .unwrap_or_default();
        let Some(instance) = self.instances.get_mut(name) else {
            return;
        };
        let most_an_hour = most_restarts_an_hour(policies, &instance.assignment);
        let run = instance.watchdog.run().copied();
        let Some(probing) = instance.probes.get_mut(probe) else {
            return;
        };
        // A round that an earlier worker was asked says nothing of this one.
        if probing.under_way != Some(epoch) {
            return;
        }
        // Nor does one whose worker was ended meanwhile.
        let Some(run) = run else {
            probing.under_way = None;
            return;
        };
        probing.observe(now, results);
        let mut asking = probing
            .checks
            .iter()
            .filter(|(_, check)| check.asks_for_restart());
        let Some((check, state)) = asking.next() else {
            probing.suspended = None;
            return;
        };
        // The fleet as the operator knew it when it wrote the spec, and this machine as it is now.
        let elsewhere = probing.compiled.elsewhere.unwrap_or_default();
        let here = Circumstances {
            now,
            ready_since: run.since,
            most_an_hour,
            healthy: healthy.saturating_add(elsewhere.healthy),
            replicas: all.saturating_add(elsewhere.all),
        };
        match remedy(&probing.compiled.remediation, &probing.book, here) {
            Remedy::Report => probing.suspended = None,
            Remedy::Wait => {}
            Remedy::Suspend(why) => {
                if probing.suspended.is_none() {
                    warn!(
                        assignment = name,
                        probe, check, why, "A check fails and its worker is not restarted"
                    );
                }
                probing.suspended = Some(why);
            }
            Remedy::Restart => {
                let cause = format!(
                    "probe {probe}, check {check}: {}",
                    state.message().unwrap_or("failing")
                );
                info!(assignment = name, cause, "Restarting worker");
                probing.suspended = None;
                probing.book.note(now);
                // Requests in flight on a worker that stands still do not finish.
                let drain = run.stalled_for(now) < Duration::from_secs(1);
                self.step(name, now, Event::Restart { cause, drain });
            }
        }
    }
}

fn selects(probe: &CompiledProbe, assignment: &Assignment) -> bool {
    probe.namespace == assignment.namespace && probe.deployments.contains(&assignment.deployment)
}

/// The strictest policy that selects the deployment.
fn most_restarts_an_hour(policies: &[CompiledPolicy], assignment: &Assignment) -> Option<u32> {
    let key = format!("{}/{}", assignment.namespace, assignment.deployment);
    policies
        .iter()
        .filter(|policy| policy.enforcement == Enforcement::Enforce && policy.deployments.contains(&key))
        .filter_map(|policy| policy.rules.autonomy.as_ref()?.max_restarts_per_hour)
        .min()
}
