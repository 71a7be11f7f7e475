//! Which program runs models on this machine's GPU, if any can.
//!
//! A program that is built for CUDA needs NVIDIA's libraries to start at all, so it is one of its own
//! (`--gpu-worker`), and the agent and the CPU's workers run everywhere. An agent that was itself built for
//! the GPU needs no other.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tracing::{info, warn};

/// A program whose libraries are there says its version within this time, on a busy disk too.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Between two looks at whether it has.
const POLL: Duration = Duration::from_millis(20);
/// Most of its last words that are repeated.
const WORDS: usize = 300;

/// What this agent can do with a GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GpuSupport {
    /// The program of workers on the GPU.
    pub program: Option<PathBuf>,
    /// Why there is none.
    pub reason: Option<String>,
}

impl GpuSupport {
    /// Finds out, `own` being the program of the CPU's workers. Starts `gpu_worker` once to see whether it
    /// can be.
    #[must_use]
    pub fn find(own: &Path, gpu_worker: Option<&Path>) -> Self {
        if let Some(program) = gpu_worker {
            return match try_to_start(program) {
                Ok(()) => {
                    info!(?program, "Runs models on the GPU with a program of its own");
                    Self::with(program)
                }
                Err(why) => {
                    let reason = format!(
                        "the program of --gpu-worker, {}, does not start: {why}",
                        program.display()
                    );
                    warn!(reason, "No model runs on the GPU");
                    Self::without(reason)
                }
            };
        }
        if cfg!(any(feature = "cuda", feature = "metal")) {
            return Self::with(own);
        }
        Self::without("the agent was built for the CPU only, and no --gpu-worker is set".to_owned())
    }

    fn with(program: &Path) -> Self {
        Self {
            program: Some(program.to_owned()),
            reason: None,
        }
    }

    fn without(reason: String) -> Self {
        Self {
            program: None,
            reason: Some(reason),
        }
    }
}

/// Whether the program's libraries are there: it says its version and ends.
fn try_to_start(program: &Path) -> Result<(), String> {
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let begun = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(_)) => break,
            Ok(None) if begun.elapsed() < START_LIMIT => std::thread::sleep(POLL),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("it said nothing within {} s", START_LIMIT.as_secs()));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words: String = words
        .trim()
        .chars()
        .filter(|c| !c.is_control())
        .take(WORDS)
        .collect();
    Err(if words.is_empty() {
        output.status.to_string()
    } else {
        words
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by a process of its own: a file that this one still had open could not be started.
    fn script(folder: &Path, text: &str) -> PathBuf {
        let path = folder.join("worker");
        let written = Command::new("sh")
            .args([
                "-c",
                "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$2\" && chmod 755 \"$2\"",
                "sh",
                text,
            ])
            .arg(&path)
            .status();
        assert!(written.expect("sh is there").success());
        path
    }

    #[test]
    fn a_program_that_starts_is_used() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = script(folder.path(), "test \"$1\" = --version");
        let found = GpuSupport::find(Path::new("/own"), Some(&path));
        assert_eq!(found.program, Some(path));
    }

    #[test]
    fn a_program_without_its_libraries_is_told_in_its_own_words() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = script(
            folder.path(),
            "echo 'libcublas.so.13: cannot open shared object file' >&2; exit 127",
        );
        let found = GpuSupport::find(Path::new("/own"), Some(&path));
        assert_eq!(found.program, None);
        assert!(found.reason.expect("a reason").contains("libcublas.so.13"));
        let missing = GpuSupport::find(Path::new("/own"), Some(Path::new("/nowhere/worker")));
        assert!(missing.reason.expect("a reason").contains("/nowhere/worker"));
    }

    #[test]
    #[cfg(not(any(feature = "cuda", feature = "metal")))]
    fn a_build_for_the_cpu_says_what_to_set() {
        let found = GpuSupport::find(Path::new("/own"), None);
        assert!(found.reason.expect("a reason").contains("--gpu-worker"));
    }
}
