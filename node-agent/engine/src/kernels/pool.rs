//! Threads that compute together: a step of a model is some hundred short jobs, one after the other.
//!
//! The caller's thread works too. The others look for the next job for a moment ([`SPIN`]) and then sleep,
//! so an idle engine costs nothing. A job is never waited for by name: who comes takes part, and whoever
//! is late (its core was taken away) finds the job closed. So a contended machine computes at the pace of
//! the cores that it has, not at that of the slowest.
//!
//! Every thread begins with its own share of a job's numbers, all in one row, for what belongs to numbers
//! that follow each other mostly lies together in memory; who is done helps with the others' shares.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::lines::{LINE, prefetch};

/// How long a thread looks for the next job before it sleeps: longer than the pauses inside a step (a few
/// microseconds) and between two steps (sampling, tens), shorter than anybody would see in a bill.
const SPIN: Duration = Duration::from_micros(120);
/// Looks between two readings of the clock.
const LOOKS: u32 = 256;

/// Participants of the job, in the low bits of the state.
const PARTICIPANTS: u64 = 0xffff;
/// The job takes nobody in any more.
const CLOSED: u64 = 1 << 16;
/// One job later.
const NEXT: u64 = 1 << 17;

/// What a job is made of: a function and the numbers it is called with.
struct Job<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    count: usize,
    grain: usize,
    /// How far each thread's share is done.
    cursors: &'a [Cursor],
    panicked: AtomicBool,
    /// What each thread reads first in the next job that has much to read.
    next: Option<&'a Next<'a>>,
}

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

/// How much of a share is taken: by its own thread from the front, by others from either end. All that is ever taken of a share,
/// overshoot included, must stay below 2^32. On a line of its own: threads that count in different shares do not wait for each other.
#[repr(align(128))]
struct Cursor(AtomicU64);

impl Cursor {
    /// One number from the back.
    const BACK: u64 = 1 << 32;

    /// The next numbers of a share, `grain` or what is left; None when all are taken.
    fn take(&self, share: &Range<usize>, grain: usize, from_back: bool) -> Option<Range<usize>> {
        let step = grain as u64 * if from_back { Self::BACK } else { 1 };
        let taken = self.0.fetch_add(step, Ordering::Relaxed);
        let (front, back) = ((taken % Self::BACK) as usize, (taken / Self::BACK) as usize);
        let left = share.len().checked_sub(front + back).filter(|left| *left > 0)?;
        let count = grain.min(left);
        let start = if from_back {
            share.end - back - count
        } else {
            share.start + front
        };
        Some(start..start + count)
    }
}

/// The first number of a thread's share of so many; of the thread behind the last it is their count.
pub(super) fn share_start(count: usize, thread: usize, threads: usize) -> usize {
    count * thread / threads
}

impl Job<'_> {
    /// Works until nothing is left, and says what the thread may ask for then.
    fn work(&self, thread: usize) -> Option<Fetch> {
        let run = || {
            let threads = self.cursors.len();
            for share in (thread..threads).chain(0..thread) {
                let range =
                    share_start(self.count, share, threads)..share_start(self.count, share + 1, threads);
                let cursor = &self.cursors[share];
                // Who reads straight ahead has asked for what follows: helpers take what lies farthest from there.
                let from_back = share != thread && self.next.is_some();
                while let Some(numbers) = cursor.take(&range, self.grain, from_back) {
                    numbers.for_each(self.work);
                }
            }
            self.next.map(|next| next(thread))
        };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_or_else(|_| {
            // The others stop soon; the caller passes the panic on.
            for cursor in self.cursors {
                cursor.0.store(self.count as u64, Ordering::Relaxed);
            }
            self.panicked.store(true, Ordering::Relaxed);
            None
        })
    }
}

struct Shared {
    /// Number of the job, whether it is closed, and how many take part (the caller not counted).
    state: AtomicU64,
    /// The job, valid while it is open or somebody takes part.
    job: AtomicPtr<()>,
    done: AtomicUsize,
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
    /// One job at a time; these are its shares' places.
    cursors: Mutex<Box<[Cursor]>>,
}

impl Pool {
    /// A pool that computes on `threads` threads, the caller's among them.
    ///
    /// # Errors
    /// When the system starts no thread.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(CLOSED),
            job: AtomicPtr::new(std::ptr::null_mut()),
            done: AtomicUsize::new(0),
            sleeping: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let cursors = (0..threads.max(1)).map(|_| Cursor(AtomicU64::new(0))).collect();
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
                cursors: Mutex::new(cursors),
            }),
        })
    }

    /// Threads that compute, the caller's among them.
    pub(crate) fn threads(&self) -> usize {
        self.inner.threads.len() + 1
    }

    /// Calls `work` with every number below `count`, `grain` at a time on one thread. Returns when all are
    /// done.
    ///
    /// # Panics
    /// When `work` panics.
    pub(crate) fn run(&self, count: usize, grain: usize, work: &(dyn Fn(usize) + Sync)) {
        self.run_before(count, grain, work, None);
    }

    /// As [`Self::run`], for work that reads straight ahead from number to number. `next` says what each thread but the caller's
    /// asks of memory when it finds no work any more, until the next job.
    ///
    /// # Panics
    /// When `work` or `next` panics, or `count` and what threads may take beyond it reach 2^32.
    pub(super) fn run_before(
        &self,
        count: usize,
        grain: usize,
        work: &(dyn Fn(usize) + Sync),
        next: Option<&Next<'_>>,
    ) {
        if self.inner.threads.is_empty() || count <= grain {
            (0..count).for_each(work);
            return;
        }
        assert!(grain.saturating_mul(self.threads() + 1).saturating_add(count) < 1 << 32);
        let cursors = self.inner.cursors.lock().unwrap_or_else(PoisonError::into_inner);
        for cursor in cursors.iter() {
            cursor.0.store(0, Ordering::Relaxed);
        }
        let job = Job {
            work,
            count,
            grain,
            cursors: &cursors,
            panicked: AtomicBool::new(false),
            next,
        };
        self.inner.publish(&job);
        job.work(0);
        self.inner.close();
        assert!(
            !job.panicked.load(Ordering::Relaxed),
            "a computing thread panicked"
        );
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
    fn publish(&self, job: &Job<'_>) {
        let shared = &self.shared;
        shared.done.store(0, Ordering::Relaxed);
        shared
            .job
            .store(std::ptr::from_ref(job).cast_mut().cast(), Ordering::Relaxed);
        let number = (shared.state.load(Ordering::Relaxed) & !(NEXT - 1)).wrapping_add(NEXT);
        // Sequentially consistent with the sleepers: either they see the job or we see them.
        shared.state.store(number, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            for thread in &self.threads {
                thread.thread().unpark();
            }
        }
    }

    /// Lets nobody in any more and waits for those who are inside: the job may be forgotten then.
    fn close(&self) {
        let shared = &self.shared;
        let state = shared.state.fetch_or(CLOSED, Ordering::AcqRel);
        let participants = (state & PARTICIPANTS) as usize;
        let mut looks = 0_u32;
        while shared.done.load(Ordering::Acquire) != participants {
            looks += 1;
            if looks > 1 << 14 {
                // The core of one of them is at work for somebody else.
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// A thread's life.
    fn serve(&self, thread: usize) {
        let mut seen = self.state.load(Ordering::Acquire) & !(NEXT - 1);
        let mut fetch = Fetch::default();
        loop {
            let Some(number) = self.next_job(seen) else { return };
            seen = number;
            if self.enter(number) {
                let job = self.job.load(Ordering::Relaxed).cast::<Job<'static>>();
                // SAFETY: `publish` wrote the pointer before it opened this job, `enter` has read that
                // opening, and `close` waits for everybody who entered before the job's owner goes on.
                let job = unsafe { &*job };
                fetch = job.work(thread).unwrap_or(fetch);
                self.done.fetch_add(1, Ordering::Release);
                // Goes on after jobs that say nothing of it, such as attention between two products.
                fetch.ask(|| self.state.load(Ordering::Relaxed) & !(NEXT - 1) != seen);
            }
        }
    }

    /// Waits for a job after `seen`. None when the pool ends.
    fn next_job(&self, seen: u64) -> Option<u64> {
        let found = || {
            let number = self.state.load(Ordering::Acquire) & !(NEXT - 1);
            (number != seen).then_some(number)
        };
        let started = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if let Some(number) = found() {
                    return Some(number);
                }
                std::hint::spin_loop();
            }
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            if started.elapsed() > SPIN {
                break;
            }
        }
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        let number = loop {
            let number = self.state.load(Ordering::SeqCst) & !(NEXT - 1);
            if number != seen {
                break Some(number);
            }
            if self.stop.load(Ordering::SeqCst) {
                break None;
            }
            std::thread::park();
        };
        self.sleeping.fetch_sub(1, Ordering::SeqCst);
        number
    }

    /// Takes part in job `number`, unless it is over.
    fn enter(&self, number: u64) -> bool {
        let mut state = self.state.load(Ordering::Acquire);
        loop {
            if state & !(NEXT - 1) != number || state & CLOSED != 0 {
                return false;
            }
            match self
                .state
                .compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_worked_on_once_by_any_count_of_threads() {
        for threads in 1..5 {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for round in 0..200 {
                let count = round * 7 % 61;
                let hits: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                pool.run(count, 1 + round % 4, &|i| {
                    hits[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn chunks_are_disjoint_and_all_are_there() {
        let pool = Pool::new(3).unwrap();
        let mut items = vec![0_usize; 1001];
        pool.for_each_chunk(&mut items, 10, |index, chunk| {
            chunk
                .iter_mut()
                .enumerate()
                .for_each(|(i, x)| *x = index * 10 + i);
        });
        assert!(items.iter().enumerate().all(|(i, &x)| i == x));
    }

    #[test]
    fn a_share_is_taken_from_both_ends_and_no_number_twice() {
        let cursor = Cursor(AtomicU64::new(0));
        let share = 10..21;
        let take = |grain, from_back| cursor.take(&share, grain, from_back);
        assert_eq!(take(2, false), Some(10..12));
        assert_eq!(take(3, true), Some(18..21));
        assert_eq!(take(4, false), Some(12..16));
        assert_eq!(take(4, true), Some(16..18));
        assert_eq!((take(1, false), take(1, true), take(9, true)), (None, None, None));
        let cursor = Cursor(AtomicU64::new(0));
        assert_eq!(cursor.take(&share, 64, true), Some(10..21));
        assert_eq!(cursor.take(&(5..5), 1, false), None);
    }

    #[test]
    fn what_is_asked_for_goes_on_where_it_was_left() {
        // Addresses at which nothing is: to ask for them is all that is done.
        let mut fetch = Fetch::new([Some(0), Some(1 << 16)], 4096);
        let looks = std::cell::Cell::new(0);
        fetch.ask(|| {
            looks.set(looks.get() + 1);
            looks.get() == 3
        });
        assert_eq!(
            (fetch.places, fetch.left),
            ([Some(1024), Some((1 << 16) + 1024)], 1024)
        );
        fetch.ask(|| true);
        assert_eq!(fetch.left, 1024);
        fetch.ask(|| false);
        assert_eq!(
            (fetch.places, fetch.left),
            ([Some(2048), Some((1 << 16) + 2048)], 0)
        );
        let mut nothing = Fetch::new([None; 2], 4096);
        nothing.ask(|| false);
        assert_eq!(nothing.places, [None; 2]);
    }

    #[test]
    fn who_helps_is_told_what_to_ask_for_and_the_caller_is_too() {
        let pool = Pool::new(3).unwrap();
        let told: Vec<AtomicUsize> = (0..3).map(|_| AtomicUsize::new(0)).collect();
        let next = |thread: usize| {
            told[thread].fetch_add(1, Ordering::Relaxed);
            Fetch::new([Some(64 * thread), None], 1 << 12)
        };
        let started = Instant::now();
        while told.iter().any(|count| count.load(Ordering::Relaxed) == 0) {
            let hits = AtomicUsize::new(0);
            let work = |_| {
                hits.fetch_add(1, Ordering::Relaxed);
                std::thread::yield_now();
            };
            pool.run_before(50, 1, &work, Some(&next));
            assert_eq!(hits.load(Ordering::Relaxed), 50);
            assert!(started.elapsed() < Duration::from_secs(60), "{told:?}");
        }
        let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run_before(50, 1, &|_| (), Some(&|_| panic!("of what comes next")));
        }));
        assert!(panics.is_err());
    }

    #[test]
    fn many_callers_take_turns() {
        let pool = Pool::new(2).unwrap();
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(16, 1, &|_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 200 * 16);
    }

    #[test]
    fn sleepers_wake_and_a_panic_reaches_the_caller() {
        let pool = Pool::new(2).unwrap();
        std::thread::sleep(SPIN * 20);
        let hits = AtomicUsize::new(0);
        pool.run(64, 1, &|_| {
            hits.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(hits.load(Ordering::Relaxed), 64);
        let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(8, 1, &|i| assert!(i != 5, "number 5"));
        }));
        assert!(panics.is_err());
        pool.run(8, 1, &|_| ());
    }
}
