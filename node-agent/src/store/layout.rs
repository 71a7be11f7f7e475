//! Where things lie in the store, and how a source is named.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use freehold_crds::model_deployment::ModelSource;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{FetchModel, OpenStore, StoreOptions};

/// A source that this version reads.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// In place on this machine.
    Path {
        /// The file or folder.
        path: PathBuf,
        /// Digest in the spec.
        expected: Option<String>,
    },
    /// One file over HTTP.
    Remote(Remote),
}

/// One file over HTTP.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    /// Address of the file.
    pub(super) url: reqwest::Url,
    /// Bearer token, for the hub only.
    pub(super) token: Option<String>,
    /// Digest in the spec.
    pub(super) expected: Option<String>,
}

/// What is known of a source that was fetched before.
#[derive(Debug, Serialize, Deserialize)]
struct SourceRecord {
    url: String,
    sha256: String,
}

impl Source {
    pub(super) fn from_spec(spec: &ModelSource, options: &StoreOptions) -> Result<Self, FetchModel> {
        let expected = spec.sha256.clone();
        if let Some(path) = &spec.path {
            let path = PathBuf::from(path);
            if !path.is_absolute() {
                return Err(FetchModel::InvalidSource {
                    field: "spec.model.path",
                    found: path.display().to_string(),
                    allowed: "it must be an absolute path on the machine that runs the model",
                });
            }
            return Ok(Self::Path { path, expected });
        }
        if let Some(url) = &spec.url {
            return Ok(Self::Remote(Remote {
                url: parse_url("spec.model.url", url)?,
                token: None,
                expected,
            }));
        }
        if let Some(hub) = &spec.hugging_face {
            let own = hub.endpoint.is_some();
            let endpoint = hub
                .endpoint
                .as_deref()
                .unwrap_or(&options.hub_endpoint)
                .trim_end_matches('/');
            let text = format!(
                "{endpoint}/{}/resolve/{}/{}",
                hub.repository, hub.revision, hub.file
            );
            let url = parse_url("spec.model.huggingFace", &text)?;
            // The machine's token goes to the machine's own hub, never to an address that a spec names.
            let token = if own { None } else { options.hub_token.clone() };
            return Ok(Self::Remote(Remote { url, token, expected }));
        }
        let field = if spec.oci.is_some() {
            "spec.model.oci"
        } else if spec.persistent_volume_claim.is_some() {
            "spec.model.persistentVolumeClaim"
        } else {
            return Err(FetchModel::InvalidSource {
                field: "spec.model",
                found: "no source".to_owned(),
                allowed: "give exactly one of path, url or huggingFace",
            });
        };
        Err(FetchModel::NotSupported { field })
    }

    /// The source for people and logs: an address without its query, which may hold a secret.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Path { path, .. } => path.display().to_string(),
            Self::Remote(remote) => remote.name(),
        }
    }

    pub(super) fn expected_sha256(&self) -> Option<&str> {
        match self {
            Self::Path { expected, .. } | Self::Remote(Remote { expected, .. }) => expected.as_deref(),
        }
    }

    /// Two fetches with one key are the same fetch: same place and same promise.
    pub(super) fn flight_key(&self) -> String {
        let place = match self {
            Self::Path { path, .. } => format!("path:{}", path.display()),
            Self::Remote(remote) => remote.key(),
        };
        format!("{place}@{}", self.expected_sha256().unwrap_or("any"))
    }
}

impl Remote {
    pub(super) fn name(&self) -> String {
        let mut url = self.url.clone();
        url.set_query(None);
        url.set_fragment(None);
        let _ = url.set_password(None);
        let _ = url.set_username("");
        url.to_string()
    }

    /// File name for what is kept about this address.
    pub(super) fn key(&self) -> String {
        hex::encode(Sha256::digest(self.url.as_str().as_bytes()))
    }
}

fn parse_url(field: &'static str, text: &str) -> Result<reqwest::Url, FetchModel> {
    let invalid = || FetchModel::InvalidSource {
        field,
        found: text.to_owned(),
        allowed: "it must be an http:// or https:// address",
    };
    let url = reqwest::Url::parse(text).map_err(|_| invalid())?;
    if matches!(url.scheme(), "http" | "https") && url.has_host() {
        Ok(url)
    } else {
        Err(invalid())
    }
}

/// The folders of the store.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    root: PathBuf,
}

impl Layout {
    pub(super) fn create(root: PathBuf) -> Result<Self, OpenStore> {
        for folder in ["blobs", "sources", "partial", "digests"] {
            let path = root.join(folder);
            fs::create_dir_all(&path).map_err(|source| OpenStore::CreateFolder { path, source })?;
        }
        Ok(Self { root })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn blob(&self, sha256: &str) -> PathBuf {
        self.root.join("blobs").join(sha256)
    }

    pub(super) fn partial(&self, remote: &Remote) -> PathBuf {
        self.root.join("partial").join(format!("{}.part", remote.key()))
    }

    pub(super) fn digest_cache(&self, path: &Path) -> PathBuf {
        let key = hex::encode(Sha256::digest(path.as_os_str().as_encoded_bytes()));
        self.root.join("digests").join(format!("{key}.json"))
    }

    fn record(&self, remote: &Remote) -> PathBuf {
        self.root.join("sources").join(format!("{}.json", remote.key()))
    }

    /// A verified file for this source, if one is here: by the promised digest, else by what the
    /// address had when it was fetched.
    pub(super) fn known_blob(&self, remote: &Remote) -> Option<(PathBuf, String)> {
        let digest = match &remote.expected {
            Some(expected) => expected.clone(),
            None => {
                let text = fs::read(self.record(remote)).ok()?;
                serde_json::from_slice::<SourceRecord>(&text).ok()?.sha256
            }
        };
        let is_digest = digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit());
        let path = self.blob(&digest);
        (is_digest && path.is_file()).then_some((path, digest))
    }

    /// Remembers which digest an address had.
    pub(super) fn remember(&self, remote: &Remote, sha256: &str) -> Result<(), FetchModel> {
        let record = SourceRecord {
            url: remote.name(),
            sha256: sha256.to_owned(),
        };
        let path = self.record(remote);
        let text = serde_json::to_vec(&record).unwrap_or_default();
        write_atomically(&path, &text)
    }

    /// Removes blobs, partial downloads and records that no source wants; says which files went.
    pub(super) fn retain(&self, wanted: &[Source]) -> Vec<PathBuf> {
        let mut keep: Vec<PathBuf> = Vec::new();
        for source in wanted {
            if let Source::Remote(remote) = source {
                keep.push(self.partial(remote));
                keep.push(self.record(remote));
                keep.extend(self.known_blob(remote).map(|(path, _)| path));
            }
        }
        let mut removed = Vec::new();
        for folder in ["blobs", "partial", "sources"] {
            let Ok(entries) = fs::read_dir(self.root.join(folder)) else {
                continue;
            };
            for path in entries.flatten().map(|entry| entry.path()) {
                let unused = !keep.contains(&path) && !is_young(&path);
                if unused && fs::remove_file(&path).is_ok() && folder == "blobs" {
                    removed.push(path);
                }
            }
        }
        removed
    }
}

/// A file that came within this time is kept even if nothing wants it yet: it may have been put here for
/// a deployment that is about to be applied.
const YOUNG: Duration = Duration::from_secs(3600);

fn is_young(path: &Path) -> bool {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    // A time in the future (a clock that was set back) counts as young.
    modified.is_ok_and(|modified| modified.elapsed().map_or(true, |age| age < YOUNG))
}

/// Writes a small file so that a crash leaves either the old or the new one.
pub(super) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), FetchModel> {
    let error = |detail: std::io::Error| FetchModel::WriteStore {
        path: path.to_owned(),
        detail: detail.to_string(),
    };
    let temporary = path.with_extension(format!("tmp-{}", uuid::Uuid::new_v4().simple()));
    fs::write(&temporary, bytes).map_err(error)?;
    fs::rename(&temporary, path).map_err(error)
}
