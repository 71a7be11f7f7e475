//! The engine as its callers see it: load a model, ask it, watch it.

use std::fmt;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde_json::Value;

use crate::gguf::GgufFile;
use crate::inspect::{KvType, ModelFacts, ModelKind, gguf_facts};
use crate::kernels::{Compute, WeightPrecision, available_threads};
use crate::kv::{BlockTable, KvCache, blocks_for};
use crate::model::{Decoder, DecoderConfig, Encoder, EncoderConfig, Row};
use crate::scheduler::{Job, Scheduler};
use crate::template::ChatTemplate;
use crate::tokenizer::{Special, Tokenizer};
use crate::{InvalidModel, LoadModel, Reject, SamplingParams};

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
    /// Threads that compute; None: as many as the process may keep busy (affinity and cgroup quota counted).
    pub threads: Option<u32>,
    /// Computes with 32-bit floats throughout, whatever the file holds: slow and large, for checking.
    pub exact: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            device: DeviceChoice::Auto,
            context_length: None,
            max_sequences: 4,
            max_queued: 32,
            kv_type: KvType::F16,
            threads: None,
            exact: false,
        }
    }
}

/// Longest context when none is asked for.
const DEFAULT_CONTEXT: u32 = 8192;

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
    /// Texts that end the answer.
    pub stop: Vec<String>,
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

/// Where events go. It is called on the engine's thread and must not block; `Break` cancels the request.
pub type Sink = Box<dyn FnMut(GenerateEvent) -> ControlFlow<()> + Send>;

/// Holds a request. Dropping it cancels the request and frees its place at the next step.
#[derive(Debug)]
pub struct GenerationHandle {
    cancelled: Arc<AtomicBool>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
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
    /// Answers under way.
    pub active: usize,
    /// Requests that wait.
    pub queued: usize,
    /// Blocks of KV cache in use.
    pub kv_blocks_used: usize,
    /// Tokens a second of one sequence, over the latest steps.
    pub tokens_per_second: f64,
}

/// Numbers that the scheduler's thread writes and everybody reads.
#[derive(Default)]
pub(crate) struct Counters {
    steps: AtomicU64,
    tokens_generated: AtomicU64,
    prompt_tokens: AtomicU64,
    active: AtomicUsize,
    waiting: AtomicUsize,
    blocks: AtomicUsize,
    /// Requests that were accepted and have not ended, queued ones included.
    present: AtomicUsize,
    pace: Mutex<Pace>,
}

#[derive(Default)]
struct Pace {
    last: Option<Instant>,
    tokens_per_second: f64,
}

impl Counters {
    pub(crate) fn set_load(&self, active: usize, waiting: usize, blocks: usize) {
        self.active.store(active, Ordering::Relaxed);
        self.waiting.store(waiting, Ordering::Relaxed);
        self.blocks.store(blocks, Ordering::Relaxed);
    }

    /// Nothing to do: the time until the next request is no step.
    pub(crate) fn rest(&self) {
        self.set_load(0, 0, 0);
        self.pace.lock().unwrap_or_else(PoisonError::into_inner).last = None;
    }

    pub(crate) fn leave(&self) {
        self.present.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn step(&self, prompt: usize, generated: usize) {
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.prompt_tokens.fetch_add(prompt as u64, Ordering::Relaxed);
        self.tokens_generated
            .fetch_add(generated as u64, Ordering::Relaxed);
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        // Only steps that held no prompt tell the pace of decoding.
        if let (Some(last), true) = (pace.last, prompt == 0 && generated > 0) {
            let rate = 1.0 / now.duration_since(last).as_secs_f64().max(1e-6);
            pace.tokens_per_second = if pace.tokens_per_second == 0.0 {
                rate
            } else {
                0.9 * pace.tokens_per_second + 0.1 * rate
            };
        }
        pace.last = Some(now);
    }
}

enum Task {
    Generate {
        jobs: Sender<Job>,
        template: Option<ChatTemplate>,
        context_length: usize,
        most_present: usize,
    },
    Embed {
        encoder: Box<Encoder>,
        context_length: usize,
    },
}

struct Inner {
    facts: ModelFacts,
    tokenizer: Arc<Tokenizer>,
    task: Task,
    counters: Arc<Counters>,
    device_reason: Option<String>,
}

/// A loaded model. Clones share it; the last to go ends its thread.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("facts", &self.inner.facts)
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// Loads a GGUF file, or a folder with safetensors, and ends with one real forward pass.
    ///
    /// # Errors
    /// [`LoadModel`].
    pub fn load(
        path: &Path,
        options: &EngineOptions,
        progress: impl FnMut(LoadProgress),
    ) -> Result<Self, LoadModel> {
        let device_reason = match options.device {
            DeviceChoice::Auto | DeviceChoice::Cpu => None,
            other => Some(format!(
                "{other:?} was asked for; this version computes on the CPU only"
            )),
        };
        if path.is_dir() {
            Self::load_encoder(path, options, device_reason)
        } else {
            Self::load_decoder(path, options, device_reason, progress)
        }
    }

    fn load_decoder(
        path: &Path,
        options: &EngineOptions,
        device_reason: Option<String>,
        mut progress: impl FnMut(LoadProgress),
    ) -> Result<Self, LoadModel> {
        let file = GgufFile::open(path)?;
        let facts = gguf_facts(&file)?;
        let tokenizer = Arc::new(Tokenizer::from_gguf(&file)?);
        let template = ChatTemplate::from_gguf(&file, tokenizer.bos_text(), tokenizer.eos_text())?;
        let config = DecoderConfig::from_gguf(&file)?;
        if tokenizer.vocab_size() > config.vocab_size {
            return Err(InvalidModel::inconsistent(
                "the tokenizer's vocabulary",
                format!("{} tokens", tokenizer.vocab_size()),
                format!("at most the {} rows of token_embd.weight", config.vocab_size),
            )
            .into());
        }
        let threads = options
            .threads
            .map_or_else(available_threads, |n| n.max(1) as usize);
        let compute = Compute::new(threads).map_err(LoadModel::StartThread)?;
        let precision = if options.exact {
            WeightPrecision::Float
        } else {
            WeightPrecision::Native
        };
        let mut decoder = Decoder::load(&file, config, compute, precision, |layers_done, layers_total| {
            progress(LoadProgress {
                layers_done,
                layers_total,
            })
        })?;
        // Everything is copied out: the file's pages leave this process's memory.
        drop(file);
        let context_length = context_length(options, facts.context_length)?;
        let sequences = options.max_sequences.max(1) as usize;
        let capacity = sequences * blocks_for(context_length);
        let mut cache = KvCache::new(decoder.kv_shape(), options.kv_type, capacity);
        first_pass(&mut decoder, &tokenizer, &mut cache)?;
        let (jobs, receiver) = channel();
        let counters = Arc::new(Counters::default());
        let scheduler = Scheduler::new(
            decoder,
            Arc::clone(&tokenizer),
            cache,
            receiver,
            Arc::clone(&counters),
            sequences,
        );
        std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || scheduler.run())
            .map_err(LoadModel::StartThread)?;
        let task = Task::Generate {
            jobs,
            template,
            context_length,
            most_present: sequences + options.max_queued as usize,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                facts,
                tokenizer,
                task,
                counters,
                device_reason,
            }),
        })
    }

    fn load_encoder(
        folder: &Path,
        options: &EngineOptions,
        device_reason: Option<String>,
    ) -> Result<Self, LoadModel> {
        let config = EncoderConfig::open(folder)?;
        let facts = config.facts(folder)?;
        let tokenizer =
            Tokenizer::from_tokenizer_json(&crate::model::read_bounded(folder, crate::model::TOKENIZER)?)?;
        let context_length =
            context_length(options, facts.context_length)?.min(config.max_position_embeddings);
        let encoder = Encoder::load(folder, config)?;
        let probe = tokenizer.encode(
            "a",
            Special {
                add: true,
                parse: false,
            },
        );
        if encoder.embed(&probe)?.iter().any(|x| !x.is_finite()) {
            return Err(LoadModel::NotANumber);
        }
        let task = Task::Embed {
            encoder: Box::new(encoder),
            context_length,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                facts,
                tokenizer: Arc::new(tokenizer),
                task,
                counters: Arc::default(),
                device_reason,
            }),
        })
    }

    /// What the model is.
    #[must_use]
    pub fn facts(&self) -> &ModelFacts {
        &self.inner.facts
    }

    /// The device in use.
    #[must_use]
    pub fn device(&self) -> DeviceChoice {
        DeviceChoice::Cpu
    }

    /// Why that is not the device that was asked for.
    #[must_use]
    pub fn device_reason(&self) -> Option<&str> {
        self.inner.device_reason.as_deref()
    }

    /// Tokens that prompt and answer may take together.
    #[must_use]
    pub fn context_length(&self) -> usize {
        match &self.inner.task {
            Task::Generate { context_length, .. } | Task::Embed { context_length, .. } => *context_length,
        }
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.tokenizer
    }

    /// A conversation as the model wants to read it.
    ///
    /// # Errors
    /// When the model has no chat template, or the template refuses the conversation.
    pub fn render_chat(&self, messages: &Value, tools: Option<&Value>) -> Result<String, Reject> {
        let Task::Generate { template, .. } = &self.inner.task else {
            return Err(cannot_generate());
        };
        let template = template.as_ref().ok_or(Reject::Unsupported {
            asked: "chat (it has no chat template)",
            able: "complete text: use /v1/completions",
        })?;
        template.render(messages, tools, true).map_err(Reject::Template)
    }

    fn tokens(&self, prompt: &Prompt) -> Result<Vec<u32>, Reject> {
        let tokenizer = &self.inner.tokenizer;
        Ok(match prompt {
            Prompt::Text(text) => tokenizer.encode(
                text,
                Special {
                    add: true,
                    parse: false,
                },
            ),
            Prompt::Tokens(tokens) => {
                if let Some(token) = tokens
                    .iter()
                    .find(|&&token| token as usize >= tokenizer.vocab_size())
                {
                    return Err(Reject::InvalidRequest {
                        field: "prompt".to_owned(),
                        found: format!("with token {token}"),
                        allowed: format!("the model has tokens 0 to {}", tokenizer.vocab_size() - 1),
                    });
                }
                tokens.clone()
            }
            Prompt::Chat { messages, tools } => {
                let mut messages = messages.clone();
                guard_texts(tokenizer, &mut messages);
                let text = self.render_chat(&messages, tools.as_ref())?;
                // The template writes the beginning itself, where the model wants one.
                let begins = !tokenizer.bos_text().is_empty() && text.starts_with(&tokenizer.bos_text());
                tokenizer.encode_guarded(&text, !begins)
            }
        })
    }

    /// Asks for an answer. Events go to `sink`; see [`Sink`] for what it must keep to.
    ///
    /// # Errors
    /// [`Reject`], before anything was done.
    pub fn generate(&self, request: GenerateRequest, sink: Sink) -> Result<GenerationHandle, Reject> {
        let Task::Generate {
            jobs,
            context_length,
            most_present,
            ..
        } = &self.inner.task
        else {
            return Err(cannot_generate());
        };
        request.sampling.validate(self.inner.tokenizer.vocab_size())?;
        let prompt = self.tokens(&request.prompt)?;
        let context_length = request
            .max_context
            .map_or(*context_length, |most| (most as usize).min(*context_length));
        if prompt.is_empty() {
            return Err(Reject::InvalidRequest {
                field: "prompt".to_owned(),
                found: "empty".to_owned(),
                allowed: "it must have at least one token".to_owned(),
            });
        }
        let room = context_length.saturating_sub(prompt.len());
        if room == 0 {
            return Err(Reject::PromptTooLong {
                prompt_tokens: prompt.len(),
                context_length,
            });
        }
        if request.max_tokens == Some(0) {
            return Err(Reject::InvalidRequest {
                field: "max_tokens".to_owned(),
                found: "0".to_owned(),
                allowed: "at least 1".to_owned(),
            });
        }
        let max_tokens = request.max_tokens.map_or(room, |most| (most as usize).min(room));
        let counters = &self.inner.counters;
        let accepted = counters
            .present
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |present| {
                (present < *most_present).then_some(present + 1)
            });
        if let Err(present) = accepted {
            return Err(Reject::QueueFull {
                queued: present,
                retry_after_ms: 1000,
            });
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        let prompt_tokens = prompt.len();
        let job = Job {
            id: request.id,
            prompt,
            max_tokens,
            stop: request.stop,
            sampling: request.sampling,
            sink,
            cancelled: Arc::clone(&cancelled),
            arrived: Instant::now(),
        };
        if jobs.send(job).is_err() {
            counters.leave();
            return Err(Reject::Stopping);
        }
        Ok(GenerationHandle {
            cancelled,
            prompt_tokens,
        })
    }

    /// Turns texts into vectors, on the caller's thread.
    ///
    /// # Errors
    /// [`Reject`] when the model writes text, or a text is too long.
    pub fn embed(&self, texts: &[Prompt]) -> Result<Embeddings, Reject> {
        let Task::Embed {
            encoder,
            context_length,
        } = &self.inner.task
        else {
            return Err(Reject::Unsupported {
                asked: "embed",
                able: "write text: use /v1/chat/completions or /v1/completions",
            });
        };
        let mut embeddings = Embeddings {
            vectors: Vec::new(),
            prompt_tokens: 0,
        };
        for text in texts {
            let tokens = self.tokens(text)?;
            if tokens.len() > *context_length {
                return Err(Reject::PromptTooLong {
                    prompt_tokens: tokens.len(),
                    context_length: *context_length,
                });
            }
            if tokens.is_empty() {
                return Err(Reject::InvalidRequest {
                    field: "input".to_owned(),
                    found: "empty".to_owned(),
                    allowed: "it must have at least one token".to_owned(),
                });
            }
            embeddings.prompt_tokens += tokens.len();
            embeddings.vectors.push(
                encoder
                    .embed(&tokens)
                    .map_err(|error| Reject::Compute(error.to_string()))?,
            );
            self.inner.counters.step(tokens.len(), 0);
        }
        Ok(embeddings)
    }

    /// How it is doing.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let counters = &self.inner.counters;
        let active = counters.active.load(Ordering::Relaxed);
        Progress {
            steps: counters.steps.load(Ordering::Relaxed),
            tokens_generated: counters.tokens_generated.load(Ordering::Relaxed),
            prompt_tokens: counters.prompt_tokens.load(Ordering::Relaxed),
            active,
            queued: counters.waiting.load(Ordering::Relaxed),
            kv_blocks_used: counters.blocks.load(Ordering::Relaxed),
            tokens_per_second: counters
                .pace
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .tokens_per_second,
        }
    }

    /// What the model does.
    #[must_use]
    pub fn kind(&self) -> ModelKind {
        self.inner.facts.kind
    }
}

/// Guards every text of a conversation, so that nobody can write a turn of somebody else's.
fn guard_texts(tokenizer: &Tokenizer, value: &mut Value) {
    match value {
        Value::String(text) => *text = tokenizer.guard(text),
        Value::Array(items) => items.iter_mut().for_each(|item| guard_texts(tokenizer, item)),
        Value::Object(fields) => fields
            .values_mut()
            .for_each(|field| guard_texts(tokenizer, field)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn cannot_generate() -> Reject {
    Reject::Unsupported {
        asked: "write text",
        able: "embed: use /v1/embeddings",
    }
}

fn context_length(options: &EngineOptions, own: u32) -> Result<usize, LoadModel> {
    let wanted = options.context_length.unwrap_or(DEFAULT_CONTEXT);
    if wanted < 8 {
        return Err(LoadModel::InvalidOption {
            field: "context_length",
            found: wanted.to_string(),
            allowed: "at least 8".to_owned(),
        });
    }
    Ok(wanted.min(own) as usize)
}

/// One real step: a model that cannot answer is found out before it takes requests.
fn first_pass(decoder: &mut Decoder, tokenizer: &Tokenizer, cache: &mut KvCache) -> Result<(), LoadModel> {
    let mut table = BlockTable::default();
    let token = tokenizer
        .bos()
        .unwrap_or(0)
        .min(decoder.config().vocab_size as u32 - 1);
    if !cache.reserve(&mut table, 1) {
        return Err(LoadModel::InvalidOption {
            field: "context_length",
            found: "without room for one token".to_owned(),
            allowed: "more".to_owned(),
        });
    }
    let row = Row {
        token,
        position: 0,
        sequence: 0,
        wants_logits: true,
    };
    let finite = decoder
        .forward(&[row], &[&table], cache)
        .iter()
        .all(|x| x.is_finite());
    cache.release(&mut table);
    finite.then_some(()).ok_or(LoadModel::NotANumber)
}
