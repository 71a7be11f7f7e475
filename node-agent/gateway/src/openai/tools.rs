//! Tool calls: what a request offers, and finding calls in what a model writes.
//!
//! Families write calls in their own ways: `<tool_call>{…}</tool_call>` (Hermes, Qwen, SmolLM, Granite 4), or
//! an answer that is nothing but JSON, one object, several or a list, with or without a marker before it (Llama
//! 3, Mistral, Granite 3, Phi), or a name with its arguments after it (newer Mistral). All are found in any answer to a request with tools; markers that are control
//! tokens never reach this place. What reads like a call and is none stays text: nothing is lost.

use serde_json::{Map, Value, json};

use super::fields::{Fields, wrong_type};
use crate::error::ApiError;
use crate::worker::ConstraintInput;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
/// What may stand before an answer that is nothing but calls.
const MARKERS: [&str; 5] = [
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "<|tool_call|>",
    "```json",
    "```",
];
/// What newer Mistral models write between a name and its arguments.
const ARGUMENTS: &str = "[ARGS]";
const TOOLS_LIMIT: usize = 128;

/// What a request offers and asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Tools {
    /// As the chat template gets them.
    pub(crate) offered: Option<Value>,
    names: Vec<String>,
    /// Whether an answer may hold more than one call.
    several: bool,
    /// What the answer must be, where a call is demanded: one call.
    pub(crate) constraint: Option<ConstraintInput>,
}

/// A call in an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) name: String,
    /// JSON.
    pub(crate) arguments: String,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Text(String),
    Call(Call),
}

impl Tools {
    pub(crate) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let offered = match fields.take("tools") {
            None => Vec::new(),
            Some(Value::Array(tools)) if tools.len() > TOOLS_LIMIT => {
                return Err(ApiError::invalid(
                    "tools",
                    format!("tools holds {} and may hold {TOOLS_LIMIT}", tools.len()),
                ));
            }
            Some(Value::Array(tools)) => tools,
            Some(other) => return Err(wrong_type("tools", &other, "an array")),
        };
        let mut names = Vec::new();
        for (index, tool) in offered.iter().enumerate() {
            let path = format!("tools[{index}].function.name");
            match tool.pointer("/function/name") {
                Some(Value::String(name)) => names.push(name.clone()),
                Some(other) => return Err(wrong_type(&path, other, "a string")),
                None => return Err(ApiError::invalid(&path, format!("{path} is missing"))),
            }
        }
        let several = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
        let forced = match fields.take("tool_choice") {
            None => Vec::new(),
            Some(Value::String(choice)) if choice == "auto" => Vec::new(),
            Some(Value::String(choice)) if choice == "none" => return Ok(Self::default()),
            Some(Value::String(choice)) if choice == "required" && offered.is_empty() => {
                return Err(ApiError::invalid(
                    "tool_choice",
                    "tool_choice is \"required\" and tools holds nothing to call",
                ));
            }
            Some(Value::String(choice)) if choice == "required" => offered.iter().collect(),
            Some(Value::Object(choice)) => vec![named(&choice, &offered)?],
            Some(_) => {
                return Err(ApiError::invalid(
                    "tool_choice",
                    "tool_choice must be \"none\", \"auto\", \"required\", or an object that names a function",
                ));
            }
        };
        if forced.is_empty() && offered.is_empty() {
            return Ok(Self::default());
        }
        let constraint = (!forced.is_empty()).then(|| ConstraintInput::JsonSchema {
            schema: json!({"anyOf": forced.into_iter().enumerate().map(call_schema).collect::<Vec<_>>()}),
        });
        Ok(Self {
            names,
            several,
            offered: Some(Value::Array(offered)),
            constraint,
        })
    }

    /// Reads an answer; None where there is nothing to call.
    pub(crate) fn parser(&self) -> Option<ToolParser> {
        (!self.names.is_empty()).then(|| ToolParser {
            names: self.names.clone(),
            several: self.several,
            state: State::Start,
            held: String::new(),
            calls: 0,
        })
    }
}

/// The tool that `tool_choice` names.
fn named<'a>(choice: &Map<String, Value>, offered: &'a [Value]) -> Result<&'a Value, ApiError> {
    let wanted = choice.get("function").and_then(|function| function.get("name"));
    let name = wanted.and_then(Value::as_str).ok_or_else(|| {
        ApiError::invalid(
            "tool_choice.function.name",
            "tool_choice.function.name is missing; it must be the name of one of the tools",
        )
    })?;
    offered
        .iter()
        .find(|tool| tool.pointer("/function/name").and_then(Value::as_str) == Some(name))
        .ok_or_else(|| {
            let name: String = name.chars().take(100).collect();
            ApiError::invalid(
                "tool_choice.function.name",
                format!("tool_choice.function.name is {name:?}, which is none of the tools"),
            )
        })
}

/// What a call of this tool looks like, where it is the `index`th of those that are demanded.
fn call_schema((index, tool): (usize, &Value)) -> Value {
    let parameters = tool
        .pointer("/function/parameters")
        .filter(|parameters| parameters.is_object());
    let arguments = parameters.map_or_else(
        || json!({"type": "object"}),
        |parameters| {
            let mut parameters = parameters.clone();
            // A schema with a name of its own is what its references begin at, wherever it stands.
            if parameters.get("$id").is_none() {
                rebase(&mut parameters, &format!("#/anyOf/{index}/properties/arguments"));
            }
            if let Value::Object(fields) = &mut parameters {
                fields.shift_remove("$schema");
            }
            parameters
        },
    );
    json!({
        "type": "object",
        "properties": {
            "name": {"const": tool.pointer("/function/name")},
            "arguments": arguments,
        },
        "required": ["name", "arguments"],
        "additionalProperties": false,
    })
}

/// Lets references from the root of a schema, such as `#/$defs/city`, begin at `root`, where it stands now.
fn rebase(schema: &mut Value, root: &str) {
    match schema {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(reference) if name == "$ref" => {
                        if let Some(path) = reference.strip_prefix('#')
                            && (path.is_empty() || path.starts_with('/'))
                        {
                            *reference = format!("{root}{path}");
                        }
                    }
                    value => rebase(value, root),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| rebase(value, root)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but space so far.
    Start,
    /// May be nothing but calls: known at the end.
    Whole,
    /// Text, in which a block may open.
    Text,
    /// Between the tags of a block.
    Block,
}

/// Finds calls in an answer that comes in pieces.
#[derive(Clone, Debug)]
pub(crate) struct ToolParser {
    names: Vec<String>,
    several: bool,
    state: State,
    /// What is not decided yet.
    held: String,
    calls: usize,
}

impl ToolParser {
    /// Takes a piece of the answer and gives what is decided by it.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        while self.advance(&mut pieces) {}
        pieces
    }

    /// The end of the answer.
    pub(crate) fn finish(&mut self) -> Vec<Piece> {
        let held = std::mem::take(&mut self.held);
        let (state, inner) = (self.state, held.trim());
        self.state = State::Text;
        let calls = match state {
            State::Whole => self.read(inner),
            // Some models end without closing the tag.
            State::Block => self.read(inner.strip_prefix(OPEN).unwrap_or(inner)),
            State::Start | State::Text => None,
        };
        match calls {
            Some(calls) => self.found(calls),
            None if held.trim().is_empty() && self.calls > 0 => Vec::new(),
            None if held.is_empty() => Vec::new(),
            None => vec![Piece::Text(held)],
        }
    }

    /// Whether the answer holds a call.
    pub(crate) fn called(&self) -> bool {
        self.calls > 0
    }

    /// Counts calls. Where one is allowed, those after it are dropped: a client that asks for one does not
    /// look for more.
    fn found(&mut self, mut calls: Vec<Call>) -> Vec<Piece> {
        if !self.several {
            calls.truncate(1_usize.saturating_sub(self.calls));
        }
        self.calls += calls.len();
        calls.into_iter().map(Piece::Call).collect()
    }

    /// Decides as much as can be. True when there may be more to decide.
    fn advance(&mut self, pieces: &mut Vec<Piece>) -> bool {
        match self.state {
            State::Start => {
                let begin = self.held.trim_start();
                if begin.is_empty() {
                    return false;
                }
                let may_become = |marker: &str| marker.starts_with(begin) && marker != begin;
                // A name with the beginning of arguments after it, or what may become one.
                let named = |opening: &str| {
                    let judged =
                        self.names
                            .iter()
                            .filter_map(|name| match begin.strip_prefix(name.as_str()) {
                                Some(after) if after.starts_with(opening) => Some(true),
                                Some(after) => opening.starts_with(after).then_some(false),
                                None => name.starts_with(begin).then_some(false),
                            });
                    judged.max()
                };
                let named = named("{").max(named(ARGUMENTS));
                if begin.starts_with(['{', '['])
                    || MARKERS.iter().any(|marker| begin.starts_with(marker))
                    || named == Some(true)
                {
                    self.state = State::Whole;
                } else if MARKERS.iter().any(|marker| may_become(marker))
                    || may_become(OPEN)
                    || named.is_some()
                {
                    return false;
                } else {
                    self.state = State::Text;
                }
                true
            }
            State::Whole => false,
            State::Text => {
                if let Some(start) = self.held.find(OPEN) {
                    // The space before goes with the block: dropped with a call, kept with what is none.
                    let start = self.held[..start].trim_end().len();
                    let block = self.held.split_off(start);
                    let before = std::mem::replace(&mut self.held, block);
                    if !before.is_empty() {
                        pieces.push(Piece::Text(before));
                    }
                    self.state = State::Block;
                    return true;
                }
                // A tag may begin at the end, and space before one is dropped.
                let undecided = undecided(&self.held);
                let rest = self.held.split_off(self.held.len() - undecided);
                let text = std::mem::replace(&mut self.held, rest);
                if !text.is_empty() {
                    pieces.push(Piece::Text(text));
                }
                false
            }
            State::Block => {
                let Some(end) = self.held.find(CLOSE) else {
                    return false;
                };
                let rest = self.held.split_off(end + CLOSE.len());
                let block = std::mem::replace(&mut self.held, rest);
                let inner = block[..end].trim_start().strip_prefix(OPEN).unwrap_or_default();
                match self.read(inner.trim()) {
                    Some(calls) => pieces.extend(self.found(calls)),
                    None => pieces.push(Piece::Text(block)),
                }
                self.state = State::Text;
                true
            }
        }
    }

    /// Calls, if the text is nothing else.
    fn read(&self, text: &str) -> Option<Vec<Call>> {
        let mut text = text;
        for marker in MARKERS {
            text = text.strip_prefix(marker).unwrap_or(text).trim();
        }
        text = text.strip_suffix("```").unwrap_or(text).trim();
        match serde_json::from_str(text) {
            Ok(Value::Array(calls)) if !calls.is_empty() => {
                calls.iter().map(|call| self.call(call)).collect()
            }
            Ok(one @ Value::Object(_)) => Some(vec![self.call(&one)?]),
            Ok(_) => None,
            Err(_) => self.series(text),
        }
    }

    /// Calls one after the other: objects, or names with their arguments.
    fn series(&self, text: &str) -> Option<Vec<Call>> {
        let mut rest = text;
        let mut calls = Vec::new();
        while !rest.is_empty() {
            rest = rest.strip_prefix("[TOOL_CALLS]").unwrap_or(rest).trim_start();
            // The longest name: one may begin with another.
            let named = self
                .names
                .iter()
                .filter_map(|name| {
                    let after = rest.strip_prefix(name.as_str())?;
                    let after = after.strip_prefix(ARGUMENTS).unwrap_or(after);
                    after.starts_with('{').then_some((name, after))
                })
                .max_by_key(|(name, _)| name.len());
            if let Some((_, after)) = named {
                rest = after;
            }
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            let value = values.next()?.ok()?;
            rest = rest.get(values.byte_offset()..)?.trim_start();
            rest = rest.strip_prefix([';', ',']).unwrap_or(rest).trim_start();
            calls.push(match (named, value) {
                (Some((name, _)), arguments @ Value::Object(_)) => Call {
                    name: name.clone(),
                    arguments: arguments.to_string(),
                },
                (Some(_), _) => return None,
                (None, value) => self.call(&value)?,
            });
        }
        (!calls.is_empty()).then_some(calls)
    }

    fn call(&self, call: &Value) -> Option<Call> {
        // Some wrap it as the API does.
        let call = call
            .get("function")
            .filter(|function| function.is_object())
            .unwrap_or(call);
        let name = call.get("name")?.as_str()?;
        if !self.names.iter().any(|known| known == name) {
            return None;
        }
        let arguments = match call.get("arguments").or_else(|| call.get("parameters")) {
            None | Some(Value::Null) => "{}".to_owned(),
            Some(arguments @ Value::Object(_)) => arguments.to_string(),
            Some(Value::String(text)) => {
                serde_json::from_str::<Map<String, Value>>(text).ok()?;
                text.clone()
            }
            Some(_) => return None,
        };
        Some(Call {
            name: name.to_owned(),
            arguments,
        })
    }
}

/// Bytes at the end that may belong to a tag, or to the space before one.
fn undecided(text: &str) -> usize {
    let tag = (1..OPEN.len())
        .rev()
        .find(|&length| text.ends_with(&OPEN[..length]))
        .unwrap_or(0);
    let before = &text[..text.len() - tag];
    text.len() - before.trim_end().len()
}

#[cfg(test)]
mod tests;
