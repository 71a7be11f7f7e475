//! One worker as a child process: started, listened to, ended. It never outlives its agent: its stdin is
//! a pipe that closes with the agent, however that ends.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use freehold_gateway::worker::WorkerLine;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::worker::EXIT_PERMANENT;

use super::{Exit, Message, News};

/// After its stdin is closed a worker has this long to end by itself.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// Longest line that is read from a worker; the rest of a longer one is dropped.
const LINE_LIMIT: usize = 64 << 10;
/// What a worker sees of the agent's environment: nothing that names a secret.
const ENVIRONMENT: &[&str] = &[
    "PATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "RUST_LOG",
    "RUST_BACKTRACE",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
];

/// How to start a worker.
#[derive(Clone, Debug)]
pub(super) struct Launch {
    pub(super) assignment: String,
    pub(super) epoch: u64,
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<OsString>,
    pub(super) environment: Option<(OsString, OsString)>,
    pub(super) socket: PathBuf,
}

/// A worker that runs. Dropping it kills the process.
#[derive(Debug)]
pub(super) struct WorkerProcess {
    pub(super) epoch: u64,
    pub(super) socket: PathBuf,
    stop: CancellationToken,
    kill: CancellationToken,
    _task: tokio_util::task::AbortOnDropHandle<()>,
}

impl WorkerProcess {
    /// Starts one. Whatever happens, an [`News::Exited`] comes in the end.
    pub(super) fn start(launch: Launch, messages: mpsc::Sender<Message>) -> Self {
        let (stop, kill) = (CancellationToken::new(), CancellationToken::new());
        let (epoch, socket) = (launch.epoch, launch.socket.clone());
        let task = tokio::spawn(tend(launch, messages, stop.clone(), kill.clone()));
        Self {
            epoch,
            socket,
            stop,
            kill,
            _task: tokio_util::task::AbortOnDropHandle::new(task),
        }
    }

    /// Asks it to end.
    pub(super) fn stop(&self) {
        self.stop.cancel();
    }

    /// Ends it.
    pub(super) fn kill(&self) {
        self.kill.cancel();
    }
}

async fn tend(
    launch: Launch,
    messages: mpsc::Sender<Message>,
    stop: CancellationToken,
    kill: CancellationToken,
) {
    remove_socket(&launch.socket);
    let exit = match spawn(&launch) {
        Ok(child) => {
            info!(assignment = %launch.assignment, pid = child.id(), "Started worker");
            watch(&launch, child, &messages, &stop, &kill).await
        }
        Err(error) => Exit {
            how: format!("failed to start {:?}: {error}", launch.program),
            permanent: false,
        },
    };
    remove_socket(&launch.socket);
    info!(assignment = %launch.assignment, how = %exit.how, "Worker ended");
    let news = News::Exited(exit);
    // The supervisor is gone only when the agent is.
    let _ = messages
        .send(Message::Worker {
            assignment: launch.assignment,
            epoch: launch.epoch,
            news,
        })
        .await;
}

fn spawn(launch: &Launch) -> std::io::Result<Child> {
    let kept = ENVIRONMENT
        .iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)));
    Command::new(&launch.program)
        .args(&launch.arguments)
        .env_clear()
        .envs(kept)
        .envs(launch.environment.clone())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Ctrl-C in a terminal reaches the agent alone, which lets requests finish first.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

async fn watch(
    launch: &Launch,
    mut child: Child,
    messages: &mpsc::Sender<Message>,
    stop: &CancellationToken,
    kill: &CancellationToken,
) -> Exit {
    let mut stdin: Option<ChildStdin> = child.stdin.take();
    if let Some(stderr) = child.stderr.take() {
        tokio::spawn(pass_on_log(launch.assignment.clone(), BufReader::new(stderr)));
    }
    let listener = child.stdout.take().map(|stdout| {
        tokio::spawn(listen(
            launch.assignment.clone(),
            launch.epoch,
            BufReader::new(stdout),
            messages.clone(),
        ))
    });
    let mut kill_at = None;
    let status = loop {
        let deadline = kill_at.unwrap_or_else(tokio::time::Instant::now);
        // `wait` is cancel safe (it only polls the process), the others only look at a level.
        tokio::select! {
            status = child.wait() => break status,
            () = stop.cancelled(), if stdin.is_some() => {
                stdin = None;
                kill_at = Some(tokio::time::Instant::now() + STOP_LIMIT);
            }
            () = kill.cancelled(), if stdin.is_some() || kill_at.is_some() => {
                stdin = None;
                kill_at = None;
                let _ = child.start_kill();
            }
            () = tokio::time::sleep_until(deadline), if kill_at.is_some() => {
                warn!(assignment = %launch.assignment, "Worker did not end when asked; killing it");
                kill_at = None;
                let _ = child.start_kill();
            }
        }
    };
    // What it said before it ended comes before the news of its end.
    if let Some(listener) = listener {
        let _ = tokio::time::timeout(STOP_LIMIT, listener).await;
    }
    match status {
        Ok(status) => Exit {
            how: describe(status),
            permanent: status.code() == Some(i32::from(EXIT_PERMANENT)),
        },
        Err(error) => Exit {
            how: format!("lost sight of it: {error}"),
            permanent: false,
        },
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(9)) => "killed by signal 9, as the kernel does when memory runs out".to_owned(),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

fn remove_socket(socket: &Path) {
    let _ = std::fs::remove_file(socket);
}

async fn listen(
    assignment: String,
    epoch: u64,
    mut reader: impl AsyncBufRead + Unpin,
    messages: mpsc::Sender<Message>,
) {
    while let Some(line) = next_line(&mut reader).await {
        let Ok(line) = serde_json::from_slice::<WorkerLine>(&line) else {
            debug!(%assignment, bytes = line.len(), "Worker said something that is not its protocol");
            continue;
        };
        let news = News::Line(Box::new(line));
        if messages
            .send(Message::Worker {
                assignment: assignment.clone(),
                epoch,
                news,
            })
            .await
            .is_err()
        {
            return;
        }
    }
}

/// Workers log to stderr; they never log content.
async fn pass_on_log(assignment: String, mut reader: impl AsyncBufRead + Unpin) {
    while let Some(line) = next_line(&mut reader).await {
        info!(target: "freehold_worker", %assignment, "{}", String::from_utf8_lossy(&line));
    }
}

/// The next line without its end, cut at [`LINE_LIMIT`]; None at the end.
async fn next_line(reader: &mut (impl AsyncBufRead + Unpin)) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        let chunk = reader.fill_buf().await.ok()?;
        if chunk.is_empty() {
            return (!line.is_empty()).then_some(line);
        }
        let end = chunk.iter().position(|&byte| byte == b'\n');
        let part = chunk.get(..end.unwrap_or(chunk.len())).unwrap_or_default();
        let room = LINE_LIMIT.saturating_sub(line.len()).min(part.len());
        line.extend_from_slice(part.get(..room).unwrap_or_default());
        let used = end.map_or(chunk.len(), |end| end + 1);
        reader.consume(used);
        if end.is_some() {
            return Some(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_cut_at_their_limit() {
        let text = [vec![b'x'; LINE_LIMIT * 3], b"\nshort\nlast".to_vec()].concat();
        let mut reader = BufReader::new(text.as_slice());
        assert_eq!(
            next_line(&mut reader).await.map(|line| line.len()),
            Some(LINE_LIMIT)
        );
        assert_eq!(next_line(&mut reader).await.as_deref(), Some(b"short".as_slice()));
        assert_eq!(next_line(&mut reader).await.as_deref(), Some(b"last".as_slice()));
        assert_eq!(next_line(&mut reader).await, None);
    }
}
