//! Blocks of a tile, unpacked once for many rows.
//!
//! Taking numbers and scales apart costs as much as multiplying them with a few rows. Where there are many, a few
//! blocks are taken apart into a panel that stays in the first-level cache, before the first rows are multiplied or as they
//! are, and all others are multiplied with that.

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

/// Whether the first rows fill a panel as they are multiplied; otherwise it is filled before them. Measured beside panels that
/// were filled before, or none where there was none, on one core of Emerald Rapids. With AVX-512 and 16 rows nibbles with
/// minimums gain a fiftieth to a twentieth; Q4_0 loses up to a thirtieth, Q6_K a tenth (two scales want too many registers),
/// Q5_0 neither. With AVX2 and 8 rows plain nibbles gain a twentieth; those with factors, and five bits, lose a thirtieth. All
/// else that holds four rows at once follows AVX2, unmeasured.
const fn fills<S: Simd, L: Layout>() -> bool {
    L::BITS == 4 && if S::ROWS == GROUP { L::MINIMUM } else { !L::FACTORS }
}

/// How many rows make a panel worth its while. Measured on Zen 3 with AVX2 and panels that are filled before: at 8 rows it
/// gains a fifth with numbers or scales that are hard to take apart, and loses a tenth with nibbles. Where eight rows fit the
/// registers, nibbles are taken apart half as often: with AVX-512 on Emerald Rapids such a panel loses a thirtieth with them at
/// 16 and 24 rows, and gains up to a tenth at 64. Bytes lie as a panel would have them.
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
    /// Blocks that it holds, or is to be filled with.
    count: usize,
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

/// A block of a tile that is kept in a panel as it is taken apart: there is room for its bytes, and for scales of its halves.
struct Kept<'a, S: Simd, L: Layout> {
    block: Packed<'a, S, L>,
    to_numbers: *mut u8,
    to_scales: *mut [S::F; 2],
}

impl<S: Simd, L: Layout> Form<S> for Kept<'_, S, L> {
    #[inline(always)]
    unsafe fn quad(&self, simd: S, numbers: *const u8, quad: usize) -> S::B {
        // SAFETY: the caller's promise, and that of who made it.
        unsafe {
            let bytes = self.block.quad(simd, numbers, quad);
            simd.store_bytes(self.to_numbers.add(quad * 64), bytes);
            bytes
        }
    }
    #[inline(always)]
    unsafe fn scales(&self, simd: S, half: usize) -> [S::F; 2] {
        // SAFETY: the caller's promise, and that of who made it.
        unsafe {
            let scales = self.block.scales(simd, half);
            self.to_scales.add(half).write(scales);
            scales
        }
    }
}

/// Some blocks of a tile, from `first` on, which has scales of its own: a multiple of `L::SHARED`.
#[derive(Clone, Copy)]
struct Source {
    tile: *const u8,
    first: usize,
}

/// Writes the products of a tile with groups of 8 rows.
///
/// # Panics
/// When the tile has fewer blocks than the rows, or is one of bytes.
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
    // Products of bytes take them from the tile, and would leave nothing in the panel.
    assert!(L::BITS < 8 && blocks.is_multiple_of(L::SHARED));
    assert!(tile.len() >= L::tile_bytes(blocks));
    let mut panel = Panel::<S> {
        count: 0,
        numbers: [MaybeUninit::uninit(); BLOCKS * BLOCK_BYTES],
        scales: [MaybeUninit::uninit(); 2 * BLOCKS],
    };
    let mut first = 0;
    while first < blocks {
        panel.count = BLOCKS.min(blocks - first);
        // SAFETY: the tile has these blocks, which begin with one that has scales of its own; rows of a group of 8 have
        // as many, and room in `out`. The panel is filled here, or by the first pass.
        unsafe {
            let source = Source {
                tile: tile.as_ptr(),
                first,
            };
            let mut unfilled = fills::<S, L>().then_some(source);
            if unfilled.is_none() {
                let x = Place::of::<L>(rows.view(groups[0]), 0);
                panel.fill::<L, 0>(simd, &mut Ahead::nothing(), source, x, &mut []);
            }
            for (group, &place) in groups.iter().enumerate() {
                let view = rows.view(place);
                assert!(view.group.rows == GROUP);
                for row in (0..GROUP).step_by(S::ROWS) {
                    let x = Place::of::<L>(view, row).further::<L, GROUP>(first);
                    let out = out.add((group * GROUP + row) * LANES);
                    if S::ROWS == 4 {
                        panel.times_rows::<L, 4>(simd, ahead, unfilled.take(), x, first > 0, out);
                    } else {
                        panel.times_rows::<L, 8>(simd, ahead, unfilled.take(), x, first > 0, out);
                    }
                }
            }
        }
        first += panel.count;
    }
}

impl<S: Simd> Panel<S> {
    /// Adds the products of the panel's blocks with `M` rows of a group of 8 to what is in `out`, or writes them. Where there is
    /// a source it is filled on the way.
    ///
    /// # Safety
    /// The panel, or else the source's tile from its first block on, holds the panel's count of blocks of the layout, a multiple
    /// of `L::SHARED` and at most [`BLOCKS`]; there is a source only where the layout [`fills`] panels so. `x` is at the first of the blocks, of the first
    /// of `M` rows; `out` has room for 16 numbers of each, which are there if they are to `go_on`.
    #[inline(always)]
    unsafe fn times_rows<L: Layout, const M: usize>(
        &mut self,
        simd: S,
        ahead: &mut Ahead,
        source: Option<Source>,
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
                // Asked again so that nothing is compiled for other layouts.
                Some(source) if fills::<S, L>() => self.fill::<L, M>(simd, ahead, source, x, &mut total),
                _ => self.add::<L, M>(simd, ahead, x, &mut total),
            }
            for (row, total) in total.into_iter().enumerate() {
                simd.store(out.add(row * LANES), total);
            }
        }
    }

    /// Takes blocks apart into the panel, and adds their products with `M` rows, maybe none, on the way.
    ///
    /// # Safety
    /// As [`Panel::times_rows`] with a source; without rows, `x` is not read.
    #[inline(always)]
    unsafe fn fill<L: Layout, const M: usize>(
        &mut self,
        simd: S,
        ahead: &mut Ahead,
        source: Source,
        mut x: Place,
        total: &mut [S::F; M],
    ) {
        let mut numbers = self.numbers.as_mut_ptr().cast::<u8>();
        let mut scales = self.scales.as_mut_ptr().cast::<[S::F; 2]>();
        for first in (source.first..source.first + self.count).step_by(L::SHARED) {
            // SAFETY: the caller's promise; a panel has room for [`BLOCKS`] blocks, each of 8 quads of 64 bytes.
            unsafe {
                let shared = Scales::<S, L>::begin(simd, source.tile.add(L::scales_at(first)));
                let mut packed = source.tile.add(L::numbers_at(first));
                for block in 0..L::SHARED {
                    ahead.ask(simd);
                    let kept = Kept {
                        block: Packed {
                            scales: &shared,
                            block,
                        },
                        to_numbers: numbers,
                        to_scales: scales,
                    };
                    add_block::<S, L, M, GROUP, _>(simd, total, packed, x, kept);
                    packed = packed.add(L::NUMBER_BYTES);
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
        mut x: Place,
        total: &mut [S::F; M],
    ) {
        let mut numbers = self.numbers.as_ptr().cast::<u8>();
        let mut scales = self.scales.as_ptr().cast::<[S::F; 2]>();
        for _ in 0..self.count {
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
