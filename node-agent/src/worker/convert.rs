//! Between the protocol's types and the engine's.

use freehold_engine::{
    Constraint, GenerateRequest, Prompt, Reject, SamplingParams, TokenLogprob as EngineLogprob,
};
use freehold_gateway::worker::{
    ConstraintInput, EmbedInput, FinishReason, GenerateCall, PromptInput, SamplingCall, TokenLogprob,
    TopLogprob, WorkerError, WorkerErrorKind, WorkerEvent,
};

/// The OpenAI API's default, where a call names none.
const DEFAULT_TEMPERATURE: f32 = 1.0;

pub(super) fn request(call: GenerateCall) -> GenerateRequest {
    GenerateRequest {
        id: call.request_id,
        prompt: match call.prompt {
            PromptInput::Text { text } => Prompt::Text(text),
            PromptInput::Tokens { tokens } => Prompt::Tokens(tokens),
            PromptInput::Chat { messages, tools } => Prompt::Chat { messages, tools },
        },
        max_tokens: call.max_tokens,
        max_context: call.max_context,
        scope: call.scope,
        constraint: call.constraint.map(constraint),
        stop: call.stop,
        sampling: sampling(call.sampling),
    }
}

fn constraint(input: ConstraintInput) -> Constraint {
    match input {
        ConstraintInput::JsonObject => Constraint::JsonObject,
        ConstraintInput::JsonSchema { schema } => Constraint::JsonSchema(schema),
        ConstraintInput::Regex { regex } => Constraint::Regex(regex),
        ConstraintInput::Lark { lark } => Constraint::Lark(lark),
    }
}

fn sampling(call: SamplingCall) -> SamplingParams {
    SamplingParams {
        temperature: call.temperature.unwrap_or(DEFAULT_TEMPERATURE),
        // 0 is "off" for each of these.
        top_k: call.top_k.unwrap_or(0),
        top_p: call.top_p.unwrap_or(0.0),
        min_p: call.min_p.unwrap_or(0.0),
        repetition_penalty: call.repetition_penalty.unwrap_or(0.0),
        frequency_penalty: call.frequency_penalty.unwrap_or(0.0),
        presence_penalty: call.presence_penalty.unwrap_or(0.0),
        seed: call.seed,
        logit_bias: call.logit_bias.into_iter().collect(),
        logprobs: call.logprobs,
    }
}

pub(super) fn embed_input(input: EmbedInput) -> Prompt {
    match input {
        EmbedInput::Text(text) => Prompt::Text(text),
        EmbedInput::Tokens(tokens) => Prompt::Tokens(tokens),
    }
}

/// One event of the engine on the wire; None where nothing is told.
pub(super) fn event(event: freehold_engine::GenerateEvent) -> Option<WorkerEvent> {
    use freehold_engine::FinishReason as Engine;
    use freehold_engine::GenerateEvent::{Finished, Started, Text};
    Some(match event {
        Started { prompt_tokens } => WorkerEvent::Started {
            prompt_tokens: count(prompt_tokens),
        },
        Text { text, tokens } => WorkerEvent::Text {
            text,
            tokens: tokens.into_iter().map(logprob).collect(),
        },
        Finished(end) => {
            let reason = match end.reason {
                Engine::Stop => FinishReason::Stop,
                Engine::Length => FinishReason::Length,
                Engine::Error(message) => return Some(WorkerEvent::Failed { message }),
                Engine::Cancelled => {
                    return Some(WorkerEvent::Failed {
                        message: "the request was cancelled".to_owned(),
                    });
                }
            };
            WorkerEvent::Finished {
                reason,
                prompt_tokens: count(end.prompt_tokens),
                completion_tokens: count(end.completion_tokens),
            }
        }
    })
}

fn logprob(token: EngineLogprob) -> TokenLogprob {
    TokenLogprob {
        token: token.text,
        bytes: token.bytes,
        logprob: token.logprob,
        top: token
            .top
            .into_iter()
            .map(|top| TopLogprob {
                token: top.text,
                bytes: top.bytes,
                logprob: top.logprob,
            })
            .collect(),
    }
}

pub(super) fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

pub(super) fn refusal(reject: &Reject) -> WorkerError {
    let (kind, field, retry_after_ms) = match reject {
        Reject::QueueFull { retry_after_ms, .. } => (WorkerErrorKind::QueueFull, None, Some(*retry_after_ms)),
        Reject::PromptTooLong { .. } => (WorkerErrorKind::PromptTooLong, None, None),
        Reject::InvalidRequest { field, .. } => (WorkerErrorKind::InvalidRequest, Some(field.clone()), None),
        Reject::Template(_) => (WorkerErrorKind::TemplateFailed, Some("messages".to_owned()), None),
        Reject::Unsupported { .. } => (WorkerErrorKind::Unsupported, None, None),
        Reject::Stopping => (WorkerErrorKind::Stopping, None, None),
        Reject::Compute(_) => (WorkerErrorKind::Internal, None, None),
    };
    WorkerError {
        kind,
        message: reject.to_string(),
        field,
        retry_after_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_sampling_is_the_apis_default_and_zero_stays_greedy() {
        assert!((sampling(SamplingCall::default()).temperature - 1.0).abs() < f32::EPSILON);
        let greedy = SamplingCall {
            temperature: Some(0.0),
            ..SamplingCall::default()
        };
        assert_eq!(sampling(greedy), SamplingParams::default());
    }

    #[test]
    fn refusals_keep_their_field_and_their_pause() {
        let full = refusal(&Reject::QueueFull {
            queued: 3,
            retry_after_ms: 250,
        });
        assert_eq!(
            (full.kind, full.retry_after_ms),
            (WorkerErrorKind::QueueFull, Some(250))
        );
        let (field, found, allowed) = ("sampling.top_p".to_owned(), "7".to_owned(), "0 to 1".to_owned());
        let invalid = refusal(&Reject::InvalidRequest {
            field,
            found,
            allowed,
        });
        assert_eq!(invalid.field.as_deref(), Some("sampling.top_p"));
        assert_eq!(invalid.kind, WorkerErrorKind::InvalidRequest);
    }
}
