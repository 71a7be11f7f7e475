//! Answers in OpenAI's words: whole, or as the chunks of a stream.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

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
    pub(crate) tokens: Vec<TokenLogprob>,
    pub(crate) reason: Option<FinishReason>,
    /// Characters that were sent, for offsets in a stream.
    sent_characters: usize,
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
                let reason = choice.reason.map(FinishReason::as_str);
                let logprobs = self.logprobs(&choice.tokens, 0);
                match self.api {
                    Api::Chat => json!({
                        "index": index,
                        "message": {"role": "assistant", "content": choice.text, "refusal": null},
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

    /// A chunk with a piece of an answer.
    pub(crate) fn piece(
        &self,
        index: usize,
        choice: &mut Choice,
        text: &str,
        tokens: &[TokenLogprob],
    ) -> Value {
        let logprobs = self.logprobs(tokens, choice.sent_characters);
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

    /// The last chunk of an answer.
    pub(crate) fn ending(&self, index: usize, reason: FinishReason) -> Value {
        let choice = match self.api {
            Api::Chat => json!({
                "index": index,
                "delta": {},
                "logprobs": null,
                "finish_reason": reason.as_str(),
            }),
            Api::Completion => json!({
                "index": index,
                "text": "",
                "logprobs": null,
                "finish_reason": reason.as_str(),
            }),
        };
        self.chunk(vec![choice], None)
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
