//! One block of the cache: its numbers, and what queries make of them.

use half::f16;

use super::attention::{BLOCK_TOKENS, QUERIES, SCALE_DIMS, padded};
use super::simd::{LANES, Simd, exp};

/// How far a score may lie above the one that a query's weights refer to, before they refer to it: up to e^8 a weight is
/// as good a float as up to 1, and what was summed up need not be scaled again for every new largest score.
const RISE: f32 = 8.0;

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
    let to = &mut to[..end.min(from.len())];
    // What numbers they are is asked here, not for each vector.
    match from {
        // SAFETY: both have these numbers, and scales for them; padding is less than 16 numbers long.
        Numbers::F16(x) => unsafe { widen_each(simd, Numbers::F16(x), lie, to) },
        Numbers::F32(x) => to.copy_from_slice(&x[..to.len()]),
        // SAFETY: as above.
        Numbers::Q8(x, scales) => unsafe { widen_each(simd, Numbers::Q8(x, scales), lie, to) },
    }
}

/// # Safety
/// `to` has a multiple of 16 numbers, `from` as many at least, and a scale for the first of every 16.
#[inline(always)]
unsafe fn widen_each<S: Simd>(simd: S, from: Numbers<'_>, lie: Lie, to: &mut [f32]) {
    for start in (0..to.len()).step_by(LANES) {
        // SAFETY: the caller's promise.
        unsafe {
            let x = from.load(simd, start, lie);
            simd.store(to.as_mut_ptr().add(start), x);
        }
    }
}

/// Numbers that are kept of a query while blocks are added to it: its sums of values, its sums of weights by lanes, the score
/// that weights refer to.
pub(super) fn partial_numbers(dim: usize) -> usize {
    padded(dim) + 2 * LANES
}

/// Scores of some queries, then their weights.
#[repr(align(64))]
struct Weights<const N: usize>([[f32; BLOCK_TOKENS]; N]);

/// Where the keys and values of a block lie that are read after another.
#[derive(Clone, Copy)]
pub(super) struct Next {
    pub(super) keys: *const u8,
    pub(super) values: *const u8,
    /// Bytes of a number.
    pub(super) width: usize,
}

impl Next {
    pub(super) fn of((keys, values): (Numbers<'_>, Numbers<'_>)) -> Self {
        Self {
            keys: keys.start(),
            values: values.start(),
            width: keys.width(),
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
    /// What is asked for while this one is worked on: few rows wait for memory otherwise.
    pub(super) next: Option<Next>,
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

    fn start(&self) -> *const u8 {
        match self {
            Self::F16(x) => x.as_ptr().cast(),
            Self::F32(x) => x.as_ptr().cast(),
            Self::Q8(x, _) => x.as_ptr().cast(),
        }
    }

    /// Bytes of a number.
    pub(super) fn width(&self) -> usize {
        match self {
            Self::F16(_) => 2,
            Self::F32(_) => 4,
            Self::Q8(..) => 1,
        }
    }

    /// Whether there is a scale for each number.
    pub(super) fn has_scales(&self, dim: usize) -> bool {
        match self {
            Self::F16(_) | Self::F32(_) => true,
            Self::Q8(_, scales) => scales.len() == dim.div_ceil(SCALE_DIMS) * BLOCK_TOKENS,
        }
    }

    /// # Safety
    /// `index` is a multiple of 16, `index + 16` at most the length; a scale is there for the first dimension
    /// of the 16 numbers.
    #[inline(always)]
    pub(super) unsafe fn load<S: Simd>(&self, simd: S, index: usize, lie: Lie) -> S::F {
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
        let numbers = partial_numbers(self.dim);
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
        let mut weights = Weights([[0.0; BLOCK_TOKENS]; N]);
        let Weights(weights) = &mut weights;
        if 2 * N <= S::SUMS {
            self.scores::<S, N, 2>(simd, 0, queries, weights);
        } else {
            self.scores::<S, N, 1>(simd, 0, queries, weights);
            self.scores::<S, N, 1>(simd, LANES, queries, weights);
        }
        let factors = self.weigh(simd, weights, partials);
        // Several vectors at once, so that additions do not wait for each other.
        let mut start = 0;
        while start < padded {
            let what = (&*weights, &factors, seen, start);
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
        let share = self.next.map_or(0, |next| BLOCK_TOKENS * next.width);
        for d in 0..dim {
            if let Some(next) = self.next
                && token == 0
                && (d * share).is_multiple_of(64)
            {
                for line in (0..share).step_by(64) {
                    simd.prefetch(next.keys.wrapping_add(d * share + line));
                    simd.prefetch(next.values.wrapping_add(d * share + line));
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
        let numbers = partial_numbers(self.dim);
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

    /// Turns scores into weights, and adds them to the sums of weights. Gives what each query's earlier sums of values have to
    /// be multiplied with.
    ///
    /// One step after the other for all queries, so that none waits for its own step before.
    #[inline(always)]
    fn weigh<S: Simd, const N: usize>(
        &self,
        simd: S,
        scores: &mut [[f32; BLOCK_TOKENS]; N],
        partials: &mut [f32],
    ) -> [f32; N] {
        let (sums, reference) = (padded(self.dim), padded(self.dim) + LANES);
        let numbers = partial_numbers(self.dim);
        assert!(partials.len() == N * numbers);
        let mut rises = false;
        for (query, scores) in scores.iter_mut().enumerate() {
            let (from, to) = self.bounds[query];
            if (from, to) != (0, BLOCK_TOKENS) {
                scores[..from].fill(f32::NEG_INFINITY);
                scores[to.max(from)..].fill(f32::NEG_INFINITY);
            }
            let limit = simd.splat(partials[query * numbers + reference] + RISE);
            rises |= simd.any_above(largest(simd, scores), limit);
        }
        let factors = if rises {
            self.raise(simd, scores, partials)
        } else {
            [1.0; N]
        };
        for (query, scores) in scores.iter_mut().enumerate() {
            let (from, to) = self.bounds[query];
            if from >= to {
                scores.fill(0.0);
                continue;
            }
            let partial = &mut partials[query * numbers..(query + 1) * numbers];
            let reference = simd.splat(partial[reference]);
            // SAFETY: there are 32 scores, 16 sums of weights, and 32 ones or zeros from either place on.
            unsafe {
                let mut weights = [simd.splat(0.0); 2];
                for (half, weights) in weights.iter_mut().enumerate() {
                    let place = scores.as_mut_ptr().add(half * LANES);
                    *weights = exp(simd, simd.sub(simd.load(place), reference));
                    if (from, to) != (0, BLOCK_TOKENS) {
                        let seen = SEEN.as_ptr().add(half * LANES);
                        *weights = simd.mul(*weights, simd.load(seen.add(BLOCK_TOKENS - from)));
                        *weights = simd.mul(*weights, simd.load(seen.add(2 * BLOCK_TOKENS - to)));
                    }
                    simd.store(place, *weights);
                }
                let place = partial.as_mut_ptr().add(sums);
                let earlier = simd.mul(simd.load(place), simd.splat(factors[query]));
                simd.store(place, simd.add(earlier, simd.add(weights[0], weights[1])));
            }
        }
        factors
    }

    /// Lets weights refer to the block's largest score, of those queries for which it lies too far above the one before.
    /// Gives what each query's earlier sums have to be multiplied with.
    #[inline(always)]
    fn raise<S: Simd, const N: usize>(
        &self,
        simd: S,
        scores: &[[f32; BLOCK_TOKENS]; N],
        partials: &mut [f32],
    ) -> [f32; N] {
        const { assert!(N <= LANES) }
        let numbers = partial_numbers(self.dim);
        let reference = padded(self.dim) + LANES;
        // What earlier sums are multiplied with is a power of e: 1, to the bit, for queries that stay where they are, so that
        // none notices when another rises.
        let mut exponents = [0.0_f32; LANES];
        for (query, scores) in scores.iter().enumerate() {
            let most = simd.reduce_max(largest(simd, scores));
            let before = &mut partials[query * numbers + reference];
            if most > *before + RISE {
                exponents[query] = *before - most;
                *before = most;
            }
        }
        let mut powers = [0.0_f32; LANES];
        // SAFETY: both have 16 places.
        unsafe { simd.store(powers.as_mut_ptr(), exp(simd, simd.load(exponents.as_ptr()))) }
        std::array::from_fn(|query| powers[query])
    }
}

/// The larger of the first and the last 16 scores.
#[inline(always)]
fn largest<S: Simd>(simd: S, scores: &[f32; BLOCK_TOKENS]) -> S::F {
    // SAFETY: there are 32 scores.
    unsafe { simd.max(simd.load(scores.as_ptr()), simd.load(scores.as_ptr().add(LANES))) }
}

/// From `32 - from` on, zeros up to `from` and ones behind; from `64 - to` on, ones up to `to` and zeros behind.
static SEEN: [f32; 3 * BLOCK_TOKENS] = {
    let mut seen = [0.0; 3 * BLOCK_TOKENS];
    let mut token = BLOCK_TOKENS;
    while token < 2 * BLOCK_TOKENS {
        seen[token] = 1.0;
        token += 1;
    }
    seen
};
