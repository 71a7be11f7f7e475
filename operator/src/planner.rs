//! One plan for the whole fleet, made anew whenever something is known that was not known before.

use std::sync::Arc;
use std::time::Duration;

use freehold_rules::check::check;
use freehold_rules::plan::{FleetInput, Liveness, Plan, plan};
use jiff::Timestamp;
use kube::Resource;
use kube::core::DeserializeGuard;
use std::collections::BTreeSet;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::fleet::{LastPolicies, Shelves, Snapshot, keep_unreadable, snapshot};
use crate::metrics::{Kind, Metrics, NodeState};
use crate::shelf::Shelf;

/// One apply brings several objects, one rollout several changes: they are planned together. Short
/// beside a fetch or a load, long beside a burst of events.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// A machine without a next deadline is looked at again with the next news; this bounds the wait.
const AT_LATEST: Duration = Duration::from_secs(3600);

/// A plan, and what it was made from.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) input: FleetInput,
    pub(crate) plan: Plan,
    /// Why the plan must not be carried out; empty: it may.
    pub(crate) held_back: Vec<String>,
    /// Machines that may be forgotten.
    pub(crate) forgettable: BTreeSet<String>,
}

/// The latest plan, None before the first.
pub(crate) type Latest = watch::Receiver<Option<Arc<Planned>>>;

/// Makes plans.
pub(crate) struct Planner {
    pub(crate) shelves: Shelves,
    pub(crate) news: Arc<Notify>,
    pub(crate) metrics: Metrics,
    pub(crate) latest: watch::Sender<Option<Arc<Planned>>>,
}

impl Planner {
    /// Plans until `stop`. The shelves must have been filled once.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut last_policies = LastPolicies::default();
        let mut storm = false;
        loop {
            let planned_at = Instant::now();
            let snapshot = snapshot(&self.shelves, &mut last_policies, planned_at);
            let silence_deadline = snapshot.judgement.next_change_in;
            self.count(&snapshot);
            if storm != snapshot.judgement.storm {
                storm = snapshot.judgement.storm;
                if storm {
                    warn!("More than half of the fleet is silent; nothing is moved until it is heard again");
                } else {
                    info!("Most of the fleet is heard again");
                }
            }
            let now = now();
            let planned = make(snapshot, now);
            self.metrics.plans.inc();
            self.metrics
                .plan_seconds
                .observe(planned_at.elapsed().as_secs_f64());
            self.metrics
                .plan_breaches
                .set(i64::try_from(planned.held_back.len()).unwrap_or(i64::MAX));
            let rollout_deadline = planned.plan.replan_at.map(|at| until(now, at));
            self.latest.send_replace(Some(Arc::new(planned)));

            let deadlines = [silence_deadline, rollout_deadline];
            let next = deadlines.into_iter().flatten().min().unwrap_or(AT_LATEST);
            // A permit of `notified` that a dropped arm had taken is lost only together with this loop.
            tokio::select! {
                () = self.news.notified() => {}
                () = sleep_until(planned_at + next.min(AT_LATEST)) => {}
                () = stop.cancelled() => return,
            }
            sleep(DEBOUNCE).await;
        }
    }

    fn count(&self, snapshot: &Snapshot) {
        self.count_kind("ModelDeployment", &self.shelves.deployments);
        self.count_kind("GovernancePolicy", &self.shelves.policies);
        self.count_kind("HealthProbe", &self.shelves.probes);
        self.count_kind("InferenceNode", &self.shelves.nodes);
        let states = [
            (Liveness::Alive, "alive"),
            (Liveness::Silent, "silent"),
            (Liveness::Lost, "lost"),
        ];
        for (liveness, state) in states {
            let count = snapshot
                .judgement
                .by_node
                .values()
                .filter(|l| **l == liveness)
                .count();
            gauge(&self.metrics.nodes.get_or_create(&NodeState { state }), count);
        }
        self.metrics.storm.set(i64::from(snapshot.judgement.storm));
    }

    fn count_kind<K>(&self, kind: &'static str, shelf: &Shelf<DeserializeGuard<K>>)
    where
        K: Resource<DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned
            + Send
            + Sync
            + 'static,
    {
        let objects = shelf.state();
        let malformed = objects.iter().filter(|object| object.0.is_err()).count();
        gauge(&self.metrics.objects.get_or_create(&Kind { kind }), objects.len());
        gauge(&self.metrics.malformed.get_or_create(&Kind { kind }), malformed);
    }
}

fn gauge(gauge: &prometheus_client::metrics::gauge::Gauge, count: usize) {
    gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
}

fn make(snapshot: Snapshot, now: Timestamp) -> Planned {
    let Snapshot {
        input,
        judgement: _,
        forgettable,
        unreadable_deployments,
        unknown_policies,
    } = snapshot;
    let mut plan = plan(&input, now);
    let mut held_back: Vec<String> = check(&plan, &input).iter().map(ToString::to_string).collect();
    for breach in &held_back {
        error!(%breach, "Plan breaks an invariant and is not carried out; please report this");
    }
    for name in unknown_policies {
        warn!(
            policy = name,
            "Policy does not read as one, so nothing is changed on any machine until it is mended or deleted"
        );
        held_back.push(format!("GovernancePolicy {name} does not read as one"));
    }
    keep_unreadable(&mut plan, &input, &unreadable_deployments);
    Planned {
        input,
        plan,
        held_back,
        forgettable,
    }
}

/// The time in whole seconds, as conditions hold it.
pub(crate) fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

/// From now to a deadline, and a moment more so that it has passed then.
fn until(now: Timestamp, deadline: Timestamp) -> Duration {
    let left = Duration::try_from(deadline.duration_since(now)).unwrap_or_default();
    left + Duration::from_secs(1)
}
