//! One file over HTTP: resumed, hashed while it streams, kept only if it is what was promised.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use freehold_crds::inference_node::FetchProgress;
use futures::StreamExt;
use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, RANGE};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tracing::info;

use super::layout::{Layout, Remote};
use super::verify::hash_reader;
use super::{FetchModel, FetchState, StoreOptions};

/// A server that does not take the connection within this time is not there.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// A transfer without a single byte for this long is broken; it is resumed.
pub(super) const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Free disk is looked at again after this many bytes, for servers that do not tell the size.
const DISK_CHECK_BYTES: u64 = 64 << 20;
/// Progress is told at most this often.
const REPORT_EVERY: Duration = Duration::from_millis(200);

/// Fetches `remote` into the store and gives its digest.
pub(super) async fn download(
    client: &reqwest::Client,
    layout: &Layout,
    options: &StoreOptions,
    remote: &Remote,
    state: &watch::Sender<FetchState>,
) -> Result<String, FetchModel> {
    let partial = layout.partial(remote);
    let mut target = Target::open(&partial).await?;
    let mut request = client.get(remote.url.clone());
    if let Some(token) = &remote.token {
        request = request.bearer_auth(token);
    }
    if target.bytes > 0 {
        request = request.header(RANGE, format!("bytes={}-", target.bytes));
    }
    let broken = |detail: String, bytes_done: u64| FetchModel::Transfer {
        source_name: remote.name(),
        detail,
        bytes_done,
    };
    let response = request
        .send()
        .await
        .map_err(|error| broken(explain(&error), target.bytes))?;
    let status = response.status();
    let bytes_total = match status {
        StatusCode::OK => {
            // The server does not resume, or nothing was here: start anew.
            target.restart(&partial)?;
            response.content_length().unwrap_or(0)
        }
        StatusCode::PARTIAL_CONTENT if range_start(&response) == Some(target.bytes) => {
            response.content_length().map_or(0, |rest| rest + target.bytes)
        }
        StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::PARTIAL_CONTENT => {
            // All bytes may be here already (the agent stopped before the rename), or the file changed.
            // The digest decides; without one the bytes cannot be trusted and go.
            if complete_length(&response) == Some(target.bytes) && remote.expected.is_some() {
                return finish(layout, remote, &partial, target);
            }
            target.restart(&partial)?;
            return Err(broken(
                "the server cannot resume where we stopped; starting anew".to_owned(),
                0,
            ));
        }
        other => return Err(refused(remote, other)),
    };
    check_disk(
        layout.root(),
        options,
        remote,
        bytes_total.saturating_sub(target.bytes),
    )?;

    let started = Instant::now();
    let (start_bytes, mut reported, mut checked) = (target.bytes, None::<Instant>, target.bytes);
    let mut stream = response.bytes_stream();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|error| broken(explain(&error), target.bytes))?;
        if target.bytes - checked >= DISK_CHECK_BYTES {
            checked = target.bytes;
            check_disk(
                layout.root(),
                options,
                remote,
                bytes_total.saturating_sub(target.bytes),
            )?;
        }
        target.write(&partial, &chunk)?;
        if reported.is_none_or(|at| at.elapsed() >= REPORT_EVERY) {
            reported = Some(Instant::now());
            let progress = progress(start_bytes, target.bytes, bytes_total, started.elapsed());
            state.send_replace(FetchState {
                verifying: false,
                progress,
            });
        }
    }
    if bytes_total > 0 && target.bytes < bytes_total {
        return Err(broken(
            format!("the transfer ended after {} of {bytes_total} bytes", target.bytes),
            target.bytes,
        ));
    }
    info!(source = %remote.name(), bytes = target.bytes, seconds = started.elapsed().as_secs_f64(), "Fetched model");
    finish(layout, remote, &partial, target)
}

/// The file so far and the hash of what is in it.
struct Target {
    file: File,
    hasher: Sha256,
    bytes: u64,
}

impl Target {
    /// Opens the partial file and hashes what an earlier try left.
    async fn open(partial: &Path) -> Result<Self, FetchModel> {
        let path = partial.to_owned();
        let opened = tokio::task::spawn_blocking(move || -> std::io::Result<Self> {
            let file = File::options().create(true).read(true).append(true).open(&path)?;
            let bytes = file.metadata()?.len();
            let hasher = hash_reader(&file, |_| ())?;
            Ok(Self { file, hasher, bytes })
        });
        opened
            .await
            .map_err(std::io::Error::other)
            .flatten()
            .map_err(|error| write_error(partial, &error))
    }

    fn restart(&mut self, partial: &Path) -> Result<(), FetchModel> {
        self.file
            .set_len(0)
            .map_err(|error| write_error(partial, &error))?;
        self.hasher = Sha256::new();
        self.bytes = 0;
        Ok(())
    }

    fn write(&mut self, partial: &Path, chunk: &[u8]) -> Result<(), FetchModel> {
        self.file
            .write_all(chunk)
            .map_err(|error| write_error(partial, &error))?;
        self.hasher.update(chunk);
        self.bytes += chunk.len() as u64;
        Ok(())
    }
}

/// Checks the digest and moves the file to its name.
fn finish(layout: &Layout, remote: &Remote, partial: &Path, target: Target) -> Result<String, FetchModel> {
    let found = hex::encode(target.hasher.finalize());
    if let Some(expected) = &remote.expected
        && *expected != found
    {
        std::fs::remove_file(partial).map_err(|error| write_error(partial, &error))?;
        return Err(FetchModel::DigestMismatch {
            source_name: remote.name(),
            found,
            expected: expected.clone(),
        });
    }
    let blob = layout.blob(&found);
    let moved = target
        .file
        .sync_all()
        .and_then(|()| std::fs::rename(partial, &blob));
    moved.map_err(|error| write_error(&blob, &error))?;
    layout.remember(remote, &found)?;
    Ok(found)
}

fn write_error(path: &Path, error: &std::io::Error) -> FetchModel {
    FetchModel::WriteStore {
        path: path.to_owned(),
        detail: error.to_string(),
    }
}

fn check_disk(
    root: &Path,
    options: &StoreOptions,
    remote: &Remote,
    needed_bytes: u64,
) -> Result<(), FetchModel> {
    let Ok(stat) = rustix::fs::statvfs(root) else {
        return Ok(());
    };
    let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
    if needed_bytes.saturating_add(options.reserve_bytes) <= free_bytes {
        return Ok(());
    }
    Err(FetchModel::DiskFull {
        source_name: remote.name(),
        needed_bytes,
        free_bytes,
        reserve_bytes: options.reserve_bytes,
    })
}

fn progress(start_bytes: u64, bytes_done: u64, bytes_total: u64, elapsed: Duration) -> FetchProgress {
    let per_second = (bytes_done - start_bytes) as f64 / elapsed.as_secs_f64().max(1e-3);
    let seconds_left = (bytes_total > bytes_done && per_second > 0.0)
        .then(|| ((bytes_total - bytes_done) as f64 / per_second).ceil() as u64);
    FetchProgress {
        bytes_done,
        bytes_total,
        seconds_left,
    }
}

/// First byte of a `Content-Range: bytes 5-9/10`.
fn range_start(response: &reqwest::Response) -> Option<u64> {
    let text = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    text.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// Length in a `Content-Range: bytes */10`.
fn complete_length(response: &reqwest::Response) -> Option<u64> {
    response
        .headers()
        .get(CONTENT_RANGE)?
        .to_str()
        .ok()?
        .rsplit('/')
        .next()?
        .parse()
        .ok()
}

fn refused(remote: &Remote, status: StatusCode) -> FetchModel {
    let (advice, permanent) = match status.as_u16() {
        401 | 403 => (
            "the file needs a credential that the agent does not have (HF_TOKEN for the hub)",
            true,
        ),
        404 | 410 => ("check the address, the revision and the file name", true),
        429 => ("the server asks for patience; tried again later", false),
        500..=599 => ("the server is in trouble; tried again later", false),
        _ => ("check the address", true),
    };
    FetchModel::Refused {
        source_name: remote.name(),
        status: status.as_u16(),
        advice,
        permanent,
    }
}

/// The innermost cause, which is the one that tells (`connection refused`, `timed out` …). Never the
/// address: its query may hold a secret.
fn explain(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    if error.is_timeout() {
        "timed out".to_owned()
    } else {
        cause.to_string()
    }
}
