//! Rows of activations as a product takes them: 8-bit integers with a scale for every 32.

use std::ops::Range;

use super::pool::SharedMut;
use super::simd::{LANES, Simd};
use super::{Compute, Operation};

/// Numbers that share a scale, in weights and in activations.
pub(super) const BLOCK: usize = 32;
/// Four values, which a product reads at once.
const QUADS: usize = BLOCK / 4;
/// Rows that lie interleaved at most.
pub(super) const GROUP: usize = 8;
/// Sums that are kept of a block: of its first half, its second half, and both.
pub(super) const SUMS: usize = 3;

/// Rows, quantised: x = scale * q, with |q| <= 127.
///
/// Rows lie in groups of 8, the rest in groups that a product takes at once ([`Compute::groups`]), interleaved, so that it
/// walks along one pointer for all rows of a group. How they lie depends on the level: products are for the same one.
#[derive(Debug, Default)]
pub(crate) struct QuantizedRows {
    columns: usize,
    groups: Vec<Group>,
    /// Shape of a group: `[columns / 4, rows]`, each four values.
    values: Vec<[i8; 4]>,
    /// Shape of a group: `[columns / 32, rows]`.
    scales: Vec<f32>,
    /// Scale times sum of values. Shape of a group: `[columns / 32, 3, rows]`.
    sums: Vec<f32>,
    /// What bytes, which lie 128 too large in memory, have too much: -128 times the sum of values. Shape of a
    /// group: `[columns / 32, rows]`.
    excess: Vec<i32>,
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
    pub(super) sums: &'a [f32],
    pub(super) excess: &'a [i32],
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

    pub(super) fn groups(&self) -> &[Group] {
        &self.groups
    }

    #[inline]
    pub(super) fn view(&self, group: Group) -> GroupView<'_> {
        let range = |width: usize| group.first_row * width..(group.first_row + group.rows) * width;
        GroupView {
            group,
            values: &self.values[range(self.columns / 4)],
            scales: &self.scales[range(self.columns / BLOCK)],
            sums: &self.sums[range(self.columns / BLOCK * SUMS)],
            excess: &self.excess[range(self.columns / BLOCK)],
        }
    }

    /// Quantises `[rows, columns]` numbers. A row with a number that is not finite gets scales that are
    /// not either: nothing hides a broken model.
    ///
    /// # Panics
    /// When the columns are no multiple of 32, or do not divide the numbers.
    pub(crate) fn set(&mut self, compute: &Compute, x: &[f32], columns: usize) {
        assert!(columns > 0 && columns.is_multiple_of(BLOCK) && x.len().is_multiple_of(columns));
        let rows = x.len() / columns;
        self.columns = columns;
        self.groups.clear();
        self.groups.extend(compute.groups(rows));
        self.values.resize(rows * columns / 4, [0; 4]);
        self.scales.resize(rows * columns / BLOCK, 0.0);
        self.sums.resize(rows * columns / BLOCK * SUMS, 0.0);
        self.excess.resize(rows * columns / BLOCK, 0);
        let (values, scales, sums, excess) = (
            SharedMut::new(&mut self.values),
            SharedMut::new(&mut self.scales),
            SharedMut::new(&mut self.sums),
            SharedMut::new(&mut self.excess),
        );
        let groups = &self.groups;
        let one = |index: usize| {
            let group: Group = groups[index];
            let range = |width: usize| -> Range<usize> {
                group.first_row * width..(group.first_row + group.rows) * width
            };
            // SAFETY: groups are disjoint, each is written by one thread, and the buffers were sized above.
            let (values, scales, sums, excess) = unsafe {
                (
                    values.slice(range(columns / 4)),
                    scales.slice(range(columns / BLOCK)),
                    sums.slice(range(columns / BLOCK * SUMS)),
                    excess.slice(range(columns / BLOCK)),
                )
            };
            for row in 0..group.rows {
                let start = (group.first_row + row) * columns;
                compute.dispatch.run(Quantize {
                    x: &x[start..start + columns],
                    row,
                    rows: group.rows,
                    values,
                    scales,
                    sums,
                    excess,
                });
            }
        };
        // A few thousand numbers are done before another thread has heard of them.
        let grain = (8192 / (columns * GROUP)).max(1);
        compute.pool.run(groups.len(), grain, &one);
    }
}

/// One row of a group.
struct Quantize<'a> {
    x: &'a [f32],
    row: usize,
    rows: usize,
    values: &'a mut [[i8; 4]],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
    excess: &'a mut [i32],
}

impl Operation for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let zero = simd.splat(0.0);
        let mut suspicion = zero;
        for (block, x) in self.x.chunks_exact(BLOCK).enumerate() {
            // SAFETY: `x` has 32 numbers.
            let (a, b) = unsafe { (simd.load(x.as_ptr()), simd.load(x.as_ptr().add(LANES))) };
            // Infinity times zero is not a number, and neither is anything added to that.
            suspicion = simd.fma(a, zero, simd.fma(b, zero, suspicion));
            let most = simd.reduce_max(simd.max(simd.abs(a), simd.abs(b)));
            let scale = most / 127.0;
            let inverse = simd.splat(if most > 0.0 { 127.0 / most } else { 0.0 });
            let (a, b) = (simd.round(simd.mul(a, inverse)), simd.round(simd.mul(b, inverse)));
            let mut values = [[0_i8; 4]; QUADS];
            let to = values.as_mut_ptr().cast::<i8>();
            // SAFETY: `values` has 32 places, and the products above are at most 127.
            unsafe {
                simd.store_i8(to, a);
                simd.store_i8(to.add(LANES), b);
            }
            let places = self.values[block * QUADS * self.rows..][..QUADS * self.rows]
                .iter_mut()
                .skip(self.row)
                .step_by(self.rows);
            for (place, quad) in places.zip(values) {
                *place = quad;
            }
            let (first, second) = (simd.reduce_add_i32(a), simd.reduce_add_i32(b));
            self.scales[block * self.rows + self.row] = scale;
            self.excess[block * self.rows + self.row] = -128 * (first + second);
            for (index, sum) in [first, second, first + second].into_iter().enumerate() {
                self.sums[(block * SUMS + index) * self.rows + self.row] = scale * sum as f32;
            }
        }
        if simd.reduce_add(suspicion).is_nan() {
            self.scales
                .iter_mut()
                .skip(self.row)
                .step_by(self.rows)
                .for_each(|scale| *scale = f32::NAN);
        }
    }
}
