//! Intel's matrix units (AMX): sixteen rows by sixteen columns by 32 numbers of 16 bits (bfloat16) in one instruction.
//!
//! Sums stay in the unit's registers as 32-bit floats, and no scale has to meet them. What is multiplied has 8 significant
//! bits: numbers are a 256th part off at most. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1,
//! chapter 18, and volume 2, LDTILECFG, TILELOADDT1, TDPBF16PS, VREDUCEPS
//! and VSCALEFPS.

use std::arch::asm;
use std::arch::x86_64::{
    __cpuid_count, __m256i, __m512, __m512i, _CMP_UNORD_Q, _MM_FROUND_TO_NEG_INF, _mm256_storeu_si256,
    _mm512_add_epi32, _mm512_add_ps, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask,
    _mm512_cvtne2ps_pbh, _mm512_cvtneps_pbh, _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_mask_blend_epi16,
    _mm512_mask_mov_ps, _mm512_mul_ps, _mm512_permutexvar_epi16, _mm512_rcp14_ps, _mm512_reduce_ps,
    _mm512_scalef_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32, _mm512_srli_epi32,
    _mm512_storeu_si512, _mm512_ternarylogic_epi32,
};
use std::f32::consts::LOG2_E;
use std::ops::Range;
use std::sync::OnceLock;

use super::rows::BLOCK;
use super::simd::{LANES, Simd};
use super::tile::{Scales, quad_of_numbers};
use super::weights::Layout;
use super::x86::Avx512;

/// Rows of a tile register.
pub(super) const TILE_ROWS: usize = 16;

/// What a tile register holds of 16-bit numbers: of rows, 16 times 32 columns; of weights, 16 pairs of columns for each of 16
/// rows of the matrix.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct HalfTile(pub(super) [u16; TILE_ROWS * BLOCK]);

impl HalfTile {
    pub(super) const ZERO: Self = Self([0; TILE_ROWS * BLOCK]);
}

/// Floats that a tile register holds.
pub(super) const TILE_FLOATS: usize = TILE_ROWS * LANES;

/// Stands for units that are there and may be used, and for AVX-512 with bfloat16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Units(());

/// Something to compute with them.
pub(super) trait Work {
    /// Computes it. Implementations are `#[inline(always)]`, so that they are compiled with the units' instructions.
    fn run(self, simd: Avx512, units: Units);
}

impl Units {
    /// The units, if the processor has them and the system lets this process use them: it is asked once.
    pub(super) fn here() -> Option<Self> {
        static HERE: OnceLock<bool> = OnceLock::new();
        let here = HERE.get_or_init(|| {
            // Bits of tiles and of bfloat16 products. Leaf 7 is there with AVX2.
            const TILES: u32 = 1 << 24 | 1 << 22;
            let has = || __cpuid_count(7, 0).edx & TILES == TILES;
            std::is_x86_feature_detected!("avx512bf16") && has() && permitted()
        });
        here.then_some(Self(()))
    }

    /// Runs something with their instructions, and AVX-512's.
    #[inline]
    pub(super) fn run<W: Work>(self, work: W) {
        // SAFETY: the value stands for both.
        unsafe { with_features(self, work) }
    }

    /// Shapes this thread's tile registers: all of them for 16 lines of 64 bytes. One value at a time: the first that goes gives
    /// them back.
    pub(super) fn shape(self) -> Shaped {
        let mut shapes = Shapes {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            line_bytes: [0; 16],
            lines: [0; 16],
        };
        shapes.line_bytes[..8].fill(64);
        shapes.lines[..8].fill(TILE_ROWS as u8);
        // SAFETY: the value stands for the units; the shapes are within the first palette's limits.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly)) }
        Shaped(())
    }
}

/// # Safety
/// The processor has AVX-512 with VNNI and bfloat16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")]
unsafe fn with_features<W: Work>(units: Units, work: W) {
    // SAFETY: the features of this very function.
    work.run(unsafe { Avx512::new() }, units);
}

/// Shapes of tile registers, as the instruction reads them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    line_bytes: [u16; 16],
    lines: [u8; 16],
}

/// This thread's tile registers are shaped. They are given back at the end: the system need not keep what is not in use.
pub(super) struct Shaped(());

impl Drop for Shaped {
    fn drop(&mut self) {
        // SAFETY: they were shaped, so there are units. Nothing that is compiled uses these registers.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
    }
}

impl Shaped {
    /// Products of `R` times 16 rows, 1 or 2, with 32 columns: `sums`, `[R, 2, 16, 16]`, are what was there if they are to
    /// `go_on`, plus the products over `count` blocks. Every sum is added up block by block, alone or beside others.
    ///
    /// Rows are fetched by an instruction that asks for not keeping them in the first-level cache: they come by once for each
    /// pair of tiles, and the weights that stay there meet all of them. Emerald Rapids does as it is asked. (Attention's queries
    /// lie there already; plain loads were a hundredth faster there, which is not worth a second loop.)
    ///
    /// # Safety
    /// `count` is not zero; at each of `rows` lie as many tiles, one after the other, and at each of `weights`; `sums` has
    /// room for all, which are there if they are to `go_on`, and no other thread looks at them.
    #[inline(always)]
    pub(super) unsafe fn multiply<const R: usize>(
        &self,
        rows: [*const HalfTile; R],
        weights: [*const HalfTile; 2],
        count: usize,
        sums: *mut f32,
        go_on: bool,
    ) {
        const { assert!(R == 1 || R == 2) }
        /// A step of a tile in bytes.
        const TILE: usize = size_of::<HalfTile>();
        let line = 64_usize;
        // SAFETY (all below): the caller's promise; the registers are shaped for 16 lines of 64 bytes. They keep what they hold from
        // one of these blocks to the next, for nothing that is compiled uses them; that is why none names them as its own.
        unsafe {
            if go_on {
                asm!(
                    "tileloadd tmm0, [{sums} + {line}]",
                    "tileloadd tmm1, [{sums} + {line} + 1024]",
                    sums = in(reg) sums, line = in(reg) line, options(nostack, readonly, preserves_flags)
                );
                if R == 2 {
                    asm!(
                        "tileloadd tmm2, [{sums} + {line} + 2048]",
                        "tileloadd tmm3, [{sums} + {line} + 3072]",
                        sums = in(reg) sums, line = in(reg) line, options(nostack, readonly, preserves_flags)
                    );
                }
            } else {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    options(nostack, nomem, preserves_flags)
                );
            }
            if R == 2 {
                asm!(
                    "2:",
                    "tileloadd tmm6, [{left} + {line}]",
                    "tileloaddt1 tmm4, [{first} + {line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{right} + {line}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloaddt1 tmm5, [{second} + {line}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {left}, {step}",
                    "add {right}, {step}",
                    "add {first}, {step}",
                    "add {second}, {step}",
                    "dec {count}",
                    "jnz 2b",
                    left = inout(reg) weights[0] => _,
                    right = inout(reg) weights[1] => _,
                    first = inout(reg) rows[0] => _,
                    second = inout(reg) rows[R - 1] => _,
                    count = inout(reg) count => _,
                    line = in(reg) line,
                    step = const TILE,
                    options(nostack, readonly)
                );
            } else {
                asm!(
                    "2:",
                    "tileloadd tmm6, [{left} + {line}]",
                    "tileloaddt1 tmm4, [{first} + {line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{right} + {line}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {left}, {step}",
                    "add {right}, {step}",
                    "add {first}, {step}",
                    "dec {count}",
                    "jnz 2b",
                    left = inout(reg) weights[0] => _,
                    right = inout(reg) weights[1] => _,
                    first = inout(reg) rows[0] => _,
                    count = inout(reg) count => _,
                    line = in(reg) line,
                    step = const TILE,
                    options(nostack, readonly)
                );
            }
            asm!(
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 1024], tmm1",
                sums = in(reg) sums, line = in(reg) line, options(nostack, preserves_flags)
            );
            if R == 2 {
                asm!(
                    "tilestored [{sums} + {line} + 2048], tmm2",
                    "tilestored [{sums} + {line} + 3072], tmm3",
                    sums = in(reg) sums, line = in(reg) line, options(nostack, preserves_flags)
                );
            }
        }
    }
}

/// Thirty-two numbers as bfloat16, rounded to the nearest, in their order.
///
/// # Safety
/// `to` has 32 places; the caller was compiled with the units' instructions.
#[inline(always)]
pub(super) unsafe fn store_rounded([first, second]: [__m512; 2], to: *mut u16) {
    // SAFETY: the caller's promise; both types are 64 bytes of plain numbers.
    unsafe {
        let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second, first));
        _mm512_storeu_si512(to.cast(), both);
    }
}

/// Sixteen of them.
///
/// # Safety
/// `to` has 16 places; the caller was compiled with the units' instructions.
#[inline(always)]
pub(super) unsafe fn store_half(numbers: __m512, to: *mut u16) {
    // SAFETY: the caller's promise; both types are 32 bytes of plain numbers.
    unsafe {
        let rounded: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(numbers));
        _mm256_storeu_si256(to.cast(), rounded);
    }
}

/// Writes a line of a tile: pairs of numbers from two vectors, rounded to the nearest.
///
/// # Panics
/// When a tile has no such line.
#[inline(always)]
pub(super) fn store_pairs(_: Units, [even, odd]: [__m512; 2], tile: &mut HalfTile, line: usize) {
    let line = &mut tile.0[line * BLOCK..][..BLOCK];
    // SAFETY: units stand for bfloat16 too; a line has 64 bytes.
    unsafe {
        let order = _mm512_loadu_si512(ALTERNATING.as_ptr().cast());
        let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
        _mm512_storeu_si512(line.as_mut_ptr().cast(), _mm512_permutexvar_epi16(order, both));
    }
}

/// Numbers of 16 columns that alternate: the first half's, the second half's.
static ALTERNATING: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    order
};

/// Takes `count` blocks of a tile of weights apart, from `first` on, and writes what they stand for as bfloat16, rounded to the
/// nearest. As many blocks of the next tile are asked of memory meanwhile; they need not be there.
///
/// # Panics
/// When blocks that share scales are torn apart, or the tile has fewer than `blocks`, or those are fewer, or `to` is too short.
#[inline(always)]
pub(super) fn unpack<L: Layout>(
    simd: Avx512,
    tile: &[u8],
    blocks: usize,
    (first, count): (usize, usize),
    (next, first_next): (&[u8], usize),
    to: &mut [HalfTile],
) {
    assert!(first.is_multiple_of(L::SHARED) && count.is_multiple_of(L::SHARED));
    assert!(first + count <= blocks && count <= to.len());
    assert!(tile.len() >= L::tile_bytes(blocks));
    let mut to = to.as_mut_ptr().cast::<i32>();
    let mut asked = L::scales_at(first_next);
    // SAFETY (all below): the assertions, and that of `simd`.
    unsafe {
        for first_shared in (first..first + count).step_by(L::SHARED) {
            let scales = Scales::<Avx512, L>::begin(simd, tile.as_ptr().add(L::scales_at(first_shared)));
            let mut numbers = tile.as_ptr().add(L::numbers_at(first_shared));
            for block in 0..L::SHARED {
                let place = first_next + (first_shared - first) + block;
                let until = L::numbers_at(place) + L::NUMBER_BYTES;
                ask(simd, next.as_ptr(), asked..until);
                asked = until;
                for half in 0..L::HALVES {
                    let [scale, minimum] = scales.of_half(simd, block, half);
                    // Numbers come as 256 and more.
                    let least = simd.splat(-256.0 - f32::from(L::OFFSET));
                    let base = if L::MINIMUM {
                        simd.fma(least, scale, minimum)
                    } else {
                        simd.mul(least, scale)
                    };
                    let (scale, base) = (plain(scale), plain(base));
                    let quads = 8 / L::HALVES;
                    for quad in half * quads..(half + 1) * quads {
                        let bytes = quad_of_numbers::<Avx512, L>(simd, numbers, quad);
                        let columns = [
                            [_mm512_slli_epi32::<15>(bytes), _mm512_slli_epi32::<7>(bytes)],
                            [_mm512_srli_epi32::<1>(bytes), _mm512_srli_epi32::<9>(bytes)],
                        ];
                        for [even, odd] in columns {
                            let even = _mm512_fmadd_ps(from_256(even), scale, base);
                            let odd = _mm512_fmadd_ps(from_256(odd), scale, base);
                            _mm512_storeu_si512(to.cast(), rounded_pairs(even, odd));
                            to = to.add(LANES);
                        }
                    }
                }
                numbers = numbers.add(L::NUMBER_BYTES);
            }
        }
    }
}

/// Asks memory for the lines of a range of bytes from a place.
#[inline(always)]
fn ask(simd: Avx512, from: *const u8, range: Range<usize>) {
    for line in range.step_by(64) {
        simd.prefetch(from.wrapping_add(line));
    }
}

/// 256 plus the bytes that lie in bits 15 to 22: the upper bits of a float's fraction.
///
/// # Safety
/// The processor has AVX-512 F.
#[inline(always)]
unsafe fn from_256(bits: __m512i) -> __m512 {
    // SAFETY: the caller's promise. (bits & mask) | float
    unsafe {
        let (mask, float) = (_mm512_set1_epi32(0x007f_8000), _mm512_set1_epi32(0x4380_0000));
        _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xea>(bits, mask, float))
    }
}

/// Numbers as they are, and those that are none with a fraction that rounding leaves what it is.
///
/// # Safety
/// The processor has AVX-512 F.
#[inline(always)]
unsafe fn plain(x: __m512) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let none = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        _mm512_mask_mov_ps(x, none, _mm512_set1_ps(f32::NAN))
    }
}

/// Two columns of 16 rows side by side, as bfloat16: half of a last place is added, and what lies behind it is dropped. (The
/// instruction that rounds, and the one that puts halves side by side, would take a fifth longer.)
///
/// # Safety
/// The processor has AVX-512 F and BW; what is no number is [`plain`].
#[inline(always)]
unsafe fn rounded_pairs(even: __m512, odd: __m512) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let half = _mm512_set1_epi32(0x8000);
        let even = _mm512_add_epi32(_mm512_castps_si512(even), half);
        let odd = _mm512_add_epi32(_mm512_castps_si512(odd), half);
        _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(even), odd)
    }
}

/// 2^x, a 300,000th part off at most down to 2^-126: much nearer than what bfloat16 leaves of it. What is not a number stays so.
#[inline(always)]
pub(super) fn power_of_two(_: Units, x: __m512) -> __m512 {
    // Remez, relative error, 1 at 0: 2^r for r in [0, 1).
    const R: [f32; 4] = [0.693_044_84, 0.241_280_2, 0.052_242_472, 0.013_426_686];
    // SAFETY: units stand for AVX-512 F and DQ too.
    unsafe {
        // What x is above the next whole number below; the last step multiplies with 2 to that number.
        let r = _mm512_reduce_ps::<_MM_FROUND_TO_NEG_INF>(x);
        let mut p = _mm512_set1_ps(R[3]);
        for c in [R[2], R[1], R[0], 1.0] {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
        }
        _mm512_scalef_ps(p, x)
    }
}

/// x / (1 + e^-y), a 10,000th part off at most: of a gate, whose products are rounded to bfloat16 next.
#[inline(always)]
pub(super) fn opened(units: Units, x: __m512, y: __m512) -> __m512 {
    // SAFETY: units stand for AVX-512 F too.
    unsafe {
        let power = power_of_two(units, _mm512_mul_ps(y, _mm512_set1_ps(-LOG2_E)));
        _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(power, _mm512_set1_ps(1.0))))
    }
}

/// Asks the system to let this process use tile registers: it keeps 8 KiB for each thread that does.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let answer: isize;
    // SAFETY: the call takes two numbers and touches no memory of ours. Source: Linux, Documentation/arch/x86/xstate.rst.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => answer,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    answer == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}
