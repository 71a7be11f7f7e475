//! The HTTP API: its addresses, how a body is read, and the way of a request through the gateway.
//!
//! [`post`] is that way, the same for all three: read -> admit -> route -> serve. Reading is in `chat`,
//! `completions` and `embeddings`, serving in `generate` and at the end of this file.

mod body;
mod chat;
mod completions;
mod embeddings;
mod fan_out;
mod fields;
mod format;
mod generate;
mod models;
mod parameters;
mod tools;
mod wording;

use std::any::Any;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post as on_post};
use axum::{Extension, Json, Router};
use freehold_rules::govern::request::Size;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use serde_json::Value;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::{error, warn};
use uuid::Uuid;

use crate::error::ApiError;
use crate::exchange::{Ask, Exchange, HOP_HEADER, Intake};
use crate::gateway::Gateway;
use crate::metrics::Endpoint;
use crate::peer;
use crate::route::{Destination, Routing};
use crate::worker::{CallWorker, EmbedCall, WorkerClient};
use body::{HeldBody, check_content_type, parse, read_body};
use chat::ChatRequest;
use completions::CompletionRequest;
use embeddings::{Embeddings, EmbeddingsRequest};
use fields::{Fields, wrong_type};
use generate::GenerateJob;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest request id that is taken over from a client, in bytes.
const REQUEST_ID_LIMIT: usize = 128;
/// Longest name of a model that is looked at, in bytes.
const NAME_LIMIT: usize = 512;
/// The id of a request: the client's own, or a new one.
#[derive(Clone, Debug)]
struct RequestId(String);

impl Gateway {
    /// The HTTP API as a service, for those who bring their own listener.
    pub fn router(&self) -> Router {
        Router::new()
            .route("/v1/models", get(models::list))
            .route("/v1/models/{*name}", get(models::one))
            .route("/v1/chat/completions", on_post(chat_completions))
            .route("/v1/completions", on_post(text_completions))
            .route("/v1/embeddings", on_post(embed))
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .fallback(no_such_path)
            .method_not_allowed_fallback(wrong_method)
            .layer(CatchPanicLayer::custom(panicked))
            .layer(middleware::from_fn(with_request_id))
            .with_state(self.clone())
    }
}

async fn chat_completions(
    State(gateway): State<Gateway>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Response {
    post(gateway, Endpoint::chat_completions, id, request).await
}

async fn text_completions(
    State(gateway): State<Gateway>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Response {
    post(gateway, Endpoint::completions, id, request).await
}

async fn embed(
    State(gateway): State<Gateway>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Response {
    post(gateway, Endpoint::embeddings, id, request).await
}

async fn readyz(State(gateway): State<Gateway>) -> Response {
    let snapshot = gateway.snapshot();
    let waiting = if !snapshot.applied {
        "waiting for the agent to say what this machine serves\n"
    } else if snapshot.state.coming_back {
        "loading the models that this machine has\n"
    } else {
        return "ok\n".into_response();
    };
    (StatusCode::SERVICE_UNAVAILABLE, waiting).into_response()
}

async fn metrics(State(gateway): State<Gateway>) -> Response {
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], gateway.metrics()).into_response()
}

async fn no_such_path(method: Method, uri: Uri) -> ApiError {
    ApiError::no_such_path(method.as_str(), &cut(uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::wrong_method(method.as_str(), &cut(uri.path()))
}

fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}

#[allow(clippy::needless_pass_by_value, reason = "the layer's signature")]
fn panicked(_cause: Box<dyn Any + Send>) -> Response {
    // The panic hook has told where. Its words may hold content, so they are not repeated here.
    error!("Caught a panic in a handler");
    ApiError::internal("something broke inside the gateway; the agent's log says where").into_response()
}

/// Takes over the client's request id, or makes one, and sends it back.
async fn with_request_id(mut request: Request, next: Next) -> Response {
    let id = request
        .headers()
        .get(&REQUEST_ID)
        .and_then(|value| value.to_str().ok())
        .filter(|id| is_request_id(id))
        .map_or_else(|| format!("req-{}", Uuid::now_v7().simple()), ToOwned::to_owned);
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::try_from(id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

fn is_request_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/".contains(&byte);
    !id.is_empty() && id.len() <= REQUEST_ID_LIMIT && id.bytes().all(allowed)
}

/// What a request wants done.
enum Job {
    Generate(GenerateJob),
    Embed(EmbeddingsRequest),
}

/// What is kept of the request as the client sent it, for another machine's gateway.
struct Original {
    path: &'static str,
    headers: HeaderMap,
    body: HeldBody,
}

async fn post(gateway: Gateway, endpoint: Endpoint, id: RequestId, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let mut intake = Intake::new(gateway.clone(), endpoint, id.0, &head.headers);
    match admit(&mut intake, &gateway, endpoint, &head.headers, body).await {
        Err(error) => {
            let error = error.in_terms_of(endpoint);
            intake.turn_away(&error);
            error.into_response()
        }
        Ok((job, exchange, size, body)) => {
            let original = Original {
                path: match endpoint {
                    Endpoint::chat_completions => "/v1/chat/completions",
                    Endpoint::completions => "/v1/completions",
                    Endpoint::embeddings => "/v1/embeddings",
                },
                headers: head.headers,
                body,
            };
            serve(job, exchange, &size, original).await
        }
    }
}

async fn admit(
    intake: &mut Intake,
    gateway: &Gateway,
    endpoint: Endpoint,
    headers: &HeaderMap,
    body: Body,
) -> Result<(Job, Exchange, Size, HeldBody), ApiError> {
    intake.authenticate()?;
    check_content_type(headers)?;
    let body = read_body(gateway, headers, body).await?;
    let value = parse(&body.bytes)?;
    let job = match endpoint {
        Endpoint::chat_completions => Job::Generate(ChatRequest::read(value)?.into()),
        Endpoint::completions => Job::Generate(CompletionRequest::read(value)?.into()),
        Endpoint::embeddings => Job::Embed(EmbeddingsRequest::read(value)?),
    };
    let ask = match &job {
        Job::Generate(job) => job.ask(),
        Job::Embed(request) => Ask {
            model: &request.model,
            output_tokens: None,
            prompt_bytes: request.prompt_bytes,
            answers: 1,
            generates: false,
        },
    };
    let (exchange, size) = intake.admit(ask).await?;
    Ok((job, exchange, size, body))
}

/// For fuzzers: reads a body as each endpoint would. Gives the words of those that refuse it.
#[doc(hidden)]
#[must_use]
pub fn read_as_any_request(body: &[u8]) -> Vec<String> {
    let value = match parse(body) {
        Ok(value) => value,
        Err(error) => return vec![error.message],
    };
    let refusals = [
        ChatRequest::read(value.clone()).err(),
        CompletionRequest::read(value.clone()).err(),
        EmbeddingsRequest::read(value).err(),
    ];
    refusals
        .into_iter()
        .flatten()
        .map(|error| error.message)
        .collect()
}

/// Takes `model`, which every request has.
fn model_name(fields: &mut Fields) -> Result<String, ApiError> {
    match fields.required("model")? {
        Value::String(name) if name.is_empty() => {
            Err(ApiError::invalid("model", "model is empty and must name a model"))
        }
        Value::String(name) if name.len() > NAME_LIMIT => Err(ApiError::invalid(
            "model",
            format!("model is {} bytes long and may be {NAME_LIMIT}", name.len()),
        )),
        Value::String(name) => Ok(name),
        other => Err(wrong_type("model", &other, "a string")),
    }
}

/// A request that its destination did not answer.
struct Unserved {
    exchange: Box<Exchange>,
    error: ApiError,
    /// Whether another destination may take it: this one never began it.
    elsewhere: bool,
}

impl Unserved {
    fn by_worker(exchange: Exchange, error: &CallWorker) -> Self {
        let elsewhere = error.is_unserved();
        if !matches!(error, CallWorker::Refused(_)) {
            warn!(request = exchange.request_id(), %error, "Lost a worker");
        }
        Self {
            exchange: Box::new(exchange),
            error: ApiError::from_worker(error),
            elsewhere,
        }
    }

    fn finally(exchange: Exchange, error: ApiError) -> Self {
        Self {
            exchange: Box::new(exchange),
            error,
            elsewhere: false,
        }
    }
}

/// Finds who takes the request, and answers.
async fn serve(job: Job, mut exchange: Exchange, size: &Size, original: Original) -> Response {
    let may_forward = !original.headers.contains_key(HOP_HEADER);
    let mut routing = Routing::new(&exchange, may_forward);
    loop {
        let (tried, served) = match routing.next().await {
            Err(error) => return failed(exchange, error),
            Ok(Destination::Peer { place, address }) => {
                exchange.taken_by(&format!("{}@{}", place.assignment, place.node), None);
                let served = pass_on(exchange, &original, &place.node, &address).await;
                (place, served)
            }
            Ok(Destination::Worker {
                place,
                client,
                activity,
            }) => {
                exchange.taken_by(&place.assignment, Some(activity));
                let served = match &job {
                    Job::Generate(job) => job.serve(client, exchange, size, &place.assignment).await,
                    Job::Embed(request) => embed_with(&client, exchange, request).await,
                };
                (place, served)
            }
        };
        match served {
            Ok(response) => return response,
            Err(unserved) if unserved.elsewhere => {
                routing.failed(tried, unserved.error);
                exchange = *unserved.exchange;
            }
            Err(unserved) => return failed(*unserved.exchange, unserved.error),
        }
    }
}

fn failed(mut exchange: Exchange, error: ApiError) -> Response {
    let error = error.in_terms_of(exchange.endpoint());
    exchange.fail(&error);
    drop(exchange);
    error.into_response()
}

async fn embed_with(
    client: &WorkerClient,
    mut exchange: Exchange,
    request: &EmbeddingsRequest,
) -> Result<Response, Unserved> {
    let call = EmbedCall {
        request_id: exchange.request_id().to_owned(),
        input: request.input.clone(),
    };
    let reply = match client.embed(&call).await {
        Ok(reply) => reply,
        Err(error) => return Err(Unserved::by_worker(exchange, &error)),
    };
    if reply.vectors.len() != request.input.len() {
        let error = CallWorker::Protocol {
            found: format!(
                "{} vectors for {} inputs",
                reply.vectors.len(),
                request.input.len()
            ),
        };
        return Err(Unserved::by_worker(exchange, &error));
    }
    let answer = Json(Embeddings::new(exchange.model(), &reply, request.encoding)).into_response();
    exchange.piece();
    exchange.used(u64::from(reply.prompt_tokens), 0);
    exchange.end(StatusCode::OK.as_u16());
    drop(exchange);
    Ok(answer)
}

/// Sends the request to the gateway of the machine that holds the model.
async fn pass_on(
    exchange: Exchange,
    original: &Original,
    node: &str,
    address: &str,
) -> Result<Response, Unserved> {
    let Original { path, headers, body } = original;
    let request_id = exchange.request_id().to_owned();
    let away = |exchange: Exchange, reason: &str| Unserved {
        error: ApiError::not_ready(
            exchange.model(),
            &format!("the machine that holds it, {node}, cannot answer now: {reason}"),
        ),
        exchange: Box::new(exchange),
        elsewhere: true,
    };
    match peer::forward(address, path, headers, &request_id, body.bytes.clone()).await {
        Ok(answer) if answer.status() == StatusCode::SERVICE_UNAVAILABLE => {
            let reason = answer.error_message().await;
            Err(away(exchange, reason.as_deref().unwrap_or("it is not ready")))
        }
        Ok(answer) => Ok(answer.into_response(exchange)),
        Err(error) => {
            warn!(request = request_id, node, %error, "Failed to pass a request on");
            if error.is_unserved() {
                return Err(away(exchange, "it cannot be reached"));
            }
            let error = ApiError::bad_gateway(format!(
                "the connection to the machine that holds the model, {node}, broke"
            ));
            Err(Unserved::finally(exchange, error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// JSON of any shape, with the API's own field names among its keys.
    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
            prop_oneof![Just("user"), Just("text"), Just("chat"), Just("auto")].prop_map(Value::from),
        ];
        let key = prop_oneof![
            Just("model"),
            Just("messages"),
            Just("prompt"),
            Just("input"),
            Just("role"),
            Just("content"),
            Just("type"),
            Just("text"),
            Just("stop"),
            Just("n"),
            Just("seed"),
            Just("max_tokens"),
            Just("logit_bias"),
            Just("logprobs"),
            Just("top_logprobs"),
            Just("tools"),
            Just("tool_calls"),
            Just("stream"),
            Just("stream_options"),
            Just("response_format"),
            Just("structured_outputs"),
            Just("encoding_format"),
        ]
        .prop_map(str::to_owned);
        leaf.prop_recursive(4, 64, 8, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::vec((prop_oneof![4 => key.clone(), 1 => ".{0,6}"], inner), 0..8)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_json_is_read_or_refused_with_a_short_word(value in json()) {
            let refusals = [
                ChatRequest::read(value.clone()).err(),
                CompletionRequest::read(value.clone()).err(),
                EmbeddingsRequest::read(value).err(),
            ];
            for error in refusals.into_iter().flatten() {
                prop_assert_eq!(error.status, StatusCode::BAD_REQUEST);
                prop_assert!(error.message.len() < 1000, "{}", error.message);
            }
        }
    }
}
