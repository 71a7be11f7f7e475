//! From logits to the next token.

mod draw;
mod params;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::kernels::vector::{argmax, log_sum_exp};
pub use params::SamplingParams;

/// Tokens that are asked about one by one before all of them are. Each costs a look over all logits and some microseconds,
/// all together some hundred; nine of ten times one of the first two is allowed.
const TRIES: usize = 4;

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

/// Which tokens may come next.
pub(crate) trait Allowed {
    /// Whether `token` may.
    ///
    /// # Errors
    /// When that can no longer be said.
    fn allows(&mut self, token: u32) -> Result<bool, String>;

    /// Sets the logits of all that may not, `[vocabulary]`, to minus infinity.
    ///
    /// # Errors
    /// When that can no longer be said.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String>;
}

/// Chooses the tokens of one answer.
#[derive(Debug)]
pub(crate) struct Sampler {
    params: SamplingParams,
    rng: StdRng,
    /// How often each token is in the answer.
    answered: HashMap<u32, u32>,
    /// Tokens of the prompt, for the repetition penalty.
    prompt: Vec<u32>,
}

impl Sampler {
    /// A sampler for an answer to `prompt`.
    pub(crate) fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        let rng = match params.seed {
            Some(seed) => StdRng::seed_from_u64(seed),
            None => StdRng::from_os_rng(),
        };
        let prompt = if params.penalises_repetition() {
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
    pub(crate) fn sample(&mut self, logits: &mut [f32]) -> Sampled {
        self.adjust(logits);
        self.choose(logits)
    }

    /// Chooses what is allowed from `logits`, which it changes: as if those that are not were taken out first, but
    /// as a rule only a token or two are asked about, and not all of them.
    ///
    /// # Errors
    /// Those of [`Allowed`].
    pub(crate) fn sample_allowed(
        &mut self,
        logits: &mut [f32],
        allowed: &mut dyn Allowed,
    ) -> Result<Sampled, String> {
        self.adjust(logits);
        // Who counts all that are allowed must know all of them.
        if self.params.logprobs.is_none() && (self.params.is_greedy() || !self.params.cuts()) {
            for _ in 0..TRIES {
                // A token that is drawn again until one is allowed is drawn from those that are.
                let Some(token) = self.pick(logits) else { break };
                if allowed.allows(token)? {
                    return Ok(self.chosen(token, None, Vec::new()));
                }
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        allowed.mask(logits)?;
        Ok(self.choose(logits))
    }

    fn choose(&mut self, logits: &[f32]) -> Sampled {
        let (base, top) = self.report(logits);
        let token = self.pick(logits).unwrap_or(0);
        let logit = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        let logprob = base.map(|base| logprob(logit, base));
        self.chosen(token, logprob, top)
    }

    /// The likeliest token, or one that is drawn. None when there is none that is likelier than not at all.
    fn pick(&mut self, logits: &[f32]) -> Option<u32> {
        let best = argmax(logits)?;
        if self.params.is_greedy() {
            return Some(best as u32);
        }
        draw::draw(&self.params, &mut self.rng, logits, best)
    }

    fn chosen(&mut self, token: u32, logprob: Option<f32>, top: Vec<(u32, f32)>) -> Sampled {
        if self.params.frequency_penalty != 0.0
            || self.params.presence_penalty != 0.0
            || self.params.penalises_repetition()
        {
            *self.answered.entry(token).or_default() += 1;
        }
        Sampled { token, logprob, top }
    }

    fn adjust(&self, logits: &mut [f32]) {
        for (token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        if self.params.penalises_repetition() {
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
    fn report(&self, logits: &[f32]) -> (Option<f64>, Vec<(u32, f32)>) {
        let Some(count) = self.params.logprobs else {
            return (None, Vec::new());
        };
        let base = log_sum_exp(logits);
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
                .map(|(token, logit)| (token, logprob(logit, base)))
                .collect(),
        )
    }
}

/// The logarithm of a token's probability; `base` is that of the sum of all exponentials.
pub(crate) fn logprob(logit: f32, base: f64) -> f32 {
    (f64::from(logit) - base) as f32
}
