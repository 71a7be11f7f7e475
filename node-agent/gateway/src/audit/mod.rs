//! What happened, without its content: one file of JSON lines a day, only ever appended to.
//!
//! A served request leaves two lines with one `record`: `opened`, which is in the file before anything
//! is served, and `closed`. A request that a rule or a fault turned away leaves one line, `refused`. An
//! `opened` without `closed` tells of a crash in between. Lines hold names, counts and times; never a
//! key, a prompt or an answer.
//!
//! ```text
//! handlers --(bounded channel)--> writer thread --> audit-2026-01-31.jsonl, synced in groups
//! ```
//! Start reading at [`AuditLog::open_record`]; the thread is in [`writer`].

mod writer;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use freehold_rules::govern::request::RequestViolation;
use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::exchange::CLIENT_LEFT;
use crate::metrics::Endpoint;
use writer::{Entry, Writer};

/// Lines that may wait for the writer. Each served request holds one for its end, so this is also the
/// most requests in flight: far more than any machine's workers take.
const BACKLOG: usize = 8192;
/// Longest wait for a line to be in the file before the record counts as failed.
const OPEN_LIMIT: Duration = Duration::from_secs(2);

/// Why a record could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenRecord {
    #[error("failed to write the audit record: {0}")]
    Write(String),
    /// The line may still come into the file; its record then ends as the request does.
    #[error("the audit writer did not answer within {} s", OPEN_LIMIT.as_secs())]
    TooSlow(Option<Record>),
    #[error("the audit writer has stopped")]
    Stopped,
}

/// What is known of a request when it is admitted or turned away.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Request {
    /// The id that the client knows.
    pub(crate) request: String,
    pub(crate) endpoint: Endpoint,
    /// The name that was called, where it is one of the bus.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) deployment: Option<String>,
    /// Name of the key, never the key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key: Option<String>,
    /// Rules that it breaks and that only audit.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) violations: Vec<RequestViolation>,
}

/// How a request ended.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Outcome {
    pub(crate) code: u16,
    /// The error's code, where there was one; `client_left` and `client_stalled` for those.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    /// The worker, or the machine, that answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) served_by: Option<String>,
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) duration_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) first_token_ms: Option<u64>,
    /// Rules that it turned out to break and that only audit.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) violations: Vec<RequestViolation>,
}

#[derive(Serialize)]
struct Line<'a> {
    time: Timestamp,
    event: &'static str,
    record: &'a str,
    node: &'a str,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    about: Option<&'a Request>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    outcome: Option<&'a Outcome>,
    /// Policy that refused and its rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused_by: Option<&'a RequestViolation>,
}

impl Line<'_> {
    fn entry(&self) -> Entry {
        // Strings and numbers: this does not fail.
        let mut bytes = serde_json::to_vec(self).unwrap_or_default();
        bytes.push(b'\n');
        Entry {
            time: self.time,
            bytes,
            written: None,
        }
    }
}

/// The log of one gateway.
#[derive(Debug)]
pub(crate) struct AuditLog {
    node: String,
    writer: Writer,
}

/// A record that is open; [`Record::close`] ends it. One that is dropped instead belongs to a client that
/// left before anything else could be said of it.
#[derive(Debug)]
pub(crate) struct Record {
    id: String,
    node: String,
    /// A place in the channel, kept from the start so that the end is never lost; None once it is told.
    place: Option<mpsc::OwnedPermit<Entry>>,
}

impl Drop for Record {
    fn drop(&mut self) {
        self.end(&Outcome {
            code: CLIENT_LEFT,
            error: Some("client_left".to_owned()),
            ..Outcome::default()
        });
    }
}

impl Record {
    pub(crate) fn close(mut self, outcome: &Outcome) {
        self.end(outcome);
    }

    /// The first line did not come into the file, so there is nothing to end.
    fn forget(mut self) {
        self.place = None;
    }

    fn end(&mut self, outcome: &Outcome) {
        let Some(place) = self.place.take() else {
            return;
        };
        let line = Line {
            time: Timestamp::now(),
            event: "closed",
            record: &self.id,
            node: &self.node,
            about: None,
            outcome: Some(outcome),
            refused_by: None,
        };
        place.send(line.entry());
    }
}

impl AuditLog {
    /// Opens the log in `dir`, which is made where it is missing.
    pub(crate) fn open(dir: PathBuf, node: String) -> io::Result<Self> {
        Ok(Self {
            node,
            writer: Writer::start(dir, BACKLOG)?,
        })
    }

    /// Writes the first line of a request. Returns once the line is in the file.
    ///
    /// Cancel safety: once the line is on its way, a caller that goes away leaves a closed record.
    pub(crate) async fn open_record(&self, about: &Request) -> Result<Record, OpenRecord> {
        let id = new_id();
        let line = Line {
            time: Timestamp::now(),
            event: "opened",
            record: &id,
            node: &self.node,
            about: Some(about),
            outcome: None,
            refused_by: None,
        };
        let mut entry = line.entry();
        let (written, told) = oneshot::channel();
        entry.written = Some(written);
        let deadline = Instant::now() + OPEN_LIMIT;
        let sender = self.writer.sender();
        let handing_over = async {
            let place = sender.clone().reserve_owned().await?;
            let own = sender.reserve().await?;
            own.send(entry);
            Ok::<_, mpsc::error::SendError<()>>(place)
        };
        let place = timeout_at(deadline, handing_over)
            .await
            .map_err(|_| OpenRecord::TooSlow(None))?
            .map_err(|_| OpenRecord::Stopped)?;
        let record = Record {
            id,
            node: self.node.clone(),
            place: Some(place),
        };
        let problem = match timeout_at(deadline, told).await {
            Ok(Ok(Ok(()))) => return Ok(record),
            Ok(Ok(Err(problem))) => OpenRecord::Write(problem),
            Ok(Err(_)) => OpenRecord::Stopped,
            Err(_) => return Err(OpenRecord::TooSlow(Some(record))),
        };
        record.forget();
        Err(problem)
    }

    /// Notes a request that was turned away. Does not wait; false where too many came at once.
    pub(crate) fn note_refused(
        &self,
        about: &Request,
        outcome: &Outcome,
        refused_by: Option<&RequestViolation>,
    ) -> bool {
        let line = Line {
            time: Timestamp::now(),
            event: "refused",
            record: &new_id(),
            node: &self.node,
            about: Some(about),
            outcome: Some(outcome),
            refused_by,
        };
        self.writer.sender().try_send(line.entry()).is_ok()
    }

    /// Keeps files for so many days; `None`: for good.
    pub(crate) fn keep_days(&self, days: Option<u32>) {
        self.writer.keep_days(days);
    }

    /// Waits until everything handed in so far is on the disk.
    pub(crate) async fn flush(&self) {
        let (written, told) = oneshot::channel();
        let entry = Entry {
            time: Timestamp::now(),
            bytes: Vec::new(),
            written: Some(written),
        };
        if self.writer.sender().send(entry).await.is_ok() {
            // An error here was logged where it happened.
            let _ = told.await;
        }
    }
}

/// Names of records sort by time.
fn new_id() -> String {
    Uuid::now_v7().simple().to_string()
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn about(number: usize) -> Request {
        Request {
            request: format!("r{number}"),
            endpoint: Endpoint::chat_completions,
            model: None,
            deployment: None,
            key: None,
            violations: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_client_that_leaves_while_its_record_opens_leaves_a_closed_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = AuditLog::open(folder.path().to_owned(), "here".to_owned()).expect("a log");
        for number in 0..100 {
            let about = about(number);
            // Polled once and dropped: the line is on its way, and nobody waits for it.
            let _ = tokio::task::unconstrained(log.open_record(&about)).now_or_never();
        }
        log.flush().await;
        let mut lines = Vec::new();
        for entry in std::fs::read_dir(folder.path()).expect("the folder") {
            let text = std::fs::read_to_string(entry.expect("an entry").path()).expect("a file");
            lines.extend(
                text.lines()
                    .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON")),
            );
        }
        let records = |event: &str| {
            let mut records: Vec<String> = lines
                .iter()
                .filter(|line| line["event"] == event)
                .map(|line| line["record"].to_string())
                .collect();
            records.sort();
            records
        };
        assert_eq!(records("opened").len(), 100);
        assert_eq!(records("opened"), records("closed"));
        let left = lines.iter().filter(|line| line["event"] == "closed");
        assert!(
            left.clone().all(|line| line["error"] == "client_left"),
            "{lines:?}"
        );
    }
}
