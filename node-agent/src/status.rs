//! The status of this machine's InferenceNode: written when there is news, by this agent alone.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use freehold_crds::InferenceNode;
use freehold_crds::conditions::{READY, reason};
use freehold_crds::inference_node::{InferenceNodeStatus, Instance, Inventory, Phase};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::energy::Books;
use crate::gpu::GpuSupport;
use crate::inventory;
use crate::metrics::Metrics;
use crate::watch::Observed;

/// Field manager of all that an agent writes.
pub(crate) const FIELD_MANAGER: &str = "freehold-node-agent";
/// News that comes together is written together.
const COALESCE: Duration = Duration::from_millis(200);
/// Progress alone is written at most this often.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// The status is looked over this often, for what is not news by itself: counters and free disk.
const REFRESH_EVERY: Duration = Duration::from_secs(300);
/// After a write that failed; doubled up to the longest.
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// A write that takes longer is given up and tried again.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// The last word at the end is worth waiting for this long.
const LAST_WORD_LIMIT: Duration = Duration::from_secs(3);

/// What the supervisor tells of the machine's models.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Snapshot {
    /// Generation of the spec that is in force; None before the first.
    pub(crate) generation: Option<i64>,
    pub(crate) instances: Vec<Instance>,
    /// The agent is on its way out.
    pub(crate) stopping: bool,
}

/// Writes the status.
pub(crate) struct Publisher {
    pub(crate) client: Client,
    pub(crate) node: String,
    pub(crate) gateway_address: String,
    pub(crate) data_dir: PathBuf,
    pub(crate) memory_limit: Option<u64>,
    pub(crate) gpu: GpuSupport,
    pub(crate) inventory: Inventory,
    pub(crate) snapshot: watch::Receiver<Snapshot>,
    pub(crate) observed: watch::Receiver<Observed>,
    pub(crate) energy: watch::Receiver<Books>,
    pub(crate) metrics: Arc<Metrics>,
}

/// What was written last, and to which object.
#[derive(Default)]
struct Written {
    uid: Option<String>,
    status: InferenceNodeStatus,
}

impl Publisher {
    /// Writes news until `stop`, then the last word.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut written = Written::default();
        let mut refresh = Instant::now() + REFRESH_EVERY;
        let mut last_write = Instant::now() - PROGRESS_EVERY;
        let mut retry: Option<(Instant, Duration)> = None;
        loop {
            let retry_at = retry.map_or_else(|| Instant::now() + REFRESH_EVERY, |(at, _)| at);
            // All arms wait for a level, not an edge: what changes while another runs is seen next.
            let due = tokio::select! {
                () = stop.cancelled() => break,
                Ok(()) = self.snapshot.changed(), if retry.is_none() => false,
                Ok(()) = self.observed.changed() => false,
                () = tokio::time::sleep_until(refresh) => true,
                () = tokio::time::sleep_until(retry_at), if retry.is_some() => false,
            };
            if due {
                refresh = Instant::now() + REFRESH_EVERY;
                self.read_inventory().await;
            }
            let uid = self.observed.borrow_and_update().uid.clone();
            // Before the operator has made the object there is nothing to write to.
            let Some(uid) = uid else { continue };
            let same_object = written.uid.as_ref() == Some(&uid);
            let news = news(&written.status, &self.status(&written.status));
            if same_object && news == News::None && !(due && written.status != self.status(&written.status)) {
                retry = None;
                continue;
            }
            let quiet = if news == News::Progress {
                PROGRESS_EVERY
            } else {
                COALESCE
            };
            let not_before = (last_write + quiet).max(Instant::now() + COALESCE);
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep_until(not_before) => {}
            }
            self.snapshot.borrow_and_update();
            let status = self.status(&written.status);
            last_write = Instant::now();
            match self.write(&status, WRITE_LIMIT).await {
                Ok(()) => {
                    written = Written {
                        uid: Some(uid),
                        status,
                    };
                    retry = None;
                }
                Err(problem) => {
                    let pause = retry.map_or(FIRST_RETRY, |(_, pause)| (pause * 2).min(LONGEST_RETRY));
                    if retry.is_none() {
                        warn!(problem, "Failed to write the status; trying on");
                    } else {
                        debug!(problem, "Failed to write the status again");
                    }
                    retry = Some((Instant::now() + pause, pause));
                }
            }
        }
        if written.uid.is_some()
            && let Err(problem) = self.write(&self.status(&written.status), LAST_WORD_LIMIT).await
        {
            debug!(problem, "Failed to write the last status");
        }
    }

    fn status(&self, before: &InferenceNodeStatus) -> InferenceNodeStatus {
        let snapshot = self.snapshot.borrow();
        let mut status = build(
            &snapshot,
            &self.inventory,
            &self.gateway_address,
            before,
            jiff::Timestamp::now(),
        );
        self.energy.borrow().fill(&mut status);
        status
    }

    async fn read_inventory(&mut self) {
        let (data_dir, limit, gpu) = (self.data_dir.clone(), self.memory_limit, self.gpu.clone());
        if let Ok(inventory) =
            tokio::task::spawn_blocking(move || inventory::read(&data_dir, limit, &gpu)).await
        {
            self.inventory = inventory;
        }
    }

    async fn write(&self, status: &InferenceNodeStatus, limit: Duration) -> Result<(), String> {
        let api: Api<InferenceNode> = Api::all(self.client.clone());
        let object = json!({
            "apiVersion": "freehold.dev/v1alpha1",
            "kind": "InferenceNode",
            "metadata": {"name": self.node},
            "status": status,
        });
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let patch = Patch::Apply(&object);
        match tokio::time::timeout(limit, api.patch_status(&self.node, &parameters, &patch)).await {
            Ok(Ok(_)) => {
                self.metrics.status_writes.inc();
                Ok(())
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", limit.as_secs())),
        }
    }
}

/// The status as a whole; a condition that is as before keeps its time.
fn build(
    snapshot: &Snapshot,
    inventory: &Inventory,
    gateway_address: &str,
    before: &InferenceNodeStatus,
    now: jiff::Timestamp,
) -> InferenceNodeStatus {
    let answers = |instance: &&Instance| matches!(instance.phase, Phase::Ready | Phase::Idle);
    let ready = snapshot.instances.iter().filter(answers).count();
    let summary = format!("{ready}/{}", snapshot.instances.len());
    let (status, reason, message) = if snapshot.stopping {
        ("False", "Stopped", "the agent was stopped".to_owned())
    } else {
        ("True", reason::AS_EXPECTED, "the agent takes work".to_owned())
    };
    let same = before
        .conditions
        .iter()
        .find(|condition| condition.type_ == READY && condition.status == status);
    let condition = Condition {
        type_: READY.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        observed_generation: snapshot.generation,
        last_transition_time: same.map_or(Time(whole_seconds(now)), |same| same.last_transition_time.clone()),
    };
    InferenceNodeStatus {
        observed_generation: snapshot.generation,
        conditions: vec![condition],
        summary: Some(summary),
        gateway_address: Some(gateway_address.to_owned()),
        inventory: inventory.clone(),
        energy: None,
        instances: snapshot.instances.clone(),
    }
}

/// Times in Kubernetes have whole seconds.
fn whole_seconds(time: jiff::Timestamp) -> jiff::Timestamp {
    jiff::Timestamp::from_second(time.as_second()).unwrap_or(time)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    None,
    Progress,
    Full,
}

/// Whether `after` is worth writing.
fn news(before: &InferenceNodeStatus, after: &InferenceNodeStatus) -> News {
    // Counters go along with other news.
    let settled = |status: &InferenceNodeStatus, with_progress: bool| {
        let mut status = status.clone();
        if let Some(energy) = &mut status.energy {
            energy.joules = None;
        }
        for instance in &mut status.instances {
            instance.tokens_generated = 0;
            instance.prompt_tokens = 0;
            instance.energy = None;
            if !with_progress {
                instance.progress = None;
            }
        }
        status
    };
    if settled(before, false) != settled(after, false) {
        News::Full
    } else if settled(before, true) != settled(after, true) {
        News::Progress
    } else {
        News::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use freehold_crds::inference_node::FetchProgress;

    fn snapshot(phase: Phase, tokens_generated: u64, bytes_done: u64) -> Snapshot {
        let progress = Some(FetchProgress {
            bytes_done,
            bytes_total: 100,
            seconds_left: None,
        });
        let name = "home.chat.1".to_owned();
        let instance = Instance {
            name,
            phase,
            tokens_generated,
            progress,
            ..Instance::default()
        };
        Snapshot {
            generation: Some(3),
            instances: vec![instance],
            stopping: false,
        }
    }

    fn status(snapshot: &Snapshot, before: &InferenceNodeStatus, second: i64) -> InferenceNodeStatus {
        let now = jiff::Timestamp::from_second(second).expect("a time");
        build(snapshot, &Inventory::default(), "http://h:1", before, now)
    }

    #[test]
    fn counters_alone_are_no_news_and_progress_is_little() {
        let first = status(
            &snapshot(Phase::Fetching, 0, 1),
            &InferenceNodeStatus::default(),
            1,
        );
        assert_eq!(
            news(&first, &status(&snapshot(Phase::Fetching, 99, 1), &first, 2)),
            News::None
        );
        assert_eq!(
            news(&first, &status(&snapshot(Phase::Fetching, 0, 2), &first, 2)),
            News::Progress
        );
        assert_eq!(
            news(&first, &status(&snapshot(Phase::Ready, 0, 1), &first, 2)),
            News::Full
        );
    }

    #[test]
    fn a_condition_keeps_its_time_until_it_turns() {
        let first = status(&snapshot(Phase::Ready, 0, 1), &InferenceNodeStatus::default(), 1);
        let second = status(&snapshot(Phase::Failed, 0, 1), &first, 2);
        assert_eq!(first.conditions, second.conditions);
        assert_eq!(
            (first.summary.as_deref(), second.summary.as_deref()),
            (Some("1/1"), Some("0/1"))
        );
        let stopped = status(
            &Snapshot {
                stopping: true,
                ..Snapshot::default()
            },
            &second,
            9,
        );
        assert_ne!(stopped.conditions, second.conditions);
    }
}
