//! Blocks of a tile, unpacked once for many rows.
//!
//! Taking numbers and scales apart costs as much as multiplying them with a few rows. Where there are many, a few
//! blocks are taken apart into a panel that stays in the first-level cache, and all rows are multiplied with it.

use std::mem::MaybeUninit;

use super::rows::{BLOCK, GROUP, Group, QuantizedRows};
use super::simd::{LANES, Simd};
use super::tile::{Ahead, Form, Place, Scales, add_block, quad_of_numbers};
use super::weights::Layout;

/// Blocks of a panel, a multiple of those that share scales. With 64 rows and AVX-512 (Emerald Rapids) sixteen are up to a
/// twelfth faster than eight; thirty-two gain nothing more, and lose with 16 rows.
const BLOCKS: usize = 16;
/// Bytes of a block's numbers, one each.
const BLOCK_BYTES: usize = BLOCK * LANES;

/// How many rows make a panel worth its while. Measured on Zen 3 with AVX2: at 8 rows it gains a fifth with numbers or
/// scales that are hard to take apart, and loses a tenth with nibbles; at 16 it gains with both. Where eight rows fit
/// the registers, nibbles are taken apart half as often: with AVX-512 on Emerald Rapids a panel loses a thirtieth with them
/// at 16 and 24 rows, whatever their scales, and gains up to a tenth at 64.
pub(super) const fn least_rows<S: Simd, L: Layout>() -> usize {
    if L::BITS == 8 {
        usize::MAX
    } else if L::BITS == 4 && (S::ROWS == GROUP || !L::FACTORS) {
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
    const UNPACKED: bool = true;
    #[inline(always)]
    unsafe fn scales(&self, _: S, half: usize) -> [S::F; 2] {
        // SAFETY: the caller's promise, and that of who made it.
        unsafe { *self.0.add(half) }
    }
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
        // as many, and room in `out`.
        unsafe {
            panel.unpack::<L>(simd, tile.as_ptr(), blocks, first, count);
            for (group, &place) in groups.iter().enumerate() {
                let view = rows.view(place);
                assert!(view.group.rows == GROUP);
                for row in (0..GROUP).step_by(S::ROWS) {
                    let x = Place::of::<L>(view, row).further::<L, GROUP>(first);
                    let out = out.add((group * GROUP + row) * LANES);
                    if S::ROWS == 4 {
                        panel.times_rows::<L, 4>(simd, ahead, count, x, first > 0, out);
                    } else {
                        panel.times_rows::<L, 8>(simd, ahead, count, x, first > 0, out);
                    }
                }
            }
        }
        first += count;
    }
}

impl<S: Simd> Panel<S> {
    /// Takes blocks `first` to `first + count` apart.
    ///
    /// # Safety
    /// `tile` holds `blocks` blocks of the layout, these among them; `first` and `count` are multiples of `L::SHARED`,
    /// and `count` is at most [`BLOCKS`].
    #[inline(always)]
    unsafe fn unpack<L: Layout>(
        &mut self,
        simd: S,
        tile: *const u8,
        blocks: usize,
        first: usize,
        count: usize,
    ) {
        // SAFETY (all below): the caller's promise; a panel has room for [`BLOCKS`] blocks, each of 8 quads of 64 bytes.
        let (mut numbers, mut factors) = unsafe {
            let factors = tile.add(blocks * L::NUMBER_BYTES + first / L::SHARED * L::SCALE_BYTES);
            (tile.add(first * L::NUMBER_BYTES), factors)
        };
        let mut to = self.numbers.as_mut_ptr().cast::<u8>();
        for shared in (0..count).step_by(L::SHARED) {
            unsafe {
                let scales = Scales::<S, L>::begin(simd, factors);
                factors = factors.add(L::SCALE_BYTES);
                for block in 0..L::SHARED {
                    for quad in 0..BLOCK / 4 {
                        simd.store_bytes(to.add(quad * 64), quad_of_numbers::<S, L>(simd, numbers, quad));
                    }
                    for half in 0..L::HALVES {
                        let place = (shared + block) * L::HALVES + half;
                        let scales = scales.of_half(simd, block, half);
                        self.scales.get_unchecked_mut(place).write(scales);
                    }
                    numbers = numbers.add(L::NUMBER_BYTES);
                    to = to.add(BLOCK_BYTES);
                }
            }
        }
    }

    /// Adds the products of the panel with `M` rows of a group of 8 to what is in `out`, or writes them.
    ///
    /// # Safety
    /// The panel holds `count` blocks of the layout; `x` is at the first of them, of the first of `M` rows; `out` has
    /// room for 16 numbers of each, which are there if they are to `go_on`.
    #[inline(always)]
    unsafe fn times_rows<L: Layout, const M: usize>(
        &self,
        simd: S,
        ahead: &mut Ahead,
        count: usize,
        mut x: Place,
        go_on: bool,
        out: *mut f32,
    ) {
        let mut total = [simd.splat(0.0); M];
        let mut numbers = self.numbers.as_ptr().cast::<u8>();
        // SAFETY (all below): the caller's promise.
        if go_on {
            for (row, total) in total.iter_mut().enumerate() {
                *total = unsafe { simd.load(out.add(row * LANES)) };
            }
        }
        for block in 0..count {
            unsafe {
                ahead.ask(simd);
                let scales = self.scales.as_ptr().add(block * L::HALVES).cast::<[S::F; 2]>();
                add_block::<S, L, M, GROUP, _>(simd, &mut total, numbers, x, OfPanel::<S>(scales));
                numbers = numbers.add(BLOCK_BYTES);
                x = x.further::<L, GROUP>(1);
            }
        }
        for (row, total) in total.into_iter().enumerate() {
            unsafe { simd.store(out.add(row * LANES), total) }
        }
    }
}
