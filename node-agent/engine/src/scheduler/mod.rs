//! The engine's one thread: takes requests, forms batches, hands out tokens (with the threads that compute, each of which
//! chooses those of some sequences).
//!
//! ```text
//! generate() ──▶ bounded queue ──▶ [ admit ─▶ batch ─▶ forward ─▶ sample ─▶ sink ] ──▶ caller
//!                                        ▲                  │
//!                                        └── cancelled, finished: blocks come back
//! ```
//! Continuous batching: every step holds a row of each answer under way, the rows of what is guessed to come
//! after it ([`lookup`], [`draft`]; whether that pays, [`cost`] and [`success`] know), and now and then a chunk
//! of a prompt, so seldom that the answers keep half their pace ([`pace`]). Admission goes by free blocks of
//! the cache; callers take turns ([`turns`]), and each of them is served in the order of its requests; a request
//! that begins like one that is being read waits for that and shares its blocks. Where blocks run out, the
//! answer that came last gives its own up, waits, and goes on where it was: nothing that was begun fails for
//! want of memory.

mod cost;
mod draft;
mod lookup;
mod pace;
mod sequence;
mod success;
mod turns;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::Instant;

use tracing::{debug, error, warn};

use crate::constrain::Guide;
use crate::device::Runner;
use crate::engine::{Counters, FinishReason, Sink, StepCount};
use crate::kernels::Compute;
use crate::kernels::attention::BLOCK_TOKENS;
use crate::kv::{BlockTable, KvCache, common_prefix};
use crate::tokenizer::Tokenizer;
use cost::StepCost;
pub(crate) use draft::DraftModel;
use pace::{Pace, shares};
use sequence::Sequence;
use success::Price;
use turns::Turns;

/// Prompt rows in a step of which all logits are wanted.
const SCORED_ROWS: usize = 32;

/// A request that was accepted.
pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_tokens: usize,
    pub(crate) stop: Vec<String>,
    pub(crate) sampling: crate::SamplingParams,
    /// What the answer must follow.
    pub(crate) guide: Option<Guide>,
    /// Where the log probabilities of the prompt's own tokens go, if they are wanted.
    pub(crate) score: Option<Sender<Vec<f32>>>,
    /// Whose prefixes it may share.
    pub(crate) scope: u64,
    /// Whose turn it takes.
    pub(crate) owner: u64,
    /// Whether to guess what comes next, and check it.
    pub(crate) speculate: bool,
    pub(crate) sink: Sink,
    pub(crate) cancelled: Arc<AtomicBool>,
    pub(crate) arrived: std::time::Instant,
}

/// The thread's state.
pub(crate) struct Scheduler {
    decoder: Runner,
    tokenizer: Arc<Tokenizer>,
    cache: KvCache,
    jobs: Receiver<Job>,
    counters: Arc<Counters>,
    max_sequences: usize,
    waiting: VecDeque<Sequence>,
    /// In order of arrival.
    running: Vec<Sequence>,
    /// Sequences so far.
    count: u64,
    draft: Option<DraftModel>,
    pace: Pace,
    cost: StepCost,
    turns: Turns,
}

/// A sequence whose rows are all computed, and what it makes of their logits.
struct Choice<'a> {
    /// Among those that run.
    index: usize,
    sequence: &'a mut Sequence,
    /// After its last row, and after each guessed one.
    logits: Vec<&'a mut [f32]>,
    wrote: bool,
    guessed: usize,
    /// Tokens that were chosen.
    chosen: usize,
    reason: Option<FinishReason>,
}

impl Choice<'_> {
    /// On a thread that computes: nothing in here may have something else computed.
    fn make(&mut self, tokenizer: &Tokenizer) {
        let logits = self.logits.iter_mut().map(|logits| &mut **logits);
        (self.chosen, self.reason) = self.sequence.take_all(logits, tokenizer);
    }
}

impl Scheduler {
    pub(crate) fn new(
        decoder: Runner,
        tokenizer: Arc<Tokenizer>,
        cache: KvCache,
        jobs: Receiver<Job>,
        counters: Arc<Counters>,
        max_sequences: usize,
        draft: Option<DraftModel>,
    ) -> Self {
        let pace = Pace::new(decoder.compute().is_some_and(Compute::units_read_prompts));
        Self {
            decoder,
            tokenizer,
            cache,
            jobs,
            counters,
            max_sequences,
            waiting: VecDeque::new(),
            running: Vec::new(),
            count: 0,
            draft,
            pace,
            cost: StepCost::default(),
            turns: Turns::default(),
        }
    }

    /// Runs until every handle on the engine is gone. Sleeps while there is nothing to do.
    pub(crate) fn run(mut self) {
        loop {
            if self.running.is_empty() && self.waiting.is_empty() {
                self.counters.rest();
                self.cache.trim();
                if let Some(draft) = &mut self.draft {
                    draft.rest();
                }
                match self.jobs.recv() {
                    Ok(job) => self.wait(job),
                    Err(_) => return,
                }
            }
            loop {
                match self.jobs.try_recv() {
                    Ok(job) => self.wait(job),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        self.stop();
                        return;
                    }
                }
            }
            self.drop_cancelled();
            self.admit();
            self.counters
                .set_load(self.running.len(), self.waiting.len(), self.cache.used_blocks());
            if !self.running.is_empty()
                && let Err(failure) = self.step()
            {
                error!(error = %failure, "Failed to compute a step; its answers end");
                for mut sequence in std::mem::take(&mut self.running) {
                    // What a broken step wrote must not be shared: released as it was published before.
                    self.cache.release(&mut sequence.table);
                    self.counters.leave();
                    sequence.finish(FinishReason::Error(failure.clone()));
                }
            }
        }
    }

    fn wait(&mut self, job: Job) {
        self.count += 1;
        let compute = self.decoder.compute();
        let reads_apart = compute.is_some_and(Compute::units_read_prompts);
        self.waiting
            .push_back(Sequence::new(job, self.count, reads_apart));
    }

    fn stop(&mut self) {
        let sequences = std::mem::take(&mut self.running)
            .into_iter()
            .chain(std::mem::take(&mut self.waiting));
        for sequence in sequences {
            self.counters.leave();
            sequence.finish(FinishReason::Cancelled);
        }
    }

    fn drop_cancelled(&mut self) {
        let cancelled = |sequence: &Sequence| sequence.cancelled.load(Ordering::Relaxed);
        let waiting = std::mem::take(&mut self.waiting).into_iter();
        let (gone, staying): (VecDeque<_>, VecDeque<_>) = waiting.partition(cancelled);
        self.waiting = staying;
        let running = std::mem::take(&mut self.running).into_iter();
        let (also_gone, staying): (Vec<_>, Vec<_>) = running.partition(cancelled);
        self.running = staying;
        for mut sequence in gone.into_iter().chain(also_gone) {
            debug!(request = %sequence.id, "Dropped a cancelled request");
            sequence.leave_cache(&mut self.cache);
            self.counters.leave();
            sequence.finish(FinishReason::Cancelled);
        }
    }

    /// Lets those in that waited: first those that were set aside, then callers in turn, each in the order of its
    /// requests. One that begins like one that is being read waits for it, and holds up nobody.
    fn admit(&mut self) {
        let mut following = Vec::new();
        while self.running.len() < self.max_sequences {
            let waiting = self.waiting.iter().enumerate();
            let next = waiting
                .filter(|(_, one)| !following.contains(&one.number))
                .min_by_key(|(index, one)| (!one.was_begun(), self.turns.last(one.owner), *index));
            let Some((index, next)) = next else {
                return;
            };
            if self.follows(next) {
                following.push(next.number);
                continue;
            }
            // Room for its text, and a block's growth for each that runs.
            let (shareable, tokens) = (next.shareable(), next.tokens.len());
            let blocks = self.cache.blocks_wanted(next.scope(), shareable, tokens) + self.running.len();
            if !self.running.is_empty() && blocks > self.cache.available_blocks() {
                return;
            }
            let Some(mut next) = self.waiting.remove(index) else {
                return;
            };
            if !next.was_begun() {
                self.turns.took(next.owner);
            }
            next.admit(&mut self.cache);
            self.counters.shared(next.position);
            self.running.push(next);
        }
    }

    /// Whether one that runs is about to compute the beginning of this one.
    fn follows(&self, next: &Sequence) -> bool {
        let tokens = next.shareable();
        let useful = tokens.len().saturating_sub(1);
        let mut known = None;
        self.running
            .iter()
            .filter(|one| !one.writes() && one.scope() == next.scope())
            .any(|one| {
                let common = common_prefix(one.shareable(), &tokens[..useful]);
                let known = *known.get_or_insert_with(|| self.cache.known_prefix(next.scope(), tokens));
                // What it will have computed, and this one lacks: worth a block at least.
                one.position < common && common >= known + BLOCK_TOKENS
            })
    }

    /// Makes room for the rows of this step. Answers that came last give way.
    fn make_room(&mut self, shares: &mut Vec<usize>) {
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &mut self.running[index];
            let end = sequence.position + shares[index];
            let guessed = sequence.guessed();
            if self.cache.reserve(&mut sequence.table, end + guessed) {
                index += 1;
                continue;
            }
            if guessed > 0 {
                sequence.forget_guess();
                continue;
            }
            // The last to come gives way: to an earlier one, or, last itself, to those before it.
            shares.pop();
            if let Some(mut last) = self.running.pop() {
                debug!(request = %last.id, "Set an answer aside until there is room in the cache");
                last.forget_guess();
                last.leave_cache(&mut self.cache);
                self.counters.preempted();
                self.waiting.push_front(last);
            }
        }
    }

    /// Rows of each that runs: one of each that writes, a share of each prompt.
    fn shares(&mut self) -> Vec<usize> {
        let writing = self.running.iter().filter(|one| one.writes()).count();
        let prompts: Vec<usize> = self
            .running
            .iter()
            .filter(|one| !one.writes())
            .map(Sequence::readable)
            .collect();
        let budget = self.pace.prompt_rows(writing, prompts.iter().sum());
        let reads = !prompts.is_empty() && budget > 0;
        let price = Price {
            rows: writing,
            fixed_rows: self.cost.fixed_rows(),
            guess: 0.0,
        };
        let mut prompt_shares = shares(&prompts, budget).into_iter();
        let shares = self
            .running
            .iter_mut()
            .map(|sequence| {
                if sequence.writes() {
                    // Beside a prompt every row is dear.
                    if reads {
                        sequence.forget_guess();
                    } else {
                        sequence.guess(price, &self.tokenizer);
                    }
                    return 1;
                }
                let share = prompt_shares.next().unwrap_or(0);
                // Logits of each row take memory.
                if sequence.is_scored() {
                    share.min(SCORED_ROWS)
                } else {
                    share
                }
            })
            .collect();
        if !reads
            && let Some(draft) = &mut self.draft
            && let Err(failure) = draft.guess(&mut self.running, price)
        {
            warn!(error = %failure, "Goes on without the draft model");
            self.draft = None;
        }
        shares
    }

    /// One forward pass over everything that runs.
    fn step(&mut self) -> Result<(), String> {
        let mut shares = self.shares();
        let began = Instant::now();
        self.make_room(&mut shares);
        if self.running.is_empty() {
            return Ok(());
        }
        let mut rows = Vec::new();
        for (index, (sequence, share)) in self.running.iter().zip(&shares).enumerate() {
            sequence.push_rows(index, *share, &mut rows);
        }
        let tables: Vec<&BlockTable> = self.running.iter().map(|sequence| &sequence.table).collect();
        let (decoder, cache, rows) = (&mut self.decoder, &mut self.cache, rows.as_slice());
        // A broken assertion in a kernel ends the answers under way, and not the worker.
        let forward = AssertUnwindSafe(|| decoder.forward(rows, &tables, cache));
        catch_unwind(forward)
            .map_err(|_| "a kernel stopped at an assertion".to_owned())?
            .map_err(|error| format!("the device failed: {error}"))?;
        let mut step = StepCount::default();
        let choose = AssertUnwindSafe(|| self.choose(&shares, &mut step));
        let finished =
            catch_unwind(choose).map_err(|_| "choosing tokens stopped at an assertion".to_owned())?;
        let took = began.elapsed();
        self.pace.took(step.decode_rows, step.prompt_rows, took);
        if step.prompt_rows == 0 {
            self.cost.took(step.decode_rows, took);
            if let Some(draft) = &mut self.draft {
                draft.step_took(took);
            }
        }
        self.counters.step(&step);
        for (index, reason) in finished.into_iter().rev() {
            let mut sequence = self.running.remove(index);
            sequence.leave_cache(&mut self.cache);
            self.counters.leave();
            sequence.finish(reason);
        }
        Ok(())
    }

    /// Lets every sequence whose rows are all computed choose its next token, or as many as were guessed rightly. Gives
    /// those that are complete, and why.
    fn choose(&mut self, shares: &[usize], step: &mut StepCount) -> Vec<(usize, FinishReason)> {
        let vocab_size = self.decoder.config().vocab_size.max(1);
        let pool = self.decoder.compute().map(|compute| compute.pool.clone());
        let mut logits = self.decoder.logits().chunks_exact_mut(vocab_size);
        let mut choices = Vec::new();
        for (index, (sequence, share)) in self.running.iter_mut().zip(shares).enumerate() {
            let wrote = sequence.writes() && !sequence.reads_apart();
            let guessed = sequence.guessed();
            if wrote {
                step.decode_rows += 1 + guessed;
                step.writing += 1;
                step.guessed += guessed;
            } else {
                step.prompt_rows += share;
            }
            let complete = sequence.remaining() == *share;
            for row in 0..sequence.scored_rows(*share) {
                if let Some(logits) = logits.next() {
                    sequence.score(row, logits);
                }
            }
            sequence.computed(*share);
            if !complete {
                sequence.publish(&mut self.cache, false);
                continue;
            }
            choices.push(Choice {
                index,
                sequence,
                logits: logits.by_ref().take(1 + guessed).collect(),
                wrote,
                guessed,
                chosen: 0,
                reason: None,
            });
        }
        // A vocabulary is long: each thread looks for some sequences' tokens.
        let tokenizer = &*self.tokenizer;
        match pool {
            Some(pool) => pool.for_each_chunk(&mut choices, 1, |_, choices| {
                choices.iter_mut().for_each(|choice| choice.make(tokenizer));
            }),
            None => choices.iter_mut().for_each(|choice| choice.make(tokenizer)),
        }
        let mut finished = Vec::new();
        for choice in choices {
            step.generated += choice.chosen;
            step.accepted += choice.chosen.saturating_sub(1).min(choice.guessed);
            // The end of a prompt is published whole: its followers go on from there.
            choice.sequence.publish(&mut self.cache, !choice.wrote);
            if let Some(reason) = choice.reason {
                finished.push((choice.index, reason));
            }
        }
        finished
    }
}
