//! The threads that compute together.

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

fn seat(numbers: Range<u32>, grain: u32, most: u32) -> Seat {
    let seat = Seat::new();
    seat.left.store(Seat::word(&numbers), Ordering::Relaxed);
    seat.grain.store(grain, Ordering::Relaxed);
    seat.most.store(most, Ordering::Relaxed);
    seat
}

#[test]
fn work_that_reads_ahead_is_taken_in_parts_from_both_ends_and_no_number_twice() {
    let few = seat(10..21, 2, 16);
    assert_eq!(few.take(false), Some(10..13));
    assert_eq!(few.take(true), Some(19..21));
    assert_eq!(few.take(false), Some(13..15));
    assert_eq!(few.take(true), Some(17..19));
    assert_eq!(few.take(false), Some(15..17));
    assert_eq!((few.take(false), few.take(true)), (None, None));
    assert_eq!(seat(10..21, 64, 16).take(true), Some(10..21));
    assert_eq!(seat(5..5, 1, 16).take(false), None);
    // The far end of what a share can be.
    let many = seat(0..u32::MAX, 1, 16);
    assert_eq!(many.take(false), Some(0..16));
    assert_eq!(many.take(true), Some(u32::MAX as usize - 16..u32::MAX as usize));
    assert_eq!(many.clear(), u32::MAX as usize - 32);
    assert_eq!(many.clear(), 0);
}

#[test]
fn other_work_is_taken_in_order_a_grain_at_a_time() {
    let seat = seat(0..100, 3, 0);
    assert_eq!(seat.take(false), Some(0..3));
    assert_eq!(seat.take(true), Some(3..6));
    assert_eq!(seat.take(false), Some(6..9));
}

#[test]
fn shares_are_in_one_row_and_the_callers_is_not_the_smallest() {
    for (count, threads) in [(0, 2), (1, 2), (5, 2), (7, 3), (3, 16), (100, 7)] {
        let starts: Vec<usize> = (0..=threads)
            .map(|thread| share_start(count, thread, threads))
            .collect();
        let sizes: Vec<usize> = starts.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert_eq!((starts[0], starts[threads]), (0, count));
        assert!(
            sizes.iter().all(|&size| size <= sizes[0] && size + 1 >= sizes[0]),
            "{sizes:?}"
        );
    }
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
fn who_helps_is_told_what_to_ask_for() {
    let pool = Pool::new(3).unwrap();
    let told: Vec<AtomicUsize> = (0..3).map(|_| AtomicUsize::new(0)).collect();
    let next = |thread: usize| {
        told[thread].fetch_add(1, Ordering::Relaxed);
        Fetch::new([Some(64 * thread), None], 1 << 12)
    };
    let started = Instant::now();
    while told[1..].iter().any(|count| count.load(Ordering::Relaxed) == 0) {
        let hits = AtomicUsize::new(0);
        let work = |_| {
            hits.fetch_add(1, Ordering::Relaxed);
            std::thread::yield_now();
        };
        pool.run_before(50, 16, &work, Some(&next));
        assert_eq!(hits.load(Ordering::Relaxed), 50);
        assert!(started.elapsed() < Duration::from_secs(60), "{told:?}");
    }
    assert_eq!(told[0].load(Ordering::Relaxed), 0);
    let panics = || {
        let run = || {
            pool.run_before(
                50,
                16,
                &|_| std::thread::yield_now(),
                Some(&|_| panic!("of what comes next")),
            );
        };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err()
    };
    // The caller may be done before anybody comes.
    while !panics() {
        assert!(started.elapsed() < Duration::from_secs(120));
    }
}

/// Jobs of all sizes, one right after the other, whose results and borrows would show a number that is worked on twice or after
/// its job; mostly more threads than cores, so that some are late, and some asleep. One that is lost would be waited for without
/// end.
#[test]
fn jobs_follow_each_other_closely() {
    let cores = std::thread::available_parallelism().map_or(4, usize::from);
    let pool = Pool::new((2 * cores).min(8)).unwrap();
    for round in 0..20_000_usize {
        let (count, chunk) = (
            2 + round * 31 % 97,
            if round % 2 == 0 { 1 + round % 3 } else { 1 },
        );
        let mut sums = vec![round; count];
        let add = |index: usize, sums: &mut [usize]| {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum += index * chunk + i;
            }
        };
        if round % 2 == 0 {
            pool.for_each_chunk(&mut sums, chunk, add);
        } else {
            let all = SharedMut::new(&mut sums);
            // SAFETY: each number has a place by itself.
            let one = |i| add(i, unsafe { all.slice(i..i + 1) });
            pool.run_before(count, 16, &one, Some(&|_| Fetch::default()));
        }
        assert!(
            sums.iter().enumerate().all(|(i, &sum)| sum == round + i),
            "{round}: {sums:?}"
        );
        if round % 2_000 == 0 {
            std::thread::sleep(SPIN * 3);
        }
    }
}

/// One thread is held up inside a number of its share: the others do all the rest meanwhile.
#[test]
fn nobody_waits_for_a_share_whose_thread_is_held_up() {
    let pool = Pool::new(4).unwrap();
    let started = Instant::now();
    for count in [3, 40] {
        let all_but_one = || {
            let (done, alone) = (AtomicUsize::new(0), AtomicBool::new(false));
            pool.run(count, 1, &|_| {
                // Whoever comes first goes last, or gives up: who fell asleep unseen comes to the next job.
                if done.fetch_add(1, Ordering::Relaxed) == 0 {
                    let held = Instant::now();
                    while done.load(Ordering::Relaxed) < count && held.elapsed() < Duration::from_millis(100)
                    {
                        std::thread::yield_now();
                    }
                    alone.store(done.load(Ordering::Relaxed) == count, Ordering::Relaxed);
                }
            });
            alone.into_inner()
        };
        while !all_but_one() {
            assert!(started.elapsed() < Duration::from_secs(60));
        }
    }
}

/// After a panic, whosever it is, all is as before.
#[test]
fn panics_leave_nothing_behind() {
    let pool = Pool::new(3).unwrap();
    for round in 0..300_usize {
        let (count, bad) = (2 + round % 40, round * 7 % 40);
        let job = || {
            let work = |i| assert!(i != bad && i != bad / 2, "number {i}");
            let next = |_| {
                assert!(round % 3 != 0, "of what comes next");
                Fetch::default()
            };
            pool.run_before(count, 16, &work, Some(&next));
        };
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err();
        let in_work = bad / 2 < count;
        assert!(panicked || !in_work);
        // A helper that comes asks what is next; the caller does not.
        assert!(!panicked || in_work || round % 3 == 0);
        let hits: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
        pool.run(count, 1, &|i| {
            hits[i].fetch_add(1, Ordering::Relaxed);
        });
        assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1));
    }
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
fn sleepers_wake() {
    let pool = Pool::new(2).unwrap();
    let started = Instant::now();
    let caller = std::thread::current().id();
    let helped = AtomicBool::new(false);
    while !helped.load(Ordering::Relaxed) {
        std::thread::sleep(SPIN * 20);
        // Long enough for somebody to come.
        pool.run(64, 1, &|_| {
            std::thread::sleep(SPIN);
            if std::thread::current().id() != caller {
                helped.store(true, Ordering::Relaxed);
            }
        });
        assert!(started.elapsed() < Duration::from_secs(60));
    }
}
