//! Hashing what is on this machine already.

use std::fs::{File, Metadata};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use freehold_crds::inference_node::FetchProgress;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::layout::{Layout, write_atomically};
use super::{FetchModel, FetchState};

/// 1 MiB: large enough for full disk speed, small enough to report progress and to stay out of memory.
const CHUNK_BYTES: usize = 1 << 20;

/// A digest that was computed before, good as long as the file looks the same.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct CachedDigest {
    bytes: u64,
    modified_ns: u128,
    sha256: String,
}

/// Checks a model that is read in place. Without a promised digest nothing is hashed.
pub(super) async fn local_path(
    layout: &Layout,
    path: &Path,
    expected: Option<&str>,
    state: &watch::Sender<FetchState>,
) -> Result<Option<String>, FetchModel> {
    let unreadable = |error: std::io::Error| FetchModel::ReadPath {
        path: path.to_owned(),
        detail: error.to_string(),
    };
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    let file = if metadata.is_dir() {
        path.join("model.safetensors")
    } else {
        path.to_owned()
    };
    let metadata = std::fs::metadata(&file).map_err(unreadable)?;
    let Some(expected) = expected else {
        File::open(&file).map_err(unreadable)?;
        return Ok(None);
    };
    let cache = layout.digest_cache(&file);
    let found = match cached(&cache, &metadata) {
        Some(digest) => digest,
        None => {
            let digest = hash_file(file.clone(), metadata.len(), state.clone())
                .await
                .map_err(unreadable)?;
            remember(&cache, &metadata, &digest)?;
            digest
        }
    };
    if found != expected {
        return Err(FetchModel::DigestMismatch {
            source_name: file.display().to_string(),
            found,
            expected: expected.to_owned(),
        });
    }
    Ok(Some(found))
}

/// SHA-256 of a file, off the async threads, with progress.
pub(super) async fn hash_file(
    file: PathBuf,
    bytes_total: u64,
    state: watch::Sender<FetchState>,
) -> std::io::Result<String> {
    let hashed = tokio::task::spawn_blocking(move || {
        hash_reader(File::open(file)?, |bytes_done| {
            let progress = FetchProgress {
                bytes_done,
                bytes_total,
                seconds_left: None,
            };
            state.send_replace(FetchState {
                verifying: true,
                progress,
            });
        })
        .map(|hasher| hex::encode(hasher.finalize()))
    });
    hashed.await.map_err(std::io::Error::other)?
}

/// Feeds a reader to a hasher, in chunks.
pub(crate) fn hash_reader(mut reader: impl Read, mut report: impl FnMut(u64)) -> std::io::Result<Sha256> {
    let mut hasher = Sha256::new();
    let mut chunk = vec![0_u8; CHUNK_BYTES];
    let mut done = 0_u64;
    loop {
        let read = reader.read(&mut chunk)?;
        if read == 0 {
            return Ok(hasher);
        }
        hasher.update(chunk.get(..read).unwrap_or_default());
        done += read as u64;
        report(done);
    }
}

fn modified_ns(metadata: &Metadata) -> Option<u128> {
    Some(
        metadata
            .modified()
            .ok()?
            .duration_since(UNIX_EPOCH)
            .ok()?
            .as_nanos(),
    )
}

fn cached(cache: &Path, metadata: &Metadata) -> Option<String> {
    let record: CachedDigest = serde_json::from_slice(&std::fs::read(cache).ok()?).ok()?;
    let same = record.bytes == metadata.len() && Some(record.modified_ns) == modified_ns(metadata);
    same.then_some(record.sha256)
}

fn remember(cache: &Path, metadata: &Metadata, sha256: &str) -> Result<(), FetchModel> {
    let Some(modified_ns) = modified_ns(metadata) else {
        return Ok(());
    };
    let record = CachedDigest {
        bytes: metadata.len(),
        modified_ns,
        sha256: sha256.to_owned(),
    };
    write_atomically(cache, &serde_json::to_vec(&record).unwrap_or_default())
}
