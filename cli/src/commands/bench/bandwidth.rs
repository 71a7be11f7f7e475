//! How fast this machine reads its memory: the roof over decoding one sequence, which reads every weight for
//! every token.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

use super::numbers::rate;

/// Bytes that are read: far more than the caches of the machines that people own hold.
pub const BYTES: usize = 512 << 20;
/// Readings; the best one counts, as nothing makes memory faster than it is.
const READINGS: usize = 5;

/// Bytes a second that `threads` threads read together, of a buffer of `bytes`.
#[must_use]
pub fn measure(threads: usize, bytes: usize) -> f64 {
    let memory = vec![1_u64; bytes / size_of::<u64>()];
    let part = memory.len().div_ceil(threads.max(1)).max(1);
    let mut best = 0.0_f64;
    for _ in 0..READINGS {
        let started = Instant::now();
        thread::scope(|scope| {
            for part in memory.chunks(part) {
                scope.spawn(move || black_box(part.iter().fold(0_u64, |sum, &word| sum.wrapping_add(word))));
            }
        });
        best = best.max(rate(bytes as f64, started.elapsed().as_secs_f64()));
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_count_of_threads_reads_the_whole_buffer() {
        for threads in [0, 1, 3] {
            assert!(measure(threads, 1 << 16) > 0.0);
        }
    }
}
