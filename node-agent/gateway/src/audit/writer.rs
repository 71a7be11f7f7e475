//! The two threads behind the audit file. One takes what is waiting as one write and answers those who
//! wait for their line; the other then syncs the file, so that a sync is shared and nobody waits for it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp};
use tokio::sync::{mpsc, oneshot};
use tracing::{error, info, warn};

use crate::bus::lock;

/// Most lines in one write.
const GROUP: usize = 512;

/// A line on its way into the file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) time: Timestamp,
    /// The line with its end; empty: only tell when what came before is on the disk.
    pub(super) bytes: Vec<u8>,
    /// Told once the line is in the file.
    pub(super) written: Option<oneshot::Sender<Result<(), String>>>,
}

/// The way to the thread. The thread ends when the last sender is gone.
#[derive(Debug)]
pub(super) struct Writer {
    sender: mpsc::Sender<Entry>,
    /// 0: keep for good.
    keep_days: Arc<AtomicU32>,
}

impl Writer {
    pub(super) fn start(dir: PathBuf, backlog: usize) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let (sender, receiver) = mpsc::channel(backlog);
        let keep_days = Arc::new(AtomicU32::new(0));
        let mut log = DayFile {
            dir,
            open: None,
            keep_days: Arc::clone(&keep_days),
            failing: false,
            syncer: Syncer::start()?,
        };
        std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || log.run(receiver))?;
        Ok(Self { sender, keep_days })
    }

    pub(super) fn sender(&self) -> &mpsc::Sender<Entry> {
        &self.sender
    }

    pub(super) fn keep_days(&self, days: Option<u32>) {
        self.keep_days.store(days.unwrap_or(0), Ordering::Relaxed);
    }
}

/// Syncs the newest file that it was handed, in its own thread.
struct Syncer {
    newest: Arc<Mutex<Option<Arc<File>>>>,
    /// One place: a wake that is still waiting covers what comes after it.
    wake: SyncSender<()>,
    failed: Arc<AtomicBool>,
}

impl Syncer {
    fn start() -> io::Result<Self> {
        let newest: Arc<Mutex<Option<Arc<File>>>> = Arc::default();
        let failed = Arc::new(AtomicBool::new(false));
        let (wake, woken) = sync_channel(1);
        let (files, failing) = (Arc::clone(&newest), Arc::clone(&failed));
        std::thread::Builder::new()
            .name("audit-sync".to_owned())
            .spawn(move || {
                while woken.recv().is_ok() {
                    let file = lock(&files).take();
                    if let Some(Err(error)) = file.map(|file| file.sync_data()) {
                        // What was written since the last sync may be lost in a power cut.
                        error!(%error, "Failed to sync the audit log");
                        failing.store(true, Ordering::Relaxed);
                    }
                }
            })?;
        Ok(Self { newest, wake, failed })
    }

    fn hand_over(&self, file: &Arc<File>) {
        *lock(&self.newest) = Some(Arc::clone(file));
        if let Err(TrySendError::Disconnected(())) = self.wake.try_send(()) {
            self.failed.store(true, Ordering::Relaxed);
        }
    }
}

struct DayFile {
    dir: PathBuf,
    open: Option<(Date, Arc<File>)>,
    keep_days: Arc<AtomicU32>,
    /// Whether the last group failed, so that a fault is logged once and not for each request.
    failing: bool,
    syncer: Syncer,
}

impl DayFile {
    fn run(&mut self, mut receiver: mpsc::Receiver<Entry>) {
        let mut group = Vec::new();
        while receiver.blocking_recv_many(&mut group, GROUP) > 0 {
            let mut result = self.write_group(&group);
            if group.iter().any(|entry| entry.bytes.is_empty()) {
                result = result.and_then(|()| self.sync_now());
            }
            match (&result, self.failing) {
                (Err(error), false) => {
                    error!(%error, dir = %self.dir.display(), "Failed to write the audit log");
                }
                (Ok(()), true) => info!("Wrote the audit log again"),
                _ => {}
            }
            self.failing = result.is_err();
            let answer = result.map_err(|error| error.to_string());
            for entry in group.drain(..) {
                if let Some(written) = entry.written {
                    // The one who asked may have left.
                    let _ = written.send(answer.clone());
                }
            }
            if let Some((_, file)) = &self.open {
                self.syncer.hand_over(file);
            }
        }
    }

    fn write_group(&mut self, group: &[Entry]) -> io::Result<()> {
        let mut bytes = Vec::new();
        let mut day = None;
        for entry in group {
            let entry_day = utc_day(entry.time);
            if day.is_some_and(|day| day != entry_day) {
                self.append(day.unwrap_or(entry_day), &bytes)?;
                bytes.clear();
            }
            day = Some(entry_day);
            bytes.extend_from_slice(&entry.bytes);
        }
        match day {
            Some(day) if !bytes.is_empty() => self.append(day, &bytes),
            _ => Ok(()),
        }
    }

    fn append(&mut self, day: Date, bytes: &[u8]) -> io::Result<()> {
        if self.syncer.failed.swap(false, Ordering::Relaxed) {
            // Opening it anew fails if the disk is gone.
            self.open = None;
        }
        let file = match self.open.take() {
            Some((open_day, file)) if open_day == day => file,
            yesterday => {
                if let Some((_, file)) = yesterday {
                    file.sync_data()?;
                }
                let file = Arc::new(open_day_file(&self.dir, day)?);
                self.remove_old(day);
                file
            }
        };
        // After a failed write the file is opened again, which also mends a line that was cut.
        (&*file).write_all(bytes)?;
        self.open = Some((day, file));
        Ok(())
    }

    fn sync_now(&self) -> io::Result<()> {
        match &self.open {
            Some((_, file)) => file.sync_data(),
            None => Ok(()),
        }
    }

    /// Removes files of days that no policy wants kept. Called once a day.
    fn remove_old(&self, today: Date) {
        let days = self.keep_days.load(Ordering::Relaxed);
        if days == 0 {
            return;
        }
        let Ok(oldest) = today.checked_sub(Span::new().days(i64::from(days))) else {
            return;
        };
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(day) = name.to_str().and_then(day_of_file) else {
                continue;
            };
            if day < oldest {
                match fs::remove_file(entry.path()) {
                    Ok(()) => info!(%day, kept_days = days, "Removed an audit file past its retention"),
                    Err(error) => warn!(%day, %error, "Failed to remove an audit file past its retention"),
                }
            }
        }
    }
}

fn utc_day(time: Timestamp) -> Date {
    time.to_zoned(TimeZone::UTC).date()
}

fn file_name(day: Date) -> String {
    format!("audit-{day}.jsonl")
}

fn day_of_file(name: &str) -> Option<Date> {
    name.strip_prefix("audit-")?.strip_suffix(".jsonl")?.parse().ok()
}

/// Opens a day's file for appending. A last line that a crash cut off is ended, so that it spoils no other.
fn open_day_file(dir: &Path, day: Date) -> io::Result<File> {
    let mut file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(dir.join(file_name(day)))?;
    if file.metadata()?.len() > 0 {
        let mut last = [0];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            file.write_all(b"\n")?;
        }
    } else {
        // The new name is safe only with its folder.
        File::open(dir)?.sync_all()?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn day_file(dir: &Path, keep_days: u32) -> DayFile {
        DayFile {
            dir: dir.to_owned(),
            open: None,
            keep_days: Arc::new(AtomicU32::new(keep_days)),
            failing: false,
            syncer: Syncer::start().expect("a thread"),
        }
    }

    fn entry(time: &str, line: &str) -> Entry {
        Entry {
            time: time.parse().expect("a time"),
            bytes: format!("{line}\n").into_bytes(),
            written: None,
        }
    }

    #[test]
    fn each_day_has_its_file() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut log = day_file(dir.path(), 0);
        let group = [
            entry("2026-01-31T23:59:59Z", "one"),
            entry("2026-02-01T00:00:00Z", "two"),
            entry("2026-02-01T00:00:01Z", "three"),
        ];
        log.write_group(&group).expect("written");
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).expect("a file");
        assert_eq!(read("audit-2026-01-31.jsonl"), "one\n");
        assert_eq!(read("audit-2026-02-01.jsonl"), "two\nthree\n");
    }

    #[test]
    fn a_line_that_a_crash_cut_spoils_no_other() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("audit-2026-01-31.jsonl");
        fs::write(&path, "whole\n{\"cut").expect("written");
        let mut log = day_file(dir.path(), 0);
        log.write_group(&[entry("2026-01-31T10:00:00Z", "next")])
            .expect("written");
        assert_eq!(
            fs::read_to_string(&path).expect("a file"),
            "whole\n{\"cut\nnext\n"
        );
    }

    #[test]
    fn files_past_their_retention_go_and_others_stay() {
        let dir = tempfile::tempdir().expect("a folder");
        for name in [
            "audit-2026-01-01.jsonl",
            "audit-2026-01-30.jsonl",
            "notes.txt",
            "audit-x.jsonl",
        ] {
            fs::write(dir.path().join(name), "kept\n").expect("written");
        }
        let mut log = day_file(dir.path(), 7);
        log.write_group(&[entry("2026-02-01T10:00:00Z", "new")])
            .expect("written");
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .expect("the folder")
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        left.sort();
        assert_eq!(
            left,
            [
                "audit-2026-01-30.jsonl",
                "audit-2026-02-01.jsonl",
                "audit-x.jsonl",
                "notes.txt"
            ]
        );
    }
}
