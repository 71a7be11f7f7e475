//! Backends for x86-64: AVX-512 with VNNI, AVX2 with AVX-VNNI, AVX2.
//!
//! A value of one of these types is made only by [`super::Level`], after the processor was asked; that is
//! why the intrinsics in the methods may be called.
// Every `unsafe` block without a comment of its own is an intrinsic that the type's value stands for.
#![allow(clippy::undocumented_unsafe_blocks)]

use std::arch::asm;
use std::arch::x86_64::{
    __cpuid, __m256, __m256i, __m512, __m512i, _CMP_GT_OQ, _mm_add_ps, _mm_add_ss, _mm_cvtsi32_si128,
    _mm_cvtss_f32, _mm_loadl_epi64, _mm_loadu_si128, _mm_max_ps, _mm_max_ss, _mm_movehl_ps, _mm_packs_epi16,
    _mm_shuffle_ps, _mm_storeu_si128, _mm256_abs_epi8, _mm256_add_epi16, _mm256_add_epi32, _mm256_add_ps,
    _mm256_and_si256, _mm256_andnot_ps, _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_castsi256_si128,
    _mm256_cmp_ps, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps,
    _mm256_cvtps_epi32, _mm256_div_ps, _mm256_dpbusd_avx_epi32, _mm256_extractf128_ps,
    _mm256_extracti128_si256, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16,
    _mm256_maddubs_epi16, _mm256_max_ps, _mm256_min_ps, _mm256_movemask_ps, _mm256_mul_ps, _mm256_or_ps,
    _mm256_or_si256, _mm256_packs_epi32, _mm256_permute4x64_epi64, _mm256_set1_epi8, _mm256_set1_epi16,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_sign_epi8, _mm256_sll_epi16, _mm256_sll_epi32,
    _mm256_slli_epi32, _mm256_srl_epi16, _mm256_srl_epi32, _mm256_srli_epi16, _mm256_storeu_ps,
    _mm256_storeu_si256, _mm256_sub_ps, _mm256_xor_si256, _mm512_abs_ps, _mm512_add_epi32, _mm512_add_ps,
    _mm512_and_si512, _mm512_castps_si512, _mm512_castps512_ps256, _mm512_castsi512_ps, _mm512_cmp_ps_mask,
    _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_cvtps_epi32,
    _mm512_cvtsepi32_epi8, _mm512_div_ps, _mm512_dpbusd_epi32, _mm512_extracti64x4_epi64, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps, _mm512_or_si512,
    _mm512_reduce_max_ps, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_sll_epi16,
    _mm512_sll_epi32, _mm512_slli_epi32, _mm512_srl_epi16, _mm512_srl_epi32, _mm512_srli_epi16,
    _mm512_storeu_ps, _mm512_storeu_si512, _mm512_sub_ps,
};

use super::simd::Simd;

/// AVX-512 F, BW, VL and VNNI.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

/// AVX2, FMA and F16C; with `VNNI` also AVX-VNNI.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2<const VNNI: bool>(());

/// Whether AMD made this processor.
pub(super) fn is_of_amd() -> bool {
    let id = __cpuid(0);
    [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD"
}

impl Avx512 {
    /// # Safety
    /// The processor has AVX-512 F, BW, VL, DQ and VNNI.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

impl<const VNNI: bool> Avx2<VNNI> {
    /// # Safety
    /// The processor has AVX2, FMA and F16C, and AVX-VNNI if `VNNI`.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    const ROWS: usize = 8;
    const SUMS: usize = 16;
    const UNSIGNED: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: __m512) {
        unsafe { _mm512_storeu_ps(to, x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> __m512 {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    fn any_above(self, a: __m512, b: __m512) -> bool {
        unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) != 0 }
    }
    #[inline(always)]
    fn reduce_add(self, a: __m512) -> f32 {
        unsafe {
            let high = _mm512_castps_si512(a);
            let high = _mm256_castsi256_ps(_mm512_extracti64x4_epi64::<1>(high));
            reduce_add_256(_mm256_add_ps(_mm512_castps512_ps256(a), high))
        }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512i {
        unsafe { _mm512_cvtps_epi32(a) }
    }
    #[inline(always)]
    fn to_float(self, a: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    fn scale_by_power_of_two(self, a: __m512, n: __m512i) -> __m512 {
        unsafe {
            let power = _mm512_slli_epi32::<23>(_mm512_add_epi32(n, _mm512_set1_epi32(127)));
            _mm512_mul_ps(a, _mm512_castsi512_ps(power))
        }
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn load_i32(self, from: *const i32) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store_i32(self, to: *mut i32, x: __m512i) {
        unsafe { _mm512_storeu_si512(to.cast(), x) }
    }
    #[inline(always)]
    fn add_i32(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    fn and_i32(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    fn or_i32(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    fn shift_right(self, a: __m512i, bits: u32) -> __m512i {
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(bits.cast_signed())) }
    }
    #[inline(always)]
    fn shift_left(self, a: __m512i, bits: u32) -> __m512i {
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(bits.cast_signed())) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, x: __m512i) {
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtsepi32_epi8(x)) }
    }
    #[inline(always)]
    fn no_products(self) -> __m512i {
        self.splat_i32(0)
    }
    #[inline(always)]
    fn products_at_once(_: usize) -> usize {
        8
    }
    #[inline(always)]
    fn in_step<const M: usize>(self, mut sums: [__m512i; M]) -> [__m512i; M] {
        unsafe { in_wide_registers(&mut sums) }
        sums
    }
    #[inline(always)]
    fn settle(self, sum: __m512i, products: __m512i) -> __m512i {
        self.add_i32(sum, products)
    }
    #[inline(always)]
    fn dot(self, sum: __m512i, weights: __m512i, x: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sum, weights, x) }
    }
    #[inline(always)]
    fn dot_bytes(self, sum: __m512i, weights: __m512i, x: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sum, weights, x) }
    }
    #[inline(always)]
    fn prefetch(self, from: *const u8) {
        super::lines::prefetch(from);
    }
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut u8, x: __m512i) {
        unsafe { _mm512_storeu_si512(to.cast(), x) }
    }
    #[inline(always)]
    fn low_nibbles(self, a: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(a, _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    fn high_nibbles(self, a: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(a), _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    fn two_bits(self, a: __m512i, which: usize) -> __m512i {
        unsafe {
            let moved = _mm512_srl_epi16(a, _mm_cvtsi32_si128(2 * which as i32));
            _mm512_and_si512(moved, _mm512_set1_epi8(3))
        }
    }
    #[inline(always)]
    fn put_bits(self, a: __m512i, high: __m512i, from: usize, to: usize, mask: u8) -> __m512i {
        // Bits of a neighbour come in where the mask has none.
        unsafe {
            let moved = if from > to {
                _mm512_srl_epi16(high, _mm_cvtsi32_si128((from - to) as i32))
            } else {
                _mm512_sll_epi16(high, _mm_cvtsi32_si128((to - from) as i32))
            };
            _mm512_or_si512(a, _mm512_and_si512(moved, _mm512_set1_epi8(mask.cast_signed())))
        }
    }
}

/// # Safety
/// The processor has AVX.
#[inline(always)]
unsafe fn reduce_add_256(a: __m256) -> f32 {
    unsafe {
        let sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
        _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps::<1>(sum, sum)))
    }
}

/// Does nothing, to numbers that are in registers for it.
///
/// # Safety
/// The processor has AVX.
#[inline]
#[target_feature(enable = "avx")]
unsafe fn in_registers(x: &mut [[__m256i; 2]; 4]) {
    let [[a, b], [c, d], [e, f], [g, h]] = x;
    // SAFETY: no instruction stands there; the caller's promise is for the registers.
    unsafe {
        asm!(
            "/* {0} {1} {2} {3} {4} {5} {6} {7} */",
            inout(ymm_reg) * a,
            inout(ymm_reg) * b,
            inout(ymm_reg) * c,
            inout(ymm_reg) * d,
            inout(ymm_reg) * e,
            inout(ymm_reg) * f,
            inout(ymm_reg) * g,
            inout(ymm_reg) * h,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
}

/// As [`in_registers`], for five to seven sums.
///
/// # Safety
/// The processor has AVX-512 F.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn in_wide_registers<const M: usize>(x: &mut [__m512i; M]) {
    macro_rules! all {
        ($($i:literal)*) => {
            // SAFETY: no instruction stands there; the caller's promise is for the registers.
            unsafe {
                asm!(
                    concat!("/*", $(" {", $i, "}",)* " */"),
                    $(inout(zmm_reg) x[$i],)*
                    options(pure, nomem, nostack, preserves_flags)
                )
            }
        };
    }
    match M {
        5 => all!(0 1 2 3 4),
        6 => all!(0 1 2 3 4 5),
        7 => all!(0 1 2 3 4 5 6),
        _ => {}
    }
}

macro_rules! halves {
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
            ]
        }
    };
}

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    type B = [__m256i; 2];
    // Sixteen registers: four rows take eight sums of products, beside weights and activations. Sums of floats
    // wait in memory for the end of a block.
    const ROWS: usize = 4;
    const SUMS: usize = 4;
    const UNSIGNED: bool = VNNI;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        halves!(|_i| _mm256_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::F {
        halves!(|i| _mm256_loadu_ps(from.add(8 * i)))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: Self::F) {
        unsafe {
            _mm256_storeu_ps(to, x[0]);
            _mm256_storeu_ps(to.add(8), x[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> Self::F {
        halves!(|i| _mm256_cvtph_ps(_mm_loadu_si128(from.add(8 * i).cast())))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::F {
        halves!(|i| {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8 * i).cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        })
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Self::F {
        halves!(|i| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.add(8 * i).cast()))))
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(|i| _mm256_add_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(|i| _mm256_sub_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(|i| _mm256_mul_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(|i| _mm256_div_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        halves!(|i| _mm256_fmadd_ps(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(|i| _mm256_max_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(|i| _mm256_min_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        halves!(|i| _mm256_andnot_ps(_mm256_set1_ps(-0.0), a[i]))
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F) -> f32 {
        unsafe {
            let a = _mm256_max_ps(a[0], a[1]);
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps::<1>(a, a)))
        }
    }
    #[inline(always)]
    fn any_above(self, a: Self::F, b: Self::F) -> bool {
        let above = halves!(|i| _mm256_cmp_ps::<_CMP_GT_OQ>(a[i], b[i]));
        unsafe { _mm256_movemask_ps(_mm256_or_ps(above[0], above[1])) != 0 }
    }
    #[inline(always)]
    fn reduce_add(self, a: Self::F) -> f32 {
        unsafe { reduce_add_256(_mm256_add_ps(a[0], a[1])) }
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::I {
        halves!(|i| _mm256_cvtps_epi32(a[i]))
    }
    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        halves!(|i| _mm256_cvtepi32_ps(a[i]))
    }
    #[inline(always)]
    fn scale_by_power_of_two(self, a: Self::F, n: Self::I) -> Self::F {
        halves!(|i| {
            let power = _mm256_slli_epi32::<23>(_mm256_add_epi32(n[i], _mm256_set1_epi32(127)));
            _mm256_mul_ps(a[i], _mm256_castsi256_ps(power))
        })
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        halves!(|_i| _mm256_set1_epi32(x))
    }
    #[inline(always)]
    unsafe fn load_i32(self, from: *const i32) -> Self::I {
        halves!(|i| _mm256_loadu_si256(from.add(8 * i).cast()))
    }
    #[inline(always)]
    unsafe fn store_i32(self, to: *mut i32, x: Self::I) {
        let _ = halves!(|i| _mm256_storeu_si256(to.add(8 * i).cast(), x[i]));
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I {
        halves!(|i| _mm256_add_epi32(a[i], b[i]))
    }
    #[inline(always)]
    fn and_i32(self, a: Self::I, b: Self::I) -> Self::I {
        halves!(|i| _mm256_and_si256(a[i], b[i]))
    }
    #[inline(always)]
    fn or_i32(self, a: Self::I, b: Self::I) -> Self::I {
        halves!(|i| _mm256_or_si256(a[i], b[i]))
    }
    #[inline(always)]
    fn shift_right(self, a: Self::I, bits: u32) -> Self::I {
        halves!(|i| _mm256_srl_epi32(a[i], _mm_cvtsi32_si128(bits.cast_signed())))
    }
    #[inline(always)]
    fn shift_left(self, a: Self::I, bits: u32) -> Self::I {
        halves!(|i| _mm256_sll_epi32(a[i], _mm_cvtsi32_si128(bits.cast_signed())))
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, x: Self::I) {
        unsafe {
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(x[0], x[1]));
            let bytes = _mm_packs_epi16(
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            _mm_storeu_si128(to.cast(), bytes);
        }
    }
    #[inline(always)]
    fn no_products(self) -> Self::I {
        self.splat_i32(0)
    }
    #[inline(always)]
    fn begin_products(self, sum: &mut Self::I) -> Self::I {
        let nothing = self.splat_i32(0);
        if VNNI {
            std::mem::replace(sum, nothing)
        } else {
            nothing
        }
    }
    #[inline(always)]
    fn products_at_once(bits: usize) -> usize {
        // Sums of two products fit 16 bits so often: 8 of 2 * 15 * 127, 4 of 2 * 31 * 127, 2 of 2 * 63 * 127.
        match bits {
            5 if !VNNI => 4,
            6 if !VNNI => 2,
            _ => 8,
        }
    }
    #[inline(always)]
    fn dot(self, sum: Self::I, weights: Self::B, x: Self::I) -> Self::I {
        halves!(|i| if VNNI {
            _mm256_dpbusd_avx_epi32(sum[i], weights[i], x[i])
        } else {
            _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(weights[i], x[i]))
        })
    }
    #[inline(always)]
    fn in_step<const M: usize>(self, mut sums: [Self::I; M]) -> [Self::I; M] {
        if let Some(four) = sums.first_chunk_mut::<4>() {
            // SAFETY: the type's value stands for AVX2.
            unsafe { in_registers(four) }
        }
        sums
    }
    #[inline(always)]
    fn settle(self, sum: Self::I, products: Self::I) -> Self::I {
        if VNNI {
            return self.add_i32(sum, products);
        }
        halves!(|i| _mm256_add_epi32(sum[i], _mm256_madd_epi16(products[i], _mm256_set1_epi16(1))))
    }
    #[inline(always)]
    fn dot_bytes(self, sum: Self::I, weights: Self::B, x: Self::I) -> Self::I {
        if VNNI {
            return self.dot(sum, weights, x);
        }
        // Pairs of whole bytes would not fit 16 bits: 128 is taken off, and the sign goes to the activations. What
        // is left of a pair, 2 * 128 * 127 at most, fits.
        halves!(|i| {
            let signed = _mm256_xor_si256(weights[i], _mm256_set1_epi8(-128));
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(x[i], signed));
            _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        })
    }
    #[inline(always)]
    fn prefetch(self, from: *const u8) {
        super::lines::prefetch(from);
    }
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> Self::B {
        halves!(|i| _mm256_loadu_si256(from.add(32 * i).cast()))
    }
    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut u8, x: Self::B) {
        unsafe {
            _mm256_storeu_si256(to.cast(), x[0]);
            _mm256_storeu_si256(to.add(32).cast(), x[1]);
        }
    }
    #[inline(always)]
    fn low_nibbles(self, a: Self::B) -> Self::B {
        halves!(|i| _mm256_and_si256(a[i], _mm256_set1_epi8(15)))
    }
    #[inline(always)]
    fn high_nibbles(self, a: Self::B) -> Self::B {
        halves!(|i| _mm256_and_si256(_mm256_srli_epi16::<4>(a[i]), _mm256_set1_epi8(15)))
    }
    #[inline(always)]
    fn two_bits(self, a: Self::B, which: usize) -> Self::B {
        halves!(|i| {
            let moved = _mm256_srl_epi16(a[i], _mm_cvtsi32_si128(2 * which as i32));
            _mm256_and_si256(moved, _mm256_set1_epi8(3))
        })
    }
    #[inline(always)]
    fn put_bits(self, a: Self::B, high: Self::B, from: usize, to: usize, mask: u8) -> Self::B {
        // Bits of a neighbour come in where the mask has none.
        halves!(|i| {
            let moved = if from > to {
                _mm256_srl_epi16(high[i], _mm_cvtsi32_si128((from - to) as i32))
            } else {
                _mm256_sll_epi16(high[i], _mm_cvtsi32_si128((to - from) as i32))
            };
            let found = _mm256_and_si256(moved, _mm256_set1_epi8(mask.cast_signed()));
            _mm256_or_si256(a[i], found)
        })
    }
}
