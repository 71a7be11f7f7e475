//! How fast this machine reads its memory: the roof over decoding one sequence, which reads every weight for
//! every token.

use std::hint::black_box;
use std::io;
use std::thread;
use std::time::Instant;

use memmap2::{MmapMut, MmapOptions};

use super::numbers::rate;

/// Bytes that are read: far more than the caches of the machines that people own hold.
pub const BYTES: usize = 512 << 20;
/// Readings; the best one counts, as nothing makes memory faster than it is.
const READINGS: usize = 8;
/// Words that are added up side by side, so that no sum waits for another.
const SUMS: usize = 32;
/// Bytes of those.
const GROUP: usize = SUMS * size_of::<u64>();

/// Bytes a second that `threads` threads read together, of `bytes` bytes in large pages, as weights lie in.
///
/// # Errors
/// When the system maps no memory.
pub fn measure(threads: usize, bytes: usize) -> io::Result<f64> {
    let memory = filled(bytes)?;
    let part = bytes.div_ceil(threads.max(1)).next_multiple_of(GROUP).max(GROUP);
    let mut best = 0.0_f64;
    for _ in 0..READINGS {
        let started = Instant::now();
        thread::scope(|scope| {
            for part in memory.chunks(part) {
                scope.spawn(move || black_box(sum(part)));
            }
        });
        best = best.max(rate(bytes as f64, started.elapsed().as_secs_f64()));
    }
    Ok(best)
}

/// Memory of which every page is there.
fn filled(bytes: usize) -> io::Result<MmapMut> {
    let mut memory = MmapOptions::new().len(bytes).map_anon()?;
    // A kernel without large pages says no, and smaller ones are read.
    #[cfg(target_os = "linux")]
    let _ = memory.advise(memmap2::Advice::HugePage);
    memory.fill(1);
    Ok(memory)
}

/// The sum of the words of `part`, in whole groups; what is left at its end is not worth a reading.
fn sum(part: &[u8]) -> u64 {
    let mut sums = [0_u64; SUMS];
    let (groups, _) = part.as_chunks::<GROUP>();
    for group in groups {
        let (words, _) = group.as_chunks::<{ size_of::<u64>() }>();
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    sums.iter().fold(0, |all, &one| all.wrapping_add(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_count_of_threads_reads() {
        for threads in [0, 1, 3] {
            assert!(measure(threads, 1 << 16).unwrap() > 0.0);
        }
    }

    #[test]
    fn every_word_is_read() {
        let bytes: Vec<u8> = (0..1024_u64).flat_map(u64::to_ne_bytes).collect();
        assert_eq!(sum(&bytes), 1023 * 1024 / 2);
    }
}
