//! The types on the wire between the bus and a worker, and between a worker and its supervisor.

use std::collections::BTreeMap;

use freehold_crds::Device;
use freehold_crds::model_deployment::ModelFacts;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What an answer must look like. It is held to it token by token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ConstraintInput {
    /// Any JSON object.
    JsonObject,
    /// JSON that the schema allows.
    JsonSchema {
        /// Draft 2020-12.
        schema: Value,
    },
    /// Text that the regular expression matches from beginning to end.
    Regex {
        /// The expression.
        regex: String,
    },
    /// Text of a grammar in llguidance's form of Lark.
    Lark {
        /// The grammar.
        lark: String,
    },
}

/// One generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateCall {
    /// Names the request in logs on both sides.
    pub request_id: String,
    /// What the model continues.
    pub prompt: PromptInput,
    /// Longest answer in tokens; absent: as far as the context goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// Longest prompt and answer together in tokens, where a rule sets one below the worker's own
    /// context. A prompt that does not fit is refused as [`WorkerErrorKind::PromptTooLong`]; an answer
    /// that reaches it finishes with [`FinishReason::Length`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_context: Option<u32>,
    /// Whose request it is; prompts share what was computed for them within one scope only.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub scope: String,
    /// Strings that end the answer and are not part of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Whether the prompt stands in front of the answer.
    #[serde(default)]
    pub echo: bool,
    /// What the answer must look like, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub constraint: Option<ConstraintInput>,
    /// How tokens are chosen.
    #[serde(default)]
    pub sampling: SamplingCall,
}

/// What a model continues.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum PromptInput {
    /// Plain text.
    Text {
        /// The text.
        text: String,
    },
    /// Tokens of the model's own vocabulary.
    Tokens {
        /// Their numbers.
        tokens: Vec<u32>,
    },
    /// A conversation, for the model's chat template.
    Chat {
        /// Messages as in the OpenAI API: an array of objects whose `content` is a string or null.
        messages: Value,
        /// Tools as in the OpenAI API, for templates that know them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tools: Option<Value>,
    },
}

/// How tokens are chosen. What is absent is the engine's default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SamplingCall {
    /// 0: always the likeliest token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Likeliest tokens that are considered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Probability mass that is considered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Least probability, relative to the likeliest token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Factor against tokens that were seen; 1: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// Taken from a token's logit for each time it was seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    /// Taken from a token's logit once it was seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// Makes the choice repeatable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Added to the logits of these tokens.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub logit_bias: BTreeMap<u32, f32>,
    /// Reports log probabilities, with so many of the likeliest alternatives; 0: the chosen token only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
}

/// One line of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum WorkerEvent {
    /// The prompt is in; comes first, once.
    Started {
        /// Tokens of the prompt.
        prompt_tokens: u32,
    },
    /// A piece of the answer, whole characters only.
    Text {
        /// The piece.
        text: String,
        /// Its tokens, where log probabilities were asked for.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        tokens: Vec<TokenLogprob>,
    },
    /// The answer is complete; comes last, once.
    Finished {
        /// Why it ends.
        reason: FinishReason,
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens of the answer.
        completion_tokens: u32,
    },
    /// The answer broke off; comes last instead of `Finished`.
    Failed {
        /// Why.
        message: String,
    },
}

/// Why an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop string did.
    Stop,
    /// `max_tokens` or the context was reached.
    Length,
}

impl FinishReason {
    /// The word in the OpenAI API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// A token of an answer with its log probability.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// The token as text; a part of a character reads as U+FFFD.
    pub token: String,
    /// Its exact bytes.
    pub bytes: Vec<u8>,
    /// Its log probability.
    pub logprob: f32,
    /// The likeliest tokens at this place, best first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<TopLogprob>,
}

/// A token that could have been chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob {
    /// The token as text.
    pub token: String,
    /// Its exact bytes.
    pub bytes: Vec<u8>,
    /// Its log probability.
    pub logprob: f32,
}

/// Several texts to embed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EmbedCall {
    /// Names the request in logs on both sides.
    pub request_id: String,
    /// The texts, answered in this order.
    pub input: Vec<EmbedInput>,
}

/// One text to embed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EmbedInput {
    /// Plain text.
    Text(String),
    /// Tokens of the model's own vocabulary.
    Tokens(Vec<u32>),
}

/// Embeddings, one for each input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EmbedReply {
    /// Normalised vectors, `[inputs, dimensions]`.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens of all inputs.
    pub prompt_tokens: u32,
}

/// What kind of refusal a worker answers with, before the first event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkerErrorKind {
    /// Every slot is taken and the queue is full.
    QueueFull,
    /// The prompt does not fit in the context.
    PromptTooLong,
    /// A field is out of bounds; `field` names it.
    InvalidRequest,
    /// The chat template did not render the messages.
    TemplateFailed,
    /// The model cannot do that, such as embed with a generator.
    Unsupported,
    /// The worker is on its way out.
    Stopping,
    /// Something broke inside.
    Internal,
}

impl WorkerErrorKind {
    /// The HTTP status on the worker's socket.
    #[must_use]
    pub fn status(self) -> StatusCode {
        match self {
            Self::QueueFull => StatusCode::TOO_MANY_REQUESTS,
            Self::PromptTooLong | Self::InvalidRequest | Self::TemplateFailed | Self::Unsupported => {
                StatusCode::BAD_REQUEST
            }
            Self::Stopping => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct WorkerError {
    /// What kind.
    pub kind: WorkerErrorKind,
    /// What a client may read: what was found, what is allowed.
    pub message: String,
    /// The field of the call at fault, such as `sampling.top_p` or `messages`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// When to try again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

/// What `GET /status` answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// What was loaded, and on what.
    pub ready: WorkerReady,
    /// Its counters now.
    pub beat: WorkerBeat,
}

/// One line on a worker's stdout, for its supervisor: `{"beat":{…}}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerLine {
    /// The model is on its way into memory.
    Loading(WorkerLoading),
    /// The socket answers.
    Ready(Box<WorkerReady>),
    /// Every second while there is work, every five seconds at rest.
    Beat(WorkerBeat),
    /// The worker ends; exit code 3 where a retry would end the same way.
    Failed(WorkerFailed),
}

/// How far loading is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerLoading {
    /// What is being done, such as `weights`.
    pub stage: String,
    /// From 0 to 1.
    #[serde(default)]
    pub fraction: f32,
}

/// What a worker loaded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerReady {
    /// What the model turned out to be.
    pub facts: ModelFacts,
    /// Longest context in tokens that it serves.
    pub context_length: u32,
    /// Milliseconds that loading took, the first forward pass included.
    pub load_ms: u64,
    /// The device in use.
    pub device: Device,
    /// Why that is not the device that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_reason: Option<String>,
}

/// A worker's counters. They only grow, but for the gauges at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerBeat {
    /// Forward passes; advances while there is work and the worker is alive.
    pub steps: u64,
    /// Tokens generated.
    pub tokens_generated: u64,
    /// Prompt tokens read.
    pub prompt_tokens: u64,
    /// Requests being decoded.
    pub active: u32,
    /// Requests waiting.
    pub queued: u32,
    /// Recent pace over all requests.
    pub tokens_per_second: f32,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
}

/// Why a worker gave up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerFailed {
    /// One of `freehold_crds::conditions::reason`.
    pub reason: String,
    /// What a person should know.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_read_as_the_contract_writes_them() {
        let beat: WorkerLine = serde_json::from_str(
            r#"{"beat":{"steps":1,"tokens_generated":2,"prompt_tokens":3,"active":1,"queued":0,"tokens_per_second":9.5,"resident_bytes":4}}"#,
        )
        .expect("a beat");
        assert!(matches!(beat, WorkerLine::Beat(WorkerBeat { steps: 1, .. })));
        let event = WorkerEvent::Finished {
            reason: FinishReason::Length,
            prompt_tokens: 3,
            completion_tokens: 4,
        };
        assert_eq!(
            serde_json::to_string(&event).expect("JSON"),
            r#"{"type":"finished","reason":"length","prompt_tokens":3,"completion_tokens":4}"#
        );
    }

    #[test]
    fn logit_bias_survives_the_wire() {
        let sampling = SamplingCall {
            logit_bias: BTreeMap::from([(7, -100.0)]),
            ..SamplingCall::default()
        };
        let text = serde_json::to_string(&sampling).expect("JSON");
        assert_eq!(
            serde_json::from_str::<SamplingCall>(&text).expect("JSON"),
            sampling
        );
    }
}
