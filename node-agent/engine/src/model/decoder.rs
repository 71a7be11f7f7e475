//! A decoder's forward pass over a ragged batch: rows of several sequences, each at its own position.

use std::sync::Arc;

use candle_core::Device;
use rayon::prelude::*;

use super::attention::{Attention, Run};
use super::config::{Activation, DecoderConfig, RopePairs};
use super::layers::{Embedding, Linear, RmsNorm, Rotations};
use crate::LoadModel;
use crate::gguf::GgufFile;
use crate::kv::{BlockTable, KvCache, KvShape, Side};

/// One row of a batch. Rows of one sequence follow each other, positions rising by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) token: u32,
    pub(crate) position: usize,
    /// Index into the tables.
    pub(crate) sequence: usize,
    /// Whether the logits after this row are wanted.
    pub(crate) wants_logits: bool,
}

struct Layer {
    attention_norm: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    query_norm: Option<RmsNorm>,
    key_norm: Option<RmsNorm>,
    post_attention_norm: Option<RmsNorm>,
    feed_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
    post_feed_norm: Option<RmsNorm>,
    local: bool,
}

/// A decoder in memory.
pub(crate) struct Decoder {
    config: DecoderConfig,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    output: Linear,
}

impl Decoder {
    /// Copies the weights out of the file. `progress` is told layers done and layers in all.
    pub(crate) fn load(
        file: &GgufFile,
        config: DecoderConfig,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, LoadModel> {
        config.check_tensors(file)?;
        let (hidden, epsilon) = (config.hidden_size, config.norm_epsilon);
        let table = Arc::new(file.tensor("token_embd.weight", &[config.vocab_size, hidden], &Device::Cpu)?);
        let output = if file.tensors().contains_key("output.weight") {
            Linear::load(file, "output.weight", [config.vocab_size, hidden])?
        } else {
            Linear::new(Arc::clone(&table), hidden)?
        };
        let mut layers = Vec::with_capacity(config.layers);
        for index in 0..config.layers {
            layers.push(Layer::load(file, &config, index)?);
            progress(index + 1, config.layers);
        }
        let norm = RmsNorm::load(file, "output_norm.weight", hidden, epsilon)?;
        let embedding = Embedding::new(table, hidden, config.embedding_scale);
        Ok(Self {
            config,
            embedding,
            layers,
            norm,
            output,
        })
    }

    pub(crate) fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Shape of the KV cache that it needs.
    pub(crate) fn kv_shape(&self) -> KvShape {
        KvShape {
            layers: self.config.layers,
            kv_heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
        }
    }

    /// One step. Blocks for every position must be reserved.
    ///
    /// Gives the logits after each row that wants them, `[vocabulary]` each, in the order of the rows.
    pub(crate) fn forward(
        &self,
        rows: &[Row],
        tables: &[&BlockTable],
        cache: &mut KvCache,
    ) -> candle_core::Result<Vec<Vec<f32>>> {
        let config = &self.config;
        let runs = runs(rows, tables);
        let tokens: Vec<u32> = rows.iter().map(|row| row.token).collect();
        let mut x = self.embedding.forward(&tokens)?;
        let positions = || rows.iter().map(|row| row.position);
        let global = Rotations::new(
            positions(),
            config.rope_dimensions,
            config.rope_base,
            config.rope_scale,
        );
        // Local layers are not stretched: they never see far.
        let local = config
            .sliding_window
            .map(|_| Rotations::new(positions(), config.rope_dimensions, config.rope_base_local, 1.0));
        let mut normed = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            layer.attention_norm.forward(&x, &mut normed);
            let rotations = local.as_ref().filter(|_| layer.local).unwrap_or(&global);
            let mut attended = layer.attend(config, index, &normed, rows, &runs, tables, rotations, cache)?;
            if let Some(norm) = &layer.post_attention_norm {
                norm.apply(&mut attended);
            }
            add(&mut x, &attended);
            layer.feed_norm.forward(&x, &mut normed);
            let mut fed = layer.feed(config.activation, &normed)?;
            if let Some(norm) = &layer.post_feed_norm {
                norm.apply(&mut fed);
            }
            add(&mut x, &fed);
        }
        let hidden = config.hidden_size;
        let wanted: Vec<f32> = rows
            .iter()
            .zip(x.chunks_exact(hidden))
            .filter(|(row, _)| row.wants_logits)
            .flat_map(|(_, x)| x.iter().copied())
            .collect();
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        self.norm.forward(&wanted, &mut normed);
        let logits = self.output.forward(&normed)?;
        Ok(logits
            .chunks_exact(config.vocab_size)
            .map(<[f32]>::to_vec)
            .collect())
    }
}

/// Rows of one sequence, together.
fn runs<'a>(rows: &[Row], tables: &[&'a BlockTable]) -> Vec<Run<'a>> {
    let mut runs: Vec<(usize, Run<'a>)> = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        match runs.last_mut() {
            Some((sequence, run)) if *sequence == row.sequence => run.rows += 1,
            _ => runs.push((
                row.sequence,
                Run {
                    table: tables[row.sequence],
                    first_row: index,
                    rows: 1,
                    position: row.position,
                },
            )),
        }
    }
    runs.into_iter().map(|(_, run)| run).collect()
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

impl Layer {
    fn load(file: &GgufFile, config: &DecoderConfig, index: usize) -> Result<Self, LoadModel> {
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        let (hidden, q, kv) = (
            config.hidden_size,
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let norm = |part: &str, size: usize| RmsNorm::load(file, &name(part), size, config.norm_epsilon);
        let gemma_norm = |part: &str, size: usize| config.gemma_norms.then(|| norm(part, size)).transpose();
        let linear =
            |part: &str, rows: usize, columns: usize| Linear::load(file, &name(part), [rows, columns]);
        Ok(Self {
            attention_norm: norm("attn_norm", hidden)?,
            query: linear("attn_q", q, hidden)?,
            key: linear("attn_k", kv, hidden)?,
            value: linear("attn_v", kv, hidden)?,
            output: linear("attn_output", hidden, q)?,
            query_norm: gemma_norm("attn_q_norm", config.head_dim)?,
            key_norm: gemma_norm("attn_k_norm", config.head_dim)?,
            post_attention_norm: gemma_norm("post_attention_norm", hidden)?,
            feed_norm: norm("ffn_norm", hidden)?,
            gate: linear("ffn_gate", config.feed_forward, hidden)?,
            up: linear("ffn_up", config.feed_forward, hidden)?,
            down: linear("ffn_down", hidden, config.feed_forward)?,
            post_feed_norm: gemma_norm("post_ffw_norm", hidden)?,
            local: config.is_local(index),
        })
    }

    #[allow(clippy::too_many_arguments)] // one call, and every argument is one of the step's own
    fn attend(
        &self,
        config: &DecoderConfig,
        index: usize,
        x: &[f32],
        rows: &[Row],
        runs: &[Run<'_>],
        tables: &[&BlockTable],
        rotations: &Rotations,
        cache: &mut KvCache,
    ) -> candle_core::Result<Vec<f32>> {
        let (dim, halves) = (config.head_dim, config.rope_pairs == RopePairs::Halves);
        let mut queries = self.query.forward(x)?;
        let mut keys = self.key.forward(x)?;
        let values = self.value.forward(x)?;
        for (numbers, norm, heads) in [
            (&mut queries, &self.query_norm, config.heads),
            (&mut keys, &self.key_norm, config.kv_heads),
        ] {
            if let Some(norm) = norm {
                norm.apply(numbers);
            }
            for (row, numbers) in numbers.chunks_exact_mut(heads * dim).enumerate() {
                numbers
                    .chunks_exact_mut(dim)
                    .for_each(|head| rotations.turn(row, &mut head[..config.rope_dimensions], halves));
            }
        }
        let width = config.kv_heads * dim;
        for ((row, key), value) in rows
            .iter()
            .zip(keys.chunks_exact(width))
            .zip(values.chunks_exact(width))
        {
            let table = tables[row.sequence];
            cache.write(table, index, Side::Keys, row.position, key);
            cache.write(table, index, Side::Values, row.position, value);
        }
        let attention = Attention {
            layer: index,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: dim,
            scale: 1.0 / (dim as f32).sqrt(),
            window: config.sliding_window.filter(|_| self.local),
        };
        let mut attended = vec![0.0; queries.len()];
        attention.forward(cache, runs, &queries, &mut attended);
        self.output.forward(&attended)
    }

    fn feed(&self, activation: Activation, x: &[f32]) -> candle_core::Result<Vec<f32>> {
        let mut gate = self.gate.forward(x)?;
        let up = self.up.forward(x)?;
        gate.par_iter_mut()
            .zip(up.par_iter())
            .with_min_len(4096)
            .for_each(|(gate, up)| {
                *gate = match activation {
                    Activation::Silu => *gate / (1.0 + (-*gate).exp()),
                    Activation::Gelu => gelu(*gate),
                } * up;
            });
        self.down.forward(&gate)
    }
}

/// The tanh approximation of GELU. Source: Hendrycks & Gimpel 2016.
fn gelu(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    0.5 * x * (1.0 + (SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x)).tanh())
}
