//! One model on this machine: its watchdog, and what belongs to it in the world.

use std::collections::BTreeMap;
use std::time::Duration;

use freehold_crds::conditions::reason;
use freehold_crds::governance_policy::ModelFormat;
use freehold_crds::inference_node::{self, Assignment, FetchProgress, Phase};
use freehold_crds::model_deployment::ActivationMode;
use freehold_gateway::WorkerEndpoint;
use freehold_gateway::worker::{WorkerBeat, WorkerLine, WorkerReady};
use freehold_rules::supervise::{Event, Stage, Watchdog};
use tokio::sync::{oneshot, watch};
use tokio_util::task::AbortOnDropHandle;
use tracing::info;

use super::News;
use super::probing::Probing;
use super::process::WorkerProcess;
use crate::store::{FetchModel, FetchState, StoredModel};

/// Resident memory is told in steps of this size.
const RESIDENT_STEP_BYTES: u64 = 16 << 20;

/// One model on this machine.
pub(super) struct Instance {
    pub(super) assignment: Assignment,
    pub(super) watchdog: Watchdog,
    pub(super) stored: Option<StoredModel>,
    pub(super) worker: Option<WorkerProcess>,
    /// Memory that is set aside for its worker.
    pub(super) reserved_bytes: Option<u64>,
    /// Requests that wait for it.
    pub(super) waiting: Vec<oneshot::Sender<Result<(), String>>>,
    /// Its probes, by name.
    pub(super) probes: BTreeMap<String, Probing>,
    /// Counters of its present worker, followed by the probes.
    pub(super) beat: watch::Sender<WorkerBeat>,
    pub(super) ready: Option<WorkerReady>,
    fetch: Option<(u64, AbortOnDropHandle<()>)>,
    fetch_state: Option<FetchState>,
    /// What the worker says of its loading.
    loading: Option<String>,
    load_ms: Option<u64>,
    resident_told: Option<u64>,
    /// Tokens generated and prompt tokens of the workers before the present one.
    tokens_before: (u64, u64),
}

impl Instance {
    pub(super) fn new(assignment: Assignment, seed: u64) -> Self {
        Self {
            watchdog: Watchdog::new(assignment.activation.clone(), seed),
            assignment,
            stored: None,
            worker: None,
            reserved_bytes: None,
            waiting: Vec::new(),
            probes: BTreeMap::new(),
            beat: watch::Sender::default(),
            ready: None,
            fetch: None,
            fetch_state: None,
            loading: None,
            load_ms: None,
            resident_told: None,
            tokens_before: (0, 0),
        }
    }

    /// Whether a running worker is what `assignment` asks for.
    pub(super) fn same_model(&self, assignment: &Assignment) -> bool {
        let mine = &self.assignment;
        (&mine.model, &mine.engine, mine.device) == (&assignment.model, &assignment.engine, assignment.device)
    }

    /// Takes up what may change while a worker runs.
    pub(super) fn take_up(&mut self, assignment: Assignment) {
        self.watchdog.set_activation(assignment.activation.clone());
        self.assignment = assignment;
    }

    /// Whether it is on its way into memory with bytes that are here already.
    pub(super) fn is_coming_back(&self) -> bool {
        match self.watchdog.stage() {
            Stage::Fetching => self
                .fetch_state
                .as_ref()
                .is_none_or(|state| state.verifying || state.progress.bytes_done == 0),
            Stage::New | Stage::Waiting { message: None } | Stage::Loading { .. } => true,
            _ => false,
        }
    }

    /// When it must be looked at again.
    pub(super) fn deadline(&self) -> Option<Duration> {
        let probes = self
            .watchdog
            .run()
            .and_then(|_| self.probes.values().filter_map(Probing::due_at).min());
        [self.watchdog.deadline(), probes].into_iter().flatten().min()
    }

    /// When its last request was, if it may be sent to sleep. A probe under way does not keep it awake.
    pub(super) fn sleeps_if_asked(&self) -> Option<Duration> {
        let run = self.watchdog.run()?;
        let may = self.assignment.activation.mode == ActivationMode::OnDemand;
        may.then(|| run.last_request.max(run.since))
    }

    pub(super) fn fetch_begins(&mut self, epoch: u64, task: AbortOnDropHandle<()>) {
        self.fetch = Some((epoch, task));
        self.fetch_state = None;
    }

    pub(super) fn fetch_progressed(&mut self, epoch: u64, state: FetchState) {
        if self.fetch.as_ref().is_some_and(|(current, _)| *current == epoch) {
            self.fetch_state = Some(state);
        }
    }

    pub(super) fn fetch_ended(
        &mut self,
        epoch: u64,
        result: Result<StoredModel, FetchModel>,
    ) -> Option<Event> {
        let (_, task) = self.fetch.take_if(|(current, _)| *current == epoch)?;
        drop(task);
        self.fetch_state = None;
        match result {
            Ok(stored) => {
                let forbidden = forbidden_format(&stored.facts.format, &self.assignment.allowed_formats);
                self.stored = Some(stored);
                Some(match forbidden {
                    Some(message) => Event::FetchFailed {
                        reason: reason::POLICY_VIOLATION,
                        message,
                        permanent: true,
                    },
                    None => Event::Fetched,
                })
            }
            Err(error) => Some(Event::FetchFailed {
                reason: error.reason(),
                message: error.to_string(),
                permanent: error.permanent(),
            }),
        }
    }

    pub(super) fn worker_begins(&mut self, worker: WorkerProcess, now: Duration) {
        info!(assignment = %self.assignment.name, at_ms = now.as_millis(), "Loading model");
        self.worker = Some(worker);
        self.ready = None;
        self.loading = None;
        self.resident_told = None;
        self.beat.send_replace(WorkerBeat::default());
    }

    /// What a worker said, as an event; nothing where it is an earlier worker that speaks.
    pub(super) fn worker_news(&mut self, epoch: u64, news: News) -> Option<Event> {
        self.worker.as_ref().filter(|worker| worker.epoch == epoch)?;
        match news {
            News::Exited(exit) => {
                self.worker = None;
                self.ready = None;
                let last = self.beat.send_replace(WorkerBeat::default());
                self.tokens_before.0 += last.tokens_generated;
                self.tokens_before.1 += last.prompt_tokens;
                Some(Event::Exited {
                    how: exit.how,
                    permanent: exit.permanent,
                })
            }
            News::Line(line) => match *line {
                WorkerLine::Loading(loading) => {
                    self.loading = Some(loading.stage);
                    None
                }
                WorkerLine::Ready(ready) => {
                    info!(assignment = %self.assignment.name, load_ms = ready.load_ms, "Model answers");
                    self.load_ms = Some(ready.load_ms);
                    self.ready = Some(*ready);
                    Some(Event::Loaded)
                }
                WorkerLine::Beat(beat) => {
                    self.beat.send_replace(beat);
                    Some(Event::Beat {
                        steps: beat.steps,
                        busy: beat.active + beat.queued > 0,
                    })
                }
                WorkerLine::Failed(failed) => Some(Event::GaveUp {
                    reason: failed.reason,
                    message: failed.message,
                }),
            },
        }
    }

    /// How the gateway sees it.
    pub(super) fn endpoint(&self) -> WorkerEndpoint {
        let facts = self.stored.as_ref().map(|stored| &stored.facts);
        let (phase, _, message) = self.standing();
        let ready = self.watchdog.run().is_some();
        // An answer to clients, and a new state of the bus each time: whole percents only.
        let waiting_for = (!ready).then(|| match (phase, self.progress()) {
            (Phase::Fetching | Phase::Verifying, Some(progress)) if progress.bytes_total > 0 => {
                format!(
                    "{phase:?} {} %",
                    progress.bytes_done.saturating_mul(100) / progress.bytes_total
                )
            }
            _ => message.map_or_else(|| format!("{phase:?}"), |message| format!("{phase:?}: {message}")),
        });
        WorkerEndpoint {
            socket: self
                .worker
                .as_ref()
                .map(|worker| worker.socket.clone())
                .unwrap_or_default(),
            ready,
            idle: self.watchdog.wakes_on_demand(),
            task: facts.map(|facts| facts.task.clone()).unwrap_or_default(),
            context_length: self.ready.as_ref().map_or(0, |ready| ready.context_length),
            waiting_for,
        }
    }

    /// Tells requests that wait how it went, as soon as that is known.
    pub(super) fn answer_waiting(&mut self) {
        let answer = match self.watchdog.stage() {
            Stage::Ready(_) => Ok(()),
            Stage::Asleep { message } => Err(message
                .clone()
                .unwrap_or_else(|| "it went back to sleep".to_owned())),
            Stage::Backoff { message, .. } | Stage::Failed { message, .. } | Stage::Refused { message } => {
                Err(message.clone())
            }
            _ => return,
        };
        for reply in self.waiting.drain(..) {
            let _ = reply.send(answer.clone());
        }
    }

    fn progress(&self) -> Option<FetchProgress> {
        self.fetch_state.as_ref().map(|state| state.progress.clone())
    }

    /// Phase, reason and message.
    fn standing(&self) -> (Phase, Option<&str>, Option<String>) {
        match self.watchdog.stage() {
            Stage::New | Stage::Gone => (Phase::Pending, None, None),
            Stage::Fetching if self.fetch_state.as_ref().is_some_and(|state| state.verifying) => {
                (Phase::Verifying, Some(reason::FETCHING), None)
            }
            Stage::Fetching => (Phase::Fetching, Some(reason::FETCHING), None),
            Stage::Waiting { message } => {
                let waits = message.as_ref().map(|_| reason::INSUFFICIENT_MEMORY);
                (Phase::Pending, waits, message.clone())
            }
            Stage::Asleep { message } => (Phase::Idle, Some(reason::IDLE), message.clone()),
            Stage::Loading { .. } => (Phase::Loading, Some(reason::LOADING), self.loading.clone()),
            Stage::Ready(_) => (Phase::Ready, Some(reason::SERVING), None),
            Stage::Draining { .. } | Stage::Stopping { .. } => (Phase::Draining, None, None),
            Stage::Backoff { reason, message, .. } => (Phase::Backoff, Some(reason), Some(message.clone())),
            Stage::Failed { reason, message } => (Phase::Failed, Some(reason), Some(message.clone())),
            Stage::Refused { message } => (
                Phase::Refused,
                Some(reason::INSUFFICIENT_MEMORY),
                Some(message.clone()),
            ),
        }
    }

    /// What the status says of it.
    pub(super) fn status(&mut self, now: Duration) -> inference_node::Instance {
        let beat = *self.beat.borrow();
        self.tell_resident(beat.resident_bytes);
        let (phase, reason, message) = self.standing();
        inference_node::Instance {
            name: self.assignment.name.clone(),
            phase,
            reason: reason.map(str::to_owned),
            message,
            progress: self.progress(),
            model: self.stored.as_ref().map(|stored| stored.facts.clone()),
            device: self.ready.as_ref().map(|ready| ready.device),
            device_reason: self.ready.as_ref().and_then(|ready| ready.device_reason.clone()),
            restarts: self.watchdog.restarts(),
            last_exit: self.watchdog.last_exit().map(str::to_owned),
            load_ms: self.load_ms,
            resident_bytes: self.resident_told,
            tokens_generated: self.tokens_before.0 + beat.tokens_generated,
            prompt_tokens: self.tokens_before.1 + beat.prompt_tokens,
            energy: None,
            probes: self
                .probes
                .values()
                .flat_map(|probing| probing.results(now))
                .collect(),
        }
    }

    /// A worker at the edge of a step does not make news with every page.
    fn tell_resident(&mut self, resident: u64) {
        if resident == 0 {
            return;
        }
        let near = |told: u64| told.abs_diff(resident) < RESIDENT_STEP_BYTES;
        if !self.resident_told.is_some_and(near) {
            self.resident_told = Some(resident.next_multiple_of(RESIDENT_STEP_BYTES));
        }
    }
}

fn forbidden_format(found: &str, allowed: &[ModelFormat]) -> Option<String> {
    let name = |format: &ModelFormat| format!("{format:?}").to_lowercase();
    let ok = allowed.is_empty() || allowed.iter().any(|format| name(format) == found.to_lowercase());
    (!ok).then(|| {
        let names: Vec<_> = allowed.iter().map(name).collect();
        format!(
            "the file is {found} and policies allow {}; use a model in an allowed format",
            names.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_held_to_the_list() {
        assert_eq!(forbidden_format("gguf", &[]), None);
        assert_eq!(forbidden_format("GGUF", &[ModelFormat::Gguf]), None);
        assert!(
            forbidden_format("safetensors", &[ModelFormat::Gguf])
                .expect("forbidden")
                .contains("allow gguf")
        );
    }

    #[test]
    fn resident_memory_is_told_in_steps() {
        let mut instance = Instance::new(Assignment::default(), 1);
        let mut told = Vec::new();
        for mib in [100, 101, 111, 113, 112, 140] {
            instance.tell_resident(mib << 20);
            told.push(instance.resident_told.expect("told") >> 20);
        }
        assert_eq!(told, [112, 112, 112, 112, 112, 144]);
    }
}
