//! What is done to rows of numbers between two products: norms, gates, rotations, the search for the best.

use super::pool::Pool;
use super::simd::{LANES, Simd, exp};
use super::{Compute, Dispatch, Operation};

/// Numbers that one thread handles before another has heard of them.
const GRAIN_NUMBERS: usize = 8192;

/// x / (1 + e^-x).
#[inline(always)]
pub(super) fn silu<S: Simd>(simd: S, x: S::F) -> S::F {
    let one = simd.splat(1.0);
    let negative = simd.sub(simd.splat(0.0), x);
    simd.div(x, simd.add(one, exp(simd, negative)))
}

/// The tanh approximation of GELU, by x * sigmoid(2u), which is the same as x / 2 * (1 + tanh u).
#[inline(always)]
pub(super) fn gelu<S: Simd>(simd: S, x: S::F) -> S::F {
    let negative = simd.sub(simd.splat(0.0), gelu_exponent(simd, x));
    simd.div(x, simd.add(simd.splat(1.0), exp(simd, negative)))
}

/// That 2u.
#[inline(always)]
pub(super) fn gelu_exponent<S: Simd>(simd: S, x: S::F) -> S::F {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    let cubic = simd.fma(simd.mul(simd.splat(0.044_715), x), simd.mul(x, x), x);
    simd.mul(cubic, simd.splat(2.0 * SQRT_2_OVER_PI))
}

/// Sixteen numbers of a slice from `start`, zeros behind its end.
#[inline(always)]
pub(super) fn load_part<S: Simd>(simd: S, x: &[f32], start: usize) -> S::F {
    if x.len() >= start + LANES {
        // SAFETY: the length was just compared.
        unsafe { simd.load(x.as_ptr().add(start)) }
    } else {
        let mut part = [0.0; LANES];
        for (to, from) in part.iter_mut().zip(x.iter().skip(start)) {
            *to = *from;
        }
        // SAFETY: `part` has 16 numbers.
        unsafe { simd.load(part.as_ptr()) }
    }
}

/// Writes the numbers that fit into `x` from `start` on.
#[inline(always)]
pub(super) fn store_part<S: Simd>(simd: S, x: &mut [f32], start: usize, numbers: S::F) {
    if x.len() >= start + LANES {
        // SAFETY: the length was just compared.
        unsafe { simd.store(x.as_mut_ptr().add(start), numbers) }
    } else {
        let mut part = [0.0; LANES];
        // SAFETY: `part` has 16 places.
        unsafe { simd.store(part.as_mut_ptr(), numbers) }
        for (to, from) in x.iter_mut().skip(start).zip(part) {
            *to = from;
        }
    }
}

/// A root mean square norm: `x * weight / sqrt(mean(x^2) + epsilon)`. Source: Zhang & Sennrich 2019.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm<'a> {
    pub(crate) weight: &'a [f32],
    pub(crate) epsilon: f32,
}

impl Norm<'_> {
    /// What the numbers of a row are multiplied with before their weights.
    #[inline(always)]
    pub(super) fn factor<S: Simd>(&self, simd: S, x: &[f32]) -> f32 {
        let mut squares = [simd.splat(0.0); 2];
        for pair in x.chunks(2 * LANES) {
            // Both sums stay in registers: which one a vector goes to is known here.
            let first = load_part(simd, pair, 0);
            squares[0] = simd.fma(first, first, squares[0]);
            if pair.len() > LANES {
                let second = load_part(simd, pair, LANES);
                squares[1] = simd.fma(second, second, squares[1]);
            }
        }
        let square = simd.reduce_add(simd.add(squares[0], squares[1]));
        1.0 / (square / x.len() as f32 + self.epsilon).sqrt()
    }
}

/// Normalises each chunk of as many numbers as the norm has weights.
struct Normalize<'a> {
    norm: Norm<'a>,
    from: &'a [f32],
    to: &'a mut [f32],
}

impl Operation for Normalize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let size = self.norm.weight.len();
        for (from, to) in self.from.chunks_exact(size).zip(self.to.chunks_exact_mut(size)) {
            let factor = simd.splat(self.norm.factor(simd, from));
            for start in (0..size).step_by(LANES) {
                let x = simd.mul(load_part(simd, from, start), factor);
                let weighted = simd.mul(x, load_part(simd, self.norm.weight, start));
                store_part(simd, to, start, weighted);
            }
        }
    }
}

/// `to += from * by`, after a norm of each row of `from` where there is one.
struct Add<'a> {
    to: &'a mut [f32],
    from: &'a [f32],
    norm: Option<Norm<'a>>,
    by: f32,
}

impl Operation for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let size = self.norm.map_or(self.to.len(), |norm| norm.weight.len()).max(1);
        let by = simd.splat(self.by);
        for (from, to) in self.from.chunks_exact(size).zip(self.to.chunks_exact_mut(size)) {
            let factor = self
                .norm
                .map(|norm| (simd.splat(norm.factor(simd, from)), norm.weight));
            for start in (0..size).step_by(LANES) {
                let mut x = load_part(simd, from, start);
                if let Some((factor, weight)) = factor {
                    x = simd.mul(simd.mul(x, factor), load_part(simd, weight, start));
                }
                let sum = simd.add(load_part(simd, to, start), simd.mul(x, by));
                store_part(simd, to, start, sum);
            }
        }
    }
}

/// What queries and keys go through before they meet: a norm of each head where the model has one, and RoPE.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn<'a> {
    pub(crate) norm: Option<Norm<'a>>,
    /// `[rows, half]`, as `sin`.
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    /// Pairs of a head's numbers that are turned.
    pub(crate) half: usize,
    /// Whether the two of a pair are `half` apart; otherwise they are neighbours.
    pub(crate) halves: bool,
}

impl Turn<'_> {
    /// Turns a head of a row of the batch.
    ///
    /// # Panics
    /// When the head is too short, the norm not as long, or the row not there.
    #[inline(always)]
    pub(super) fn head<S: Simd>(&self, simd: S, row: usize, head: &mut [f32]) {
        if let Some(norm) = self.norm {
            assert_eq!(norm.weight.len(), head.len());
            let factor = simd.splat(norm.factor(simd, head));
            for start in (0..head.len()).step_by(LANES) {
                let x = simd.mul(load_part(simd, head, start), factor);
                let weighted = simd.mul(x, load_part(simd, norm.weight, start));
                store_part(simd, head, start, weighted);
            }
        }
        let half = self.half;
        let range = row * half..(row + 1) * half;
        let (cos, sin) = (&self.cos[range.clone()], &self.sin[range]);
        let turned = &mut head[..2 * half];
        if self.halves {
            let (first, second) = turned.split_at_mut(half);
            for start in (0..half).step_by(LANES) {
                let (a, b) = (load_part(simd, first, start), load_part(simd, second, start));
                let (c, s) = (load_part(simd, cos, start), load_part(simd, sin, start));
                let x = simd.sub(simd.mul(a, c), simd.mul(b, s));
                let y = simd.add(simd.mul(a, s), simd.mul(b, c));
                store_part(simd, first, start, x);
                store_part(simd, second, start, y);
            }
        } else {
            for (pair, (c, s)) in turned.chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
                let (a, b) = (pair[0], pair[1]);
                (pair[0], pair[1]) = (a * c - b * s, a * s + b * c);
            }
        }
    }
}

/// The heads of a row, one after the other.
struct TurnRow<'a> {
    turn: &'a Turn<'a>,
    row: usize,
    heads: &'a mut [f32],
    head_dim: usize,
}

impl Operation for TurnRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for head in self.heads.chunks_exact_mut(self.head_dim) {
            self.turn.head(simd, self.row, head);
        }
    }
}

/// The first of the largest numbers.
struct Argmax<'a>(&'a [f32]);

impl Operation for Argmax<'_> {
    type Output = Option<usize>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Option<usize> {
        // Where the largest is, is looked for in its part, and not in a whole vocabulary.
        const PART: usize = 4096;
        let mut best = (f32::NEG_INFINITY, self.0);
        let mut first = 0;
        for (index, part) in self.0.chunks(PART).enumerate() {
            let most = largest(simd, part);
            if most > best.0 {
                (best, first) = ((most, part), index * PART);
            }
        }
        Some(first + best.1.iter().position(|&x| x == best.0)?)
    }
}

/// The largest of some numbers; minus infinity when none is a number.
#[inline(always)]
fn largest<S: Simd>(simd: S, x: &[f32]) -> f32 {
    // Several at once, so that none waits for the one before.
    const CHAINS: usize = 4;
    let chunks = x.chunks_exact(CHAINS * LANES);
    let rest = chunks.remainder();
    let mut most = [simd.splat(f32::NEG_INFINITY); CHAINS];
    for chunk in chunks {
        for (chain, most) in most.iter_mut().enumerate() {
            *most = simd.max(load_part(simd, chunk, chain * LANES), *most);
        }
    }
    let mut whole = simd.splat(f32::NEG_INFINITY);
    for most in most {
        whole = simd.max(most, whole);
    }
    rest.iter().copied().fold(simd.reduce_max(whole), f32::max)
}

/// Numbers whose weights are added up together: see [`weight_sums`].
pub(crate) const CHUNK: usize = 1024;

/// `e^((x - most) * scale)`, a hair above nothing where that is less than e^-87.
pub(super) struct Weights<'a> {
    pub(super) x: &'a [f32],
    pub(super) most: f32,
    pub(super) scale: f32,
}

impl Weights<'_> {
    #[inline(always)]
    fn at<S: Simd>(&self, simd: S, start: usize) -> S::F {
        let x = simd.sub(load_part(simd, self.x, start), simd.splat(self.most));
        exp(simd, simd.mul(x, simd.splat(self.scale)))
    }
}

pub(super) struct WeightsTo<'a>(pub(super) Weights<'a>, pub(super) &'a mut [f32]);

impl Operation for WeightsTo<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self(weights, to) = self;
        for start in (0..to.len()).step_by(LANES) {
            let weights = weights.at(simd, start);
            store_part(simd, to, start, weights);
        }
    }
}

pub(super) struct WeightSums<'a>(pub(super) Weights<'a>);

impl Operation for WeightSums<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f32> {
        let Weights { x, most, scale } = self.0;
        let mut sums = Vec::with_capacity(x.len().div_ceil(CHUNK));
        for x in x.chunks(CHUNK) {
            let weights = Weights { x, most, scale };
            let whole = x.len() / LANES * LANES;
            let mut sum = simd.splat(0.0);
            for start in (0..whole).step_by(LANES) {
                sum = simd.add(sum, weights.at(simd, start));
            }
            let rest = x[whole..].iter().map(|x| ((x - most) * scale).exp()).sum::<f32>();
            sums.push(simd.reduce_add(sum) + rest);
        }
        sums
    }
}

impl Compute {
    /// Normalises each row of `from` into `to`.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub(crate) fn normalize(&self, norm: Norm<'_>, from: &[f32], to: &mut [f32]) {
        let size = norm.weight.len();
        assert!(from.len() == to.len() && from.len().is_multiple_of(size));
        let chunk = (GRAIN_NUMBERS / size).max(1) * size;
        self.pool.for_each_chunk(to, chunk, |index, to| {
            let from = &from[index * chunk..][..to.len()];
            self.dispatch.run(Normalize { norm, from, to });
        });
    }

    /// `to += from * by`, after a norm of each row of `from` where there is one.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub(crate) fn add(&self, to: &mut [f32], from: &[f32], norm: Option<Norm<'_>>, by: f32) {
        let size = norm.map_or(1, |norm| norm.weight.len());
        assert!(to.len() == from.len() && to.len().is_multiple_of(size));
        let chunk = (GRAIN_NUMBERS / size).max(1) * size;
        self.pool.for_each_chunk(to, chunk, |index, to| {
            let from = &from[index * chunk..][..to.len()];
            self.dispatch.run(Add { to, from, norm, by });
        });
    }

    /// Turns the heads of a row of the batch, on this thread.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub(crate) fn turn(&self, turn: &Turn<'_>, row: usize, heads: &mut [f32], head_dim: usize) {
        assert!(heads.len().is_multiple_of(head_dim));
        self.dispatch.run(TurnRow {
            turn,
            row,
            heads,
            head_dim,
        });
    }
}

/// Heads of a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadShape {
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
}

/// The first of the largest numbers; None when none is a number.
pub(crate) fn argmax(x: &[f32]) -> Option<usize> {
    Dispatch::best().run(Argmax(x))
}

/// `e^((x - most) * scale)` of each number, which `to` has room for. Minus infinity has a weight of e^-87.
///
/// # Panics
/// When lengths differ.
pub(crate) fn weights(x: &[f32], most: f32, scale: f32, to: &mut [f32]) {
    assert_eq!(x.len(), to.len());
    Dispatch::best().run(WeightsTo(Weights { x, most, scale }, to));
}

/// The sum of [`weights`] over each [`CHUNK`] numbers.
pub(crate) fn weight_sums(x: &[f32], most: f32, scale: f32) -> Vec<f32> {
    Dispatch::best().run(WeightSums(Weights { x, most, scale }))
}

/// The logarithm of the sum of all `e^x`; minus infinity where none is a number.
pub(crate) fn log_sum_exp(x: &[f32]) -> f64 {
    let most = argmax(x).map_or(f32::NEG_INFINITY, |best| x[best]);
    if most == f32::NEG_INFINITY {
        return most.into();
    }
    let sum: f64 = weight_sums(x, most, 1.0).into_iter().map(f64::from).sum();
    f64::from(most) + sum.ln()
}

/// Calls `work` with each row of `[rows, width]` numbers, on as many threads as it is worth.
pub(crate) fn for_each_row(
    pool: &Pool,
    x: &mut [f32],
    width: usize,
    work: impl Fn(usize, &mut [f32]) + Sync,
) {
    let rows = (GRAIN_NUMBERS / width).max(1);
    pool.for_each_chunk(x, rows * width, |index, x| {
        for (row, x) in x.chunks_exact_mut(width).enumerate() {
            work(index * rows + row, x);
        }
    });
}
