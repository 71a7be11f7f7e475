//! The engine alone, in this process: load, prefill, decode, memory.
//!
//! Prompts are random tokens, no two alike: no prefix that is kept and no text that repeats helps, as in
//! llama-bench. Answers are greedy and the tokens that end one are forbidden, so each has its full length.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use freehold_engine::{
    DeviceChoice, Engine, EngineOptions, FinishReason, Finished, GenerateEvent, GenerateRequest, ModelKind,
    Precision, Prompt, SamplingParams,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::numbers::{EngineFigures, Pace, Samples, rate};
use crate::commands::bench::Plan;

/// Longest prompt of the run before the first that counts.
const WARM_PROMPT: usize = 16;
/// A bias that no logit outweighs; the OpenAI API allows no larger one.
const FORBIDDEN: f32 = -100.0;
const SEED: u64 = 20_260_101;

/// Measures everything that `plan` asks of the engine. `step` is called after each run.
///
/// # Errors
/// When the model cannot be loaded or an answer fails.
pub fn measure(path: &Path, plan: &Plan, mut step: impl FnMut(&str)) -> Result<EngineFigures> {
    let most = plan.sequences.iter().copied().max().unwrap_or(1).max(1);
    let context = plan.prompt_tokens.max(plan.depth) + plan.decode_tokens + 1;
    let options = EngineOptions {
        // Whole blocks of KV cache, with one to spare.
        context_length: Some(u32::try_from(context.next_multiple_of(64) + 64)?),
        max_sequences: u32::try_from(most)?,
        threads: plan.threads,
        instructions: plan.instructions.clone(),
        precision: plan.precision,
        // What the machine computes is measured, and not what it need not compute.
        prefix_tokens: Some(0),
        speculate: false,
        ..EngineOptions::default()
    };
    let load = || -> Result<(Engine, f64)> {
        let started = Instant::now();
        let engine = Engine::load(path, &options, |_| ())
            .with_context(|| format!("failed to load {}", path.display()))?;
        Ok((engine, started.elapsed().as_secs_f64() * 1000.0))
    };
    let (engine, first_load) = load()?;
    if engine.kind() != ModelKind::Generate {
        bail!(
            "{} makes vectors and writes no text; bench measures models that write",
            path.display()
        );
    }
    let resident_loaded_bytes = resident();
    step("loaded");
    let mut bench = Bench::new(engine)?;
    // What the first pass over each buffer costs is no part of a pace.
    bench.run(most, plan.depth.min(WARM_PROMPT), plan.decode_tokens.min(8))?;
    step("warmed up");

    let mut prefill = Vec::new();
    let mut decode = vec![Vec::new(); plan.sequences.len()];
    // Round by round, so that what else the machine does hits every figure alike.
    for _ in 0..plan.rounds {
        prefill.push(bench.run(1, plan.prompt_tokens, 1)?.prefill);
        step("prefill");
        for (samples, &sequences) in decode.iter_mut().zip(&plan.sequences) {
            samples.push(bench.run(sequences, plan.depth, plan.decode_tokens + 1)?.decode);
            step("decode");
        }
    }
    let resident_worked_bytes = resident();
    let facts = bench.engine.facts().clone();
    let device = match bench.engine.device() {
        DeviceChoice::Auto | DeviceChoice::Cpu => "cpu",
        DeviceChoice::Cuda => "cuda",
        DeviceChoice::Metal => "metal",
    };
    drop(bench);
    let mut load_ms = vec![first_load];
    for _ in 1..plan.rounds {
        load_ms.push(load()?.1);
        step("loaded again");
    }
    Ok(EngineFigures {
        model: facts.summary(),
        file_bytes: facts.file_bytes,
        threads: plan.threads,
        device,
        instructions: plan
            .instructions
            .clone()
            .or_else(|| freehold_engine::instructions().into_iter().next())
            .unwrap_or_default(),
        precision: match plan.precision {
            Precision::Standard => "standard",
            Precision::High => "high",
            Precision::Float => "float",
        },
        load_ms: Samples::new(load_ms),
        resident_loaded_bytes,
        resident_worked_bytes,
        memory_bytes_per_second: None,
        prefill: Pace {
            sequences: 1,
            tokens: plan.prompt_tokens,
            tokens_per_second: Samples::new(prefill),
        },
        decode: plan
            .sequences
            .iter()
            .zip(decode)
            .map(|(&sequences, each)| Pace {
                sequences,
                tokens: plan.decode_tokens,
                tokens_per_second: Samples::new(each),
            })
            .collect(),
    })
}

/// How often `measure` calls its `step`.
#[must_use]
pub fn steps(plan: &Plan) -> usize {
    2 + plan.rounds * (1 + plan.sequences.len()) + plan.rounds.saturating_sub(1)
}

struct Bench {
    engine: Engine,
    random: StdRng,
    words: u32,
    sampling: SamplingParams,
}

/// Tokens/s of a run.
struct Speeds {
    prefill: f64,
    decode: f64,
}

/// What the sinks of one run see together.
struct Seen {
    /// Sequences that have written nothing yet.
    silent: usize,
    /// The sequence whose pieces are the clock, and its first and latest piece: when, and how many tokens
    /// the engine had written by then.
    clock: Option<Clock>,
    /// A sequence has ended: the batch is no longer whole.
    ended: bool,
}

#[derive(Clone, Copy)]
struct Clock {
    sequence: usize,
    first: (Instant, u64),
    latest: (Instant, u64),
}

impl Bench {
    fn new(engine: Engine) -> Result<Self> {
        let words = u32::try_from(engine.tokenizer().vocab_size())?;
        let ends = (0..words).filter(|&token| engine.tokenizer().is_end_of_generation(token));
        let sampling = SamplingParams {
            logit_bias: ends.map(|token| (token, FORBIDDEN)).collect(),
            ..SamplingParams::default()
        };
        Ok(Self {
            engine,
            random: StdRng::seed_from_u64(SEED),
            words,
            sampling,
        })
    }

    fn prompt(&mut self, tokens: usize) -> Vec<u32> {
        (0..tokens)
            .map(|_| self.random.random_range(0..self.words))
            .collect()
    }

    /// Answers `sequences` prompts of `prompt` tokens at once, each with `count` tokens.
    fn run(&mut self, sequences: usize, prompt: usize, count: usize) -> Result<Speeds> {
        let prompts: Vec<Vec<u32>> = (0..sequences).map(|_| self.prompt(prompt)).collect();
        let seen = Arc::new(Mutex::new(Seen {
            silent: sequences,
            clock: None,
            ended: false,
        }));
        let (sender, ends) = channel();
        let mut handles = Vec::new();
        for (sequence, prompt) in prompts.into_iter().enumerate() {
            let request = GenerateRequest {
                id: format!("bench-{sequence}"),
                prompt: Prompt::Tokens(prompt),
                max_tokens: Some(u32::try_from(count)?),
                max_context: None,
                scope: String::new(),
                constraint: None,
                stop: Vec::new(),
                sampling: self.sampling.clone(),
            };
            let (engine, seen, sender) = (self.engine.clone(), Arc::clone(&seen), sender.clone());
            let mut silent = true;
            let sink = Box::new(move |event| {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                match event {
                    GenerateEvent::Started { .. } => {}
                    GenerateEvent::Text { .. } => {
                        let now = (Instant::now(), engine.progress().tokens_generated);
                        seen.piece(sequence, std::mem::take(&mut silent), now);
                    }
                    GenerateEvent::Finished(finished) => {
                        seen.ended = true;
                        let _ = sender.send(finished);
                    }
                }
                ControlFlow::Continue(())
            });
            let handle = self.engine.generate(request, sink);
            handles.push(handle.map_err(|reason| anyhow!("the engine refused a request: {reason}"))?);
        }
        drop(sender);
        let ends: Vec<Finished> = ends.iter().collect();
        if let Some(end) = ends.iter().find(|end| end.reason != FinishReason::Length) {
            bail!("an answer ended with {:?} and not at its length", end.reason);
        }
        let first_ms = ends.iter().filter_map(|end| end.time_to_first_token_ms).min();
        let first_ms = first_ms.ok_or_else(|| anyhow!("the engine gave no answer"))?;
        let clock = seen.lock().unwrap_or_else(PoisonError::into_inner).clock;
        Ok(Speeds {
            prefill: rate(prompt as f64, first_ms as f64 / 1000.0),
            decode: clock
                .and_then(Clock::pace)
                .unwrap_or_else(|| outer_pace(&ends, first_ms)),
        })
    }
}

impl Seen {
    /// Takes note of a piece. The clock is the sequence that began last: from then on all run together, and
    /// its pieces come at the same place in every step.
    fn piece(&mut self, sequence: usize, first: bool, now: (Instant, u64)) {
        if first {
            self.silent -= 1;
            if self.silent == 0 && !self.ended {
                self.clock = Some(Clock {
                    sequence,
                    first: now,
                    latest: now,
                });
            }
        } else if let Some(clock) = &mut self.clock
            && clock.sequence == sequence
            && !self.ended
        {
            clock.latest = now;
        }
    }
}

impl Clock {
    /// Tokens/s of all sequences while all ran; None when there was just one piece.
    fn pace(self) -> Option<f64> {
        let (first, latest) = (self.first, self.latest);
        (latest.1 > first.1).then(|| {
            rate(
                (latest.1 - first.1) as f64,
                latest.0.duration_since(first.0).as_secs_f64(),
            )
        })
    }
}

/// Tokens/s from the first token of any answer to the end of the last: never too much. For answers that are
/// too short, or of too odd bytes, for the clock.
fn outer_pace(ends: &[Finished], first_ms: u64) -> f64 {
    let tokens: usize = ends
        .iter()
        .map(|end| end.completion_tokens.saturating_sub(1))
        .sum();
    let last_ms = ends.iter().map(|end| end.duration_ms).max().unwrap_or(first_ms);
    rate(tokens as f64, last_ms.saturating_sub(first_ms) as f64 / 1000.0)
}

/// Bytes of this process in memory, where the system tells.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_pace_of_a_batch_counts_only_while_the_whole_batch_runs() {
        let begun = Instant::now();
        let at = |ms, tokens| (begun + Duration::from_millis(ms), tokens);
        let mut seen = Seen {
            silent: 2,
            clock: None,
            ended: false,
        };
        seen.piece(0, true, at(100, 1));
        seen.piece(0, false, at(200, 2));
        assert!(seen.clock.is_none(), "the second sequence is still silent");
        seen.piece(1, true, at(300, 4));
        seen.piece(0, false, at(399, 6));
        seen.piece(1, false, at(400, 6));
        seen.piece(1, false, at(800, 14));
        seen.ended = true;
        seen.piece(1, false, at(5000, 15));
        // From 4 tokens at 300 ms to 14 at 800 ms.
        assert_eq!(seen.clock.and_then(Clock::pace), Some(20.0));
    }

    #[test]
    fn answers_too_short_for_the_clock_have_the_pace_from_first_token_to_last_end() {
        let end = |completion_tokens, duration_ms| Finished {
            reason: FinishReason::Length,
            prompt_tokens: 1,
            completion_tokens,
            time_to_first_token_ms: Some(100),
            duration_ms,
        };
        assert_eq!(outer_pace(&[end(3, 200), end(3, 300)], 100), 20.0);
        assert!(outer_pace(&[end(1, 100)], 100).is_nan());
    }
}
