//! The calling side of a worker's socket. One connection a call: dropping the call closes it, which is
//! how a request is cancelled.

use std::io;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio_util::task::AbortOnDropHandle;

use super::protocol::{EmbedCall, EmbedReply, GenerateCall, WorkerError, WorkerEvent, WorkerStatus};

/// Longest line of an answer in bytes: one event with 20 alternatives stays far below it, and a worker
/// that a hostile model has taken over cannot fill the gateway's memory.
const LINE_LIMIT: usize = 1 << 20;
/// Longest reply that is not a stream, in bytes: 2048 vectors of 4096 numbers in JSON.
const REPLY_LIMIT: usize = 128 << 20;

/// Why a call to a worker gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallWorker {
    /// Nobody listens on the socket: the worker is starting, or gone.
    #[error("failed to connect to the worker at {socket:?}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The worker said no.
    #[error("the worker refused the call: {0}")]
    Refused(WorkerError),
    /// The connection broke.
    #[error("lost the worker in the middle of a call")]
    Lost(#[source] hyper::Error),
    /// The worker closed the connection before the answer was complete: it crashed or was killed.
    #[error("the worker ended in the middle of an answer")]
    Ended,
    /// What came is not the protocol.
    #[error("the worker answered something that is not its protocol: {found}")]
    Protocol {
        /// What came, without content.
        found: String,
    },
}

impl CallWorker {
    /// Whether another worker can take the same call: this one never began it.
    #[must_use]
    pub fn is_unserved(&self) -> bool {
        use super::protocol::WorkerErrorKind::{QueueFull, Stopping};
        match self {
            Self::Connect { .. } => true,
            Self::Refused(error) => matches!(error.kind, Stopping | QueueFull),
            Self::Lost(_) | Self::Ended | Self::Protocol { .. } => false,
        }
    }
}

/// Calls the worker behind one socket.
#[derive(Clone, Debug)]
pub struct WorkerClient {
    socket: PathBuf,
}

impl WorkerClient {
    /// A client; nothing is opened until the first call.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Begins a generation. Returns when the worker has taken the request on.
    ///
    /// # Errors
    /// [`CallWorker`]; a refusal comes here, before any event.
    ///
    /// # Cancel safety
    /// Dropping the future or the [`Generation`] closes the connection, and the worker frees the slot.
    pub async fn generate(&self, call: &GenerateCall) -> Result<Generation, CallWorker> {
        let (response, connection) = self.send(Method::POST, "/generate", to_body(call)?).await?;
        Ok(Generation {
            body: response.into_body(),
            buffered: BytesMut::new(),
            complete: false,
            _connection: connection,
        })
    }

    /// Embeds several texts.
    ///
    /// # Errors
    /// [`CallWorker`].
    pub async fn embed(&self, call: &EmbedCall) -> Result<EmbedReply, CallWorker> {
        let (response, _connection) = self.send(Method::POST, "/embed", to_body(call)?).await?;
        read_reply(response).await
    }

    /// What the worker is and does.
    ///
    /// # Errors
    /// [`CallWorker`].
    pub async fn status(&self) -> Result<WorkerStatus, CallWorker> {
        let (response, _connection) = self.send(Method::GET, "/status", Bytes::new()).await?;
        read_reply(response).await
    }

    async fn send(
        &self,
        method: Method,
        path: &'static str,
        body: Bytes,
    ) -> Result<(Response<Incoming>, AbortOnDropHandle<()>), CallWorker> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| CallWorker::Connect {
                socket: self.socket.clone(),
                source,
            })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(CallWorker::Lost)?;
        // Errors of the connection also reach the body that is read from it.
        let connection = AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = connection.await;
        }));
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, "worker")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| protocol(&error))?;
        let response = sender.send_request(request).await.map_err(CallWorker::Lost)?;
        if response.status().is_success() {
            return Ok((response, connection));
        }
        let error: WorkerError = read_reply(response).await?;
        Err(CallWorker::Refused(error))
    }
}

/// An answer on its way.
#[derive(Debug)]
pub struct Generation {
    body: Incoming,
    buffered: BytesMut,
    complete: bool,
    /// Closes the connection with the generation.
    _connection: AbortOnDropHandle<()>,
}

impl Generation {
    /// The next event; `None` after the last one.
    ///
    /// # Errors
    /// [`CallWorker::Lost`] or [`CallWorker::Ended`] where the answer breaks off.
    ///
    /// # Cancel safety
    /// Safe: what was read stays buffered.
    pub async fn next(&mut self) -> Result<Option<WorkerEvent>, CallWorker> {
        loop {
            if self.complete {
                return Ok(None);
            }
            if let Some(end) = self.buffered.iter().position(|&byte| byte == b'\n') {
                let line = self.buffered.split_to(end + 1);
                if line.trim_ascii().is_empty() {
                    continue;
                }
                let event = from_bytes::<WorkerEvent>(&line)?;
                self.complete = matches!(event, WorkerEvent::Finished { .. } | WorkerEvent::Failed { .. });
                return Ok(Some(event));
            }
            if self.buffered.len() > LINE_LIMIT {
                return Err(CallWorker::Protocol {
                    found: format!("a line of more than {LINE_LIMIT} bytes"),
                });
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffered.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => return Err(CallWorker::Lost(error)),
                None => return Err(CallWorker::Ended),
            }
        }
    }
}

fn to_body(call: &impl Serialize) -> Result<Bytes, CallWorker> {
    serde_json::to_vec(call)
        .map(Bytes::from)
        .map_err(|error| protocol(&error))
}

async fn read_reply<T: DeserializeOwned>(response: Response<Incoming>) -> Result<T, CallWorker> {
    let body = Limited::new(response.into_body(), REPLY_LIMIT).collect().await;
    match body {
        Ok(body) => from_bytes(&body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(CallWorker::Protocol {
            found: format!("a reply of more than {REPLY_LIMIT} bytes"),
        }),
        Err(error) => match error.downcast::<hyper::Error>() {
            Ok(error) => Err(CallWorker::Lost(*error)),
            Err(error) => Err(protocol(&*error)),
        },
    }
}

/// The place and kind of a fault, without the text: that may be a prompt or an answer.
fn from_bytes<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CallWorker> {
    serde_json::from_slice(bytes).map_err(|error| CallWorker::Protocol {
        found: format!(
            "JSON that does not read ({:?} at column {})",
            error.classify(),
            error.column()
        ),
    })
}

fn protocol(error: &(dyn std::error::Error + 'static)) -> CallWorker {
    CallWorker::Protocol {
        found: error.to_string(),
    }
}
