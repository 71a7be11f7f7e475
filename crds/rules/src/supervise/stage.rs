//! Where an instance can stand, what can happen to it, and what can be done.

use std::time::Duration;

/// Where an instance stands.
#[derive(Clone, Debug, PartialEq)]
pub enum Stage {
    /// Known, nothing done yet.
    New,
    /// Its bytes are being fetched or checked.
    Fetching,
    /// Its bytes are here; it needs memory.
    Waiting {
        /// What it waits for, once that is known.
        message: Option<String>,
    },
    /// On demand, and out of memory.
    Asleep {
        /// Why the last request did not wake it, if so.
        message: Option<String>,
    },
    /// A worker loads it.
    Loading {
        /// Since when.
        since: Duration,
    },
    /// It answers.
    Ready(Run),
    /// Off the bus; finishes what it has.
    Draining {
        /// Since when.
        since: Duration,
        /// The run, taken up again if a request comes for a model that was about to sleep.
        run: Run,
        /// What comes after.
        then: Then,
    },
    /// The worker was told to end.
    Stopping {
        /// What comes after.
        then: Then,
    },
    /// It is tried again.
    Backoff {
        /// When.
        until: Duration,
        /// Whether the bytes are here.
        fetched: bool,
        /// Reason of `conditions::reason`.
        reason: &'static str,
        /// What happened.
        message: String,
    },
    /// It cannot run without a change.
    Failed {
        /// Reason of `conditions::reason`.
        reason: String,
        /// What happened.
        message: String,
    },
    /// This machine has no memory for it.
    Refused {
        /// The arithmetic.
        message: String,
    },
    /// Nothing of it is left.
    Gone,
}

/// A worker that answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Run {
    /// When it became ready.
    pub since: Duration,
    /// When it was last heard of.
    pub heard: Duration,
    /// Its step counter.
    pub steps: u64,
    /// When that last advanced, or work last began.
    pub advanced: Duration,
    /// Whether it has work.
    pub busy: bool,
    /// When a request last began or ended.
    pub last_request: Duration,
}

impl Run {
    pub(super) fn new(now: Duration) -> Self {
        Self {
            since: now,
            heard: now,
            steps: 0,
            advanced: now,
            busy: false,
            last_request: now,
        }
    }

    /// For how long it has stood still with work in flight.
    #[must_use]
    pub fn stalled_for(&self, now: Duration) -> Duration {
        if self.busy {
            now.saturating_sub(self.advanced)
        } else {
            Duration::ZERO
        }
    }
}

/// What follows the end of a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// The assignment is gone.
    Remove,
    /// On demand: back to sleep.
    Sleep,
    /// It is started again.
    Restart {
        /// Why, for the eye.
        cause: String,
    },
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The assignment is here.
    Begin,
    /// Its bytes are here and sound.
    Fetched,
    /// They are not.
    FetchFailed {
        /// Reason of `conditions::reason`.
        reason: &'static str,
        /// What happened.
        message: String,
        /// Whether only a change helps.
        permanent: bool,
    },
    /// Memory is set aside for it.
    Reserved,
    /// There is none.
    NoMemory {
        /// The arithmetic.
        message: String,
        /// Whether some is being freed.
        freeing: bool,
    },
    /// Memory was freed or the plan changed: ask again.
    MemoryChanged,
    /// The worker answers.
    Loaded,
    /// The worker says why it ends; its exit follows.
    GaveUp {
        /// Reason of `conditions::reason`.
        reason: String,
        /// What happened.
        message: String,
    },
    /// The worker ended.
    Exited {
        /// How, such as `killed by signal 9`.
        how: String,
        /// Whether its exit says that a retry ends the same way.
        permanent: bool,
    },
    /// The worker's counters.
    Beat {
        /// Forward passes so far.
        steps: u64,
        /// Whether it has work.
        busy: bool,
    },
    /// What the gateway sees.
    Traffic {
        /// Requests in flight.
        in_flight: usize,
        /// When one last began or ended.
        last_request: Option<Duration>,
    },
    /// A request waits for it.
    Activate,
    /// Its memory is wanted for another; only an instance on demand gives it.
    Evict,
    /// A probe asks for a restart; its budget was counted elsewhere.
    Restart {
        /// Why.
        cause: String,
        /// Whether requests in flight are worth waiting for.
        drain: bool,
    },
    /// The assignment left the plan.
    Remove,
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Fetch and check the bytes; answer `Fetched` or `FetchFailed`.
    Fetch,
    /// Set memory aside; answer `Reserved` or `NoMemory`.
    Reserve,
    /// Start a worker; answer `Loaded` or `Exited`.
    Load,
    /// Ask the worker to end; answer `Exited`.
    Stop,
    /// End the worker now; answer `Exited`.
    Kill,
    /// The memory is free again.
    Release,
}
