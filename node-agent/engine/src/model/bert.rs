//! What the folder of a BERT-type encoder holds, checked before anything is loaded.

use std::path::Path;

use serde::Deserialize;

use crate::InvalidModel;
use crate::inspect::{ModelFacts, ModelFormat, ModelKind};

/// Files of a model folder.
pub(crate) const WEIGHTS: &str = "model.safetensors";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "config.json";
/// Largest config.json or tokenizer.json: vocabularies of a quarter of a million tokens take 20 MiB.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// `config.json`, as far as it matters.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct EncoderConfig {
    model_type: String,
    #[serde(default, rename = "_name_or_path")]
    name: Option<String>,
    pub(super) hidden_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) intermediate_size: usize,
    pub(super) vocab_size: usize,
    pub(crate) max_position_embeddings: usize,
    #[serde(default = "default_epsilon")]
    pub(super) layer_norm_eps: f64,
    #[serde(default)]
    hidden_act: Option<String>,
}

fn default_epsilon() -> f64 {
    1e-12
}

/// Reads a small file of the folder.
pub(crate) fn read_bounded(folder: &Path, name: &str) -> Result<Vec<u8>, InvalidModel> {
    let path = folder.join(name);
    let open = |source| InvalidModel::OpenFile {
        path: path.clone(),
        source,
    };
    let bytes = std::fs::metadata(&path).map_err(open)?.len();
    if bytes > MAX_JSON_BYTES {
        return Err(InvalidModel::inconsistent(
            name,
            format!("{bytes} bytes long"),
            format!("at most {MAX_JSON_BYTES} bytes"),
        ));
    }
    std::fs::read(&path).map_err(open)
}

impl EncoderConfig {
    /// Reads and checks `config.json` of a folder.
    pub(crate) fn open(folder: &Path) -> Result<Self, InvalidModel> {
        let bytes = read_bounded(folder, CONFIG)?;
        let config: Self = serde_json::from_slice(&bytes).map_err(|error| {
            InvalidModel::inconsistent(CONFIG, error, "the configuration of a BERT-type encoder")
        })?;
        if config.model_type != "bert" {
            return Err(InvalidModel::unsupported(
                "model_type in config.json",
                &config.model_type,
                "bert; models that write text come as GGUF",
            ));
        }
        if config.hidden_act.as_deref().is_some_and(|act| act != "gelu") {
            return Err(InvalidModel::unsupported(
                "hidden_act in config.json",
                config.hidden_act.unwrap_or_default(),
                "gelu",
            ));
        }
        let sizes = [
            ("hidden_size", config.hidden_size, 1 << 16),
            ("num_hidden_layers", config.num_hidden_layers, 1024),
            ("num_attention_heads", config.num_attention_heads, 1024),
            ("intermediate_size", config.intermediate_size, 1 << 18),
            ("vocab_size", config.vocab_size, 1 << 24),
            ("max_position_embeddings", config.max_position_embeddings, 1 << 20),
        ];
        for (name, size, most) in sizes {
            if size == 0 || size > most {
                return Err(InvalidModel::inconsistent(
                    format!("{name} in config.json"),
                    size,
                    format!("from 1 to {most}"),
                ));
            }
        }
        if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            return Err(InvalidModel::inconsistent(
                "hidden_size in config.json",
                config.hidden_size,
                format!("a multiple of the {} heads", config.num_attention_heads),
            ));
        }
        Ok(config)
    }

    /// What the folder holds. The weights' directory is checked, the weights are not read.
    pub(crate) fn facts(&self, folder: &Path) -> Result<ModelFacts, InvalidModel> {
        let map = crate::mmap::map(&folder.join(WEIGHTS))?;
        let tensors = safetensors::SafeTensors::deserialize(&map)
            .map_err(|error| InvalidModel::inconsistent(WEIGHTS, error, "a sound safetensors file"))?;
        let (mut parameter_count, mut weight_bytes, mut dtypes) = (0_u64, 0_u64, Vec::new());
        for (_, tensor) in tensors.tensors() {
            parameter_count += tensor.shape().iter().map(|&size| size as u64).product::<u64>();
            weight_bytes += tensor.data().len() as u64;
            dtypes.push(format!("{:?}", tensor.dtype()));
        }
        dtypes.sort();
        let quantization = dtypes
            .iter()
            .find(|dtype| dtype.starts_with('F') || dtype.starts_with('B'))
            .cloned()
            .unwrap_or_default();
        let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        read_bounded(folder, TOKENIZER)?;
        Ok(ModelFacts {
            format: ModelFormat::Safetensors,
            kind: ModelKind::Embed,
            architecture: "bert".to_owned(),
            name: self.name.clone(),
            licence: None,
            quantization,
            parameter_count,
            file_bytes: map.len() as u64,
            weight_bytes,
            context_length: number(self.max_position_embeddings),
            embedding_length: number(self.hidden_size),
            block_count: number(self.num_hidden_layers),
            head_count: number(self.num_attention_heads),
            kv_head_count: number(self.num_attention_heads),
            head_dim: number(self.hidden_size / self.num_attention_heads),
            vocab_size: number(self.vocab_size),
            has_chat_template: false,
        })
    }
}
