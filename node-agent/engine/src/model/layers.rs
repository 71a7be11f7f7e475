//! The small parts: matrices of a file, norms, rotary positions.

use candle_core::Device;
use candle_core::quantized::GgmlDType;

use crate::gguf::GgufFile;
use crate::kernels::{Compute, Matrix, WeightPrecision};
use crate::{InvalidModel, LoadModel};

/// Where weights come from and how they are to be held.
pub(super) struct Source<'a> {
    pub(super) file: &'a GgufFile,
    pub(super) compute: &'a Compute,
    pub(super) precision: WeightPrecision,
}

impl Source<'_> {
    /// A matrix of the file, which must have this shape.
    pub(super) fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Matrix, LoadModel> {
        let info = self.file.info(name)?;
        if info.shape != shape {
            return Err(InvalidModel::inconsistent(
                format!("shape of tensor {name}"),
                format!("{:?}", info.shape),
                format!("{shape:?}"),
            )
            .into());
        }
        let bytes = self.file.tensor_bytes(name)?;
        Matrix::pack(self.compute, info.dtype, bytes, shape, self.precision).map_err(LoadModel::Allocate)
    }

    /// A norm of the file, of this size.
    pub(super) fn norm(&self, name: &str, size: usize, epsilon: f32) -> Result<RmsNorm, LoadModel> {
        Ok(RmsNorm {
            weight: self.vector(name, size)?,
            epsilon,
        })
    }

    /// A vector of the file, of this size.
    pub(super) fn vector(&self, name: &str, size: usize) -> Result<Vec<f32>, LoadModel> {
        let tensor = self.file.tensor(name, &[size], &Device::Cpu)?;
        if !matches!(tensor.dtype(), GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16) {
            return Err(InvalidModel::unsupported(
                format!("the type of tensor {name}"),
                format!("{:?}", tensor.dtype()),
                "F32, F16 and BF16 for norms and biases",
            )
            .into());
        }
        Ok(tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?)
    }
}

/// Root mean square norm.
pub(super) struct RmsNorm {
    weight: Vec<f32>,
    epsilon: f32,
}

impl RmsNorm {
    /// Normalises each row of `x` into `out`.
    pub(super) fn forward(&self, compute: &Compute, x: &[f32], out: &mut Vec<f32>) {
        out.resize(x.len(), 0.0);
        compute.rms_norm(x, out, &self.weight, self.epsilon);
    }

    /// Normalises each row where it is.
    pub(super) fn apply(&self, compute: &Compute, x: &mut [f32]) {
        compute.rms_norm_in_place(x, &self.weight, self.epsilon);
    }
}

/// Sines and cosines for the positions of one step, `[rows, dimensions / 2]`. Computed for each step:
/// a table over the whole context would take gigabytes for long ones.
pub(crate) struct Rotations {
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
}

impl Rotations {
    pub(crate) fn new(
        positions: impl Iterator<Item = usize>,
        dimensions: usize,
        base: f32,
        scale: f32,
        divisors: Option<&[f32]>,
    ) -> Self {
        let divisor = |i: usize| divisors.and_then(|all| all.get(i)).copied().unwrap_or(1.0);
        let frequencies: Vec<f32> = (0..dimensions / 2)
            .map(|i| 1.0 / base.powf(2.0 * i as f32 / dimensions as f32) / divisor(i))
            .collect();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for frequency in &frequencies {
                let (s, c) = (position as f32 / scale * frequency).sin_cos();
                cos.push(c);
                sin.push(s);
            }
        }
        Self { cos, sin }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 3.1 stores what its slow frequencies are divided by.
    #[test]
    fn divisors_slow_the_rotation_down() {
        let plain = Rotations::new([12].into_iter(), 4, 100.0, 1.0, None);
        let slowed = Rotations::new([12].into_iter(), 4, 100.0, 1.0, Some(&[1.0, 8.0]));
        assert_eq!(plain.cos[0], slowed.cos[0]);
        assert!((slowed.sin[1] - (12.0_f32 * 0.1 / 8.0).sin()).abs() < 1e-6);
    }
}
