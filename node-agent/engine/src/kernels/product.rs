//! Tiles of weights times rows of activations.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::pool::SharedMut;
use super::rows::{BLOCK, Group, GroupView, QuantizedRows, SUMS, groups};
use super::simd::{LANES, Simd};
use super::vector::{gelu, silu};
use super::weights::{Format, Layout, Matrix, with_layout};
use super::{Compute, Operation};

/// Groups of rows that a piece of work holds: a tile stays in the first-level cache for all of them.
const GROUPS_PER_PIECE: usize = 8;
/// Rows of a piece of work.
const PIECE_ROWS: usize = GROUPS_PER_PIECE * 8;

/// How far ahead weights are asked for: some hundred nanoseconds of reading.
const PREFETCH_BYTES: usize = 4096;

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
    /// `[rows, columns]`.
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
        let mut tiles = Vec::with_capacity(targets.len());
        let mut total = 0;
        let mut count = 0;
        for target in targets.iter_mut() {
            let matrix = target.matrix;
            count = rows.check(matrix);
            assert_eq!(target.out.len(), count * matrix.rows());
            tiles.push((total, matrix, SharedMut::new(target.out)));
            total += matrix.tiles();
        }
        let groups: Vec<Group> = groups(count).collect();
        let pieces: Vec<&[Group]> = groups.chunks(GROUPS_PER_PIECE).collect();
        self.pool.run(
            total * pieces.len(),
            grain(total * pieces.len(), self.pool.threads()),
            &|unit| {
                let (piece, tile) = (pieces[unit / total], unit % total);
                let index = tiles.partition_point(|(first, ..)| *first <= tile) - 1;
                let (first, matrix, out) = tiles[index];
                self.dispatch.run(Piece {
                    matrix,
                    tile: tile - first,
                    gate: None,
                    rows,
                    piece,
                    out,
                    combine,
                });
            },
        );
    }

    /// `gate(x G) * (x U)`: the first half of a feed-forward part.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub(crate) fn gated(&self, rows: Rows<'_>, gate: (&Matrix, Gate), up: &Matrix, out: &mut [f32]) {
        let count = rows.check(gate.0);
        assert_eq!((gate.0.rows(), gate.0.columns()), (up.rows(), up.columns()));
        assert_eq!(out.len(), count * up.rows());
        let _ = rows.check(up);
        let out = SharedMut::new(out);
        let groups: Vec<Group> = groups(count).collect();
        let pieces: Vec<&[Group]> = groups.chunks(GROUPS_PER_PIECE).collect();
        let total = up.tiles();
        self.pool.run(
            total * pieces.len(),
            grain(total * pieces.len(), self.pool.threads()),
            &|unit| {
                self.dispatch.run(Piece {
                    matrix: up,
                    tile: unit % total,
                    gate: Some(gate),
                    rows,
                    piece: pieces[unit / total],
                    out,
                    combine: Combine::Store,
                });
            },
        );
    }
}

/// Pieces that a thread takes at once: few enough to share out well, and long ways to read in memory.
fn grain(units: usize, threads: usize) -> usize {
    (units / (threads * 6)).clamp(1, 64)
}

impl Rows<'_> {
    /// Checks that they fit a matrix. Gives the number of rows.
    fn check(&self, matrix: &Matrix) -> usize {
        assert!(matrix.columns() > 0 && self.floats.len().is_multiple_of(matrix.columns()));
        let count = self.floats.len() / matrix.columns();
        if matrix.is_quantized() {
            assert_eq!(self.quantized.columns(), matrix.columns());
            let quantized = self.quantized.groups();
            assert_eq!(quantized.iter().map(|group| group.rows).sum::<usize>(), count);
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
    piece: &'a [Group],
    out: SharedMut<f32>,
    combine: Combine,
}

/// Products of a piece, `[rows, 16]`. Not zeroed: for a single row that would cost more than its product.
#[repr(align(64))]
struct Products([MaybeUninit<f32>; PIECE_ROWS * LANES]);

impl Products {
    #[inline(always)]
    fn new() -> Self {
        Self([MaybeUninit::uninit(); PIECE_ROWS * LANES])
    }

    /// The 16 places of a row.
    #[inline(always)]
    fn row(&mut self, row: usize) -> *mut f32 {
        self.0[row * LANES..(row + 1) * LANES].as_mut_ptr().cast()
    }
}

impl Operation for Piece<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut products = Products::new();
        multiply(simd, self.matrix, self.tile, self.rows, self.piece, &mut products);
        let rows: usize = self.piece.iter().map(|group| group.rows).sum();
        if let Some((gate, kind)) = self.gate {
            let mut gates = Products::new();
            multiply(simd, gate, self.tile, self.rows, self.piece, &mut gates);
            for row in 0..rows {
                // SAFETY: `multiply` has written the 16 numbers of each of these rows, in both.
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
        let first_row = self.piece.first().map_or(0, |group| group.first_row);
        for row in 0..rows {
            let products = products.row(row);
            // SAFETY: `multiply` has written these numbers. `out` is `[rows, width]`, asserted where the
            // pieces are made; this piece alone writes these columns of these rows.
            unsafe {
                let place = self.out.at((first_row + row) * width + column);
                if columns == LANES {
                    let mut x = simd.load(products);
                    if self.combine == Combine::Add {
                        x = simd.add(simd.load(place), x);
                    }
                    simd.store(place, x);
                } else {
                    for i in 0..columns {
                        let (place, x) = (place.add(i), *products.add(i));
                        *place = if self.combine == Combine::Add {
                            *place + x
                        } else {
                            x
                        };
                    }
                }
            }
        }
    }
}

/// Writes the products of all rows of a piece.
#[inline(always)]
fn multiply<S: Simd>(
    simd: S,
    matrix: &Matrix,
    tile: usize,
    rows: Rows<'_>,
    piece: &[Group],
    products: &mut Products,
) {
    let data = matrix.tile(tile);
    let mut done = 0;
    for &group in piece {
        // The last row's place is looked up first: there is room for the whole group.
        let _ = products.row(done + group.rows - 1);
        let out = products.row(done);
        with_layout!(matrix.format(), L => {
            let view = rows.quantized.view(group);
            let blocks = view.scales.len() / group.rows;
            assert!(blocks % L::SHARED == 0);
            assert!(data.len() >= blocks * L::NUMBER_BYTES + blocks / L::SHARED * L::SCALE_BYTES);
            // SAFETY: the tile has as many blocks as the rows, by the assertion; `view` cut its slices to
            // the group; `out` has room for the group's rows.
            unsafe { quantized_group::<S, L>(simd, data, view, out) }
        }, _ => {
            let columns = matrix.columns();
            let x = &rows.floats[group.first_row * columns..(group.first_row + group.rows) * columns];
            // SAFETY: a tile of floats holds 16 numbers for each column; `x` and `out` are the group's.
            unsafe {
                match matrix.format() {
                    Format::F16 => float_group::<S, HalfPrecision>(simd, data, x, columns, out),
                    Format::Bf16 => float_group::<S, BrainFloat>(simd, data, x, columns, out),
                    _ => float_group::<S, SinglePrecision>(simd, data, x, columns, out),
                }
            }
        });
        done += group.rows;
    }
}

/// Cuts a group into as many rows as the registers hold.
///
/// # Safety
/// The tile has the group's blocks; `out` has room for 16 numbers a row.
#[inline(always)]
unsafe fn quantized_group<S: Simd, L: Layout>(simd: S, tile: &[u8], view: GroupView<'_>, out: *mut f32) {
    // SAFETY: the caller's promise; the rows of the calls add up to the group's.
    unsafe {
        match (view.group.rows, S::ROWS) {
            (1, _) => rows_of_group::<S, L, 1, 1>(simd, tile, view, out),
            (2, _) => rows_of_group::<S, L, 2, 2>(simd, tile, view, out),
            (4, 2) => rows_of_group::<S, L, 2, 4>(simd, tile, view, out),
            (4, _) => rows_of_group::<S, L, 4, 4>(simd, tile, view, out),
            (_, 2) => rows_of_group::<S, L, 2, 8>(simd, tile, view, out),
            (_, 4) => rows_of_group::<S, L, 4, 8>(simd, tile, view, out),
            _ => rows_of_group::<S, L, 8, 8>(simd, tile, view, out),
        }
    }
}

/// All rows of a group of `G`, `M` at a time.
///
/// # Safety
/// As [`quantized_group`]; the group has `G` rows, and `M` divides `G`.
#[inline(always)]
unsafe fn rows_of_group<S: Simd, L: Layout, const M: usize, const G: usize>(
    simd: S,
    tile: &[u8],
    view: GroupView<'_>,
    out: *mut f32,
) {
    let blocks = view.scales.len() / G;
    for first in (0..G).step_by(M) {
        // SAFETY: the caller's promise; rows `first` to `first + M` are in the group.
        unsafe {
            let sums = blocks_times_rows::<S, L, M, G>(
                simd,
                tile.as_ptr(),
                blocks,
                view.values.as_ptr().cast::<i32>().add(first),
                view.scales.as_ptr().add(first),
                view.sums.as_ptr().add(first),
            );
            for (row, sum) in sums.into_iter().enumerate() {
                simd.store(out.add((first + row) * LANES), sum);
            }
        }
    }
}

/// The innermost loop: one tile, `M` rows of a group of `G`.
///
/// For each block, integer products of 16 rows of weights with `M` rows of activations are summed up
/// exactly, then scaled. What the numbers were moved up by (`OFFSET`) and the minimums are added by way of
/// the activations' sums.
///
/// # Safety
/// `tile` holds `blocks` blocks of the layout; `values`, `scales` and `sums` point at the first of `M` rows
/// in a group of `G` with as many blocks.
#[inline(always)]
unsafe fn blocks_times_rows<S: Simd, L: Layout, const M: usize, const G: usize>(
    simd: S,
    tile: *const u8,
    blocks: usize,
    mut values: *const i32,
    mut scales: *const f32,
    mut sums: *const f32,
) -> [S::F; M] {
    let mut total = [simd.splat(0.0); M];
    let mut numbers = tile;
    // SAFETY (all below): pointers walk block by block through what the caller promised.
    let mut factors = unsafe { tile.add(blocks * L::NUMBER_BYTES) };
    for _ in 0..blocks / L::SHARED {
        unsafe {
            let mut scales_of_block = Scales::<S, L>::begin(simd, factors);
            factors = factors.add(L::SCALE_BYTES);
            for _ in 0..L::SHARED {
                if M == 1 {
                    // One row is done as fast as memory delivers: ask early, across the ends of pages and
                    // tiles.
                    for line in 0..L::NUMBER_BYTES / 64 {
                        simd.prefetch(numbers.wrapping_add(PREFETCH_BYTES + line * 64));
                    }
                }
                let quads_of_half = 8 / L::HALVES;
                for half in 0..L::HALVES {
                    // Two sums each, so that a lone row does not wait for its own last product.
                    let mut even = [simd.splat_i32(0); M];
                    let mut odd = [simd.splat_i32(0); M];
                    for quad in half * quads_of_half..(half + 1) * quads_of_half {
                        let weights = quad_of_numbers::<S, L>(simd, numbers, quad);
                        for row in 0..M {
                            let x = simd.splat_i32(values.add(quad * G + row).read_unaligned());
                            let sum = if M == 1 && quad % 2 == 1 {
                                &mut odd[row]
                            } else {
                                &mut even[row]
                            };
                            *sum = if L::BITS == 8 {
                                simd.dot_wide(*sum, weights, x)
                            } else {
                                simd.dot(*sum, weights, x)
                            };
                        }
                    }
                    let (scale, shift) = scales_of_block.of_half(simd, half);
                    let which = if L::HALVES == 1 { 2 } else { half };
                    for row in 0..M {
                        let sum = if M == 1 {
                            simd.add_i32(even[row], odd[row])
                        } else {
                            even[row]
                        };
                        let scale = simd.mul(scale, simd.splat(*scales.add(row)));
                        total[row] = simd.fma(simd.to_float(sum), scale, total[row]);
                        total[row] = simd.fma(shift, simd.splat(*sums.add(which * G + row)), total[row]);
                    }
                }
                scales_of_block.next();
                numbers = numbers.add(L::NUMBER_BYTES);
                values = values.add(BLOCK / 4 * G);
                scales = scales.add(G);
                sums = sums.add(SUMS * G);
            }
        }
    }
    total
}

/// The scales of a tile's blocks, as the loop comes to them.
struct Scales<S: Simd, L: Layout> {
    /// Scale and minimum that `L::SHARED` blocks share.
    scale: S::F,
    minimum: S::F,
    /// Factors of the block, where there are any.
    factors: *const i8,
    layout: PhantomData<L>,
}

impl<S: Simd, L: Layout> Scales<S, L> {
    /// # Safety
    /// The scales of `L::SHARED` blocks of the layout are at `from`.
    #[inline(always)]
    unsafe fn begin(simd: S, from: *const u8) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = simd.load_f16(from.cast());
            let minimum = if L::MINIMUM {
                simd.load_f16(from.add(2 * LANES).cast())
            } else {
                scale
            };
            Self {
                scale,
                minimum,
                factors: from.cast::<i8>().wrapping_add(L::HEAD_BYTES),
                layout: PhantomData,
            }
        }
    }

    /// What products are multiplied with, and what the activations' sums are.
    ///
    /// # Safety
    /// Fewer than `L::SHARED` blocks have been passed by.
    #[inline(always)]
    unsafe fn of_half(&self, simd: S, half: usize) -> (S::F, S::F) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut scale = self.scale;
            let mut minimum = self.minimum;
            if L::FACTORS {
                scale = simd.mul(scale, simd.load_i8(self.factors.add(half * LANES)));
                if L::MINIMUM {
                    let factors = simd.load_i8(self.factors.add((L::HALVES + half) * LANES));
                    minimum = simd.mul(minimum, factors);
                }
            }
            if L::MINIMUM {
                (scale, minimum)
            } else {
                (scale, simd.mul(scale, simd.splat(-f32::from(L::OFFSET))))
            }
        }
    }

    #[inline(always)]
    fn next(&mut self) {
        self.factors = self.factors.wrapping_add(LANES * L::SCALE_VECTORS);
    }
}

/// Four columns of 16 rows, one byte each.
///
/// # Safety
/// `numbers` points at a block of the layout; `quad` is below 8.
#[inline(always)]
unsafe fn quad_of_numbers<S: Simd, L: Layout>(simd: S, numbers: *const u8, quad: usize) -> S::B {
    // SAFETY: the caller's promise: 64 bytes a quad, or a pair of quads, then 8 bytes a quad and plane.
    unsafe {
        if L::BITS == 8 {
            return simd.load_bytes(numbers.add(quad * 64));
        }
        let pair = simd.load_bytes(numbers.add(quad / 2 * 64));
        let mut bytes = if quad.is_multiple_of(2) {
            simd.low_nibbles(pair)
        } else {
            simd.high_nibbles(pair)
        };
        for plane in 0..L::PLANES {
            let mask = numbers
                .add(256 + plane * 64 + quad * 8)
                .cast::<u64>()
                .read_unaligned();
            bytes = simd.add_where(bytes, mask, 16 << plane);
        }
        bytes
    }
}

/// A number format of weights that are not quantised.
trait FloatFormat {
    const BYTES: usize;
    /// # Safety
    /// 16 numbers are at `from`.
    unsafe fn load<S: Simd>(simd: S, from: *const u8) -> S::F;
}

struct SinglePrecision;
struct HalfPrecision;
struct BrainFloat;

impl FloatFormat for SinglePrecision {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const u8) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { simd.load(from.cast()) }
    }
}

impl FloatFormat for HalfPrecision {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const u8) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { simd.load_f16(from.cast()) }
    }
}

impl FloatFormat for BrainFloat {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const u8) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { simd.load_bf16(from.cast()) }
    }
}

/// Rows of floats, four at a time.
///
/// # Safety
/// `tile` holds 16 numbers for each column; `out` has room for 16 numbers for each row of `x`.
#[inline(always)]
unsafe fn float_group<S: Simd, W: FloatFormat>(
    simd: S,
    tile: &[u8],
    x: &[f32],
    columns: usize,
    out: *mut f32,
) {
    assert!(tile.len() >= columns * LANES * W::BYTES);
    let rows = x.len() / columns;
    let mut row = 0;
    while row < rows {
        // SAFETY: the caller's promise; each call takes no more rows than are left.
        unsafe {
            let (x, out) = (x.as_ptr().add(row * columns), out.add(row * LANES));
            if rows - row >= 4 && S::ROWS >= 4 {
                float_rows::<S, W, 4>(simd, tile.as_ptr(), x, columns, out);
                row += 4;
            } else {
                float_rows::<S, W, 1>(simd, tile.as_ptr(), x, columns, out);
                row += 1;
            }
        }
    }
}

/// # Safety
/// As [`float_group`], for `M` rows.
#[inline(always)]
unsafe fn float_rows<S: Simd, W: FloatFormat, const M: usize>(
    simd: S,
    tile: *const u8,
    x: *const f32,
    columns: usize,
    out: *mut f32,
) {
    let mut sums = [[simd.splat(0.0); M]; 2];
    for column in 0..columns {
        // SAFETY: the caller's promise.
        unsafe {
            let weights = W::load(simd, tile.add(column * LANES * W::BYTES));
            for row in 0..M {
                let x = simd.splat(*x.add(row * columns + column));
                let sum = &mut sums[column % 2][row];
                *sum = simd.fma(weights, x, *sum);
            }
        }
    }
    for row in 0..M {
        // SAFETY: the caller's promise.
        unsafe { simd.store(out.add(row * LANES), simd.add(sums[0][row], sums[1][row])) }
    }
}
