//! One block of the cache: its numbers, and what queries make of them.

use half::f16;

use super::attention::{BLOCK_TOKENS, QUERIES, SCALE_DIMS, padded, shrink};
use super::simd::{LANES, Simd, exp};

/// Numbers of the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Numbers<'a> {
    F16(&'a [f16]),
    F32(&'a [f32]),
    /// Numbers, and scales `[groups of SCALE_DIMS dimensions, 32 tokens]`.
    Q8(&'a [i8], &'a [f32]),
}

/// How the tokens of a block lie.
#[derive(Clone, Copy)]
pub(super) enum Lie {
    Keys,
    Values { padded: usize },
}

#[inline(always)]
pub(super) fn widen<S: Simd>(simd: S, from: Numbers<'_>, lie: Lie, dim: usize, to: &mut [f32]) {
    assert!(from.len() == to.len() && from.len().is_multiple_of(LANES) && from.has_scales(dim));
    // What keys have beyond their dimensions is not read; of values, less than 16 numbers are.
    let end = match lie {
        Lie::Keys => dim * BLOCK_TOKENS,
        Lie::Values { .. } => from.len(),
    };
    for start in (0..end.min(from.len())).step_by(LANES) {
        // SAFETY: both have 16 numbers from `start` on, whose first dimension is below `dim`: padding is
        // less than 16 numbers long.
        unsafe {
            let x = from.load(simd, start, lie);
            simd.store(to.as_mut_ptr().add(start), x);
        }
    }
}

/// One block of the cache and what each query may see of it.
pub(super) struct Block<'a> {
    pub(super) dim: usize,
    pub(super) keys: Numbers<'a>,
    pub(super) values: Numbers<'a>,
    /// From and to, in tokens of the block.
    pub(super) bounds: [(usize, usize); QUERIES],
    /// Where the next block's keys and values begin: they are asked for while this one is worked on, for a
    /// lone row waits for memory otherwise.
    pub(super) next: [*const u8; 2],
}

impl Numbers<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::F16(x) => x.len(),
            Self::F32(x) => x.len(),
            Self::Q8(x, _) => x.len(),
        }
    }

    pub(super) fn start(&self) -> *const u8 {
        match self {
            Self::F16(x) => x.as_ptr().cast(),
            Self::F32(x) => x.as_ptr().cast(),
            Self::Q8(x, _) => x.as_ptr().cast(),
        }
    }

    /// Bytes of a number.
    fn width(&self) -> usize {
        match self {
            Self::F16(_) => 2,
            Self::F32(_) => 4,
            Self::Q8(..) => 1,
        }
    }

    /// Whether there is a scale for each number.
    fn has_scales(&self, dim: usize) -> bool {
        match self {
            Self::F16(_) | Self::F32(_) => true,
            Self::Q8(_, scales) => scales.len() == dim.div_ceil(SCALE_DIMS) * BLOCK_TOKENS,
        }
    }

    /// # Safety
    /// `index` is a multiple of 16, `index + 16` at most the length; a scale is there for the first dimension
    /// of the 16 numbers.
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, simd: S, index: usize, lie: Lie) -> S::F {
        // SAFETY: the caller's promise; `f16` is a `u16` in memory.
        unsafe {
            match self {
                Self::F16(x) => simd.load_f16(x.as_ptr().add(index).cast()),
                Self::F32(x) => simd.load(x.as_ptr().add(index)),
                Self::Q8(x, scales) => {
                    let scales = scales.as_ptr();
                    let scale = match lie {
                        Lie::Keys => {
                            let group = index / BLOCK_TOKENS / SCALE_DIMS;
                            simd.load(scales.add(group * BLOCK_TOKENS + index % BLOCK_TOKENS))
                        }
                        Lie::Values { padded } => {
                            let (token, group) = (index / padded, index % padded / SCALE_DIMS);
                            simd.splat(*scales.add(group * BLOCK_TOKENS + token))
                        }
                    };
                    simd.mul(simd.load_i8(x.as_ptr().add(index)), scale)
                }
            }
        }
    }
}

impl Block<'_> {
    /// Adds the block to the results of `N` queries.
    #[inline(always)]
    pub(super) fn queries<S: Simd, const N: usize>(&self, simd: S, queries: &[f32], partials: &mut [f32]) {
        let (dim, padded) = (self.dim, padded(self.dim));
        let numbers = padded + LANES;
        assert!(queries.len() == N * padded && partials.len() == N * numbers);
        assert!(self.keys.len() >= dim * BLOCK_TOKENS && self.values.len() >= BLOCK_TOKENS * padded);
        assert!(self.keys.has_scales(dim) && self.values.has_scales(dim));
        let mut scores = [[simd.splat(0.0); 2]; N];
        let line = BLOCK_TOKENS * self.keys.width();
        for d in 0..dim {
            simd.prefetch(self.next[0].wrapping_add(d * line));
            // SAFETY: the assertions above.
            unsafe {
                let keys = [
                    self.keys.load(simd, d * BLOCK_TOKENS, Lie::Keys),
                    self.keys.load(simd, d * BLOCK_TOKENS + LANES, Lie::Keys),
                ];
                for (query, scores) in scores.iter_mut().enumerate() {
                    let x = simd.splat(*queries.as_ptr().add(query * padded + d));
                    scores[0] = simd.fma(x, keys[0], scores[0]);
                    scores[1] = simd.fma(x, keys[1], scores[1]);
                }
            }
        }
        let mut weights = [[0.0_f32; BLOCK_TOKENS]; N];
        let mut seen = 0;
        for (query, (scores, weights)) in scores.iter().zip(&mut weights).enumerate() {
            let (from, to) = self.bounds[query];
            if from >= to {
                continue;
            }
            seen = to.max(seen);
            let partial = &mut partials[query * numbers..(query + 1) * numbers];
            self.weigh(simd, *scores, (from, to), weights, partial);
        }
        let mut start = 0;
        while start < padded {
            // Several vectors at once, so that additions do not wait for each other.
            if padded - start >= 4 * LANES && N * 4 <= S::SUMS {
                self.sum_values::<S, N, 4>(simd, &weights, seen, start, partials);
                start += 4 * LANES;
            } else {
                self.sum_values::<S, N, 1>(simd, &weights, seen, start, partials);
                start += LANES;
            }
        }
    }

    /// Adds the weighted values of `seen` tokens to `D` vectors of each query's sums, from `start` on.
    #[inline(always)]
    fn sum_values<S: Simd, const N: usize, const D: usize>(
        &self,
        simd: S,
        weights: &[[f32; BLOCK_TOKENS]; N],
        seen: usize,
        start: usize,
        partials: &mut [f32],
    ) {
        let padded = padded(self.dim);
        let numbers = padded + LANES;
        assert!(start + D * LANES <= padded && partials.len() == N * numbers && seen <= BLOCK_TOKENS);
        assert!(self.values.len() >= BLOCK_TOKENS * padded);
        // SAFETY: the assertions; what is read of `values` below `seen` was written before.
        unsafe {
            let place = partials.as_mut_ptr().add(start);
            let mut sums = [[simd.splat(0.0); D]; N];
            for query in 0..N {
                for d in 0..D {
                    sums[query][d] = simd.load(place.add(query * numbers + d * LANES));
                }
            }
            for token in 0..seen {
                for line in 0..(D * LANES * self.values.width()).div_ceil(64) {
                    let place = (token * padded + start) * self.values.width() + line * 64;
                    simd.prefetch(self.next[1].wrapping_add(place));
                }
                let mut value = [simd.splat(0.0); D];
                for (d, value) in value.iter_mut().enumerate() {
                    let index = token * padded + start + d * LANES;
                    *value = self.values.load(simd, index, Lie::Values { padded });
                }
                for query in 0..N {
                    let weight = simd.splat(weights[query][token]);
                    for d in 0..D {
                        sums[query][d] = simd.fma(weight, value[d], sums[query][d]);
                    }
                }
            }
            for query in 0..N {
                for d in 0..D {
                    simd.store(place.add(query * numbers + d * LANES), sums[query][d]);
                }
            }
        }
    }

    /// Turns scores into weights, and brings what was summed before to the new largest score.
    #[inline(always)]
    fn weigh<S: Simd>(
        &self,
        simd: S,
        scores: [S::F; 2],
        (from, to): (usize, usize),
        weights: &mut [f32; BLOCK_TOKENS],
        partial: &mut [f32],
    ) {
        let padded = partial.len() - LANES;
        let (low, high) = (weights.as_mut_ptr(), weights.as_mut_ptr().wrapping_add(LANES));
        // SAFETY: `weights` has 32 places; `partial` has `padded` numbers, a multiple of 16, and 16 more.
        unsafe {
            simd.store(low, scores[0]);
            simd.store(high, scores[1]);
            weights[..from].fill(f32::NEG_INFINITY);
            weights[to..].fill(f32::NEG_INFINITY);
            let scores = [simd.load(low), simd.load(high)];
            let before = partial[padded];
            let most = before.max(simd.reduce_max(simd.max(scores[0], scores[1])));
            if most > before && before > f32::NEG_INFINITY {
                let factor = shrink(simd, before, most);
                for start in (0..padded).step_by(LANES) {
                    let place = partial.as_mut_ptr().add(start);
                    simd.store(place, simd.mul(simd.load(place), simd.splat(factor)));
                }
                partial[padded + 1] *= factor;
            }
            partial[padded] = most;
            for (place, scores) in [low, high].into_iter().zip(scores) {
                simd.store(place, exp(simd, simd.sub(scores, simd.splat(most))));
            }
            weights[..from].fill(0.0);
            weights[to..].fill(0.0);
            partial[padded + 1] += simd.reduce_add(simd.add(simd.load(low), simd.load(high)));
        }
    }
}
