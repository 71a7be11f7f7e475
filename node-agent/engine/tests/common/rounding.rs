//! A llama in candle's tensors that rounds activations as the engine does: to 8 bits in blocks of 32, before they
//! meet quantised weights. All else is 32-bit floats in candle's own order.

use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::{rms_norm, silu, softmax_last_dim};
use candle_nn::rotary_emb::rope_i;

struct Layer {
    attention_norm: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    feed_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    /// Keys and values so far, `[batch, kv_heads, context, head_dim]`.
    cache: Option<(Tensor, Tensor)>,
}

pub struct RoundingLlama {
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    output: Tensor,
    /// `[positions, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
    heads: usize,
    kv_heads: usize,
    epsilon: f32,
}

/// What is left of activations after they were rounded, `[rows, columns]`.
fn rounded(x: &Tensor) -> Result<Tensor> {
    let numbers: Vec<f32> = x.flatten_all()?.to_vec1()?;
    let blocks = numbers.chunks_exact(32).flat_map(|block| {
        let most = block.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        let (scale, inverse) = (most / 127.0, if most > 0.0 { 127.0 / most } else { 0.0 });
        block.iter().map(move |x| (x * inverse).round_ties_even() * scale)
    });
    Tensor::from_vec(blocks.collect(), x.shape(), x.device())
}

impl RoundingLlama {
    pub fn load(path: &Path, positions: usize) -> Result<Self> {
        let mut file = std::fs::File::open(path)?;
        let content = Content::read(&mut file)?;
        let value = |key: &str| -> &Value {
            let key = format!("llama.{key}");
            content.metadata.get(&key).expect("the key is there")
        };
        let size = |key: &str| -> Result<usize> { Ok(value(key).to_u32()? as usize) };
        let (heads, kv_heads) = (size("attention.head_count")?, size("attention.head_count_kv")?);
        let head_dim = size("embedding_length")? / heads;
        let (base, epsilon) = (
            value("rope.freq_base").to_f32()?,
            value("attention.layer_norm_rms_epsilon").to_f32()?,
        );
        let layers = size("block_count")?;
        let mut tensor = |name: &str| {
            content
                .tensor(&mut file, name, &Device::Cpu)?
                .dequantize(&Device::Cpu)
        };
        let embedding = tensor("token_embd.weight")?;
        let output = match content.tensor_infos.contains_key("output.weight") {
            true => tensor("output.weight")?,
            false => embedding.clone(),
        };
        let layers = (0..layers)
            .map(|layer| {
                let mut part = |name: &str| tensor(&format!("blk.{layer}.{name}.weight"));
                Ok(Layer {
                    attention_norm: part("attn_norm")?,
                    query: part("attn_q")?.t()?,
                    key: part("attn_k")?.t()?,
                    value: part("attn_v")?.t()?,
                    output: part("attn_output")?.t()?,
                    feed_norm: part("ffn_norm")?,
                    gate: part("ffn_gate")?.t()?,
                    up: part("ffn_up")?.t()?,
                    down: part("ffn_down")?.t()?,
                    cache: None,
                })
            })
            .collect::<Result<Vec<Layer>>>()?;
        let norm = tensor("output_norm.weight")?;
        let angles: Vec<f32> = (0..positions)
            .flat_map(|position| {
                (0..head_dim / 2)
                    .map(move |pair| position as f32 / base.powf(2.0 * pair as f32 / head_dim as f32))
            })
            .collect();
        let angles = Tensor::from_vec(angles, (positions, head_dim / 2), &Device::Cpu)?;
        Ok(Self {
            embedding,
            layers,
            norm,
            output: output.t()?,
            cos: angles.cos()?,
            sin: angles.sin()?,
            heads,
            kv_heads,
            epsilon,
        })
    }

    /// Logits of the last token of each input, `[batch, vocabulary]`. Inputs: `[batch, tokens]`, from `position`.
    pub fn forward(&mut self, inputs: &Tensor, position: usize) -> Result<Tensor> {
        let (batch, count) = inputs.dims2()?;
        let (heads, kv_heads, epsilon) = (self.heads, self.kv_heads, self.epsilon);
        let cos = self.cos.narrow(0, position, count)?;
        let sin = self.sin.narrow(0, position, count)?;
        let mut x = self.embedding.index_select(&inputs.flatten_all()?, 0)?;
        let hidden = x.dim(1)?;
        let dim = hidden / heads;
        let mask: Vec<f32> = (0..count)
            .flat_map(|row| (0..count).map(move |seen| if seen > row { f32::NEG_INFINITY } else { 0.0 }))
            .collect();
        let mask = Tensor::from_vec(mask, (count, count), &Device::Cpu)?;
        for layer in &mut self.layers {
            let normed = rounded(&rms_norm(&x, &layer.attention_norm, epsilon)?)?;
            let split = |matrix: &Tensor, heads: usize| -> Result<Tensor> {
                let numbers = normed.matmul(matrix)?.reshape((batch, count, heads, dim))?;
                numbers.transpose(1, 2)?.contiguous()
            };
            let query = rope_i(&split(&layer.query, heads)?, &cos, &sin)?;
            let key = rope_i(&split(&layer.key, kv_heads)?, &cos, &sin)?;
            let value = split(&layer.value, kv_heads)?;
            let (key, value) = match layer.cache.take().filter(|_| position > 0) {
                Some((keys, values)) => (
                    Tensor::cat(&[&keys, &key], 2)?,
                    Tensor::cat(&[&values, &value], 2)?,
                ),
                None => (key, value),
            };
            layer.cache = Some((key.clone(), value.clone()));
            let context = key.dim(2)?;
            let spread = |of: &Tensor| -> Result<Tensor> {
                of.unsqueeze(2)?
                    .expand((batch, kv_heads, heads / kv_heads, context, dim))?
                    .contiguous()?
                    .reshape((batch, heads, context, dim))
            };
            let scores = query.matmul(&spread(&key)?.transpose(D::Minus1, D::Minus2)?)?;
            let mut scores = (scores / (dim as f64).sqrt())?;
            if count > 1 {
                scores = scores.broadcast_add(&mask)?;
            }
            let attended = softmax_last_dim(&scores)?.matmul(&spread(&value)?)?;
            let attended = attended.transpose(1, 2)?.contiguous()?;
            let attended = attended.reshape((batch * count, heads * dim))?;
            x = (x + rounded(&attended)?.matmul(&layer.output)?)?;
            let normed = rounded(&rms_norm(&x, &layer.feed_norm, epsilon)?)?;
            let fed = (silu(&normed.matmul(&layer.gate)?)? * normed.matmul(&layer.up)?)?;
            x = (x + rounded(&fed)?.matmul(&layer.down)?)?;
        }
        let last = x.reshape((batch, count, hidden))?.narrow(1, count - 1, 1)?;
        let last = last.contiguous()?.reshape((batch, hidden))?;
        let normed = rounded(&rms_norm(&last, &self.norm, epsilon)?)?;
        normed.matmul(&self.output)?.to_dtype(DType::F32)
    }
}
