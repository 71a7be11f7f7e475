//! `/v1/chat/completions`: reading the request.

use serde_json::{Map, Value};

use super::fields::{Fields, wrong_type};
use super::parameters::Parameters;
use super::tools::Tools;
use crate::error::ApiError;
use crate::worker::PromptInput;

/// Roles that chat templates know. `developer` is OpenAI's newer word for `system`.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];
/// Most alternatives to a token.
const TOP_LOGPROBS_LIMIT: u32 = 20;

/// A chat request.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub(crate) model: String,
    pub(crate) prompt: PromptInput,
    /// Bytes of text in the messages.
    pub(crate) prompt_bytes: usize,
    pub(crate) parameters: Parameters,
    pub(crate) tools: Tools,
}

impl ChatRequest {
    pub(crate) fn read(body: Value) -> Result<Self, ApiError> {
        let mut fields = Fields::of(body, "")?;
        let model = super::model_name(&mut fields)?;
        let messages = read_messages(fields.required("messages")?)?;
        let mut parameters = Parameters::take(&mut fields)?;
        parameters.take_max_completion_tokens(&mut fields)?;
        parameters.sampling.logprobs = take_logprobs(&mut fields)?;
        let tools = Tools::take(&mut fields)?;
        if let Some(constraint) = &tools.constraint
            && parameters.constraint.replace(constraint.clone()).is_some()
        {
            return Err(ApiError::invalid(
                "tool_choice",
                "tool_choice demands a call and response_format asks for a form; send one of them",
            ));
        }
        refuse_other_modes(&mut fields)?;
        fields.finish()?;
        let prompt_bytes =
            messages.iter().map(text_bytes).sum::<usize>() + tools.offered.as_ref().map_or(0, text_bytes);
        Ok(Self {
            model,
            prompt: PromptInput::Chat {
                messages: Value::Array(messages),
                tools: tools.offered.clone(),
            },
            tools,
            prompt_bytes,
            parameters,
        })
    }
}

/// Bytes of all text in a value.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(text_bytes).sum(),
        Value::Object(map) => map.values().map(text_bytes).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}

fn read_messages(messages: Value) -> Result<Vec<Value>, ApiError> {
    let Value::Array(messages) = messages else {
        return Err(wrong_type("messages", &messages, "an array"));
    };
    if messages.is_empty() {
        return Err(ApiError::invalid(
            "messages",
            "messages is empty and must hold one message at least",
        ));
    }
    messages
        .into_iter()
        .enumerate()
        .map(|(index, message)| read_message(message, format!("messages[{index}]")))
        .collect()
}

fn read_message(message: Value, path: String) -> Result<Value, ApiError> {
    let mut fields = Fields::of(message, path)?;
    let role_path = fields.at("role");
    let role = match fields.required("role")? {
        Value::String(role) if ROLES.contains(&role.as_str()) => role,
        Value::String(role) => {
            let role: String = role.chars().take(100).collect();
            return Err(ApiError::invalid(
                &role_path,
                format!("{role_path} is {role:?} and must be one of {}", ROLES.join(", ")),
            ));
        }
        other => return Err(wrong_type(&role_path, &other, "a string")),
    };
    let tool_calls = match fields.take("tool_calls") {
        Some(Value::Array(calls)) if calls.is_empty() => None,
        Some(Value::Array(calls)) if role == "assistant" => {
            Some(Value::Array(calls.into_iter().map(opened).collect()))
        }
        Some(Value::Array(_)) | None => None,
        Some(other) => return Err(wrong_type(&fields.at("tool_calls"), &other, "an array")),
    };
    let content_path = fields.at("content");
    let content = match fields.take("content") {
        Some(content) => Some(read_content(content, &content_path)?),
        // A message that only calls tools, or that an older client cut down to its role.
        None if role == "assistant" => None,
        None => {
            return Err(ApiError::invalid(
                &content_path,
                format!("{content_path} is missing"),
            ));
        }
    };
    let role = if role == "developer" {
        "system".to_owned()
    } else {
        role
    };
    let mut message = Map::new();
    message.insert("role".to_owned(), Value::String(role));
    // Never null: many templates add the content to a string without asking whether there is one.
    message.insert("content".to_owned(), Value::String(content.unwrap_or_default()));
    if let Some(calls) = tool_calls {
        message.insert("tool_calls".to_owned(), calls);
    }
    for name in ["name", "tool_call_id", "reasoning_content"] {
        if let Some(text) = fields.string(name)? {
            message.insert(name.to_owned(), Value::String(text));
        }
    }
    // What clients send back of an answer that they were given.
    fields.ignore(&["refusal", "annotations", "function_call", "audio"]);
    fields.finish()?;
    Ok(Value::Object(message))
}

/// A call with its arguments as the object that they are: the API has them as text, templates write JSON of
/// what they get.
fn opened(mut call: Value) -> Value {
    if let Some(arguments) = call.pointer_mut("/function/arguments")
        && let Some(object) = arguments
            .as_str()
            .and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok())
    {
        *arguments = Value::Object(object);
    }
    call
}

/// The text of a message: a string, or parts of which each is text.
fn read_content(content: Value, path: &str) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(wrong_type(path, &other, "a string or an array of parts")),
    };
    let mut text = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        let mut part = Fields::of(part, format!("{path}[{index}]"))?;
        let kind_path = part.at("type");
        match part.required("type")? {
            Value::String(kind) if kind == "text" => {}
            Value::String(kind) => {
                let kind: String = kind.chars().take(100).collect();
                return Err(ApiError::unsupported(
                    &kind_path,
                    format!("{kind_path} is {kind:?}; the models here read text only"),
                ));
            }
            other => return Err(wrong_type(&kind_path, &other, "a string")),
        }
        let text_path = part.at("text");
        match part.required("text")? {
            Value::String(piece) => text.push_str(&piece),
            other => return Err(wrong_type(&text_path, &other, "a string")),
        }
        part.ignore(&["cache_control"]);
        part.finish()?;
    }
    Ok(text)
}

fn take_logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    match (wanted, fields.integer("top_logprobs", 0..=TOP_LOGPROBS_LIMIT)?) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid(
            "top_logprobs",
            "top_logprobs is only allowed where logprobs is true",
        )),
    }
}

/// Fields that ask for another kind of answer than text.
fn refuse_other_modes(fields: &mut Fields) -> Result<(), ApiError> {
    match fields.take("modalities") {
        None => {}
        Some(Value::Array(kinds)) if kinds.iter().all(|kind| kind == "text") => {}
        Some(_) => {
            return Err(ApiError::unsupported(
                "modalities",
                "modalities may hold \"text\" only: the models here answer in text",
            ));
        }
    }
    for name in [
        "audio",
        "functions",
        "function_call",
        "prediction",
        "web_search_options",
    ] {
        if fields.take(name).is_some() {
            return Err(ApiError::unsupported(
                name,
                format!("{name} is not carried out by this version; remove it"),
            ));
        }
    }
    Ok(())
}
