//! From logits to the next token.

use std::collections::HashMap;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::Reject;
use crate::kernels::vector::argmax;

/// How the next token is chosen. The default is greedy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; higher is more varied.
    pub temperature: f32,
    /// Only the k most likely tokens; 0: all.
    pub top_k: u32,
    /// Only the most likely tokens whose probabilities add up to this; 0 or 1: all.
    pub top_p: f32,
    /// Only tokens at least this likely relative to the best; 0: all.
    pub min_p: f32,
    /// Divides the logits of tokens that are in prompt or answer; 0 or 1: off.
    pub repetition_penalty: f32,
    /// Taken off a logit for every time the token is in the answer.
    pub frequency_penalty: f32,
    /// Taken off a logit once when the token is in the answer.
    pub presence_penalty: f32,
    /// Makes the choice repeatable.
    pub seed: Option<u64>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// How many alternatives to report with each token; None reports nothing.
    pub logprobs: Option<u32>,
}

/// Most alternatives that a request may ask for, as in the OpenAI API.
const MAX_LOGPROBS: u32 = 20;

impl SamplingParams {
    /// Checks every number.
    ///
    /// # Errors
    /// The field that is out of range.
    pub fn validate(&self, vocab_size: usize) -> Result<(), Reject> {
        let invalid = |field: &str, found: String, allowed: String| {
            Err(Reject::InvalidRequest {
                field: field.to_owned(),
                found,
                allowed,
            })
        };
        let ranges = [
            ("temperature", self.temperature, 0.0, 2.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 0.0, 10.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
        ];
        for (field, value, least, most) in ranges {
            if !(value.is_finite() && value >= least && value <= most) {
                return invalid(
                    field,
                    value.to_string(),
                    format!("it must be from {least} to {most}"),
                );
            }
        }
        if let Some(count) = self.logprobs.filter(|&count| count > MAX_LOGPROBS) {
            return invalid(
                "logprobs",
                count.to_string(),
                format!("at most {MAX_LOGPROBS} alternatives are reported"),
            );
        }
        for (token, bias) in &self.logit_bias {
            if *token as usize >= vocab_size {
                return invalid(
                    "logit_bias",
                    format!("for token {token}"),
                    format!("the model has tokens 0 to {}", vocab_size.saturating_sub(1)),
                );
            }
            if !(bias.is_finite() && bias.abs() <= 100.0) {
                return invalid(
                    "logit_bias",
                    bias.to_string(),
                    "it must be from -100 to 100".to_owned(),
                );
            }
        }
        Ok(())
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(params: SamplingParams, logits: &[f32]) -> Vec<f32> {
        let mut sampler = Sampler::new(
            SamplingParams {
                seed: Some(7),
                ..params
            },
            &[],
        );
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..4000 {
            counts[sampler.sample(&mut logits.to_vec()).token as usize] += 1.0 / 4000.0;
        }
        counts
    }

    #[test]
    fn temperature_zero_takes_the_first_of_the_best() {
        let mut sampler = Sampler::new(SamplingParams::default(), &[]);
        assert_eq!(sampler.sample(&mut [1.0, 3.0, 3.0]).token, 1);
    }

    #[test]
    fn a_seed_repeats_the_choice() {
        let params = SamplingParams {
            temperature: 1.0,
            seed: Some(5),
            ..SamplingParams::default()
        };
        let draw = || {
            let mut sampler = Sampler::new(params.clone(), &[]);
            (0..20)
                .map(|_| sampler.sample(&mut vec![0.0; 100]).token)
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(), draw());
    }

    #[test]
    fn probabilities_are_those_of_the_softmax() {
        let logits = [0.0, 1.0_f32, 2.0];
        let total: f32 = logits.iter().map(|l| l.exp()).sum();
        let found = frequencies(
            SamplingParams {
                temperature: 1.0,
                ..SamplingParams::default()
            },
            &logits,
        );
        for (found, logit) in found.iter().zip(logits) {
            assert!((found - logit.exp() / total).abs() < 0.03, "{found}");
        }
    }

    #[test]
    fn limits_cut_the_unlikely() {
        let logits = [0.0, 1.0, 2.0, 3.0];
        let hot = SamplingParams {
            temperature: 1.0,
            ..SamplingParams::default()
        };
        let top_k = frequencies(
            SamplingParams {
                top_k: 2,
                ..hot.clone()
            },
            &logits,
        );
        assert!(top_k[0] == 0.0 && top_k[1] == 0.0 && top_k[2] > 0.0);
        let top_p = frequencies(
            SamplingParams {
                top_p: 0.6,
                ..hot.clone()
            },
            &logits,
        );
        assert!(top_p[3] > 0.99);
        let min_p = frequencies(SamplingParams { min_p: 0.3, ..hot }, &logits);
        assert!(min_p[1] == 0.0 && min_p[2] > 0.0);
    }

    #[test]
    fn penalties_and_bias_move_the_best() {
        let penalised = SamplingParams {
            frequency_penalty: 2.0,
            ..SamplingParams::default()
        };
        let mut sampler = Sampler::new(penalised, &[]);
        let tokens: Vec<u32> = (0..2).map(|_| sampler.sample(&mut [1.0, 2.0]).token).collect();
        assert_eq!(tokens, [1, 0]);
        let biased = SamplingParams {
            logit_bias: vec![(0, 50.0)],
            ..SamplingParams::default()
        };
        assert_eq!(Sampler::new(biased, &[]).sample(&mut [1.0, 2.0]).token, 0);
        let repetition = SamplingParams {
            repetition_penalty: 3.0,
            ..SamplingParams::default()
        };
        assert_eq!(Sampler::new(repetition, &[1]).sample(&mut [1.0, 2.0]).token, 0);
    }

    #[test]
    fn logprobs_are_logarithms_of_probabilities() {
        let mut sampler = Sampler::new(
            SamplingParams {
                logprobs: Some(2),
                ..SamplingParams::default()
            },
            &[],
        );
        let sampled = sampler.sample(&mut [0.0, 1.0, 2.0]);
        assert_eq!(sampled.top.len(), 2);
        assert_eq!(sampled.logprob, Some(sampled.top[0].1));
        assert!((sampled.top[0].1 - -0.407_606).abs() < 1e-4, "{sampled:?}");
    }

    #[test]
    fn what_a_grammar_took_out_is_never_chosen_and_no_alternative() {
        let params = SamplingParams {
            temperature: 2.0,
            repetition_penalty: 1.5,
            frequency_penalty: -2.0,
            logit_bias: vec![(0, 100.0), (3, 100.0)],
            logprobs: Some(4),
            seed: Some(1),
            ..SamplingParams::default()
        };
        let mut sampler = Sampler::new(params, &[0, 1, 2, 3]);
        for _ in 0..200 {
            let mut logits = [f32::NEG_INFINITY, 1.0, 2.0, f32::NEG_INFINITY];
            let sampled = sampler.sample(&mut logits);
            assert!([1, 2].contains(&sampled.token), "{sampled:?}");
            assert_eq!(sampled.top.len(), 2, "{sampled:?}");
            assert!(sampled.logprob.unwrap().is_finite());
        }
    }

    #[test]
    fn absurd_numbers_are_refused_by_name() {
        for (params, field) in [
            (
                SamplingParams {
                    temperature: f32::NAN,
                    ..SamplingParams::default()
                },
                "temperature",
            ),
            (
                SamplingParams {
                    top_p: -1.0,
                    ..SamplingParams::default()
                },
                "top_p",
            ),
            (
                SamplingParams {
                    logit_bias: vec![(9, 1.0)],
                    ..SamplingParams::default()
                },
                "logit_bias",
            ),
            (
                SamplingParams {
                    logprobs: Some(99),
                    ..SamplingParams::default()
                },
                "logprobs",
            ),
        ] {
            assert!(params.validate(3).unwrap_err().to_string().starts_with(field));
        }
    }
}
