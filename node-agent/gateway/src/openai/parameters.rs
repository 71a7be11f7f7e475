//! What chat and plain completions have in common: how much, how random, until when, in what form.

use std::collections::BTreeMap;

use serde_json::Value;

use super::fields::{Fields, number_in, wrong_type};
use crate::error::ApiError;
use crate::worker::{ConstraintInput, GenerateCall, PromptInput, SamplingCall};

/// Most answers to one prompt.
pub(crate) const ANSWERS_LIMIT: u32 = 16;
/// Largest number of tokens that is taken as meant.
const TOKENS_LIMIT: u32 = 1 << 20;
const STOPS_LIMIT: usize = 16;
const STOP_BYTES_LIMIT: usize = 1024;
const BIASES_LIMIT: usize = 1024;

/// Fields of OpenAI's API that change nothing here: bookkeeping of its service, or hints.
const WITHOUT_EFFECT: [&str; 9] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "verbosity",
];

/// How to generate.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Parameters {
    /// As the client named it.
    pub(crate) max_tokens: Option<u32>,
    /// What it is where the client names none, if the API says so.
    pub(crate) usual_max_tokens: Option<u32>,
    pub(crate) stop: Vec<String>,
    /// Answers to each prompt.
    pub(crate) answers: u32,
    pub(crate) stream: bool,
    /// Whether a stream ends with the count of tokens.
    pub(crate) include_usage: bool,
    pub(crate) echo: bool,
    /// What the answer must look like.
    pub(crate) constraint: Option<ConstraintInput>,
    pub(crate) sampling: SamplingCall,
}

impl Parameters {
    /// Takes the common fields. `logprobs` and `max_tokens` differ between the two APIs and are the
    /// caller's.
    pub(crate) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let parameters = Self {
            max_tokens: fields.integer("max_tokens", 1..=TOKENS_LIMIT)?,
            usual_max_tokens: None,
            stop: take_stop(fields)?,
            answers: fields.integer("n", 1..=ANSWERS_LIMIT)?.unwrap_or(1),
            include_usage: take_stream_options(fields, stream)?,
            stream,
            echo: false,
            constraint: super::format::take(fields)?,
            sampling: SamplingCall {
                temperature: fields.number("temperature", 0.0..=2.0)?,
                // 0 leaves the likeliest token, as in OpenAI's API; to the engine it would mean "all".
                top_p: fields
                    .number("top_p", 0.0..=1.0)?
                    .map(|share| share.max(f32::EPSILON)),
                top_k: fields.integer("top_k", 0..=1_000_000)?,
                min_p: fields.number("min_p", 0.0..=1.0)?,
                repetition_penalty: fields.number("repetition_penalty", 0.01..=10.0)?,
                frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?,
                presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?,
                seed: take_seed(fields)?,
                logit_bias: take_logit_bias(fields)?,
                logprobs: None,
            },
        };
        fields.ignore(&WITHOUT_EFFECT);
        Ok(parameters)
    }

    /// Takes the newer name of `max_tokens`.
    pub(crate) fn take_max_completion_tokens(&mut self, fields: &mut Fields) -> Result<(), ApiError> {
        let newer = fields.integer("max_completion_tokens", 1..=TOKENS_LIMIT)?;
        match (self.max_tokens, newer) {
            (Some(older), Some(newer)) if older != newer => Err(ApiError::invalid(
                "max_tokens",
                format!("max_tokens is {older} and max_completion_tokens is {newer}; send one of them"),
            )),
            (_, Some(newer)) => {
                self.max_tokens = Some(newer);
                Ok(())
            }
            (_, None) => Ok(()),
        }
    }

    /// The calls for one prompt, one for each answer. With a seed, each answer gets its own.
    pub(crate) fn calls<'a>(
        &'a self,
        request_id: &'a str,
        prompt: &'a PromptInput,
        scope: &'a str,
        first_index: usize,
        max_tokens: Option<u32>,
        max_context: Option<u32>,
    ) -> impl Iterator<Item = (usize, GenerateCall)> + 'a {
        (0..self.answers).map(move |answer| {
            let index = first_index + answer as usize;
            let mut sampling = self.sampling.clone();
            sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(u64::from(answer)));
            let call = GenerateCall {
                request_id: format!("{request_id}-{index}"),
                prompt: prompt.clone(),
                max_tokens,
                max_context,
                scope: scope.to_owned(),
                stop: self.stop.clone(),
                echo: self.echo,
                constraint: self.constraint.clone(),
                sampling,
            };
            (index, call)
        })
    }
}

fn take_stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let stops = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(stops)) => stops,
        Some(one) => vec![one],
    };
    if stops.len() > STOPS_LIMIT {
        return Err(ApiError::invalid(
            "stop",
            format!("stop holds {} strings and may hold {STOPS_LIMIT}", stops.len()),
        ));
    }
    stops
        .into_iter()
        .map(|stop| match stop {
            Value::String(stop) if stop.is_empty() => Err(ApiError::invalid(
                "stop",
                "stop holds an empty string, which would end every answer at once; remove it",
            )),
            Value::String(stop) if stop.len() > STOP_BYTES_LIMIT => Err(ApiError::invalid(
                "stop",
                format!(
                    "stop holds a string of {} bytes and may hold {STOP_BYTES_LIMIT}",
                    stop.len()
                ),
            )),
            Value::String(stop) => Ok(stop),
            other => Err(wrong_type("stop", &other, "a string or an array of strings")),
        })
        .collect()
}

fn take_stream_options(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = fields.take("stream_options") else {
        return Ok(false);
    };
    if !stream {
        return Err(ApiError::invalid(
            "stream_options",
            "stream_options is only allowed where stream is true",
        ));
    }
    let mut options = Fields::of(options, "stream_options")?;
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    // Padding against eavesdroppers who measure: asked for by newer clients, a hint.
    options.ignore(&["include_obfuscation"]);
    options.finish()?;
    Ok(include_usage)
}

fn take_seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.take("seed") else {
        return Ok(None);
    };
    let wanted = "a whole number of at most 64 bits";
    match value.as_i64().map(i64::cast_unsigned).or(value.as_u64()) {
        Some(seed) => Ok(Some(seed)),
        // Only numbers are repeated: they are short, and nobody's secret.
        None if value.is_number() => Err(ApiError::invalid(
            "seed",
            format!("seed is {value} and must be {wanted}"),
        )),
        None => Err(wrong_type("seed", &value, wanted)),
    }
}

fn take_logit_bias(fields: &mut Fields) -> Result<BTreeMap<u32, f32>, ApiError> {
    let biases = match fields.take("logit_bias") {
        None => return Ok(BTreeMap::new()),
        Some(Value::Object(biases)) => biases,
        Some(other) => {
            return Err(wrong_type(
                "logit_bias",
                &other,
                "an object from tokens to numbers",
            ));
        }
    };
    if biases.len() > BIASES_LIMIT {
        return Err(ApiError::invalid(
            "logit_bias",
            format!(
                "logit_bias holds {} tokens and may hold {BIASES_LIMIT}",
                biases.len()
            ),
        ));
    }
    biases
        .into_iter()
        .map(|(token, bias)| {
            let Ok(number) = token.parse() else {
                let token: String = token.chars().take(100).collect();
                return Err(ApiError::invalid(
                    "logit_bias",
                    format!("logit_bias holds {token:?}, which is not the number of a token"),
                ));
            };
            let bias = number_in(&format!("logit_bias.{token}"), &bias, &(-100.0..=100.0))?;
            Ok((number, bias))
        })
        .collect()
}
