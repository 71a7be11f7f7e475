//! A worker that does what the test says: an HTTP server over a Unix socket, with the protocol's types.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use bytes::Bytes;
use freehold_gateway::worker::{
    EmbedCall, EmbedReply, FinishReason, GenerateCall, TokenLogprob, TopLogprob, WorkerError,
    WorkerErrorKind, WorkerEvent,
};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::task::AbortOnDropHandle;

/// What the worker does with one call.
pub enum Reply {
    /// Says these and closes.
    Events(Vec<WorkerEvent>),
    /// Says what the test sends, when it sends it; closes when the test drops its end.
    Live(mpsc::UnboundedReceiver<WorkerEvent>),
    /// Says events without end as fast as they are taken.
    Endless(WorkerEvent),
    /// Says no.
    Refuse(WorkerError),
    /// Says something that is not the protocol.
    Bytes(&'static [u8]),
}

/// One token after another, then the end.
pub fn answer(prompt_tokens: u32, pieces: &[&str], reason: FinishReason) -> Reply {
    let mut events = vec![WorkerEvent::Started { prompt_tokens }];
    events.extend(pieces.iter().map(|piece| text(piece)));
    events.push(finished(prompt_tokens, pieces.len(), reason));
    Reply::Events(events)
}

pub fn finished(prompt_tokens: u32, completion_tokens: usize, reason: FinishReason) -> WorkerEvent {
    WorkerEvent::Finished {
        reason,
        prompt_tokens,
        completion_tokens: u32::try_from(completion_tokens).expect("a small number"),
    }
}

pub fn text(piece: &str) -> WorkerEvent {
    WorkerEvent::Text {
        text: piece.to_owned(),
        tokens: Vec::new(),
    }
}

pub fn text_with_logprob(piece: &str, logprob: f32) -> WorkerEvent {
    WorkerEvent::Text {
        text: piece.to_owned(),
        tokens: vec![TokenLogprob {
            token: piece.to_owned(),
            bytes: piece.as_bytes().to_vec(),
            logprob,
            top: vec![TopLogprob {
                token: "other".to_owned(),
                bytes: b"other".to_vec(),
                logprob: -3.5,
            }],
        }],
    }
}

pub fn refusal(kind: WorkerErrorKind, message: &str) -> WorkerError {
    WorkerError {
        kind,
        message: message.to_owned(),
        field: None,
        retry_after_ms: None,
    }
}

type Embed = Box<dyn Fn(&EmbedCall) -> Result<EmbedReply, WorkerError> + Send>;

#[derive(Default)]
struct Script {
    replies: Mutex<VecDeque<Reply>>,
    embed: Mutex<Option<Embed>>,
    calls: Mutex<Vec<GenerateCall>>,
    embed_calls: Mutex<Vec<EmbedCall>>,
    busy: AtomicUsize,
    cancelled: AtomicUsize,
}

/// The worker. Stops listening when it is dropped.
pub struct FakeWorker {
    pub socket: PathBuf,
    script: Arc<Script>,
    _server: AbortOnDropHandle<()>,
}

impl FakeWorker {
    pub fn start(socket: PathBuf) -> Self {
        let listener = UnixListener::bind(&socket).expect("a socket");
        let script = Arc::new(Script::default());
        let router = Router::new()
            .route("/generate", post(generate))
            .route("/embed", post(embed))
            .with_state(Arc::clone(&script));
        let server = tokio::spawn(async move {
            axum::serve(listener, router).await.expect("serves until aborted");
        });
        Self {
            socket,
            script,
            _server: AbortOnDropHandle::new(server),
        }
    }

    /// What the worker does with its next call; further calls get further replies, in order.
    pub fn reply(&self, reply: Reply) {
        self.script.replies.lock().expect("not poisoned").push_back(reply);
    }

    /// A reply that the test feeds by hand.
    pub fn live(&self) -> mpsc::UnboundedSender<WorkerEvent> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.reply(Reply::Live(receiver));
        sender
    }

    pub fn embed_with(&self, embed: impl Fn(&EmbedCall) -> Result<EmbedReply, WorkerError> + Send + 'static) {
        *self.script.embed.lock().expect("not poisoned") = Some(Box::new(embed));
    }

    pub fn calls(&self) -> Vec<GenerateCall> {
        self.script.calls.lock().expect("not poisoned").clone()
    }

    pub fn only_call(&self) -> GenerateCall {
        let calls = self.calls();
        assert_eq!(calls.len(), 1, "{calls:?}");
        calls.into_iter().next().expect("one call")
    }

    pub fn embed_calls(&self) -> Vec<EmbedCall> {
        self.script.embed_calls.lock().expect("not poisoned").clone()
    }

    /// Generations whose answer is not complete.
    pub fn busy(&self) -> usize {
        self.script.busy.load(Ordering::SeqCst)
    }

    /// Generations whose caller closed the connection before the end.
    pub fn cancelled(&self) -> usize {
        self.script.cancelled.load(Ordering::SeqCst)
    }
}

/// A slot, free when the answer is over or its caller has gone.
struct Slot {
    script: Arc<Script>,
    complete: bool,
}

impl Drop for Slot {
    fn drop(&mut self) {
        if !self.complete {
            self.script.cancelled.fetch_add(1, Ordering::SeqCst);
        }
        self.script.busy.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn generate(State(script): State<Arc<Script>>, Json(call): Json<GenerateCall>) -> Response {
    script.calls.lock().expect("not poisoned").push(call);
    let reply = script.replies.lock().expect("not poisoned").pop_front();
    let events: BoxStream<'static, WorkerEvent> = match reply {
        None => return refused(&refusal(WorkerErrorKind::Internal, "the test scripted no reply")),
        Some(Reply::Refuse(error)) => return refused(&error),
        Some(Reply::Bytes(bytes)) => return bytes.into_response(),
        Some(Reply::Events(events)) => stream::iter(events).boxed(),
        Some(Reply::Live(receiver)) => UnboundedReceiverStream::new(receiver).boxed(),
        Some(Reply::Endless(event)) => stream::repeat(event).boxed(),
    };
    script.busy.fetch_add(1, Ordering::SeqCst);
    let slot = Slot {
        script,
        complete: false,
    };
    let lines = stream::unfold((events, slot), |(mut events, mut slot)| async move {
        let event = events.next().await;
        slot.complete |= matches!(
            event,
            None | Some(WorkerEvent::Finished { .. } | WorkerEvent::Failed { .. })
        );
        let mut line = serde_json::to_vec(&event?).expect("JSON");
        line.push(b'\n');
        Some((Ok::<_, Infallible>(Bytes::from(line)), (events, slot)))
    });
    Body::from_stream(lines).into_response()
}

async fn embed(State(script): State<Arc<Script>>, Json(call): Json<EmbedCall>) -> Response {
    let reply = match &*script.embed.lock().expect("not poisoned") {
        Some(embed) => embed(&call),
        None => Err(refusal(
            WorkerErrorKind::Internal,
            "the test scripted no embedding",
        )),
    };
    script.embed_calls.lock().expect("not poisoned").push(call);
    match reply {
        Ok(reply) => Json(reply).into_response(),
        Err(error) => refused(&error),
    }
}

fn refused(error: &WorkerError) -> Response {
    (error.kind.status(), Json(error)).into_response()
}
