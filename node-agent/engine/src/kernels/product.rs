//! Tiles of weights times rows of activations.

use std::mem::MaybeUninit;

#[cfg(target_arch = "x86_64")]
use super::bf16::{Pair, Place};
use super::pool::{Fetch, Next, SharedMut};
use super::rows::{GROUP, Group, QuantizedRows};
use super::simd::{LANES, Simd};
use super::tile::multiply;
use super::vector::{gelu, silu};
use super::weights::{Matrix, Reading};
use super::{Compute, Operation};

/// Groups of rows that a piece of work holds: a tile stays in the first-level cache for all of them.
const GROUPS_PER_PIECE: usize = 8;
/// Rows of a piece of work.
const PIECE_ROWS: usize = GROUPS_PER_PIECE * GROUP;

/// What becomes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Combine {
    /// It is written.
    Store,
    /// It is added to what is there: a residual.
    Add,
}

/// What the gate of a feed-forward part does to its product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    /// x / (1 + e^-x).
    Silu,
    /// The tanh approximation. Source: Hendrycks & Gimpel 2016.
    Gelu,
}

/// A matrix and where its product goes, `[rows of x, rows of the matrix]`.
pub(crate) struct Target<'a> {
    pub(crate) matrix: &'a Matrix,
    pub(crate) out: &'a mut [f32],
}

/// The rows to multiply, in the forms that the matrices of one product ask for.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// `[rows, columns]`. Where all matrices are quantised only their number counts: a norm may be in the quantised ones
    /// alone, and so may rows of prompts.
    pub(crate) floats: &'a [f32],
    /// The same, quantised; not looked at by matrices of floats.
    pub(crate) quantized: &'a QuantizedRows,
}

impl Compute {
    /// Multiplies the same rows with several matrices, all at once.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub(crate) fn product(&self, rows: Rows<'_>, targets: &mut [Target<'_>], combine: Combine) {
        let parts = self.parts(targets.iter().map(|target| target.matrix));
        let mut tiles = Vec::with_capacity(targets.len());
        let mut total = 0;
        let mut count = 0;
        let of_prompts = rows.of_prompts(targets.iter().map(|target| target.matrix));
        for target in targets.iter_mut() {
            let matrix = target.matrix;
            count = rows.check(self, matrix, of_prompts);
            assert_eq!(target.out.len(), count * matrix.rows());
            tiles.push((total, matrix, SharedMut::new(target.out)));
            total += matrix.tiles();
        }
        #[cfg(target_arch = "x86_64")]
        self.with_units(rows, (count - of_prompts, of_prompts), combine, || {
            let all: Vec<Place<'_>> = tiles
                .iter()
                .flat_map(|&(_, matrix, out)| {
                    (0..matrix.tiles()).map(move |tile| Place { matrix, tile, out })
                })
                .collect();
            all.chunks(2)
                .map(|pair| Pair::Tiles(pair[0], pair.get(1).copied()))
                .collect()
        });
        let rows_of_parts = (count - of_prompts) * parts;
        let groups: Vec<Group> = self.groups(rows_of_parts).collect();
        let pieces: Vec<&[Group]> = groups.chunks(GROUPS_PER_PIECE).collect();
        let reading = targets.last().and_then(|target| target.matrix.next());
        let next = reading.map(|reading| self.fetches(reading));
        let columns = targets.first().map_or(0, |target| target.matrix.columns());
        self.pool.run_before(
            total * pieces.len(),
            at_once(rows_of_parts, columns),
            &|unit| {
                let (piece, tile) = (pieces[unit / total], unit % total);
                let index = tiles.partition_point(|(first, ..)| *first <= tile) - 1;
                let (first, matrix, out) = tiles[index];
                self.piece(Piece {
                    matrix,
                    tile: tile - first,
                    gate: None,
                    rows,
                    parts,
                    piece,
                    out,
                    combine,
                });
            },
            next.as_ref().map(|next| next as &Next<'_>),
        );
    }

    /// `gate(x G) * (x U)`: the first half of a feed-forward part. Those of prompts' rows are rounded for the next product and go
    /// to its rows, to which [`QuantizedRows::set_but_prompts`] adds the others; their places in `out` stay what they are.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub(crate) fn gated(
        &self,
        rows: Rows<'_>,
        gate: (&Matrix, Gate),
        up: &Matrix,
        out: &mut [f32],
        next: &mut QuantizedRows,
    ) {
        let of_prompts = rows.of_prompts([gate.0, up].into_iter());
        let count = rows.check(self, gate.0, of_prompts);
        assert_eq!((gate.0.rows(), gate.0.columns()), (up.rows(), up.columns()));
        assert_eq!(out.len(), count * up.rows());
        let _ = rows.check(self, up, of_prompts);
        let out = SharedMut::new(out);
        #[cfg(target_arch = "x86_64")]
        let to = next.room_for_prompts(of_prompts, up.rows());
        #[cfg(target_arch = "x86_64")]
        self.with_units(rows, (count - of_prompts, of_prompts), Combine::Store, || {
            let pair = |tile| Pair::Gated {
                gate: gate.0,
                kind: gate.1,
                up,
                tile,
                to,
            };
            (0..up.tiles()).map(pair).collect()
        });
        #[cfg(not(target_arch = "x86_64"))]
        let _ = next;
        let parts = self.parts([gate.0, up].into_iter());
        let rows_of_parts = (count - of_prompts) * parts;
        let groups: Vec<Group> = self.groups(rows_of_parts).collect();
        let pieces: Vec<&[Group]> = groups.chunks(GROUPS_PER_PIECE).collect();
        let total = up.tiles();
        let next = up.next().map(|reading| self.fetches(reading));
        self.pool.run_before(
            total * pieces.len(),
            at_once(rows_of_parts, 2 * up.columns()),
            &|unit| {
                self.piece(Piece {
                    matrix: up,
                    tile: unit % total,
                    gate: Some(gate),
                    rows,
                    parts,
                    piece: pieces[unit / total],
                    out,
                    combine: Combine::Store,
                });
            },
            next.as_ref().map(|next| next as &Next<'_>),
        );
    }

    /// Rows that each row is for products with these matrices.
    fn parts<'a>(&self, mut matrices: impl Iterator<Item = &'a Matrix>) -> usize {
        if matrices.any(Matrix::is_quantized) {
            self.rounding.parts()
        } else {
            1
        }
    }

    /// What each thread asks of memory while it waits for the next product.
    fn fetches<'a>(&self, reading: &'a Reading) -> impl Fn(usize) -> Fetch + Sync + 'a {
        let threads = self.pool.threads();
        // Not more than it reads.
        let bytes = self.dispatch.reach().min(reading.bytes() / threads);
        move |thread| Fetch::new(reading.share(thread, threads), bytes)
    }

    /// Multiplies the last rows, those of prompts, with the matrix units.
    #[cfg(target_arch = "x86_64")]
    fn with_units<'a>(
        &self,
        rows: Rows<'_>,
        (first, of_prompts): (usize, usize),
        combine: Combine,
        pairs: impl FnOnce() -> Vec<Pair<'a>>,
    ) {
        if of_prompts > 0 {
            let Some(units) = self.dispatch.units() else {
                panic!("rows for matrix units, where there are none")
            };
            // SAFETY: `check` has seen that matrices are quantised and as wide as the rows, and how long `out` is; these rows
            // of it are written here alone. Where they are rounded, room was made, for a multiple of 32.
            unsafe { self.multiply_units(units, rows.quantized.as_bf16(), first, &pairs(), combine) }
        }
    }

    fn piece(&self, piece: Piece<'_>) {
        // Full groups come first.
        if piece.piece.first().is_some_and(|group| group.rows == GROUP) {
            self.dispatch.run(Many(piece));
        } else {
            self.dispatch.run(Few(piece));
        }
    }
}

/// Most pieces of so many rows that a thread takes at once: some ten or twenty microseconds' work. (Sixty-four tiles of a
/// vocabulary's matrix for a single row were 1.2 MB, 40 microseconds.)
fn at_once(rows: usize, columns: usize) -> usize {
    // What memory gives limits a few rows, whose time hardly depends on their number.
    let of_a_piece = rows.clamp(4, PIECE_ROWS) * columns;
    ((1 << 17) / of_a_piece.max(1)).clamp(1, 16)
}

impl Rows<'_> {
    /// Rows that matrix units multiply, at the end: none where a matrix is not quantised.
    fn of_prompts<'a>(&self, mut matrices: impl Iterator<Item = &'a Matrix>) -> usize {
        if matrices.all(Matrix::is_quantized) {
            self.quantized.of_prompts()
        } else {
            0
        }
    }

    /// Checks that they fit a matrix and lie as this level wants them, the last ones for matrix units. Gives the number of rows.
    fn check(&self, compute: &Compute, matrix: &Matrix, of_prompts: usize) -> usize {
        assert!(matrix.columns() > 0 && self.floats.len().is_multiple_of(matrix.columns()));
        let count = self.floats.len() / matrix.columns();
        if matrix.is_quantized() {
            assert_eq!(self.quantized.columns(), matrix.columns());
            assert!(
                self.quantized.has(matrix.correction()),
                "rows were rounded for products with other formats"
            );
            assert_eq!(self.quantized.of_prompts(), of_prompts);
            assert_eq!(self.quantized.rounding(), compute.rounding);
            #[cfg(target_arch = "x86_64")]
            assert!(of_prompts == 0 || self.quantized.as_bf16().columns() == matrix.columns());
            let left = compute.groups((count - of_prompts) * compute.rounding.parts());
            assert!(self.quantized.groups().iter().copied().eq(left));
        }
        count
    }
}

/// One tile times some groups of rows.
struct Piece<'a> {
    matrix: &'a Matrix,
    tile: usize,
    gate: Option<(&'a Matrix, Gate)>,
    rows: Rows<'a>,
    /// Rows of the groups that a row of the product comes of: one after the other, all in one group.
    parts: usize,
    piece: &'a [Group],
    out: SharedMut<f32>,
    combine: Combine,
}

/// Products of a piece, `[rows, 16]`. Not zeroed: for a single row that would cost more than its product.
#[repr(align(64))]
pub(super) struct Products([MaybeUninit<f32>; PIECE_ROWS * LANES]);

impl Products {
    #[inline(always)]
    pub(super) fn new() -> Self {
        Self([MaybeUninit::uninit(); PIECE_ROWS * LANES])
    }

    /// The 16 places of a row.
    #[inline(always)]
    pub(super) fn row(&mut self, row: usize) -> *mut f32 {
        self.rows(row, 1)
    }

    /// The places of some rows, 16 each.
    #[inline(always)]
    pub(super) fn rows(&mut self, first: usize, count: usize) -> *mut f32 {
        self.0[first * LANES..(first + count) * LANES].as_mut_ptr().cast()
    }
}

/// A piece with full groups. Few rows are compiled by themselves: what many need of the stack would cost a single one a
/// tenth of its time.
struct Many<'a>(Piece<'a>);

/// A piece with fewer rows than a group has.
struct Few<'a>(Piece<'a>);

impl Operation for Many<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.0.run::<S, true>(simd);
    }
}

impl Operation for Few<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.0.run::<S, false>(simd);
    }
}

impl Piece<'_> {
    /// Writes the products of the piece's rows with a matrix, and gives their number.
    #[inline(always)]
    fn times<S: Simd, const MANY: bool>(&self, simd: S, matrix: &Matrix, products: &mut Products) -> usize {
        multiply::<S, MANY>(
            simd,
            matrix,
            self.tile,
            self.rows,
            (self.piece, self.parts),
            products,
        );
        let rows = self.piece.iter().map(|group| group.rows).sum::<usize>() / self.parts;
        if self.parts == 2 && matrix.is_quantized() {
            for row in 0..rows {
                // SAFETY: `multiply` has written both parts' numbers. The row's place is one of theirs, or of a row before.
                unsafe {
                    let [first, rest] = [2 * row, 2 * row + 1].map(|part| simd.load(products.row(part)));
                    simd.store(products.row(row), simd.add(first, rest));
                }
            }
        }
        rows
    }

    #[inline(always)]
    fn run<S: Simd, const MANY: bool>(self, simd: S) {
        let mut products = Products::new();
        let rows = self.times::<S, MANY>(simd, self.matrix, &mut products);
        if let Some((gate, kind)) = self.gate {
            let mut gates = Products::new();
            self.times::<S, MANY>(simd, gate, &mut gates);
            for row in 0..rows {
                // SAFETY: `times` has written the 16 numbers of each of these rows, in both.
                unsafe {
                    let place = products.row(row);
                    let x = simd.load(gates.row(row));
                    let opened = match kind {
                        Gate::Silu => silu(simd, x),
                        Gate::Gelu => gelu(simd, x),
                    };
                    simd.store(place, simd.mul(opened, simd.load(place)));
                }
            }
        }
        let (width, column) = (self.matrix.rows(), self.tile * LANES);
        let columns = LANES.min(width - column);
        let first_row = self.piece.first().map_or(0, |group| group.first_row) / self.parts;
        for row in 0..rows {
            let products = products.row(row);
            // SAFETY: `times` has written these numbers. `out` is `[rows, width]`, asserted where the
            // pieces are made; this piece alone writes these columns of these rows.
            unsafe {
                let to = self.out.at((first_row + row) * width + column);
                put(simd, simd.load(products), to, columns, self.combine);
            }
        }
    }
}

/// Writes the first of 16 products, or adds them to what is there.
///
/// # Safety
/// `to` has so many numbers, at most 16, that nobody else uses.
#[inline(always)]
pub(super) unsafe fn put<S: Simd>(simd: S, products: S::F, to: *mut f32, columns: usize, combine: Combine) {
    // SAFETY: the caller's promise.
    unsafe {
        if columns == LANES {
            let x = match combine {
                Combine::Store => products,
                Combine::Add => simd.add(simd.load(to), products),
            };
            simd.store(to, x);
            return;
        }
        let mut numbers = [0.0; LANES];
        simd.store(numbers.as_mut_ptr(), products);
        for (i, x) in numbers.into_iter().take(columns).enumerate() {
            let to = to.add(i);
            *to = match combine {
                Combine::Store => x,
                Combine::Add => *to + x,
            };
        }
    }
}
