//! Fuzzers of what reads other people's bytes: model files, texts, chat templates, requests.
//!
//! [`targets`] holds what each does with its bytes; the suite of the main workspace replays the corpus through the
//! same code (`tests/tests/fuzz.rs`). Seeds that are files of bytes are made by the program `seeds`, not kept.

pub mod targets;

/// Writes small models; the engine's own tests use it too.
#[allow(dead_code)]
#[path = "../../../node-agent/engine/tests/common/gguf.rs"]
pub mod gguf;
