//! Threads that compute together: a step of a model is some hundred short jobs, one after the other.
//!
//! The caller's thread works too. The others look for the next job for a moment ([`SPIN`]) and then sleep, so an idle engine
//! costs nothing. Nobody waits for a thread by name: a job is over when all its numbers are worked on, by whoever came, and
//! whoever is late (its core was taken away) finds nothing left. So a contended machine computes at the pace of the cores that
//! it has, not at that of the slowest.
//!
//! Every thread begins with its own share of a job's numbers, all in one row, for what belongs to numbers that follow each
//! other mostly lies together in memory; who is done helps with the others' shares. What a thread must know to begin lies
//! in one place ([`Seat`]), on lines of the cache that nobody else touches before it is done itself: with some hundred jobs in
//! a few milliseconds, each line that goes from core to core counts.

use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::lines::{LINE, prefetch};

/// How long a thread looks for the next job before it sleeps: longer than the pauses inside a step (a few
/// microseconds) and between two steps (sampling, tens), shorter than anybody would see in a bill.
const SPIN: Duration = Duration::from_micros(120);
/// Looks between two readings of the clock.
const LOOKS: u32 = 256;
/// Of work that reads straight ahead a thread takes one of so many parts of what is left of a share, so it asks seldom, and
/// nobody waits long for the last.
const PARTS: u32 = 3;

/// Says what a thread reads first in a later job.
pub(super) type Next<'a> = dyn Fn(usize) -> Fetch + Sync + 'a;

/// Memory that a thread asks for while it waits for the next job: between two products the caller alone is at work for a
/// microsecond or more, and memory would have a rest.
#[derive(Clone, Copy, Default)]
pub(super) struct Fetch {
    /// Addresses, side by side.
    places: [Option<usize>; 2],
    /// Bytes of each that nobody has asked for yet.
    left: usize,
}

impl Fetch {
    /// So many bytes in all.
    pub(super) fn new(places: [Option<usize>; 2], bytes: usize) -> Self {
        let left = bytes / places.iter().flatten().count().max(1);
        Self { places, left }
    }

    /// Asks, until there is something better to do.
    fn ask(&mut self, stop: impl Fn() -> bool) {
        /// Lines between two looks.
        const LINES: usize = 8;
        while self.left > 0 && !stop() {
            for _ in 0..LINES {
                for place in self.places.iter_mut().flatten() {
                    prefetch(std::ptr::without_provenance(*place));
                    *place += LINE;
                }
            }
            self.left = self.left.saturating_sub(LINES * LINE);
        }
    }
}

/// What a job is made of.
#[derive(Clone, Copy)]
struct Job<'a> {
    /// Called with each of its numbers.
    work: &'a (dyn Fn(usize) + Sync),
    /// What each thread reads first in the next job that has much to read.
    next: Option<&'a Next<'a>>,
}

/// What is left of a thread's share of a job, and the job. On lines of its own: threads that count in different shares do not
/// wait for each other.
#[repr(align(128))]
struct Seat {
    /// The first number left in the low half, the number behind the last in the high half. Whoever takes numbers out of it
    /// may use `job` until it has reported them.
    left: AtomicU64,
    /// Changes after `left` with every job, so that its thread comes to help even where it has no share.
    number: AtomicU32,
    /// The fewest numbers that are taken at once.
    grain: AtomicU32,
    /// The most, of work that reads straight ahead from number to number; 0 for other work.
    most: AtomicU32,
    /// Written by the caller alone, before `left`, when no number of the job before is left or at work.
    job: UnsafeCell<Option<Job<'static>>>,
}

// SAFETY: `job` is written while nobody may read it and read while nobody may write it, as it says above: `Inner::publish` and
// `Shared::work` are its only users.
unsafe impl Sync for Seat {}

impl Seat {
    fn new() -> Self {
        Self {
            left: AtomicU64::new(0),
            number: AtomicU32::new(0),
            grain: AtomicU32::new(1),
            most: AtomicU32::new(0),
            job: UnsafeCell::new(None),
        }
    }

    fn word(numbers: &Range<u32>) -> u64 {
        u64::from(numbers.end) << 32 | u64::from(numbers.start)
    }

    /// Numbers that this word says are left.
    fn numbers(word: u64) -> Range<u32> {
        word as u32..(word >> 32) as u32
    }

    /// Whether a job came after the one of this number.
    fn is_after(&self, seen: u32) -> bool {
        self.number.load(Ordering::Relaxed) != seen
    }

    /// Takes some numbers, for its own thread or for a helper. None when none is left.
    fn take(&self, by_helper: bool) -> Option<Range<usize>> {
        let mut word = self.left.load(Ordering::Relaxed);
        loop {
            let Range { start, end } = Self::numbers(word);
            let left = end.checked_sub(start).filter(|left| *left > 0)?;
            // What an older job had for these does no harm: they only say how many.
            let grain = self.grain.load(Ordering::Relaxed);
            let most = self.most.load(Ordering::Relaxed);
            let count = grain.max((left / PARTS).min(most)).min(left);
            // Who reads straight ahead has asked for what follows: helpers take what lies farthest from there.
            let from_back = most > 0 && by_helper;
            let (taken, rest) = if from_back {
                (end - count..end, start..end - count)
            } else {
                (start..start + count, start + count..end)
            };
            // Acquires what `publish` wrote before it filled this seat.
            match self.left.compare_exchange_weak(
                word,
                Self::word(&rest),
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(taken.start as usize..taken.end as usize),
                Err(now) => word = now,
            }
        }
    }

    /// Takes all that is left and says how much it was.
    fn clear(&self) -> usize {
        Self::numbers(self.left.swap(0, Ordering::Relaxed)).len()
    }
}

/// The first number of a thread's share of so many; of the thread behind the last it is their count. The caller, who waits for
/// no news of the job, has no less than others.
pub(super) fn share_start(count: usize, thread: usize, threads: usize) -> usize {
    (count * thread).div_ceil(threads)
}

struct Shared {
    /// One for each thread, the caller's first.
    seats: Box<[Seat]>,
    /// Numbers that the others have worked on and reported, in all jobs.
    done: Count,
    events: Events,
}

/// A count on lines of its own.
#[repr(align(128))]
struct Count(AtomicUsize);

/// What seldom happens, on lines that are seldom written.
#[repr(align(128))]
struct Events {
    panicked: AtomicBool,
    sleeping: AtomicUsize,
    stop: AtomicBool,
}

/// A pool of threads. Clones share it; the last to go ends them.
#[derive(Clone)]
pub(crate) struct Pool {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// One job at a time. What [`Shared::done`] was before it.
    turn: Mutex<usize>,
}

impl Pool {
    /// A pool that computes on `threads` threads, the caller's among them.
    ///
    /// # Errors
    /// When the system starts no thread.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            seats: (0..threads.max(1)).map(|_| Seat::new()).collect(),
            done: Count(AtomicUsize::new(0)),
            events: Events {
                panicked: AtomicBool::new(false),
                sleeping: AtomicUsize::new(0),
                stop: AtomicBool::new(false),
            },
        });
        let threads = (1..threads)
            .map(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("compute-{index}"))
                    .spawn(move || shared.serve(index))
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        Ok(Self {
            inner: Arc::new(Inner {
                shared,
                threads,
                turn: Mutex::new(0),
            }),
        })
    }

    /// Threads that compute, the caller's among them.
    pub(crate) fn threads(&self) -> usize {
        self.inner.threads.len() + 1
    }

    /// Calls `work` with every number below `count`, `grain` at a time on one thread. Returns when all are done.
    ///
    /// # Panics
    /// When `work` panics, or there is so much of it that it would have 2^32 numbers.
    pub(crate) fn run(&self, count: usize, grain: usize, work: &(dyn Fn(usize) + Sync)) {
        self.run_job(count, (grain, 0), Job { work, next: None });
    }

    /// As [`Self::run`], for short work that reads straight ahead from number to number; while much is left a thread takes several
    /// at once, up to `most`: what it has taken waits for it when its core is taken away. `next` says what each thread that took
    /// part, but the caller's, asks of memory when it finds no work any more, until the next job.
    ///
    /// # Panics
    /// As it does, or when `next` panics.
    pub(super) fn run_before(
        &self,
        count: usize,
        most: usize,
        work: &(dyn Fn(usize) + Sync),
        next: Option<&Next<'_>>,
    ) {
        self.run_job(count, (1, most.max(1)), Job { work, next });
    }

    fn run_job(&self, count: usize, (grain, most): (usize, usize), job: Job<'_>) {
        let inner = &*self.inner;
        if inner.threads.is_empty() || count <= grain {
            (0..count).for_each(job.work);
            return;
        }
        assert!(u32::try_from(count).is_ok(), "{count} pieces of work at once");
        let mut reported = inner.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: `finish` waits until all numbers are worked on. Nothing between here and there panics.
        unsafe { inner.publish(count, (grain, most), job) };
        let panicked = inner.finish(count, &mut reported);
        drop(reported);
        assert!(!panicked, "a computing thread panicked");
    }

    /// Calls `work` with each chunk of `items` and its number.
    pub(crate) fn for_each_chunk<T: Send>(
        &self,
        items: &mut [T],
        chunk: usize,
        work: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let (length, start) = (items.len(), SharedMut::new(items));
        self.run(length.div_ceil(chunk), 1, &|index| {
            let begin = index * chunk;
            let count = chunk.min(length - begin);
            // SAFETY: chunks of different numbers do not overlap, each number is handed out once, and
            // `items` is borrowed until `run` returns.
            let part = unsafe { start.slice(begin..begin + count) };
            work(index, part);
        });
    }
}

/// A pointer whose user promises that threads write to different places.
pub(crate) struct SharedMut<T>(*mut T);

impl<T> Clone for SharedMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedMut<T> {}

// SAFETY: it is only an address; whoever reads or writes through it says why that is sound.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(items: &mut [T]) -> Self {
        Self(items.as_mut_ptr())
    }

    /// The place `index` items on.
    ///
    /// # Safety
    /// `index` is inside the items that it was made of, or just behind.
    pub(super) unsafe fn at(self, index: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(index) }
    }

    /// A part of the items.
    ///
    /// # Safety
    /// The items are still borrowed, the range is inside them, and nobody else uses it meanwhile.
    pub(super) unsafe fn slice<'a>(self, range: Range<usize>) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }
}

impl Inner {
    /// Lays a job's shares out, for whoever comes.
    ///
    /// # Safety
    /// The caller has the turn, and calls [`Self::finish`] before what the job borrows ends.
    unsafe fn publish(&self, count: usize, (grain, most): (usize, usize), job: Job<'_>) {
        // SAFETY: it only forgets how long the job's parts are borrowed. They are used by who has taken numbers and not reported
        // them yet, and the caller promises to wait for that.
        let job: Job<'static> = unsafe { std::mem::transmute(job) };
        let shared = &self.shared;
        let threads = shared.seats.len();
        let starts = |thread| share_start(count, thread, threads) as u32;
        // The caller's own is last.
        for (thread, seat) in shared.seats.iter().enumerate().rev() {
            // SAFETY: the job before is finished: all seats are empty, and all that was taken out of them is reported. So nobody
            // reads this, and nobody will before `left` says that there is something to take.
            unsafe { *seat.job.get() = Some(job) };
            seat.grain.store((grain as u32).max(1), Ordering::Relaxed);
            seat.most.store(most.min(count) as u32, Ordering::Relaxed);
            let word = Seat::word(&(starts(thread)..starts(thread + 1)));
            seat.left.store(word, Ordering::Release);
            let number = seat.number.load(Ordering::Relaxed).wrapping_add(1);
            seat.number.store(number, Ordering::Release);
        }
        // Who goes to sleep at this moment may be missed: the others do its share, without its help for all of this job, and the
        // next one wakes it. To be sure would cost every job a wait until the other cores have heard of it.
        if shared.events.sleeping.load(Ordering::Relaxed) > 0 {
            for thread in &self.threads {
                thread.thread().unpark();
            }
        }
    }

    /// Works too, and waits until all numbers are worked on. Says whether somebody panicked. `reported` is what all had reported
    /// before, and then with this job.
    fn finish(&self, count: usize, reported: &mut usize) -> bool {
        let shared = &self.shared;
        let own = shared.work(0, None);
        let expected = reported.wrapping_add(count - own);
        let mut looks = 0_u32;
        while shared.done.0.load(Ordering::Acquire) != expected {
            looks = looks.saturating_add(1);
            if looks > 1 << 14 {
                // The core of one of them is at work for somebody else.
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        *reported = expected;
        let panicked = &shared.events.panicked;
        panicked.load(Ordering::Relaxed) && panicked.swap(false, Ordering::Relaxed)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.events.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// A thread's life.
    fn serve(&self, thread: usize) {
        let seat = &self.seats[thread];
        let mut seen = 0;
        let mut fetch = Fetch::default();
        while self.wait(seat, seen) {
            // What is left is there when the number is.
            seen = seat.number.load(Ordering::Acquire);
            let mut took_part = false;
            for _ in 0..LOOKS {
                let done = self.work(thread, Some(&mut fetch));
                if done > 0 {
                    took_part = true;
                    self.done.0.fetch_add(done, Ordering::Release);
                }
                // Whoever is quick comes before the last share, the caller's, is laid out.
                if self.seats[0].number.load(Ordering::Acquire) != seen.wrapping_sub(1) {
                    break;
                }
                std::hint::spin_loop();
            }
            if !took_part && seat.most.load(Ordering::Relaxed) > 0 {
                // What an older job said of this one is read by others by now.
                fetch = Fetch::default();
            }
            // Goes on after jobs that say nothing of it, such as attention between two products.
            fetch.ask(|| seat.is_after(seen));
        }
    }

    /// Works until nothing is left. Gives how many numbers it has taken: all are worked on, or somebody has panicked. `fetch` becomes
    /// what the job says of it, if it says something.
    fn work(&self, thread: usize, mut fetch: Option<&mut Fetch>) -> usize {
        let taken = Cell::new(0);
        let run = || {
            let (before, from_own_on) = self.seats.split_at(thread);
            // Shares are laid out from the last on.
            for (index, seat) in from_own_on.iter().chain(before.iter().rev()).enumerate() {
                while let Some(numbers) = seat.take(index > 0) {
                    taken.set(taken.get() + numbers.len());
                    // SAFETY: the seat was filled after its job was written, taking from it has acquired that, and nobody writes
                    // there before these numbers are reported.
                    let Some(job) = (unsafe { *seat.job.get() }) else {
                        unreachable!("a seat is filled with a job")
                    };
                    if let (Some(next), Some(fetch)) = (job.next, fetch.take()) {
                        *fetch = next(thread);
                    }
                    numbers.for_each(job.work);
                }
            }
        };
        if let Err(payload) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
            // To drop it could panic again, where nobody would report what is taken.
            std::mem::forget(payload);
            // The others stop soon; the caller passes the panic on.
            self.events.panicked.store(true, Ordering::Relaxed);
            let left: usize = self.seats.iter().map(Seat::clear).sum();
            taken.set(taken.get() + left);
        }
        taken.get()
    }

    /// Waits until a job came after the one of this number. False when the pool ends.
    fn wait(&self, seat: &Seat, seen: u32) -> bool {
        let events = &self.events;
        let mut started = None;
        loop {
            for _ in 0..LOOKS {
                if seat.is_after(seen) {
                    return true;
                }
                std::hint::spin_loop();
            }
            if events.stop.load(Ordering::Relaxed) {
                return false;
            }
            if started.get_or_insert_with(Instant::now).elapsed() <= SPIN {
                continue;
            }
            events.sleeping.fetch_add(1, Ordering::SeqCst);
            if !seat.is_after(seen) && !events.stop.load(Ordering::SeqCst) {
                std::thread::park();
            }
            events.sleeping.fetch_sub(1, Ordering::SeqCst);
            started = None;
        }
    }
}

#[cfg(test)]
mod tests;
