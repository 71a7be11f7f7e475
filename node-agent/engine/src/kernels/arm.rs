//! Backends for 64-bit ARM: NEON, with dot products, with 8-bit matrix instructions.
//!
//! A value of one of these types is made only by [`super::Level`], after the processor was asked; that is
//! why the intrinsics and instructions in the methods may be used. The dot products are written as
//! instructions: Rust has no stable intrinsics for them.
// Every `unsafe` block without a comment of its own is an intrinsic that the type's value stands for.
#![allow(clippy::undocumented_unsafe_blocks)]

use std::arch::aarch64::{
    float32x4_t, int8x16_t, int32x4_t, uint8x16_t, uint16x4_t, vabsq_f32, vadd_f32, vaddq_f32, vaddq_s32,
    vandq_s32, vandq_u8, vbslq_f32, vcgtq_f32, vcltq_f32, vcombine_s8, vcombine_s16, vcvtnq_s32_f32,
    vcvtq_f32_s32, vdivq_f32, vdupq_n_f32, vdupq_n_s8, vdupq_n_s32, vdupq_n_u8, veorq_u8, vfmaq_f32,
    vget_high_f32, vget_high_s8, vget_high_s16, vget_lane_f32, vget_low_f32, vget_low_s8, vget_low_s16,
    vld1_s8, vld1_u16, vld1q_f32, vld1q_s32, vld1q_u8, vmaxnmq_f32, vmaxnmvq_f32, vmaxvq_u32, vmovl_s8,
    vmovl_s16, vmovl_u16, vmull_s8, vmulq_f32, vorrq_s32, vorrq_u8, vorrq_u32, vpaddlq_s16, vpaddq_s32,
    vqmovn_s16, vqmovn_s32, vreinterpretq_f32_s32, vreinterpretq_f32_u32, vreinterpretq_s8_s32,
    vreinterpretq_s8_u8, vreinterpretq_s32_u32, vreinterpretq_u32_s32, vshlq_n_s32, vshlq_n_u32, vshlq_u8,
    vshlq_u32, vshrq_n_u8, vst1q_f32, vst1q_s8, vst1q_s32, vst1q_u8, vsubq_f32,
};
use std::arch::asm;

use super::simd::Simd;

/// No instructions beyond what every 64-bit ARM has.
pub(crate) const PLAIN: u8 = 0;
/// Dot products of signed bytes.
pub(crate) const DOT: u8 = 1;
/// Dot products of unsigned and signed bytes.
pub(crate) const MIXED_DOT: u8 = 2;

/// NEON with the instructions of a level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon<const HAS: u8>(());

impl<const HAS: u8> Neon<HAS> {
    /// # Safety
    /// The processor has `dotprod` if `HAS` is [`DOT`] or more, and `i8mm` if it is [`MIXED_DOT`].
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

macro_rules! quarters {
    (|$i:ident| $x:expr) => {
        unsafe {
            [
                {
                    let $i = 0;
                    $x
                },
                {
                    let $i = 1;
                    $x
                },
                {
                    let $i = 2;
                    $x
                },
                {
                    let $i = 3;
                    $x
                },
            ]
        }
    };
}

/// Adds to each lane the products of four signed bytes.
///
/// # Safety
/// The processor has `dotprod`.
#[inline(always)]
unsafe fn sdot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's promise; registers alone are touched.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// Adds to each lane the products of four unsigned bytes with four signed ones.
///
/// # Safety
/// The processor has `i8mm`.
#[inline(always)]
unsafe fn usdot(mut sum: int32x4_t, a: uint8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's promise; registers alone are touched.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "usdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// Adds to each lane the products of four signed bytes, by way of 16 bits: each product must fit there.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn dot_by_words(sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    unsafe {
        let low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
        let high = vpaddlq_s16(vmull_s8(vget_high_s8(a), vget_high_s8(b)));
        vaddq_s32(sum, vpaddq_s32(low, high))
    }
}

/// Half precision to floats.
///
/// # Safety
/// Four numbers are at `from`.
#[inline(always)]
unsafe fn widen_halves(from: *const u16) -> float32x4_t {
    // SAFETY: the caller's promise; the conversion is of the base instructions and touches registers alone.
    unsafe {
        let halves: uint16x4_t = vld1_u16(from);
        let floats: float32x4_t;
        asm!(
            "fcvtl {floats:v}.4s, {halves:v}.4h",
            floats = lateout(vreg) floats, halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags)
        );
        floats
    }
}

impl<const HAS: u8> Simd for Neon<HAS> {
    type F = [float32x4_t; 4];
    type I = [int32x4_t; 4];
    type B = [uint8x16_t; 4];
    // Thirty-two registers: four rows take sixteen sums of integers, beside weights and activations.
    const ROWS: usize = 4;
    const SUMS: usize = 4;
    const UNSIGNED: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        quarters!(|_i| vdupq_n_f32(x))
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::F {
        quarters!(|i| vld1q_f32(from.add(4 * i)))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: Self::F) {
        for (i, x) in x.into_iter().enumerate() {
            unsafe { vst1q_f32(to.add(4 * i), x) }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> Self::F {
        quarters!(|i| widen_halves(from.add(4 * i)))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::F {
        quarters!(|i| vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vld1_u16(from.add(4 * i))))))
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Self::F {
        unsafe {
            let words = [vmovl_s8(vld1_s8(from)), vmovl_s8(vld1_s8(from.add(8)))];
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(words[0]))),
                vcvtq_f32_s32(vmovl_s16(vget_high_s16(words[0]))),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(words[1]))),
                vcvtq_f32_s32(vmovl_s16(vget_high_s16(words[1]))),
            ]
        }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        quarters!(|i| vaddq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        quarters!(|i| vsubq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        quarters!(|i| vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        quarters!(|i| vdivq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        quarters!(|i| vfmaq_f32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        quarters!(|i| vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        quarters!(|i| vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        quarters!(|i| vabsq_f32(a[i]))
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F) -> f32 {
        unsafe { vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a[0], a[2]), vmaxnmq_f32(a[1], a[3]))) }
    }
    #[inline(always)]
    fn any_above(self, a: Self::F, b: Self::F) -> bool {
        unsafe {
            let above = [
                vorrq_u32(vcgtq_f32(a[0], b[0]), vcgtq_f32(a[1], b[1])),
                vorrq_u32(vcgtq_f32(a[2], b[2]), vcgtq_f32(a[3], b[3])),
            ];
            vmaxvq_u32(vorrq_u32(above[0], above[1])) != 0
        }
    }
    #[inline(always)]
    fn reduce_add(self, a: Self::F) -> f32 {
        unsafe {
            let sum = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            let sum = vadd_f32(vget_low_f32(sum), vget_high_f32(sum));
            vget_lane_f32::<0>(sum) + vget_lane_f32::<1>(sum)
        }
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::I {
        quarters!(|i| vcvtnq_s32_f32(a[i]))
    }
    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        quarters!(|i| vcvtq_f32_s32(a[i]))
    }
    #[inline(always)]
    fn scale_by_power_of_two(self, a: Self::F, n: Self::I) -> Self::F {
        quarters!(|i| {
            let power = vshlq_n_s32::<23>(vaddq_s32(n[i], vdupq_n_s32(127)));
            vmulq_f32(a[i], vreinterpretq_f32_s32(power))
        })
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        quarters!(|_i| vdupq_n_s32(x))
    }
    #[inline(always)]
    unsafe fn load_i32(self, from: *const i32) -> Self::I {
        quarters!(|i| vld1q_s32(from.add(4 * i)))
    }
    #[inline(always)]
    unsafe fn store_i32(self, to: *mut i32, x: Self::I) {
        let _ = quarters!(|i| vst1q_s32(to.add(4 * i), x[i]));
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I {
        quarters!(|i| vaddq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn and_i32(self, a: Self::I, b: Self::I) -> Self::I {
        quarters!(|i| vandq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn or_i32(self, a: Self::I, b: Self::I) -> Self::I {
        quarters!(|i| vorrq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn shift_right(self, a: Self::I, bits: u32) -> Self::I {
        // A shift to the left by less than nothing.
        quarters!(|i| {
            let by = vdupq_n_s32(-bits.cast_signed());
            vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a[i]), by))
        })
    }
    #[inline(always)]
    fn shift_left(self, a: Self::I, bits: u32) -> Self::I {
        quarters!(|i| {
            let by = vdupq_n_s32(bits.cast_signed());
            vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a[i]), by))
        })
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, x: Self::I) {
        unsafe {
            let low = vcombine_s16(vqmovn_s32(x[0]), vqmovn_s32(x[1]));
            let high = vcombine_s16(vqmovn_s32(x[2]), vqmovn_s32(x[3]));
            vst1q_s8(to, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
        }
    }
    #[inline(always)]
    fn no_products(self) -> Self::I {
        self.splat_i32(0)
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
        quarters!(|i| {
            let x = vreinterpretq_s8_s32(x[i]);
            // Bytes of at most 63 are the same with a sign.
            let signed = vreinterpretq_s8_u8(weights[i]);
            match HAS {
                PLAIN => dot_by_words(sum[i], signed, x),
                DOT => sdot(sum[i], signed, x),
                _ => usdot(sum[i], weights[i], x),
            }
        })
    }
    #[inline(always)]
    fn dot_bytes(self, sum: Self::I, weights: Self::B, x: Self::I) -> Self::I {
        quarters!(|i| {
            let x = vreinterpretq_s8_s32(x[i]);
            let signed = vreinterpretq_s8_u8(veorq_u8(weights[i], vdupq_n_u8(128)));
            match HAS {
                PLAIN => dot_by_words(sum[i], signed, x),
                _ => sdot(sum[i], signed, x),
            }
        })
    }
    #[inline(always)]
    fn prefetch(self, from: *const u8) {
        super::lines::prefetch(from);
    }
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> Self::B {
        quarters!(|i| vld1q_u8(from.add(16 * i)))
    }
    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut u8, x: Self::B) {
        for (i, x) in x.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { vst1q_u8(to.add(16 * i), x) }
        }
    }
    #[inline(always)]
    fn low_nibbles(self, a: Self::B) -> Self::B {
        quarters!(|i| vandq_u8(a[i], vdupq_n_u8(15)))
    }
    #[inline(always)]
    fn high_nibbles(self, a: Self::B) -> Self::B {
        quarters!(|i| vshrq_n_u8::<4>(a[i]))
    }
    #[inline(always)]
    fn two_bits(self, a: Self::B, which: usize) -> Self::B {
        quarters!(|i| {
            let moved = vshlq_u8(a[i], vdupq_n_s8(-(2 * which as i8)));
            vandq_u8(moved, vdupq_n_u8(3))
        })
    }
    #[inline(always)]
    fn put_bits(self, a: Self::B, high: Self::B, from: usize, to: usize, mask: u8) -> Self::B {
        quarters!(|i| {
            let moved = vshlq_u8(high[i], vdupq_n_s8(to as i8 - from as i8));
            vorrq_u8(a[i], vandq_u8(moved, vdupq_n_u8(mask)))
        })
    }
}
