//! How attention is cut into pieces of work, and how what they found of the same rows becomes one result.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Attention, BLOCK_TOKENS, LANES, Run, STRETCH_TOKENS, SharedMut, Simd, exp, partial_numbers};

/// Rows of one sequence in a piece of work.
const ROWS: usize = 16;
/// The same for matrix units: keys and values are made ready for all of them.
const ROWS_OF_UNITS: usize = 32;
/// Pieces of several rows that each thread finds where they can be cut so: fewer are cut along the context. (Those of a single row
/// are cut as far as they can be, for their results are joined in no time.)
const PIECES_PER_THREAD: usize = 3;
/// Most numbers that are kept until they are joined, 32 MiB: rows of which more would be are not cut.
const MOST_KEPT: usize = 8 << 20;

/// Some rows of one sequence, one KV head, and some stretches of the context.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) run: Run,
    pub(super) kv_head: usize,
    /// First and last stretch.
    pub(super) stretches: (usize, usize),
    /// What it is of its rows' context, if not all.
    part: Option<Part>,
}

#[derive(Clone, Copy)]
struct Part {
    /// Which rows it is a part of.
    joint: usize,
    /// Where its results begin, in queries.
    first: usize,
}

/// Rows and a KV head whose context several pieces share.
struct Joint {
    run: Run,
    kv_head: usize,
    /// Where the results of its first stretch begin, in queries; those of the others follow.
    first: usize,
    stretches: usize,
    /// Pieces that are not done.
    left: AtomicUsize,
}

impl Piece {
    /// Whether other pieces have the rest of its rows' context.
    pub(super) fn is_part(&self) -> bool {
        self.part.is_some()
    }

    /// The first block that its rows see.
    pub(super) fn first_block(&self, attention: &Attention) -> usize {
        let begin = self.stretches.0 * STRETCH_TOKENS;
        begin.max(attention.first_position(self.run.position)) / BLOCK_TOKENS
    }
}

/// All work of one attention.
pub(super) struct Pieces {
    pub(super) pieces: Vec<Piece>,
    joints: Vec<Joint>,
    /// Queries of all results that are kept until they are joined, once for each of their stretches.
    pub(super) kept: usize,
}

impl Pieces {
    /// Cuts the work of some rows for so many threads.
    pub(super) fn new(attention: &Attention, runs: &[Run], threads: usize, units: bool) -> Self {
        // The last see most and come first, so that no thread begins with the largest when others are done.
        let parts_of = |run: Run| {
            let most = if units && run.of_prompt {
                ROWS_OF_UNITS
            } else {
                ROWS
            };
            (0..run.rows).step_by(most).rev().map(move |start| Run {
                first_row: run.first_row + start,
                rows: most.min(run.rows - start),
                position: run.position + start,
                ..run
            })
        };
        let all: usize = runs
            .iter()
            .flat_map(|run| parts_of(*run))
            .map(|run| run.rows * attention.stretches(&run).len())
            .sum();
        let share = all * attention.kv_heads / (threads * PIECES_PER_THREAD);
        let mut made = Self {
            pieces: Vec::new(),
            joints: Vec::new(),
            kept: 0,
        };
        for run in runs.iter().flat_map(|run| parts_of(*run)) {
            let stretches = attention.stretches(&run).len();
            let most = if run.rows == 1 {
                1
            } else {
                (share / run.rows).max(1)
            };
            let pieces = if threads == 1 { 1 } else { stretches.div_ceil(most) };
            for kv_head in 0..attention.kv_heads {
                made.add(attention, run, kv_head, pieces);
            }
        }
        made
    }

    /// Adds so many pieces of some rows and a KV head, or one where their results would want too much room.
    fn add(&mut self, attention: &Attention, run: Run, kv_head: usize, pieces: usize) {
        let stretches = attention.stretches(&run);
        let queries = run.rows * attention.group();
        let kept = self.kept + queries * stretches.len();
        let pieces = if kept * partial_numbers(attention.head_dim) > MOST_KEPT {
            1
        } else {
            pieces
        };
        let joint = self.joints.len();
        if pieces > 1 {
            self.joints.push(Joint {
                run,
                kv_head,
                first: self.kept,
                stretches: stretches.len(),
                left: AtomicUsize::new(pieces),
            });
        }
        let begin = |piece: usize| stretches.start + piece * stretches.len() / pieces;
        for piece in 0..pieces {
            let stretches = begin(piece)..begin(piece + 1);
            let part = (pieces > 1).then_some(Part {
                joint,
                first: self.kept,
            });
            if part.is_some() {
                self.kept += queries * stretches.len();
            }
            self.pieces.push(Piece {
                run,
                kv_head,
                stretches: (stretches.start, stretches.end - 1),
                part,
            });
        }
    }
}

/// Where results go.
#[derive(Clone, Copy)]
pub(super) struct Results<'a> {
    pub(super) attention: &'a Attention,
    pub(super) pieces: &'a Pieces,
    /// `[queries that are kept, partial numbers]`.
    pub(super) kept: SharedMut<f32>,
    /// `[rows, heads, head_dim]`.
    pub(super) out: SharedMut<f32>,
}

impl Results<'_> {
    /// Where goes what a part finds for its queries in one of its stretches: what all find is joined when it is there, in order.
    ///
    /// # Panics
    /// When the piece is no part, or does not have the stretch.
    ///
    /// # Safety
    /// Whoever asks works on the piece, and has no other place of the same stretch.
    pub(super) unsafe fn place<'a>(self, piece: &Piece, stretch: usize) -> &'a mut [f32] {
        let (Some(part), (first, last)) = (piece.part, piece.stretches) else {
            unreachable!("a whole piece has no place among parts")
        };
        assert!((first..=last).contains(&stretch));
        let size = self.size(&piece.run);
        let start = part.first * partial_numbers(self.attention.head_dim) + (stretch - first) * size;
        // SAFETY: there is room for all queries that are counted, and those of each piece were, once for each of its stretches;
        // the caller's promise.
        unsafe { self.kept.slice(start..start + size) }
    }

    /// Numbers that are found of some rows' queries.
    fn size(self, run: &Run) -> usize {
        run.rows * self.attention.group() * partial_numbers(self.attention.head_dim)
    }

    /// Writes what a whole piece found for its queries. Of parts, the last one that is done joins what all have found.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(self, simd: S, piece: &Piece, total: &[f32]) {
        let Some(part) = piece.part else {
            self.write(&piece.run, piece.kv_head, total);
            return;
        };
        let joint = &self.pieces.joints[part.joint];
        // What the others found is there when the last one sees that they are done.
        if joint.left.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let numbers = partial_numbers(self.attention.head_dim);
        let (start, size) = (joint.first * numbers, self.size(&joint.run));
        // SAFETY: there is room for all queries that are counted, these among them. All parts of these rows are done, and only the
        // last one comes here.
        let all = unsafe { self.kept.slice(start..start + joint.stretches * size) };
        let (total, others) = all.split_at_mut(size);
        for next in others.chunks_exact(size) {
            Join { total, next, numbers }.run(simd);
        }
        self.write(&joint.run, joint.kv_head, total);
    }

    /// Writes the results of all queries of some rows.
    fn write(self, run: &Run, kv_head: usize, total: &[f32]) {
        let (dim, group) = (self.attention.head_dim, self.attention.group());
        for (index, total) in total.chunks_exact(partial_numbers(dim)).enumerate() {
            let (row, head) = (index / group, kv_head * group + index % group);
            let start = ((run.first_row + row) * self.attention.heads + head) * dim;
            // SAFETY: this row and head belong to these pieces alone; the lengths were asserted.
            finish(total, unsafe { self.out.slice(start..start + dim) });
        }
    }
}

/// The sums of values over the sum of weights.
fn finish(total: &[f32], out: &mut [f32]) {
    let weights = &total[total.len() - 2 * LANES..total.len() - LANES];
    let inverse = 1.0 / weights.iter().sum::<f32>();
    for (out, x) in out.iter_mut().zip(total) {
        *out = x * inverse;
    }
}

/// Joins partial results of the same queries: the later stretch to the earlier ones.
pub(super) struct Join<'a> {
    pub(super) total: &'a mut [f32],
    pub(super) next: &'a [f32],
    pub(super) numbers: usize,
}

impl Join<'_> {
    #[inline(always)]
    pub(super) fn run<S: Simd>(self, simd: S) {
        let pairs = self
            .total
            .chunks_exact_mut(self.numbers)
            .zip(self.next.chunks_exact(self.numbers));
        for (total, next) in pairs {
            if shows_nothing(next) {
                continue;
            }
            if shows_nothing(total) {
                total.copy_from_slice(next);
                continue;
            }
            let reference = self.numbers - LANES;
            let most = total[reference].max(next[reference]);
            let (a, b) = (
                shrink(simd, total[reference], most),
                shrink(simd, next[reference], most),
            );
            for start in (0..reference).step_by(LANES) {
                // SAFETY: both hold `reference` numbers, a multiple of 16, and 16 more.
                unsafe {
                    let place = total.as_mut_ptr().add(start);
                    let sum = simd.mul(simd.load(place), simd.splat(a));
                    let sum = simd.fma(simd.load(next.as_ptr().add(start)), simd.splat(b), sum);
                    simd.store(place, sum);
                }
            }
            total[reference] = most;
        }
    }
}

/// Whether a window shows nothing of the stretch whose results these are. Where scores are no numbers, the sums of weights
/// are none either, which stays so.
fn shows_nothing(numbers: &[f32]) -> bool {
    let reference = numbers.len() - LANES;
    numbers[reference] == f32::NEG_INFINITY && numbers[reference - LANES] == 0.0
}

/// e^(from - to).
#[inline(always)]
fn shrink<S: Simd>(simd: S, from: f32, to: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    // SAFETY: `lanes` has 16 places.
    unsafe { simd.store(lanes.as_mut_ptr(), exp(simd, simd.splat(from - to))) }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(
        runs: &[(usize, usize)],
        window: Option<usize>,
        threads: usize,
    ) -> (Attention, Vec<Run>, Pieces) {
        let attention = Attention {
            heads: 6,
            kv_heads: 3,
            head_dim: 8,
            scale: 1.0,
            window,
        };
        let mut first_row = 0;
        let runs: Vec<Run> = runs
            .iter()
            .enumerate()
            .map(|(sequence, &(rows, position))| {
                let run = Run {
                    sequence,
                    first_row,
                    rows,
                    position,
                    of_prompt: sequence % 2 == 1,
                };
                first_row += rows;
                run
            })
            .collect();
        let pieces = Pieces::new(&attention, &runs, threads, true);
        (attention, runs, pieces)
    }

    #[test]
    fn every_row_meets_every_stretch_once_and_parts_have_places_of_their_own() {
        let all = [(1, 2000), (70, 3000), (4, 700), (16, 0), (33, 511)];
        for runs in [&all[..], &all[..1], &all[1..2], &all[2..3], &[]] {
            for (window, threads) in [(None, 1), (None, 2), (Some(300), 5), (None, 64)] {
                let (attention, runs, made) = pieces(runs, window, threads);
                let (mut met, mut places) = (Vec::new(), Vec::new());
                for piece in &made.pieces {
                    let (first, last) = piece.stretches;
                    let rows = piece.run.first_row..piece.run.first_row + piece.run.rows;
                    met.extend(
                        rows.flat_map(|row| (first..=last).map(move |stretch| (row, piece.kv_head, stretch))),
                    );
                    if let Some(part) = piece.part {
                        let queries = piece.run.rows * attention.group() * (last + 1 - first);
                        places.extend(part.first..part.first + queries);
                    }
                }
                let mut expected = Vec::new();
                for run in runs {
                    // Rows are taken together, so that one may meet a stretch of which it sees nothing.
                    let most = if run.of_prompt { ROWS_OF_UNITS } else { ROWS };
                    for row in 0..run.rows {
                        let start = row / most * most;
                        let part = Run {
                            rows: most.min(run.rows - start),
                            position: run.position + start,
                            ..run
                        };
                        let stretches = attention.stretches(&part);
                        expected.extend((0..3).flat_map(|head| {
                            let row = run.first_row + row;
                            stretches.clone().map(move |stretch| (row, head, stretch))
                        }));
                    }
                }
                met.sort_unstable();
                expected.sort_unstable();
                assert_eq!(met, expected, "{threads} threads");
                assert!(places.into_iter().eq(0..made.kept), "{threads} threads");
                // What is joined is what its pieces kept, and as many are waited for as there are.
                for (index, joint) in made.joints.iter().enumerate() {
                    let is_its = |piece: &&Piece| piece.part.is_some_and(|part| part.joint == index);
                    let of_it: Vec<&Piece> = made.pieces.iter().filter(is_its).collect();
                    let first = of_it[0].part.unwrap().first;
                    let stretches: usize = of_it
                        .iter()
                        .map(|piece| piece.stretches.1 + 1 - piece.stretches.0)
                        .sum();
                    assert_eq!((joint.first, joint.stretches), (first, stretches));
                    assert_eq!(joint.left.load(Ordering::Relaxed), of_it.len());
                    assert!(
                        of_it
                            .iter()
                            .all(|piece| piece.run.first_row == joint.run.first_row)
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_kept_has_a_bound() {
        let (attention, _, made) = pieces(&[(16, 500_000); 4], None, 32);
        assert!(made.kept > 0 && made.kept * partial_numbers(attention.head_dim) <= MOST_KEPT);
        assert!(made.pieces.iter().any(|piece| !piece.is_part()));
    }

    #[test]
    fn few_rows_are_cut_along_their_context_and_many_are_not() {
        let sizes = |runs: &[(usize, usize)], threads| {
            let pieces = pieces(runs, None, threads).2.pieces;
            let sizes = pieces
                .iter()
                .map(|piece| piece.stretches.1 + 1 - piece.stretches.0);
            sizes.collect::<Vec<_>>()
        };
        // Eight stretches of three heads.
        assert_eq!(sizes(&[(1, 2000)], 2), [1; 24]);
        assert_eq!(sizes(&[(8, 2000)], 2), [4; 6]);
        assert_eq!(sizes(&[(8, 2000)], 1), [8; 3]);
        assert_eq!(sizes(&[(8, 2000)], 16), [1; 24]);
        assert_eq!(sizes(&[(64, 1984)], 2), [8; 12]);
        // Parts are as large as each other can be.
        assert_eq!(sizes(&[(8, 2700)], 2), [3, 4, 4, 3, 4, 4, 3, 4, 4]);
        // One thread shares with nobody.
        assert_eq!(sizes(&[(1, 2000)], 1), [8; 3]);
    }
}
