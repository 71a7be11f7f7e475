//! Rows of prompts in bfloat16, and their products with quantised weights on matrix units.
//!
//! A strip of a matrix (some pairs of tiles) is taken apart a few blocks at a time; all rows meet those while they lie in the
//! first-level cache. Sums stay in the second-level cache meanwhile.

use std::cell::RefCell;
use std::ops::Range;

use super::amx::{HalfTile, TILE_FLOATS, TILE_ROWS, Units, Work, opened, store_half, store_rounded, unpack};
use super::lines::Lines;
use super::pool::SharedMut;
use super::product::{Combine, Gate, put};
use super::rows::BLOCK;
use super::simd::{LANES, Simd};
use super::vector::{Norm, gelu_exponent};
use super::weights::{Matrix, with_layout};
use super::x86::Avx512;
use super::{Compute, Dispatch};

/// Blocks that are taken apart at once at most. Two tiles of 18 (36 KiB) stay in the first-level cache of 48 KiB, for rows go
/// around it ([`Shaped::multiply`](super::amx::Shaped)). With half as many (and plain loads) 512 rows took 8 % longer: sums are
/// read and written twice as often.
const PANEL_BLOCKS: usize = 18;
/// The same where some formats' blocks share scales in eights.
const PANEL_BLOCKS_OF_EIGHTS: usize = PANEL_BLOCKS / 8 * 8;
/// Pairs of tiles of a strip at most: rows come from behind the second-level cache once for all of them, a few blocks at a time.
/// With four, on two cores of Emerald Rapids, 512 rows took 10 % longer in the shape of a 1B model, and the same in a small one's.
const STRIP_PAIRS: usize = 8;
/// Strips that a thread should find, so that all are done at nearly the same time.
const STRIPS_PER_THREAD: usize = 3;
/// Pairs at most for a tile of rows or less, where taking weights apart is nearly all that there is to do; threads then have as many
/// strips each as there must be. On two cores of Emerald Rapids a row, or sixteen, took 4 to 8 % less than with strips as above in
/// the shape of a small model; strips of sixteen pairs took as long in a 1B model's.
const STRIP_PAIRS_OF_FEW: usize = 16;
/// Fewest rows for which weights are taken apart again, so that more threads find work.
const LEAST_ROWS: usize = 64;

/// Rows as matrix units take them.
#[derive(Debug, Default)]
pub(crate) struct Bf16Rows {
    columns: usize,
    rows: usize,
    /// `[rows / 16, columns / 32]`, each 16 rows of 32 numbers. Behind the last row are zeros.
    tiles: Vec<HalfTile>,
}

impl Bf16Rows {
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// `[rows, columns]` numbers, as they are.
    #[cfg(test)]
    pub(super) fn to_floats(&self) -> Vec<f32> {
        let blocks = self.columns / BLOCK;
        let number = |index: usize| {
            let (row, column) = (index / self.columns, index % self.columns);
            let tile = &self.tiles[row / TILE_ROWS * blocks + column / BLOCK].0;
            f32::from_bits(u32::from(tile[row % TILE_ROWS * BLOCK + column % BLOCK]) << 16)
        };
        (0..self.rows * self.columns).map(number).collect()
    }

    /// Room for so many rows, with what was there before.
    ///
    /// # Panics
    /// When there are some and their columns are no multiple of 32.
    fn begin(&mut self, rows: usize, columns: usize) -> &mut [HalfTile] {
        assert!(rows == 0 || columns > 0 && columns.is_multiple_of(BLOCK));
        (self.columns, self.rows) = (columns, rows);
        let count = rows.div_ceil(TILE_ROWS) * columns / BLOCK;
        // Widths come and go: what there was room for is not written again.
        self.tiles.resize(self.tiles.len().max(count), HalfTile::ZERO);
        &mut self.tiles[..count]
    }

    /// Room for so many rows, `[rows / 16, columns / 32]`, which are written piece by piece.
    ///
    /// # Panics
    /// As [`Self::begin`].
    pub(super) fn room(&mut self, rows: usize, columns: usize) -> SharedMut<HalfTile> {
        let tiles = self.begin(rows, columns);
        if !rows.is_multiple_of(TILE_ROWS) {
            for tile in tiles.iter_mut().rev().take(columns / BLOCK) {
                tile.0[rows % TILE_ROWS * BLOCK..].fill(0);
            }
        }
        SharedMut::new(tiles)
    }

    /// Rounds `[rows, columns]` numbers, normalised first where there is a norm.
    ///
    /// # Panics
    /// When columns are no multiple of 32, or do not divide the numbers, or the norm has another size.
    pub(crate) fn set(
        &mut self,
        compute: &Compute,
        units: Units,
        x: &[f32],
        columns: usize,
        norm: Option<Norm<'_>>,
    ) {
        assert!(columns > 0 && x.len().is_multiple_of(columns));
        assert!(norm.is_none_or(|norm| norm.weight.len() == columns));
        let tiles = self.begin(x.len() / columns, columns);
        let blocks = columns / BLOCK;
        compute.pool.for_each_chunk(tiles, blocks, |group, tiles| {
            let width = TILE_ROWS * columns;
            units.run(Round {
                x: &x[group * width..x.len().min((group + 1) * width)],
                norm,
                tiles,
            });
        });
    }
}

/// Sixteen rows, or fewer at the end.
struct Round<'a> {
    /// `[rows, columns]`.
    x: &'a [f32],
    norm: Option<Norm<'a>>,
    /// `[columns / 32]`.
    tiles: &'a mut [HalfTile],
}

impl Work for Round<'_> {
    #[inline(always)]
    fn run(self, simd: Avx512, _: Units) {
        let columns = self.tiles.len() * BLOCK;
        assert!(
            self.x.len() <= TILE_ROWS * columns && self.norm.is_none_or(|norm| norm.weight.len() == columns)
        );
        let mut rows = self.x.chunks_exact(columns);
        for row in 0..TILE_ROWS {
            let Some(x) = rows.next() else {
                for tile in &mut *self.tiles {
                    tile.0[row * BLOCK..(row + 1) * BLOCK].fill(0);
                }
                continue;
            };
            let factor = match self.norm {
                Some(norm) => norm.factor(simd, x),
                None => 1.0,
            };
            let factor = simd.splat(factor);
            for (block, tile) in self.tiles.iter_mut().enumerate() {
                // SAFETY: the row has 32 numbers for each tile, a norm as many weights; a tile has 32 places for each row.
                unsafe {
                    let x = x.as_ptr().add(block * BLOCK);
                    let mut numbers = [simd.load(x), simd.load(x.add(LANES))];
                    if let Some(norm) = self.norm {
                        for (half, numbers) in numbers.iter_mut().enumerate() {
                            let weight = simd.load(norm.weight.as_ptr().add(block * BLOCK + half * LANES));
                            *numbers = simd.mul(simd.mul(*numbers, factor), weight);
                        }
                    }
                    store_rounded(numbers, tile.0.as_mut_ptr().add(row * BLOCK));
                }
            }
        }
    }
}

/// A tile of a matrix, and where its product goes.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) matrix: &'a Matrix,
    pub(super) tile: usize,
    /// `[rows, rows of the matrix]`.
    pub(super) out: SharedMut<f32>,
}

/// What is multiplied at once.
#[derive(Clone, Copy)]
pub(super) enum Pair<'a> {
    /// Two tiles, or the last one.
    Tiles(Place<'a>, Option<Place<'a>>),
    /// A tile of the gate, and the one that it opens.
    Gated {
        gate: &'a Matrix,
        kind: Gate,
        up: &'a Matrix,
        tile: usize,
        /// Rows for the next product, `[rows of prompts / 16, rows of the matrices / 32]`.
        to: SharedMut<HalfTile>,
    },
}

impl<'a> Pair<'a> {
    fn matrices(&self) -> [(&'a Matrix, usize); 2] {
        match *self {
            Self::Tiles(left, right) => [left, right.unwrap_or(left)].map(|place| (place.matrix, place.tile)),
            Self::Gated { gate, up, tile, .. } => [(gate, tile), (up, tile)],
        }
    }
}

impl Compute {
    /// Multiplies rows with tiles; `first_row` is the first one's place in what comes out.
    ///
    /// # Safety
    /// Matrices are quantised and as wide as the rows; what comes out has room for all rows, and nobody else writes there. Where
    /// it is rounded, the matrix has a multiple of 32 rows.
    pub(super) unsafe fn multiply_units(
        &self,
        units: Units,
        rows: &Bf16Rows,
        first_row: usize,
        pairs: &[Pair<'_>],
        combine: Combine,
    ) {
        let threads = self.pool.threads();
        let wanted = threads * STRIPS_PER_THREAD;
        let width = if rows.rows <= TILE_ROWS {
            let rounds = pairs.len().div_ceil(threads * STRIP_PAIRS_OF_FEW).max(1);
            pairs.len().div_ceil(threads * rounds).max(1)
        } else {
            (pairs.len() / wanted).clamp(1, STRIP_PAIRS)
        };
        // Two pairs of a gate write the same lines of memory.
        let width = match pairs {
            [Pair::Gated { .. }, ..] => width.next_multiple_of(2),
            _ => width,
        };
        let strips = pairs.len().div_ceil(width);
        // Few strips and many threads: each has its rows.
        let parts = (wanted / strips.max(1)).clamp(1, (rows.rows / LEAST_ROWS).max(1));
        let parts = if strips >= self.pool.threads() { 1 } else { parts };
        let part_rows = rows.rows.div_ceil(parts).next_multiple_of(2 * TILE_ROWS);
        let parts = rows.rows.div_ceil(part_rows);
        self.pool.run(strips * parts, 1, &|index| {
            let (strip, part) = (index / parts, index % parts);
            let start = part * part_rows;
            units.run(Strip {
                rows,
                range: start..rows.rows.min(start + part_rows),
                first_row,
                pairs: &pairs[strip * width..pairs.len().min((strip + 1) * width)],
                combine,
            });
        });
    }
}

/// What a thread keeps from one strip to the next: room whose numbers are written before they are read.
#[derive(Default)]
struct Room {
    /// Some blocks of weights, `[pairs, 2, PANEL_BLOCKS]`.
    panels: Vec<HalfTile>,
    /// Sums, `[pairs, rows / 16, 2, 16, 16]`.
    sums: Lines,
}

thread_local! {
    static ROOM: RefCell<Room> = RefCell::default();
}

/// One piece of work.
struct Strip<'a> {
    rows: &'a Bf16Rows,
    /// Of those rows; it begins with a multiple of 32.
    range: Range<usize>,
    first_row: usize,
    pairs: &'a [Pair<'a>],
    combine: Combine,
}

impl Work for Strip<'_> {
    #[inline(always)]
    fn run(self, simd: Avx512, units: Units) {
        let blocks = self.rows.columns / BLOCK;
        let groups = self.range.start / TILE_ROWS..self.range.end.div_ceil(TILE_ROWS);
        assert!(self.range.start.is_multiple_of(TILE_ROWS) && self.range.end <= self.rows.rows);
        // Taken and put back, so that a panic leaves no room, and not one that is borrowed for ever.
        let mut room = ROOM.take();
        let panels = self.pairs.len() * 2 * PANEL_BLOCKS;
        room.panels.resize(room.panels.len().max(panels), HalfTile::ZERO);
        room.sums
            .set_length(self.pairs.len() * groups.len() * 2 * TILE_FLOATS);
        let step = if blocks.is_multiple_of(8) {
            PANEL_BLOCKS_OF_EIGHTS.min(blocks)
        } else {
            blocks.div_ceil(blocks.div_ceil(PANEL_BLOCKS))
        };
        // Vectors have half their pace for a while after the units: one does its work for all pairs before the other.
        for first in (0..blocks).step_by(step) {
            let count = step.min(blocks - first);
            let panels = room.panels.chunks_exact_mut(2 * PANEL_BLOCKS);
            for ((index, pair), panel) in self.pairs.iter().enumerate().zip(panels) {
                self.unpack(simd, (index, pair), (first, count), panel);
            }
            self.multiply(units, &groups, (first, count), &room.panels, &mut room.sums);
        }
        // Group by group: what is written of a row lies side by side for all pairs.
        let size = groups.len() * 2 * TILE_FLOATS;
        for group in 0..groups.len() {
            for (pair, sums) in self.pairs.iter().zip(room.sums.chunks_exact(size)) {
                let sums = &sums[group * 2 * TILE_FLOATS..][..2 * TILE_FLOATS];
                self.finish((simd, units), pair, group, sums);
            }
        }
        ROOM.replace(room);
    }
}

impl Strip<'_> {
    /// Takes some blocks of a pair apart, `[2, PANEL_BLOCKS]`.
    #[inline(always)]
    fn unpack(
        &self,
        simd: Avx512,
        (index, pair): (usize, &Pair<'_>),
        (first, count): (usize, usize),
        panel: &mut [HalfTile],
    ) {
        // What is taken apart after this: the next pair's blocks, or the first one's next.
        let (after, first_after) = match self.pairs.get(index + 1) {
            Some(next) => (next, first),
            None => (&self.pairs[0], first + count),
        };
        let places = pair.matrices().into_iter().zip(after.matrices());
        for (((matrix, tile), (after, tile_after)), to) in places.zip(panel.chunks_exact_mut(PANEL_BLOCKS)) {
            let next = (after.tile(tile_after), first_after);
            with_layout!(matrix.format(), L => {
                let blocks = matrix.columns() / BLOCK;
                unpack::<L>(simd, matrix.tile(tile), blocks, (first, count), next, to);
            }, _ => unreachable!("weights that are not quantised"));
        }
    }

    /// Adds products of some blocks to the sums of all pairs and groups of rows; the first blocks' are the first.
    #[inline(always)]
    fn multiply(
        &self,
        units: Units,
        groups: &Range<usize>,
        (first, count): (usize, usize),
        panels: &[HalfTile],
        sums: &mut [f32],
    ) {
        let blocks = self.rows.columns / BLOCK;
        assert!(first + count <= blocks && (1..=PANEL_BLOCKS).contains(&count));
        assert!(panels.len() >= self.pairs.len() * 2 * PANEL_BLOCKS);
        assert!(sums.len() == self.pairs.len() * groups.len() * 2 * TILE_FLOATS);
        assert!(self.rows.tiles.len() >= groups.end * blocks);
        let mut sums = sums.as_mut_ptr();
        let shaped = units.shape();
        for panel in panels.chunks_exact(2 * PANEL_BLOCKS).take(self.pairs.len()) {
            let weights = [panel.as_ptr(), panel[PANEL_BLOCKS..].as_ptr()];
            for group in groups.clone().step_by(2) {
                let rows = self.rows.tiles.as_ptr().wrapping_add(group * blocks + first);
                // SAFETY: the assertions: rows and panel have these blocks, and there is room for the sums of all pairs and
                // groups, which are there from the second panel on.
                unsafe {
                    if group + 1 < groups.end {
                        let rows = [rows, rows.wrapping_add(blocks)];
                        shaped.multiply::<2>(rows, weights, count, sums, first > 0);
                        sums = sums.add(4 * TILE_FLOATS);
                    } else {
                        shaped.multiply::<1>([rows], weights, count, sums, first > 0);
                        sums = sums.add(2 * TILE_FLOATS);
                    }
                }
            }
        }
    }

    /// Writes what becomes of a pair's sums for a group of rows, `[2, 16, 16]`.
    #[inline(always)]
    fn finish(&self, (simd, units): (Avx512, Units), pair: &Pair<'_>, group: usize, sums: &[f32]) {
        assert!(sums.len() == 2 * TILE_FLOATS);
        let first = self.range.start + group * TILE_ROWS;
        for line in 0..TILE_ROWS.min(self.range.end - first) {
            let row = first + line;
            // SAFETY: a group has two tiles of 16 times 16 sums; the promise of who made the strip: tiles of rows have 16 lines of
            // 32 numbers.
            unsafe {
                let left = simd.load(sums.as_ptr().add(line * LANES));
                let right = simd.load(sums.as_ptr().add(TILE_FLOATS + line * LANES));
                match *pair {
                    Pair::Tiles(place, other) => {
                        self.write(simd, place, row, left);
                        if let Some(other) = other {
                            self.write(simd, other, row, right);
                        }
                    }
                    Pair::Gated {
                        kind, up, tile, to, ..
                    } => {
                        let opened = match kind {
                            Gate::Silu => opened(units, left, left),
                            Gate::Gelu => opened(units, left, gelu_exponent(simd, left)),
                        };
                        let tile_of_rows = row / TILE_ROWS * (up.rows() / BLOCK) + tile / 2;
                        let place = row % TILE_ROWS * BLOCK + tile % 2 * LANES;
                        let to = to.at(tile_of_rows).cast::<u16>().add(place);
                        store_half(simd.mul(opened, right), to);
                    }
                }
            }
        }
    }

    /// Writes 16 products of a row, or as many as the matrix has left, or adds them to what is there.
    ///
    /// # Safety
    /// What comes out has room for the row, and nobody else writes there.
    #[inline(always)]
    unsafe fn write(&self, simd: Avx512, place: Place<'_>, row: usize, products: <Avx512 as Simd>::F) {
        let (width, column) = (place.matrix.rows(), place.tile * LANES);
        let columns = LANES.min(width - column);
        // SAFETY: the caller's promise.
        unsafe {
            let to = place.out.at((self.first_row + row) * width + column);
            put(simd, products, to, columns, self.combine);
        }
    }
}

impl Dispatch {
    /// Matrix units, where this level has them.
    pub(crate) fn units(self) -> Option<Units> {
        matches!(self.0, super::Level::Amx).then(Units::here).flatten()
    }
}
