//! Floats that begin where a line of the processor's cache begins: a vector of 64 bytes that lies across two lines is read
//! and written in two steps.

use std::ops::{Deref, DerefMut};

use super::simd::LANES;

/// Bytes of a line of the cache.
pub(super) const LINE: usize = 64;

/// Asks for a line, for the second-level cache. It need not be there.
#[inline(always)]
pub(super) fn prefetch(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction is part of the architecture; it reads nothing that could fail.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(line.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: asking for a line does nothing else, wherever it lies.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) line, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = line;
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

/// A list of floats that begins with a line.
#[derive(Default)]
pub(super) struct Lines {
    lines: Vec<Line>,
    length: usize,
}

impl Lines {
    /// Makes the list so long. What is new is zero, or what was there when it was as long before.
    pub(super) fn set_length(&mut self, length: usize) {
        let lines = length.div_ceil(LANES);
        if lines > self.lines.len() {
            self.lines.resize(lines, Line([0.0; LANES]));
        }
        self.length = length;
    }
}

impl Deref for Lines {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: lines are floats and nothing else, and there are lines for `length` of them.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.length) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above; they are borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_begin_with_a_line_and_keep_what_they_held() {
        for length in [0, 1, 15, 16, 17, 1000] {
            let mut numbers = Lines::default();
            numbers.set_length(length);
            assert!(numbers.len() == length && numbers.iter().all(|x| *x == 0.0));
            numbers.fill(1.0);
            numbers.set_length(length + 100);
            assert_eq!(numbers.as_ptr().align_offset(64), 0);
            assert!(numbers[..length].iter().all(|x| *x == 1.0));
            // What shares the last line was zero as well.
            assert!(numbers[length..].iter().all(|x| *x == 0.0) && numbers.len() == length + 100);
            numbers.set_length(length);
            assert_eq!(numbers.len(), length);
        }
    }
}
