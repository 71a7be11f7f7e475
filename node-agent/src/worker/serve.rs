//! The worker's socket: HTTP in front of the engine.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use freehold_engine::{Engine, GenerateEvent, GenerateRequest, GenerationHandle, Prompt, Reject};
use freehold_gateway::worker::{
    EmbedCall, EmbedReply, GenerateCall, WorkerError, WorkerErrorKind, WorkerEvent, WorkerReady, WorkerStatus,
};
use futures::StreamExt;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tracing::debug;

use super::{beat, convert};

/// Events that a caller may leave unread. The engine never waits: who falls further behind, with the
/// socket's own buffer full too, has stalled, and its request is cancelled.
const EVENTS_AHEAD: usize = 4096;
/// Longest body of a call in bytes: the gateway's own limit, and room for JSON.
const BODY_LIMIT: usize = 32 << 20;

/// When a call that found the queue full may try again: about as long as some texts take to embed.
const RETRY_AFTER_MS: u64 = 1000;

/// Embedding calls: they compute on their own threads, one after the other.
#[derive(Clone, Debug)]
pub(super) struct Embedding {
    turn: Arc<Semaphore>,
    /// Calls that compute or wait.
    present: Arc<AtomicU32>,
    /// Calls that may wait; each holds its texts in memory.
    queue: u32,
}

impl Embedding {
    pub(super) fn new(queue: u32) -> Self {
        // The encoder uses all cores for one text; two at once gain nothing.
        Self {
            turn: Arc::new(Semaphore::new(1)),
            present: Arc::default(),
            queue,
        }
    }

    /// Counts a call in, unless one computes and as many wait as may.
    fn enter(&self) -> Result<Present, Refused> {
        let before = self.present.fetch_add(1, Ordering::Relaxed);
        let present = Present(Arc::clone(&self.present));
        if before <= self.queue {
            return Ok(present);
        }
        Err(Refused(WorkerError {
            kind: WorkerErrorKind::QueueFull,
            message: format!(
                "one embedding call computes and {} wait, as many as spec.engine.queue allows",
                self.queue
            ),
            field: None,
            retry_after_ms: Some(RETRY_AFTER_MS),
        }))
    }

    pub(super) fn active(&self) -> u32 {
        self.present.load(Ordering::Relaxed).min(1)
    }

    pub(super) fn queued(&self) -> u32 {
        self.present.load(Ordering::Relaxed).saturating_sub(1)
    }
}

/// Counts a call as long as it lives.
struct Present(Arc<AtomicU32>);

impl Drop for Present {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Clone)]
struct Served {
    engine: Engine,
    embedding: Embedding,
    ready: Arc<WorkerReady>,
}

pub(super) fn router(engine: Engine, embedding: Embedding, ready: WorkerReady) -> Router {
    Router::new()
        .route("/generate", post(generate))
        .route("/embed", post(embed))
        .route("/status", get(status))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(Served {
            engine,
            embedding,
            ready: Arc::new(ready),
        })
}

/// A refusal as an answer.
struct Refused(WorkerError);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.0.kind.status(), Json(self.0)).into_response()
    }
}

impl From<Reject> for Refused {
    fn from(reject: Reject) -> Self {
        Self(convert::refusal(&reject))
    }
}

impl Refused {
    fn internal(problem: &dyn std::fmt::Display) -> Self {
        let message = format!("the worker failed: {problem}");
        Self(WorkerError {
            kind: WorkerErrorKind::Internal,
            message,
            field: None,
            retry_after_ms: None,
        })
    }
}

/// Reads a call. The position of a fault is told, never the text around it.
fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Refused> {
    serde_json::from_slice(body).map_err(|error| {
        let (kind, column) = (error.classify(), error.column());
        Refused(WorkerError {
            kind: WorkerErrorKind::InvalidRequest,
            message: format!("the call does not read: {kind:?} at column {column}"),
            field: None,
            retry_after_ms: None,
        })
    })
}

async fn status(State(served): State<Served>) -> Json<WorkerStatus> {
    let beat = beat::read(&served.engine, &served.embedding);
    Json(WorkerStatus {
        ready: (*served.ready).clone(),
        beat,
    })
}

async fn generate(State(served): State<Served>, body: Bytes) -> Result<Response, Refused> {
    let call: GenerateCall = parse(&body)?;
    let echo = echo(&call, &served.engine);
    let request = convert::request(call);
    let (events, receiver) = mpsc::channel(EVENTS_AHEAD);
    // Templates and tokenizers take their time with long prompts.
    let engine = served.engine;
    let handle = tokio::task::spawn_blocking(move || begin(&engine, request, echo, events))
        .await
        .map_err(|error| Refused::internal(&error))??;
    // The handle lives as long as the body: a caller that leaves drops both, which frees the slot.
    let lines = ReceiverStream::new(receiver).map(move |event| {
        let _held: &GenerationHandle = &handle;
        line(&event)
    });
    Ok((
        [(http::header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(lines),
    )
        .into_response())
}

/// The prompt as text, where the answer begins with it.
fn echo(call: &GenerateCall, engine: &Engine) -> Option<String> {
    use freehold_gateway::worker::PromptInput::{Chat, Text, Tokens};
    match &call.prompt {
        _ if !call.echo => None,
        Text { text } => Some(text.clone()),
        Tokens { tokens } => {
            let known = tokens
                .iter()
                .all(|&token| (token as usize) < engine.tokenizer().vocab_size());
            known.then(|| engine.tokenizer().decode(tokens))
        }
        Chat { .. } => None,
    }
}

fn begin(
    engine: &Engine,
    request: GenerateRequest,
    mut echo: Option<String>,
    events: mpsc::Sender<WorkerEvent>,
) -> Result<GenerationHandle, Reject> {
    let id = request.id.clone();
    let sink = move |event: GenerateEvent| {
        let started = matches!(event, GenerateEvent::Started { .. });
        let Some(event) = convert::event(event) else {
            return ControlFlow::Continue(());
        };
        let echoed = echo.take_if(|_| started).map(|text| WorkerEvent::Text {
            text,
            tokens: Vec::new(),
        });
        for event in std::iter::once(event).chain(echoed) {
            if events.try_send(event).is_err() {
                debug!(request = %id, "Caller left or stalled");
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    };
    engine.generate(request, Box::new(sink))
}

fn line(event: &WorkerEvent) -> Result<Bytes, serde_json::Error> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    Ok(line.into())
}

async fn embed(State(served): State<Served>, body: Bytes) -> Result<Json<EmbedReply>, Refused> {
    let present = served.embedding.enter()?;
    let call: EmbedCall = parse(&body)?;
    drop(body);
    let turn = Arc::clone(&served.embedding.turn)
        .acquire_owned()
        .await
        .map_err(|error| Refused::internal(&error))?;
    // A caller that leaves while it waits is gone here; once begun, its texts are computed in portions, until
    // the handle below is dropped.
    let left = Arc::new(());
    let watch = Arc::downgrade(&left);
    let embedded = tokio::task::spawn_blocking(move || {
        let (_present, _turn) = (present, turn);
        let texts: Vec<Prompt> = call.input.into_iter().map(convert::embed_input).collect();
        let embedded = served.engine.embed_while(&texts, || watch.strong_count() > 0)?;
        Ok::<_, Reject>(EmbedReply {
            vectors: embedded.vectors,
            prompt_tokens: convert::count(embedded.prompt_tokens),
        })
    });
    let reply = embedded.await.map_err(|error| Refused::internal(&error))??;
    drop(left);
    Ok(Json(reply))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The encoder that `./tests/run` fetched, behind the worker's handlers.
    fn encoder() -> Served {
        let models = std::env::var_os("FREEHOLD_TEST_MODELS").map_or_else(
            || {
                let cache = std::env::var_os("XDG_CACHE_HOME").map(std::path::PathBuf::from);
                let home = std::path::PathBuf::from(std::env::var_os("HOME").expect("HOME is set"));
                cache
                    .unwrap_or_else(|| home.join(".cache"))
                    .join("freehold/models")
            },
            std::path::PathBuf::from,
        );
        let engine = Engine::load(
            &models.join("all-MiniLM-L6-v2"),
            &freehold_engine::EngineOptions::default(),
            |_| (),
        )
        .expect("run ./tests/run, which fetches the test models");
        let ready = WorkerReady {
            facts: crate::store::facts::describe(engine.facts(), None, false),
            context_length: 512,
            load_ms: 0,
            device: freehold_crds::Device::Cpu,
            device_reason: None,
        };
        Served {
            engine,
            embedding: Embedding::new(4),
            ready: Arc::new(ready),
        }
    }

    #[tokio::test]
    async fn the_texts_of_a_call_are_computed_together() {
        let served = encoder();
        let texts: Vec<String> = (0..40).map(|i| format!("text number {i}")).collect();
        let texts: Vec<_> = texts
            .iter()
            .map(|text| serde_json::json!({"text": text}))
            .collect();
        let body = serde_json::json!({"request_id": "r", "input": texts}).to_string();
        let reply = embed(State(served.clone()), body.into())
            .await
            .ok()
            .expect("vectors")
            .0;
        assert_eq!(reply.vectors.len(), 40);
        assert_eq!(
            served.engine.progress().steps,
            1,
            "one portion holds 40 short texts"
        );
        let alone = served
            .engine
            .embed(&[Prompt::Text("text number 7".to_owned())])
            .expect("a vector");
        assert_eq!(reply.vectors[7], alone.vectors[0], "and each is what it is alone");
    }

    #[test]
    fn embedding_calls_beyond_the_queue_are_told_to_come_again() {
        let embedding = Embedding::new(2);
        let mut present: Vec<Present> = (0..3)
            .map(|_| embedding.enter().ok().expect("one computes and two wait"))
            .collect();
        assert_eq!((embedding.active(), embedding.queued()), (1, 2));
        let refused = embedding.enter().err().expect("the queue is full").0;
        assert_eq!(refused.kind, WorkerErrorKind::QueueFull);
        assert_eq!(refused.kind.status(), http::StatusCode::TOO_MANY_REQUESTS);
        assert!(refused.retry_after_ms.is_some());
        assert_eq!(embedding.queued(), 2, "who was refused does not wait");
        present.pop();
        assert!(embedding.enter().is_ok(), "and there is room again");
    }
}
