//! The decoders of this engine (llama and kin) over candle's tensors, for devices that have kernels of
//! candle's: the same batches, the same blocks of the cache, other arithmetic.
//!
//! Weights stay as the file has them ([`QMatMul`]). The cache is two tensors a layer, `[places, kv_heads *
//! head_dim]`; a place is a block's number and a token in it. Each step gathers what its queries see.

use candle_core::quantized::QMatMul;
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::ops::{rms_norm, silu, softmax_last_dim};
use candle_nn::rotary_emb::{rope, rope_i};

use super::Beginning;
use super::step::{Angles, Group, Step};
use crate::LoadModel;
use crate::engine::Precision;
use crate::gguf::GgufFile;
use crate::inspect::KvType;
use crate::kernels::attention::BLOCK_TOKENS;
use crate::kv::BlockTable;
use crate::model::{Activation, DecoderConfig, Rope, RopePairs, Row};

/// Keys and values of one layer.
struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

struct Layer {
    attention_norm: Tensor,
    query: QMatMul,
    key: QMatMul,
    value: QMatMul,
    output: QMatMul,
    /// Biases of query, key and value.
    biases: Option<[Tensor; 3]>,
    query_norm: Option<Tensor>,
    key_norm: Option<Tensor>,
    post_attention_norm: Option<Tensor>,
    feed_norm: Tensor,
    gate: QMatMul,
    up: QMatMul,
    down: QMatMul,
    post_feed_norm: Option<Tensor>,
    local: bool,
    cache: LayerCache,
}

/// A decoder on a device.
pub(crate) struct DeviceDecoder {
    config: DecoderConfig,
    device: Device,
    embedding: QMatMul,
    layers: Vec<Layer>,
    norm: Tensor,
    output: QMatMul,
    rope: Rope,
    local_rope: Option<Rope>,
    logits: Vec<f32>,
}

/// Where weights come from and go to.
struct Source<'a> {
    file: &'a GgufFile,
    device: &'a Device,
    /// As 32-bit floats.
    exact: bool,
}

impl Source<'_> {
    fn matrix(&self, name: &str, shape: [usize; 2]) -> std::result::Result<QMatMul, LoadModel> {
        let tensor = self.file.tensor(name, &shape, self.device)?;
        Ok(if self.exact {
            QMatMul::Tensor(tensor.dequantize(self.device)?)
        } else {
            QMatMul::from_qtensor(tensor)?
        })
    }

    fn vector(&self, name: &str, size: usize) -> std::result::Result<Tensor, LoadModel> {
        let tensor = self.file.tensor(name, &[size], &Device::Cpu)?;
        Ok(tensor
            .dequantize(&Device::Cpu)?
            .to_dtype(DType::F32)?
            .to_device(self.device)?)
    }
}

impl DeviceDecoder {
    /// Copies the weights to the device and takes the memory of the whole cache there. `progress` is told
    /// layers done and layers in all.
    pub(super) fn load(
        beginning: &Beginning<'_>,
        device: &Device,
        mut progress: impl FnMut(usize, usize),
    ) -> std::result::Result<Self, LoadModel> {
        let (file, config) = (beginning.file, beginning.config.clone());
        config.check_tensors(file)?;
        let source = Source {
            file,
            device,
            exact: beginning.options.precision == Precision::Float,
        };
        let number = match beginning.options.kv_type {
            KvType::F32 => DType::F32,
            KvType::F16 | KvType::Q8 => DType::F16,
        };
        let shape = [config.vocab_size, config.hidden_size];
        let embedding = source.matrix("token_embd.weight", shape)?;
        let output = if config.own_output {
            source.matrix("output.weight", shape)?
        } else {
            embedding.clone()
        };
        let places = beginning.blocks.0 * BLOCK_TOKENS;
        let mut layers = Vec::with_capacity(config.layers);
        for index in 0..config.layers {
            let cache = LayerCache::new(places, &config, number, device)?;
            layers.push(Layer::load(&source, &config, index, cache)?);
            progress(index + 1, config.layers);
        }
        Ok(Self {
            norm: source.vector("output_norm.weight", config.hidden_size)?,
            rope: Rope::global(file, &config)?,
            local_rope: Rope::local(&config),
            config,
            device: device.clone(),
            embedding,
            layers,
            output,
            logits: Vec::new(),
        })
    }

    pub(super) fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// One step. Blocks for every position must be reserved, and tokens in the vocabulary.
    pub(super) fn forward(&mut self, rows: &[Row], tables: &[&BlockTable]) -> Result<()> {
        let (config, device) = (&self.config, &self.device);
        let step = Step::new(
            rows,
            tables,
            config,
            (&self.rope, self.local_rope.as_ref()),
            device,
        )?;
        let tokens: Vec<u32> = rows.iter().map(|row| row.token).collect();
        let mut x = self.embedding.embedding(&Tensor::new(tokens, device)?)?;
        if config.embedding_scale != 1.0 {
            x = x.affine(config.embedding_scale.into(), 0.0)?;
        }
        for layer in &self.layers {
            x = layer.attend(config, &step, &x)?;
            x = layer.feed(config, &x)?;
        }
        let wanted: Vec<u32> = (0..)
            .zip(rows)
            .filter(|(_, row)| row.wants_logits)
            .map(|(index, _)| index)
            .collect();
        self.logits.clear();
        if wanted.is_empty() {
            return Ok(());
        }
        if wanted.len() < rows.len() {
            x = x.index_select(&Tensor::new(wanted, device)?, 0)?;
        }
        let normed = rms_norm(&x, &self.norm, config.norm_epsilon)?;
        self.logits = self.output.forward(&normed)?.flatten_all()?.to_vec1()?;
        Ok(())
    }

    /// What the latest step gave, `[rows that want them, vocabulary]`.
    pub(super) fn logits(&mut self) -> &mut [f32] {
        &mut self.logits
    }
}

impl LayerCache {
    fn new(places: usize, config: &DecoderConfig, number: DType, device: &Device) -> Result<Self> {
        let zeros = || Tensor::zeros((places, config.kv_heads * config.head_dim), number, device);
        Ok(Self {
            keys: zeros()?,
            values: zeros()?,
        })
    }

    /// Writes the keys and values of a step, `[rows, kv_heads * head_dim]`, where they belong.
    fn write(&self, step: &Step, keys: &Tensor, values: &Tensor) -> Result<()> {
        for (cache, numbers) in [(&self.keys, keys), (&self.values, values)] {
            let numbers = numbers.to_dtype(cache.dtype())?.contiguous()?;
            cache.scatter_set(&step.places, &numbers, 0)?;
        }
        Ok(())
    }

    /// What a group sees, `[pieces * kv_heads, context, head_dim]`.
    fn gather(&self, cache: &Tensor, group: &Group, config: &DecoderConfig) -> Result<Tensor> {
        let (pieces, context) = (group.pieces, group.context);
        cache
            .index_select(&group.places, 0)?
            .reshape((pieces, context, config.kv_heads, config.head_dim))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((pieces * config.kv_heads, context, config.head_dim))
    }
}

impl Layer {
    fn load(
        source: &Source<'_>,
        config: &DecoderConfig,
        index: usize,
        cache: LayerCache,
    ) -> std::result::Result<Self, LoadModel> {
        let (hidden, feed) = (config.hidden_size, config.feed_forward);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let matrix =
            |part: &str, rows, columns| source.matrix(&format!("blk.{index}.{part}.weight"), [rows, columns]);
        let norm = |part: &str, size| source.vector(&format!("blk.{index}.{part}.weight"), size);
        let bias = |part: &str, size| source.vector(&format!("blk.{index}.{part}.bias"), size);
        let head_norm = |part: &str| config.head_norms.then(|| norm(part, config.head_dim)).transpose();
        let output_norm = |part: &str| config.output_norms.then(|| norm(part, hidden)).transpose();
        let biases = config
            .attention_biases
            .then(|| Ok::<_, LoadModel>([bias("attn_q", q)?, bias("attn_k", kv)?, bias("attn_v", kv)?]))
            .transpose()?;
        Ok(Self {
            attention_norm: norm("attn_norm", hidden)?,
            query: matrix("attn_q", q, hidden)?,
            key: matrix("attn_k", kv, hidden)?,
            value: matrix("attn_v", kv, hidden)?,
            output: matrix("attn_output", hidden, q)?,
            biases,
            query_norm: head_norm("attn_q_norm")?,
            key_norm: head_norm("attn_k_norm")?,
            post_attention_norm: output_norm("post_attention_norm")?,
            feed_norm: norm("ffn_norm", hidden)?,
            gate: matrix("ffn_gate", feed, hidden)?,
            up: matrix("ffn_up", feed, hidden)?,
            down: matrix("ffn_down", hidden, feed)?,
            post_feed_norm: output_norm("post_ffw_norm")?,
            local: config.is_local(index),
            cache,
        })
    }

    /// The first half: attention, added to the residual stream.
    fn attend(&self, config: &DecoderConfig, step: &Step, x: &Tensor) -> Result<Tensor> {
        let normed = rms_norm(x, &self.attention_norm, config.norm_epsilon)?;
        let mut queries = self.query.forward(&normed)?;
        let mut keys = self.key.forward(&normed)?;
        let mut values = self.value.forward(&normed)?;
        if let Some([query, key, value]) = &self.biases {
            queries = queries.broadcast_add(query)?;
            keys = keys.broadcast_add(key)?;
            values = values.broadcast_add(value)?;
        }
        let angles = step.local.as_ref().filter(|_| self.local).unwrap_or(&step.global);
        let turn = |numbers: &Tensor, norm: Option<&Tensor>, heads: usize| -> Result<Tensor> {
            let mut numbers = numbers.reshape((step.rows, heads, config.head_dim))?;
            if let Some(norm) = norm {
                numbers = rms_norm(&numbers, norm, config.norm_epsilon)?;
            }
            rotate(&numbers, config, angles)
        };
        let queries = turn(&queries, self.query_norm.as_ref(), config.heads)?;
        let keys = turn(&keys, self.key_norm.as_ref(), config.kv_heads)?;
        let keys = keys.reshape((step.rows, config.kv_heads * config.head_dim))?;
        self.cache.write(step, &keys, &values)?;
        let attended = step
            .groups
            .iter()
            .map(|group| self.attend_group(config, group, &queries))
            .collect::<Result<Vec<_>>>()?;
        let attended = match attended.as_slice() {
            [one] => one.clone(),
            several => Tensor::cat(several, 0)?,
        };
        let change = self.output.forward(&attended)?;
        add(x, &change, self.post_attention_norm.as_ref(), config)
    }

    /// Attention of one group, `[pieces * rows, heads * head_dim]`. Queries: `[rows of the step, heads, head_dim]`.
    fn attend_group(&self, config: &DecoderConfig, group: &Group, queries: &Tensor) -> Result<Tensor> {
        let (pieces, rows, context) = (group.pieces, group.rows, group.context);
        let (heads, kv_heads, dim) = (config.heads, config.kv_heads, config.head_dim);
        let keys = self.cache.gather(&self.cache.keys, group, config)?;
        let values = self.cache.gather(&self.cache.values, group, config)?;
        // Heads that share keys lie beside each other: their rows are as many more rows of one product.
        let shared = (pieces * kv_heads, heads / kv_heads * rows);
        let queries = queries
            .narrow(0, group.first_row, pieces * rows)?
            .affine(config.attention_scale.into(), 0.0)?
            .to_dtype(keys.dtype())?
            .reshape((pieces, rows, heads, dim))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((shared.0, shared.1, dim))?;
        let mut scores = queries
            .matmul(&keys.t()?)?
            .to_dtype(DType::F32)?
            .reshape((pieces, heads, rows, context))?;
        let mask = if self.local {
            &group.local_mask
        } else {
            &group.mask
        };
        if let Some(mask) = mask {
            scores = scores.broadcast_add(mask)?;
        }
        softmax_last_dim(&scores)?
            .to_dtype(values.dtype())?
            .reshape((shared.0, shared.1, context))?
            .matmul(&values)?
            .to_dtype(DType::F32)?
            .reshape((pieces, heads, rows, dim))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((pieces * rows, heads * dim))
    }

    /// The second half: the feed-forward part, added to the residual stream.
    fn feed(&self, config: &DecoderConfig, x: &Tensor) -> Result<Tensor> {
        let normed = rms_norm(x, &self.feed_norm, config.norm_epsilon)?;
        let gate = self.gate.forward(&normed)?;
        let gate = match config.activation {
            Activation::Silu => silu(&gate)?,
            Activation::Gelu => gate.gelu()?,
        };
        let change = self.down.forward(&(gate * self.up.forward(&normed)?)?)?;
        add(x, &change, self.post_feed_norm.as_ref(), config)
    }
}

/// Adds to the residual stream, normalised first where the model does that.
fn add(x: &Tensor, change: &Tensor, norm: Option<&Tensor>, config: &DecoderConfig) -> Result<Tensor> {
    match norm {
        Some(norm) => x + rms_norm(change, norm, config.norm_epsilon)?,
        None => x + change,
    }
}

/// Turns heads to their positions, `[rows, heads, head_dim]`.
fn rotate(numbers: &Tensor, config: &DecoderConfig, angles: &Angles) -> Result<Tensor> {
    let turned = config.rope_dimensions;
    // Rows are what candle's kernels take for positions: `[1, heads, rows, head_dim]`.
    let numbers = numbers.transpose(0, 1)?.unsqueeze(0)?;
    let part = numbers.narrow(3, 0, turned)?.contiguous()?;
    let part = match config.rope_pairs {
        RopePairs::Neighbours => rope_i(&part, &angles.cos, &angles.sin)?,
        RopePairs::Halves => rope(&part, &angles.cos, &angles.sin)?,
    };
    let whole = if turned < config.head_dim {
        let rest = numbers.narrow(3, turned, config.head_dim - turned)?;
        Tensor::cat(&[&part, &rest.contiguous()?], 3)?
    } else {
        part
    };
    whole.squeeze(0)?.transpose(0, 1)?.contiguous()
}
