//! `/v1/embeddings`: the request and the answer.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::fields::{Fields, tokens, type_of, wrong_type};
use crate::error::ApiError;
use crate::worker::{EmbedInput, EmbedReply};

/// Most inputs in one request, as in OpenAI's API.
const INPUTS_LIMIT: usize = 2048;

/// How vectors are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As numbers.
    Float,
    /// As base64 of little-endian 32-bit floats, which OpenAI's clients ask for.
    Base64,
}

/// An embeddings request.
#[derive(Debug)]
pub(crate) struct EmbeddingsRequest {
    pub(crate) model: String,
    pub(crate) input: Vec<EmbedInput>,
    pub(crate) prompt_bytes: usize,
    pub(crate) encoding: Encoding,
}

impl EmbeddingsRequest {
    pub(crate) fn read(body: Value) -> Result<Self, ApiError> {
        let mut fields = Fields::of(body, "")?;
        let model = super::model_name(&mut fields)?;
        let input = read_input(fields.required("input")?)?;
        let encoding = match fields.string("encoding_format")?.as_deref() {
            None | Some("float") => Encoding::Float,
            Some("base64") => Encoding::Base64,
            Some(other) => {
                let other: String = other.chars().take(100).collect();
                return Err(ApiError::invalid(
                    "encoding_format",
                    format!("encoding_format is {other:?} and must be \"float\" or \"base64\""),
                ));
            }
        };
        if fields.take("dimensions").is_some() {
            return Err(ApiError::unsupported(
                "dimensions",
                "dimensions cannot be chosen: each model has its own; remove the field and cut the vectors on your side if the model allows it",
            ));
        }
        fields.ignore(&["user"]);
        fields.finish()?;
        let prompt_bytes = input
            .iter()
            .map(|input| match input {
                EmbedInput::Text(text) => text.len(),
                EmbedInput::Tokens(tokens) => tokens.len() * 4,
            })
            .sum();
        Ok(Self {
            model,
            input,
            prompt_bytes,
            encoding,
        })
    }
}

/// A string, an array of strings, an array of tokens, or an array of arrays of tokens.
fn read_input(input: Value) -> Result<Vec<EmbedInput>, ApiError> {
    let values = match input {
        Value::String(text) => return Ok(vec![text_input("input", text)?]),
        Value::Array(values) => values,
        other => {
            return Err(wrong_type(
                "input",
                &other,
                "a string, or an array of strings or tokens",
            ));
        }
    };
    if values.is_empty() {
        return Err(ApiError::invalid(
            "input",
            "input is empty and must hold something to embed",
        ));
    }
    if values.iter().all(Value::is_number) {
        return Ok(vec![EmbedInput::Tokens(tokens("input", &values)?)]);
    }
    if values.len() > INPUTS_LIMIT {
        return Err(ApiError::invalid(
            "input",
            format!("input holds {} texts and may hold {INPUTS_LIMIT}", values.len()),
        ));
    }
    values
        .into_iter()
        .enumerate()
        .map(|(index, value)| {
            let path = format!("input[{index}]");
            match value {
                Value::String(text) => text_input(&path, text),
                Value::Array(values) if !values.is_empty() => Ok(EmbedInput::Tokens(tokens(&path, &values)?)),
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

fn text_input(path: &str, text: String) -> Result<EmbedInput, ApiError> {
    if text.is_empty() {
        return Err(ApiError::invalid(
            path,
            format!("{path} is empty and must hold something to embed"),
        ));
    }
    Ok(EmbedInput::Text(text))
}

/// The answer.
pub(crate) fn answer(model: &str, reply: &EmbedReply, encoding: Encoding) -> Value {
    let data: Vec<Value> = reply
        .vectors
        .iter()
        .enumerate()
        .map(|(index, vector)| {
            let embedding = match encoding {
                Encoding::Float => json!(vector),
                Encoding::Base64 => {
                    let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
                    Value::String(STANDARD.encode(bytes))
                }
            };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        })
        .collect();
    json!({
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": reply.prompt_tokens, "total_tokens": reply.prompt_tokens},
    })
}
