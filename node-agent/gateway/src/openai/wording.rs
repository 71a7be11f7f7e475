//! Answers in OpenAI's words: whole, or as the chunks of a stream.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use uuid::Uuid;

use super::tools::{Call, Piece, ToolParser};
use crate::worker::{FinishReason, TokenLogprob};

/// Which of the two APIs answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Api {
    Chat,
    Completion,
}

/// Tokens of a request, over all its answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
}

impl Usage {
    pub(crate) fn to_json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }
}

/// What all parts of one answer share.
#[derive(Clone, Debug)]
pub(crate) struct Wording {
    pub(crate) api: Api,
    pub(crate) id: String,
    pub(crate) created: i64,
    pub(crate) model: String,
    /// `system_fingerprint`: the revision of the deployment.
    pub(crate) fingerprint: String,
    /// Whether log probabilities were asked for.
    pub(crate) logprobs: bool,
    /// Whether each chunk of a stream has a `usage`, null but in the last.
    pub(crate) include_usage: bool,
}

/// One answer as it grows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    pub(crate) text: String,
    /// Calls of tools, in their order.
    calls: Vec<Value>,
    /// Finds calls, where the request offered tools.
    parser: Option<ToolParser>,
    pub(crate) tokens: Vec<TokenLogprob>,
    pub(crate) reason: Option<FinishReason>,
    /// Characters that were sent, for offsets in a stream.
    sent_characters: usize,
}

impl Choice {
    pub(crate) fn new(parser: Option<ToolParser>) -> Self {
        Self {
            parser,
            ..Self::default()
        }
    }

    /// Takes a piece of the answer.
    pub(crate) fn add(&mut self, text: &str) {
        match &mut self.parser {
            None => self.text.push_str(text),
            Some(parser) => {
                let pieces = parser.push(text);
                self.take(pieces);
            }
        }
    }

    /// Takes the end of the answer.
    pub(crate) fn end(&mut self, reason: FinishReason) {
        let pieces = self.parser.as_mut().map(ToolParser::finish).unwrap_or_default();
        self.take(pieces);
        self.reason = Some(reason);
    }

    fn take(&mut self, pieces: Vec<Piece>) {
        for piece in pieces {
            match piece {
                Piece::Text(text) => self.text.push_str(&text),
                Piece::Call(call) => self.calls.push(call_json(&call)),
            }
        }
    }

    /// OpenAI's word for how it ended.
    fn reason(&self, reason: FinishReason) -> &'static str {
        let called = self.parser.as_ref().is_some_and(ToolParser::called);
        match reason {
            FinishReason::Stop if called => "tool_calls",
            reason => reason.as_str(),
        }
    }

    fn message(&self) -> Value {
        let content = if self.calls.is_empty() || !self.text.is_empty() {
            json!(self.text)
        } else {
            Value::Null
        };
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if let (false, Value::Object(message)) = (self.calls.is_empty(), &mut message) {
            message.insert("tool_calls".to_owned(), json!(self.calls));
        }
        message
    }
}

fn call_json(call: &Call) -> Value {
    json!({
        "id": format!("call_{}", Uuid::new_v4().simple()),
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    })
}

impl Wording {
    fn frame(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        let mut frame = Map::new();
        frame.insert("id".to_owned(), json!(self.id));
        frame.insert("object".to_owned(), json!(object));
        frame.insert("created".to_owned(), json!(self.created));
        frame.insert("model".to_owned(), json!(self.model));
        frame.insert("system_fingerprint".to_owned(), json!(self.fingerprint));
        frame.insert("choices".to_owned(), Value::Array(choices));
        frame
    }

    /// The whole answer.
    pub(crate) fn whole(&self, choices: &[Choice], usage: Usage) -> Value {
        let object = match self.api {
            Api::Chat => "chat.completion",
            Api::Completion => "text_completion",
        };
        let choices = choices
            .iter()
            .enumerate()
            .map(|(index, choice)| {
                let reason = choice.reason.map(|reason| choice.reason(reason));
                let logprobs = self.logprobs(&choice.tokens, 0);
                match self.api {
                    Api::Chat => json!({
                        "index": index,
                        "message": choice.message(),
                        "logprobs": logprobs,
                        "finish_reason": reason,
                    }),
                    Api::Completion => json!({
                        "index": index,
                        "text": choice.text,
                        "logprobs": logprobs,
                        "finish_reason": reason,
                    }),
                }
            })
            .collect();
        let mut frame = self.frame(object, choices);
        frame.insert("usage".to_owned(), usage.to_json());
        Value::Object(frame)
    }

    fn chunk(&self, choices: Vec<Value>, usage: Option<Usage>) -> Value {
        let object = match self.api {
            Api::Chat => "chat.completion.chunk",
            Api::Completion => "text_completion",
        };
        let mut frame = self.frame(object, choices);
        if self.include_usage {
            frame.insert("usage".to_owned(), usage.map_or(Value::Null, Usage::to_json));
        }
        Value::Object(frame)
    }

    /// The first chunk of an answer, where the API has one.
    pub(crate) fn opening(&self, index: usize) -> Option<Value> {
        (self.api == Api::Chat).then(|| {
            let delta = json!({"role": "assistant", "content": "", "refusal": null});
            let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
            self.chunk(vec![choice], None)
        })
    }

    /// The chunks for a piece of an answer.
    pub(crate) fn pieces(
        &self,
        index: usize,
        choice: &mut Choice,
        text: String,
        tokens: Vec<TokenLogprob>,
    ) -> Vec<Value> {
        let pieces = match &mut choice.parser {
            None => vec![Piece::Text(text)],
            Some(parser) => parser.push(&text),
        };
        // They go with the next piece that is sent.
        choice.tokens.extend(tokens);
        pieces
            .into_iter()
            .map(|piece| self.piece(index, choice, piece))
            .collect()
    }

    fn piece(&self, index: usize, choice: &mut Choice, piece: Piece) -> Value {
        let tokens = std::mem::take(&mut choice.tokens);
        let text = match piece {
            Piece::Text(text) => text,
            Piece::Call(call) => {
                let mut call = call_json(&call);
                if let Value::Object(fields) = &mut call {
                    fields.insert("index".to_owned(), json!(choice.calls.len()));
                }
                choice.calls.push(call.clone());
                let choice = json!({
                    "index": index,
                    "delta": {"tool_calls": [call]},
                    "logprobs": self.logprobs(&tokens, 0),
                    "finish_reason": null,
                });
                return self.chunk(vec![choice], None);
            }
        };
        let logprobs = self.logprobs(&tokens, choice.sent_characters);
        choice.sent_characters += text.chars().count();
        let choice = match self.api {
            Api::Chat => json!({
                "index": index,
                "delta": {"content": text},
                "logprobs": logprobs,
                "finish_reason": null,
            }),
            Api::Completion => json!({
                "index": index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": null,
            }),
        };
        self.chunk(vec![choice], None)
    }

    /// The last chunks of an answer.
    pub(crate) fn ending(&self, index: usize, choice: &mut Choice, reason: FinishReason) -> Vec<Value> {
        let rest = choice.parser.as_mut().map(ToolParser::finish).unwrap_or_default();
        let mut chunks: Vec<Value> = rest
            .into_iter()
            .map(|piece| self.piece(index, choice, piece))
            .collect();
        let tokens = std::mem::take(&mut choice.tokens);
        let logprobs = if tokens.is_empty() {
            Value::Null
        } else {
            self.logprobs(&tokens, choice.sent_characters)
        };
        let reason = choice.reason(reason);
        let choice = match self.api {
            Api::Chat => json!({
                "index": index,
                "delta": {},
                "logprobs": logprobs,
                "finish_reason": reason,
            }),
            Api::Completion => json!({
                "index": index,
                "text": "",
                "logprobs": logprobs,
                "finish_reason": reason,
            }),
        };
        chunks.push(self.chunk(vec![choice], None));
        chunks
    }

    /// The chunk with the count of tokens, where it was asked for.
    pub(crate) fn usage(&self, usage: Usage) -> Option<Value> {
        self.include_usage.then(|| self.chunk(Vec::new(), Some(usage)))
    }

    /// Log probabilities of tokens whose text begins `offset` characters into the answer.
    fn logprobs(&self, tokens: &[TokenLogprob], offset: usize) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        match self.api {
            Api::Chat => chat_logprobs(tokens),
            Api::Completion => completion_logprobs(tokens, offset),
        }
    }
}

fn chat_logprobs(tokens: &[TokenLogprob]) -> Value {
    let content: Vec<Value> = tokens
        .iter()
        .map(|token| {
            let top: Vec<Value> = token
                .top
                .iter()
                .map(|top| json!({"token": top.token, "bytes": top.bytes, "logprob": top.logprob}))
                .collect();
            json!({
                "token": token.token,
                "bytes": token.bytes,
                "logprob": token.logprob,
                "top_logprobs": top,
            })
        })
        .collect();
    json!({"content": content, "refusal": null})
}

fn completion_logprobs(tokens: &[TokenLogprob], offset: usize) -> Value {
    let mut offset = offset;
    let mut offsets = Vec::with_capacity(tokens.len());
    for token in tokens {
        offsets.push(offset);
        offset += token.token.chars().count();
    }
    let top: Vec<BTreeMap<&str, f32>> = tokens
        .iter()
        .map(|token| {
            token
                .top
                .iter()
                .map(|top| (top.token.as_str(), top.logprob))
                .collect()
        })
        .collect();
    json!({
        "tokens": tokens.iter().map(|token| &token.token).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
        "top_logprobs": top,
        "text_offset": offsets,
    })
}
