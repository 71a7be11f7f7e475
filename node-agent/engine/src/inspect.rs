//! What a model file holds, told without loading it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use serde::{Deserialize, Serialize};

use crate::InvalidModel;
use crate::gguf::{GgufFile, Value};
use crate::model::{DecoderConfig, EncoderConfig};

/// Format of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelFormat {
    /// One GGUF file.
    Gguf,
    /// A folder with `model.safetensors`, `config.json` and `tokenizer.json`.
    Safetensors,
}

impl fmt::Display for ModelFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gguf => "gguf",
            Self::Safetensors => "safetensors",
        })
    }
}

/// What the model does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelKind {
    /// Writes text.
    Generate,
    /// Turns text into vectors.
    Embed,
}

/// Number format of the KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvType {
    /// 16-bit floats.
    #[default]
    F16,
    /// 32-bit floats.
    F32,
    /// 8-bit integers with a scale for every 32 of a token's numbers.
    Q8,
}

impl KvType {
    /// Bytes of one head's key or value for a token.
    #[must_use]
    pub fn head_bytes(self, head_dim: u64) -> u64 {
        match self {
            Self::F16 => 2 * head_dim,
            Self::F32 => 4 * head_dim,
            Self::Q8 => head_dim + 4 * head_dim.div_ceil(32),
        }
    }
}

/// What a model file holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// Format of the file.
    pub format: ModelFormat,
    /// What the model does.
    pub kind: ModelKind,
    /// Architecture, such as `llama`.
    pub architecture: String,
    /// The model's own name.
    pub name: Option<String>,
    /// Licence, as the file tells it.
    pub licence: Option<String>,
    /// Quantisation, such as `Q4_1`.
    pub quantization: String,
    /// Number of parameters.
    pub parameter_count: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of the weights in memory.
    pub weight_bytes: u64,
    /// Longest context in tokens.
    pub context_length: u32,
    /// Size of the hidden state.
    pub embedding_length: u32,
    /// Layers.
    pub block_count: u32,
    /// Query heads.
    pub head_count: u32,
    /// Key and value heads.
    pub kv_head_count: u32,
    /// Size of a head.
    pub head_dim: u32,
    /// Tokens in the vocabulary.
    pub vocab_size: u32,
    /// Whether the file brings a chat template.
    pub has_chat_template: bool,
}

impl ModelFacts {
    /// Bytes of KV cache for one token.
    #[must_use]
    pub fn kv_bytes_per_token(&self, kv_type: KvType) -> u64 {
        match self.kind {
            ModelKind::Embed => 0,
            ModelKind::Generate => {
                2 * u64::from(self.block_count)
                    * u64::from(self.kv_head_count)
                    * kv_type.head_bytes(u64::from(self.head_dim))
            }
        }
    }

    /// One line for the eye, such as `llama 135M Q4_1`.
    #[must_use]
    pub fn summary(&self) -> String {
        let parameters = self.parameter_count as f64;
        let size = if parameters >= 1e9 {
            format!("{:.1}B", parameters / 1e9)
        } else {
            format!("{:.0}M", parameters / 1e6)
        };
        format!("{} {size} {}", self.architecture, self.quantization)
    }
}

/// Reads and checks a GGUF file or a folder with safetensors, in bounded time and memory.
///
/// # Errors
/// [`InvalidModel`] when it is not sound, or not of a kind that this version runs.
pub fn inspect(path: &Path) -> Result<ModelFacts, InvalidModel> {
    if path.is_dir() {
        EncoderConfig::open(path)?.facts(path)
    } else {
        gguf_facts(&GgufFile::open(path)?)
    }
}

/// Facts of an open GGUF file. Everything that loading will ask for is asked for here.
pub(crate) fn gguf_facts(file: &GgufFile) -> Result<ModelFacts, InvalidModel> {
    let config = DecoderConfig::from_gguf(file)?;
    config.check_tensors(file)?;
    let text = |key: &str| {
        file.optional(key, Value::to_str)
            .map(|text| text.map(crate::error::quote))
    };
    let tokens = file
        .value("tokenizer.ggml.tokens")?
        .to_strings("tokenizer.ggml.tokens")?
        .len();
    if tokens != config.vocab_size {
        return Err(InvalidModel::inconsistent(
            "the vocabulary",
            format!("of {tokens} tokens"),
            format!("{} tokens, one a row of token_embd.weight", config.vocab_size),
        ));
    }
    // What loading will ask for is asked for here. The template is compiled, which is bounded, and not run.
    crate::Tokenizer::from_gguf(file)?;
    crate::ChatTemplate::from_gguf(file, String::new(), String::new())?;
    let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    Ok(ModelFacts {
        format: ModelFormat::Gguf,
        kind: ModelKind::Generate,
        architecture: config.architecture.clone(),
        name: text("general.name")?,
        licence: text("general.license")?,
        quantization: quantization(file)?,
        parameter_count: file
            .tensors()
            .values()
            .map(super::gguf::TensorInfo::elements)
            .sum(),
        file_bytes: file.file_bytes(),
        weight_bytes: file.tensors().values().map(|tensor| tensor.bytes as u64).sum(),
        context_length: number(config.context_length),
        embedding_length: number(config.hidden_size),
        block_count: number(config.layers),
        head_count: number(config.heads),
        kv_head_count: number(config.kv_heads),
        head_dim: number(config.head_dim),
        vocab_size: number(config.vocab_size),
        has_chat_template: file.metadata().contains_key("tokenizer.chat_template"),
    })
}

/// The label in `general.file_type`, else the format of most bytes. Source: ggml's llama_ftype.
fn quantization(file: &GgufFile) -> Result<String, InvalidModel> {
    let label = match file.optional("general.file_type", Value::to_u32)? {
        Some(0) => "F32",
        Some(1) => "F16",
        Some(2) => "Q4_0",
        Some(3) => "Q4_1",
        Some(7) => "Q8_0",
        Some(8) => "Q5_0",
        Some(9) => "Q5_1",
        Some(10) => "Q2_K",
        Some(11) => "Q3_K_S",
        Some(12) => "Q3_K_M",
        Some(13) => "Q3_K_L",
        Some(14) => "Q4_K_S",
        Some(15) => "Q4_K_M",
        Some(16) => "Q5_K_S",
        Some(17) => "Q5_K_M",
        Some(18) => "Q6_K",
        Some(32) => "BF16",
        _ => {
            let mut bytes: BTreeMap<String, usize> = BTreeMap::new();
            for tensor in file.tensors().values() {
                *bytes.entry(dtype_name(tensor.dtype)).or_default() += tensor.bytes;
            }
            return Ok(bytes
                .into_iter()
                .max_by_key(|(_, bytes)| *bytes)
                .map(|(name, _)| name)
                .unwrap_or_default());
        }
    };
    Ok(label.to_owned())
}

fn dtype_name(dtype: GgmlDType) -> String {
    let name = format!("{dtype:?}");
    match name.strip_suffix('K').filter(|_| name.starts_with('Q')) {
        Some(bits) => format!("{bits}_K"),
        None => name,
    }
}
