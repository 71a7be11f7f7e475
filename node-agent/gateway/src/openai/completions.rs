//! `/v1/completions`: reading the request.

use serde_json::Value;

use super::fields::{Fields, tokens, type_of, wrong_type};
use super::parameters::Parameters;
use crate::error::ApiError;
use crate::worker::PromptInput;

/// Most prompts in one request.
const PROMPTS_LIMIT: usize = 64;
/// Most alternatives to a token in this API.
const LOGPROBS_LIMIT: u32 = 5;
/// Length of an answer whose client names none: OpenAI's own, which clients of this API expect.
const USUAL_MAX_TOKENS: u32 = 16;

/// A completion request.
#[derive(Debug)]
pub(crate) struct CompletionRequest {
    pub(crate) model: String,
    pub(crate) prompts: Vec<PromptInput>,
    pub(crate) prompt_bytes: usize,
    pub(crate) parameters: Parameters,
}

impl CompletionRequest {
    pub(crate) fn read(body: Value) -> Result<Self, ApiError> {
        let mut fields = Fields::of(body, "")?;
        let model = super::model_name(&mut fields)?;
        let prompts = read_prompts(fields.required("prompt")?)?;
        let mut parameters = Parameters::take(&mut fields)?;
        parameters.usual_max_tokens = Some(USUAL_MAX_TOKENS);
        parameters.echo = fields.boolean("echo")?.unwrap_or(false);
        parameters.sampling.logprobs = fields.integer("logprobs", 0..=LOGPROBS_LIMIT)?;
        let best_of = fields.integer("best_of", 1..=u32::MAX)?;
        if best_of.is_some_and(|best_of| best_of != parameters.answers) {
            return Err(ApiError::unsupported(
                "best_of",
                "best_of other than n is not carried out by this version; remove it",
            ));
        }
        if fields.take("suffix").is_some() {
            return Err(ApiError::unsupported(
                "suffix",
                "suffix is not carried out by this version: text is only continued at its end",
            ));
        }
        fields.finish()?;
        let prompt_bytes = prompts
            .iter()
            .map(|prompt| match prompt {
                PromptInput::Text { text } => text.len(),
                PromptInput::Tokens { tokens } => tokens.len() * 4,
                PromptInput::Chat { .. } => 0,
            })
            .sum();
        Ok(Self {
            model,
            prompts,
            prompt_bytes,
            parameters,
        })
    }
}

/// A string, an array of strings, an array of tokens, or an array of arrays of tokens.
fn read_prompts(prompt: Value) -> Result<Vec<PromptInput>, ApiError> {
    let values = match prompt {
        Value::String(text) => return Ok(vec![text_prompt("prompt", text)?]),
        Value::Array(values) => values,
        other => {
            return Err(wrong_type(
                "prompt",
                &other,
                "a string, or an array of strings or tokens",
            ));
        }
    };
    if values.is_empty() {
        return Err(ApiError::invalid(
            "prompt",
            "prompt is empty and must hold something to continue",
        ));
    }
    if values.iter().all(Value::is_number) {
        let tokens = tokens("prompt", &values)?;
        return Ok(vec![PromptInput::Tokens { tokens }]);
    }
    if values.len() > PROMPTS_LIMIT {
        return Err(ApiError::invalid(
            "prompt",
            format!(
                "prompt holds {} prompts and may hold {PROMPTS_LIMIT}",
                values.len()
            ),
        ));
    }
    values
        .into_iter()
        .enumerate()
        .map(|(index, value)| {
            let path = format!("prompt[{index}]");
            match value {
                Value::String(text) => text_prompt(&path, text),
                Value::Array(values) if !values.is_empty() => Ok(PromptInput::Tokens {
                    tokens: tokens(&path, &values)?,
                }),
                other => Err(ApiError::invalid(
                    &path,
                    format!(
                        "{path} is {} and must be a string or an array of tokens",
                        type_of(&other)
                    ),
                )),
            }
        })
        .collect()
}

fn text_prompt(path: &str, text: String) -> Result<PromptInput, ApiError> {
    if text.is_empty() {
        return Err(ApiError::invalid(
            path,
            format!("{path} is empty and must hold something to continue"),
        ));
    }
    Ok(PromptInput::Text { text })
}
