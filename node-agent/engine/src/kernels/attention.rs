//! Softmax(q k) v for a ragged batch, over a cache of blocks of 32 tokens.
//!
//! A piece of work is (some rows of one sequence, one KV head, one stretch of the context). Each block of
//! the cache is read once for all its rows and query heads. Stretches begin at fixed positions and are
//! joined in their order, so that a row's result depends on nothing but its own past: not on how many rows
//! came with it, nor on how many threads there are. Source: Dao et al. 2022; Milakov & Gimelshein 2018.
//!
//! In a block, keys lie transposed, `[head_dim, 32]`: 32 scores come out of as many additions as there are
//! dimensions, and nothing is summed across lanes. Values lie `[32, padded head_dim]`.

use half::f16;

use super::pool::SharedMut;
use super::simd::{LANES, Simd, exp};
use super::{Compute, Operation};

/// Tokens in a block of the cache.
pub(crate) const BLOCK_TOKENS: usize = 32;
/// Dimensions that share a scale in a cache of 8-bit integers.
pub(crate) const SCALE_DIMS: usize = 32;
/// Tokens of a stretch: what one thread reads of a long context before another can help.
const STRETCH_TOKENS: usize = 512;
/// Rows of one sequence in a piece of work.
const ROWS_PER_PIECE: usize = 16;
/// Queries that share each read of keys and values.
const QUERIES: usize = 4;

/// A head's dimensions as they lie in memory.
pub(crate) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

/// The cache as attention reads it.
pub(crate) trait Cache: Sync {
    /// Keys `[head_dim, 32]` and values `[32, padded head_dim]` of a head in a block of a sequence.
    fn block(&self, sequence: usize, block: usize, kv_head: usize) -> (Numbers<'_>, Numbers<'_>);
}

/// Numbers of the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Numbers<'a> {
    F16(&'a [f16]),
    F32(&'a [f32]),
    /// Numbers, and scales `[groups of SCALE_DIMS dimensions, 32 tokens]`.
    Q8(&'a [i8], &'a [f32]),
}

/// Shape of one attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
    /// Tokens that a row sees, itself included.
    pub(crate) window: Option<usize>,
}

/// Rows that belong to one sequence and follow each other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) sequence: usize,
    /// First row in the batch.
    pub(crate) first_row: usize,
    pub(crate) rows: usize,
    /// Position of the first row.
    pub(crate) position: usize,
}

#[derive(Clone, Copy)]
struct Piece {
    run: Run,
    kv_head: usize,
    /// First and last stretch.
    stretches: (usize, usize),
    /// Where its results begin among those of pieces that are joined later, in queries.
    partial: Option<usize>,
}

impl Attention {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn first_position(&self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Stretches that these rows see.
    fn stretches(&self, run: &Run) -> (usize, usize) {
        (
            self.first_position(run.position) / STRETCH_TOKENS,
            (run.position + run.rows - 1) / STRETCH_TOKENS,
        )
    }

    /// Numbers that are kept of a query and a stretch: the sums of values, the largest score, the sum of
    /// weights.
    fn partial_numbers(&self) -> usize {
        padded(self.head_dim) + LANES
    }
}

impl Compute {
    /// `queries` and `out` are `[rows, heads, head_dim]`; keys and values of all rows are in the cache.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub(crate) fn attend(
        &self,
        attention: &Attention,
        cache: &dyn Cache,
        runs: &[Run],
        queries: &[f32],
        out: &mut [f32],
    ) {
        assert_eq!(queries.len(), out.len());
        let width = attention.heads * attention.head_dim;
        let (group, numbers) = (attention.group(), attention.partial_numbers());
        let mut pieces = Vec::new();
        let mut partials = 0;
        for run in runs {
            assert!((run.first_row + run.rows) * width <= out.len());
            for start in (0..run.rows).step_by(ROWS_PER_PIECE) {
                let part = Run {
                    first_row: run.first_row + start,
                    rows: ROWS_PER_PIECE.min(run.rows - start),
                    position: run.position + start,
                    ..*run
                };
                let (first, last) = attention.stretches(&part);
                for kv_head in 0..attention.kv_heads {
                    // Many rows keep all threads busy; a single one is cut along the context.
                    if part.rows > 1 || first == last {
                        pieces.push(Piece {
                            run: part,
                            kv_head,
                            stretches: (first, last),
                            partial: None,
                        });
                        continue;
                    }
                    for stretch in first..=last {
                        pieces.push(Piece {
                            run: part,
                            kv_head,
                            stretches: (stretch, stretch),
                            partial: Some(partials),
                        });
                        partials += group;
                    }
                }
            }
        }
        let mut partial = vec![0.0_f32; partials * numbers];
        let (partial_out, shared_out) = (SharedMut::new(&mut partial), SharedMut::new(out));
        self.pool.run(pieces.len(), 1, &|index| {
            self.dispatch.run(Stretch {
                attention,
                cache,
                queries,
                piece: pieces[index],
                out: shared_out,
                partials: partial_out,
            });
        });
        let mut index = 0;
        while let Some(piece) = pieces.get(index) {
            let Some(first) = piece.partial else {
                index += 1;
                continue;
            };
            let (begin, end) = attention.stretches(&piece.run);
            let count = end - begin + 1;
            let mut total = partial[first * numbers..(first + group) * numbers].to_vec();
            for stretch in 1..count {
                let start = (first + stretch * group) * numbers;
                self.dispatch.run(Join {
                    total: &mut total,
                    next: &partial[start..start + group * numbers],
                    numbers,
                });
            }
            for (query, total) in total.chunks_exact(numbers).enumerate() {
                let head = piece.kv_head * group + query;
                let start = piece.run.first_row * width + head * attention.head_dim;
                finish(total, &mut out[start..start + attention.head_dim]);
            }
            index += count;
        }
    }
}

/// The sums of values over the sum of weights.
fn finish(total: &[f32], out: &mut [f32]) {
    let padded = total.len() - LANES;
    let inverse = 1.0 / total[padded + 1];
    for (out, x) in out.iter_mut().zip(total) {
        *out = x * inverse;
    }
}

/// Joins partial results of the same queries: the later stretch to the earlier ones.
struct Join<'a> {
    total: &'a mut [f32],
    next: &'a [f32],
    numbers: usize,
}

impl Operation for Join<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let padded = self.numbers - LANES;
        let pairs = self
            .total
            .chunks_exact_mut(self.numbers)
            .zip(self.next.chunks_exact(self.numbers));
        for (total, next) in pairs {
            // A stretch of which the window shows nothing.
            if next[padded + 1] == 0.0 {
                continue;
            }
            if total[padded + 1] == 0.0 {
                total.copy_from_slice(next);
                continue;
            }
            let most = total[padded].max(next[padded]);
            let (a, b) = (
                shrink(simd, total[padded], most),
                shrink(simd, next[padded], most),
            );
            for start in (0..padded).step_by(LANES) {
                // SAFETY: both hold `padded` numbers, a multiple of 16, and 16 more.
                unsafe {
                    let place = total.as_mut_ptr().add(start);
                    let sum = simd.mul(simd.load(place), simd.splat(a));
                    let sum = simd.fma(simd.load(next.as_ptr().add(start)), simd.splat(b), sum);
                    simd.store(place, sum);
                }
            }
            total[padded + 1] = total[padded + 1] * a + next[padded + 1] * b;
            total[padded] = most;
        }
    }
}

/// e^(from - to).
#[inline(always)]
fn shrink<S: Simd>(simd: S, from: f32, to: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    // SAFETY: `lanes` has 16 places.
    unsafe { simd.store(lanes.as_mut_ptr(), exp(simd, simd.splat(from - to))) }
    lanes[0]
}

/// One piece of work.
struct Stretch<'a> {
    attention: &'a Attention,
    cache: &'a dyn Cache,
    queries: &'a [f32],
    piece: Piece,
    out: SharedMut<f32>,
    partials: SharedMut<f32>,
}

impl Operation for Stretch<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (attention, run) = (self.attention, self.piece.run);
        let (dim, group, numbers) = (attention.head_dim, attention.group(), attention.partial_numbers());
        let padded = padded(dim);
        let count = run.rows * group;
        // Queries of the piece, `[rows, group]`, scaled.
        let mut queries = vec![0.0_f32; count * padded];
        for (index, query) in queries.chunks_exact_mut(padded).enumerate() {
            let (row, head) = (index / group, self.piece.kv_head * group + index % group);
            let start = ((run.first_row + row) * attention.heads + head) * dim;
            for (to, from) in query.iter_mut().zip(&self.queries[start..start + dim]) {
                *to = from * attention.scale;
            }
        }
        let mut total = vec![0.0_f32; count * numbers];
        let mut part = vec![0.0_f32; count * numbers];
        let (first, last) = self.piece.stretches;
        for stretch in first..=last {
            let to = if stretch == first { &mut total } else { &mut part };
            to.chunks_exact_mut(numbers).for_each(|numbers| {
                numbers.fill(0.0);
                numbers[padded] = f32::NEG_INFINITY;
            });
            self.stretch(simd, stretch, &queries, to);
            if stretch != first {
                Join {
                    total: &mut total,
                    next: &part,
                    numbers,
                }
                .run(simd);
            }
        }
        if let Some(first) = self.piece.partial {
            // SAFETY: the queries of each piece have places of their own.
            unsafe { self.partials.slice(first * numbers..(first + count) * numbers) }
                .copy_from_slice(&total);
            return;
        }
        for (index, total) in total.chunks_exact(numbers).enumerate() {
            let (row, head) = (index / group, self.piece.kv_head * group + index % group);
            let start = ((run.first_row + row) * attention.heads + head) * dim;
            // SAFETY: this row and head belong to this piece alone; the lengths were asserted.
            finish(total, unsafe { self.out.slice(start..start + dim) });
        }
    }
}

impl Stretch<'_> {
    /// Adds a stretch's blocks to the partial results of all queries.
    #[inline(always)]
    fn stretch<S: Simd>(&self, simd: S, stretch: usize, queries: &[f32], partials: &mut [f32]) {
        let (attention, run) = (self.attention, self.piece.run);
        let (group, numbers) = (attention.group(), attention.partial_numbers());
        let padded = padded(attention.head_dim);
        let end = (run.position + run.rows).min((stretch + 1) * STRETCH_TOKENS);
        let begin = attention
            .first_position(run.position)
            .max(stretch * STRETCH_TOKENS);
        let mut rows = Vec::new();
        for block in begin / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS) {
            let start = block * BLOCK_TOKENS;
            let (keys, values) = self.cache.block(run.sequence, block, self.piece.kv_head);
            // Many queries: the numbers are widened once. Few: as they are read.
            let (keys, values) = match (keys, values) {
                (keys @ (Numbers::F16(_) | Numbers::Q8(..)), values) if run.rows * group > QUERIES => {
                    rows.resize(keys.len() + values.len(), 0.0);
                    let (wide_keys, wide_values) = rows.split_at_mut(keys.len());
                    widen(simd, keys, Lie::Keys, attention.head_dim, wide_keys);
                    widen(
                        simd,
                        values,
                        Lie::Values { padded },
                        attention.head_dim,
                        wide_values,
                    );
                    (Numbers::F32(wide_keys), Numbers::F32(wide_values))
                }
                other => other,
            };
            let mut first = 0;
            while first < run.rows * group {
                let left = run.rows * group - first;
                let count = [QUERIES, 3, 2, 1].into_iter().find(|&n| n <= left).unwrap_or(1);
                let queries = &queries[first * padded..(first + count) * padded];
                let partials = &mut partials[first * numbers..(first + count) * numbers];
                let mut bounds = [(0, 0); QUERIES];
                for (index, bounds) in bounds.iter_mut().take(count).enumerate() {
                    let position = run.position + (first + index) / group;
                    let from = attention.first_position(position).max(begin);
                    *bounds = (
                        from.saturating_sub(start).min(BLOCK_TOKENS),
                        (position + 1).min(end).saturating_sub(start).min(BLOCK_TOKENS),
                    );
                }
                let block = Block {
                    dim: attention.head_dim,
                    keys,
                    values,
                    bounds,
                };
                match count {
                    1 => block.queries::<S, 1>(simd, queries, partials),
                    2 => block.queries::<S, 2>(simd, queries, partials),
                    3 => block.queries::<S, 3>(simd, queries, partials),
                    _ => block.queries::<S, 4>(simd, queries, partials),
                }
                first += count;
            }
        }
    }
}

/// How the tokens of a block lie.
#[derive(Clone, Copy)]
enum Lie {
    Keys,
    Values { padded: usize },
}

#[inline(always)]
fn widen<S: Simd>(simd: S, from: Numbers<'_>, lie: Lie, dim: usize, to: &mut [f32]) {
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
struct Block<'a> {
    dim: usize,
    keys: Numbers<'a>,
    values: Numbers<'a>,
    /// From and to, in tokens of the block.
    bounds: [(usize, usize); QUERIES],
}

impl Numbers<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F16(x) => x.len(),
            Self::F32(x) => x.len(),
            Self::Q8(x, _) => x.len(),
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
    fn queries<S: Simd, const N: usize>(&self, simd: S, queries: &[f32], partials: &mut [f32]) {
        let (dim, padded) = (self.dim, padded(self.dim));
        let numbers = padded + LANES;
        assert!(queries.len() == N * padded && partials.len() == N * numbers);
        assert!(self.keys.len() >= dim * BLOCK_TOKENS && self.values.len() >= BLOCK_TOKENS * padded);
        assert!(self.keys.has_scales(dim) && self.values.has_scales(dim));
        let mut scores = [[simd.splat(0.0); 2]; N];
        for d in 0..dim {
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
            if padded - start >= 4 * LANES && N * 4 <= 4 * S::ROWS {
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
