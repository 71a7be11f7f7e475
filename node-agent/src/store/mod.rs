//! The content-addressed model store of one machine.
//!
//! [`ModelStore::ensure`] is the one way in: it answers with a path whose bytes are what the source
//! promised, or with an error that says what to do. Start reading there.
//!
//! ```text
//! DIR/blobs/<sha256>           a whole, verified file; its name is its digest
//! DIR/sources/<key>.json       which digest a source had, so that a second fetch needs no network
//! DIR/partial/<key>.part       bytes so far of a download, resumed after any interruption
//! ```
//! A `path` source is read in place and never copied.

mod download;
mod error;
pub(crate) mod facts;
mod layout;
mod verify;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use freehold_crds::inference_node::FetchProgress;
use freehold_crds::model_deployment::{ModelFacts, ModelSource};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::{debug, info, warn};

pub use error::{FetchModel, OpenStore};
use layout::{Layout, Source};
pub(crate) use verify::hash_reader;

/// Settings of a store.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Address of the Hugging Face hub or of a mirror, without a slash at the end.
    pub hub_endpoint: String,
    /// Token for the hub, sent to that endpoint only.
    pub hub_token: Option<String>,
    /// Bytes of disk that a fetch leaves free.
    pub reserve_bytes: u64,
}

impl Default for StoreOptions {
    fn default() -> Self {
        // 256 MiB: enough for logs and the agent's own files on a full disk.
        Self {
            hub_endpoint: "https://huggingface.co".to_owned(),
            hub_token: None,
            reserve_bytes: 256 << 20,
        }
    }
}

/// What a fetch is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FetchState {
    /// True while bytes that are here are hashed, false while they come.
    pub verifying: bool,
    /// How far it is.
    pub progress: FetchProgress,
}

/// A model whose bytes are here and checked.
#[derive(Clone, Debug)]
pub struct StoredModel {
    /// A GGUF file, or a folder with safetensors.
    pub path: PathBuf,
    /// What it turned out to be. `kv_bytes_per_token` is for an F16 cache.
    pub facts: ModelFacts,
}

/// The store. Clones share it.
#[derive(Clone)]
pub struct ModelStore {
    shared: Arc<Shared>,
}

struct Shared {
    layout: Layout,
    options: StoreOptions,
    client: reqwest::Client,
    /// Fetches under way, by source key. Whoever waits holds the `Arc`; the last to leave ends the fetch.
    in_flight: Mutex<HashMap<String, Weak<InFlight>>>,
}

type Outcome = Option<Result<StoredModel, FetchModel>>;

struct InFlight {
    state: watch::Receiver<FetchState>,
    outcome: watch::Receiver<Outcome>,
    task: AbortHandle,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ModelStore {
    /// Opens the store in `directory`, which is made if it is not there.
    ///
    /// # Errors
    /// When the folder cannot be made or written.
    pub fn open(directory: PathBuf, options: StoreOptions) -> Result<Self, OpenStore> {
        let layout = Layout::create(directory)?;
        // Only the first caller in a process installs the provider; a later one finds it there.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .user_agent(concat!("freehold/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(download::CONNECT_TIMEOUT)
            .read_timeout(download::READ_TIMEOUT)
            .build()
            .map_err(|error| OpenStore::BuildClient {
                detail: error.to_string(),
            })?;
        Ok(Self {
            shared: Arc::new(Shared {
                layout,
                options,
                client,
                in_flight: Mutex::default(),
            }),
        })
    }

    /// The folder of the store.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.shared.layout.root()
    }

    /// Makes sure that the model's bytes are on this machine, whole and checked, and says what they are.
    /// Several calls for one source share one fetch; its progress goes to each caller's `progress`.
    ///
    /// # Errors
    /// [`FetchModel`]: [`FetchModel::permanent`] says whether a later try could end otherwise.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the fetch; when nobody waits for it any more it stops, and what is
    /// here stays for a later resume.
    pub async fn ensure(
        &self,
        source: &ModelSource,
        progress: watch::Sender<FetchState>,
    ) -> Result<StoredModel, FetchModel> {
        let source = Source::from_spec(source, &self.shared.options)?;
        let flight = self.join_or_start(&source);
        let (mut state, mut outcome) = (flight.state.clone(), flight.outcome.clone());
        loop {
            // Both arms only wait for a change of a watch channel, which loses nothing when dropped.
            tokio::select! {
                changed = outcome.changed() => {
                    let value = outcome.borrow_and_update().clone();
                    match (value, changed) {
                        (Some(result), _) => return result,
                        (None, Ok(())) => {}
                        (None, Err(_)) => return Err(FetchModel::Interrupted { source_name: source.name() }),
                    }
                }
                Ok(()) = state.changed() => {
                    progress.send_replace(state.borrow_and_update().clone());
                }
            }
        }
    }

    /// Removes stored files that none of `sources` uses. Files of `path` sources are never touched.
    pub fn retain(&self, sources: &[&ModelSource]) {
        let wanted: Vec<Source> = sources
            .iter()
            .filter_map(|source| Source::from_spec(source, &self.shared.options).ok())
            .collect();
        for removed in self.shared.layout.retain(&wanted) {
            info!(path = %removed.display(), "Removed unused model file");
        }
    }

    /// Takes a file that came some other way (a disk, a wheel) into the store, if it is what `sha256` says.
    /// A deployment with that digest then needs no network. The file is moved, or copied across disks.
    ///
    /// # Errors
    /// [`FetchModel::DigestMismatch`], leaving the file where it is, or what the disk said.
    pub async fn import(&self, file: &Path, sha256: &str) -> Result<PathBuf, FetchModel> {
        let unreadable = |error: std::io::Error| FetchModel::ReadPath {
            path: file.to_owned(),
            detail: error.to_string(),
        };
        let bytes = std::fs::metadata(file).map_err(unreadable)?.len();
        let (state, _) = watch::channel(FetchState::default());
        let found = verify::hash_file(file.to_owned(), bytes, state)
            .await
            .map_err(unreadable)?;
        if found != sha256 {
            let (source_name, expected) = (file.display().to_string(), sha256.to_owned());
            return Err(FetchModel::DigestMismatch {
                source_name,
                found,
                expected,
            });
        }
        let blob = self.shared.layout.blob(&found);
        if std::fs::rename(file, &blob).is_err() {
            let staged = self.directory().join("partial").join(format!("{found}.import"));
            let copied = std::fs::copy(file, &staged).and_then(|_| std::fs::rename(&staged, &blob));
            copied.map_err(|error| FetchModel::WriteStore {
                path: blob.clone(),
                detail: error.to_string(),
            })?;
        }
        // From now on it is young, whatever the file's own time was.
        let stamped =
            std::fs::File::open(&blob).and_then(|file| file.set_modified(std::time::SystemTime::now()));
        stamped.map_err(|error| FetchModel::WriteStore {
            path: blob.clone(),
            detail: error.to_string(),
        })?;
        Ok(blob)
    }

    /// The stored file with this digest, if it is here.
    #[must_use]
    pub fn stored(&self, sha256: &str) -> Option<PathBuf> {
        let blob = self.shared.layout.blob(sha256);
        blob.is_file().then_some(blob)
    }

    fn join_or_start(&self, source: &Source) -> Arc<InFlight> {
        let mut in_flight = self
            .shared
            .in_flight
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        in_flight.retain(|_, flight| flight.strong_count() > 0);
        let key = source.flight_key();
        if let Some(flight) = in_flight.get(&key).and_then(Weak::upgrade)
            && flight.outcome.borrow().is_none()
        {
            debug!(source = %source.name(), "Joined a fetch under way");
            return flight;
        }
        let (state_sender, state) = watch::channel(FetchState::default());
        let (outcome_sender, outcome) = watch::channel(None);
        let (shared, source) = (Arc::clone(&self.shared), source.clone());
        let task = tokio::spawn(async move {
            let result = fetch(&shared, &source, &state_sender).await;
            if let Err(error) = &result {
                warn!(source = %source.name(), %error, permanent = error.permanent(), "Failed to fetch model");
            }
            outcome_sender.send_replace(Some(result));
        })
        .abort_handle();
        let flight = Arc::new(InFlight { state, outcome, task });
        in_flight.insert(key, Arc::downgrade(&flight));
        flight
    }
}

/// One fetch, from what may be here already to the facts.
async fn fetch(
    shared: &Shared,
    source: &Source,
    state: &watch::Sender<FetchState>,
) -> Result<StoredModel, FetchModel> {
    let (path, sha256) = match source {
        Source::Path { path, expected } => {
            let digest = verify::local_path(&shared.layout, path, expected.as_deref(), state).await?;
            (path.clone(), digest)
        }
        Source::Remote(remote) => match shared.layout.known_blob(remote) {
            Some((path, digest)) => (path, Some(digest)),
            None => {
                let digest =
                    download::download(&shared.client, &shared.layout, &shared.options, remote, state)
                        .await?;
                (shared.layout.blob(&digest), Some(digest))
            }
        },
    };
    let verified = source.expected_sha256().is_some();
    let facts = facts::read(&path, sha256, verified).await?;
    Ok(StoredModel { path, facts })
}
