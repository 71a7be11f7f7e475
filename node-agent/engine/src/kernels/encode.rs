//! What an encoder needs beside products: the norm with a mean, GELU as BERT has it, and attention over
//! whole texts that lie one behind the other in a batch.

use std::ops::Range;

use super::pool::SharedMut;
use super::simd::{LANES, Simd, exp};
use super::vector::{HeadShape, load_part, store_part};
use super::{Compute, Operation};

/// Queries that walk along the keys together: each vector of keys is read once for all of them.
const QUERIES: usize = 4;
/// Numbers that one thread handles before another has heard of them.
const GRAIN_NUMBERS: usize = 8192;

/// `(x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias`, for each chunk of `weight.len()` numbers.
struct LayerNorm<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    epsilon: f32,
}

impl Operation for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let size = self.weight.len();
        for x in self.x.chunks_exact_mut(size) {
            let mut sum = simd.splat(0.0);
            for start in (0..size).step_by(LANES) {
                sum = simd.add(sum, load_part(simd, x, start));
            }
            let mean = simd.reduce_add(sum) / size as f32;
            let mut squares = simd.splat(0.0);
            for start in (0..size).step_by(LANES) {
                let apart = simd.sub(load_part(simd, x, start), simd.splat(mean));
                squares = simd.fma(apart, apart, squares);
            }
            // The zeros behind a row that is no multiple of the lanes were taken for numbers of it.
            let added = (size.next_multiple_of(LANES) - size) as f32;
            let variance = ((simd.reduce_add(squares) - added * mean * mean) / size as f32).max(0.0);
            let scale = simd.splat(1.0 / (variance + self.epsilon).sqrt());
            for start in (0..size).step_by(LANES) {
                let apart = simd.sub(load_part(simd, x, start), simd.splat(mean));
                let weight = load_part(simd, self.weight, start);
                let bias = load_part(simd, self.bias, start);
                store_part(simd, x, start, simd.fma(simd.mul(apart, scale), weight, bias));
            }
        }
    }
}

/// x / 2 * (1 + erf(x / sqrt 2)), by the polynomial 7.1.26 of Abramowitz & Stegun: erf within 1.5e-7.
struct GeluErf<'a>(&'a mut [f32]);

impl Operation for GeluErf<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (zero, one, half) = (simd.splat(0.0), simd.splat(1.0), simd.splat(0.5));
        for start in (0..self.0.len()).step_by(LANES) {
            let x = load_part(simd, self.0, start);
            let z = simd.abs(simd.mul(x, simd.splat(std::f32::consts::FRAC_1_SQRT_2)));
            let t = simd.div(one, simd.fma(simd.splat(0.327_591_1), z, one));
            let mut p = simd.splat(1.061_405_4);
            for c in [-1.453_152, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
                p = simd.fma(p, t, simd.splat(c));
            }
            // What is left of 1 above erf |x|.
            let rest = simd.mul(simd.mul(p, t), exp(simd, simd.sub(zero, simd.mul(z, z))));
            // max(x, 0) - |x| / 2 * rest is the same for both signs. `x` stands second, so that what is
            // not a number stays so.
            let product = simd.mul(simd.mul(half, simd.abs(x)), rest);
            store_part(simd, self.0, start, simd.sub(simd.max(zero, x), product));
        }
    }
}

/// Queries, keys and values of a batch: `[rows, heads * head_dim]` each.
#[derive(Clone, Copy)]
pub(crate) struct Attended<'a> {
    pub(crate) queries: &'a [f32],
    pub(crate) keys: &'a [f32],
    pub(crate) values: &'a [f32],
}

/// One head of one text: every row of it sees every other.
struct AttendText<'a> {
    from: Attended<'a>,
    shape: HeadShape,
    head: usize,
    rows: Range<usize>,
    /// `[rows of the batch, heads * head_dim]`; only the places of this text and head are written.
    out: SharedMut<f32>,
}

impl Operation for AttendText<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let dim = self.shape.head_dim;
        let width = self.shape.heads * dim;
        let count = self.rows.len();
        let padded = count.next_multiple_of(LANES);
        let row = |of: &'_ [f32], index: usize| -> Range<usize> {
            let start = (self.rows.start + index) * width + self.head * dim;
            debug_assert!(start + dim <= of.len());
            start..start + dim
        };
        // Keys with their columns as rows, so that sixteen of them meet one number of a query.
        let mut keys = vec![0.0_f32; dim * padded];
        for index in 0..count {
            let key = &self.from.keys[row(self.from.keys, index)];
            for (column, &x) in key.iter().enumerate() {
                keys[column * padded + index] = x;
            }
        }
        let scale = 1.0 / (dim as f32).sqrt();
        let mut scores = vec![0.0_f32; QUERIES * padded];
        let mut result = vec![0.0_f32; dim];
        for first in (0..count).step_by(QUERIES) {
            let here = QUERIES.min(count - first);
            // A query that stands in for one that is not there costs less than a second kernel.
            let queries: [&[f32]; QUERIES] = std::array::from_fn(|index| {
                let index = first + index.min(here - 1);
                &self.from.queries[row(self.from.queries, index)]
            });
            for start in (0..padded).step_by(LANES) {
                let mut sums = [simd.splat(0.0); QUERIES];
                for column in 0..dim {
                    let key = load_part(simd, &keys, column * padded + start);
                    for (sum, query) in sums.iter_mut().zip(queries) {
                        *sum = simd.fma(simd.splat(query[column] * scale), key, *sum);
                    }
                }
                for (index, sum) in sums.into_iter().enumerate() {
                    store_part(simd, &mut scores, index * padded + start, sum);
                }
            }
            for index in 0..here {
                let scores = &mut scores[index * padded..][..padded];
                let total = softmax(simd, scores, count);
                result.fill(0.0);
                for start in (0..dim).step_by(LANES) {
                    let mut sum = simd.splat(0.0);
                    for (other, &score) in scores[..count].iter().enumerate() {
                        let value = &self.from.values[row(self.from.values, other)];
                        sum = simd.fma(simd.splat(score), load_part(simd, value, start), sum);
                    }
                    store_part(simd, &mut result, start, simd.mul(sum, simd.splat(1.0 / total)));
                }
                let place = (self.rows.start + first + index) * width + self.head * dim;
                // SAFETY: `attend_texts` asserted that the rows are inside `out` and that no two texts
                // share one; each text and head is handed out once.
                unsafe { self.out.slice(place..place + dim) }.copy_from_slice(&result);
            }
        }
    }
}

/// Puts e^(x - max) in the place of the first `count` numbers. Gives their sum.
#[inline(always)]
fn softmax<S: Simd>(simd: S, scores: &mut [f32], count: usize) -> f32 {
    scores[count..].fill(f32::NEG_INFINITY);
    let mut most = simd.splat(f32::NEG_INFINITY);
    for start in (0..scores.len()).step_by(LANES) {
        most = simd.max(most, load_part(simd, scores, start));
    }
    let most = simd.splat(simd.reduce_max(most));
    for start in (0..scores.len()).step_by(LANES) {
        let x = simd.sub(load_part(simd, scores, start), most);
        store_part(simd, scores, start, exp(simd, x));
    }
    scores[count..].fill(0.0);
    let mut sum = simd.splat(0.0);
    for start in (0..scores.len()).step_by(LANES) {
        sum = simd.add(sum, load_part(simd, scores, start));
    }
    simd.reduce_add(sum)
}

impl Compute {
    /// Normalises each chunk of `weight.len()` numbers where it is.
    /// Source: Ba et al. 2016.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub(crate) fn layer_norm(&self, x: &mut [f32], weight: &[f32], bias: &[f32], epsilon: f32) {
        assert!(weight.len() == bias.len() && x.len().is_multiple_of(weight.len()));
        let chunk = (GRAIN_NUMBERS / weight.len()).max(1) * weight.len();
        self.pool.for_each_chunk(x, chunk, |_, x| {
            self.dispatch.run(LayerNorm {
                x,
                weight,
                bias,
                epsilon,
            });
        });
    }

    /// GELU with the error function, in place: as BERT was trained, where Gemma takes the tanh approximation.
    pub(crate) fn gelu_erf(&self, x: &mut [f32]) {
        self.pool
            .for_each_chunk(x, GRAIN_NUMBERS, |_, x| self.dispatch.run(GeluErf(x)));
    }

    /// Attention inside each text, without a mask. `lengths` are the rows of the texts, in their order.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub(crate) fn attend_texts(
        &self,
        from: Attended<'_>,
        shape: HeadShape,
        lengths: &[usize],
        out: &mut [f32],
    ) {
        let size = lengths.iter().sum::<usize>() * shape.heads * shape.head_dim;
        let sizes = [from.queries.len(), from.keys.len(), from.values.len(), out.len()];
        assert_eq!(sizes, [size; 4]);
        let mut end = 0;
        let texts: Vec<Range<usize>> = lengths
            .iter()
            .map(|length| {
                let start = end;
                end += length;
                start..end
            })
            .collect();
        let out = SharedMut::new(out);
        self.pool.run(texts.len() * shape.heads, 1, &|unit| {
            self.dispatch.run(AttendText {
                from,
                shape,
                head: unit % shape.heads,
                rows: texts[unit / shape.heads].clone(),
                out,
            });
        });
    }
}
