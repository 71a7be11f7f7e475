//! The innermost loops: one tile of weights times some rows.

use std::marker::PhantomData;

use super::floats::{BrainFloat, HalfPrecision, SinglePrecision, float_group};
use super::lines::LINE;
use super::panel;
use super::product::{Products, Rows};
use super::rows::{BLOCK, GROUP, Group, GroupView};
use super::simd::{LANES, Simd};
use super::weights::{Format, Layout, Matrix, SIX_BIT_WORDS, six_bits_at, with_layout};

/// Writes the products of all rows of a piece, which has full groups only if there are `MANY`. Where a row comes in `parts`, so do
/// its products, and a matrix of floats takes each row once.
#[inline(always)]
pub(super) fn multiply<S: Simd, const MANY: bool>(
    simd: S,
    matrix: &Matrix,
    tile: usize,
    rows: Rows<'_>,
    (piece, parts): (&[Group], usize),
    products: &mut Products,
) {
    let data = matrix.tile(tile);
    let mut done = 0;
    let mut left = piece;
    if MANY {
        // Full groups come first.
        let full = piece.iter().take_while(|group| group.rows == GROUP).count();
        with_layout!(matrix.format(), L => {
            if full * GROUP >= panel::least_rows::<S, L>() {
                let out = products.rows(0, full * GROUP);
                let mut ahead = Ahead::new(data, matrix, full * passes::<S>(GROUP));
                // SAFETY: `out` has room for these rows.
                unsafe {
                    panel::times_groups::<S, L>(simd, data, &mut ahead, rows.quantized, &piece[..full], out);
                }
                (done, left) = (full * GROUP, &piece[full..]);
            }
        }, _ => {});
    }
    // Where a panel was, its products have asked already.
    let single = matches!(piece, [group] if group.rows == parts);
    let mut ahead = if done > 0 || single && matrix.is_read_ahead() {
        Ahead::nothing()
    } else {
        Ahead::new(
            data,
            matrix,
            left.iter().map(|group| passes::<S>(group.rows)).sum(),
        )
    };
    for &group in left {
        with_layout!(matrix.format(), L => {
            let out = products.rows(done, group.rows);
            let view = rows.quantized.view(group);
            let blocks = view.scales.len() / group.rows;
            assert!(blocks.is_multiple_of(L::SHARED));
            assert!(data.len() >= L::tile_bytes(blocks));
            // SAFETY: the tile has as many blocks as the rows, by the assertion; `view` cut its slices to
            // the group; `out` has room for the group's rows.
            unsafe { quantized_group::<S, L, MANY>(simd, data, &mut ahead, view, out) }
        }, _ => {
            let (columns, first, count) = (matrix.columns(), group.first_row / parts, group.rows / parts);
            let out = products.rows(done / parts, count);
            let x = &rows.floats[first * columns..(first + count) * columns];
            // SAFETY: a tile of floats holds 16 numbers for each column; `x` and `out` are those of the group's rows.
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
/// The tile has the group's blocks, a multiple of those that share scales; `out` has room for 16 numbers a row.
#[inline(always)]
unsafe fn quantized_group<S: Simd, L: Layout, const MANY: bool>(
    simd: S,
    tile: &[u8],
    ahead: &mut Ahead,
    view: GroupView<'_>,
    out: *mut f32,
) {
    // SAFETY: the caller's promise; the rows of the calls add up to the group's.
    unsafe {
        match view.group.rows {
            1 => rows_of_group::<S, L, 1, 1>(simd, tile, ahead, view, out),
            2 => rows_of_group::<S, L, 2, 2>(simd, tile, ahead, view, out),
            3 => rows_of_group::<S, L, 3, 3>(simd, tile, ahead, view, out),
            4 => rows_of_group::<S, L, 4, 4>(simd, tile, ahead, view, out),
            5 if S::ROWS == GROUP => rows_of_group::<S, L, 5, 5>(simd, tile, ahead, view, out),
            6 if S::ROWS == GROUP => rows_of_group::<S, L, 6, 6>(simd, tile, ahead, view, out),
            7 if S::ROWS == GROUP => rows_of_group::<S, L, 7, 7>(simd, tile, ahead, view, out),
            _ if !MANY => unreachable!("a full group among few rows"),
            _ if S::ROWS == GROUP => rows_of_group::<S, L, 8, 8>(simd, tile, ahead, view, out),
            _ => rows_of_group::<S, L, 4, 8>(simd, tile, ahead, view, out),
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
    ahead: &mut Ahead,
    view: GroupView<'_>,
    out: *mut f32,
) {
    let blocks = view.scales.len() / G;
    for first in (0..G).step_by(M) {
        // SAFETY: the caller's promise; rows `first` to `first + M` are in the group.
        unsafe {
            let x = Place::of::<L>(view, first);
            let sums = blocks_times_rows::<S, L, M, G>(simd, tile.as_ptr(), ahead, blocks, x);
            for (row, sum) in sums.into_iter().enumerate() {
                simd.store(out.add((first + row) * LANES), sum);
            }
        }
    }
}

/// Passes over a tile that a group of so many rows takes.
const fn passes<S: Simd>(rows: usize) -> usize {
    rows.div_ceil(S::ROWS)
}

/// What is asked of memory before it is needed, across the ends of pages and tiles: a few rows are done as fast as it
/// delivers. All passes over a tile ask for their share, so that memory has no rest while many rows are multiplied.
pub(super) struct Ahead {
    next: *const u8,
    /// A block's share, in lines of the cache.
    share: usize,
    /// Lines that nobody has asked for yet.
    left: usize,
}

impl Ahead {
    /// For so many passes over this tile.
    #[inline(always)]
    fn new(tile: &[u8], matrix: &Matrix, passes: usize) -> Self {
        let (lines, blocks) = (tile.len() / LINE, matrix.columns() / BLOCK * passes);
        Self {
            next: tile.as_ptr().wrapping_add(matrix.ahead()),
            share: lines.div_ceil(blocks.max(1)),
            left: lines,
        }
    }

    /// For passes that ask for nothing.
    pub(super) const fn nothing() -> Self {
        Self {
            next: std::ptr::null(),
            share: 0,
            left: 0,
        }
    }

    /// Asks for the next block's share. What lies there need not be there.
    #[inline(always)]
    pub(super) fn ask<S: Simd>(&mut self, simd: S) {
        let count = self.share.min(self.left);
        self.left -= count;
        for _ in 0..count {
            simd.prefetch(self.next);
            self.next = self.next.wrapping_add(LINE);
        }
    }
}

/// Where a block of a row, and of the rows after it in a group, begins.
#[derive(Clone, Copy)]
pub(super) struct Place {
    values: *const i32,
    scales: *const f32,
    corrections: *const i32,
}

impl Place {
    /// The first block of a row of the group.
    #[inline(always)]
    pub(super) fn of<L: Layout>(view: GroupView<'_>, row: usize) -> Self {
        assert!(row < view.group.rows);
        let start = const { L::CORRECTION.start() } * view.scales.len();
        Self {
            values: view.values.as_ptr().cast::<i32>().wrapping_add(row),
            scales: view.scales.as_ptr().wrapping_add(row),
            corrections: view.corrections.as_ptr().wrapping_add(start + row),
        }
    }

    /// So many blocks further, in a group of `G` rows; behind the last block it points nowhere.
    #[inline(always)]
    pub(super) fn further<L: Layout, const G: usize>(self, blocks: usize) -> Self {
        Self {
            values: self.values.wrapping_add(blocks * BLOCK / 4 * G),
            scales: self.scales.wrapping_add(blocks * G),
            corrections: self.corrections.wrapping_add(blocks * L::HALVES * G),
        }
    }
}

/// The innermost loop where no panel is worth its while: one tile, `M` rows of a group of `G`.
///
/// # Safety
/// `tile` holds `blocks` blocks of the layout, a multiple of those that share scales; `x` is the first of `M` rows in a group of
/// `G` with as many blocks.
#[inline(always)]
unsafe fn blocks_times_rows<S: Simd, L: Layout, const M: usize, const G: usize>(
    simd: S,
    tile: *const u8,
    ahead: &mut Ahead,
    blocks: usize,
    mut x: Place,
) -> [S::F; M] {
    let mut total = [simd.splat(0.0); M];
    for first in (0..blocks).step_by(L::SHARED) {
        // SAFETY: pointers walk block by block through what the caller promised.
        unsafe {
            let scales = Scales::<S, L>::begin(simd, tile.add(L::scales_at(first)));
            let mut numbers = tile.add(L::numbers_at(first));
            for block in 0..L::SHARED {
                ahead.ask(simd);
                add_block::<S, L, M, G, _>(
                    simd,
                    &mut total,
                    numbers,
                    x,
                    Packed {
                        scales: &scales,
                        block,
                    },
                );
                numbers = numbers.add(L::NUMBER_BYTES);
                x = x.further::<L, G>(1);
            }
        }
    }
    total
}

/// A block as it lies somewhere.
pub(super) trait Form<S: Simd> {
    /// Four columns of 16 rows, one byte each.
    ///
    /// # Safety
    /// `numbers` points at the block; `quad` is below 8.
    unsafe fn quad(&self, simd: S, numbers: *const u8, quad: usize) -> S::B;
    /// What products of the block, or of one of its halves, are multiplied with, and what the activations' sums are where
    /// the layout has minimums.
    ///
    /// # Safety
    /// `half` is below the layout's halves.
    unsafe fn scales(&self, simd: S, half: usize) -> [S::F; 2];
}

/// A block of a tile: one of those that share scales.
pub(super) struct Packed<'a, S: Simd, L: Layout> {
    pub(super) scales: &'a Scales<S, L>,
    pub(super) block: usize,
}

impl<S: Simd, L: Layout> Form<S> for Packed<'_, S, L> {
    #[inline(always)]
    unsafe fn quad(&self, simd: S, numbers: *const u8, quad: usize) -> S::B {
        // SAFETY: the caller's promise.
        unsafe { quad_of_numbers::<S, L>(simd, numbers, quad) }
    }
    #[inline(always)]
    unsafe fn scales(&self, simd: S, half: usize) -> [S::F; 2] {
        // SAFETY: the caller's promise; the block was one of these.
        unsafe { self.scales.of_half(simd, self.block, half) }
    }
}

/// Adds the products of a block with `M` rows to their totals.
///
/// Integer products of 16 rows of weights with `M` rows of activations are summed up exactly, beginning with what comes of
/// the numbers having been moved up by `OFFSET`, then scaled. Minimums are added by way of the activations' sums.
///
/// # Safety
/// `numbers` points at a block of the layout in this form; `x` is at the same block of the first of `M` rows in a group
/// of `G`.
#[inline(always)]
pub(super) unsafe fn add_block<S: Simd, L: Layout, const M: usize, const G: usize, B: Form<S>>(
    simd: S,
    total: &mut [S::F; M],
    numbers: *const u8,
    x: Place,
    block: B,
) {
    let mut scaled = [simd.splat(0.0); M];
    // SAFETY (all below): the caller's promise.
    for half in 0..L::HALVES {
        unsafe {
            let products = if L::BITS == 8 {
                products_of_bytes::<S, M, G>(simd, numbers, x)
            } else {
                products_of_quads::<S, L, M, G, B>(simd, numbers, &block, half, x)
            };
            let [scale, minimum] = block.scales(simd, half);
            for row in 0..M {
                let products = simd.to_float(products[row]);
                let x_scale = simd.splat(*x.scales.add(row));
                if L::HALVES == 1 {
                    // Both scales first: they are there before the products are.
                    total[row] = simd.fma(products, simd.mul(scale, x_scale), total[row]);
                } else if half == 0 {
                    scaled[row] = simd.mul(products, scale);
                } else {
                    scaled[row] = simd.fma(products, scale, scaled[row]);
                    total[row] = simd.fma(scaled[row], x_scale, total[row]);
                }
                if L::MINIMUM {
                    let sum = simd.splat(*x.corrections.cast::<f32>().add(half * G + row));
                    total[row] = simd.fma(minimum, sum, total[row]);
                }
            }
        }
    }
}

/// What products with a row begin with, for a half or for the block.
///
/// # Safety
/// `x` is at a block of a row of a group of `G`, of a layout with an offset; `half` is below its halves, and the group has
/// `row` more rows.
#[inline(always)]
unsafe fn excess<S: Simd, const G: usize>(simd: S, x: Place, half: usize, row: usize) -> S::I {
    // SAFETY: the caller's promise.
    simd.splat_i32(unsafe { *x.corrections.add(half * G + row) })
}

/// How `M` rows are summed up.
struct SummedUp<S, const M: usize>(PhantomData<S>);

impl<S: Simd, const M: usize> SummedUp<S, M> {
    /// Whether each has two sums of products, so that it does not wait for its own last product: a lone row, and a few
    /// where there are registers for it. (Two and four rows of nibbles with AVX-512: about a tenth faster.)
    const TWO: bool = M == 1 || M <= 4 && S::ROWS == GROUP;

    /// Whether the compiler is kept from an order of its own in adding up products of numbers of so many bits. Measured:
    /// where registers are few it spills four rows' sums; with AVX-512 it takes five to seven rows of nibbles one after the
    /// other, each of which then waits for itself (a quarter slower), and is better let alone with the others.
    const fn in_step(bits: usize) -> bool {
        if S::ROWS == GROUP {
            bits == 4 && M > 4 && M < GROUP
        } else {
            M == 4
        }
    }
}

/// Products of a half of a block, or of all of it where it has one scale, summed up exactly.
///
/// # Safety
/// `numbers` points at a block of the layout, whose bits are not 8, in this form; `x` is at the same block of the first of
/// `M` rows in a group of `G`; `half` is below `L::HALVES`.
#[inline(always)]
unsafe fn products_of_quads<S: Simd, L: Layout, const M: usize, const G: usize, B: Form<S>>(
    simd: S,
    numbers: *const u8,
    block: &B,
    half: usize,
    x: Place,
) -> [S::I; M] {
    let mut sums = [simd.splat_i32(0); M];
    if L::OFFSET > 0 {
        for (row, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *sum = unsafe { excess::<S, G>(simd, x, half, row) };
        }
    }
    let quads = half * (8 / L::HALVES)..(half + 1) * (8 / L::HALVES);
    let at_once = S::products_at_once(L::BITS).min(8 / L::HALVES);
    let mut first = quads.start;
    while first < quads.end {
        let mut even = [simd.no_products(); M];
        let mut odd = even;
        for (sum, even) in sums.iter_mut().zip(&mut even) {
            *even = simd.begin_products(sum);
        }
        for quad in first..first + at_once {
            // SAFETY: the caller's promise.
            unsafe {
                let weights = block.quad(simd, numbers, quad);
                for row in 0..M {
                    let x = simd.splat_i32(x.values.add(quad * G + row).read_unaligned());
                    let products = if SummedUp::<S, M>::TWO && quad % 2 == 1 {
                        &mut odd[row]
                    } else {
                        &mut even[row]
                    };
                    *products = simd.dot(*products, weights, x);
                }
                if SummedUp::<S, M>::in_step(L::BITS) {
                    even = simd.in_step(even);
                }
            }
        }
        for row in 0..M {
            sums[row] = simd.settle(sums[row], even[row]);
            if SummedUp::<S, M>::TWO {
                sums[row] = simd.settle(sums[row], odd[row]);
            }
        }
        first += at_once;
    }
    sums
}

/// Products of a block of whole bytes, 128 taken off each, summed up exactly.
///
/// # Safety
/// `numbers` points at a block of bytes; `x` is at the same block of the first of `M` rows in a group of `G`.
#[inline(always)]
unsafe fn products_of_bytes<S: Simd, const M: usize, const G: usize>(
    simd: S,
    numbers: *const u8,
    x: Place,
) -> [S::I; M] {
    let mut even = [simd.splat_i32(0); M];
    let mut odd = even;
    // SAFETY (all below): the caller's promise.
    if S::UNSIGNED {
        for (row, even) in even.iter_mut().enumerate() {
            *even = unsafe { excess::<S, G>(simd, x, 0, row) };
        }
    }
    for quad in 0..BLOCK / 4 {
        unsafe {
            let weights = simd.load_bytes(numbers.add(quad * 64));
            for row in 0..M {
                let x = simd.splat_i32(x.values.add(quad * G + row).read_unaligned());
                let sum = if SummedUp::<S, M>::TWO && quad % 2 == 1 {
                    &mut odd[row]
                } else {
                    &mut even[row]
                };
                *sum = simd.dot_bytes(*sum, weights, x);
            }
            if SummedUp::<S, M>::in_step(8) {
                even = simd.in_step(even);
            }
        }
    }
    if SummedUp::<S, M>::TWO {
        for (even, odd) in even.iter_mut().zip(odd) {
            *even = simd.add_i32(*even, odd);
        }
    }
    even
}

/// The scales of `L::SHARED` blocks of a tile.
pub(super) struct Scales<S: Simd, L: Layout> {
    /// Scale and minimum that the blocks share.
    scale: S::F,
    minimum: S::F,
    /// Factors of one byte, where there are any.
    factors: *const i8,
    /// Scales and minimums of each block, made of factors of six bits, where those are.
    made: [[S::F; 2]; 8],
    layout: PhantomData<L>,
}

impl<S: Simd, L: Layout> Scales<S, L> {
    /// # Safety
    /// The scales of `L::SHARED` blocks of the layout are at `from`.
    #[inline(always)]
    pub(super) unsafe fn begin(simd: S, from: *const u8) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = simd.load_f16(from.cast());
            let minimum = if L::MINIMUM {
                simd.load_f16(from.add(2 * LANES).cast())
            } else {
                scale
            };
            let factors = from.wrapping_add(L::HEAD_BYTES);
            let mut made = [[scale; 2]; 8];
            if L::SIX_BITS {
                let mut words = [simd.splat_i32(0); SIX_BIT_WORDS];
                for (word, place) in words.iter_mut().enumerate() {
                    *place = simd.load_i32(factors.add(4 * LANES * word).cast());
                }
                for (block, made) in made.iter_mut().enumerate() {
                    *made = [
                        simd.mul(scale, six_bits(simd, &words, 2 * block)),
                        simd.mul(minimum, six_bits(simd, &words, 2 * block + 1)),
                    ];
                }
            }
            Self {
                scale,
                minimum,
                factors: factors.cast(),
                made,
                layout: PhantomData,
            }
        }
    }

    /// What products are multiplied with, and what the activations' sums are where the layout has minimums.
    ///
    /// # Safety
    /// `block` is below `L::SHARED`, `half` below `L::HALVES`.
    #[inline(always)]
    pub(super) unsafe fn of_half(&self, simd: S, block: usize, half: usize) -> [S::F; 2] {
        if L::SIX_BITS {
            return self.made[block];
        }
        // SAFETY: the caller's promise.
        unsafe {
            let mut scale = self.scale;
            let mut minimum = self.minimum;
            if L::FACTORS {
                let factors = self.factors.add(block * LANES * L::SCALE_VECTORS);
                scale = simd.mul(scale, simd.load_i8(factors.add(half * LANES)));
                if L::MINIMUM {
                    let factor = simd.load_i8(factors.add((L::HALVES + half) * LANES));
                    minimum = simd.mul(minimum, factor);
                }
            }
            [scale, minimum]
        }
    }
}

/// A factor of six bits, of each of 16 rows. Not a closure: the processor's own instructions would not be put
/// into one, but called.
#[inline(always)]
fn six_bits<S: Simd>(simd: S, words: &[S::I; SIX_BIT_WORDS], index: usize) -> S::F {
    let (word, shift) = six_bits_at(index);
    let mut bits = simd.shift_right(words[word], shift);
    if shift > 26 {
        bits = simd.or_i32(bits, simd.shift_left(words[word + 1], 32 - shift));
    }
    simd.to_float(simd.and_i32(bits, simd.splat_i32(63)))
}

/// Four columns of 16 rows, one byte each.
///
/// # Safety
/// `numbers` points at a block of the layout; `quad` is below 8.
#[inline(always)]
pub(super) unsafe fn quad_of_numbers<S: Simd, L: Layout>(simd: S, numbers: *const u8, quad: usize) -> S::B {
    // SAFETY: the caller's promise: 64 bytes for as many quads as lie together, then the same for the bits above.
    unsafe {
        let together = 8 / L::BASE;
        let packed = simd.load_bytes(numbers.add(quad / together * 64));
        let mut bytes = match (L::BASE, quad % together) {
            (2, which) => simd.two_bits(packed, which),
            (8, _) => packed,
            (_, 0) => simd.low_nibbles(packed),
            _ => simd.high_nibbles(packed),
        };
        if L::ABOVE > 0 {
            let (vector, which) = (quad / L::ABOVE_TOGETHER, quad % L::ABOVE_TOGETHER);
            let above = simd.load_bytes(numbers.add(L::BASE_BYTES + vector * 64));
            let mask = (0xff_u8 >> (8 - L::ABOVE)) << L::BASE;
            bytes = simd.put_bits(bytes, above, which * L::ABOVE, L::BASE, mask);
        }
        bytes
    }
}
