//! The small parts: matrices, norms, rotary positions.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};

use crate::gguf::GgufFile;
use crate::{InvalidModel, LoadModel};

/// A matrix `[rows, columns]` that rows of activations are multiplied with. The one place to change when
/// faster kernels take candle's place.
pub(super) struct Linear {
    inner: QMatMul,
    columns: usize,
}

impl Linear {
    pub(super) fn load(file: &GgufFile, name: &str, shape: [usize; 2]) -> Result<Self, LoadModel> {
        let tensor = file.tensor(name, &shape, &Device::Cpu)?;
        Self::new(Arc::new(tensor), shape[1])
    }

    pub(super) fn new(tensor: Arc<QTensor>, columns: usize) -> Result<Self, LoadModel> {
        Ok(Self {
            inner: QMatMul::from_arc(tensor)?,
            columns,
        })
    }

    /// `[m, columns]` to `[m, rows]`.
    pub(super) fn forward(&self, x: &[f32]) -> candle_core::Result<Vec<f32>> {
        let rows = x.len() / self.columns;
        let x = Tensor::from_slice(x, (rows, self.columns), &Device::Cpu)?;
        self.inner.forward(&x)?.flatten_all()?.to_vec1()
    }
}

/// The embedding table, of which only the rows that are looked up are dequantised.
pub(super) struct Embedding {
    table: Arc<QTensor>,
    hidden: usize,
    scale: f32,
}

impl Embedding {
    pub(super) fn new(table: Arc<QTensor>, hidden: usize, scale: f32) -> Self {
        Self { table, hidden, scale }
    }

    /// Rows for these tokens, `[tokens, hidden]`.
    pub(super) fn forward(&self, tokens: &[u32]) -> candle_core::Result<Vec<f32>> {
        let row_bytes = self.hidden / self.table.dtype().block_size() * self.table.dtype().type_size();
        let data = self.table.data()?;
        let mut out = Vec::with_capacity(tokens.len() * self.hidden);
        for &token in tokens {
            let start = token as usize * row_bytes;
            let bytes = data.get(start..start + row_bytes);
            let bytes = bytes
                .ok_or_else(|| candle_core::Error::Msg(format!("token {token} is not in the vocabulary")))?;
            out.extend(self.row(bytes)?);
        }
        out.iter_mut().for_each(|x| *x *= self.scale);
        Ok(out)
    }

    fn row(&self, bytes: &[u8]) -> candle_core::Result<Vec<f32>> {
        let row = candle_core::quantized::ggml_file::qtensor_from_ggml(
            self.table.dtype(),
            bytes,
            vec![1, self.hidden],
            &Device::Cpu,
        )?;
        row.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()
    }
}

/// Root mean square norm.
pub(super) struct RmsNorm {
    weight: Vec<f32>,
    epsilon: f32,
}

impl RmsNorm {
    pub(super) fn load(file: &GgufFile, name: &str, size: usize, epsilon: f32) -> Result<Self, LoadModel> {
        Ok(Self {
            weight: vector(file, name, size)?,
            epsilon,
        })
    }

    /// Normalises each row of `x` into `out`.
    pub(super) fn forward(&self, x: &[f32], out: &mut Vec<f32>) {
        out.clear();
        out.extend_from_slice(x);
        self.apply(out);
    }

    /// Normalises each row where it is.
    pub(super) fn apply(&self, x: &mut [f32]) {
        for row in x.chunks_exact_mut(self.weight.len()) {
            let square: f32 = row.iter().map(|x| x * x).sum();
            let scale = 1.0 / (square / row.len() as f32 + self.epsilon).sqrt();
            for (x, weight) in row.iter_mut().zip(&self.weight) {
                *x *= scale * weight;
            }
        }
    }
}

/// A vector of a file, as floats.
fn vector(file: &GgufFile, name: &str, size: usize) -> Result<Vec<f32>, LoadModel> {
    let tensor = file.tensor(name, &[size], &Device::Cpu)?;
    if !matches!(tensor.dtype(), GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16) {
        return Err(InvalidModel::unsupported(
            format!("the type of tensor {name}"),
            format!("{:?}", tensor.dtype()),
            "F32, F16 and BF16 for norms",
        )
        .into());
    }
    Ok(tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?)
}

/// Sines and cosines for the positions of one step, `[rows, dimensions / 2]`. Computed for each step:
/// a table over the whole context would take gigabytes for long ones.
pub(super) struct Rotations {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Rotations {
    pub(super) fn new(
        positions: impl Iterator<Item = usize>,
        dimensions: usize,
        base: f32,
        scale: f32,
    ) -> Self {
        let half = dimensions / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| 1.0 / base.powf(2.0 * i as f32 / dimensions as f32))
            .collect();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for frequency in &frequencies {
                let (s, c) = (position as f32 / scale * frequency).sin_cos();
                cos.push(c);
                sin.push(s);
            }
        }
        Self { cos, sin, half }
    }

    /// Turns the heads of row `row`; `head` has at least `dimensions` numbers.
    pub(super) fn turn(&self, row: usize, head: &mut [f32], halves: bool) {
        let range = row * self.half..(row + 1) * self.half;
        let (cos, sin) = (&self.cos[range.clone()], &self.sin[range]);
        if halves {
            let (first, rest) = head.split_at_mut(self.half);
            for (((a, b), c), s) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
                (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
            }
        } else {
            for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                let (a, b) = (pair[0], pair[1]);
                (pair[0], pair[1]) = (a * c - b * s, a * s + b * c);
            }
        }
    }
}
