//! The watchdog of one instance: what is done next, decided without doing anything.
//!
//! ```text
//!            ┌──────────── Backoff ◀──────────────┐ crash, failed fetch
//!            ▼                                    │
//! Fetching ─▶ Waiting ─▶ Loading ─▶ Ready ─▶ Draining ─▶ Stopping ─▶ Gone
//!    │          ▲  │                  ▲         │            │
//!    │  Asleep ─┘  └▶ Refused         └─woken───┘            └▶ Asleep, Backoff
//!    └▶ Failed
//! ```
//! Start reading at [`Watchdog::step`]. Being slow is never a reason to end a worker: only standing still
//! is, with work in flight. Times are [`Duration`]s since any fixed moment, so tests are just numbers.

mod backoff;
mod stage;
#[cfg(test)]
mod tests;

use std::time::Duration;

use freehold_crds::conditions::reason;
use freehold_crds::model_deployment::{Activation, ActivationMode};

pub use backoff::Backoff;
pub use stage::{Action, Event, Run, Stage, Then};

/// Longest time that requests in flight get to finish when an instance goes.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// A drain lasts at least this long: a request that read the routes just before needs it to arrive.
const DRAIN_QUIET: Duration = Duration::from_millis(250);
/// Without a sign of the worker for this long it is taken as frozen; it speaks every five seconds at rest.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// Work in flight without a step for this long ends the worker, whatever the probes say.
const STALL_LIMIT: Duration = Duration::from_secs(300);
/// Loading takes minutes at most, from the slowest disk too.
const LOAD_LIMIT: Duration = Duration::from_secs(1200);
/// A run of this length forgives the crashes before it.
const GOOD_RUN: Duration = Duration::from_secs(120);

/// The watchdog.
#[derive(Clone, Debug, PartialEq)]
pub struct Watchdog {
    stage: Stage,
    activation: Activation,
    backoff: Backoff,
    wake: bool,
    gave_up: Option<(String, String)>,
    /// Starts of a worker after its first.
    restarts: u32,
    loads: u32,
    last_exit: Option<String>,
}

impl Watchdog {
    /// A watchdog for one instance; `seed` varies its pauses.
    #[must_use]
    pub fn new(activation: Activation, seed: u64) -> Self {
        Self {
            stage: Stage::New,
            activation,
            backoff: Backoff::new(seed),
            wake: false,
            gave_up: None,
            restarts: 0,
            loads: 0,
            last_exit: None,
        }
    }

    /// Where the instance stands.
    #[must_use]
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// The run, while the instance is ready.
    #[must_use]
    pub fn run(&self) -> Option<&Run> {
        match &self.stage {
            Stage::Ready(run) => Some(run),
            _ => None,
        }
    }

    /// How often its worker was started again.
    #[must_use]
    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    /// How its worker ended last, if that was not wanted.
    #[must_use]
    pub fn last_exit(&self) -> Option<&str> {
        self.last_exit.as_deref()
    }

    /// Takes up new settings.
    pub fn set_activation(&mut self, activation: Activation) {
        self.activation = activation;
    }

    /// Whether a request may wake it.
    #[must_use]
    pub fn wakes_on_demand(&self) -> bool {
        self.on_demand()
            && match &self.stage {
                Stage::Asleep { .. } | Stage::Waiting { .. } | Stage::Loading { .. } => true,
                Stage::Draining { then, .. } | Stage::Stopping { then } => *then == Then::Sleep,
                _ => false,
            }
    }

    /// When [`Event::Tick`] must come at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        match &self.stage {
            Stage::Loading { since } => Some(*since + LOAD_LIMIT),
            Stage::Ready(run) => {
                let silence = run.heard + SILENCE_LIMIT;
                let sleep = self.on_demand().then(|| self.sleeps_at(run));
                Some(sleep.map_or(silence, |sleep| sleep.min(silence)))
            }
            Stage::Draining { since, .. } => Some(*since + DRAIN_LIMIT),
            Stage::Backoff { until, .. } => Some(*until),
            _ => None,
        }
    }

    /// One step: what happened at `now` changes where the instance stands and says what is to be done.
    /// An event that does not fit the stage (it was on its way when the stage changed) changes nothing.
    pub fn step(&mut self, now: Duration, event: Event) -> Vec<Action> {
        match event {
            Event::Begin => self.begin(),
            Event::Fetched => self.fetched(),
            Event::FetchFailed {
                reason,
                message,
                permanent,
            } => self.fetch_failed(now, reason, message, permanent),
            Event::Reserved => self.reserved(now),
            Event::NoMemory { message, freeing } => self.no_memory(message, freeing),
            Event::MemoryChanged => self.memory_changed(),
            Event::Loaded => self.loaded(now),
            Event::GaveUp { reason, message } => {
                self.gave_up = Some((reason, message));
                Vec::new()
            }
            Event::Exited { how, permanent } => self.exited(now, how, permanent),
            Event::Beat { steps, busy } => self.beat(now, steps, busy),
            Event::Traffic {
                in_flight,
                last_request,
            } => self.traffic(now, in_flight, last_request),
            Event::Activate => self.activate(now),
            Event::Evict => {
                if self.on_demand() {
                    self.drain(now, Then::Sleep);
                }
                Vec::new()
            }
            Event::Restart { cause, drain } => self.restart(now, cause, drain),
            Event::Remove => self.remove(now),
            Event::Tick => self.tick(now),
        }
    }

    fn on_demand(&self) -> bool {
        self.activation.mode == ActivationMode::OnDemand
    }

    fn sleeps_at(&self, run: &Run) -> Duration {
        run.last_request.max(run.since) + Duration::from_secs(self.activation.idle_seconds.into())
    }

    fn begin(&mut self) -> Vec<Action> {
        if self.stage != Stage::New {
            return Vec::new();
        }
        self.stage = Stage::Fetching;
        vec![Action::Fetch]
    }

    fn fetched(&mut self) -> Vec<Action> {
        if self.stage != Stage::Fetching {
            return Vec::new();
        }
        self.backoff.forgive();
        self.rest_or_reserve()
    }

    /// The bytes are here and no worker is: sleep, or ask for memory.
    fn rest_or_reserve(&mut self) -> Vec<Action> {
        if self.on_demand() && !self.wake {
            self.stage = Stage::Asleep { message: None };
            return Vec::new();
        }
        self.stage = Stage::Waiting { message: None };
        vec![Action::Reserve]
    }

    fn fetch_failed(
        &mut self,
        now: Duration,
        reason: &'static str,
        message: String,
        permanent: bool,
    ) -> Vec<Action> {
        if self.stage != Stage::Fetching {
            return Vec::new();
        }
        self.stage = if permanent {
            Stage::Failed {
                reason: reason.to_owned(),
                message,
            }
        } else {
            Stage::Backoff {
                until: now + self.backoff.next_pause(),
                fetched: false,
                reason,
                message,
            }
        };
        Vec::new()
    }

    fn reserved(&mut self, now: Duration) -> Vec<Action> {
        if !matches!(self.stage, Stage::Waiting { .. }) {
            return vec![Action::Release];
        }
        if self.loads > 0 {
            self.restarts += u32::from(self.last_exit.is_some());
        }
        self.loads += 1;
        self.stage = Stage::Loading { since: now };
        vec![Action::Load]
    }

    fn no_memory(&mut self, message: String, freeing: bool) -> Vec<Action> {
        if !matches!(self.stage, Stage::Waiting { .. }) {
            return Vec::new();
        }
        self.stage = if freeing {
            Stage::Waiting {
                message: Some(message),
            }
        } else if self.on_demand() {
            self.wake = false;
            Stage::Asleep {
                message: Some(message),
            }
        } else {
            Stage::Refused { message }
        };
        Vec::new()
    }

    fn memory_changed(&mut self) -> Vec<Action> {
        match &self.stage {
            Stage::Waiting { .. } => vec![Action::Reserve],
            Stage::Refused { .. } => {
                self.stage = Stage::Waiting { message: None };
                vec![Action::Reserve]
            }
            _ => Vec::new(),
        }
    }

    fn loaded(&mut self, now: Duration) -> Vec<Action> {
        if matches!(self.stage, Stage::Loading { .. }) {
            self.wake = false;
            self.stage = Stage::Ready(Run::new(now));
        }
        Vec::new()
    }

    fn exited(&mut self, now: Duration, how: String, permanent: bool) -> Vec<Action> {
        let gave_up = self.gave_up.take();
        match std::mem::replace(&mut self.stage, Stage::Gone) {
            Stage::Draining { then, .. } | Stage::Stopping { then } => {
                let mut actions = vec![Action::Release];
                match then {
                    Then::Remove => {}
                    Then::Sleep => actions.extend(self.rest_or_reserve()),
                    Then::Restart { cause } => self.pause(now, cause),
                }
                actions
            }
            stage @ (Stage::Loading { .. } | Stage::Ready(_)) => {
                if let Stage::Ready(run) = stage
                    && now.saturating_sub(run.since) >= GOOD_RUN
                {
                    self.backoff.forgive();
                }
                match gave_up {
                    Some((reason, message)) if permanent => {
                        self.last_exit = Some(how);
                        self.stage = Stage::Failed { reason, message };
                    }
                    Some((_, message)) => self.pause(now, format!("{message} ({how})")),
                    None => self.pause(now, how),
                }
                vec![Action::Release]
            }
            // No worker was there: nothing has ended.
            other => {
                self.stage = other;
                Vec::new()
            }
        }
    }

    fn pause(&mut self, now: Duration, how: String) {
        let until = now + self.backoff.next_pause();
        let message = match self.backoff.failures() {
            1 => format!("the worker ended: {how}"),
            times => format!("the worker ended {times} times in a row, last: {how}"),
        };
        self.last_exit = Some(how);
        self.stage = Stage::Backoff {
            until,
            fetched: true,
            reason: reason::CRASHED,
            message,
        };
    }

    fn beat(&mut self, now: Duration, steps: u64, busy: bool) -> Vec<Action> {
        if let Stage::Ready(run) | Stage::Draining { run, .. } = &mut self.stage {
            run.heard = now;
            // Work that has just begun has had no time yet to advance.
            if run.steps != steps || (busy && !run.busy) {
                run.advanced = now;
            }
            run.steps = steps;
            run.busy = busy;
        }
        self.tick(now)
    }

    fn traffic(&mut self, now: Duration, in_flight: usize, last_request: Option<Duration>) -> Vec<Action> {
        match &mut self.stage {
            Stage::Ready(run) => {
                if in_flight > 0 {
                    run.last_request = now;
                } else if let Some(at) = last_request {
                    run.last_request = run.last_request.max(at);
                }
                let run = *run;
                if self.on_demand() && in_flight == 0 && !run.busy && now >= self.sleeps_at(&run) {
                    self.drain(now, Then::Sleep);
                }
                Vec::new()
            }
            Stage::Draining { since, then, .. } if in_flight == 0 && now >= *since + DRAIN_QUIET => {
                self.stage = Stage::Stopping { then: then.clone() };
                vec![Action::Stop]
            }
            _ => Vec::new(),
        }
    }

    fn activate(&mut self, now: Duration) -> Vec<Action> {
        match &self.stage {
            Stage::Asleep { .. } => {
                self.wake = true;
                self.rest_or_reserve()
            }
            Stage::Draining {
                run,
                then: Then::Sleep,
                ..
            } => {
                self.stage = Stage::Ready(Run {
                    last_request: now,
                    ..*run
                });
                Vec::new()
            }
            Stage::Ready(_) | Stage::Failed { .. } | Stage::Refused { .. } | Stage::Gone => Vec::new(),
            _ => {
                self.wake = true;
                Vec::new()
            }
        }
    }

    fn drain(&mut self, now: Duration, then: Then) {
        if let Stage::Ready(run) = self.stage {
            self.stage = Stage::Draining {
                since: now,
                run,
                then,
            };
        }
    }

    fn restart(&mut self, now: Duration, cause: String, drain: bool) -> Vec<Action> {
        let Stage::Ready(run) = self.stage else {
            return Vec::new();
        };
        let then = Then::Restart { cause };
        if drain {
            self.stage = Stage::Draining {
                since: now,
                run,
                then,
            };
            return Vec::new();
        }
        self.stage = Stage::Stopping { then };
        vec![Action::Kill]
    }

    fn remove(&mut self, now: Duration) -> Vec<Action> {
        match &mut self.stage {
            Stage::Ready(_) => {
                self.drain(now, Then::Remove);
                Vec::new()
            }
            Stage::Loading { .. } => {
                self.stage = Stage::Stopping { then: Then::Remove };
                vec![Action::Stop]
            }
            Stage::Draining { then, .. } | Stage::Stopping { then } => {
                *then = Then::Remove;
                Vec::new()
            }
            _ => {
                self.stage = Stage::Gone;
                vec![Action::Release]
            }
        }
    }

    fn tick(&mut self, now: Duration) -> Vec<Action> {
        match &self.stage {
            Stage::Loading { since } if now >= *since + LOAD_LIMIT => {
                let cause = format!("loading took longer than {} s", LOAD_LIMIT.as_secs());
                self.stage = Stage::Stopping {
                    then: Then::Restart { cause },
                };
                vec![Action::Kill]
            }
            Stage::Ready(run) => {
                let cause = if run.stalled_for(now) >= STALL_LIMIT {
                    format!(
                        "it stood still for {} s with requests in flight",
                        STALL_LIMIT.as_secs()
                    )
                } else if now >= run.heard + SILENCE_LIMIT {
                    format!("no sign of it for {} s", SILENCE_LIMIT.as_secs())
                } else {
                    return Vec::new();
                };
                self.restart(now, cause, false)
            }
            Stage::Draining { since, then, .. } if now >= *since + DRAIN_LIMIT => {
                self.stage = Stage::Stopping { then: then.clone() };
                vec![Action::Stop]
            }
            Stage::Backoff { until, fetched, .. } if now >= *until => {
                if *fetched {
                    return self.rest_or_reserve();
                }
                self.stage = Stage::Fetching;
                vec![Action::Fetch]
            }
            _ => Vec::new(),
        }
    }
}
