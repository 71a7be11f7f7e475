//! Attention of a prompt's rows on matrix units.
//!
//! Sixteen queries meet a block of the cache at once, in bfloat16. All scores of a stretch are there before their largest is
//! looked for, so that nothing that was summed up has to be scaled again but between stretches.

use std::arch::x86_64::{
    __mmask16, _CMP_UNORD_Q, _mm512_cmp_ps_mask, _mm512_mask_max_ps, _mm512_maskz_mov_ps,
};
use std::cell::RefCell;
use std::f32::consts::{LN_2, LOG2_E};

use super::super::amx::{
    HalfTile, TILE_FLOATS, TILE_ROWS, Units, Work, power_of_two, store_pairs, store_rounded,
};
use super::super::lines::LINE;
use super::super::x86::Avx512;
use super::*;

/// Blocks of a stretch.
const BLOCKS: usize = STRETCH_TOKENS / BLOCK_TOKENS;
/// Queries that are worked on together: two tiles.
const TOGETHER: usize = 2 * TILE_ROWS;

/// What a thread keeps from one piece to the next: room whose numbers are written before they are read.
#[derive(Default)]
struct Tiles {
    /// `[queries / 16, dimensions / 32]`, each 16 queries of 32 dimensions.
    queries: Vec<HalfTile>,
    /// `[blocks, 2, dimensions / 32]`, each 32 dimensions of 16 tokens.
    keys: Vec<HalfTile>,
    /// `[dimensions / 16, blocks]`, each 32 tokens of 16 dimensions.
    values: Vec<HalfTile>,
    /// Tokens of each block of which a value is no number, or has no end, a bit each. The units are given zeros instead, for they
    /// multiply values that a query does not see with nothing; who sees one has no result.
    broken: [u32; BLOCKS],
    /// Weights, `[2, blocks]`, each 16 queries of 32 tokens.
    weights: Vec<HalfTile>,
    /// Scores, `[blocks, 2, 2, 16, 16]`; then sums of values, `[dimensions / 32, 2, 2, 16, 16]`.
    sums: Lines,
}

thread_local! {
    static TILES: RefCell<Tiles> = RefCell::default();
}

/// Some blocks that a stretch's queries see, and of which tokens they are.
#[derive(Clone, Copy)]
struct Seen {
    first_block: usize,
    blocks: usize,
    /// First token and the one behind the last.
    begin: usize,
    end: usize,
}

impl Work for Stretch<'_> {
    #[inline(always)]
    fn run(self, simd: Avx512, units: Units) {
        let (attention, run) = (self.attention, self.piece.run);
        let numbers = partial_numbers(attention.head_dim);
        let count = run.rows * attention.group();
        // Taken and put back, so that a panic leaves no room, and not one that is borrowed for ever.
        let (mut room, mut tiles) = (ROOM.take(), TILES.take());
        self.turn_queries(simd, &mut room.queries);
        self.round_queries(simd, &room.queries, &mut tiles.queries);
        let (first, last) = self.piece.stretches;
        let kept = self.piece.is_part();
        let several = !kept && first < last;
        room.total.set_length(if kept { 0 } else { count * numbers });
        room.part.set_length(if several { count * numbers } else { 0 });
        for stretch in first..=last {
            let seen = self.seen(stretch);
            self.take_blocks((simd, units), seen, &mut tiles);
            let to: &mut [f32] = if kept {
                // SAFETY: one stretch after the other, and this thread alone has the piece.
                unsafe { self.results.place(&self.piece, stretch) }
            } else if stretch == first {
                &mut room.total
            } else {
                &mut room.part
            };
            for query in (0..count).step_by(TOGETHER) {
                self.some_queries(
                    simd,
                    units,
                    seen,
                    query..count.min(query + TOGETHER),
                    &mut tiles,
                    to,
                );
            }
            if several && stretch != first {
                Join {
                    total: &mut room.total,
                    next: &room.part,
                    numbers,
                }
                .run(simd);
            }
        }
        self.results.finish(simd, &self.piece, &room.total);
        ROOM.replace(room);
        TILES.replace(tiles);
    }
}

impl Stretch<'_> {
    fn seen(&self, stretch: usize) -> Seen {
        let run = self.piece.run;
        let begin = self.attention.first_position(run.position);
        let begin = begin.max(stretch * STRETCH_TOKENS);
        let end = (run.position + run.rows).min((stretch + 1) * STRETCH_TOKENS);
        let first_block = begin / BLOCK_TOKENS;
        Seen {
            first_block,
            blocks: end.div_ceil(BLOCK_TOKENS) - first_block,
            begin,
            end,
        }
    }

    /// Queries as the units take them, so that scores are exponents of 2 (e^x is 2^(x log2 e)). What lies behind the last is of no
    /// account.
    #[inline(always)]
    fn round_queries(&self, simd: Avx512, queries: &[f32], to: &mut Vec<HalfTile>) {
        let (dim, padded) = (self.attention.head_dim, padded(self.attention.head_dim));
        let (chunks, count) = (dim.div_ceil(2 * LANES), queries.len() / padded);
        let tiles = count.div_ceil(TOGETHER) * 2 * chunks;
        to.resize(to.len().max(tiles), HalfTile::ZERO);
        for (index, query) in queries.chunks_exact(padded).enumerate() {
            for chunk in 0..chunks {
                let tile = &mut to[index / TILE_ROWS * chunks + chunk].0;
                let line = &mut tile[index % TILE_ROWS * 2 * LANES..][..2 * LANES];
                let start = chunk * 2 * LANES;
                // SAFETY: 16 numbers are there where `start` lies, and 16 more if the padded query has them; a line has 32 places.
                unsafe {
                    let first = simd.load(query[start..].as_ptr());
                    let second = if start + LANES < padded {
                        simd.load(query[start + LANES..].as_ptr())
                    } else {
                        simd.splat(0.0)
                    };
                    let powers = [first, second].map(|x| simd.mul(x, simd.splat(LOG2_E)));
                    store_rounded(powers, line.as_mut_ptr());
                }
            }
        }
    }

    /// Keys and values of a stretch's blocks as the units take them.
    #[inline(always)]
    fn take_blocks(&self, (simd, units): (Avx512, Units), seen: Seen, tiles: &mut Tiles) {
        let dim = self.attention.head_dim;
        let chunks = dim.div_ceil(2 * LANES);
        assert!(seen.blocks <= BLOCKS);
        let most = 2 * chunks * BLOCKS;
        tiles.keys.resize(tiles.keys.len().max(most), HalfTile::ZERO);
        tiles.values.resize(tiles.values.len().max(most), HalfTile::ZERO);
        for index in 0..seen.blocks {
            let block = seen.first_block + index;
            let (keys, values) = self
                .cache
                .block(self.piece.run.sequence, block, self.piece.kv_head);
            let of_keys = &mut tiles.keys[2 * index * chunks..2 * (index + 1) * chunks];
            // Behind the last token nothing was written yet.
            let there = (seen.end - block * BLOCK_TOKENS).min(BLOCK_TOKENS);
            let of_values = (&mut tiles.values[index..], there);
            let on = (simd, units);
            // Behind the last block: any place may be asked for.
            let next = self.after(block).unwrap_or(Next::of((keys, values)));
            let of = |numbers| BlockOf {
                dim,
                numbers,
                next: next.keys,
            };
            // What numbers they are is asked here, not for each vector.
            match keys {
                Numbers::F16(x) => of(Numbers::F16(x)).take_keys(on, of_keys),
                Numbers::F32(x) => of(Numbers::F32(x)).take_keys(on, of_keys),
                Numbers::Q8(x, scales) => of(Numbers::Q8(x, scales)).take_keys(on, of_keys),
            }
            let of = |numbers| BlockOf {
                dim,
                numbers,
                next: next.values,
            };
            tiles.broken[index] = match values {
                Numbers::F16(x) => of(Numbers::F16(x)).take_values(on, of_values),
                Numbers::F32(x) => of(Numbers::F32(x)).take_values(on, of_values),
                Numbers::Q8(x, scales) => of(Numbers::Q8(x, scales)).take_values(on, of_values),
            };
        }
    }

    /// The partial results of two tiles of queries, or one, for a stretch.
    #[inline(always)]
    fn some_queries(
        &self,
        simd: Avx512,
        units: Units,
        seen: Seen,
        queries: std::ops::Range<usize>,
        tiles: &mut Tiles,
        partials: &mut [f32],
    ) {
        let dim = self.attention.head_dim;
        let (padded, chunks, numbers) = (padded(dim), dim.div_ceil(2 * LANES), partial_numbers(dim));
        let first = queries.start / TILE_ROWS * chunks;
        // Of scores, or of values' sums.
        let both = 4 * TILE_FLOATS;
        tiles.sums.set_length(BLOCKS.max(chunks) * both);
        tiles.weights.resize(2 * BLOCKS, HalfTile::ZERO);
        assert!(tiles.queries.len() >= first + 2 * chunks && seen.blocks <= BLOCKS);
        assert!(tiles.keys.len() >= BLOCKS * 2 * chunks && tiles.values.len() >= 2 * chunks * BLOCKS);
        let sums = tiles.sums.as_mut_ptr();
        let rows = [first, first + chunks].map(|tile| tiles.queries.as_ptr().wrapping_add(tile));
        // Of a second tile there would be nothing to see.
        let one = queries.len() <= TILE_ROWS;
        let shaped = units.shape();
        for block in 0..seen.blocks {
            let keys = [2 * block, 2 * block + 1].map(|half| tiles.keys.as_ptr().wrapping_add(half * chunks));
            // SAFETY: the assertions; there is room for the scores of as many blocks.
            unsafe {
                let sums = sums.add(block * both);
                if one {
                    shaped.multiply::<1>([rows[0]], keys, chunks, sums, false);
                } else {
                    shaped.multiply::<2>(rows, keys, chunks, sums, false);
                }
            }
        }
        drop(shaped);
        for query in queries.clone() {
            let index = query - queries.start;
            let partial = &mut partials[query * numbers..(query + 1) * numbers];
            self.weigh(
                (simd, units),
                seen,
                (query, index),
                (&tiles.sums, &tiles.broken),
                &mut tiles.weights,
                partial,
            );
        }
        let weights = [0, BLOCKS].map(|tile| tiles.weights.as_ptr().wrapping_add(tile));
        let sums = tiles.sums.as_mut_ptr();
        let shaped = units.shape();
        for chunk in 0..chunks {
            let values =
                [2 * chunk, 2 * chunk + 1].map(|tile| tiles.values.as_ptr().wrapping_add(tile * BLOCKS));
            // SAFETY: the assertions; scores are not looked at any more.
            unsafe {
                let sums = sums.add(chunk * both);
                if one {
                    shaped.multiply::<1>([weights[0]], values, seen.blocks, sums, false);
                } else {
                    shaped.multiply::<2>(weights, values, seen.blocks, sums, false);
                }
            }
        }
        drop(shaped);
        for query in queries.clone() {
            let (tile, line) = ((query - queries.start) / TILE_ROWS, query % TILE_ROWS);
            let partial = &mut partials[query * numbers..][..padded];
            for (index, to) in partial.chunks_exact_mut(LANES).enumerate() {
                let place = index / 2 * both + (tile * 2 + index % 2) * TILE_FLOATS + line * LANES;
                to.copy_from_slice(&tiles.sums[place..place + LANES]);
            }
        }
    }

    /// Turns the scores of a query, the `index`th of those that are worked on, into weights; their sums, and the score that they
    /// refer to, go to its partial results.
    #[inline(always)]
    fn weigh(
        &self,
        (simd, units): (Avx512, Units),
        seen: Seen,
        (query, index): (usize, usize),
        (scores, broken): (&[f32], &[u32; BLOCKS]),
        weights: &mut [HalfTile],
        partial: &mut [f32],
    ) {
        let position = self.piece.run.position + query / self.attention.group();
        let base = seen.first_block * BLOCK_TOKENS;
        let from = self.attention.first_position(position).max(seen.begin) - base;
        let to = (position + 1).min(seen.end).saturating_sub(base);
        let (tile, line) = (index / TILE_ROWS, index % TILE_ROWS);
        let place = |half: usize| {
            let tile = half / 2 * 4 + tile * 2 + half % 2;
            &scores[tile * TILE_FLOATS + line * LANES..][..LANES]
        };
        // Blocks of which it sees nothing have no weight.
        let blocks = if from < to {
            from / BLOCK_TOKENS..to.div_ceil(BLOCK_TOKENS)
        } else {
            0..0
        };
        // SAFETY (all below): places have 16 scores; a line of a tile has 32 places; partial results have 32 numbers behind the
        // padded dimensions.
        let mut most = [simd.splat(f32::NEG_INFINITY); 2];
        for block in blocks.clone() {
            let masks = masks_of(from, to, block);
            for (half, most) in most.iter_mut().enumerate() {
                let score = place(2 * block + half).as_ptr();
                *most = unsafe { _mm512_mask_max_ps(*most, masks[half], *most, simd.load(score)) };
            }
        }
        let mut most = simd.reduce_max(simd.max(most[0], most[1]));
        if from < to && most == f32::NEG_INFINITY {
            // Scores that are no numbers, or lie below all: not the same as none.
            most = f32::NAN;
        }
        let reference = simd.splat(most);
        let mut sums = [simd.splat(0.0); 2];
        for block in 0..seen.blocks {
            let mut both = [simd.splat(0.0); 2];
            if blocks.contains(&block) {
                let masks = masks_of(from, to, block);
                for (half, weights) in both.iter_mut().enumerate() {
                    let score = unsafe { simd.load(place(2 * block + half).as_ptr()) };
                    let weight = power_of_two(units, simd.sub(score, reference));
                    *weights = unsafe { _mm512_maskz_mov_ps(masks[half], weight) };
                    sums[half] = simd.add(sums[half], *weights);
                }
            }
            let line = &mut weights[tile * BLOCKS + block].0[line * 2 * LANES..][..2 * LANES];
            unsafe { store_rounded(both, line.as_mut_ptr()) }
        }
        let mut sum = simd.add(sums[0], sums[1]);
        for (block, broken) in broken.iter().enumerate().take(seen.blocks) {
            if *broken == 0 {
                continue;
            }
            let [first, second] = masks_of(from, to, block).map(u32::from);
            if broken & (first | second << LANES) != 0 {
                sum = simd.splat(f32::NAN);
            }
        }
        let rest = &mut partial[padded(self.attention.head_dim)..][..2 * LANES];
        rest.fill(0.0);
        unsafe { simd.store(rest.as_mut_ptr(), sum) }
        // Results are joined by powers of e.
        rest[LANES] = most * LN_2;
    }
}

/// Keys or values of a head in a block.
#[derive(Clone, Copy)]
struct BlockOf<'a> {
    dim: usize,
    numbers: Numbers<'a>,
    /// Where a thread reads next.
    next: *const u8,
}

impl BlockOf<'_> {
    /// Writes keys as the units take them, `[2, dimensions / 32]`.
    #[inline(always)]
    fn take_keys(self, (simd, units): (Avx512, Units), to: &mut [HalfTile]) {
        let chunks = self.dim.div_ceil(2 * LANES);
        assert!(self.numbers.len() >= self.dim * BLOCK_TOKENS && self.numbers.has_scales(self.dim));
        for (index, tile) in to.iter_mut().enumerate() {
            let (half, chunk) = (index / chunks, index % chunks);
            for line in 0..TILE_ROWS {
                let d = chunk * 2 * LANES + 2 * line;
                let mut pair = [simd.splat(0.0); 2];
                for (odd, numbers) in pair.iter_mut().enumerate() {
                    if d + odd < self.dim {
                        let place = (d + odd) * BLOCK_TOKENS + half * LANES;
                        // SAFETY: the assertion.
                        *numbers = unsafe { self.numbers.load(simd, place, Lie::Keys) };
                    }
                }
                self.ask(simd, index * TILE_ROWS + line);
                store_pairs(units, pair, tile, line);
            }
        }
    }

    /// Asks memory for two vectors of what is read next.
    #[inline(always)]
    fn ask(self, simd: Avx512, pair: usize) {
        let bytes = 2 * LANES * self.numbers.width();
        for line in (0..bytes).step_by(LINE) {
            simd.prefetch(self.next.wrapping_add(pair * bytes + line));
        }
    }

    /// Writes the values of the tokens that are there as the units take them, `[dimensions / 16]` in steps of [`BLOCKS`]. Gives
    /// those tokens of which one is no number, or has no end: zeros stand there instead.
    #[inline(always)]
    fn take_values(self, on: (Avx512, Units), (to, there): (&mut [HalfTile], usize)) -> u32 {
        assert!(self.numbers.len() >= BLOCK_TOKENS * padded(self.dim) && self.numbers.has_scales(self.dim));
        if there == BLOCK_TOKENS && self.write_values(on, u32::MAX, to) {
            return 0;
        }
        let (simd, padded) = (on.0, padded(self.dim));
        let mut whole = 0_u32;
        for token in 0..there {
            let mut suspicion = simd.splat(0.0);
            for start in (0..padded).step_by(LANES) {
                // SAFETY: the assertion.
                let x = unsafe {
                    self.numbers
                        .load(simd, token * padded + start, Lie::Values { padded })
                };
                suspicion = simd.fma(x, simd.splat(0.0), suspicion);
            }
            whole |= u32::from(has_numbers(simd, suspicion)) << token;
        }
        self.write_values(on, whole, to);
        !whole & (u32::MAX >> (BLOCK_TOKENS - there))
    }

    /// Writes values of some tokens, a bit each, and zeros for others. Gives whether all are numbers that have an end.
    #[inline(always)]
    fn write_values(self, (simd, units): (Avx512, Units), tokens: u32, to: &mut [HalfTile]) -> bool {
        let padded = padded(self.dim);
        assert!(self.numbers.len() >= BLOCK_TOKENS * padded && self.numbers.has_scales(self.dim));
        let mut suspicion = [simd.splat(0.0); 2];
        for start in (0..padded).step_by(LANES) {
            let tile = &mut to[start / LANES * BLOCKS];
            for line in 0..TILE_ROWS {
                let mut pair = [simd.splat(0.0); 2];
                for (odd, numbers) in pair.iter_mut().enumerate() {
                    let token = 2 * line + odd;
                    if tokens >> token & 1 == 1 {
                        let place = token * padded + start;
                        // SAFETY: the assertion.
                        *numbers = unsafe { self.numbers.load(simd, place, Lie::Values { padded }) };
                        suspicion[odd] = simd.fma(*numbers, simd.splat(0.0), suspicion[odd]);
                    }
                }
                self.ask(simd, start + line);
                store_pairs(units, pair, tile, line);
            }
        }
        has_numbers(simd, simd.add(suspicion[0], suspicion[1]))
    }
}

/// Whether all are numbers. (Infinity times zero is none, and neither is anything added to that.)
#[inline(always)]
fn has_numbers(_: Avx512, x: <Avx512 as Simd>::F) -> bool {
    // SAFETY: that value stands for the instruction.
    unsafe { _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x) == 0 }
}

/// Which tokens of a block lie in a range, its first 16 and its last.
#[inline(always)]
fn masks_of(from: usize, to: usize, block: usize) -> [__mmask16; 2] {
    let start = block * BLOCK_TOKENS;
    if from <= start && start + BLOCK_TOKENS <= to {
        return [__mmask16::MAX; 2];
    }
    [start, start + LANES].map(|start| {
        let from = from.saturating_sub(start).min(LANES);
        let to = to.saturating_sub(start).min(LANES);
        let below = |end: usize| (1_u32 << end) - 1;
        (below(to.max(from)) & !below(from)) as __mmask16
    })
}
