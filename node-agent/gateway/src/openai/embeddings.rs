//! `/v1/embeddings`: the request and the answer.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::Value;

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

/// The answer, written as it is: a vector as a JSON value would take six times its memory, and print
/// its 32-bit numbers with the noise of 64.
#[derive(Debug, Serialize)]
pub(crate) struct Embeddings<'a> {
    object: &'static str,
    data: Vec<Embedding<'a>>,
    model: &'a str,
    usage: EmbeddingsUsage,
}

#[derive(Debug, Serialize)]
struct Embedding<'a> {
    object: &'static str,
    index: usize,
    embedding: Vector<'a>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Vector<'a> {
    Numbers(&'a [f32]),
    Base64(String),
}

#[derive(Debug, Serialize)]
struct EmbeddingsUsage {
    prompt_tokens: u32,
    total_tokens: u32,
}

impl<'a> Embeddings<'a> {
    pub(crate) fn new(model: &'a str, reply: &'a EmbedReply, encoding: Encoding) -> Self {
        let embedding = |vector: &'a Vec<f32>| match encoding {
            Encoding::Float => Vector::Numbers(vector),
            Encoding::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
                Vector::Base64(STANDARD.encode(bytes))
            }
        };
        Self {
            object: "list",
            data: reply
                .vectors
                .iter()
                .enumerate()
                .map(|(index, vector)| Embedding {
                    object: "embedding",
                    index,
                    embedding: embedding(vector),
                })
                .collect(),
            model,
            usage: EmbeddingsUsage {
                prompt_tokens: reply.prompt_tokens,
                total_tokens: reply.prompt_tokens,
            },
        }
    }
}
