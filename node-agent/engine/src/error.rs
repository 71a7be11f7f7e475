//! What can go wrong, in words that a person can act on.

use std::path::PathBuf;

/// Why a file is not a sound model.
#[derive(Debug, thiserror::Error)]
pub enum InvalidModel {
    /// The file cannot be opened or mapped.
    #[error("failed to open {path:?}")]
    OpenFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what its format asks for.
    #[error("{what} at byte {offset} is {found}; {allowed}")]
    Malformed {
        /// Part of the file.
        what: String,
        /// Where it stands.
        offset: u64,
        /// What was found.
        found: String,
        /// What is allowed.
        allowed: String,
    },
    /// Something that the model needs is not in the file.
    #[error("{what} is missing; the file is incomplete or of another kind")]
    Missing {
        /// Key or tensor.
        what: String,
    },
    /// The file may be sound, and this version does not run it.
    #[error("{what} is {found}; this version supports {allowed}")]
    Unsupported {
        /// Part of the file.
        what: String,
        /// What was found.
        found: String,
        /// What is supported.
        allowed: String,
    },
    /// A number or a shape does not fit the others.
    #[error("{what} is {found}; expected {allowed}")]
    Inconsistent {
        /// Key or tensor.
        what: String,
        /// What was found.
        found: String,
        /// What would fit.
        allowed: String,
    },
}

/// Longest text that an error or a fact quotes from a file, in bytes.
const QUOTED_BYTES: usize = 200;

/// Text out of a file, made fit for people: control characters are escaped, the rest is cut.
pub(crate) fn quote(text: &str) -> String {
    let mut quoted = String::new();
    for c in text.chars() {
        if quoted.len() >= QUOTED_BYTES {
            quoted.push('…');
            break;
        }
        if c.is_control() {
            quoted.extend(c.escape_default());
        } else {
            quoted.push(c);
        }
    }
    quoted
}

impl InvalidModel {
    pub(crate) fn missing(what: impl Into<String>) -> Self {
        Self::Missing {
            what: quote(&what.into()),
        }
    }

    #[allow(clippy::needless_pass_by_value)] // callers hand over numbers, texts and errors alike
    pub(crate) fn unsupported(
        what: impl Into<String>,
        found: impl ToString,
        allowed: impl Into<String>,
    ) -> Self {
        Self::Unsupported {
            what: quote(&what.into()),
            found: quote(&found.to_string()),
            allowed: allowed.into(),
        }
    }

    #[allow(clippy::needless_pass_by_value)] // as above
    pub(crate) fn inconsistent(
        what: impl Into<String>,
        found: impl ToString,
        allowed: impl Into<String>,
    ) -> Self {
        Self::Inconsistent {
            what: quote(&what.into()),
            found: quote(&found.to_string()),
            allowed: allowed.into(),
        }
    }
}

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadModel {
    /// The file is not a sound model.
    #[error(transparent)]
    Invalid(#[from] InvalidModel),
    /// The draft model cannot be used.
    #[error("failed to load the draft model {path:?}; take it out of the settings, or give one that fits")]
    Draft {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<LoadModel>,
    },
    /// The arithmetic failed.
    #[error("failed to compute while loading")]
    Compute(#[source] candle_core::Error),
    /// The first forward pass gave numbers that are none.
    #[error(
        "the model's first answer is not a number; the file is damaged or of a kind that this version misreads"
    )]
    NotANumber,
    /// There is no memory for the weights.
    #[error("failed to get memory for the weights")]
    Allocate(#[source] std::io::Error),
    /// A thread could not be started.
    #[error("failed to start the engine's threads")]
    StartThread(#[source] std::io::Error),
    /// A setting is out of range.
    #[error("{field} is {found}; {allowed}")]
    InvalidOption {
        /// The setting.
        field: &'static str,
        /// What was found.
        found: String,
        /// What is allowed.
        allowed: String,
    },
}

impl From<candle_core::Error> for LoadModel {
    fn from(error: candle_core::Error) -> Self {
        Self::Compute(error)
    }
}

/// Why a request is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reject {
    /// As many requests wait as may.
    #[error("{queued} requests wait already; try again in a moment")]
    QueueFull {
        /// How many wait.
        queued: usize,
        /// When a place may be free.
        retry_after_ms: u64,
    },
    /// Prompt and answer do not fit the context.
    #[error(
        "the prompt has {prompt_tokens} tokens and the context holds {context_length}; shorten the prompt or deploy with a longer spec.engine.contextLength"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens that the context holds.
        context_length: usize,
    },
    /// A field is out of range.
    #[error("{field} is {found}; {allowed}")]
    InvalidRequest {
        /// The field.
        field: String,
        /// What was found.
        found: String,
        /// What is allowed.
        allowed: String,
    },
    /// The chat template failed.
    #[error("the model's chat template failed: {0}")]
    Template(String),
    /// The model does something else.
    #[error("this model does not {asked}; it can {able}")]
    Unsupported {
        /// What was asked.
        asked: &'static str,
        /// What it can do.
        able: &'static str,
    },
    /// The engine is shutting down.
    #[error("the engine is stopping")]
    Stopping,
    /// The arithmetic failed.
    #[error("failed to compute: {0}")]
    Compute(String),
}
