//! Sixteen lanes of numbers, whatever the processor calls them.
//!
//! Every kernel is written once over [`Simd`]; a backend is a type whose value proves that the processor
//! has what its methods need. All backends give the same integers, and the same floats wherever the
//! processor has fused multiply-add.

/// Lanes of a vector of floats or of 32-bit integers; rows of weights in a tile.
pub(crate) const LANES: usize = 16;

/// Vectors of 16 floats, 16 integers or 64 bytes.
///
/// # Safety of the `unsafe` methods
/// Pointers must be valid for the stated number of elements; no alignment is asked for.
pub(crate) trait Simd: Copy {
    /// Sixteen `f32`.
    type F: Copy;
    /// Sixteen `i32`; of products that are not settled, maybe 32 `i16`.
    type I: Copy;
    /// Sixty-four bytes, four for each lane.
    type B: Copy;
    /// Rows of activations that a product holds in registers at once.
    const ROWS: usize;
    /// Vectors of sums of floats that are worked on at once: as many as keep additions from waiting for each other, and no
    /// more than registers hold beside what is added to them.
    const SUMS: usize;
    /// Whether [`Simd::dot_bytes`] multiplies bytes as they are; otherwise 128 is taken off each.
    const UNSIGNED: bool;

    fn splat(self, x: f32) -> Self::F;
    /// Reads 16 floats.
    unsafe fn load(self, from: *const f32) -> Self::F;
    /// Writes 16 floats.
    unsafe fn store(self, to: *mut f32, x: Self::F);
    /// Reads 16 half-precision floats.
    unsafe fn load_f16(self, from: *const u16) -> Self::F;
    /// Reads 16 brain floats: the upper halves of `f32`.
    unsafe fn load_bf16(self, from: *const u16) -> Self::F;
    /// Reads 16 small integers, as floats.
    unsafe fn load_i8(self, from: *const i8) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once where the processor can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger; `b` where either is not a number.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller; `b` where either is not a number.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, a: Self::F) -> Self::F;
    fn reduce_max(self, a: Self::F) -> f32;
    /// Whether a lane of `a` is larger than that of `b`.
    fn any_above(self, a: Self::F, b: Self::F) -> bool;
    /// The sum of the lanes, halves added to halves.
    fn reduce_add(self, a: Self::F) -> f32;
    /// To the nearest integers, ties to even.
    fn round(self, a: Self::F) -> Self::I;
    fn to_float(self, a: Self::I) -> Self::F;
    /// `a * 2^n` for exponents from -126 to 127.
    fn scale_by_power_of_two(self, a: Self::F, n: Self::I) -> Self::F;

    fn splat_i32(self, x: i32) -> Self::I;
    /// Reads 16 integers.
    unsafe fn load_i32(self, from: *const i32) -> Self::I;
    /// Writes 16 integers.
    unsafe fn store_i32(self, to: *mut i32, x: Self::I);
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I;
    fn and_i32(self, a: Self::I, b: Self::I) -> Self::I;
    fn or_i32(self, a: Self::I, b: Self::I) -> Self::I;
    /// Moves bits down by less than 32; zeros come in.
    fn shift_right(self, a: Self::I, bits: u32) -> Self::I;
    /// Moves bits up by less than 32.
    fn shift_left(self, a: Self::I, bits: u32) -> Self::I;
    /// Writes the lanes as 16 bytes; they must be from -128 to 127.
    unsafe fn store_i8(self, to: *mut i8, x: Self::I);
    /// No products yet.
    fn no_products(self) -> Self::I;
    /// Products that go on from a sum, which is then nothing; or none yet, where products are not as wide as sums.
    #[inline(always)]
    fn begin_products(self, sum: &mut Self::I) -> Self::I {
        std::mem::replace(sum, self.splat_i32(0))
    }
    /// How often products with weights of so many bits, at most 6, may be added before they are settled: a
    /// power of two, at most 8.
    fn products_at_once(bits: usize) -> usize;
    /// Adds to each lane the four products of its unsigned bytes (at most 63) with the signed bytes of `x`
    /// (from -127 on).
    fn dot(self, sum: Self::I, weights: Self::B, x: Self::I) -> Self::I;
    /// The sums as they are, all of them in registers: what is added before is added before, and nothing is put off.
    /// Compilers find orders of their own for sums of integers, and pay for them with registers that are not there.
    #[inline(always)]
    fn in_step<const M: usize>(self, sums: [Self::I; M]) -> [Self::I; M] {
        sums
    }
    /// Adds products to wide sums.
    fn settle(self, sum: Self::I, products: Self::I) -> Self::I;
    /// As [`Simd::dot`], for bytes up to 255; see [`Simd::UNSIGNED`].
    fn dot_bytes(self, sum: Self::I, weights: Self::B, x: Self::I) -> Self::I;

    /// Asks for the line at `from`, which may lie anywhere, to come as far as the second-level cache.
    fn prefetch(self, from: *const u8);
    /// Reads 64 bytes.
    unsafe fn load_bytes(self, from: *const u8) -> Self::B;
    /// Writes 64 bytes.
    unsafe fn store_bytes(self, to: *mut u8, x: Self::B);
    fn low_nibbles(self, a: Self::B) -> Self::B;
    fn high_nibbles(self, a: Self::B) -> Self::B;
    /// Bits `2 * which` and the next of each byte; `which` is below 4.
    fn two_bits(self, a: Self::B, which: usize) -> Self::B;
    /// Each byte with bits of `high` put in where `mask` has bits and it has none: those from `from` on go to where
    /// `mask` begins, `to`. They lie in one byte, before and after.
    fn put_bits(self, a: Self::B, high: Self::B, from: usize, to: usize, mask: u8) -> Self::B;
}

/// The exponential, within two units in the last place; below -87 it is 0 in effect (1e-38).
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::F) -> S::F {
    // Cephes: x = n ln 2 + r, a polynomial for e^r, then the exponent.
    // `x` stands second, so that what is not a number stays so.
    let x = simd.max(simd.splat(-87.0), simd.min(simd.splat(88.0), x));
    let n = simd.round(simd.mul(x, simd.splat(std::f32::consts::LOG2_E)));
    let whole = simd.to_float(n);
    let r = simd.fma(whole, simd.splat(-0.693_359_4), x);
    let r = simd.fma(whole, simd.splat(2.121_944_4e-4), r);
    let mut p = simd.splat(1.987_569_2e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = simd.fma(p, r, simd.splat(c));
    }
    let p = simd.fma(p, simd.mul(r, r), simd.add(r, simd.splat(1.0)));
    simd.scale_by_power_of_two(p, n)
}

/// Plain Rust, for processors without a backend of their own. LLVM makes what it can of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

macro_rules! lanes {
    (|$i:ident| $x:expr) => {
        std::array::from_fn(|$i| $x)
    };
}

impl Simd for Portable {
    type F = [f32; LANES];
    type I = [i32; LANES];
    type B = [u8; 64];
    const ROWS: usize = 4;
    const SUMS: usize = 8;
    const UNSIGNED: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::F {
        // SAFETY: the caller's promise; arrays of floats have no invalid values.
        unsafe { from.cast::<Self::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: Self::F) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Self::F>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> Self::F {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        lanes!(|i| half::f16::from_bits(bits[i]).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::F {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        lanes!(|i| f32::from_bits(u32::from(bits[i]) << 16))
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Self::F {
        // SAFETY: the caller's promise.
        let numbers = unsafe { from.cast::<[i8; LANES]>().read_unaligned() };
        lanes!(|i| f32::from(numbers[i]))
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        lanes!(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        lanes!(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        lanes!(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        lanes!(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // Without the instruction a fused product is a call of the C library: dozens of times slower.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            lanes!(|i| a[i].mul_add(b[i], c[i]))
        } else {
            lanes!(|i| a[i] * b[i] + c[i])
        }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        lanes!(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        lanes!(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        lanes!(|i| a[i].abs())
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn any_above(self, a: Self::F, b: Self::F) -> bool {
        a.iter().zip(&b).any(|(a, b)| a > b)
    }
    #[inline(always)]
    fn reduce_add(self, mut a: Self::F) -> f32 {
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                a[i] += a[i + half];
            }
            half /= 2;
        }
        a[0]
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::I {
        lanes!(|i| a[i].round_ties_even() as i32)
    }
    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        lanes!(|i| a[i] as f32)
    }
    #[inline(always)]
    fn scale_by_power_of_two(self, a: Self::F, n: Self::I) -> Self::F {
        lanes!(|i| a[i] * f32::from_bits(((n[i] + 127) as u32) << 23))
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load_i32(self, from: *const i32) -> Self::I {
        // SAFETY: the caller's promise; arrays of integers have no invalid values.
        unsafe { from.cast::<Self::I>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_i32(self, to: *mut i32, x: Self::I) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Self::I>().write_unaligned(x) }
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I {
        lanes!(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn and_i32(self, a: Self::I, b: Self::I) -> Self::I {
        lanes!(|i| a[i] & b[i])
    }
    #[inline(always)]
    fn or_i32(self, a: Self::I, b: Self::I) -> Self::I {
        lanes!(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn shift_right(self, a: Self::I, bits: u32) -> Self::I {
        lanes!(|i| (a[i].cast_unsigned() >> bits).cast_signed())
    }
    #[inline(always)]
    fn shift_left(self, a: Self::I, bits: u32) -> Self::I {
        lanes!(|i| a[i] << bits)
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, x: Self::I) {
        let bytes: [i8; LANES] = lanes!(|i| x[i] as i8);
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[i8; LANES]>().write_unaligned(bytes) }
    }
    #[inline(always)]
    fn no_products(self) -> Self::I {
        [0; LANES]
    }
    #[inline(always)]
    fn products_at_once(_: usize) -> usize {
        8
    }
    #[inline(always)]
    fn settle(self, sum: Self::I, products: Self::I) -> Self::I {
        self.add_i32(sum, products)
    }
    #[inline(always)]
    fn dot(self, sum: Self::I, weights: Self::B, x: Self::I) -> Self::I {
        lanes!(|i| {
            let x = x[i].to_le_bytes();
            let mut total = sum[i];
            for j in 0..4 {
                total += i32::from(weights[4 * i + j]) * i32::from(x[j] as i8);
            }
            total
        })
    }
    #[inline(always)]
    fn dot_bytes(self, sum: Self::I, weights: Self::B, x: Self::I) -> Self::I {
        self.dot(sum, weights, x)
    }
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> Self::B {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[u8; 64]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut u8, x: Self::B) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u8; 64]>().write_unaligned(x) }
    }
    #[inline(always)]
    fn low_nibbles(self, a: Self::B) -> Self::B {
        lanes!(|i| a[i] & 15)
    }
    #[inline(always)]
    fn high_nibbles(self, a: Self::B) -> Self::B {
        lanes!(|i| a[i] >> 4)
    }
    #[inline(always)]
    fn two_bits(self, a: Self::B, which: usize) -> Self::B {
        lanes!(|i| a[i] >> (2 * which) & 3)
    }
    #[inline(always)]
    fn put_bits(self, a: Self::B, high: Self::B, from: usize, to: usize, mask: u8) -> Self::B {
        lanes!(|i| a[i] | (u32::from(high[i]) << to >> from) as u8 & mask)
    }
}
