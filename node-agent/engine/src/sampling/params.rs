//! What a request may say of how tokens are chosen.

use crate::Reject;

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

impl SamplingParams {
    /// Whether the likeliest token is chosen, always.
    pub(super) fn is_greedy(&self) -> bool {
        self.temperature < 1e-5
    }

    /// Whether tokens are left out by how likely they are beside others.
    pub(super) fn cuts(&self) -> bool {
        self.top_k > 0 || self.min_p > 0.0 || self.cuts_by_sum()
    }

    /// Whether `top_p` leaves tokens out.
    pub(super) fn cuts_by_sum(&self) -> bool {
        self.top_p > 0.0 && self.top_p < 1.0
    }

    /// Whether `top_p` leaves tokens out, and nothing else does.
    pub(super) fn cuts_by_sum_alone(&self) -> bool {
        self.cuts_by_sum() && self.top_k == 0 && self.min_p <= 0.0
    }

    pub(super) fn penalises_repetition(&self) -> bool {
        self.repetition_penalty > 0.0 && (self.repetition_penalty - 1.0).abs() > 1e-6
    }
}
