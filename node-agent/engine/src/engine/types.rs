//! What goes into an engine and what comes out of it.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::SamplingParams;
use crate::constrain::Constraint;
use crate::inspect::KvType;

/// The device that is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best that this build can use.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An Apple GPU.
    Metal,
}

/// How a model is run.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Device to use.
    pub device: DeviceChoice,
    /// Longest context in tokens; None: the model's own, at most 8192.
    pub context_length: Option<u32>,
    /// Answers under way at once.
    pub max_sequences: u32,
    /// Requests that wait beyond those.
    pub max_queued: u32,
    /// Number format of the KV cache.
    pub kv_type: KvType,
    /// Tokens that the KV cache holds for all sequences together; None: the full context of each. Where it is
    /// less, answers share it, and the latest waits when it runs out.
    pub kv_tokens: Option<u32>,
    /// Tokens of prompts and answers that are kept for the next request that begins alike, within the
    /// cache; None: one full context; 0: nothing is shared, not even among answers under way.
    pub prefix_tokens: Option<u32>,
    /// Guesses from what was written before, and checks the guess: the same answers, faster where they repeat.
    pub speculate: bool,
    /// A smaller model with the same vocabulary, a GGUF file, that guesses what comes next where the text gives
    /// no guess: the same answers, faster where it guesses well and is much faster than the model itself.
    pub draft: Option<PathBuf>,
    /// Threads that compute; None: as many as the process may keep busy (affinity and cgroup quota counted).
    pub threads: Option<u32>,
    /// Vector instructions to compute with on the CPU, one of [`crate::instructions`]; None: the best.
    pub instructions: Option<String>,
    /// How finely numbers are kept while a decoder computes; embedding models compute with the standard one.
    pub precision: Precision,
    /// Computes by candle's tensors on the CPU, as it is done on GPUs: slow, for checking that code.
    pub through_candle: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            device: DeviceChoice::Auto,
            context_length: None,
            max_sequences: 4,
            max_queued: 32,
            kv_type: KvType::F16,
            kv_tokens: None,
            prefix_tokens: None,
            speculate: true,
            draft: None,
            threads: None,
            instructions: None,
            precision: Precision::Standard,
            through_candle: false,
        }
    }
}

/// How finely a decoder computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Activations are rounded to 8 bits before they meet quantised weights; with matrix units, those of prompts to bfloat16.
    #[default]
    Standard,
    /// Activations keep 16 bits before quantised weights, so that answers are those of 32-bit floats but where two tokens are all
    /// but equally likely. More to compute: see docs/benchmarks.md. On the CPU only.
    High,
    /// 32-bit floats throughout, whatever the file holds: slow and large, for checking.
    Float,
}

/// Longest context when none is asked for.
pub(super) const DEFAULT_CONTEXT: u32 = 8192;

/// How far a load is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Layers that are in memory.
    pub layers_done: usize,
    /// Layers in all.
    pub layers_total: usize,
}

/// What to answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Text as it is.
    Text(String),
    /// Tokens as they are.
    Tokens(Vec<u32>),
    /// A conversation for the chat template, in the OpenAI API's shape.
    Chat {
        /// The messages.
        messages: Value,
        /// Tools, if there are any.
        tools: Option<Value>,
    },
}

/// A request for an answer.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// Name in logs.
    pub id: String,
    /// What to answer.
    pub prompt: Prompt,
    /// Longest answer; None: what the context leaves.
    pub max_tokens: Option<u32>,
    /// Longest prompt and answer together, where that is less than the engine's own.
    pub max_context: Option<u32>,
    /// Whose request it is: what is known of a prompt is shared within one scope only, so that nobody can
    /// learn from the time an answer takes what others have asked.
    pub scope: String,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// What the answer must follow, if anything.
    pub constraint: Option<Constraint>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
}

/// One token with its probability.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Its text; bytes that are no UTF-8 are replaced.
    pub text: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens in its place.
    pub top: Vec<TokenLogprob>,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended it, or a stop string was found.
    Stop,
    /// It reached its longest length.
    Length,
    /// Its caller left.
    Cancelled,
    /// The arithmetic failed.
    Error(String),
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer, the one that ended it included.
    pub completion_tokens: usize,
    /// Milliseconds from the request to the first token.
    pub time_to_first_token_ms: Option<u64>,
    /// Milliseconds from the request to the end.
    pub duration_ms: u64,
}

/// What happens to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum GenerateEvent {
    /// It left the queue.
    Started {
        /// Tokens of the prompt.
        prompt_tokens: usize,
    },
    /// A piece of the answer.
    Text {
        /// Whole characters.
        text: String,
        /// Its tokens, if logprobs were asked for.
        tokens: Vec<TokenLogprob>,
    },
    /// The end; nothing comes after it.
    Finished(Finished),
}

/// Where events go. It is called on one of the engine's threads, for one event after the other, and must neither block nor
/// ask the engine to compute; `Break` cancels the request.
pub type Sink = Box<dyn FnMut(GenerateEvent) -> ControlFlow<()> + Send>;

/// Holds a request. Dropping it cancels the request and frees its place at the next step.
#[derive(Debug)]
pub struct GenerationHandle {
    cancelled: Arc<AtomicBool>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
}

impl GenerationHandle {
    pub(super) fn new(cancelled: Arc<AtomicBool>, prompt_tokens: usize) -> Self {
        Self {
            cancelled,
            prompt_tokens,
        }
    }
}

impl Drop for GenerationHandle {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

/// Vectors for texts.
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    /// One vector of length 1 a text.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens of all texts.
    pub prompt_tokens: usize,
}

/// How the engine is doing. Cheap to read: this is the heartbeat.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Forward passes so far; stands still only when there is no work, or when something is wrong.
    pub steps: u64,
    /// Tokens written so far.
    pub tokens_generated: u64,
    /// Prompt tokens read so far.
    pub prompt_tokens: u64,
    /// Prompt tokens that were known from before and not read again.
    pub shared_prompt_tokens: u64,
    /// Tokens guessed ahead.
    pub guessed_tokens: u64,
    /// Guesses that came true.
    pub accepted_tokens: u64,
    /// Answers set aside for want of KV cache, to go on later.
    pub preemptions: u64,
    /// Answers under way.
    pub active: usize,
    /// Requests that wait.
    pub queued: usize,
    /// Blocks of KV cache that answers use.
    pub kv_blocks_used: usize,
    /// Tokens a second of one sequence, over the latest steps.
    pub tokens_per_second: f64,
}
