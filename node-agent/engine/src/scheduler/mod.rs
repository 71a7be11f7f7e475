//! The engine's one thread: takes requests, forms batches, hands out tokens.
//!
//! ```text
//! generate() ──▶ bounded queue ──▶ [ admit ─▶ batch ─▶ forward ─▶ sample ─▶ sink ] ──▶ caller
//!                                        ▲                  │
//!                                        └── cancelled, finished: blocks come back
//! ```
//! Continuous batching: every step holds one row of each answer under way and as many prompt rows as the
//! step's budget allows, so a long prompt slows the others and never stops them. Admission is first come,
//! first served; a request is admitted when blocks for its whole prompt and answer are free, so nothing
//! that was begun ever runs out of memory.

mod sequence;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};

use tracing::{debug, error};

use crate::engine::{Counters, FinishReason, Finished, GenerateEvent, Sink};
use crate::kv::{BlockTable, KvCache, blocks_for};
use crate::model::{Decoder, Row};
use crate::tokenizer::Tokenizer;
use sequence::Sequence;

/// Prompt rows in one step: long enough to be efficient, short enough that the answers under way keep
/// their pace.
const PROMPT_ROWS_PER_STEP: usize = 128;
/// Prompt rows in a step that nobody else waits for; a cancelled prompt is noticed after so many.
const PROMPT_ROWS_ALONE: usize = 512;

/// A request that was accepted.
pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_tokens: usize,
    pub(crate) stop: Vec<String>,
    pub(crate) sampling: crate::SamplingParams,
    pub(crate) sink: Sink,
    pub(crate) cancelled: Arc<AtomicBool>,
    pub(crate) arrived: std::time::Instant,
}

/// The thread's state.
pub(crate) struct Scheduler {
    decoder: Decoder,
    tokenizer: Arc<Tokenizer>,
    cache: KvCache,
    jobs: Receiver<Job>,
    counters: Arc<Counters>,
    max_sequences: usize,
    waiting: VecDeque<Job>,
    running: Vec<Sequence>,
}

impl Scheduler {
    pub(crate) fn new(
        decoder: Decoder,
        tokenizer: Arc<Tokenizer>,
        cache: KvCache,
        jobs: Receiver<Job>,
        counters: Arc<Counters>,
        max_sequences: usize,
    ) -> Self {
        Self {
            decoder,
            tokenizer,
            cache,
            jobs,
            counters,
            max_sequences,
            waiting: VecDeque::new(),
            running: Vec::new(),
        }
    }

    /// Runs until every handle on the engine is gone. Sleeps while there is nothing to do.
    pub(crate) fn run(mut self) {
        loop {
            if self.running.is_empty() && self.waiting.is_empty() {
                self.counters.rest();
                match self.jobs.recv() {
                    Ok(job) => self.waiting.push_back(job),
                    Err(_) => return,
                }
            }
            loop {
                match self.jobs.try_recv() {
                    Ok(job) => self.waiting.push_back(job),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        self.stop();
                        return;
                    }
                }
            }
            self.drop_cancelled();
            self.admit();
            self.counters.set_load(
                self.running.len(),
                self.waiting.len(),
                self.cache.capacity_blocks() - self.cache.free_blocks(),
            );
            if !self.running.is_empty()
                && let Err(failure) = self.step()
            {
                error!(error = %failure, "Failed to compute a step; its answers end");
                for mut sequence in std::mem::take(&mut self.running) {
                    self.cache.release(&mut sequence.table);
                    self.counters.leave();
                    sequence.finish(FinishReason::Error(failure.clone()));
                }
            }
        }
    }

    fn stop(&mut self) {
        for sequence in std::mem::take(&mut self.running) {
            self.counters.leave();
            sequence.finish(FinishReason::Cancelled);
        }
        for job in std::mem::take(&mut self.waiting) {
            self.counters.leave();
            job.cancel();
        }
    }

    fn drop_cancelled(&mut self) {
        let (gone, staying): (VecDeque<Job>, VecDeque<Job>) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|job| job.cancelled.load(Ordering::Relaxed));
        self.waiting = staying;
        for job in gone {
            debug!(request = %job.id, "Dropped a cancelled request that waited");
            self.counters.leave();
            job.cancel();
        }
        let (gone, staying): (Vec<Sequence>, Vec<Sequence>) = std::mem::take(&mut self.running)
            .into_iter()
            .partition(|s| s.cancelled.load(Ordering::Relaxed));
        self.running = staying;
        for mut sequence in gone {
            debug!(request = %sequence.id, "Dropped a cancelled request");
            self.cache.release(&mut sequence.table);
            self.counters.leave();
            sequence.finish(FinishReason::Cancelled);
        }
    }

    fn admit(&mut self) {
        while self.running.len() < self.max_sequences {
            let Some(job) = self.waiting.front() else { return };
            let tokens = job.prompt.len() + job.max_tokens;
            if blocks_for(tokens) > self.cache.free_blocks() {
                return;
            }
            let Some(job) = self.waiting.pop_front() else {
                return;
            };
            let mut table = BlockTable::default();
            if !self.cache.reserve(&mut table, tokens) {
                self.waiting.push_front(job);
                return;
            }
            self.running.push(Sequence::new(job, table));
        }
    }

    /// One forward pass over everything that runs.
    fn step(&mut self) -> Result<(), String> {
        let mut rows = Vec::new();
        // Alone, a prompt may fill the step: nobody else's pace suffers.
        let most = if self.running.len() == 1 {
            PROMPT_ROWS_ALONE
        } else {
            PROMPT_ROWS_PER_STEP
        };
        let mut budget = most;
        for (index, sequence) in self.running.iter_mut().enumerate() {
            sequence.push_rows(index, &mut budget, &mut rows);
        }
        let tables: Vec<&BlockTable> = self.running.iter().map(|sequence| &sequence.table).collect();
        let (decoder, cache, rows) = (&mut self.decoder, &mut self.cache, rows.as_slice());
        // A broken assertion in a kernel ends the answers under way, and not the worker.
        let forward = AssertUnwindSafe(|| {
            decoder.forward(rows, &tables, cache);
        });
        catch_unwind(forward).map_err(|_| "a kernel stopped at an assertion".to_owned())?;
        let owners: Vec<usize> = rows
            .iter()
            .filter(|row: &&Row| row.wants_logits)
            .map(|row| row.sequence)
            .collect();
        let generated = owners.len();
        let logits = self.decoder.logits();
        let vocab_size = logits.len() / generated.max(1);
        let mut finished = Vec::new();
        for (owner, logits) in owners.into_iter().zip(logits.chunks_exact_mut(vocab_size.max(1))) {
            let Some(sequence) = self.running.get_mut(owner) else {
                continue;
            };
            if let Some(reason) = sequence.take(logits, &self.tokenizer) {
                finished.push((owner, reason));
            }
        }
        self.counters.step(most - budget, generated);
        for (owner, reason) in finished.into_iter().rev() {
            let mut sequence = self.running.remove(owner);
            self.cache.release(&mut sequence.table);
            self.counters.leave();
            sequence.finish(reason);
        }
        Ok(())
    }
}

impl Job {
    /// Tells the caller that the request was taken.
    pub(crate) fn start(&mut self) {
        let _ = (self.sink)(GenerateEvent::Started {
            prompt_tokens: self.prompt.len(),
        });
    }

    /// Tells the caller that it ended before it began.
    fn cancel(mut self) {
        let waited = self.arrived.elapsed().as_millis();
        let _ = (self.sink)(GenerateEvent::Finished(Finished {
            reason: FinishReason::Cancelled,
            prompt_tokens: self.prompt.len(),
            completion_tokens: 0,
            time_to_first_token_ms: None,
            duration_ms: u64::try_from(waited).unwrap_or(u64::MAX),
        }));
    }
}
