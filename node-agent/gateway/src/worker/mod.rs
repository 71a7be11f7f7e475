//! How the bus speaks with a worker: HTTP/1.1 over a Unix socket, JSON in, lines of JSON out.
//!
//! [`protocol`] holds the types of both sides (the agent's worker process serves them), [`client`] the
//! side that calls: the gateway's, and the probes'.
//!
//! ```text
//! POST /generate  GenerateCall -> 200, a line of JSON for each WorkerEvent
//! POST /embed     EmbedCall    -> 200, EmbedReply
//! GET  /status                 -> 200, WorkerStatus
//! anything refused             -> the status of its WorkerErrorKind, WorkerError
//! ```
//!
//! Who closes the connection cancels the request: the worker frees its slot at the next step.

pub mod client;
pub mod protocol;

pub use client::{CallWorker, Generation, WorkerClient};
pub use protocol::{
    ConstraintInput, EmbedCall, EmbedInput, EmbedReply, FinishReason, GenerateCall, PromptInput,
    SamplingCall, TokenLogprob, TopLogprob, WorkerBeat, WorkerError, WorkerErrorKind, WorkerEvent,
    WorkerFailed, WorkerLine, WorkerLoading, WorkerReady, WorkerStatus,
};
