//! Why an agent does not start.

use std::net::SocketAddr;
use std::path::PathBuf;

/// Why an agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartAgent {
    /// A setting is not usable.
    #[error("{setting} is {found:?}; {allowed}")]
    InvalidSetting {
        /// The setting.
        setting: &'static str,
        /// What was found.
        found: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// The data folder cannot be used.
    #[error("failed to use {path:?} as the agent's folder; give it one that it may write (--data-dir)")]
    PrepareFolder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Another agent has it.
    #[error("another agent runs with the folder {path:?}; stop it, or use another --data-dir")]
    FolderInUse {
        /// The folder.
        path: PathBuf,
    },
    /// The model store cannot be opened.
    #[error(transparent)]
    OpenStore(#[from] crate::store::OpenStore),
    /// The gateway cannot be opened.
    #[error(transparent)]
    OpenGateway(#[from] freehold_gateway::OpenGateway),
    /// A port cannot be had.
    #[error("failed to listen on {address}; if something else has the port, choose another")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// This program does not know where it is.
    #[error("failed to find this program's own file, which runs the workers")]
    FindProgram(#[source] std::io::Error),
}
