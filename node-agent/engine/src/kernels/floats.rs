//! One tile of floats times some rows: what is not quantised, and everything where nothing may be rounded.

use super::simd::{LANES, Simd};

/// A number format of weights that are not quantised.
pub(super) trait FloatFormat {
    const BYTES: usize;
    /// # Safety
    /// 16 numbers are at `from`.
    unsafe fn load<S: Simd>(simd: S, from: *const u8) -> S::F;
}

pub(super) struct SinglePrecision;
pub(super) struct HalfPrecision;
pub(super) struct BrainFloat;

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

/// Rows of floats, four at a time where registers hold their sums, else two.
///
/// # Safety
/// `tile` holds 16 numbers for each column; `out` has room for 16 numbers for each row of `x`.
#[inline(always)]
pub(super) unsafe fn float_group<S: Simd, W: FloatFormat>(
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
            if rows - row >= 4 && S::SUMS >= 2 * 4 {
                float_rows::<S, W, 4>(simd, tile.as_ptr(), x, columns, out);
                row += 4;
            } else if rows - row >= 2 {
                float_rows::<S, W, 2>(simd, tile.as_ptr(), x, columns, out);
                row += 2;
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
