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

/// Tokens that are drawn and asked about before all of them are. Each costs a look over all logits and some microseconds,
/// all together some hundred; nine of ten times one of the first two is allowed.
const TRIES: usize = 4;
/// Tokens that are asked about beyond that, to learn whether the cuts leave one that is allowed: their questions take about half
/// as long as one about all.
const CUT_TRIES: usize = 4;

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
        self.choose(logits, None)
    }

    /// Chooses what is allowed from `logits`, which it changes: as if those that are not were taken out first, but
    /// as a rule only a few tokens are asked about, and not all of them.
    ///
    /// # Errors
    /// Those of [`Allowed`].
    pub(crate) fn sample_allowed(
        &mut self,
        logits: &mut [f32],
        allowed: &mut dyn Allowed,
    ) -> Result<Sampled, String> {
        self.adjust(logits);
        let mut drawn = None;
        // Who reports what is allowed must know all of it.
        if self.params.logprobs.is_none() {
            for _ in 0..TRIES {
                // A token that is drawn again until one is allowed is drawn from those that are.
                let Some(token) = self.pick_of_all(logits) else {
                    break;
                };
                if allowed.allows(token)? {
                    if self.outlasts(logits, token, allowed)? {
                        return Ok(self.chosen(token, None, Vec::new()));
                    }
                    drawn = Some(token);
                    break;
                }
                take_out(logits, token);
            }
        }
        allowed.mask(logits)?;
        Ok(self.choose(logits, drawn))
    }

    /// Whether the cuts surely leave `token`, which is allowed, as far as a few questions can show it. Takes out what it finds is
    /// not allowed.
    fn outlasts(&self, logits: &mut [f32], token: u32, allowed: &mut dyn Allowed) -> Result<bool, String> {
        if self.params.is_greedy() || !self.params.cuts() {
            return Ok(true);
        }
        let (mut known, mut left) = (Vec::new(), CUT_TRIES);
        while let Some(undecided) = draw::undecided(&self.params, logits, token, &known, left) {
            let mut all = true;
            for other in undecided {
                left -= 1;
                all = allowed.allows(other)?;
                if !all {
                    take_out(logits, other);
                    break;
                }
                known.push(other);
            }
            if all {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Chooses from `logits`; `drawn` where it was drawn from all of them and may be kept.
    fn choose(&mut self, logits: &[f32], drawn: Option<u32>) -> Sampled {
        let (base, top) = self.report(logits);
        let picked = if !self.params.is_greedy() && self.params.cuts() {
            draw::of_kept(&self.params, &mut self.rng, logits, drawn)
        } else {
            self.pick_of_all(logits)
        };
        let token = picked.unwrap_or(0);
        let logit = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        let logprob = base.map(|base| logprob(logit, base));
        self.chosen(token, logprob, top)
    }

    /// The likeliest token, or one that is drawn from all. None when none is likelier than not at all.
    fn pick_of_all(&mut self, logits: &[f32]) -> Option<u32> {
        if self.params.is_greedy() {
            return argmax(logits).map(|best| best as u32);
        }
        draw::of_all(&self.params, &mut self.rng, logits)
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

fn take_out(logits: &mut [f32], token: u32) {
    if let Some(logit) = logits.get_mut(token as usize) {
        *logit = f32::NEG_INFINITY;
    }
}

/// The logarithm of a token's probability; `base` is that of the sum of all exponentials.
pub(crate) fn logprob(logit: f32, base: f64) -> f32 {
    (f64::from(logit) - base) as f32
}
