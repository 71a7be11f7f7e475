//! One answer under way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::Job;
use crate::engine::{FinishReason, Finished, GenerateEvent, Sink, TokenLogprob};
use crate::kv::BlockTable;
use crate::model::Row;
use crate::sampling::Sampler;
use crate::stop::StopStrings;
use crate::tokenizer::Tokenizer;
use crate::utf8::Utf8Stream;

pub(super) struct Sequence {
    pub(super) id: String,
    pub(super) table: BlockTable,
    pub(super) cancelled: Arc<AtomicBool>,
    prompt: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    position: usize,
    /// The token that was sampled last and goes into the next step.
    next: Option<u32>,
    generated: usize,
    max_tokens: usize,
    sampler: Sampler,
    wants_logprobs: bool,
    stop: StopStrings,
    text: Utf8Stream,
    /// Tokens whose text was held back so far.
    held: Vec<TokenLogprob>,
    sink: Sink,
    arrived: Instant,
    first_token: Option<Instant>,
}

impl Sequence {
    pub(super) fn new(mut job: Job, table: BlockTable) -> Self {
        job.start();
        let wants_logprobs = job.sampling.logprobs.is_some();
        Self {
            sampler: Sampler::new(job.sampling, &job.prompt),
            wants_logprobs,
            id: job.id,
            table,
            cancelled: job.cancelled,
            prompt: job.prompt,
            position: 0,
            next: None,
            generated: 0,
            max_tokens: job.max_tokens,
            stop: StopStrings::new(&job.stop),
            text: Utf8Stream::default(),
            held: Vec::new(),
            sink: job.sink,
            arrived: job.arrived,
            first_token: None,
        }
    }

    /// Adds this sequence's rows to a step: its last token, or the next part of its prompt.
    pub(super) fn push_rows(&mut self, index: usize, budget: &mut usize, rows: &mut Vec<Row>) {
        if let Some(token) = self.next {
            rows.push(Row {
                token,
                position: self.position,
                sequence: index,
                wants_logits: true,
            });
            self.position += 1;
            return;
        }
        let part = self.prompt.len().saturating_sub(self.position).min(*budget);
        *budget -= part;
        for _ in 0..part {
            let Some(&token) = self.prompt.get(self.position) else {
                return;
            };
            self.position += 1;
            let wants_logits = self.position == self.prompt.len();
            rows.push(Row {
                token,
                position: self.position - 1,
                sequence: index,
                wants_logits,
            });
        }
    }

    /// Takes the logits after its last row. Gives the reason when the answer is complete.
    pub(super) fn take(&mut self, logits: &mut [f32], tokenizer: &Tokenizer) -> Option<FinishReason> {
        let sampled = self.sampler.sample(logits);
        self.first_token.get_or_insert_with(Instant::now);
        self.next = Some(sampled.token);
        self.generated += 1;
        let ends = tokenizer.is_end_of_generation(sampled.token);
        let mut bytes = Vec::new();
        if !ends {
            tokenizer.append_bytes(sampled.token, &mut bytes);
        }
        if self.wants_logprobs && !ends {
            let describe = |token: u32, logprob: f32| {
                let mut bytes = Vec::new();
                tokenizer.append_bytes(token, &mut bytes);
                TokenLogprob {
                    token,
                    text: String::from_utf8_lossy(&bytes).into_owned(),
                    bytes,
                    logprob,
                    top: Vec::new(),
                }
            };
            let mut entry = describe(sampled.token, sampled.logprob.unwrap_or(f32::NEG_INFINITY));
            entry.top = sampled
                .top
                .iter()
                .map(|&(token, logprob)| describe(token, logprob))
                .collect();
            self.held.push(entry);
        }
        let mut text = self.text.push(&bytes);
        let done = ends || self.generated >= self.max_tokens;
        if done {
            text.push_str(&self.text.finish());
        }
        let (mut shown, stopped) = self.stop.push(&text);
        if done && !stopped {
            shown.push_str(&self.stop.finish());
        }
        if (!shown.is_empty() || (done && !self.held.is_empty()))
            && !self.send(GenerateEvent::Text {
                text: shown,
                tokens: Vec::new(),
            })
        {
            return Some(FinishReason::Cancelled);
        }
        if ends || stopped {
            Some(FinishReason::Stop)
        } else if done {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    /// Hands an event over; the tokens that were held back go with it. False when nobody listens.
    fn send(&mut self, event: GenerateEvent) -> bool {
        let event = match event {
            GenerateEvent::Text { text, .. } => GenerateEvent::Text {
                text,
                tokens: std::mem::take(&mut self.held),
            },
            other => other,
        };
        let listens = (self.sink)(event).is_continue();
        if !listens {
            self.cancelled.store(true, Ordering::Relaxed);
        }
        listens
    }

    /// Says how it ended.
    pub(super) fn finish(mut self, reason: FinishReason) {
        let milliseconds =
            |to: Instant| u64::try_from(to.duration_since(self.arrived).as_millis()).unwrap_or(u64::MAX);
        let finished = Finished {
            reason,
            prompt_tokens: self.prompt.len(),
            completion_tokens: self.generated,
            time_to_first_token_ms: self.first_token.map(milliseconds),
            duration_ms: milliseconds(Instant::now()),
        };
        let _ = (self.sink)(GenerateEvent::Finished(finished));
    }
}
