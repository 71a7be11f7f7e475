//! What a decoder is made of, read from a GGUF file and checked against its tensors.

use std::collections::BTreeSet;

use candle_core::quantized::GgmlDType;

use super::rope::{RopeScaling, Yarn};
use crate::InvalidModel;
use crate::gguf::{GgufFile, Value};

/// Shape of the feed-forward gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    Silu,
    /// The tanh approximation, as Gemma was trained with.
    Gelu,
}

/// Which numbers of a head RoPE turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RopePairs {
    /// 2i with 2i+1: how GGUF stores llama's heads.
    Neighbours,
    /// i with i + dim/2.
    Halves,
}

/// What a decoder is made of.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DecoderConfig {
    pub(crate) architecture: String,
    pub(crate) hidden_size: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) feed_forward: usize,
    pub(crate) vocab_size: usize,
    pub(crate) context_length: usize,
    /// Tokens of context that the model was first trained with.
    pub(crate) original_context: usize,
    pub(crate) norm_epsilon: f32,
    pub(crate) activation: Activation,
    pub(crate) rope_pairs: RopePairs,
    pub(crate) rope_dimensions: usize,
    pub(crate) rope_base: f32,
    /// Base of the layers that see only the sliding window, where they turn otherwise (Gemma 3).
    pub(crate) rope_base_local: Option<f32>,
    pub(crate) rope_scaling: RopeScaling,
    /// Sines and cosines are multiplied by this (Phi 3).
    pub(crate) rope_magnitude: f32,
    /// Tokens that a local layer sees.
    pub(crate) sliding_window: Option<usize>,
    /// Every so many layers one sees everything; None: none does (Phi 3).
    pub(crate) global_every: Option<usize>,
    /// Queries and keys are normalised by head (Gemma 3, Qwen 3).
    pub(crate) head_norms: bool,
    /// The outputs of both halves of a layer are normalised too (Gemma 3).
    pub(crate) output_norms: bool,
    /// Queries, keys and values have biases (Qwen 2).
    pub(crate) attention_biases: bool,
    /// Queries, keys and values are one matrix, and so are gate and up (Phi 3).
    pub(crate) fused: bool,
    /// Logits come from a matrix of their own; without it, from the embeddings.
    pub(crate) own_output: bool,
    /// The tensor with a divisor for each of RoPE's frequencies (Llama 3.1 and later, Phi 3).
    pub(crate) rope_divisors: Option<String>,
    /// Embeddings are multiplied by this.
    pub(crate) embedding_scale: f32,
    /// What each half of a layer adds is multiplied by this (Granite).
    pub(crate) residual_scale: f32,
    /// Products of queries and keys are multiplied by this.
    pub(crate) attention_scale: f32,
    /// Logits are multiplied by this (Granite).
    pub(crate) logit_scale: f32,
}

/// What this version computes.
const ARCHITECTURES: &[&str] = &["llama", "qwen2", "qwen3", "gemma3", "phi3", "granite"];
/// Phi 3's divisors.
const ROPE_SHORT: &str = "rope_factors_short.weight";
const ROPE_LONG: &str = "rope_factors_long.weight";

/// Layers of Gemma 3 27B, and of no other Gemma 3.
const GEMMA_27B_LAYERS: usize = 62;

/// Bounds far above every model that exists, far below what would exhaust a machine.
const MAX_LAYERS: usize = 1024;
const MAX_HEADS: usize = 1024;
const MAX_SIZE: usize = 1 << 20;

impl DecoderConfig {
    /// Reads the metadata.
    ///
    /// # Errors
    /// When the architecture is not supported, a key is missing, or numbers do not fit together.
    pub(crate) fn from_gguf(file: &GgufFile) -> Result<Self, InvalidModel> {
        let architecture = file
            .value("general.architecture")?
            .to_str("general.architecture")?
            .to_owned();
        let is = |name: &str| architecture == name;
        if !ARCHITECTURES.contains(&architecture.as_str()) {
            return Err(InvalidModel::unsupported(
                "general.architecture",
                &architecture,
                "llama (Mistral, SmolLM and kin), qwen2, qwen3, gemma3, phi3 and granite; a BERT-type encoder comes as a folder with safetensors",
            ));
        }
        let (gemma, qwen2, qwen3, phi3) = (is("gemma3"), is("qwen2"), is("qwen3"), is("phi3"));
        let key = |name: &str| format!("{architecture}.{name}");
        let size = |name: &str, most: usize| -> Result<usize, InvalidModel> {
            let key = key(name);
            let value = file.u32(&key)? as usize;
            if value == 0 || value > most {
                Err(InvalidModel::inconsistent(
                    key,
                    value,
                    format!("from 1 to {most}"),
                ))
            } else {
                Ok(value)
            }
        };
        let optional = |name: &str| {
            file.optional(&key(name), Value::to_u32)
                .map(|value| value.map(|v| v as usize))
        };
        let real = |name: &str| file.optional(&key(name), Value::to_f32);
        let hidden_size = size("embedding_length", MAX_SIZE)?;
        let heads = size("attention.head_count", MAX_HEADS)?;
        let kv_heads = optional("attention.head_count_kv")?.unwrap_or(heads);
        if kv_heads == 0 || heads % kv_heads != 0 {
            return Err(InvalidModel::inconsistent(
                key("attention.head_count_kv"),
                kv_heads,
                format!("a divisor of the {heads} heads"),
            ));
        }
        let head_dim = match optional("attention.key_length")? {
            Some(length) => length,
            None if hidden_size % heads == 0 => hidden_size / heads,
            None => {
                return Err(InvalidModel::inconsistent(
                    key("embedding_length"),
                    hidden_size,
                    format!("a multiple of the {heads} heads"),
                ));
            }
        };
        let value_dim = optional("attention.value_length")?.unwrap_or(head_dim);
        if head_dim == 0 || head_dim % 2 != 0 || head_dim > 4096 || value_dim != head_dim {
            return Err(InvalidModel::inconsistent(
                key("attention.key_length"),
                format!("{head_dim} (values: {value_dim})"),
                "an even number up to 4096, the same for keys and values",
            ));
        }
        let rope_dimensions = optional("rope.dimension_count")?.unwrap_or(head_dim);
        if rope_dimensions == 0 || rope_dimensions % 2 != 0 || rope_dimensions > head_dim {
            return Err(InvalidModel::inconsistent(
                key("rope.dimension_count"),
                rope_dimensions,
                format!("an even number up to {head_dim}"),
            ));
        }
        let context_length = size("context_length", 1 << 24)?;
        let original_context = optional("rope.scaling.original_context_length")?.unwrap_or(context_length);
        let factor = real("rope.scaling.factor")?;
        let rope_scaling = match file.optional(&key("rope.scaling.type"), Value::to_str)? {
            // Without a type a factor is a linear one; older files call it otherwise.
            None => RopeScaling::Linear(factor.or(real("rope.scale_linear")?).unwrap_or(1.0)),
            Some("none") => RopeScaling::Linear(1.0),
            Some("linear") => RopeScaling::Linear(factor.unwrap_or(1.0)),
            // Its divisors are tensors of the file.
            Some("longrope") => RopeScaling::Linear(1.0),
            Some("yarn") => RopeScaling::Yarn(Yarn {
                factor: factor.unwrap_or(1.0),
                original_context: original_context as f32,
                beta_fast: real("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: real("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            }),
            Some(other) => {
                return Err(InvalidModel::unsupported(
                    key("rope.scaling.type"),
                    other,
                    "none, linear, yarn and longrope",
                ));
            }
        };
        let embedding = file.info("token_embd.weight")?;
        let vocab_size = match embedding.shape.as_slice() {
            [rows, columns] if *columns == hidden_size => *rows,
            other => {
                return Err(InvalidModel::inconsistent(
                    "shape of tensor token_embd.weight",
                    format!("{other:?}"),
                    format!("[vocabulary, {hidden_size}]"),
                ));
            }
        };
        // Granite's numbers; 1 elsewhere.
        let granite = |name: &str| {
            if is("granite") {
                real(name).map(|x| x.unwrap_or(1.0))
            } else {
                Ok(1.0)
            }
        };
        let rope_base = real("rope.freq_base")?.unwrap_or(if gemma { 1_000_000.0 } else { 10_000.0 });
        let layers = size("block_count", MAX_LAYERS)?;
        // Gemma 3 27B, which nothing but its number of layers tells, divides by the square root of another number
        // than all its kin. Source: google/gemma_pytorch, gemma/config.py; llama.cpp goes by the layers too.
        let attention_divisor = if gemma && layers == GEMMA_27B_LAYERS {
            (hidden_size / heads).max(1)
        } else {
            head_dim
        };
        if let Some(cap) = real("final_logit_softcapping")?.filter(|&cap| gemma && cap != 0.0) {
            return Err(InvalidModel::unsupported(
                key("final_logit_softcapping"),
                cap,
                "logits as they are: 0, or no such key",
            ));
        }
        let config = Self {
            hidden_size,
            layers,
            heads,
            kv_heads,
            head_dim,
            feed_forward: size("feed_forward_length", MAX_SIZE)?,
            vocab_size,
            context_length,
            original_context,
            norm_epsilon: {
                let key = key("attention.layer_norm_rms_epsilon");
                file.value(&key)?.to_f32(&key)?
            },
            activation: if gemma { Activation::Gelu } else { Activation::Silu },
            rope_pairs: if gemma || qwen2 || qwen3 || phi3 {
                RopePairs::Halves
            } else {
                RopePairs::Neighbours
            },
            rope_dimensions,
            rope_base,
            rope_base_local: if gemma {
                Some(real("rope.freq_base_swa")?.unwrap_or(10_000.0))
            } else {
                None
            },
            rope_scaling,
            rope_magnitude: real("rope.scaling.attn_factor")?.unwrap_or(1.0),
            sliding_window: if gemma || phi3 {
                optional("attention.sliding_window")?.filter(|&window| window > 0)
            } else {
                None
            },
            global_every: if gemma { global_every(file)? } else { None },
            head_norms: gemma || qwen3,
            output_norms: gemma,
            attention_biases: qwen2,
            fused: phi3,
            own_output: file.tensors().contains_key("output.weight"),
            rope_divisors: ["rope_freqs.weight", ROPE_SHORT]
                .into_iter()
                .find(|name| file.tensors().contains_key(*name))
                .map(str::to_owned),
            embedding_scale: if gemma {
                (hidden_size as f32).sqrt()
            } else {
                granite("embedding_scale")?
            },
            residual_scale: granite("residual_scale")?,
            attention_scale: real("attention.scale")?
                .filter(|_| is("granite"))
                .unwrap_or(1.0 / (attention_divisor as f32).sqrt()),
            logit_scale: 1.0 / granite("logit_scale")?,
            architecture: architecture.clone(),
        };
        let positive = [
            ("rope.freq_base", config.rope_base),
            ("rope.freq_base_swa", config.rope_base_local.unwrap_or(1.0)),
            ("rope.scaling.factor", factor.unwrap_or(1.0)),
            ("rope.scaling.attn_factor", config.rope_magnitude),
            ("logit_scale", config.logit_scale),
            ("attention.scale", config.attention_scale),
            ("attention.layer_norm_rms_epsilon", config.norm_epsilon),
        ];
        for (name, value) in positive {
            if value <= 0.0 {
                return Err(InvalidModel::inconsistent(key(name), value, "a positive number"));
            }
        }
        if file
            .tensors()
            .keys()
            .any(|name| name.ends_with("ffn_gate_inp.weight"))
        {
            return Err(InvalidModel::unsupported(
                "the feed-forward part",
                "a mixture of experts",
                "one dense feed-forward part a layer",
            ));
        }
        Ok(config)
    }

    /// Says how many tokens of context it will serve: a model with two sets of divisors has one for contexts
    /// that are longer than its first.
    pub(crate) fn serve_context(&mut self, tokens: usize) {
        if self.rope_divisors.as_deref() == Some(ROPE_SHORT) && tokens > self.original_context {
            self.rope_divisors = Some(ROPE_LONG.to_owned());
        }
    }

    /// Whether a layer sees only the sliding window.
    pub(crate) fn is_local(&self, layer: usize) -> bool {
        let sees_all = |every: usize| (layer + 1).is_multiple_of(every);
        self.sliding_window.is_some() && !self.global_every.is_some_and(sees_all)
    }

    /// The tensors of the model with their shapes, `[rows, columns]` for matrices.
    fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, q, kv) = (
            self.hidden_size,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        );
        let mut shapes = vec![
            ("token_embd.weight".to_owned(), vec![self.vocab_size, hidden]),
            ("output_norm.weight".to_owned(), vec![hidden]),
        ];
        for layer in 0..self.layers {
            let mut add =
                |name: &str, shape: Vec<usize>| shapes.push((format!("blk.{layer}.{name}.weight"), shape));
            add("attn_norm", vec![hidden]);
            if self.fused {
                add("attn_qkv", vec![q + 2 * kv, hidden]);
            } else {
                add("attn_q", vec![q, hidden]);
                add("attn_k", vec![kv, hidden]);
                add("attn_v", vec![kv, hidden]);
            }
            add("attn_output", vec![hidden, q]);
            add("ffn_norm", vec![hidden]);
            if self.fused {
                add("ffn_up", vec![2 * self.feed_forward, hidden]);
            } else {
                add("ffn_gate", vec![self.feed_forward, hidden]);
                add("ffn_up", vec![self.feed_forward, hidden]);
            }
            add("ffn_down", vec![hidden, self.feed_forward]);
            if self.head_norms {
                add("attn_q_norm", vec![self.head_dim]);
                add("attn_k_norm", vec![self.head_dim]);
            }
            if self.output_norms {
                add("post_attention_norm", vec![hidden]);
                add("post_ffw_norm", vec![hidden]);
            }
        }
        for layer in (0..self.layers).filter(|_| self.attention_biases) {
            for (part, size) in [("attn_q", q), ("attn_k", kv), ("attn_v", kv)] {
                shapes.push((format!("blk.{layer}.{part}.bias"), vec![size]));
            }
        }
        if self.own_output {
            shapes.push(("output.weight".to_owned(), vec![self.vocab_size, hidden]));
        }
        if let Some(name) = &self.rope_divisors {
            shapes.push((name.clone(), vec![self.rope_dimensions / 2]));
        }
        shapes
    }

    /// Checks that every tensor is there with its shape, and none that would have a part in the answer without being read.
    pub(crate) fn check_tensors(&self, file: &GgufFile) -> Result<(), InvalidModel> {
        let shapes = self.tensor_shapes();
        let mut read: BTreeSet<&str> = shapes.iter().map(|(name, _)| name.as_str()).collect();
        // Of two sets of divisors one is read.
        if read.contains(ROPE_SHORT) || read.contains(ROPE_LONG) {
            read.extend([ROPE_SHORT, ROPE_LONG]);
        }
        let unread = |name: &&String| !read.contains(name.as_str()) && !is_beside_text(name);
        if let Some(name) = file.tensors().keys().find(unread) {
            return Err(InvalidModel::unsupported(
                format!("tensor {name}"),
                format!("no part of {} as it is computed here", self.architecture),
                "files with the usual tensors alone, for an answer without this one could be another model's; take another \
                 conversion, or another model",
            ));
        }
        for (name, shape) in shapes {
            let found = file.info(&name)?;
            if found.shape != shape {
                return Err(InvalidModel::inconsistent(
                    format!("shape of tensor {name}"),
                    format!("{:?}", found.shape),
                    format!("{shape:?}"),
                ));
            }
            if shape.len() == 1 {
                check_vector(&name, found.dtype)?;
            }
        }
        Ok(())
    }
}

/// Every so many layers of a Gemma 3 one sees everything; none where the number is 0. Files say it as a number or,
/// layer by layer, as a list of which see the window alone.
fn global_every(file: &GgufFile) -> Result<Option<usize>, InvalidModel> {
    const KEY: &str = "gemma3.attention.sliding_window_pattern";
    let every = match file.optional(KEY, |value, _| Ok(value))? {
        None => 6,
        Some(Value::Bools(local)) => {
            let every = local.iter().position(|local| !local).map_or(0, |first| first + 1);
            let regular = |(layer, &local): (usize, &bool)| local != (layer + 1).is_multiple_of(every);
            if !local.iter().enumerate().all(regular) {
                return Err(InvalidModel::unsupported(
                    KEY,
                    "a list without order",
                    "one layer that sees everything after every so many that do not",
                ));
            }
            every
        }
        Some(value) => value.to_u32(KEY)? as usize,
    };
    Ok(Some(every).filter(|&every| every > 0))
}

/// Tensors that a text's answer does without: eyes and ears, and frequencies that old files carry beside the numbers they come
/// from.
fn is_beside_text(name: &str) -> bool {
    const BEGINNINGS: &[&str] = &["v.", "a.", "mm."];
    const ENDS: &[&str] = &[".attn_rot_embd.weight", ".attn_rot_embd"];
    BEGINNINGS.iter().any(|beginning| name.starts_with(beginning))
        || ENDS.iter().any(|end| name.ends_with(end))
}

/// Norms and biases are no quantised numbers.
pub(super) fn check_vector(name: &str, dtype: GgmlDType) -> Result<(), InvalidModel> {
    match dtype {
        GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => Ok(()),
        other => Err(InvalidModel::unsupported(
            format!("the type of tensor {name}"),
            format!("{other:?}"),
            "F32, F16 and BF16 for norms and biases",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::tests::Writer;

    /// The shapes of the published Gemma 3 models: layers, hidden size, heads, size of a head.
    const GEMMA_1B: [u32; 4] = [26, 1152, 4, 256];
    const GEMMA_27B: [u32; 4] = [62, 5376, 32, 128];

    fn gemma([layers, hidden, heads, head_dim]: [u32; 4]) -> Writer {
        Writer::default()
            .str("general.architecture", "gemma3")
            .u32("gemma3.block_count", layers)
            .u32("gemma3.context_length", 1024)
            .u32("gemma3.embedding_length", hidden)
            .u32("gemma3.feed_forward_length", 64)
            .u32("gemma3.attention.head_count", heads)
            .u32("gemma3.attention.key_length", head_dim)
            .u32("gemma3.attention.value_length", head_dim)
            .u32("gemma3.attention.sliding_window", 512)
            .raw(
                "gemma3.attention.layer_norm_rms_epsilon",
                6,
                1e-6_f32.to_le_bytes().into(),
            )
            .tensor("token_embd.weight", &[u64::from(hidden), 4], 0, 0)
            .data(hidden as usize * 16)
    }

    fn read(file: &Writer) -> Result<DecoderConfig, InvalidModel> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, file.bytes()).expect("it is written");
        DecoderConfig::from_gguf(&GgufFile::open(&path).expect("it opens"))
    }

    #[test]
    fn gemma_27b_divides_by_another_number_than_its_kin() {
        let scale = |shape| read(&gemma(shape)).expect("it reads").attention_scale;
        assert_eq!(scale(GEMMA_1B), 1.0 / 256.0_f32.sqrt());
        assert_eq!(scale(GEMMA_27B), 1.0 / 168.0_f32.sqrt());
    }

    #[test]
    fn the_keys_of_the_sliding_window_are_those_that_files_carry() {
        let plain = read(&gemma(GEMMA_1B)).expect("it reads");
        assert_eq!(
            (plain.rope_base_local, plain.global_every),
            (Some(10_000.0), Some(6))
        );
        let told = gemma(GEMMA_1B)
            .raw("gemma3.rope.freq_base_swa", 6, 20_000.0_f32.to_le_bytes().into())
            .u32("gemma3.attention.sliding_window_pattern", 4);
        let told = read(&told).expect("it reads");
        assert_eq!(
            (told.rope_base_local, told.global_every),
            (Some(20_000.0), Some(4))
        );
        let local: Vec<bool> = (0..8).map(|layer| told.is_local(layer)).collect();
        assert_eq!(local, [true, true, true, false, true, true, true, false]);
    }

    #[test]
    fn a_pattern_layer_by_layer_is_read_too() {
        let with = |local: &[u8]| {
            let list = [
                &7_u32.to_le_bytes()[..],
                &(local.len() as u64).to_le_bytes(),
                local,
            ]
            .concat();
            read(&gemma(GEMMA_1B).raw("gemma3.attention.sliding_window_pattern", 9, list))
        };
        assert_eq!(
            with(&[1, 1, 0, 1, 1, 0, 1]).expect("it reads").global_every,
            Some(3)
        );
        assert_eq!(with(&[1, 1, 1]).expect("it reads").global_every, None);
        let refused = with(&[1, 0, 0, 1]).expect_err("no order").to_string();
        assert!(refused.contains("sliding_window_pattern"), "{refused}");
    }

    #[test]
    fn a_factor_without_a_type_is_a_linear_one() {
        let factor = |key: &str| {
            let file = gemma(GEMMA_1B).raw(key, 6, 8.0_f32.to_le_bytes().into());
            read(&file).expect("it reads").rope_scaling
        };
        assert_eq!(factor("gemma3.rope.scaling.factor"), RopeScaling::Linear(8.0));
        assert_eq!(factor("gemma3.rope.scale_linear"), RopeScaling::Linear(8.0));
        assert_eq!(factor("gemma3.unknown"), RopeScaling::Linear(1.0));
    }
}
