//! Numbers about an engine at work.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::types::Progress;

/// Numbers that the scheduler's thread writes and everybody reads.
#[derive(Default)]
pub(crate) struct Counters {
    steps: AtomicU64,
    tokens_generated: AtomicU64,
    prompt_tokens: AtomicU64,
    active: AtomicUsize,
    waiting: AtomicUsize,
    blocks: AtomicUsize,
    /// Requests that were accepted and have not ended, queued ones included.
    present: AtomicUsize,
    shared: AtomicU64,
    guessed: AtomicU64,
    accepted: AtomicU64,
    preemptions: AtomicU64,
    scopes: AtomicU64,
    pace: Mutex<Pace>,
}

#[derive(Default)]
struct Pace {
    last: Option<Instant>,
    tokens_per_second: f64,
}

/// A place among the requests that are present. Given back when dropped, unless the scheduler took it over.
pub(super) struct Place<'a>(&'a Counters);

impl Place<'_> {
    /// The request went to the scheduler, which counts it out at its end.
    pub(super) fn hand_over(self) {
        std::mem::forget(self);
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StepCount {
    /// Rows of prompts.
    pub(crate) prompt_rows: usize,
    /// Rows of answers, guessed tokens included.
    pub(crate) decode_rows: usize,
    /// Answers that had such rows.
    pub(crate) writing: usize,
    /// Tokens chosen.
    pub(crate) generated: usize,
    /// Tokens guessed.
    pub(crate) guessed: usize,
    /// Guesses that came true.
    pub(crate) accepted: usize,
}

impl Counters {
    pub(crate) fn set_load(&self, active: usize, waiting: usize, blocks: usize) {
        self.active.store(active, Ordering::Relaxed);
        self.waiting.store(waiting, Ordering::Relaxed);
        self.blocks.store(blocks, Ordering::Relaxed);
    }

    /// Nothing to do: the time until the next request is no step.
    pub(crate) fn rest(&self) {
        self.set_load(0, 0, 0);
        self.pace.lock().unwrap_or_else(PoisonError::into_inner).last = None;
    }

    /// Counts a request in, if there are fewer than `most`; otherwise says how many there are.
    pub(super) fn enter(&self, most: usize) -> Result<Place<'_>, usize> {
        self.present
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |present| {
                (present < most).then_some(present + 1)
            })
            .map(|_| Place(self))
    }

    /// A scope that nobody else has.
    pub(super) fn next_scope(&self) -> u64 {
        self.scopes.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn leave(&self) {
        self.present.fetch_sub(1, Ordering::Relaxed);
    }

    /// Counts tokens of prompts that were known.
    pub(crate) fn shared(&self, tokens: usize) {
        self.shared.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    /// Counts an answer that was set aside.
    pub(crate) fn preempted(&self) {
        self.preemptions.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn step(&self, step: &StepCount) {
        let add = |counter: &AtomicU64, count: usize| counter.fetch_add(count as u64, Ordering::Relaxed);
        add(&self.steps, 1);
        add(&self.prompt_tokens, step.prompt_rows);
        add(&self.tokens_generated, step.generated);
        add(&self.guessed, step.guessed);
        add(&self.accepted, step.accepted);
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        // Only steps that held no prompt tell the pace of decoding.
        if let (Some(last), true) = (pace.last, step.prompt_rows == 0 && step.writing > 0) {
            let tokens = step.generated as f64 / step.writing as f64;
            let rate = tokens / now.duration_since(last).as_secs_f64().max(1e-6);
            pace.tokens_per_second = if pace.tokens_per_second == 0.0 {
                rate
            } else {
                0.9 * pace.tokens_per_second + 0.1 * rate
            };
        }
        pace.last = Some(now);
    }

    pub(super) fn progress(&self) -> Progress {
        Progress {
            steps: self.steps.load(Ordering::Relaxed),
            tokens_generated: self.tokens_generated.load(Ordering::Relaxed),
            prompt_tokens: self.prompt_tokens.load(Ordering::Relaxed),
            active: self.active.load(Ordering::Relaxed),
            queued: self.waiting.load(Ordering::Relaxed),
            shared_prompt_tokens: self.shared.load(Ordering::Relaxed),
            guessed_tokens: self.guessed.load(Ordering::Relaxed),
            accepted_tokens: self.accepted.load(Ordering::Relaxed),
            preemptions: self.preemptions.load(Ordering::Relaxed),
            kv_blocks_used: self.blocks.load(Ordering::Relaxed),
            tokens_per_second: self
                .pace
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .tokens_per_second,
        }
    }
}
