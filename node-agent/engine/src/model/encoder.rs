//! The BERT-type encoder: texts to vectors, by mean pooling and L2 norm.
//! Source: Devlin et al. 2018; pooling as sentence-transformers does it.
//!
//! A batch is ragged: the rows of its texts lie one behind the other, without padding. Products take all
//! rows at once, attention goes text by text. A text's vector is the same in any batch, bit for bit.

use std::path::Path;

use candle_core::quantized::GgmlDType;
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::bert::{EncoderConfig, WEIGHTS};
use crate::kernels::encode::Attended;
use crate::kernels::vector::{HeadShape, for_each_row};
use crate::kernels::{Combine, Compute, Matrix, Memory, QuantizedRows, Rows, Target, WeightPrecision};
use crate::{InvalidModel, LoadModel};

/// Rows of a batch at most, unless one text has more: enough to keep every thread busy with whole tiles,
/// and few megabytes for what is between the layers.
const BATCH_ROWS: usize = 1024;

/// An affine map.
struct Dense {
    weight: Matrix,
    bias: Vec<f32>,
}

struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    epsilon: f32,
}

struct Layer {
    query: Dense,
    key: Dense,
    value: Dense,
    attended: Dense,
    attended_norm: Norm,
    up: Dense,
    down: Dense,
    fed_norm: Norm,
}

/// An encoder in memory.
pub(crate) struct Encoder {
    config: EncoderConfig,
    compute: Compute,
    /// `[vocabulary, hidden]`, `[positions, hidden]`; the embedding of the first kind of text is in both.
    words: Vec<f32>,
    positions: Vec<f32>,
    norm: Norm,
    layers: Vec<Layer>,
}

/// What is between the layers, `[rows, …]`.
#[derive(Default)]
struct Scratch {
    x: Vec<f32>,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    attended: Vec<f32>,
    fed: Vec<f32>,
}

/// The tensors of a file.
struct Weights<'a> {
    tensors: SafeTensors<'a>,
    compute: &'a Compute,
    memory: Memory,
}

impl Weights<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, LoadModel> {
        // Some exports put everything under `bert.`.
        let tensor = self
            .tensors
            .tensor(name)
            .or_else(|_| self.tensors.tensor(&format!("bert.{name}")))
            .map_err(|_| InvalidModel::missing(format!("tensor {name}")))?;
        if tensor.shape() != shape {
            return Err(InvalidModel::inconsistent(
                format!("shape of tensor {name}"),
                format!("{:?}", tensor.shape()),
                format!("{shape:?}"),
            )
            .into());
        }
        Ok(tensor)
    }

    fn vector(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadModel> {
        let tensor = self.tensor(name, shape)?;
        let bytes = tensor.data();
        let pairs = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
        Ok(match number_format(name, tensor.dtype())? {
            GgmlDType::F16 => pairs().map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
            GgmlDType::BF16 => pairs().map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
            _ => bytes
                .chunks_exact(4)
                .map(|four| f32::from_le_bytes(std::array::from_fn(|i| four[i])))
                .collect(),
        })
    }

    fn dense(&self, name: &str, out: usize, inner: usize) -> Result<Dense, LoadModel> {
        let (weight, shape) = (format!("{name}.weight"), [out, inner]);
        let tensor = self.tensor(&weight, &shape)?;
        let format = number_format(&weight, tensor.dtype())?;
        // As the file has them: vectors are kept for years and compared with those of other programs, so they
        // are not rounded to 8 bits on the way.
        let weight = Matrix::pack(
            self.compute,
            &self.memory,
            format,
            tensor.data(),
            shape,
            WeightPrecision::Native,
            |_| (),
        );
        Ok(Dense {
            weight: weight.map_err(LoadModel::Allocate)?,
            bias: self.vector(&format!("{name}.bias"), &[out])?,
        })
    }

    fn norm(&self, name: &str, size: usize, epsilon: f64) -> Result<Norm, LoadModel> {
        Ok(Norm {
            weight: self.vector(&format!("{name}.weight"), &[size])?,
            bias: self.vector(&format!("{name}.bias"), &[size])?,
            epsilon: epsilon as f32,
        })
    }
}

/// A number format of safetensors by the name that kernels have for it.
fn number_format(name: &str, dtype: Dtype) -> Result<GgmlDType, InvalidModel> {
    match dtype {
        Dtype::F32 => Ok(GgmlDType::F32),
        Dtype::F16 => Ok(GgmlDType::F16),
        Dtype::BF16 => Ok(GgmlDType::BF16),
        other => Err(InvalidModel::unsupported(
            format!("the type of tensor {name}"),
            format!("{other:?}"),
            "F32, F16 and BF16",
        )),
    }
}

impl Dense {
    /// Rows of the bias, which a product is then added to.
    fn start(&self, rows: usize, out: &mut Vec<f32>) {
        out.clear();
        for _ in 0..rows {
            out.extend_from_slice(&self.bias);
        }
    }

    /// Adds the map of `from` to `to`.
    fn add_to(&self, compute: &Compute, from: &[f32], to: &mut [f32]) {
        for row in to.chunks_exact_mut(self.bias.len()) {
            row.iter_mut().zip(&self.bias).for_each(|(x, bias)| *x += bias);
        }
        let rows = Rows {
            floats: from,
            quantized: &QuantizedRows::default(),
        };
        let target = Target {
            matrix: &self.weight,
            out: to,
        };
        compute.product(rows, &mut [target], Combine::Add);
    }
}

impl Norm {
    fn apply(&self, compute: &Compute, x: &mut [f32]) {
        compute.layer_norm(x, &self.weight, &self.bias, self.epsilon);
    }
}

impl Encoder {
    /// Loads the weights of a folder.
    pub(crate) fn load(folder: &Path, config: EncoderConfig, compute: Compute) -> Result<Self, LoadModel> {
        config.facts(folder)?;
        let map = crate::mmap::map(&folder.join(WEIGHTS))?;
        let tensors = SafeTensors::deserialize(&map)
            .map_err(|error| InvalidModel::inconsistent(WEIGHTS, error, "a sound safetensors file"))?;
        let weights = Weights {
            tensors,
            compute: &compute,
            memory: Memory::for_bytes(map.len() + map.len() / 4).map_err(LoadModel::Allocate)?,
        };
        let (hidden, epsilon) = (config.hidden_size, config.layer_norm_eps);
        let words = weights.vector("embeddings.word_embeddings.weight", &[config.vocab_size, hidden])?;
        let mut positions = weights.vector(
            "embeddings.position_embeddings.weight",
            &[config.max_position_embeddings, hidden],
        )?;
        // Every text is of the first of two kinds.
        let kinds = weights.vector("embeddings.token_type_embeddings.weight", &[2, hidden])?;
        for position in positions.chunks_exact_mut(hidden) {
            position.iter_mut().zip(&kinds).for_each(|(x, kind)| *x += kind);
        }
        let norm = weights.norm("embeddings.LayerNorm", hidden, epsilon)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::load(&weights, &config, index))
            .collect::<Result<Vec<Layer>, LoadModel>>()?;
        Ok(Self {
            words,
            positions,
            norm,
            layers,
            compute,
            config,
        })
    }

    /// Texts in portions of a size that is worth computing at once.
    pub(crate) fn batches(texts: &[Vec<u32>]) -> impl Iterator<Item = &[Vec<u32>]> {
        let mut left = texts;
        std::iter::from_fn(move || {
            let mut rows = 0;
            let fit = left.iter().take_while(|text| {
                rows += text.len();
                rows <= BATCH_ROWS
            });
            let count = fit.count().max(1).min(left.len());
            let (batch, rest) = left.split_at(count);
            left = rest;
            (!batch.is_empty()).then_some(batch)
        })
    }

    /// The vectors of texts, each of length 1. Texts must fit the positions and have a token at least.
    pub(crate) fn embed(&self, texts: &[Vec<u32>]) -> Vec<Vec<f32>> {
        let hidden = self.config.hidden_size;
        let lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
        let places: Vec<(usize, usize)> = texts
            .iter()
            .flat_map(|text| text.iter().map(|&token| token as usize).zip(0..))
            .collect();
        let mut scratch = Scratch::default();
        scratch.x.resize(places.len() * hidden, 0.0);
        for_each_row(&self.compute.pool, &mut scratch.x, hidden, |index, x| {
            let (token, position) = places[index];
            let word = &self.words[token * hidden..][..hidden];
            let position = &self.positions[position * hidden..][..hidden];
            for ((x, word), position) in x.iter_mut().zip(word).zip(position) {
                *x = word + position;
            }
        });
        self.norm.apply(&self.compute, &mut scratch.x);
        let shape = HeadShape {
            heads: self.config.num_attention_heads,
            head_dim: hidden / self.config.num_attention_heads,
        };
        for layer in &self.layers {
            layer.forward(&self.compute, shape, &lengths, &mut scratch);
        }
        let mut rows = scratch.x.as_slice();
        lengths
            .into_iter()
            .map(|length| {
                let (text, rest) = rows.split_at(length * hidden);
                rows = rest;
                pool_rows(text, hidden)
            })
            .collect()
    }
}

/// The mean of rows, made a vector of length 1.
fn pool_rows(rows: &[f32], width: usize) -> Vec<f32> {
    let mut mean = vec![0.0_f32; width];
    for row in rows.chunks_exact(width) {
        mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
    let length = mean.iter().map(|x| x * x).sum::<f32>().sqrt();
    // A vector of zeros has no direction; it stays what it is. The number of rows falls out.
    let scale = if length == 0.0 { 1.0 } else { length.recip() };
    mean.iter_mut().for_each(|x| *x *= scale);
    mean
}

impl Layer {
    fn load(weights: &Weights<'_>, config: &EncoderConfig, index: usize) -> Result<Self, LoadModel> {
        let name = |part: &str| format!("encoder.layer.{index}.{part}");
        let (hidden, feed_forward, epsilon) = (
            config.hidden_size,
            config.intermediate_size,
            config.layer_norm_eps,
        );
        Ok(Self {
            query: weights.dense(&name("attention.self.query"), hidden, hidden)?,
            key: weights.dense(&name("attention.self.key"), hidden, hidden)?,
            value: weights.dense(&name("attention.self.value"), hidden, hidden)?,
            attended: weights.dense(&name("attention.output.dense"), hidden, hidden)?,
            attended_norm: weights.norm(&name("attention.output.LayerNorm"), hidden, epsilon)?,
            up: weights.dense(&name("intermediate.dense"), feed_forward, hidden)?,
            down: weights.dense(&name("output.dense"), hidden, feed_forward)?,
            fed_norm: weights.norm(&name("output.LayerNorm"), hidden, epsilon)?,
        })
    }

    fn forward(&self, compute: &Compute, shape: HeadShape, lengths: &[usize], scratch: &mut Scratch) {
        let Scratch {
            x,
            queries,
            keys,
            values,
            attended,
            fed,
        } = scratch;
        let count: usize = lengths.iter().sum();
        let mut targets = Vec::with_capacity(3);
        for (dense, out) in [
            (&self.query, &mut *queries),
            (&self.key, &mut *keys),
            (&self.value, &mut *values),
        ] {
            dense.start(count, out);
            targets.push(Target {
                matrix: &dense.weight,
                out,
            });
        }
        let rows = Rows {
            floats: x,
            quantized: &QuantizedRows::default(),
        };
        compute.product(rows, &mut targets, Combine::Add);
        drop(targets);
        attended.resize(queries.len(), 0.0);
        let from = Attended {
            queries,
            keys,
            values,
        };
        compute.attend_texts(from, shape, lengths, attended);
        self.attended.add_to(compute, attended, x);
        self.attended_norm.apply(compute, x);
        fed.clear();
        fed.resize(count * self.up.weight.rows(), 0.0);
        self.up.add_to(compute, x, fed);
        compute.gelu_erf(fed);
        self.down.add_to(compute, fed, x);
        self.fed_norm.apply(compute, x);
    }
}
