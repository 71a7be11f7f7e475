//! Tool calls: what a request offers, and finding calls in what a model writes.
//!
//! Families write calls in their own ways: `<tool_call>{…}</tool_call>` (Hermes, Qwen, SmolLM, Granite 4), or
//! an answer that is nothing but JSON, one object or a list, with or without a marker before it (Llama 3,
//! Mistral, Granite 3, Phi). Both are found in any answer to a request with tools; markers that are control
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
const TOOLS_LIMIT: usize = 128;

/// What a request offers and asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Tools {
    /// As the chat template gets them.
    pub(crate) offered: Option<Value>,
    names: Vec<String>,
    /// What the answer must be, where a call is demanded.
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
            schema: json!({"anyOf": forced.into_iter().map(call_schema).collect::<Vec<_>>()}),
        });
        Ok(Self {
            names,
            offered: Some(Value::Array(offered)),
            constraint,
        })
    }

    /// Reads an answer; None where there is nothing to call.
    pub(crate) fn parser(&self) -> Option<ToolParser> {
        (!self.names.is_empty()).then(|| ToolParser {
            names: self.names.clone(),
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

/// What a call of this tool looks like.
fn call_schema(tool: &Value) -> Value {
    let parameters = tool
        .pointer("/function/parameters")
        .filter(|parameters| parameters.is_object());
    json!({
        "type": "object",
        "properties": {
            "name": {"const": tool.pointer("/function/name")},
            "arguments": parameters.cloned().unwrap_or_else(|| json!({"type": "object"})),
        },
        "required": ["name", "arguments"],
        "additionalProperties": false,
    })
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

    fn found(&mut self, calls: Vec<Call>) -> Vec<Piece> {
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
                if begin.starts_with(['{', '[']) || MARKERS.iter().any(|marker| begin.starts_with(marker)) {
                    self.state = State::Whole;
                } else if MARKERS.iter().any(|marker| may_become(marker)) || may_become(OPEN) {
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
        match serde_json::from_str(text).ok()? {
            Value::Array(calls) if !calls.is_empty() => calls.iter().map(|call| self.call(call)).collect(),
            one @ Value::Object(_) => Some(vec![self.call(&one)?]),
            _ => None,
        }
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tools() -> Tools {
        let body = json!({"tools": [
            {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},
            {"type": "function", "function": {"name": "clock"}},
        ]});
        Tools::take(&mut Fields::of(body, "").unwrap()).unwrap()
    }

    /// The answer in pieces of `size` characters, texts joined.
    fn read(answer: &str, size: usize) -> Vec<Piece> {
        let mut parser = tools().parser().unwrap();
        let characters: Vec<char> = answer.chars().collect();
        let mut pieces: Vec<Piece> = characters
            .chunks(size)
            .flat_map(|chunk| parser.push(&chunk.iter().collect::<String>()))
            .collect();
        pieces.extend(parser.finish());
        let called = pieces.iter().any(|piece| matches!(piece, Piece::Call(_)));
        assert_eq!(parser.called(), called);
        let mut joined: Vec<Piece> = Vec::new();
        for piece in pieces {
            match (joined.last_mut(), piece) {
                (Some(Piece::Text(before)), Piece::Text(text)) => before.push_str(&text),
                (_, piece) => joined.push(piece),
            }
        }
        joined
    }

    fn text(text: &str) -> Piece {
        Piece::Text(text.to_owned())
    }

    fn call(name: &str, arguments: &str) -> Piece {
        Piece::Call(Call {
            name: name.to_owned(),
            arguments: arguments.to_owned(),
        })
    }

    #[test]
    fn calls_of_each_family_are_found_however_they_are_cut() {
        let paris = call("weather", r#"{"city":"Paris"}"#);
        let hermes = r#"<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>"#;
        for (answer, expected) in [
            (hermes.to_owned(), vec![paris.clone()]),
            (
                format!("{hermes}\n{hermes}\n"),
                vec![paris.clone(), paris.clone()],
            ),
            (
                format!("I will look.\n\n{hermes}\nThere."),
                vec![text("I will look."), paris.clone(), text("\nThere.")],
            ),
            (hermes.replace("</tool_call>", ""), vec![paris.clone()]),
            (
                r#"{"name": "weather", "parameters": {"city": "Paris"}}"#.to_owned(),
                vec![paris.clone()],
            ),
            (
                r#"<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}"#.to_owned(),
                vec![paris.clone()],
            ),
            (
                r#" [TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "clock"}]"#
                    .to_owned(),
                vec![paris.clone(), call("clock", "{}")],
            ),
            (
                "```json\n{\"name\": \"weather\", \"arguments\": \"{\\\"city\\\":\\\"Paris\\\"}\"}\n```"
                    .to_owned(),
                vec![paris.clone()],
            ),
            (
                r#"{"type": "function", "function": {"name": "clock", "arguments": {}}}"#.to_owned(),
                vec![call("clock", "{}")],
            ),
        ] {
            for size in [1, 2, 3, 7, 1000] {
                assert_eq!(read(&answer, size), expected, "{answer:?} by {size}");
            }
        }
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for answer in [
            "",
            "It is sunny.",
            "  {\"city\": \"Paris\"}",
            r#"{"name": "delete_everything", "arguments": {}}"#,
            r#"{"name": "weather", "arguments": [1]}"#,
            "<tool_call>{\"name\": \"weather\", </tool_call> and on",
            "<tool_call>{\"name\": \"weather\"",
            "a < b and <tool_",
            "<|python_tag|>print(1)",
            "ends with space \n ",
        ] {
            let expected = if answer.is_empty() {
                vec![]
            } else {
                vec![text(answer)]
            };
            for size in [1, 4, 1000] {
                assert_eq!(read(answer, size), expected, "{answer:?} by {size}");
            }
        }
    }

    #[test]
    fn a_demanded_call_becomes_a_schema() {
        let take = |choice: Value| {
            let body = json!({"tools": tools().offered, "tool_choice": choice});
            Tools::take(&mut Fields::of(body, "").unwrap())
        };
        let schema = |tools: Tools| match tools.constraint {
            Some(ConstraintInput::JsonSchema { schema }) => schema["anyOf"].as_array().unwrap().len(),
            _ => 0,
        };
        assert_eq!(schema(take(json!("required")).unwrap()), 2);
        assert_eq!(
            schema(take(json!({"type": "function", "function": {"name": "clock"}})).unwrap()),
            1
        );
        assert_eq!(schema(take(json!("auto")).unwrap()), 0);
        assert_eq!(take(json!("none")).unwrap(), Tools::default());
        let error = take(json!({"type": "function", "function": {"name": "x"}})).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tool_choice.function.name"));
        assert!(take(json!("sometimes")).is_err());
    }

    proptest! {
        /// Text is never lost, but for space around calls.
        #[test]
        fn nothing_is_lost(parts in prop::collection::vec(prop_oneof![
            Just("<tool_call>".to_owned()), Just("</tool_call>".to_owned()), Just("{\"name\": \"clock\"}".to_owned()),
            Just(" \n".to_owned()), "[a-z<>{}\\[\\]|`é]{0,6}"], 0..8), size in 1_usize..9)
        {
            let answer = parts.concat();
            let found = read(&answer, size);
            prop_assert_eq!(&found, &read(&answer, 1000));
            if !found.iter().any(|piece| matches!(piece, Piece::Call(_))) {
                let joined: String = found.iter().map(|piece| match piece {
                    Piece::Text(text) => text.as_str(),
                    Piece::Call(_) => "",
                }).collect();
                prop_assert_eq!(joined, answer);
            }
        }
    }
}
