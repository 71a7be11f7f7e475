//! Softmax(q k) v for a ragged batch, over a cache of blocks of 32 tokens.
//!
//! A piece of work is (some rows of one sequence, one KV head, some stretches of the context). Each block of
//! the cache is read once for all its rows and query heads. Stretches begin at fixed positions and are
//! joined in their order, so that a row's result depends on nothing but its own past: not on how many rows
//! came with it, nor on how many threads there are. Source: Dao et al. 2022; Milakov & Gimelshein 2018.
//!
//! In a block, keys lie transposed, `[head_dim, 32]`: 32 scores come out of as many additions as there are
//! dimensions, and nothing is summed across lanes. Values lie `[32, padded head_dim]`.

mod pieces;
#[cfg(target_arch = "x86_64")]
mod units;

use std::cell::RefCell;
use std::ops::Range;

use self::pieces::{Join, Piece, Pieces, Results};
pub(crate) use super::block::Numbers;
use super::block::{Block, Lie, Next, partial_numbers, queries_at_once, widen};
use super::lines::Lines;
use super::pool::SharedMut;
use super::simd::{LANES, Simd, exp};
use super::vector::Turn;
use super::{Compute, Operation};

/// Tokens in a block of the cache.
pub(crate) const BLOCK_TOKENS: usize = 32;
/// Dimensions that share a scale in a cache of 8-bit integers.
pub(crate) const SCALE_DIMS: usize = 32;
/// Tokens of a stretch: what one thread reads of a long context before another can help.
const STRETCH_TOKENS: usize = 256;
/// Queries that share each read of keys and values at most.
pub(super) const QUERIES: usize = 8;

/// A head's dimensions as they lie in memory.
pub(crate) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

/// The cache as attention reads it.
pub(crate) trait Cache: Sync {
    /// Keys `[head_dim, 32]` and values `[32, padded head_dim]` of a head in a block of a sequence.
    fn block(&self, sequence: usize, block: usize, kv_head: usize) -> (Numbers<'_>, Numbers<'_>);
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
    /// Whether matrix units compute it, where there are any.
    pub(crate) of_prompt: bool,
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
    fn stretches(&self, run: &Run) -> Range<usize> {
        let first = self.first_position(run.position) / STRETCH_TOKENS;
        first..(run.position + run.rows - 1) / STRETCH_TOKENS + 1
    }
}

impl Compute {
    /// `queries` and `out` are `[rows, heads, head_dim]`; keys and values of all rows are in the cache. Queries are turned
    /// as they are read.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub(crate) fn attend(
        &self,
        attention: &Attention,
        cache: &dyn Cache,
        runs: &[Run],
        (queries, turn): (&[f32], Option<&Turn<'_>>),
        out: &mut [f32],
    ) {
        assert_eq!(queries.len(), out.len());
        let width = attention.heads * attention.head_dim;
        for run in runs {
            assert!((run.first_row + run.rows) * width <= out.len());
        }
        let pieces = Pieces::new(attention, runs, self.pool.threads(), self.units_read_prompts());
        // Taken and put back, so that a panic leaves no room, and not one that is borrowed for ever.
        let mut kept = KEPT.take();
        kept.set_length(pieces.kept * partial_numbers(attention.head_dim));
        let results = Results {
            attention,
            pieces: &pieces,
            kept: SharedMut::new(&mut kept),
            out: SharedMut::new(out),
        };
        self.pool.run(pieces.pieces.len(), 1, &|index| {
            let stretch = Stretch {
                attention,
                cache,
                queries,
                turn,
                piece: pieces.pieces[index],
                next: pieces.pieces.get(index + 1).copied(),
                results,
            };
            #[cfg(target_arch = "x86_64")]
            if let (true, Some(units)) = (stretch.piece.run.of_prompt, self.dispatch.units()) {
                units.run(stretch);
                return;
            }
            self.dispatch.run(stretch);
        });
        KEPT.replace(kept);
    }
}

/// What a thread keeps from one piece to the next: room whose numbers are written before they are read.
#[derive(Default)]
struct Room {
    queries: Lines,
    total: Lines,
    part: Lines,
    /// Keys and values of a block.
    wide: [Lines; 2],
}

thread_local! {
    static ROOM: RefCell<Room> = RefCell::default();
    /// What is found of rows whose context several pieces share. It stays for the next layer, and has a bound.
    static KEPT: RefCell<Lines> = RefCell::default();
}

/// One piece of work.
struct Stretch<'a> {
    attention: &'a Attention,
    cache: &'a dyn Cache,
    queries: &'a [f32],
    turn: Option<&'a Turn<'a>>,
    piece: Piece,
    /// What this thread will most likely work on next.
    next: Option<Piece>,
    results: Results<'a>,
}

impl Operation for Stretch<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (attention, run) = (self.attention, self.piece.run);
        let (dim, group, numbers) = (
            attention.head_dim,
            attention.group(),
            partial_numbers(attention.head_dim),
        );
        let padded = padded(dim);
        let count = run.rows * group;
        // Taken and put back, so that a panic leaves no room, and not one that is borrowed for ever.
        let mut room = ROOM.take();
        let Room {
            queries,
            total,
            part,
            wide,
        } = &mut room;
        self.turn_queries(simd, queries);
        let (first, last) = self.piece.stretches;
        let kept = self.piece.is_part();
        let several = !kept && first < last;
        total.set_length(if kept { 0 } else { count * numbers });
        part.set_length(if several { count * numbers } else { 0 });
        for stretch in first..=last {
            let to: &mut [f32] = if kept {
                // SAFETY: one stretch after the other, and this thread alone has the piece.
                unsafe { self.results.place(&self.piece, stretch) }
            } else if stretch == first {
                total
            } else {
                part
            };
            to.chunks_exact_mut(numbers).for_each(|numbers| {
                numbers.fill(0.0);
                numbers[padded + LANES] = f32::NEG_INFINITY;
            });
            self.stretch(simd, stretch, queries, to, wide);
            if several && stretch != first {
                Join {
                    total,
                    next: part,
                    numbers,
                }
                .run(simd);
            }
        }
        self.results.finish(simd, &self.piece, total);
        ROOM.replace(room);
    }
}

impl Stretch<'_> {
    /// Queries of the piece, `[rows, group, padded head_dim]`, turned and scaled.
    #[inline(always)]
    fn turn_queries<S: Simd>(&self, simd: S, queries: &mut Lines) {
        let (attention, run) = (self.attention, self.piece.run);
        let (dim, group) = (attention.head_dim, attention.group());
        queries.set_length(run.rows * group * padded(dim));
        for (index, query) in queries.chunks_exact_mut(padded(dim)).enumerate() {
            let (row, head) = (index / group, self.piece.kv_head * group + index % group);
            let start = ((run.first_row + row) * attention.heads + head) * dim;
            let (query, padding) = query.split_at_mut(dim);
            query.copy_from_slice(&self.queries[start..start + dim]);
            if let Some(turn) = self.turn {
                turn.head(simd, run.first_row + row, query);
            }
            query.iter_mut().for_each(|x| *x *= attention.scale);
            padding.fill(0.0);
        }
    }

    /// Where the keys and values lie that this thread will most likely read after those of a block.
    #[inline(always)]
    fn after(&self, block: usize) -> Option<Next> {
        let run = self.piece.run;
        let (sequence, block, kv_head) = if (block + 1) * BLOCK_TOKENS < run.position + run.rows {
            (run.sequence, block + 1, self.piece.kv_head)
        } else {
            let next = self.next?;
            (next.run.sequence, next.first_block(self.attention), next.kv_head)
        };
        Some(Next::of(self.cache.block(sequence, block, kv_head)))
    }

    /// Adds a stretch's blocks to the partial results of all queries.
    #[inline(always)]
    fn stretch<S: Simd>(
        &self,
        simd: S,
        stretch: usize,
        queries: &[f32],
        partials: &mut [f32],
        [wide_keys, wide_values]: &mut [Lines; 2],
    ) {
        let (attention, run) = (self.attention, self.piece.run);
        let (group, numbers) = (attention.group(), partial_numbers(attention.head_dim));
        let padded = padded(attention.head_dim);
        let end = (run.position + run.rows).min((stretch + 1) * STRETCH_TOKENS);
        let begin = attention
            .first_position(run.position)
            .max(stretch * STRETCH_TOKENS);
        // Many queries: the numbers are widened once. Few: as they are read.
        let few = run.rows * group <= queries_at_once::<S>();
        for block in begin / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS) {
            let start = block * BLOCK_TOKENS;
            let (keys, values) = self.cache.block(run.sequence, block, self.piece.kv_head);
            let (keys, values) = match (keys, values) {
                (keys @ (Numbers::F16(_) | Numbers::Q8(..)), values) if !few => {
                    wide_keys.set_length(keys.len());
                    wide_values.set_length(values.len());
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
            let next = self.after(block);
            let mut first = 0;
            while first < run.rows * group {
                let left = run.rows * group - first;
                let count = [QUERIES, 4, 3, 2, 1]
                    .into_iter()
                    .find(|&count| count <= left.min(queries_at_once::<S>()))
                    .unwrap_or(1);
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
                    next: next.filter(|_| first == 0),
                };
                match count {
                    1 => block.queries::<S, 1>(simd, queries, partials),
                    2 => block.queries::<S, 2>(simd, queries, partials),
                    3 => block.queries::<S, 3>(simd, queries, partials),
                    4 => block.queries::<S, 4>(simd, queries, partials),
                    // So that eight are not compiled where registers do not hold them.
                    _ if queries_at_once::<S>() < QUERIES => unreachable!("more queries than registers hold"),
                    _ => block.queries::<S, QUERIES>(simd, queries, partials),
                }
                first += count;
            }
        }
    }
}
