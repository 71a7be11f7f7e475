//! Freehold's engine: models on candle, in one process, behind a checked loader.
//!
//! ```text
//! GgufFile (checked) ─▶ Decoder ─┐
//!                   ─▶ Tokenizer ├─▶ Scheduler (one thread, ragged batches, paged KV) ─▶ events
//!                   ─▶ ChatTemplate
//! folder (safetensors) ─▶ Encoder ─▶ vectors
//! ```
//! Synchronous inside: one thread computes, callers hand in a sink. Start reading at [`Engine`]; the
//! forward pass is in `model/decoder.rs`, batching in `scheduler`.

mod constrain;
mod device;
mod engine;
mod error;
pub mod gguf;
pub mod inspect;
mod kernels;
mod kv;
mod mmap;
mod model;
mod sampling;
mod scheduler;
mod stop;
mod template;
mod tokenizer;
mod utf8;

pub use constrain::Constraint;
pub use device::instructions;
pub use engine::{
    DeviceChoice, Embeddings, Engine, EngineOptions, FinishReason, Finished, GenerateEvent, GenerateRequest,
    GenerationHandle, LoadProgress, Precision, Progress, Prompt, Sink, TokenLogprob,
};
pub use error::{InvalidModel, LoadModel, Reject};
pub use inspect::{KvType, ModelFacts, ModelFormat, ModelKind};
pub use sampling::SamplingParams;
pub use template::ChatTemplate;
pub use tokenizer::{Special, Tokenizer};
