//! From logits to the next token.

use std::collections::HashMap;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::Reject;
use crate::kernels::vector::argmax;

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability at temperature 1, if asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens with theirs, if asked for.
    pub top: Vec<(u32, f32)>,
}

/// Chooses the tokens of one answer.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    rng: StdRng,
    /// How often each token is in the answer.
    answered: HashMap<u32, u32>,
    /// Tokens of the prompt, for the repetition penalty.
    prompt: Vec<u32>,
}

impl Sampler {
    /// A sampler for an answer to `prompt`.
    #[must_use]
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        let rng = match params.seed {
            Some(seed) => StdRng::seed_from_u64(seed),
            None => StdRng::from_os_rng(),
        };
        let prompt = if penalises_repetition(&params) {
            prompt.to_vec()
        } else {
            Vec::new()
        };
        Self {
            params,
            rng,
            answered: HashMap::new(),
            prompt,
        }
    }

    /// Chooses from `logits` (one for each token of the vocabulary), which it changes.
    pub fn sample(&mut self, logits: &mut [f32]) -> Sampled {
        self.adjust(logits);
        let best = argmax(logits).unwrap_or(0) as u32;
        let (logprob_base, top) = self.report(logits);
        let token = if self.params.temperature < 1e-5 {
            best
        } else {
            self.draw(logits, best)
        };
        if self.params.frequency_penalty != 0.0
            || self.params.presence_penalty != 0.0
            || penalises_repetition(&self.params)
        {
            *self.answered.entry(token).or_default() += 1;
        }
        let logprob =
            logprob_base.map(|base| logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY) - base);
        Sampled { token, logprob, top }
    }

    fn adjust(&self, logits: &mut [f32]) {
        for (token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        if penalises_repetition(&self.params) {
            let penalty = self.params.repetition_penalty;
            let mut seen: Vec<u32> = self.prompt.iter().chain(self.answered.keys()).copied().collect();
            seen.sort_unstable();
            seen.dedup();
            for token in seen {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = if *logit > 0.0 {
                        *logit / penalty
                    } else {
                        *logit * penalty
                    };
                }
            }
        }
        for (token, count) in &self.answered {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit -= self.params.frequency_penalty * *count as f32 + self.params.presence_penalty;
            }
        }
    }

    /// The logarithm of the sum of exponentials, and the most likely tokens.
    fn report(&self, logits: &[f32]) -> (Option<f32>, Vec<(u32, f32)>) {
        let Some(count) = self.params.logprobs else {
            return (None, Vec::new());
        };
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit - most).exp()).sum();
        let base = most + sum.ln() as f32;
        let mut ranked: Vec<(u32, f32)> = logits
            .iter()
            .enumerate()
            // What a grammar took out is no alternative, and minus infinity is no number in JSON.
            .filter(|(_, logit)| logit.is_finite())
            .map(|(token, &logit)| (token as u32, logit))
            .collect();
        let count = (count as usize).min(ranked.len());
        if count > 0 && count < ranked.len() {
            ranked.select_nth_unstable_by(count - 1, |a, b| b.1.total_cmp(&a.1));
        }
        ranked.truncate(count);
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        (
            Some(base),
            ranked
                .into_iter()
                .map(|(token, logit)| (token, logit - base))
                .collect(),
        )
    }

    fn draw(&mut self, logits: &[f32], best: u32) -> u32 {
        let temperature = self.params.temperature;
        let most = logits.get(best as usize).copied().unwrap_or(0.0);
        // e^-25 of the best: together less than a millionth over any vocabulary; keeps the sort short.
        let floor = most - 25.0 * temperature;
        let mut candidates: Vec<(f32, u32)> = logits
            .iter()
            .enumerate()
            .filter(|(_, logit)| **logit >= floor)
            .map(|(token, &logit)| (((logit - most) / temperature).exp(), token as u32))
            .collect();
        candidates.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        if self.params.top_k > 0 {
            candidates.truncate(self.params.top_k as usize);
        }
        if self.params.min_p > 0.0 {
            // The best has weight 1, so a weight is relative to it already.
            candidates.retain(|(weight, _)| *weight >= self.params.min_p);
        }
        if self.params.top_p > 0.0 && self.params.top_p < 1.0 {
            let total: f32 = candidates.iter().map(|(weight, _)| weight).sum();
            let mut sum = 0.0;
            let wanted = candidates.iter().position(|(weight, _)| {
                sum += weight / total;
                sum >= self.params.top_p
            });
            candidates.truncate(wanted.map_or(candidates.len(), |at| at + 1));
        }
        let total: f32 = candidates.iter().map(|(weight, _)| weight).sum();
        let mut point = self.rng.random::<f32>() * total;
        for (weight, token) in &candidates {
            point -= weight;
            if point < 0.0 {
                return *token;
            }
        }
        candidates.last().map_or(best, |(_, token)| *token)
    }
}

fn penalises_repetition(params: &SamplingParams) -> bool {
    params.repetition_penalty > 0.0 && (params.repetition_penalty - 1.0).abs() > 1e-6
}

