//! The engine as its callers see it: load a model, ask it, watch it.

mod counters;
mod draft;
mod types;

use std::fmt;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use serde_json::Value;

use crate::constrain::Grammars;
use crate::device::{self, Beginning};
use crate::gguf::{GgufFile, Value as GgufValue};
use crate::inspect::{ModelFacts, ModelKind, gguf_facts};
use crate::kernels::attention::BLOCK_TOKENS;
use crate::kv::blocks_for;
use crate::model::{DecoderConfig, Encoder, EncoderConfig};
use crate::scheduler::{Job, Scheduler};
use crate::template::ChatTemplate;
use crate::tokenizer::{BOS, Special, Tokenizer};
use crate::{InvalidModel, LoadModel, Reject};
pub(crate) use counters::{Counters, StepCount};
use types::DEFAULT_CONTEXT;
pub use types::{
    DeviceChoice, Embeddings, EngineOptions, FinishReason, Finished, GenerateEvent, GenerateRequest,
    GenerationHandle, LoadProgress, Precision, Progress, Prompt, Sink, TokenLogprob,
};

enum Task {
    Generate {
        jobs: Sender<Job>,
        template: Option<Box<ChatTemplate>>,
        context_length: usize,
        most_present: usize,
        speculate: bool,
        share: bool,
        grammars: Arc<Grammars>,
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
    device: DeviceChoice,
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
        if path.is_dir() {
            Self::load_encoder(path, options)
        } else {
            Self::load_decoder(path, options, progress)
        }
    }

    fn load_decoder(
        path: &Path,
        options: &EngineOptions,
        progress: impl FnMut(LoadProgress),
    ) -> Result<Self, LoadModel> {
        let file = GgufFile::open(path)?;
        let facts = gguf_facts(&file)?;
        let mut config = DecoderConfig::from_gguf(&file)?;
        let rows = config.vocab_size;
        let context_length = context_length(options, facts.context_length)?;
        config.serve_context(context_length);
        let sequences = options.max_sequences.max(1) as usize;
        let capacity = kv_blocks(options, sequences, context_length)?;
        let keep = options
            .prefix_tokens
            .map_or(context_length, |tokens| tokens as usize)
            / BLOCK_TOKENS;
        let beginning = Beginning {
            file: &file,
            config,
            options,
            blocks: (capacity, keep),
            token: file.optional(BOS, GgufValue::to_u32)?.unwrap_or(0),
            compute: None,
        };
        // Words are read while weights are repacked.
        let (words, begun) = std::thread::scope(|scope| {
            let words = std::thread::Builder::new()
                .name("vocabulary".to_owned())
                .spawn_scoped(scope, || words(&file, rows))
                .map_err(LoadModel::StartThread)?;
            let begun = device::begin(&beginning, progress);
            let words = words
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok::<_, LoadModel>((words, begun))
        })?;
        let ((tokenizer, template), begun) = (words?, begun?);
        let tokenizer = Arc::new(tokenizer);
        // Everything is copied out: the file's pages leave this process's memory.
        drop(file);
        let draft = draft::load(options, &tokenizer, begun.runner.compute(), capacity)?;
        let (jobs, receiver) = channel();
        let counters = Arc::new(Counters::default());
        let scheduler = Scheduler::new(
            begun.runner,
            Arc::clone(&tokenizer),
            begun.cache,
            receiver,
            Arc::clone(&counters),
            sequences,
            draft,
        );
        std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || scheduler.run())
            .map_err(LoadModel::StartThread)?;
        let task = Task::Generate {
            jobs,
            template: template.map(Box::new),
            context_length,
            most_present: sequences + options.max_queued as usize,
            speculate: options.speculate,
            share: options.prefix_tokens != Some(0),
            grammars: Arc::default(),
        };
        Ok(Self {
            inner: Arc::new(Inner {
                facts,
                tokenizer,
                task,
                counters,
                device: begun.device,
                device_reason: begun.reason,
            }),
        })
    }

    fn load_encoder(folder: &Path, options: &EngineOptions) -> Result<Self, LoadModel> {
        let config = EncoderConfig::open(folder)?;
        let facts = config.facts(folder)?;
        let tokenizer =
            Tokenizer::from_tokenizer_json(&crate::model::read_bounded(folder, crate::model::TOKENIZER)?)?;
        let context_length =
            context_length(options, facts.context_length)?.min(config.max_position_embeddings);
        // Texts are read by vectors alone.
        let compute = device::compute(options)?.without_units();
        device::report(&compute);
        let encoder = Encoder::load(folder, config, compute)?;
        let probe = tokenizer.encode(
            "a",
            Special {
                add: true,
                parse: false,
            },
        );
        if encoder.embed(&[probe]).iter().flatten().any(|x| !x.is_finite()) {
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
                device: DeviceChoice::Cpu,
                device_reason: device::encoder_reason(options.device),
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
        self.inner.device
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

    /// Asks for an answer. Events go to `sink`; see [`Sink`] for what it must keep to. A constraint is
    /// compiled on the caller's thread, which may take a tenth of a second, the first one longer.
    ///
    /// # Errors
    /// [`Reject`], before anything was done.
    pub fn generate(&self, request: GenerateRequest, sink: Sink) -> Result<GenerationHandle, Reject> {
        self.accept(request, sink, None)
    }

    /// The natural logarithm of the probability of each token after the first, given those before it.
    /// Waits for the answer.
    ///
    /// # Errors
    /// As [`Self::generate`].
    pub fn score(&self, tokens: &[u32]) -> Result<Vec<f32>, Reject> {
        let request = GenerateRequest {
            id: "score".to_owned(),
            prompt: Prompt::Tokens(tokens.to_vec()),
            max_tokens: Some(1),
            max_context: None,
            // What was computed before has no logits any more.
            scope: String::new(),
            stop: Vec::new(),
            constraint: None,
            sampling: crate::SamplingParams::default(),
        };
        let (sender, scores) = channel();
        let handle = self.accept(
            request,
            Box::new(|_| std::ops::ControlFlow::Continue(())),
            Some(sender),
        )?;
        let scores = scores.recv().map_err(|_| Reject::Stopping)?;
        drop(handle);
        if scores.len() + 1 < tokens.len() {
            return Err(Reject::Compute("the text was not read to its end".to_owned()));
        }
        Ok(scores)
    }

    fn accept(
        &self,
        request: GenerateRequest,
        sink: Sink,
        score: Option<Sender<Vec<f32>>>,
    ) -> Result<GenerationHandle, Reject> {
        let Task::Generate {
            jobs,
            context_length,
            most_present,
            speculate,
            share,
            grammars,
            ..
        } = &self.inner.task
        else {
            return Err(cannot_generate());
        };
        // First of all: who is refused for want of room costs no template, no tokenizer and no compiler.
        let counters = &self.inner.counters;
        let place = counters
            .enter(*most_present)
            .map_err(|present| Reject::QueueFull {
                queued: present,
                retry_after_ms: 1000,
            })?;
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
        let guide = request
            .constraint
            .map(|constraint| grammars.compile(&constraint, &self.inner.tokenizer))
            .transpose()?;
        let (cancelled, scored) = (Arc::new(AtomicBool::new(false)), score.is_some());
        let prompt_tokens = prompt.len();
        let owner = scope(&request.scope);
        let job = Job {
            id: request.id,
            prompt,
            max_tokens,
            stop: request.stop,
            sampling: request.sampling,
            guide,
            score,
            owner,
            scope: if *share && !scored {
                owner
            } else {
                counters.next_scope()
            },
            speculate: *speculate,
            sink,
            cancelled: Arc::clone(&cancelled),
            arrived: Instant::now(),
        };
        jobs.send(job).map_err(|_| Reject::Stopping)?;
        place.hand_over();
        Ok(GenerationHandle::new(cancelled, prompt_tokens))
    }

    /// Turns texts into vectors, on the caller's thread.
    ///
    /// # Errors
    /// [`Reject`] when the model writes text, or a text is too long.
    pub fn embed(&self, texts: &[Prompt]) -> Result<Embeddings, Reject> {
        self.embed_while(texts, || true)
    }

    /// As [`Self::embed`], as long as somebody wants the answer: asked before each portion of texts that is
    /// computed at once, which takes a fraction of a second.
    ///
    /// # Errors
    /// As [`Self::embed`], before anything is computed; [`Reject::Stopping`] when nobody wants it any more.
    pub fn embed_while(&self, texts: &[Prompt], wanted: impl Fn() -> bool) -> Result<Embeddings, Reject> {
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
        let mut tokens = Vec::with_capacity(texts.len());
        for text in texts {
            if !wanted() {
                return Err(Reject::Stopping);
            }
            let text = self.tokens(text)?;
            if text.len() > *context_length {
                return Err(Reject::PromptTooLong {
                    prompt_tokens: text.len(),
                    context_length: *context_length,
                });
            }
            if text.is_empty() {
                return Err(Reject::InvalidRequest {
                    field: "input".to_owned(),
                    found: "empty".to_owned(),
                    allowed: "it must have at least one token".to_owned(),
                });
            }
            tokens.push(text);
        }
        let mut embeddings = Embeddings {
            vectors: Vec::with_capacity(tokens.len()),
            prompt_tokens: 0,
        };
        for batch in Encoder::batches(&tokens) {
            if !wanted() {
                return Err(Reject::Stopping);
            }
            embeddings.vectors.extend(encoder.embed(batch));
            let prompt_rows = batch.iter().map(Vec::len).sum();
            embeddings.prompt_tokens += prompt_rows;
            self.inner.counters.step(&StepCount {
                prompt_rows,
                ..StepCount::default()
            });
        }
        Ok(embeddings)
    }

    /// How it is doing.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.inner.counters.progress()
    }

    /// What the model does.
    #[must_use]
    pub fn kind(&self) -> ModelKind {
        self.inner.facts.kind
    }
}

/// A number for a scope. Kept secret by its keys: nobody can choose a name that falls on another's.
fn scope(name: &str) -> u64 {
    use std::hash::BuildHasher;
    static KEYS: OnceLock<std::hash::RandomState> = OnceLock::new();
    KEYS.get_or_init(std::hash::RandomState::new).hash_one(name)
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

/// What turns texts into tokens and conversations into texts, for a model that knows `rows` tokens.
fn words(file: &GgufFile, rows: usize) -> Result<(Tokenizer, Option<ChatTemplate>), LoadModel> {
    let tokenizer = Tokenizer::from_gguf(file)?;
    if tokenizer.vocab_size() > rows {
        return Err(InvalidModel::inconsistent(
            "the tokenizer's vocabulary",
            format!("{} tokens", tokenizer.vocab_size()),
            format!("at most the {rows} rows of token_embd.weight"),
        )
        .into());
    }
    let template = ChatTemplate::from_gguf(file, tokenizer.bos_text(), tokenizer.eos_text())?;
    Ok((tokenizer, template))
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

/// Blocks of the KV cache.
fn kv_blocks(options: &EngineOptions, sequences: usize, context_length: usize) -> Result<usize, LoadModel> {
    let one = blocks_for(context_length);
    let Some(tokens) = options.kv_tokens else {
        return Ok(sequences * one);
    };
    let blocks = blocks_for(tokens as usize);
    if blocks < one {
        return Err(LoadModel::InvalidOption {
            field: "kv_tokens",
            found: tokens.to_string(),
            allowed: format!(
                "at least the context length, {context_length} tokens in whole blocks of {BLOCK_TOKENS}"
            ),
        });
    }
    Ok(blocks.min(sequences * one))
}
