//! The BERT-type encoder: text to one vector, by mean pooling and L2 norm.
//! Source: Devlin et al. 2018; pooling as sentence-transformers does it.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use serde::Deserialize;

use crate::inspect::{ModelFacts, ModelFormat, ModelKind};
use crate::{InvalidModel, LoadModel};

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
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    vocab_size: usize,
    pub(crate) max_position_embeddings: usize,
    #[serde(default = "default_epsilon")]
    layer_norm_eps: f64,
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

/// An affine map.
struct Dense {
    weight: Tensor,
    bias: Tensor,
}

struct Norm {
    weight: Tensor,
    bias: Tensor,
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
    words: Tensor,
    positions: Tensor,
    kind: Tensor,
    norm: Norm,
    layers: Vec<Layer>,
}

/// The tensors of a file, taken one by one.
struct Weights(HashMap<String, Tensor>);

impl Weights {
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, LoadModel> {
        // Some exports put everything under `bert.`.
        let tensor = self
            .0
            .remove(name)
            .or_else(|| self.0.remove(&format!("bert.{name}")));
        let tensor = tensor.ok_or_else(|| InvalidModel::missing(format!("tensor {name}")))?;
        if tensor.dims() != shape {
            return Err(InvalidModel::inconsistent(
                format!("shape of tensor {name}"),
                format!("{:?}", tensor.dims()),
                format!("{shape:?}"),
            )
            .into());
        }
        Ok(tensor.to_dtype(DType::F32)?)
    }

    fn dense(&mut self, name: &str, out: usize, inner: usize) -> Result<Dense, LoadModel> {
        let weight = self.take(&format!("{name}.weight"), &[out, inner])?.t()?;
        Ok(Dense {
            weight,
            bias: self.take(&format!("{name}.bias"), &[out])?,
        })
    }

    fn norm(&mut self, name: &str, size: usize, epsilon: f64) -> Result<Norm, LoadModel> {
        let weight = self.take(&format!("{name}.weight"), &[size])?;
        Ok(Norm {
            weight,
            bias: self.take(&format!("{name}.bias"), &[size])?,
            epsilon: epsilon as f32,
        })
    }
}

impl Dense {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.matmul(&self.weight)?.broadcast_add(&self.bias)
    }
}

impl Norm {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        candle_nn::ops::layer_norm(&x.contiguous()?, &self.weight, &self.bias, self.epsilon)
    }
}

impl Encoder {
    /// Loads the weights of a folder.
    pub(crate) fn load(folder: &Path, config: EncoderConfig) -> Result<Self, LoadModel> {
        config.facts(folder)?;
        let mut weights = Weights(candle_core::safetensors::load(
            folder.join(WEIGHTS),
            &Device::Cpu,
        )?);
        let (hidden, eps) = (config.hidden_size, config.layer_norm_eps);
        let words = weights.take("embeddings.word_embeddings.weight", &[config.vocab_size, hidden])?;
        let positions = weights.take(
            "embeddings.position_embeddings.weight",
            &[config.max_position_embeddings, hidden],
        )?;
        // Every text is of the first of two kinds.
        let kind = weights
            .take("embeddings.token_type_embeddings.weight", &[2, hidden])?
            .narrow(0, 0, 1)?
            .contiguous()?;
        let norm = weights.norm("embeddings.LayerNorm", hidden, eps)?;
        let layers = (0..config.num_hidden_layers).map(|index| {
            let name = |part: &str| format!("encoder.layer.{index}.{part}");
            Ok(Layer {
                query: weights.dense(&name("attention.self.query"), hidden, hidden)?,
                key: weights.dense(&name("attention.self.key"), hidden, hidden)?,
                value: weights.dense(&name("attention.self.value"), hidden, hidden)?,
                attended: weights.dense(&name("attention.output.dense"), hidden, hidden)?,
                attended_norm: weights.norm(&name("attention.output.LayerNorm"), hidden, eps)?,
                up: weights.dense(&name("intermediate.dense"), config.intermediate_size, hidden)?,
                down: weights.dense(&name("output.dense"), hidden, config.intermediate_size)?,
                fed_norm: weights.norm(&name("output.LayerNorm"), hidden, eps)?,
            })
        });
        let layers = layers.collect::<Result<Vec<Layer>, LoadModel>>()?;
        Ok(Self {
            words,
            positions,
            kind,
            norm,
            layers,
            config,
        })
    }

    /// The vector of one text, of length 1. `tokens` must fit the positions.
    pub(crate) fn embed(&self, tokens: &[u32]) -> candle_core::Result<Vec<f32>> {
        let count = tokens.len();
        let ids = Tensor::new(tokens, &Device::Cpu)?;
        let words = self.words.index_select(&ids, 0)?;
        let x = (words + self.positions.narrow(0, 0, count)?)?.broadcast_add(&self.kind)?;
        let mut x = self.norm.forward(&x)?;
        for layer in &self.layers {
            x = self.layer(layer, &x, count)?;
        }
        let mean = x.mean(0)?;
        let length = mean.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?;
        // A vector of zeros has no direction; it stays what it is.
        let scale = if length > 0.0 {
            f64::from(length).recip()
        } else {
            1.0
        };
        (mean * scale)?.to_vec1()
    }

    fn layer(&self, layer: &Layer, x: &Tensor, count: usize) -> candle_core::Result<Tensor> {
        let heads = self.config.num_attention_heads;
        let dim = self.config.hidden_size / heads;
        let split = |dense: &Dense| {
            dense
                .forward(x)?
                .reshape((count, heads, dim))?
                .transpose(0, 1)?
                .contiguous()
        };
        let (query, key, value) = (split(&layer.query)?, split(&layer.key)?, split(&layer.value)?);
        let scores = (query.matmul(&key.transpose(1, 2)?.contiguous()?)? * (dim as f64).sqrt().recip())?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        let attended = weights
            .matmul(&value)?
            .transpose(0, 1)?
            .reshape((count, heads * dim))?;
        let x = layer
            .attended_norm
            .forward(&(layer.attended.forward(&attended)? + x)?)?;
        let fed = layer.down.forward(&layer.up.forward(&x)?.gelu_erf()?)?;
        layer.fed_norm.forward(&(fed + x)?)
    }
}
