//! Blocks of a tile, unpacked once for many rows.
//!
//! Taking numbers and scales apart costs as much as multiplying them with a few rows. Where there are many, the first rows
//! leave what they took apart of a few blocks in a panel, which stays in the first-level cache, and all others are multiplied
//! with that.

use std::mem::MaybeUninit;

use super::rows::{BLOCK, GROUP, Group, QuantizedRows};
use super::simd::{LANES, Simd};
use super::tile::{Ahead, Form, Packed, Place, Scales, add_block};
use super::weights::Layout;

/// Blocks of a panel, a multiple of those that share scales. With 64 rows and AVX-512 (Emerald Rapids) sixteen are up to a
/// twelfth faster than eight; thirty-two gain nothing more, and lose with 16 rows.
const BLOCKS: usize = 16;
/// Bytes of a block's numbers, one each.
const BLOCK_BYTES: usize = BLOCK * LANES;

/// Whether the first rows fill a panel as they are multiplied; otherwise it is filled before. Measured, 16 rows, with AVX-512 on
/// Emerald Rapids: nibbles with minimums gain a twentieth where factors do not share scales, a fiftieth where they do; without
/// minimums they lose as much, and a tenth goes where a block has two scales, for want of registers. With AVX2 on the same core,
/// 8 rows: nibbles gain a twentieth, and with six-bit factors lose a thirtieth, as five bits do.
const fn fills<S: Simd, L: Layout>() -> bool {
    L::BITS == 4 && if S::ROWS == GROUP { L::MINIMUM } else { !L::FACTORS }
}

/// How many rows make a panel worth its while. Measured on Zen 3 with AVX2: at 8 rows it gains a fifth with numbers or
/// scales that are hard to take apart. Where eight rows fit the registers, nibbles are taken apart half as often: with AVX-512 on
/// Emerald Rapids a panel that is filled before loses a thirtieth with them at 16 and 24 rows, and gains up to a tenth at 64.
pub(super) const fn least_rows<S: Simd, L: Layout>() -> usize {
    if L::BITS == 8 {
        usize::MAX
    } else if L::BITS == 4 && S::ROWS == GROUP && !fills::<S, L>() {
        4 * S::ROWS
    } else {
        2 * S::ROWS
    }
}

/// Some blocks: numbers as bytes, scales as floats.
#[repr(align(64))]
struct Panel<S: Simd> {
    numbers: [MaybeUninit<u8>; BLOCKS * BLOCK_BYTES],
    /// Of each block, or of each of its halves.
    scales: [MaybeUninit<[S::F; 2]>; 2 * BLOCKS],
}

/// A block of a panel.
struct OfPanel<S: Simd>(*const [S::F; 2]);

impl<S: Simd> Form<S> for OfPanel<S> {
    #[inline(always)]
    unsafe fn quad(&self, simd: S, numbers: *const u8, quad: usize) -> S::B {
        // SAFETY: the caller's promise.
        unsafe { simd.load_bytes(numbers.add(quad * 64)) }
    }
    #[inline(always)]
    unsafe fn scales(&self, _: S, half: usize) -> [S::F; 2] {
        // SAFETY: the caller's promise, and that of who made it.
        unsafe { *self.0.add(half) }
    }
}

/// A block of a tile that is kept in a panel as it is taken apart.
struct Kept<'a, S: Simd, L: Layout> {
    block: Packed<'a, S, L>,
    numbers: *mut u8,
    scales: *mut [S::F; 2],
}

impl<S: Simd, L: Layout> Form<S> for Kept<'_, S, L> {
    #[inline(always)]
    unsafe fn quad(&self, simd: S, numbers: *const u8, quad: usize) -> S::B {
        // SAFETY: the caller's promise, and that of who made it.
        unsafe {
            let bytes = self.block.quad(simd, numbers, quad);
            simd.store_bytes(self.numbers.add(quad * 64), bytes);
            bytes
        }
    }
    #[inline(always)]
    unsafe fn scales(&self, simd: S, half: usize) -> [S::F; 2] {
        // SAFETY: the caller's promise, and that of who made it.
        unsafe {
            let scales = self.block.scales(simd, half);
            self.scales.add(half).write(scales);
            scales
        }
    }
}

/// Where some blocks lie in a tile.
#[derive(Clone, Copy)]
struct Source {
    numbers: *const u8,
    factors: *const u8,
}

/// Writes the products of a tile with groups of 8 rows.
///
/// # Panics
/// When the tile has fewer blocks than the rows.
///
/// # Safety
/// `out` has room for 16 numbers of each row.
#[inline(always)]
pub(super) unsafe fn times_groups<S: Simd, L: Layout>(
    simd: S,
    tile: &[u8],
    ahead: &mut Ahead,
    rows: &QuantizedRows,
    groups: &[Group],
    out: *mut f32,
) {
    let blocks = rows.columns() / BLOCK;
    assert!(blocks.is_multiple_of(L::SHARED));
    assert!(tile.len() >= blocks * L::NUMBER_BYTES + blocks / L::SHARED * L::SCALE_BYTES);
    let mut panel = Panel::<S> {
        numbers: [MaybeUninit::uninit(); BLOCKS * BLOCK_BYTES],
        scales: [MaybeUninit::uninit(); 2 * BLOCKS],
    };
    let mut first = 0;
    while first < blocks {
        let count = BLOCKS.min(blocks - first);
        // SAFETY: the tile has these blocks, which begin with one that has scales of its own; rows of a group of 8 have
        // as many, and room in `out`. The first pass fills the panel.
        unsafe {
            let source = Source {
                numbers: tile.as_ptr().add(first * L::NUMBER_BYTES),
                factors: (tile.as_ptr()).add(blocks * L::NUMBER_BYTES + first / L::SHARED * L::SCALE_BYTES),
            };
            let mut source = Some(source);
            if !fills::<S, L>()
                && let Some(source) = source.take()
            {
                let x = Place::of::<L>(rows.view(groups[0]), 0);
                panel.fill::<L, 0>(simd, &mut Ahead::nothing(), source, count, x, &mut []);
            }
            for (group, &place) in groups.iter().enumerate() {
                let view = rows.view(place);
                assert!(view.group.rows == GROUP);
                for row in (0..GROUP).step_by(S::ROWS) {
                    let x = Place::of::<L>(view, row).further::<L, GROUP>(first);
                    let out = out.add((group * GROUP + row) * LANES);
                    if S::ROWS == 4 {
                        panel.times_rows::<L, 4>(simd, ahead, source.take(), count, x, first > 0, out);
                    } else {
                        panel.times_rows::<L, 8>(simd, ahead, source.take(), count, x, first > 0, out);
                    }
                }
            }
        }
        first += count;
    }
}

impl<S: Simd> Panel<S> {
    /// Adds the products of some blocks with `M` rows of a group of 8 to what is in `out`, or writes them. The blocks are those of
    /// the panel, which is filled first if there is a source.
    ///
    /// # Safety
    /// The panel, or the source, holds `count` blocks of the layout, a multiple of `L::SHARED` and at most [`BLOCKS`]; `x` is at
    /// the first of them, of the first of `M` rows; `out` has room for 16 numbers of each, which are there if they are to
    /// `go_on`.
    #[inline(always)]
    unsafe fn times_rows<L: Layout, const M: usize>(
        &mut self,
        simd: S,
        ahead: &mut Ahead,
        source: Option<Source>,
        count: usize,
        x: Place,
        go_on: bool,
        out: *mut f32,
    ) {
        let mut total = [simd.splat(0.0); M];
        // SAFETY: the caller's promise.
        unsafe {
            if go_on {
                for (row, total) in total.iter_mut().enumerate() {
                    *total = simd.load(out.add(row * LANES));
                }
            }
            match source {
                Some(source) if fills::<S, L>() => {
                    self.fill::<L, M>(simd, ahead, source, count, x, &mut total);
                }
                _ => self.add::<L, M>(simd, ahead, count, x, &mut total),
            }
            for (row, total) in total.into_iter().enumerate() {
                simd.store(out.add(row * LANES), total);
            }
        }
    }

    /// Takes blocks apart into the panel, and adds their products with `M` rows, maybe none, on the way.
    ///
    /// # Safety
    /// As [`Panel::times_rows`] with a source.
    #[inline(always)]
    unsafe fn fill<L: Layout, const M: usize>(
        &mut self,
        simd: S,
        ahead: &mut Ahead,
        mut source: Source,
        count: usize,
        mut x: Place,
        total: &mut [S::F; M],
    ) {
        let mut numbers = self.numbers.as_mut_ptr().cast::<u8>();
        let mut scales = self.scales.as_mut_ptr().cast::<[S::F; 2]>();
        for _ in 0..count / L::SHARED {
            // SAFETY: the caller's promise; a panel has room for [`BLOCKS`] blocks, each of 8 quads of 64 bytes.
            unsafe {
                let shared = Scales::<S, L>::begin(simd, source.factors);
                source.factors = source.factors.add(L::SCALE_BYTES);
                for block in 0..L::SHARED {
                    ahead.ask(simd);
                    let kept = Kept {
                        block: Packed(&shared, block),
                        numbers,
                        scales,
                    };
                    add_block::<S, L, M, GROUP, _>(simd, total, source.numbers, x, kept);
                    source.numbers = source.numbers.add(L::NUMBER_BYTES);
                    (numbers, scales) = (numbers.add(BLOCK_BYTES), scales.add(L::HALVES));
                    x = x.further::<L, GROUP>(1);
                }
            }
        }
    }

    /// Adds the products of the panel's blocks with `M` rows.
    ///
    /// # Safety
    /// As [`Panel::times_rows`] without a source.
    #[inline(always)]
    unsafe fn add<L: Layout, const M: usize>(
        &self,
        simd: S,
        ahead: &mut Ahead,
        count: usize,
        mut x: Place,
        total: &mut [S::F; M],
    ) {
        let mut numbers = self.numbers.as_ptr().cast::<u8>();
        let mut scales = self.scales.as_ptr().cast::<[S::F; 2]>();
        for _ in 0..count {
            // SAFETY: the caller's promise.
            unsafe {
                ahead.ask(simd);
                add_block::<S, L, M, GROUP, _>(simd, total, numbers, x, OfPanel::<S>(scales));
                (numbers, scales) = (numbers.add(BLOCK_BYTES), scales.add(L::HALVES));
                x = x.further::<L, GROUP>(1);
            }
        }
    }
}
