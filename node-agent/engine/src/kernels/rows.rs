//! Rows of activations as a product takes them: 8-bit integers with a scale for every 32.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::amx::HalfTile;
#[cfg(target_arch = "x86_64")]
use super::bf16::Bf16Rows;
use super::pool::SharedMut;
use super::simd::{LANES, Simd};
use super::split::Rounding;
use super::vector::Norm;
use super::weights::Matrix;
use super::{Compute, Operation};

/// Numbers that share a scale, in weights and in activations.
pub(super) const BLOCK: usize = 32;
/// Four values, which a product reads at once.
const QUADS: usize = BLOCK / 4;
/// Rows that lie interleaved at most.
pub(super) const GROUP: usize = 8;

/// What products with some formats ask for: for numbers that lie too large in memory, by how much; 0 for minimums. And
/// scales of a block.
const CORRECTIONS: [(u8, usize); 7] = [(0, 1), (0, 2), (4, 2), (8, 1), (16, 1), (32, 2), (128, 1)];

/// Numbers of a block that all of them make.
const PARTS: usize = parts_before(CORRECTIONS.len());

const fn parts_before(correction: usize) -> usize {
    let (mut parts, mut index) = (0, 0);
    while index < correction {
        parts += CORRECTIONS[index].1;
        index += 1;
    }
    parts
}

/// Some of the corrections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Corrections(u8);

impl Corrections {
    /// The one that a format asks for whose numbers lie too large by `offset`, or which has minimums, with so many scales a
    /// block.
    pub(super) const fn of(offset: u8, halves: usize) -> Self {
        let mut index = 0;
        while CORRECTIONS[index].0 != offset || CORRECTIONS[index].1 != halves {
            index += 1;
        }
        Self(1 << index)
    }

    /// Numbers of a block before the first one of these.
    pub(super) const fn start(self) -> usize {
        parts_before(self.0.trailing_zeros() as usize)
    }

    fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What they make of each of so many blocks, and how much of it there is.
    fn parts(self, blocks: usize) -> ([Part; PARTS], usize) {
        let mut parts = [Part::default(); PARTS];
        let mut count = 0;
        for (index, (offset, halves)) in CORRECTIONS.into_iter().enumerate() {
            if self.0 >> index & 1 == 1 {
                for half in 0..halves {
                    parts[count] = Part {
                        offset: f32::from(offset),
                        sum: if halves == 1 { 2 } else { half },
                        next: parts_before(index) * blocks + half,
                        step: halves,
                    };
                    count += 1;
                }
            }
        }
        (parts, count)
    }
}

/// A number that is made of every block.
#[derive(Clone, Copy, Default)]
struct Part {
    /// As [`CORRECTIONS`] have it.
    offset: f32,
    /// Of the first half, of the second, or of both.
    sum: usize,
    /// Where the next block's number goes, in rows of a group.
    next: usize,
    /// From there to the one after.
    step: usize,
}

/// Rows, quantised: x = scale * q, with |q| <= 127.
///
/// Rows lie in groups of 8, the rest in groups that a product takes at once ([`Compute::groups`]), interleaved, so that it
/// walks along one pointer for all rows of a group. How they lie depends on the level: products are for the same one.
#[derive(Debug, Default)]
pub(crate) struct QuantizedRows {
    columns: usize,
    wanted: Corrections,
    /// With [`Rounding::Twice`] each row lies here as two.
    rounding: Rounding,
    /// Room for those two before they are rounded.
    parts: Vec<f32>,
    groups: Vec<Group>,
    /// Shape of a group: `[columns / 4, rows]`, each four values.
    values: Vec<[i8; 4]>,
    /// Shape of a group: `[columns / 32, rows]`.
    scales: Vec<f32>,
    /// For each of the wanted [`CORRECTIONS`], of each half or of the block, what products begin with: minus offset times sum
    /// of values; or, for minimums, scale times sum of values, the bits of a float. Shape of a group:
    /// `[corrections, columns / 32, halves, rows]`. There is room for all of them; what was not wanted holds anything.
    corrections: Vec<i32>,
    /// Rows of prompts behind all those, where matrix units multiply them.
    #[cfg(target_arch = "x86_64")]
    of_prompts: Bf16Rows,
}

/// Rows that lie interleaved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) first_row: usize,
    pub(super) rows: usize,
}

/// One group, as a product reads it.
#[derive(Clone, Copy)]
pub(super) struct GroupView<'a> {
    pub(super) group: Group,
    pub(super) values: &'a [[i8; 4]],
    pub(super) scales: &'a [f32],
    pub(super) corrections: &'a [i32],
}

/// Rows that registers hold at once.
struct AtOnce;

impl Operation for AtOnce {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        S::ROWS
    }
}

impl Compute {
    /// Groups for so many rows: the full ones first, then as many rows as registers hold at once.
    pub(super) fn groups(&self, rows: usize) -> impl Iterator<Item = Group> {
        let at_once = self.dispatch.run(AtOnce);
        let mut first_row = 0;
        std::iter::from_fn(move || {
            let left = rows - first_row;
            let rows = if left >= GROUP { GROUP } else { left.min(at_once) };
            let group = Group { first_row, rows };
            first_row += rows;
            (rows > 0).then_some(group)
        })
    }
}

impl QuantizedRows {
    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// Whether what a format wants was made.
    pub(super) fn has(&self, wanted: Corrections) -> bool {
        self.wanted.with(wanted) == self.wanted
    }

    pub(super) fn groups(&self) -> &[Group] {
        &self.groups
    }

    pub(super) fn rounding(&self) -> Rounding {
        self.rounding
    }

    /// Rows that matrix units multiply; they come last.
    pub(super) fn of_prompts(&self) -> usize {
        #[cfg(target_arch = "x86_64")]
        return self.of_prompts.rows();
        #[cfg(not(target_arch = "x86_64"))]
        0
    }

    /// Room for rows of prompts, which a gate writes. It may be none.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn room_for_prompts(&mut self, rows: usize, columns: usize) -> SharedMut<HalfTile> {
        self.of_prompts.room(rows, columns)
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn as_bf16(&self) -> &Bf16Rows {
        &self.of_prompts
    }

    #[inline]
    pub(super) fn view(&self, group: Group) -> GroupView<'_> {
        let range = |width: usize| group.first_row * width..(group.first_row + group.rows) * width;
        GroupView {
            group,
            values: &self.values[range(self.columns / 4)],
            scales: &self.scales[range(self.columns / BLOCK)],
            corrections: &self.corrections[range(self.columns / BLOCK * PARTS)],
        }
    }

    /// Quantises `[rows, columns]` numbers for products with some matrices, normalised first where there is a norm. A row
    /// with a number that is not finite gets scales that are not either: nothing hides a broken model. The last rows,
    /// `of_prompts`, are left to the matrix units where there are any.
    ///
    /// # Panics
    /// When there is no matrix, or the first one's columns are no multiple of 32, or do not divide the numbers, or the norm has
    /// another size, or fewer rows are there than are `of_prompts`.
    pub(crate) fn set(
        &mut self,
        compute: &Compute,
        x: &[f32],
        matrices: &[&Matrix],
        norm: Option<Norm<'_>>,
        of_prompts: usize,
    ) {
        #[cfg(target_arch = "x86_64")]
        let columns = matrices[0].columns();
        #[cfg(target_arch = "x86_64")]
        let x = match compute.dispatch.units() {
            Some(units) => {
                let (first, last) = x.split_at(x.len() - of_prompts * columns);
                self.of_prompts.set(compute, units, last, columns, norm);
                first
            }
            None => {
                self.of_prompts = Bf16Rows::default();
                x
            }
        };
        #[cfg(not(target_arch = "x86_64"))]
        let _ = of_prompts;
        self.set_but_prompts(compute, x, matrices, norm);
    }

    /// As [`Self::set`], the rows before those of prompts: those are there already, from [`Compute::gated`].
    ///
    /// # Panics
    /// As it does.
    pub(crate) fn set_but_prompts(
        &mut self,
        compute: &Compute,
        x: &[f32],
        matrices: &[&Matrix],
        norm: Option<Norm<'_>>,
    ) {
        self.rounding = compute.rounding;
        match compute.rounding {
            Rounding::Once => self.round(compute, x, matrices, norm),
            Rounding::Twice => {
                let mut parts = std::mem::take(&mut self.parts);
                compute.split(x, matrices[0].columns(), norm, &mut parts);
                self.round(compute, &parts[..2 * x.len()], matrices, None);
                self.parts = parts;
            }
        }
    }

    fn round(&mut self, compute: &Compute, x: &[f32], matrices: &[&Matrix], norm: Option<Norm<'_>>) {
        let columns = matrices[0].columns();
        let wanted = matrices.iter().fold(Corrections::default(), |wanted, matrix| {
            wanted.with(matrix.correction())
        });
        assert!(columns > 0 && columns.is_multiple_of(BLOCK) && x.len().is_multiple_of(columns));
        let rows = x.len() / columns;
        self.columns = columns;
        self.wanted = wanted;
        self.groups.clear();
        self.groups.extend(compute.groups(rows));
        // Widths come and go: what there was room for is not written again.
        let blocks = rows * columns / BLOCK;
        self.values.resize(self.values.len().max(blocks * QUADS), [0; 4]);
        self.scales.resize(self.scales.len().max(blocks), 0.0);
        self.corrections
            .resize(self.corrections.len().max(blocks * PARTS), 0);
        let (values, scales, corrections) = (
            SharedMut::new(&mut self.values),
            SharedMut::new(&mut self.scales),
            SharedMut::new(&mut self.corrections),
        );
        let groups = &self.groups;
        let one = |index: usize| {
            let group: Group = groups[index];
            let range = |width: usize| -> Range<usize> {
                group.first_row * width..(group.first_row + group.rows) * width
            };
            // SAFETY: groups are disjoint, each is written by one thread, and the buffers were sized above.
            let (values, scales, corrections) = unsafe {
                (
                    values.slice(range(columns / 4)),
                    scales.slice(range(columns / BLOCK)),
                    corrections.slice(range(columns / BLOCK * PARTS)),
                )
            };
            compute.dispatch.run(Quantize {
                x: &x[range(columns)],
                rows: group.rows,
                norm,
                wanted,
                values,
                scales,
                corrections,
            });
        };
        // A few thousand numbers are done before another thread has heard of them.
        let grain = (8192 / (columns * GROUP)).max(1);
        compute.pool.run(groups.len(), grain, &one);
    }
}

/// The rows of a group.
struct Quantize<'a> {
    /// `[rows, columns]`.
    x: &'a [f32],
    rows: usize,
    norm: Option<Norm<'a>>,
    wanted: Corrections,
    values: &'a mut [[i8; 4]],
    scales: &'a mut [f32],
    corrections: &'a mut [i32],
}

impl Operation for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.rows {
            1 => self.lone(simd),
            2 => self.group::<S, 2>(simd),
            3 => self.group::<S, 3>(simd),
            4 => self.group::<S, 4>(simd),
            5 => self.group::<S, 5>(simd),
            6 => self.group::<S, 6>(simd),
            7 => self.group::<S, 7>(simd),
            _ => self.group::<S, GROUP>(simd),
        }
    }
}

/// A block whose largest number is below this is multiplied as if that were it: 127 through less is infinite.
pub(super) const TINY: f32 = 3.75e-37;

/// Numbers of a block of a group, one of each row; what lies behind the last row is of no account.
type OfRows<T> = [T; LANES];

impl Quantize<'_> {
    /// A row by itself, as it is in a group to the bit; of one that is not finite, its scales. Nothing is interleaved, so a block stays
    /// in registers.
    #[inline(always)]
    fn lone<S: Simd>(self, simd: S) {
        /// What a sum of 16 values is always below half of: two sums lie in one float, exactly.
        const APART: f32 = 4096.0;
        let blocks = self.scales.len();
        assert!(self.x.len() == blocks * BLOCK && self.values.len() == blocks * QUADS);
        assert!(self.corrections.len() == blocks * PARTS);
        let mut factor = simd.splat(1.0);
        if let Some(norm) = self.norm {
            assert!(norm.weight.len() == self.x.len());
            factor = simd.splat(norm.factor(simd, self.x));
        }
        let zero = simd.splat(0.0);
        let mut suspicion = zero;
        let (mut parts, count) = self.wanted.parts(blocks);
        for block in 0..blocks {
            // SAFETY: the asserted lengths.
            let (mut a, mut b) = unsafe {
                let x = self.x.as_ptr().add(block * BLOCK);
                (simd.load(x), simd.load(x.add(LANES)))
            };
            if let Some(norm) = self.norm {
                // SAFETY: as above.
                unsafe {
                    let weight = norm.weight.as_ptr().add(block * BLOCK);
                    a = simd.mul(simd.mul(a, factor), simd.load(weight));
                    b = simd.mul(simd.mul(b, factor), simd.load(weight.add(LANES)));
                }
            }
            // Infinity times zero is not a number, and neither is anything added to that.
            suspicion = simd.fma(a, zero, simd.fma(b, zero, suspicion));
            let most = simd.reduce_max(simd.max(simd.abs(a), simd.abs(b)));
            let inverse = simd.splat(127.0 / most.max(TINY));
            let (a, b) = (simd.round(simd.mul(a, inverse)), simd.round(simd.mul(b, inverse)));
            // SAFETY: the asserted lengths; four bytes are four values. Products are at most 127, or of no account.
            unsafe {
                let to = self.values.as_mut_ptr().add(block * QUADS).cast::<i8>();
                simd.store_i8(to, a);
                simd.store_i8(to.add(LANES), b);
            }
            let sums = simd.fma(simd.to_float(b), simd.splat(APART), simd.to_float(a));
            let sums = simd.reduce_add(sums);
            // Plus zero: minus nothing is nothing, as it is where sums are integers.
            let second = (sums / APART).round_ties_even() + 0.0;
            let first = sums - APART * second;
            let scale = most / 127.0;
            self.scales[block] = scale;
            let sums = [first, second, first + second];
            for part in &mut parts[..count] {
                let sum = sums[part.sum];
                self.corrections[part.next] = if part.offset == 0.0 {
                    (scale * sum).to_bits().cast_signed()
                } else {
                    // Both are whole numbers.
                    (sum * -part.offset) as i32
                };
                part.next += part.step;
            }
        }
        if simd.reduce_add(suspicion).is_nan() {
            self.scales.fill(f32::NAN);
        }
    }

    #[inline(always)]
    fn group<S: Simd, const R: usize>(self, simd: S) {
        let columns = self.x.len() / R;
        let blocks = columns / BLOCK;
        assert!(self.x.len() == R * blocks * BLOCK);
        assert!(self.values.len() == blocks * QUADS * R && self.scales.len() == blocks * R);
        assert!(self.corrections.len() == blocks * PARTS * R);
        let mut norms = [1.0_f32; R];
        if let Some(norm) = self.norm {
            assert!(norm.weight.len() == columns);
            for (row, x) in self.x.chunks_exact(columns).enumerate() {
                norms[row] = norm.factor(simd, x);
            }
        }
        let zero = simd.splat(0.0);
        let mut suspicion = [zero; R];
        let mut quads = Quads::new();
        let (mut parts, count) = self.wanted.parts(blocks);
        // Divided and summed up for all rows at once.
        for block in 0..blocks {
            let mut numbers = [[zero; 2]; R];
            let mut most: OfRows<f32> = [0.0; LANES];
            for row in 0..R {
                // SAFETY: row and block are below what was asserted of `x`, and a norm's weights are as many as columns.
                let (mut a, mut b) = unsafe {
                    let x = self.x.as_ptr().add(row * columns + block * BLOCK);
                    (simd.load(x), simd.load(x.add(LANES)))
                };
                if let Some(norm) = self.norm {
                    let factor = simd.splat(norms[row]);
                    // SAFETY: as above.
                    unsafe {
                        let weight = norm.weight.as_ptr().add(block * BLOCK);
                        a = simd.mul(simd.mul(a, factor), simd.load(weight));
                        b = simd.mul(simd.mul(b, factor), simd.load(weight.add(LANES)));
                    }
                }
                // Infinity times zero is not a number, and neither is anything added to that.
                suspicion[row] = simd.fma(a, zero, simd.fma(b, zero, suspicion[row]));
                most[row] = simd.reduce_max(simd.max(simd.abs(a), simd.abs(b)));
                numbers[row] = [a, b];
            }
            let mut inverse: OfRows<f32> = [0.0; LANES];
            // SAFETY: there are 16 of each.
            let scales = unsafe {
                let most = simd.load(most.as_ptr());
                let inverses = simd.div(simd.splat(127.0), simd.max(most, simd.splat(TINY)));
                simd.store(inverse.as_mut_ptr(), inverses);
                simd.div(most, simd.splat(127.0))
            };
            for row in 0..R {
                let inverse = simd.splat(inverse[row]);
                let [a, b] = numbers[row];
                let mut values = [0_i32; QUADS];
                let to = values.as_mut_ptr().cast::<i8>();
                // SAFETY: `values` has 32 places of a byte. Products are at most 127, or of no account: their row's scales will
                // be no numbers.
                unsafe {
                    simd.store_i8(to, simd.round(simd.mul(a, inverse)));
                    simd.store_i8(to.add(LANES), simd.round(simd.mul(b, inverse)));
                }
                for (quad, value) in values.into_iter().enumerate() {
                    quads.values[quad * R + row] = value;
                }
            }
            let [first, second] = quads.sum_up::<S, R>(simd);
            let both = simd.add_i32(first, second);
            let place = block * R;
            // SAFETY: the asserted lengths; four bytes are four values; a part's last number goes before `blocks * PARTS`; of 16
            // numbers `R` are copied.
            unsafe {
                let to = self.values.as_mut_ptr().add(place * QUADS);
                std::ptr::copy_nonoverlapping(quads.values.as_ptr().cast(), to, QUADS * R);
                first_of::<S, R>(simd, scales, self.scales.as_mut_ptr().add(place));
                let sums = [simd.to_float(first), simd.to_float(second), simd.to_float(both)];
                for part in &mut parts[..count] {
                    let to = self.corrections.as_mut_ptr().add(part.next * R);
                    part.next += part.step;
                    let sum = sums[part.sum];
                    if part.offset == 0.0 {
                        first_of::<S, R>(simd, simd.mul(scales, sum), to.cast());
                    } else {
                        let mut numbers: OfRows<i32> = [0; LANES];
                        let excess = simd.mul(sum, simd.splat(-part.offset));
                        simd.store_i32(numbers.as_mut_ptr(), simd.round(excess));
                        std::ptr::copy_nonoverlapping(numbers.as_ptr(), to, R);
                    }
                }
            }
        }
        for (row, suspicion) in suspicion.into_iter().enumerate() {
            if simd.reduce_add(suspicion).is_nan() {
                let places = self.scales.iter_mut().skip(row).step_by(R);
                places.for_each(|scale| *scale = f32::NAN);
            }
        }
    }
}

/// Writes the first `R` numbers.
///
/// # Safety
/// `to` has places for them.
#[inline(always)]
unsafe fn first_of<S: Simd, const R: usize>(simd: S, numbers: S::F, to: *mut f32) {
    let mut all: OfRows<f32> = [0.0; LANES];
    // SAFETY: there are 16 places, of which `R` are copied, and the caller's promise.
    unsafe {
        simd.store(all.as_mut_ptr(), numbers);
        std::ptr::copy_nonoverlapping(all.as_ptr(), to, R);
    }
}

/// Places for quads of a block of a group.
const PLACES: usize = QUADS * GROUP;

/// Integers of a block of a group.
#[repr(align(64))]
struct Quads {
    /// Four values each, `[8, rows]`.
    values: [i32; PLACES],
    /// The sum of each four. Sixteen more: the last rows' are read with what lies behind them.
    sums: [i32; PLACES + LANES],
}

impl Quads {
    fn new() -> Self {
        Self {
            values: [0; PLACES],
            sums: [0; PLACES + LANES],
        }
    }

    /// The sums of values of each row, of its first half and of its second.
    #[inline(always)]
    fn sum_up<S: Simd, const R: usize>(&mut self, simd: S) -> [S::I; 2] {
        const { assert!(R <= GROUP && GROUP <= LANES) }
        const ONES: [u8; 64] = [1; 64];
        for start in (0..QUADS * R).step_by(LANES) {
            // SAFETY: the arrays have 64 places and more, a multiple of 16.
            unsafe {
                let values = simd.load_i32(self.values.as_ptr().add(start));
                let products = simd.dot(simd.no_products(), simd.load_bytes(ONES.as_ptr()), values);
                let sums = simd.settle(simd.splat_i32(0), products);
                simd.store_i32(self.sums.as_mut_ptr().add(start), sums);
            }
        }
        let mut halves = [simd.splat_i32(0); 2];
        for quad in 0..QUADS {
            let half = &mut halves[quad / (QUADS / 2)];
            // SAFETY: the last begins at 7 times 8 at most, and there are 80.
            *half = simd.add_i32(*half, unsafe { simd.load_i32(self.sums.as_ptr().add(quad * R)) });
        }
        halves
    }
}
