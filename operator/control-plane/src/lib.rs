//! The embedded control plane: a Kubernetes-shaped API for Freehold's kinds, in one process.
//!
//! ```text
//!  kubectl ──TLS, token──▶ server ─┐
//!  kube::Client ──in process───────┼─▶ http ─▶ registry ─▶ store ─▶ file (redb)
//!  tests ──────────────────────────┘             │ schema, managed, patch: pure
//!                                                └─▶ watch ◀─ the store's ring of changes
//! ```
//! It serves the kinds of the CRDs that it is given and the few core kinds that they need, for one
//! machine. It is not Kubernetes: no pods, no admission webhooks, no users but the owner. Start reading
//! at [`ControlPlane`]; the semantics of the verbs are in `registry.rs`.

mod body;
mod built_in;
mod built_in_rules;
mod cel;
mod discovery;
mod error;
mod events;
mod fields;
mod http;
mod json;
mod json_path;
mod listing;
mod managed;
mod merge;
mod metadata;
mod options;
mod patch;
mod protobuf;
mod registry;
mod removal;
mod resource;
mod scale;
mod schema;
mod selector;
mod server;
mod store;
mod table;
mod typed;
mod validate;
mod watch;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use tokio_util::sync::CancellationToken;

use crate::http::{Api, User};
use crate::registry::Registry;
use crate::store::Store;

pub use crate::server::{Serve, Server};

/// Settings of a control plane.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of the store; None keeps everything in memory, for tests and dry runs.
    pub data_dir: Option<PathBuf>,
    /// The kinds to serve.
    pub crds: Vec<CustomResourceDefinition>,
}

/// Why the control plane cannot start.
#[derive(Debug, thiserror::Error)]
pub enum OpenControlPlane {
    /// The folder cannot be made.
    #[error("failed to create {path:?}")]
    CreateFolder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The store cannot be opened, most often because another process has it.
    #[error(
        "failed to open the store {path:?}: {detail}; if another freehold runs with this folder, stop it or use another --data-dir"
    )]
    OpenStore {
        /// The file.
        path: PathBuf,
        /// What the store said.
        detail: String,
    },
    /// A CRD is not one that this server can serve.
    #[error("failed to serve the given kinds: {detail}")]
    ReadKinds {
        /// What is wrong.
        detail: String,
    },
}

/// The control plane. Clones share it.
#[derive(Clone)]
pub struct ControlPlane {
    api: Api,
}

/// Events are forgotten after this time, as in Kubernetes.
const EVENT_LIFETIME: jiff::SignedDuration = jiff::SignedDuration::from_hours(1);
/// How often old events are looked for. Nothing is written when there are none.
const SWEEP_EVERY: Duration = Duration::from_secs(300);

impl ControlPlane {
    /// Opens the store and makes the API ready. Inside a tokio runtime it also forgets old events.
    ///
    /// # Errors
    /// When the store cannot be opened or a CRD cannot be served.
    pub fn open(options: Options) -> Result<Self, OpenControlPlane> {
        let file = match &options.data_dir {
            Some(folder) => {
                std::fs::create_dir_all(folder).map_err(|source| OpenControlPlane::CreateFolder {
                    path: folder.clone(),
                    source,
                })?;
                Some(folder.join("control-plane.redb"))
            }
            None => None,
        };
        let store = Store::open(file.as_deref()).map_err(|error| OpenControlPlane::OpenStore {
            path: file.clone().unwrap_or_default(),
            detail: error.to_string(),
        })?;
        let registry = Registry::new(store, &options.crds, &now())
            .map_err(|detail| OpenControlPlane::ReadKinds { detail })?;
        let api = Api {
            registry: Arc::new(registry),
            shutdown: CancellationToken::new(),
        };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(sweep_events(Arc::downgrade(&api.registry)));
        }
        Ok(Self { api })
    }

    /// The API as a tower service, for this process, with every right.
    #[must_use]
    pub fn service(&self) -> ApiService {
        ApiService {
            api: self.api.clone(),
        }
    }

    /// A Kubernetes client on [`Self::service`].
    ///
    /// # Panics
    /// Outside a tokio runtime, in which the client's own task runs.
    #[must_use]
    pub fn client(&self) -> kube::Client {
        kube::Client::new(self.service(), "default")
    }

    /// Serves the API with TLS on `address`, which should be a loopback address. Certificates, token
    /// and kubeconfig are kept in `folder`, readable by their owner only.
    ///
    /// # Errors
    /// When the port is taken or the folder cannot be written.
    pub async fn serve(&self, address: SocketAddr, folder: &Path) -> Result<Server, Serve> {
        server::serve(self.api.clone(), address, folder).await
    }

    /// The number of the latest change: two equal numbers mean that nothing was written in between.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.api.registry.store.revision()
    }

    /// Ends every watch, so that clients in this process can stop.
    pub fn shutdown(&self) {
        self.api.shutdown.cancel();
    }
}

async fn sweep_events(registry: std::sync::Weak<Registry>) {
    loop {
        tokio::time::sleep(SWEEP_EVERY).await;
        let Some(registry) = registry.upgrade() else {
            return;
        };
        let before = jiff::Timestamp::now() - EVENT_LIFETIME;
        let swept = tokio::task::spawn_blocking(move || registry.expire_events(before)).await;
        if let Ok(Err(error)) = swept {
            tracing::warn!(error = error.message, "Failed to forget old events");
        }
    }
}

/// The time as Kubernetes writes it: RFC 3339 in whole seconds.
pub(crate) fn now() -> String {
    let seconds = jiff::Timestamp::now().as_second();
    jiff::Timestamp::from_second(seconds)
        .unwrap_or_default()
        .to_string()
}

/// The API in process.
#[derive(Clone)]
pub struct ApiService {
    api: Api,
}

impl<B> tower::Service<::http::Request<B>> for ApiService
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = ::http::Response<axum::body::Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: ::http::Request<B>) -> Self::Future {
        let api = self.api.clone();
        Box::pin(async move {
            let user = User {
                name: "system:freehold".to_owned(),
                groups: vec!["system:masters".to_owned()],
            };
            Ok(api.handle(request, &user).await)
        })
    }
}
