//! What a client is told when it does not get what it asked for, in OpenAI's shape.

use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use freehold_rules::govern::request::{Refusal, whole_seconds};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use crate::metrics::Endpoint;
use crate::worker::{CallWorker, WorkerError, WorkerErrorKind};

/// Code of a prompt, or a prompt and its answer, beyond the context.
const TOO_LONG: &str = "context_length_exceeded";
/// Seconds after which a client may try again where nothing better is known.
const RETRY_SECONDS: u64 = 2;

/// An error of the HTTP API.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// `error.type`.
    pub(crate) kind: &'static str,
    pub(crate) message: String,
    /// The field at fault.
    pub(crate) param: Option<String>,
    /// `error.code`.
    pub(crate) code: Option<&'static str>,
    pub(crate) retry_after_seconds: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            message: message.into(),
            param: None,
            code: None,
            retry_after_seconds: None,
        }
    }

    fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// The same error with another code.
    pub(crate) fn with_code(self, code: &'static str) -> Self {
        self.code(code)
    }

    /// Names the prompt that is too long as the endpoint does.
    pub(crate) fn in_terms_of(mut self, endpoint: Endpoint) -> Self {
        if self.code == Some(TOO_LONG) {
            let name = match endpoint {
                Endpoint::chat_completions => "messages",
                Endpoint::completions => "prompt",
                Endpoint::embeddings => "input",
            };
            self.param = Some(name.to_owned());
        }
        self
    }

    fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_seconds = Some(seconds);
        self
    }

    /// The request is not well formed as a whole.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// One field is wrong.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::bad_request(message).param(param).code("invalid_value")
    }

    /// A field asks for what this version does not do.
    pub(crate) fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::bad_request(message)
            .param(param)
            .code("unsupported_parameter")
    }

    pub(crate) fn unsupported_media_type(found: Option<&str>) -> Self {
        let found = found.map_or_else(|| "nothing".to_owned(), |found| format!("{found:?}"));
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "invalid_request_error",
            format!("content-type is {found} and must be \"application/json\"; send the request as JSON"),
        )
        .code("unsupported_media_type")
    }

    pub(crate) fn too_large(limit_bytes: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            format!("the request body is larger than {limit_bytes} bytes, the most that this gateway reads; shorten it"),
        )
        .code("request_too_large")
    }

    pub(crate) fn too_slow(limit: Duration) -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            format!(
                "the request body was not complete within {} s; send it faster or smaller",
                limit.as_secs_f32()
            ),
        )
        .code("request_timeout")
    }

    pub(crate) fn no_such_path(method: &str, path: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            format!("no such address: {method} {path}; this gateway serves /v1/models, /v1/chat/completions, /v1/completions and /v1/embeddings"),
        )
        .code("unknown_url")
    }

    pub(crate) fn wrong_method(method: &str, path: &str) -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            format!("{path} does not take {method}"),
        )
        .code("method_not_allowed")
    }

    pub(crate) fn unknown_model(name: &str, known: &[&str]) -> Self {
        let known = if known.is_empty() {
            "none is served here yet".to_owned()
        } else {
            format!("served here: {}", known.join(", "))
        };
        // A name comes from outside and may be anything: cut, so that an answer stays an answer.
        let name: String = name.chars().take(200).collect();
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            format!("the model {name:?} does not exist; {known}"),
        )
        .param("model")
        .code("model_not_found")
    }

    /// A rule of the owner's forbids the name as a whole.
    pub(crate) fn held_back(name: &str, reason: &str) -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "permission_error",
            format!("the model {name:?} is held back by a rule: {reason}"),
        )
        .param("model")
        .code("model_refused")
    }

    pub(crate) fn wrong_task(name: &str, does: &str, instead: &str) -> Self {
        Self::bad_request(format!("the model {name:?} {does}; use {instead}"))
            .param("model")
            .code("unsupported_model")
    }

    /// No key, or none that is known.
    pub(crate) fn unauthenticated(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message).code("invalid_api_key")
    }

    pub(crate) fn refused(refusal: &Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::NoKey { .. } | Refusal::UnknownKey { .. } => Self::unauthenticated(message),
            Refusal::NameNotAllowed { .. } => Self::new(StatusCode::FORBIDDEN, "permission_error", message)
                .param("model")
                .code("model_not_allowed"),
            Refusal::OutputTooLong { .. } => Self::bad_request(message)
                .param("max_tokens")
                .code("max_tokens_exceeded"),
            Refusal::ContextTooLong { .. } => Self::bad_request(message).param("messages").code(TOO_LONG),
            Refusal::TooMuch {
                unit, retry_after, ..
            } => Self::new(StatusCode::TOO_MANY_REQUESTS, unit.as_str(), message)
                .code("rate_limit_exceeded")
                .retry_after(whole_seconds(*retry_after)),
        }
    }

    pub(crate) fn not_ready(name: &str, waiting_for: &str) -> Self {
        Self::unavailable(format!("the model {name:?} cannot answer yet: {waiting_for}"))
            .code("model_not_ready")
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", message).retry_after(RETRY_SECONDS)
    }

    pub(crate) fn audit_failed() -> Self {
        Self::unavailable(
            "the request cannot be recorded, and a policy lets no request pass unrecorded; the owner of this machine finds the cause in the agent's log",
        )
        .code("audit_unavailable")
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message).code("internal_error")
    }

    pub(crate) fn bad_gateway(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "server_error", message).code("bad_gateway")
    }

    /// A worker's failure, as its client may see it: a refusal in full, anything else without the inside.
    pub(crate) fn from_worker(error: &CallWorker) -> Self {
        match error {
            CallWorker::Refused(refusal) => Self::from_refusal(refusal),
            CallWorker::Connect { .. } => {
                Self::unavailable("the model's worker is restarting; try again").code("worker_unavailable")
            }
            CallWorker::Lost(_) | CallWorker::Ended => Self::bad_gateway(
                "the model's worker ended before the answer was complete; it is restarted, try again",
            ),
            CallWorker::Protocol { .. } => Self::bad_gateway(
                "the model's worker gave an answer that cannot be read; see the agent's log",
            ),
        }
    }

    fn from_refusal(refusal: &WorkerError) -> Self {
        let message = refusal.message.clone();
        let field = |default: &str| {
            let field = refusal.field.as_deref().unwrap_or(default);
            // Clients know the sampling fields without their group.
            field.strip_prefix("sampling.").unwrap_or(field).to_owned()
        };
        match refusal.kind {
            WorkerErrorKind::QueueFull => {
                let wait = Duration::from_millis(refusal.retry_after_ms.unwrap_or(RETRY_SECONDS * 1000));
                Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", message)
                    .code("queue_full")
                    .retry_after(whole_seconds(wait))
            }
            WorkerErrorKind::PromptTooLong => {
                Self::bad_request(message).param(field("messages")).code(TOO_LONG)
            }
            WorkerErrorKind::InvalidRequest => {
                let error = Self::bad_request(message).code("invalid_value");
                match refusal.field {
                    Some(_) => error.param(field("")),
                    None => error,
                }
            }
            WorkerErrorKind::TemplateFailed => Self::bad_request(message)
                .param(field("messages"))
                .code("invalid_value"),
            WorkerErrorKind::Unsupported => Self::bad_request(message)
                .param(field("model"))
                .code("unsupported_model"),
            WorkerErrorKind::Stopping => Self::unavailable(message).code("worker_unavailable"),
            WorkerErrorKind::Internal => Self::internal(message),
        }
    }

    /// The body.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_seconds {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
