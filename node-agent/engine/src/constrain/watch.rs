//! Ends what a grammar computes for too long. Every answer waits while one grammar is asked, and what strangers send may
//! go on in thousands of ways, which costs their square for each byte: llguidance counts that, and far too generously.
//!
//! ```text
//! guide: since = now ─▶ llguidance ─▶ since = nothing        watch: every 50 ms, while there are guides: cancel who is late
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use llguidance::CancellationHandle;

/// How long a grammar may think about a token. A schema takes below a millisecond, and a busy machine some more.
pub(super) const LONGEST: Duration = Duration::from_millis(500);
/// How often it is looked at.
const EVERY: Duration = Duration::from_millis(50);

/// Looks after all guides of an engine, on a thread that sleeps while there are none.
#[derive(Debug)]
pub(super) struct Watch(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    watched: Mutex<Watched>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Watched {
    stints: Vec<Weak<Stint>>,
    closed: bool,
}

/// What one guide is at.
#[derive(Debug)]
pub(super) struct Stint {
    handle: CancellationHandle,
    made: Instant,
    /// Microseconds after `made` at which the work began that goes on; 0: none does.
    since: AtomicU64,
}

impl Watch {
    /// # Errors
    /// When the thread cannot be made.
    pub(super) fn start() -> Result<Self, String> {
        let shared = Arc::new(Shared::default());
        let watching = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("grammar-watch".to_owned())
            .spawn(move || watching.run())
            .map_err(|error| format!("failed to start the thread that watches grammars: {error}"))?;
        Ok(Self(shared))
    }

    /// Looks after one more, until it is dropped.
    pub(super) fn add(&self, handle: CancellationHandle) -> Arc<Stint> {
        let stint = Arc::new(Stint {
            handle,
            made: Instant::now(),
            since: AtomicU64::new(0),
        });
        let mut watched = self.0.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.stints.push(Arc::downgrade(&stint));
        self.0.changed.notify_one();
        stint
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = self.0.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.closed = true;
        self.0.changed.notify_one();
    }
}

impl Shared {
    fn run(&self) {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        while !watched.closed {
            watched.stints.retain(|stint| stint.strong_count() > 0);
            if watched.stints.is_empty() {
                watched = self.changed.wait(watched).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            for stint in watched.stints.iter().filter_map(Weak::upgrade) {
                stint.end_if_late();
            }
            let waited = self.changed.wait_timeout(watched, EVERY);
            watched = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Stint {
    /// Does work that is ended when it takes too long.
    pub(super) fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        self.since.store(self.now(), Ordering::Relaxed);
        let done = work();
        self.since.store(0, Ordering::Relaxed);
        done
    }

    fn end_if_late(&self) {
        let since = self.since.load(Ordering::Relaxed);
        if since > 0 && self.now() - since > LONGEST.as_micros() as u64 {
            self.handle.cancel();
        }
    }

    fn now(&self) -> u64 {
        self.made.elapsed().as_micros() as u64 + 1
    }
}
