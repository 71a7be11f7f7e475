//! One block of the cache: its numbers, and what queries make of them.

use half::f16;

use super::attention::{BLOCK_TOKENS, QUERIES, SCALE_DIMS, padded};
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
    /// Where the next block's keys and values begin, if they are asked for while this one is worked on: a lone
    /// row waits for memory otherwise.
    pub(super) next: Option<[*const u8; 2]>,
}

/// Queries that share each read of keys and values at most: as many as sums of two vectors each fit the registers, or of
/// one where registers are few.
pub(super) const fn queries_at_once<S: Simd>() -> usize {
    if S::SUMS >= 2 * QUERIES { QUERIES } else { 4 }
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
    /// Adds the block to the results of `N` queries, at most [`queries_at_once`].
    #[inline(always)]
    pub(super) fn queries<S: Simd, const N: usize>(&self, simd: S, queries: &[f32], partials: &mut [f32]) {
        let (dim, padded) = (self.dim, padded(self.dim));
        let numbers = padded + LANES;
        assert!(queries.len() == N * padded && partials.len() == N * numbers);
        assert!(self.keys.len() >= dim * BLOCK_TOKENS && self.values.len() >= BLOCK_TOKENS * padded);
        assert!(self.keys.has_scales(dim) && self.values.has_scales(dim));
        let seen = self.bounds[..N]
            .iter()
            .filter(|(from, to)| from < to)
            .map(|(_, to)| *to)
            .max();
        let Some(seen) = seen else {
            // Before all their windows, or behind all of them.
            return;
        };
        let mut weights = [[0.0_f32; BLOCK_TOKENS]; N];
        if 2 * N <= S::SUMS {
            self.scores::<S, N, 2>(simd, 0, queries, &mut weights);
        } else {
            self.scores::<S, N, 1>(simd, 0, queries, &mut weights);
            self.scores::<S, N, 1>(simd, LANES, queries, &mut weights);
        }
        let factors = self.weigh(simd, &mut weights, partials);
        // Several vectors at once, so that additions do not wait for each other.
        let mut start = 0;
        while start < padded {
            let what = (&weights, &factors, seen, start);
            if padded - start >= 4 * LANES && N * 4 <= S::SUMS {
                self.sum_values::<S, N, 4>(simd, what, partials);
                start += 4 * LANES;
            } else if padded - start >= 2 * LANES && N * 2 <= S::SUMS {
                self.sum_values::<S, N, 2>(simd, what, partials);
                start += 2 * LANES;
            } else {
                self.sum_values::<S, N, 1>(simd, what, partials);
                start += LANES;
            }
        }
    }

    /// Scores of `H` times 16 tokens from `token` on.
    #[inline(always)]
    fn scores<S: Simd, const N: usize, const H: usize>(
        &self,
        simd: S,
        token: usize,
        queries: &[f32],
        scores: &mut [[f32; BLOCK_TOKENS]; N],
    ) {
        let (dim, padded) = (self.dim, padded(self.dim));
        assert!(token + H * LANES <= BLOCK_TOKENS && queries.len() == N * padded);
        assert!(self.keys.len() >= dim * BLOCK_TOKENS && self.keys.has_scales(dim));
        let mut sums = [[simd.splat(0.0); H]; N];
        // Bytes of the next block that are asked for with each dimension, in lines of 64.
        let share = BLOCK_TOKENS * self.keys.width();
        for d in 0..dim {
            if let Some([keys, values]) = self.next
                && token == 0
                && (d * share).is_multiple_of(64)
            {
                for line in (0..share).step_by(64) {
                    simd.prefetch(keys.wrapping_add(d * share + line));
                    simd.prefetch(values.wrapping_add(d * share + line));
                }
            }
            // SAFETY: the assertions above.
            unsafe {
                let mut keys = [simd.splat(0.0); H];
                for (half, keys) in keys.iter_mut().enumerate() {
                    *keys = self
                        .keys
                        .load(simd, d * BLOCK_TOKENS + token + half * LANES, Lie::Keys);
                }
                for query in 0..N {
                    let x = simd.splat(*queries.as_ptr().add(query * padded + d));
                    for half in 0..H {
                        sums[query][half] = simd.fma(x, keys[half], sums[query][half]);
                    }
                }
            }
        }
        for (scores, sums) in scores.iter_mut().zip(sums) {
            for (half, sums) in sums.into_iter().enumerate() {
                // SAFETY: there are places for 32 tokens, these among them.
                unsafe { simd.store(scores.as_mut_ptr().add(token + half * LANES), sums) }
            }
        }
    }

    /// Adds the weighted values of `seen` tokens to `D` vectors of each query's sums, from `start` on, which are
    /// multiplied with the query's factor before.
    #[inline(always)]
    fn sum_values<S: Simd, const N: usize, const D: usize>(
        &self,
        simd: S,
        (weights, factors, seen, start): (&[[f32; BLOCK_TOKENS]; N], &[f32; N], usize, usize),
        partials: &mut [f32],
    ) {
        let padded = padded(self.dim);
        let numbers = padded + LANES;
        assert!(start + D * LANES <= padded && partials.len() == N * numbers && seen <= BLOCK_TOKENS);
        assert!(self.values.len() >= BLOCK_TOKENS * padded && self.values.has_scales(self.dim));
        // SAFETY: the assertions; what is read of `values` below `seen` was written before.
        unsafe {
            let place = partials.as_mut_ptr().add(start);
            let mut sums = [[simd.splat(0.0); D]; N];
            for query in 0..N {
                let factor = simd.splat(factors[query]);
                for d in 0..D {
                    sums[query][d] = simd.mul(simd.load(place.add(query * numbers + d * LANES)), factor);
                }
            }
            for token in 0..seen {
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

    /// Turns scores into weights. Gives what each query's earlier sums have to be multiplied with, so that the largest
    /// score weighs 1.
    ///
    /// One step after the other for all queries, so that none waits for its own step before.
    #[inline(always)]
    fn weigh<S: Simd, const N: usize>(
        &self,
        simd: S,
        scores: &mut [[f32; BLOCK_TOKENS]; N],
        partials: &mut [f32],
    ) -> [f32; N] {
        const { assert!(N <= LANES) }
        let padded = padded(self.dim);
        let numbers = padded + LANES;
        assert!(partials.len() == N * numbers);
        let mut most = [0.0_f32; N];
        // What earlier sums are multiplied with is a power of e.
        let mut exponents = [0.0_f32; LANES];
        for (query, scores) in scores.iter_mut().enumerate() {
            let (from, to) = self.bounds[query];
            if (from, to) != (0, BLOCK_TOKENS) {
                scores[..from].fill(f32::NEG_INFINITY);
                scores[to.max(from)..].fill(f32::NEG_INFINITY);
            }
            let before = partials[query * numbers + padded];
            // SAFETY: there are 32 scores.
            let largest = unsafe {
                let halves = [simd.load(scores.as_ptr()), simd.load(scores.as_ptr().add(LANES))];
                simd.reduce_max(simd.max(halves[0], halves[1]))
            };
            most[query] = before.max(largest);
            exponents[query] = before - most[query];
        }
        let mut powers = [0.0_f32; LANES];
        // SAFETY: both have 16 places.
        unsafe { simd.store(powers.as_mut_ptr(), exp(simd, simd.load(exponents.as_ptr()))) }
        let mut factors = [1.0_f32; N];
        for (query, scores) in scores.iter_mut().enumerate() {
            let (from, to) = self.bounds[query];
            if from >= to {
                scores.fill(0.0);
                continue;
            }
            let partial = &mut partials[query * numbers..(query + 1) * numbers];
            if most[query] > partial[padded] {
                factors[query] = powers[query];
                partial[padded] = most[query];
            }
            let most = simd.splat(most[query]);
            // SAFETY: there are 32 scores.
            unsafe {
                for half in 0..2 {
                    let place = scores.as_mut_ptr().add(half * LANES);
                    simd.store(place, exp(simd, simd.sub(simd.load(place), most)));
                }
                if (from, to) != (0, BLOCK_TOKENS) {
                    scores[..from].fill(0.0);
                    scores[to..].fill(0.0);
                }
                let halves = [simd.load(scores.as_ptr()), simd.load(scores.as_ptr().add(LANES))];
                let sum = simd.reduce_add(simd.add(halves[0], halves[1]));
                partial[padded + 1] = partial[padded + 1] * factors[query] + sum;
            }
        }
        factors
    }
}
