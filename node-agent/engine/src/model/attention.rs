//! Grouped-query attention over the paged KV cache, for a ragged batch.
//!
//! Work is cut by (run of rows of one sequence, KV head). Each block of the cache is read once a piece of
//! work and used by all its rows and all query heads of the group; the softmax runs along (online), so
//! no row of scores is ever kept whole. Source: Dao et al. 2022, Milakov & Gimelshein 2018.

use rayon::prelude::*;

use crate::kv::{BLOCK_TOKENS, BlockTable, KvCache, Side};

/// Rows of one sequence that a piece of work holds: enough to share each read, few enough to spread.
const ROWS_PER_PIECE: usize = 16;

/// Shape and place of one attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attention {
    pub(super) layer: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) scale: f32,
    /// Tokens that a row sees, itself included.
    pub(super) window: Option<usize>,
}

/// Rows that belong to one sequence and follow each other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run<'a> {
    pub(super) table: &'a BlockTable,
    /// First row in the batch.
    pub(super) first_row: usize,
    pub(super) rows: usize,
    /// Position of the first row.
    pub(super) position: usize,
}

/// One query head's softmax under way.
#[derive(Clone)]
struct Accumulator {
    most: f32,
    sum: f32,
    out: Vec<f32>,
}

impl Attention {
    /// `queries` and `out` are `[rows, heads, head_dim]`; keys and values of all rows are in the cache.
    pub(super) fn forward(&self, cache: &KvCache, runs: &[Run<'_>], queries: &[f32], out: &mut [f32]) {
        let row_numbers = self.heads * self.head_dim;
        let pieces: Vec<(Run<'_>, usize)> = runs
            .iter()
            .flat_map(|run| {
                (0..run.rows)
                    .step_by(ROWS_PER_PIECE)
                    .map(move |start| run.part(start, ROWS_PER_PIECE))
            })
            .flat_map(|run| (0..self.kv_heads).map(move |head| (run, head)))
            .collect();
        let results: Vec<Vec<Accumulator>> = pieces
            .par_iter()
            .map(|(run, head)| self.piece(cache, run, *head, queries))
            .collect();
        let group = self.heads / self.kv_heads;
        for ((run, kv_head), accumulators) in pieces.iter().zip(results) {
            for (index, accumulator) in accumulators.into_iter().enumerate() {
                let (row, head) = (run.first_row + index / group, kv_head * group + index % group);
                let start = row * row_numbers + head * self.head_dim;
                for (out, x) in out[start..start + self.head_dim].iter_mut().zip(accumulator.out) {
                    *out = x / accumulator.sum;
                }
            }
        }
    }

    fn piece(&self, cache: &KvCache, run: &Run<'_>, kv_head: usize, queries: &[f32]) -> Vec<Accumulator> {
        let (dim, group) = (self.head_dim, self.heads / self.kv_heads);
        let mut accumulators = vec![
            Accumulator {
                most: f32::NEG_INFINITY,
                sum: 0.0,
                out: vec![0.0; dim]
            };
            run.rows * group
        ];
        let (mut keys, mut values) = (vec![0.0; BLOCK_TOKENS * dim], vec![0.0; BLOCK_TOKENS * dim]);
        let end = run.position + run.rows;
        let begin = self
            .window
            .map_or(0, |window| (run.position + 1).saturating_sub(window));
        for block in begin / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS) {
            let start = block * BLOCK_TOKENS;
            let used = (end - start).min(BLOCK_TOKENS) * dim;
            cache.read(
                run.table,
                self.layer,
                Side::Keys,
                kv_head,
                block,
                &mut keys[..used],
            );
            cache.read(
                run.table,
                self.layer,
                Side::Values,
                kv_head,
                block,
                &mut values[..used],
            );
            for (index, accumulator) in accumulators.iter_mut().enumerate() {
                let position = run.position + index / group;
                let from = self
                    .window
                    .map_or(0, |window| (position + 1).saturating_sub(window))
                    .saturating_sub(start);
                let to = (position + 1).saturating_sub(start).min(BLOCK_TOKENS);
                if from >= to {
                    continue;
                }
                let at =
                    ((run.first_row + index / group) * self.heads + kv_head * group + index % group) * dim;
                let query = &queries[at..at + dim];
                accumulator.add(
                    query,
                    &keys[from * dim..to * dim],
                    &values[from * dim..to * dim],
                    self.scale,
                );
            }
        }
        accumulators
    }
}

impl<'a> Run<'a> {
    fn part(self, start: usize, rows: usize) -> Run<'a> {
        Run {
            first_row: self.first_row + start,
            rows: rows.min(self.rows - start),
            position: self.position + start,
            ..self
        }
    }
}

impl Accumulator {
    fn add(&mut self, query: &[f32], keys: &[f32], values: &[f32], scale: f32) {
        let dim = query.len();
        let mut scores = [0.0_f32; BLOCK_TOKENS];
        let count = keys.len() / dim;
        let mut most = self.most;
        for (score, key) in scores.iter_mut().zip(keys.chunks_exact(dim)) {
            *score = dot(query, key) * scale;
            most = most.max(*score);
        }
        if most > self.most {
            let shrink = (self.most - most).exp();
            self.sum *= shrink;
            self.out.iter_mut().for_each(|x| *x *= shrink);
            self.most = most;
        }
        for (score, value) in scores[..count].iter().zip(values.chunks_exact(dim)) {
            let weight = (score - self.most).exp();
            self.sum += weight;
            for (out, x) in self.out.iter_mut().zip(value) {
                *out += weight * x;
            }
        }
    }
}

/// Eight sums side by side, which the compiler keeps in vector registers.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 8];
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a_chunks
        .remainder()
        .iter()
        .zip(b_chunks.remainder())
        .map(|(x, y)| x * y)
        .sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += x * y;
        }
    }
    sums.iter().sum::<f32>() + rest
}
