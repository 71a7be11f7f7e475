//! One answer under way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Instant;

use super::Job;
use super::lookup::Lookup;
use super::success::{Price, Success};
use crate::constrain::Guide;
use crate::engine::{FinishReason, Finished, GenerateEvent, Sink, TokenLogprob};
use crate::kernels::attention::BLOCK_TOKENS;
use crate::kernels::vector::log_sum_exp;
use crate::kv::{BlockTable, KvCache};
use crate::model::Row;
use crate::sampling::{Sampler, logprob};
use crate::stop::StopStrings;
use crate::tokenizer::Tokenizer;
use crate::utf8::Utf8Stream;

/// Who guessed what comes next.
#[derive(Clone, Copy, Debug)]
enum Guesser {
    /// What was written before.
    Text,
    /// What the answer must follow.
    Grammar,
    /// A second model.
    Draft,
}

pub(super) struct Sequence {
    pub(super) id: String,
    /// No other sequence of this engine has it.
    pub(super) number: u64,
    /// Whose turn it takes.
    pub(super) owner: u64,
    pub(super) table: BlockTable,
    pub(super) cancelled: Arc<AtomicBool>,
    /// Prompt and answer.
    pub(super) tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    pub(super) position: usize,
    prompt_tokens: usize,
    /// Whether rows of its prompt are computed apart, by matrix units: not in a step with rows of its answer, and what those
    /// leave in the cache is not what a prompt of the same text would.
    reads_apart: bool,
    max_tokens: usize,
    lookup: Option<Lookup>,
    /// Tokens guessed for this step; their rows follow the last token's.
    guess: Vec<u32>,
    /// Whose guess it is: each is judged by its own.
    guesser: Guesser,
    /// How often what a grammar demands was cut into tokens as the model cuts it.
    forced: Success,
    /// Log probabilities of the prompt's tokens, the first left out, and where they go.
    score: Option<(Vec<f32>, Sender<Vec<f32>>)>,
    sampler: Sampler,
    guide: Option<Guide>,
    wants_logprobs: bool,
    stop: StopStrings,
    text: Utf8Stream,
    /// Tokens whose text was held back so far.
    held: Vec<TokenLogprob>,
    sink: Sink,
    started: bool,
    arrived: Instant,
    first_token: Option<Instant>,
}

impl Sequence {
    pub(super) fn new(job: Job, number: u64, reads_apart: bool) -> Self {
        let wants_logprobs = job.sampling.logprobs.is_some();
        Self {
            sampler: Sampler::new(job.sampling, &job.prompt),
            score: job.score.map(|to| (Vec::new(), to)),
            guide: job.guide,
            wants_logprobs,
            id: job.id,
            number,
            owner: job.owner,
            table: BlockTable::new(job.scope),
            cancelled: job.cancelled,
            prompt_tokens: job.prompt.len(),
            tokens: job.prompt,
            position: 0,
            reads_apart,
            max_tokens: job.max_tokens,
            lookup: job.speculate.then(Lookup::default),
            guess: Vec::new(),
            guesser: Guesser::Text,
            // How else would it be cut?
            forced: Success::expected(0.9),
            stop: StopStrings::new(&job.stop),
            text: Utf8Stream::default(),
            held: Vec::new(),
            sink: job.sink,
            started: false,
            arrived: job.arrived,
            first_token: None,
        }
    }

    /// Whether it was admitted before: it was set aside then, and goes on.
    pub(super) fn was_begun(&self) -> bool {
        self.started
    }

    pub(super) fn scope(&self) -> u64 {
        self.table.scope()
    }

    /// Rows that must be computed before the next token can be chosen.
    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.position
    }

    /// Rows that a step may hold of those.
    pub(super) fn readable(&self) -> usize {
        if self.reads_apart() {
            self.prompt_tokens - self.position
        } else {
            self.remaining()
        }
    }

    /// Tokens at the beginning that others may have computed, or use.
    pub(super) fn shareable(&self) -> &[u32] {
        if self.reads_apart {
            &self.tokens[..self.prompt_tokens]
        } else {
            &self.tokens
        }
    }

    /// Whether the next row is the prompt's, and computed apart.
    pub(super) fn reads_apart(&self) -> bool {
        self.reads_apart && self.position < self.prompt_tokens
    }

    /// Whether it writes: everything but the last token is in the cache.
    pub(super) fn writes(&self) -> bool {
        self.remaining() == 1
    }

    fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Takes its place in the batch, with what the cache knows of its beginning.
    pub(super) fn admit(&mut self, cache: &mut KvCache) {
        let mut table = std::mem::take(&mut self.table);
        self.position = cache.attach(&mut table, self.shareable());
        self.table = table;
        if !self.started {
            self.started = true;
            let _ = (self.sink)(GenerateEvent::Started {
                prompt_tokens: self.prompt_tokens,
            });
        }
    }

    /// Gives its blocks back. What it wrote stays, its text at least; it goes on when it is admitted again.
    pub(super) fn leave_cache(&mut self, cache: &mut KvCache) {
        self.publish(cache, true);
        cache.release(&mut self.table);
        self.position = 0;
    }

    /// Guesses what comes next, if that pays in a step of this price.
    pub(super) fn guess(&mut self, price: Price, tokenizer: &Tokenizer) {
        self.guess.clear();
        let most = self.room_for_guess();
        let Some(lookup) = &mut self.lookup else { return };
        self.guesser = Guesser::Text;
        if let Some(guide) = &mut self.guide {
            // What must come is surer than what came before.
            let most = most.min(self.forced.next(price));
            let mut forced = if most == 0 {
                Vec::new()
            } else {
                guide.forced(tokenizer)
            };
            forced.truncate(most);
            if !forced.is_empty() {
                self.guess = forced;
                self.guesser = Guesser::Grammar;
                return;
            }
        }
        self.guess = lookup.guess(&self.tokens, price, most);
    }

    /// Tokens that may be guessed: the last one of an answer is chosen in any case.
    pub(super) fn room_for_guess(&self) -> usize {
        if self.reads_apart && self.generated() == 0 {
            return 0;
        }
        self.max_tokens.saturating_sub(self.generated() + 1)
    }

    /// Whether a draft model may guess for it.
    pub(super) fn wants_guess(&self) -> bool {
        self.lookup.is_some() && self.guess.is_empty() && self.writes()
    }

    /// Takes a draft model's guess.
    pub(super) fn set_guess(&mut self, guess: Vec<u32>) {
        if !guess.is_empty() {
            self.guesser = Guesser::Draft;
        }
        self.guess = guess;
    }

    /// Goes without guessing in this step.
    pub(super) fn forget_guess(&mut self) {
        self.guess.clear();
    }

    pub(super) fn guessed(&self) -> usize {
        self.guess.len()
    }

    /// Adds this sequence's rows to a step: `count` tokens, and those that are guessed after the last one.
    pub(super) fn push_rows(&self, index: usize, count: usize, rows: &mut Vec<Row>) {
        let end = (self.position + count).min(self.tokens.len());
        for position in self.position..end {
            rows.push(Row {
                token: self.tokens[position],
                position,
                sequence: index,
                wants_logits: self.score.is_some() || position + 1 == self.tokens.len(),
                of_prompt: position < self.prompt_tokens,
            });
        }
        if end < self.tokens.len() {
            return;
        }
        for (offset, &token) in self.guess.iter().enumerate() {
            rows.push(Row {
                token,
                position: end + offset,
                sequence: index,
                wants_logits: true,
                of_prompt: false,
            });
        }
    }

    /// Whether the logits of all its prompt rows are wanted.
    pub(super) fn is_scored(&self) -> bool {
        self.score.is_some()
    }

    /// Of `count` rows, those whose logits tell about a token of the prompt.
    pub(super) fn scored_rows(&self, count: usize) -> usize {
        if self.score.is_none() {
            return 0;
        }
        count.min(self.prompt_tokens.saturating_sub(self.position + 1))
    }

    /// Takes note of the prompt's token that follows row `row` of this step.
    pub(super) fn score(&mut self, row: usize, logits: &[f32]) {
        let next = self.tokens.get(self.position + row + 1).copied();
        if let (Some((scores, _)), Some(next)) = (&mut self.score, next) {
            let logit = logits.get(next as usize).copied().unwrap_or(f32::NEG_INFINITY);
            scores.push(logprob(logit, log_sum_exp(logits)));
        }
    }

    /// Says that `count` rows of its tokens are in the cache now.
    pub(super) fn computed(&mut self, count: usize) {
        self.position = (self.position + count).min(self.tokens.len());
    }

    /// Takes the logits after its last row, `[vocabulary]`, and after each guessed one, as long as the guesses
    /// come true. Gives how many tokens were chosen, and the reason when the answer is complete.
    pub(super) fn take_all<'a>(
        &mut self,
        logits: impl Iterator<Item = &'a mut [f32]>,
        tokenizer: &Tokenizer,
    ) -> (usize, Option<FinishReason>) {
        let guess = std::mem::take(&mut self.guess);
        let mut chosen = 0;
        let mut reason = None;
        for logits in logits {
            reason = self.take(logits, tokenizer);
            chosen += 1;
            if reason.is_some() || self.tokens.last() != guess.get(chosen - 1) {
                break;
            }
            // The guessed token's key and value are what the real one's would be.
            self.position += 1;
        }
        let hits = self.tokens[self.tokens.len() - chosen..]
            .iter()
            .zip(&guess)
            .take_while(|(chosen, guessed)| chosen == guessed)
            .count();
        match (self.guesser, &mut self.lookup) {
            (Guesser::Text, Some(lookup)) => lookup.came_true(guess.len(), hits),
            (Guesser::Grammar, _) => self.forced.came_true(guess.len(), hits),
            // It sees for itself.
            (Guesser::Draft, _) | (Guesser::Text, None) => {}
        }
        (chosen, reason)
    }

    /// Lets others use what it computed: whole blocks as they fill, and the rest when `all` is wanted.
    pub(super) fn publish(&mut self, cache: &mut KvCache, all: bool) {
        let ready = if all {
            self.position
        } else {
            self.position - self.position % BLOCK_TOKENS
        };
        let ready = ready.min(self.shareable().len());
        if ready > self.table.published() {
            cache.publish(&mut self.table, &self.tokens[..ready]);
        }
    }

    /// Takes the logits after its last row. Gives the reason when the answer is complete.
    fn take(&mut self, logits: &mut [f32], tokenizer: &Tokenizer) -> Option<FinishReason> {
        let sampled = match &mut self.guide {
            None => self.sampler.sample(logits),
            Some(guide) => match self.sampler.sample_allowed(logits, guide) {
                Ok(sampled) => sampled,
                Err(error) => return Some(FinishReason::Error(error)),
            },
        };
        self.first_token.get_or_insert_with(Instant::now);
        self.tokens.push(sampled.token);
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
        let mut complete = ends;
        if let (Some(guide), false) = (&mut self.guide, ends) {
            match guide.advance(sampled.token) {
                Ok(stopped) => complete = stopped,
                Err(error) => return Some(FinishReason::Error(error)),
            }
        }
        let mut text = self.text.push(&bytes);
        let done = complete || self.generated() >= self.max_tokens;
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
        if complete || stopped {
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
        if let Some((scores, to)) = self.score.take() {
            // Nobody may want them any more.
            let _ = to.send(scores);
        }
        let milliseconds =
            |to: Instant| u64::try_from(to.duration_since(self.arrived).as_millis()).unwrap_or(u64::MAX);
        let finished = Finished {
            reason,
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.generated(),
            time_to_first_token_ms: self.first_token.map(milliseconds),
            duration_ms: milliseconds(Instant::now()),
        };
        let _ = (self.sink)(GenerateEvent::Finished(finished));
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;
    use crate::inspect::KvType;
    use crate::kv::KvShape;

    const PROMPT: u32 = 40;
    const ANSWER: u32 = 30;

    fn sequence(reads_apart: bool) -> Sequence {
        let job = Job {
            id: String::new(),
            prompt: (0..PROMPT).collect(),
            max_tokens: 100,
            stop: Vec::new(),
            sampling: crate::SamplingParams::default(),
            guide: None,
            score: None,
            scope: 0,
            owner: 0,
            speculate: true,
            sink: Box::new(|_| ControlFlow::Continue(())),
            cancelled: Arc::default(),
            arrived: Instant::now(),
        };
        Sequence::new(job, 1, reads_apart)
    }

    /// Computes all rows that are left, as steps do; of how many the units would be, step by step.
    fn compute(sequence: &mut Sequence, cache: &mut KvCache) -> Vec<(usize, usize)> {
        let mut steps = Vec::new();
        while sequence.remaining() > 0 {
            let count = sequence.readable();
            assert!(cache.reserve(&mut sequence.table, sequence.position + count));
            let mut rows = Vec::new();
            sequence.push_rows(0, count, &mut rows);
            steps.push((rows.len(), rows.iter().filter(|row| row.of_prompt).count()));
            sequence.computed(count);
        }
        steps
    }

    /// Needs no units: what is held apart for them is decided here.
    #[test]
    fn where_prompts_are_computed_apart_rows_do_not_mix_and_answers_are_not_shared() {
        for apart in [false, true] {
            let shape = KvShape {
                layers: 1,
                kv_heads: 1,
                head_dim: 4,
            };
            let mut cache = KvCache::new(shape, KvType::F16, 8, 8);
            let mut one = sequence(apart);
            one.admit(&mut cache);
            assert_eq!(one.room_for_guess() == 0, apart, "beside the prompt's last row");
            assert_eq!(compute(&mut one, &mut cache), [(40, 40)]);
            one.publish(&mut cache, true);
            one.tokens.extend(100..100 + ANSWER);
            assert!(one.room_for_guess() > 0 && !one.reads_apart());
            assert_eq!(compute(&mut one, &mut cache), [(30, 0)]);
            // Set aside: what it wrote is known to others unless a prompt of the same text would have left something else.
            one.leave_cache(&mut cache);
            let known = cache.known_prefix(0, &[one.tokens.as_slice(), &[7, 7]].concat());
            assert_eq!(known, if apart { 40 } else { 70 });
            one.admit(&mut cache);
            if apart {
                // The prompt's last token by the units, what it wrote not.
                assert_eq!(one.position, 39);
                assert_eq!(compute(&mut one, &mut cache), [(1, 1), (30, 0)]);
            } else {
                assert_eq!(one.position, 69);
                assert_eq!(compute(&mut one, &mut cache), [(1, 0)]);
            }
            one.leave_cache(&mut cache);
        }
    }
}
