//! Rotary positions: how fast each pair of a head's numbers turns, and how that is stretched for long contexts.
//! Source: Su et al. 2021; linear scaling: Chen et al. 2023; YaRN: Peng et al. 2023, section 3 and appendix A; the
//! factors of Llama 3.1 and Phi 3 come with the file.

use std::f32::consts::TAU;

use super::config::{DecoderConfig, RopePairs};
use crate::gguf::GgufFile;
use crate::kernels::vector::{Norm, Turn};
use crate::{InvalidModel, LoadModel};
use candle_core::Device;

/// How positions beyond those that a model was trained with are reached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum RopeScaling {
    /// Every frequency is divided by this; 1 where there is no scaling.
    Linear(f32),
    /// Slow frequencies are divided by the factor, fast ones stay, and those between are mixed.
    Yarn(Yarn),
}

/// YaRN's numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Yarn {
    pub(crate) factor: f32,
    /// Tokens of context that the model was first trained with.
    pub(crate) original_context: f32,
    /// Turns within that context above which a frequency stays, and below which it is divided.
    pub(crate) beta_fast: f32,
    pub(crate) beta_slow: f32,
}

/// How fast each pair turns, in radians a token, and what sines and cosines are multiplied with.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rope {
    frequencies: Vec<f32>,
    magnitude: f32,
}

impl Rope {
    /// Of the layers that see everything.
    pub(crate) fn global(file: &GgufFile, config: &DecoderConfig) -> Result<Self, LoadModel> {
        let divisors = match &config.rope_divisors {
            Some(name) => Some(divisors(file, name, config.rope_dimensions / 2)?),
            None => None,
        };
        Ok(Self::new(
            config.rope_dimensions,
            config.rope_base,
            config.rope_scaling,
            config.rope_magnitude,
            divisors.as_deref(),
        ))
    }

    /// Of the layers that see only the sliding window, where theirs is another: they are not stretched, for
    /// they never see far.
    pub(crate) fn local(config: &DecoderConfig) -> Option<Self> {
        let base = config.rope_base_local?;
        Some(Self::new(
            config.rope_dimensions,
            base,
            RopeScaling::Linear(1.0),
            1.0,
            None,
        ))
    }

    fn new(
        dimensions: usize,
        base: f32,
        scaling: RopeScaling,
        magnitude: f32,
        divisors: Option<&[f32]>,
    ) -> Self {
        let divisor = |i: usize| divisors.and_then(|all| all.get(i)).copied().unwrap_or(1.0);
        let plain = |i: usize| 1.0 / base.powf(2.0 * i as f32 / dimensions as f32) / divisor(i);
        let (frequencies, stretched) = match scaling {
            RopeScaling::Linear(factor) => ((0..dimensions / 2).map(|i| plain(i) / factor).collect(), 1.0),
            RopeScaling::Yarn(yarn) => {
                let kept = yarn.kept(dimensions, base);
                let mixed = |i: usize| plain(i) * (kept(i) + (1.0 - kept(i)) / yarn.factor);
                (
                    (0..dimensions / 2).map(mixed).collect(),
                    1.0 + 0.1 * yarn.factor.ln(),
                )
            }
        };
        Self {
            frequencies,
            magnitude: magnitude * stretched,
        }
    }
}

impl Yarn {
    /// How much of pair `i`'s own frequency is kept, from 0 to 1.
    fn kept(self, dimensions: usize, base: f32) -> impl Fn(usize) -> f32 {
        let dimensions = dimensions as f32;
        // The pair that turns so often within the original context.
        let pair = |turns: f32| dimensions * (self.original_context / (turns * TAU)).ln() / (2.0 * base.ln());
        let low = pair(self.beta_fast).floor().max(0.0);
        let high = pair(self.beta_slow).ceil().min(dimensions - 1.0);
        move |i| 1.0 - ((i as f32 - low) / (high - low).max(0.001)).clamp(0.0, 1.0)
    }
}

fn divisors(file: &GgufFile, name: &str, count: usize) -> Result<Vec<f32>, LoadModel> {
    let tensor = file.tensor(name, &[count], &Device::Cpu)?;
    let divisors: Vec<f32> = tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?;
    match divisors.iter().find(|&&x| !(x.is_finite() && x > 0.0)) {
        Some(bad) => {
            Err(InvalidModel::inconsistent(format!("tensor {name}"), bad, "positive numbers").into())
        }
        None => Ok(divisors),
    }
}

/// Sines and cosines for the positions of one step, `[rows, dimensions / 2]`. Computed for each step:
/// a table over the whole context would take gigabytes for long ones.
pub(crate) struct Rotations {
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
    /// Pairs that are turned.
    pub(crate) half: usize,
}

impl Rotations {
    pub(crate) fn new(positions: impl Iterator<Item = usize>, rope: &Rope) -> Self {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for frequency in &rope.frequencies {
                let (s, c) = (position as f32 * frequency).sin_cos();
                cos.push(c * rope.magnitude);
                sin.push(s * rope.magnitude);
            }
        }
        Self {
            cos,
            sin,
            half: rope.frequencies.len(),
        }
    }

    /// What queries or keys go through that have this norm.
    pub(super) fn turn<'a>(&'a self, norm: Option<Norm<'a>>, pairs: RopePairs) -> Turn<'a> {
        Turn {
            norm,
            cos: &self.cos,
            sin: &self.sin,
            half: self.half,
            halves: pairs == RopePairs::Halves,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: RopeScaling = RopeScaling::Linear(1.0);

    /// Llama 3.1 stores what its slow frequencies are divided by.
    #[test]
    fn divisors_slow_the_rotation_down() {
        let plain = Rotations::new([12].into_iter(), &Rope::new(4, 100.0, NONE, 1.0, None));
        let slowed = Rotations::new(
            [12].into_iter(),
            &Rope::new(4, 100.0, NONE, 1.0, Some(&[1.0, 8.0])),
        );
        assert_eq!(plain.cos[0], slowed.cos[0]);
        assert!((slowed.sin[1] - (12.0_f32 * 0.1 / 8.0).sin()).abs() < 1e-6);
    }

    #[test]
    fn linear_scaling_takes_a_far_position_for_a_near_one() {
        let plain = Rotations::new([3].into_iter(), &Rope::new(8, 10_000.0, NONE, 1.0, None));
        let far = Rope::new(8, 10_000.0, RopeScaling::Linear(4.0), 1.0, None);
        let far = Rotations::new([12].into_iter(), &far);
        for (near, far) in plain.sin.iter().zip(&far.sin) {
            assert!((near - far).abs() < 1e-6);
        }
    }

    /// The paper's formulas, written down a second time: with r(i) the turns of pair i within the original
    /// context, the ramp goes by the pair's number between those of beta_fast and beta_slow turns.
    #[test]
    fn yarn_keeps_fast_pairs_and_divides_slow_ones() {
        let yarn = Yarn {
            factor: 4.0,
            original_context: 4096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
        };
        let (dimensions, base) = (128_usize, 10_000.0_f64);
        let rope = Rope::new(dimensions, base as f32, RopeScaling::Yarn(yarn), 1.0, None);
        let pair = |turns: f64| {
            dimensions as f64 * (4096.0 / (turns * std::f64::consts::TAU)).ln() / (2.0 * base.ln())
        };
        let (low, high) = (pair(32.0).floor(), pair(1.0).ceil());
        assert_eq!(
            (low, high),
            (20.0, 46.0),
            "as the reference implementation has it for these numbers"
        );
        for (i, found) in rope.frequencies.iter().enumerate() {
            let plain = base.powf(-2.0 * i as f64 / dimensions as f64);
            let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            let expected = plain / 4.0 * divided + plain * (1.0 - divided);
            assert!((f64::from(*found) / expected - 1.0).abs() < 1e-4, "pair {i}");
        }
        assert!((rope.magnitude - (1.0 + 0.1 * 4.0_f32.ln())).abs() < 1e-6);
    }
}
