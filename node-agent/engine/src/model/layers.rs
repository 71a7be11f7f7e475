//! The small parts: matrices of a file, norms.

use std::ops::Range;

use candle_core::Device;

use super::config::check_vector;
use crate::gguf::GgufFile;
use crate::kernels::vector::Norm;
use crate::kernels::{Compute, Matrix, Memory, WeightPrecision};
use crate::{InvalidModel, LoadModel};

/// Where weights come from and how they are to be held.
pub(super) struct Source<'a> {
    pub(super) file: &'a GgufFile,
    pub(super) compute: &'a Compute,
    pub(super) memory: Memory,
    pub(super) precision: WeightPrecision,
}

impl Source<'_> {
    /// A matrix of the file, which must have this shape.
    pub(super) fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Matrix, LoadModel> {
        self.part_of_matrix(name, shape, 0..shape[0])
    }

    /// Some rows of a matrix of the file, which must have this shape.
    pub(super) fn part_of_matrix(
        &self,
        name: &str,
        shape: [usize; 2],
        rows: Range<usize>,
    ) -> Result<Matrix, LoadModel> {
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
        let row_bytes = bytes.len() / shape[0];
        let bytes = &bytes[rows.start * row_bytes..rows.end * row_bytes];
        let shape = [rows.len(), shape[1]];
        Matrix::pack(
            self.compute,
            &self.memory,
            info.dtype,
            bytes,
            shape,
            self.precision,
            |read| self.file.forget(read),
        )
        .map_err(LoadModel::Allocate)
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
        check_vector(name, tensor.dtype())?;
        Ok(tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?)
    }
}

/// Root mean square norm.
pub(super) struct RmsNorm {
    weight: Vec<f32>,
    epsilon: f32,
}

impl RmsNorm {
    pub(super) fn as_norm(&self) -> Norm<'_> {
        Norm {
            weight: &self.weight,
            epsilon: self.epsilon,
        }
    }
}
