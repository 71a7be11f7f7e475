//! A decoder's forward pass over a ragged batch: rows of several sequences, each at its own position.

use std::sync::Arc;

use super::config::{Activation, DecoderConfig};
use super::layers::{RmsNorm, Source};
use super::rope::{Rope, Rotations};
use super::rows::{self, Row};
use crate::LoadModel;
use crate::gguf::GgufFile;
use crate::kernels::attention::{Attention, Run};
use crate::kernels::vector::for_each_row;
use crate::kernels::{
    Combine, Compute, Gate, Matrix, Memory, QuantizedRows, Rounding, Rows, Target, WeightPrecision,
};
use crate::kv::{BlockTable, KvCache, KvShape, LayerCache};

struct Layer {
    attention_norm: RmsNorm,
    query: Matrix,
    key: Matrix,
    value: Matrix,
    output: Matrix,
    /// Biases of query, key and value.
    biases: Option<[Vec<f32>; 3]>,
    query_norm: Option<RmsNorm>,
    key_norm: Option<RmsNorm>,
    post_attention_norm: Option<RmsNorm>,
    feed_norm: RmsNorm,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    post_feed_norm: Option<RmsNorm>,
    local: bool,
}

/// A decoder in memory.
pub(crate) struct Decoder {
    config: DecoderConfig,
    compute: Compute,
    embedding: Arc<Matrix>,
    layers: Vec<Layer>,
    norm: RmsNorm,
    output: Arc<Matrix>,
    /// What RoPE's frequencies are divided by.
    rope: Rope,
    local_rope: Option<Rope>,
    scratch: Scratch,
}

/// Numbers of a step, kept from one to the next: a step asks for memory where it has more rows than any before it,
/// and for its small lists of rows and tables.
#[derive(Default)]
struct Scratch {
    /// The residual stream, `[rows, hidden]`.
    x: Vec<f32>,
    normed: Vec<f32>,
    quantized: QuantizedRows,
    /// What the gate of a feed-forward part opens, as the next product takes it.
    opened: QuantizedRows,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    attended: Vec<f32>,
    fed: Vec<f32>,
    /// What a half of a layer adds, where a norm comes before the addition.
    change: Vec<f32>,
    wanted: Vec<f32>,
    logits: Vec<f32>,
}

/// What all layers of a step share.
struct Step<'a> {
    config: &'a DecoderConfig,
    compute: &'a Compute,
    /// Those for the matrix units come last.
    rows: &'a [Row],
    /// How many those are.
    of_prompts: usize,
    runs: &'a [Run],
    tables: &'a [&'a BlockTable],
    global: &'a Rotations,
    local: Option<&'a Rotations>,
}

impl Decoder {
    /// Copies the weights out of the file. `progress` is told layers done and layers in all.
    pub(crate) fn load(
        file: &GgufFile,
        config: DecoderConfig,
        compute: Compute,
        precision: WeightPrecision,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, LoadModel> {
        config.check_tensors(file)?;
        // Tiles are about as large as the file's tensors; what does not fit finds a place of its own.
        let all = file.file_bytes() as usize;
        let source = Source {
            file,
            compute: &compute,
            memory: Memory::for_bytes(all + all / 4).map_err(LoadModel::Allocate)?,
            precision,
        };
        let (hidden, shape) = (config.hidden_size, [config.vocab_size, config.hidden_size]);
        let embedding = Arc::new(source.matrix("token_embd.weight", shape)?);
        let output = if config.own_output {
            Arc::new(source.matrix("output.weight", shape)?)
        } else {
            Arc::clone(&embedding)
        };
        let mut layers = Vec::with_capacity(config.layers);
        for index in 0..config.layers {
            layers.push(Layer::load(&source, &config, index)?);
            progress(index + 1, config.layers);
        }
        link(&layers, &output);
        let norm = source.norm("output_norm.weight", hidden, config.norm_epsilon)?;
        // Who has floats, or asks for more bits, wants no products or attention with 8 significant ones either.
        let rounded = layers.iter().flat_map(Layer::matrices).all(Matrix::is_quantized);
        let compute = if rounded && compute.rounding == Rounding::Once {
            compute
        } else {
            compute.without_units()
        };
        Ok(Self {
            rope: Rope::global(file, &config)?,
            local_rope: Rope::local(&config),
            config,
            compute,
            embedding,
            layers,
            norm,
            output,
            scratch: Scratch::default(),
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

    /// One step. Blocks for every position must be reserved, and tokens in the vocabulary.
    ///
    /// Gives the logits after each row that wants them, `[rows that want them, vocabulary]`, in their order.
    pub(crate) fn forward(
        &mut self,
        rows: &[Row],
        tables: &[&BlockTable],
        cache: &mut KvCache,
    ) -> &mut [f32] {
        let (config, compute, scratch) = (&self.config, &self.compute, &mut self.scratch);
        let hidden = config.hidden_size;
        let (ordered, of_prompts) = rows::ordered(rows, compute.units_read_prompts());
        let (wanting, rows) = (rows, &*ordered);
        let runs = rows::runs(rows);
        scratch.x.resize(rows.len() * hidden, 0.0);
        for_each_row(&compute.pool, &mut scratch.x, hidden, |index, x| {
            self.embedding.row(rows[index].token as usize, x);
            x.iter_mut().for_each(|x| *x *= config.embedding_scale);
        });
        let positions = || rows.iter().map(|row| row.position);
        let global = Rotations::new(positions(), &self.rope);
        let local = self.local_rope.as_ref();
        let local = local.map(|rope| Rotations::new(positions(), rope));
        let step = Step {
            config,
            compute,
            rows,
            of_prompts,
            runs: &runs,
            tables,
            global: &global,
            local: local.as_ref(),
        };
        for (index, layer) in self.layers.iter().enumerate() {
            layer.attend(&step, index, scratch, cache);
            layer.feed(&step, scratch);
        }
        scratch.wanted.clear();
        let (first, last) = scratch.x.split_at((rows.len() - of_prompts) * hidden);
        let (mut first, mut last) = (first.chunks_exact(hidden), last.chunks_exact(hidden));
        for row in wanting {
            let apart = of_prompts > 0 && row.of_prompt;
            let x = if apart { last.next() } else { first.next() };
            if let (Some(x), true) = (x, row.wants_logits) {
                scratch.wanted.extend_from_slice(x);
            }
        }
        let wanted = scratch.wanted.len() / hidden;
        scratch.logits.resize(wanted * config.vocab_size, 0.0);
        if wanted > 0 {
            let wanted = (scratch.wanted.as_slice(), Some(&self.norm));
            let (normed, quantized) = (&mut scratch.normed, &mut scratch.quantized);
            let rows = prepared(compute, wanted, (normed, quantized), &[&self.output], 0);
            product(
                compute,
                rows,
                &mut [(&self.output, &mut scratch.logits)],
                Combine::Store,
            );
            scale(&mut scratch.logits, config.logit_scale);
        }
        &mut scratch.logits
    }

    pub(crate) fn compute(&self) -> &Compute {
        &self.compute
    }

    /// What the latest step gave.
    pub(crate) fn logits(&mut self) -> &mut [f32] {
        &mut self.scratch.logits
    }
}

/// Says what is multiplied after what: each product's last matrix knows the next product's.
fn link(layers: &[Layer], output: &Matrix) {
    for (index, layer) in layers.iter().enumerate() {
        layer.value.is_followed_by(&[&layer.output], false);
        layer.output.is_followed_by(&[&layer.up, &layer.gate], true);
        layer.up.is_followed_by(&[&layer.down], false);
        match layers.get(index + 1) {
            Some(next) => layer
                .down
                .is_followed_by(&[&next.query, &next.key, &next.value], false),
            None => layer.down.is_followed_by(&[output], false),
        }
    }
    if let Some(first) = layers.first() {
        output.is_followed_by(&[&first.query, &first.key, &first.value], false);
    }
}

/// Rows, normalised where there is a norm, in the forms in which these matrices of one width ask for them: where all are
/// quantised, norm and rounding are one step, and the last rows, `of_prompts`, are for matrix units.
fn prepared<'a>(
    compute: &Compute,
    (x, norm): (&'a [f32], Option<&RmsNorm>),
    (normed, quantized): (&'a mut Vec<f32>, &'a mut QuantizedRows),
    matrices: &[&Matrix],
    of_prompts: usize,
) -> Rows<'a> {
    let norm = norm.map(RmsNorm::as_norm);
    let (floats, norm) = match norm {
        Some(norm) if !matrices.iter().all(|matrix| matrix.is_quantized()) => {
            normed.resize(x.len(), 0.0);
            compute.normalize(norm, x, normed);
            (normed.as_slice(), None)
        }
        norm => (x, norm),
    };
    if matrices.iter().any(|matrix| matrix.is_quantized()) {
        quantized.set(compute, floats, matrices, norm, of_prompts);
    }
    Rows { floats, quantized }
}

/// Multiplies rows with matrices of the same width; results are sized as they need to be.
fn product(compute: &Compute, rows: Rows<'_>, targets: &mut [(&Matrix, &mut Vec<f32>)], combine: Combine) {
    let mut targets: Vec<Target<'_>> = targets
        .iter_mut()
        .map(|(matrix, out)| {
            out.resize(rows.floats.len() / matrix.columns() * matrix.rows(), 0.0);
            Target { matrix, out }
        })
        .collect();
    compute.product(rows, &mut targets, combine);
}

impl Layer {
    fn load(source: &Source<'_>, config: &DecoderConfig, index: usize) -> Result<Self, LoadModel> {
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        let (hidden, q, kv) = (
            config.hidden_size,
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let norm = |part: &str, size: usize| source.norm(&name(part), size, config.norm_epsilon);
        let head_norm = |part: &str| config.head_norms.then(|| norm(part, config.head_dim)).transpose();
        let output_norm = |part: &str| config.output_norms.then(|| norm(part, hidden)).transpose();
        let bias = |part: &str, size: usize| source.vector(&format!("blk.{index}.{part}.bias"), size);
        let biases = config
            .attention_biases
            .then(|| Ok::<_, LoadModel>([bias("attn_q", q)?, bias("attn_k", kv)?, bias("attn_v", kv)?]))
            .transpose()?;
        let matrix = |part: &str, rows: usize, columns: usize| source.matrix(&name(part), [rows, columns]);
        let feed = config.feed_forward;
        let ([query, key, value], [gate, up]) = if config.fused {
            let part = |whole: &str, all: usize, first: usize, count: usize| {
                source.part_of_matrix(&name(whole), [all, hidden], first..first + count)
            };
            let all = q + 2 * kv;
            let heads = [
                part("attn_qkv", all, 0, q)?,
                part("attn_qkv", all, q, kv)?,
                part("attn_qkv", all, q + kv, kv)?,
            ];
            let halves = [
                part("ffn_up", 2 * feed, 0, feed)?,
                part("ffn_up", 2 * feed, feed, feed)?,
            ];
            (heads, halves)
        } else {
            let heads = [
                matrix("attn_q", q, hidden)?,
                matrix("attn_k", kv, hidden)?,
                matrix("attn_v", kv, hidden)?,
            ];
            (
                heads,
                [matrix("ffn_gate", feed, hidden)?, matrix("ffn_up", feed, hidden)?],
            )
        };
        let layer = Self {
            attention_norm: norm("attn_norm", hidden)?,
            query,
            key,
            value,
            output: matrix("attn_output", hidden, q)?,
            biases,
            query_norm: head_norm("attn_q_norm")?,
            key_norm: head_norm("attn_k_norm")?,
            post_attention_norm: output_norm("post_attention_norm")?,
            feed_norm: norm("ffn_norm", hidden)?,
            gate,
            up,
            down: matrix("ffn_down", hidden, config.feed_forward)?,
            post_feed_norm: output_norm("post_ffw_norm")?,
            local: config.is_local(index),
        };
        Ok(layer)
    }

    fn matrices(&self) -> [&Matrix; 7] {
        let [query, key, value] = [&self.query, &self.key, &self.value];
        [query, key, value, &self.output, &self.gate, &self.up, &self.down]
    }

    /// The first half: attention, added to the residual stream.
    fn attend(&self, step: &Step<'_>, index: usize, scratch: &mut Scratch, cache: &mut KvCache) {
        let Step {
            config,
            compute,
            rows,
            of_prompts,
            runs,
            tables,
            global,
            local,
        } = step;
        let normed = prepared(
            compute,
            (&scratch.x, Some(&self.attention_norm)),
            (&mut scratch.normed, &mut scratch.quantized),
            &[&self.query, &self.key, &self.value],
            *of_prompts,
        );
        product(
            compute,
            normed,
            &mut [
                (&self.query, &mut scratch.queries),
                (&self.key, &mut scratch.keys),
                (&self.value, &mut scratch.values),
            ],
            Combine::Store,
        );
        if let Some([query, key, value]) = &self.biases {
            for (numbers, bias) in [
                (&mut scratch.queries, query),
                (&mut scratch.keys, key),
                (&mut scratch.values, value),
            ] {
                for row in numbers.chunks_exact_mut(bias.len()) {
                    row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
                }
            }
        }
        let rotations = local.filter(|_| self.local).unwrap_or(global);
        let [of_queries, of_keys] = [&self.query_norm, &self.key_norm]
            .map(|norm| rotations.turn(norm.as_ref().map(RmsNorm::as_norm), config.rope_pairs));
        let places = rows.iter().map(|row| (tables[row.sequence], row.position));
        cache.write(
            &compute.pool,
            index,
            places,
            (&mut scratch.keys, &scratch.values),
            |row, key| compute.turn(&of_keys, row, key, config.head_dim),
        );
        let attention = Attention {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: config.attention_scale,
            window: config.sliding_window.filter(|_| self.local),
        };
        let layer_cache = LayerCache {
            cache,
            tables,
            layer: index,
        };
        scratch.attended.resize(scratch.queries.len(), 0.0);
        compute.attend(
            &attention,
            &layer_cache,
            runs,
            (&scratch.queries, Some(&of_queries)),
            &mut scratch.attended,
        );
        let Scratch {
            x,
            normed,
            quantized,
            attended,
            change,
            ..
        } = scratch;
        let attended = prepared(
            compute,
            (attended, None),
            (normed, quantized),
            &[&self.output],
            *of_prompts,
        );
        add_product(
            compute,
            attended,
            &self.output,
            (self.post_attention_norm.as_ref(), config.residual_scale),
            (x, change),
        );
    }

    /// The second half: the feed-forward part, added to the residual stream.
    fn feed(&self, step: &Step<'_>, scratch: &mut Scratch) {
        let (config, compute) = (step.config, step.compute);
        let Scratch {
            x,
            normed,
            quantized,
            opened,
            fed,
            change,
            ..
        } = scratch;
        let gate = match config.activation {
            Activation::Silu => Gate::Silu,
            Activation::Gelu => Gate::Gelu,
        };
        fed.resize(step.rows.len() * config.feed_forward, 0.0);
        let halves = [&self.gate, &self.up];
        let of_prompts = step.of_prompts;
        let from = prepared(
            compute,
            (x, Some(&self.feed_norm)),
            (normed, quantized),
            &halves,
            of_prompts,
        );
        compute.gated(from, (&self.gate, gate), &self.up, fed, opened);
        if self.down.is_quantized() {
            let others = fed.len() - of_prompts * config.feed_forward;
            opened.set_but_prompts(compute, &fed[..others], &[&self.down], None);
        }
        let fed = Rows {
            floats: fed,
            quantized: opened,
        };
        add_product(
            compute,
            fed,
            &self.down,
            (self.post_feed_norm.as_ref(), config.residual_scale),
            (x, change),
        );
    }
}

/// Multiplies numbers where they are.
fn scale(x: &mut [f32], by: f32) {
    if by != 1.0 {
        x.iter_mut().for_each(|x| *x *= by);
    }
}

/// Adds a product to the residual stream, normalised or scaled first where the model does that.
fn add_product(
    compute: &Compute,
    from: Rows<'_>,
    matrix: &Matrix,
    (norm, by): (Option<&RmsNorm>, f32),
    (x, change): (&mut Vec<f32>, &mut Vec<f32>),
) {
    if norm.is_none() && by == 1.0 {
        product(compute, from, &mut [(matrix, x)], Combine::Add);
        return;
    }
    product(compute, from, &mut [(matrix, change)], Combine::Store);
    compute.add(x, change, norm.map(RmsNorm::as_norm), by);
}
