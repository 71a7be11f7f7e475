//! Rows of activations in two parts: what is left of a row that is rounded to 8 bits, and the rest, rounded to 8 bits too.
//!
//! Products take the parts for two rows and add what comes of them, so no product knows of it. Together they keep some
//! sixteen bits: the rest is at most half of a step of the first part, and is cut into 127 steps either way itself.

use super::rows::{BLOCK, TINY};
use super::simd::{LANES, Simd};
use super::vector::Norm;
use super::{Compute, Operation};

/// How activations are rounded before they meet quantised weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// To 8 bits in blocks of 32.
    #[default]
    Once,
    /// What that leaves is rounded to 8 bits as well.
    Twice,
}

impl Rounding {
    /// Rows that a row becomes.
    pub(super) const fn parts(self) -> usize {
        match self {
            Self::Once => 1,
            Self::Twice => 2,
        }
    }
}

/// Numbers that a thread splits at once: fewer are done before another thread has heard of them.
const GRAIN_NUMBERS: usize = 8192;

impl Compute {
    /// Writes the two parts of `[rows, columns]` numbers, normalised first where there is a norm, to the beginning of `parts`:
    /// `[rows, 2, columns]`. It grows where there is too little room.
    ///
    /// # Panics
    /// When columns are no multiple of 32, or do not divide the numbers, or the norm has another size.
    pub(super) fn split(&self, x: &[f32], columns: usize, norm: Option<Norm<'_>>, parts: &mut Vec<f32>) {
        assert!(columns > 0 && columns.is_multiple_of(BLOCK) && x.len().is_multiple_of(columns));
        assert!(norm.is_none_or(|norm| norm.weight.len() == columns));
        // Widths come and go: what there was room for is not written again.
        parts.resize(parts.len().max(2 * x.len()), 0.0);
        let chunk = (GRAIN_NUMBERS / columns).max(1) * columns;
        self.pool
            .for_each_chunk(&mut parts[..2 * x.len()], 2 * chunk, |index, parts| {
                let x = &x[index * chunk..][..parts.len() / 2];
                self.dispatch.run(Split {
                    x,
                    columns,
                    norm,
                    parts,
                });
            });
    }
}

/// Some rows.
struct Split<'a> {
    /// `[rows, columns]`.
    x: &'a [f32],
    columns: usize,
    norm: Option<Norm<'a>>,
    /// `[rows, 2, columns]`.
    parts: &'a mut [f32],
}

impl Operation for Split<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let columns = self.columns;
        assert!(columns.is_multiple_of(BLOCK) && self.parts.len() == 2 * self.x.len());
        assert!(self.norm.is_none_or(|norm| norm.weight.len() == columns));
        let rows = self.x.chunks_exact(columns);
        for (x, parts) in rows.zip(self.parts.chunks_exact_mut(2 * columns)) {
            let (first, rest) = parts.split_at_mut(columns);
            let factor = simd.splat(self.norm.map_or(1.0, |norm| norm.factor(simd, x)));
            for start in (0..columns).step_by(BLOCK) {
                // SAFETY: all of these have as many numbers as columns, a multiple of 32.
                unsafe {
                    let [mut a, mut b] = [start, start + LANES].map(|at| simd.load(x.as_ptr().add(at)));
                    if let Some(norm) = self.norm {
                        // In the order in which rows are normalised as they are rounded.
                        let weight = norm.weight.as_ptr().add(start);
                        a = simd.mul(simd.mul(a, factor), simd.load(weight));
                        b = simd.mul(simd.mul(b, factor), simd.load(weight.add(LANES)));
                    }
                    simd.store(first.as_mut_ptr().add(start), a);
                    simd.store(first.as_mut_ptr().add(start + LANES), b);
                    // What the first part will be rounded to, taken from it.
                    let most = simd.reduce_max(simd.max(simd.abs(a), simd.abs(b)));
                    let (inverse, step) = (simd.splat(127.0 / most.max(TINY)), simd.splat(-most / 127.0));
                    for (at, number) in [(start, a), (start + LANES, b)] {
                        let rounded = simd.to_float(simd.round(simd.mul(number, inverse)));
                        simd.store(rest.as_mut_ptr().add(at), simd.fma(rounded, step, number));
                    }
                }
            }
        }
    }
}
