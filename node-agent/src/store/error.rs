//! What can go wrong in the store, in words that a person can act on.

use std::path::PathBuf;

use freehold_crds::conditions::reason;

/// Why the store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenStore {
    /// The folder is not there and cannot be made.
    #[error(
        "failed to create the model store at {path:?}; give the agent a data folder that it may write (--data-dir)"
    )]
    CreateFolder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The HTTP client could not be made.
    #[error("failed to set up the HTTP client: {detail}")]
    BuildClient {
        /// What the library said.
        detail: String,
    },
}

/// Why a model is not on this machine. Cloned to everyone who waits for the same fetch.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchModel {
    /// The source is of a kind that this version does not read.
    #[error("{field} is not carried out by this version; use path, url or huggingFace")]
    NotSupported {
        /// Field of the spec.
        field: &'static str,
    },
    /// The spec's source does not read.
    #[error("{field} is {found:?}; {allowed}")]
    InvalidSource {
        /// Field of the spec.
        field: &'static str,
        /// What was found.
        found: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// No such file on this machine.
    #[error(
        "failed to read {path:?} on this machine: {detail}; spec.model.path must name a GGUF file, or a folder with model.safetensors, that the agent may read"
    )]
    ReadPath {
        /// The path.
        path: PathBuf,
        /// What the system said.
        detail: String,
    },
    /// The server cannot be reached or broke off.
    #[error(
        "failed to fetch {source_name}: {detail}; {bytes_done} bytes are kept and the fetch goes on from there"
    )]
    Transfer {
        /// The source without its query.
        source_name: String,
        /// What happened.
        detail: String,
        /// Bytes that are here.
        bytes_done: u64,
    },
    /// The server refused.
    #[error("failed to fetch {source_name}: the server answered {status}; {advice}")]
    Refused {
        /// The source without its query.
        source_name: String,
        /// HTTP status.
        status: u16,
        /// What to do.
        advice: &'static str,
        /// Whether a later try makes no sense.
        permanent: bool,
    },
    /// The bytes are not the ones that were promised.
    #[error(
        "{source_name} has sha256 {found}, spec.model.sha256 asks for {expected}; nothing was kept: check where the file comes from, or correct the digest"
    )]
    DigestMismatch {
        /// The source.
        source_name: String,
        /// Digest of the bytes.
        found: String,
        /// Digest in the spec.
        expected: String,
    },
    /// There is no room.
    #[error(
        "{source_name} needs {needed_bytes} bytes on the model store's disk and {free_bytes} are free ({reserve_bytes} stay reserved); remove models that are not used, or move the store (--data-dir)"
    )]
    DiskFull {
        /// The source.
        source_name: String,
        /// Bytes that are still to come.
        needed_bytes: u64,
        /// Bytes that are free.
        free_bytes: u64,
        /// Bytes that stay free.
        reserve_bytes: u64,
    },
    /// The store's own files cannot be written.
    #[error("failed to write {path:?}: {detail}")]
    WriteStore {
        /// The file.
        path: PathBuf,
        /// What the system said.
        detail: String,
    },
    /// The bytes are here and are no sound model.
    #[error("{path:?} is not a sound model: {detail}")]
    InvalidModel {
        /// The file.
        path: PathBuf,
        /// What the validator said.
        detail: String,
    },
    /// The fetch ended without a word, as at shutdown.
    #[error("the fetch of {source_name} was interrupted")]
    Interrupted {
        /// The source.
        source_name: String,
    },
}

impl FetchModel {
    /// The condition reason, one of `freehold_crds::conditions::reason`.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotSupported { .. } => reason::NOT_SUPPORTED,
            Self::InvalidSource { .. } => reason::INVALID_SPEC,
            Self::ReadPath { .. }
            | Self::Transfer { .. }
            | Self::Refused { .. }
            | Self::Interrupted { .. } => reason::FETCH_FAILED,
            Self::DigestMismatch { .. } => reason::DIGEST_MISMATCH,
            Self::DiskFull { .. } | Self::WriteStore { .. } => reason::DISK_FULL,
            Self::InvalidModel { .. } => reason::INVALID_MODEL,
        }
    }

    /// True when only a change of the spec or of the source can help. A missing local path or a full
    /// disk is mended by its owner without touching the spec, so those are tried again.
    #[must_use]
    pub fn permanent(&self) -> bool {
        match self {
            Self::NotSupported { .. }
            | Self::InvalidSource { .. }
            | Self::DigestMismatch { .. }
            | Self::InvalidModel { .. } => true,
            Self::Refused { permanent, .. } => *permanent,
            Self::ReadPath { .. }
            | Self::Transfer { .. }
            | Self::DiskFull { .. }
            | Self::WriteStore { .. }
            | Self::Interrupted { .. } => false,
        }
    }
}
