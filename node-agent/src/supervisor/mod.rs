//! The supervisor: one task that decides, for every model of this machine, what happens next.
//!
//! It never waits for what it supervises. Fetches, worker processes and probes run beside it and send
//! [`Message`]s; the decisions themselves are [`freehold_rules::supervise`] and
//! [`freehold_rules::health`]. After every message the world is brought in line: gateway, status,
//! requests that wait. Start reading at [`Supervisor::run`].

mod actions;
mod instance;
mod memory;
mod probing;
mod process;
mod round;
pub(crate) mod run_dir;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freehold_crds::inference_node::Phase;
use freehold_gateway::worker::WorkerLine;
use freehold_gateway::{ActivateModel, Activator, BusState, Gateway};
use freehold_rules::health::Outcome;
use freehold_rules::supervise::{Event, Stage};
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::metrics::{AssignmentLabel, Metrics, PhaseLabel};
use crate::spec_file::Accepted;
use crate::status::Snapshot;
use crate::store::{FetchModel, FetchState, ModelStore, StoredModel};
use instance::Instance;

/// Messages that may wait. When it is full the senders wait: they are tasks of their own, and a worker's
/// counters are not urgent.
const INBOX: usize = 256;
/// How often requests in flight are looked at while something drains.
const DRAIN_POLL: Duration = Duration::from_millis(50);
/// A deadline that has passed and waits for something else (an idle model whose counters are a moment
/// old) is looked at again after this, not at once.
const SHORTEST_REST: Duration = Duration::from_millis(20);
/// An agent that was started says so long that it is not ready while it loads what it held before. What takes
/// longer than that is told by the model's own status.
const COMING_BACK: Duration = Duration::from_secs(60);
/// Without any deadline the world is looked over this often.
const LONGEST_REST: Duration = Duration::from_secs(60);

/// What is told to the supervisor.
#[derive(Debug)]
pub(crate) enum Message {
    /// A fetch goes on.
    FetchProgress {
        assignment: String,
        epoch: u64,
        state: FetchState,
    },
    /// A fetch ended.
    FetchEnded {
        assignment: String,
        epoch: u64,
        result: Result<StoredModel, FetchModel>,
    },
    /// A worker spoke or ended.
    Worker {
        assignment: String,
        epoch: u64,
        news: News,
    },
    /// A round of checks is done.
    Probed {
        assignment: String,
        epoch: u64,
        probe: String,
        results: Vec<(String, Outcome)>,
    },
    /// A request waits for a model.
    Activate {
        assignment: String,
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// Somebody asks whether this loop still turns.
    Alive { reply: oneshot::Sender<()> },
}

/// What came from a worker.
#[derive(Debug)]
pub(crate) enum News {
    /// A line on its stdout.
    Line(Box<WorkerLine>),
    /// It ended.
    Exited(Exit),
}

/// How a worker ended.
#[derive(Debug)]
pub(crate) struct Exit {
    how: String,
    permanent: bool,
}

/// The way for requests to wake a model.
#[derive(Clone, Debug)]
pub(crate) struct Wake {
    messages: mpsc::Sender<Message>,
}

impl Wake {
    /// Whether the supervisor took this up and went on, within `patience`.
    pub(crate) async fn is_alive(&self, patience: Duration) -> bool {
        let (reply, answer) = oneshot::channel();
        let asked =
            async { self.messages.send(Message::Alive { reply }).await.is_ok() && answer.await.is_ok() };
        tokio::time::timeout(patience, asked).await.unwrap_or(false)
    }
}

impl Activator for Wake {
    fn activate(&self, assignment: &str) -> BoxFuture<'static, Result<(), ActivateModel>> {
        let (messages, assignment) = (self.messages.clone(), assignment.to_owned());
        Box::pin(async move {
            let (reply, answer) = oneshot::channel();
            let failed = |reason: String| ActivateModel {
                assignment: assignment.clone(),
                reason,
            };
            let message = Message::Activate {
                assignment: assignment.clone(),
                reply,
            };
            let stopping = || failed("the agent is stopping".to_owned());
            messages.send(message).await.map_err(|_| stopping())?;
            answer.await.map_err(|_| stopping())?.map_err(failed)
        })
    }
}

/// Both ends of the supervisor's inbox.
pub(crate) fn inbox() -> (Wake, mpsc::Receiver<Message>) {
    let (messages, inbox) = mpsc::channel(INBOX);
    (Wake { messages }, inbox)
}

/// What the supervisor works with.
pub(crate) struct Tools {
    pub(crate) data_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) worker_program: PathBuf,
    /// The program of workers on the GPU, where there is a GPU.
    pub(crate) gpu_worker: Option<PathBuf>,
    pub(crate) worker_arguments_prefix: Vec<String>,
    /// Memory that all models together may take.
    pub(crate) allocatable_bytes: u64,
    pub(crate) store: ModelStore,
    pub(crate) gateway: Gateway,
    pub(crate) metrics: Arc<Metrics>,
}

/// The supervisor.
pub(crate) struct Supervisor {
    tools: Tools,
    messages: mpsc::Sender<Message>,
    inbox: mpsc::Receiver<Message>,
    spec: watch::Receiver<Accepted>,
    snapshot: watch::Sender<Snapshot>,
    /// The spec in force; None before the first.
    accepted: Option<Accepted>,
    instances: BTreeMap<String, Instance>,
    bus: Option<BusState>,
    started: Instant,
    /// Numbers fetches, workers and rounds of checks, so that news of an earlier one is known as such.
    epoch: u64,
    memory_changed: bool,
    coming_back: bool,
    stopping: bool,
}

impl Supervisor {
    pub(crate) fn new(
        tools: Tools,
        (wake, inbox): (Wake, mpsc::Receiver<Message>),
        spec: watch::Receiver<Accepted>,
        snapshot: watch::Sender<Snapshot>,
    ) -> Self {
        Self {
            tools,
            messages: wake.messages,
            inbox,
            spec,
            snapshot,
            accepted: None,
            instances: BTreeMap::new(),
            bus: None,
            started: Instant::now(),
            epoch: 0,
            memory_changed: false,
            coming_back: true,
            stopping: false,
        }
    }

    /// Runs until `shutdown`, then lets requests finish and ends every worker.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        self.spec.mark_changed();
        while !(self.stopping && self.instances.is_empty()) {
            let rest = self.rest();
            // Each arm takes at most one message or looks at a level, so none loses anything when dropped.
            tokio::select! {
                () = shutdown.cancelled(), if !self.stopping => self.begin_to_stop(),
                Ok(()) = self.spec.changed(), if !self.stopping => self.take_up_spec(),
                Some(message) = self.inbox.recv() => self.handle(message),
                () = tokio::time::sleep(rest) => {}
            }
            self.look_around();
            self.tell();
        }
        // Whoever still asks for a model hears that the inbox is gone.
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn next_epoch(&mut self) -> u64 {
        self.epoch += 1;
        self.epoch
    }

    /// How long nothing needs to be looked at unless a message comes.
    fn rest(&self) -> Duration {
        let now = self.now();
        let draining = |instance: &Instance| matches!(instance.watchdog.stage(), Stage::Draining { .. });
        if self.instances.values().any(draining) {
            return DRAIN_POLL;
        }
        let back = self.coming_back.then_some(COMING_BACK);
        let deadlines = self.instances.values().filter_map(Instance::deadline);
        let next = deadlines.chain(back).min();
        next.map_or(LONGEST_REST, |next| next.saturating_sub(now))
            .clamp(SHORTEST_REST, LONGEST_REST)
    }

    /// The spec is compared with what runs; only differences lead to anything.
    fn take_up_spec(&mut self) {
        let accepted = self.spec.borrow_and_update().clone();
        // Nothing was ever accepted: nothing is known, which is not the same as nothing being wanted.
        if accepted == Accepted::default() {
            return;
        }
        let now = self.now();
        self.accepted = Some(accepted.clone());
        for assignment in &accepted.spec.assignments {
            match self.instances.get_mut(&assignment.name) {
                Some(instance) if instance.same_model(assignment) => instance.take_up(assignment.clone()),
                // The name holds a hash of the model; a spec that breaks this gets what it says all the same.
                Some(_) => self.step(&assignment.name.clone(), now, Event::Remove),
                None => {
                    let instance = Instance::new(assignment.clone(), rand::random());
                    self.instances.insert(assignment.name.clone(), instance);
                    self.step(&assignment.name.clone(), now, Event::Begin);
                }
            }
        }
        let wanted = |name: &String| {
            accepted
                .spec
                .assignments
                .iter()
                .any(|assignment| assignment.name == *name)
        };
        let gone: Vec<_> = self
            .instances
            .keys()
            .filter(|name| !wanted(name))
            .cloned()
            .collect();
        for name in gone {
            self.step(&name, now, Event::Remove);
        }
        self.take_up_probes();
        self.memory_changed = true;
        self.drop_unused_files();
    }

    /// Files that no assignment uses any more go. A store that is busy with many files is slow, so this
    /// happens beside the supervisor.
    fn drop_unused_files(&self) {
        let Some(accepted) = &self.accepted else { return };
        let leaving = self
            .instances
            .values()
            .map(|instance| instance.assignment.model.clone());
        let sources: Vec<_> = accepted
            .spec
            .assignments
            .iter()
            .map(|assignment| assignment.model.clone())
            .chain(leaving)
            .collect();
        let store = self.tools.store.clone();
        tokio::task::spawn_blocking(move || store.retain(&sources.iter().collect::<Vec<_>>()));
    }

    fn begin_to_stop(&mut self) {
        info!(
            instances = self.instances.len(),
            "Stopping: requests in flight finish first"
        );
        self.stopping = true;
        let now = self.now();
        for name in self.names() {
            self.step(&name, now, Event::Remove);
        }
    }

    fn names(&self) -> Vec<String> {
        self.instances.keys().cloned().collect()
    }

    /// One event for one instance, and what follows from it.
    fn step(&mut self, name: &str, now: Duration, event: Event) {
        let Some(instance) = self.instances.get_mut(name) else {
            return;
        };
        let was_running = instance.watchdog.run().is_some();
        let actions = instance.watchdog.step(now, event);
        if instance.watchdog.run().is_some() && !was_running {
            instance.probes_begin(now);
        }
        for action in actions {
            self.act(name, now, action);
        }
        if self
            .instances
            .get(name)
            .is_some_and(|instance| *instance.watchdog.stage() == Stage::Gone)
        {
            info!(assignment = name, "Removed");
            self.instances.remove(name);
            self.memory_changed = true;
            self.restore_if_wanted(name, now);
        }
    }

    /// An assignment that left and came back while its worker was on its way out begins anew.
    fn restore_if_wanted(&mut self, name: &str, now: Duration) {
        if self.stopping {
            return;
        }
        let accepted = self.accepted.as_ref();
        let wanted = accepted.and_then(|accepted| {
            accepted
                .spec
                .assignments
                .iter()
                .find(|assignment| assignment.name == name)
        });
        if let Some(assignment) = wanted.cloned() {
            self.instances
                .insert(name.to_owned(), Instance::new(assignment, rand::random()));
            self.take_up_probes();
            self.step(name, now, Event::Begin);
        } else {
            self.drop_unused_files();
        }
    }

    fn handle(&mut self, message: Message) {
        let now = self.now();
        match message {
            Message::FetchProgress {
                assignment,
                epoch,
                state,
            } => {
                if let Some(instance) = self.instances.get_mut(&assignment) {
                    instance.fetch_progressed(epoch, state);
                }
            }
            Message::FetchEnded {
                assignment,
                epoch,
                result,
            } => {
                let instance = self.instances.get_mut(&assignment);
                if let Some(event) = instance.and_then(|instance| instance.fetch_ended(epoch, result)) {
                    self.step(&assignment, now, event);
                }
            }
            Message::Worker {
                assignment,
                epoch,
                news,
            } => {
                let instance = self.instances.get_mut(&assignment);
                if let Some(event) = instance.and_then(|instance| instance.worker_news(epoch, news)) {
                    self.step(&assignment, now, event);
                }
            }
            Message::Probed {
                assignment,
                epoch,
                probe,
                results,
            } => {
                self.probed(&assignment, epoch, &probe, results);
            }
            Message::Activate { assignment, reply } => match self.instances.get_mut(&assignment) {
                Some(instance) => {
                    instance.waiting.push(reply);
                    self.step(&assignment, now, Event::Activate);
                }
                None => {
                    let _ = reply.send(Err("this machine does not hold it any more".to_owned()));
                }
            },
            // Who asked may have lost patience; the next question follows.
            Message::Alive { reply } => drop(reply.send(())),
        }
    }

    /// Time, traffic, free memory and due probes, for all instances.
    fn look_around(&mut self) {
        let now = self.now();
        for name in self.names() {
            let activity = self.tools.gateway.activity(&name);
            let last_request = activity
                .last_request
                .map(|at| at.saturating_duration_since(self.started));
            self.step(
                &name,
                now,
                Event::Traffic {
                    in_flight: activity.in_flight,
                    last_request,
                },
            );
            self.step(&name, now, Event::Tick);
        }
        // Freed memory goes to whoever waits, and what that frees again in the next turn.
        if std::mem::take(&mut self.memory_changed) {
            for name in self.names() {
                self.step(&name, now, Event::MemoryChanged);
            }
        }
        self.start_due_probes(now);
    }

    /// Brings gateway, status, metrics and waiting requests in line with where everything stands.
    fn tell(&mut self) {
        if self.accepted.is_some() {
            let loading = self.instances.values().any(Instance::is_coming_back);
            self.coming_back &= loading && self.now() < COMING_BACK;
        }
        let accepted = self.accepted.as_ref();
        let workers = self
            .instances
            .values()
            .map(|instance| (instance.assignment.name.clone(), instance.endpoint()));
        let bus = BusState {
            routes: accepted
                .map(|accepted| accepted.spec.routes.clone())
                .unwrap_or_default(),
            policies: accepted
                .map(|accepted| accepted.spec.policies.clone())
                .unwrap_or_default(),
            workers: workers.collect(),
            coming_back: self.coming_back,
        };
        if accepted.is_some() && self.bus.as_ref() != Some(&bus) {
            self.tools.gateway.apply(bus.clone());
            self.bus = Some(bus);
        }
        // Only now does the gateway know of a worker that has just become ready.
        for instance in self.instances.values_mut() {
            instance.answer_waiting();
        }
        let now = self.now();
        let mut snapshot = Snapshot {
            generation: accepted.map(|accepted| accepted.generation),
            instances: self
                .instances
                .values_mut()
                .map(|instance| instance.status(now))
                .collect(),
            stopping: self.stopping,
        };
        if self.stopping {
            // What is assigned stays so; its worker is gone.
            snapshot.instances = self.snapshot.borrow().instances.clone();
            for instance in &mut snapshot.instances {
                instance.phase = Phase::Pending;
                instance.message = Some("the agent was stopped".to_owned());
            }
        }
        self.measure(&snapshot);
        self.snapshot.send_if_modified(|told| {
            let news = *told != snapshot;
            *told = snapshot;
            news
        });
    }

    fn measure(&self, snapshot: &Snapshot) {
        let metrics = &self.tools.metrics;
        metrics.instances.clear();
        metrics.worker_memory.clear();
        for instance in &snapshot.instances {
            let phase = PhaseLabel {
                phase: format!("{:?}", instance.phase),
            };
            metrics.instances.get_or_create(&phase).inc();
            let assignment = AssignmentLabel {
                assignment: instance.name.clone(),
            };
            if let Some(resident) = instance.resident_bytes {
                metrics
                    .worker_memory
                    .get_or_create(&assignment)
                    .set(i64::try_from(resident).unwrap_or(i64::MAX));
            }
            let counted = metrics.restarts.get_or_create(&assignment).get();
            metrics
                .restarts
                .get_or_create(&assignment)
                .inc_by(u64::from(instance.restarts).saturating_sub(counted));
        }
        let reserved: u64 = self
            .instances
            .values()
            .filter_map(|instance| instance.reserved_bytes)
            .sum();
        metrics
            .memory_reserved
            .set(i64::try_from(reserved).unwrap_or(i64::MAX));
    }
}
