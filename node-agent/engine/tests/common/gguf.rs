//! Writes GGUF files, sound ones and broken ones, and two tiny models that truly run.

use std::path::{Path, PathBuf};

/// Numbers of GGUF's value types.
pub const UINT8: u32 = 0;
pub const UINT32: u32 = 4;
pub const FLOAT32: u32 = 6;
pub const BOOL: u32 = 7;
pub const STRING: u32 = 8;
pub const ARRAY: u32 = 9;

/// ggml's numbers of tensor types.
pub const F32: u32 = 0;
pub const Q8_0: u32 = 8;

/// A tensor as it will be written.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    /// Innermost first, as GGUF writes it.
    pub shape: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
    /// Where its data are said to be; None: where they are.
    pub offset: Option<u64>,
}

/// A file in the making. Every part can be replaced, removed or doubled.
#[derive(Clone)]
pub struct Gguf {
    pub version: u32,
    pub alignment: u64,
    pub metadata: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<Tensor>,
}

impl Default for Gguf {
    fn default() -> Self {
        Self {
            version: 3,
            alignment: 32,
            metadata: Vec::new(),
            tensors: Vec::new(),
        }
    }
}

fn text(value: &[u8]) -> Vec<u8> {
    let mut bytes = (value.len() as u64).to_le_bytes().to_vec();
    bytes.extend(value);
    bytes
}

/// A value with its type in front.
pub fn value(kind: u32, bytes: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes(), bytes].concat()
}

/// A list that claims `count` elements.
pub fn list(kind: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [
        &ARRAY.to_le_bytes(),
        &kind.to_le_bytes(),
        &count.to_le_bytes()[..],
        elements,
    ]
    .concat()
}

/// A list of texts.
pub fn strings<T: AsRef<[u8]>>(values: &[T]) -> Vec<u8> {
    let elements: Vec<u8> = values.iter().flat_map(|value| text(value.as_ref())).collect();
    list(STRING, values.len() as u64, &elements)
}

impl Gguf {
    /// Sets a metadata value, in place of one that is there.
    pub fn set(mut self, key: &str, value: Vec<u8>) -> Self {
        match self.metadata.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
        self
    }

    pub fn str(self, key: &str, to: &str) -> Self {
        self.set(key, value(STRING, &text(to.as_bytes())))
    }

    pub fn u32(self, key: &str, to: u32) -> Self {
        self.set(key, value(UINT32, &to.to_le_bytes()))
    }

    pub fn f32(self, key: &str, to: f32) -> Self {
        self.set(key, value(FLOAT32, &to.to_le_bytes()))
    }

    pub fn bool(self, key: &str, to: bool) -> Self {
        self.set(key, value(BOOL, &[u8::from(to)]))
    }

    pub fn without(mut self, key: &str) -> Self {
        self.metadata.retain(|(name, _)| name != key);
        self
    }

    pub fn without_tensor(mut self, name: &str) -> Self {
        self.tensors.retain(|tensor| tensor.name != name);
        self
    }

    /// Adds a tensor of 32-bit floats, `shape` innermost first.
    pub fn tensor(mut self, name: &str, shape: &[u64], numbers: impl Iterator<Item = f32>) -> Self {
        let count = shape.iter().product::<u64>() as usize;
        self.tensors.push(Tensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            kind: F32,
            data: numbers.take(count).flat_map(f32::to_le_bytes).collect(),
            offset: None,
        });
        self
    }

    /// Changes the tensor with this name.
    pub fn edit(mut self, name: &str, change: impl FnOnce(&mut Tensor)) -> Self {
        let tensor = self.tensors.iter_mut().find(|tensor| tensor.name == name);
        change(tensor.expect("the tensor is there"));
        self
    }

    /// The part before the tensors' data, padding included, and the whole.
    pub fn parts(&self) -> (usize, Vec<u8>) {
        let mut out = [b"GGUF", &self.version.to_le_bytes()[..]].concat();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            out.extend(text(key.as_bytes()));
            out.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            out.extend(text(tensor.name.as_bytes()));
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            out.extend(tensor.shape.iter().flat_map(|size| size.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            data.resize(data.len().next_multiple_of(self.alignment as usize), 0);
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
        }
        out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
        let header = out.len();
        out.extend(data);
        (header, out)
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.parts().1
    }

    /// Writes it into a folder.
    pub fn write(&self, folder: &Path) -> PathBuf {
        let path = folder.join("model.gguf");
        std::fs::write(&path, self.bytes()).expect("the folder takes a file");
        path
    }
}

/// Small numbers without order, the same on every run.
pub fn noise(seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    })
}

/// Byte-level BPE's letter for a byte. Source: GPT-2's encoder.
pub fn byte_letter(byte: u8) -> char {
    let own = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let moved = (0..byte).filter(|&b| !own(b)).count() as u32;
    let code = if own(byte) { u32::from(byte) } else { 256 + moved };
    char::from_u32(code).expect("a letter")
}

const HIDDEN: u64 = 32;
const FEED: u64 = 64;
const HEAD: u64 = 16;

/// Query heads, which share one head of keys and values.
const HEADS: u64 = 2;

fn layers(mut file: Gguf, vocabulary: u64, count: u64, heads: u64, architecture: &str) -> Gguf {
    let mut seed = 1;
    let mut add = |file: Gguf, name: &str, shape: &[u64]| {
        seed += 1;
        file.tensor(name, shape, noise(seed))
    };
    file = add(file, "token_embd.weight", &[HIDDEN, vocabulary]);
    file = file.tensor("output_norm.weight", &[HIDDEN], std::iter::repeat(1.0));
    for layer in 0..count {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let apart = [
            ("attn_q", HIDDEN, heads * HEAD),
            ("attn_k", HIDDEN, HEAD),
            ("attn_v", HIDDEN, HEAD),
            ("attn_output", heads * HEAD, HIDDEN),
            ("ffn_gate", HIDDEN, FEED),
            ("ffn_up", HIDDEN, FEED),
            ("ffn_down", FEED, HIDDEN),
        ];
        let fused = [
            ("attn_qkv", HIDDEN, (heads + 2) * HEAD),
            ("attn_output", heads * HEAD, HIDDEN),
            ("ffn_up", HIDDEN, 2 * FEED),
            ("ffn_down", FEED, HIDDEN),
        ];
        let matrices = if architecture == "phi3" {
            &fused[..]
        } else {
            &apart
        };
        for &(part, inner, outer) in matrices {
            file = add(file, &name(part), &[inner, outer]);
        }
        let own: &[(&str, u64)] = &[("attn_norm", HIDDEN), ("ffn_norm", HIDDEN)];
        let more: &[(&str, u64)] = &[
            ("attn_q_norm", HEAD),
            ("attn_k_norm", HEAD),
            ("post_attention_norm", HIDDEN),
            ("post_ffw_norm", HIDDEN),
        ];
        let more = match architecture {
            "gemma3" => more,
            "qwen3" => &more[..2],
            _ => &[],
        };
        for (part, size) in own.iter().chain(more) {
            file = file.tensor(&name(part), &[*size], std::iter::repeat(1.0));
        }
        if architecture == "qwen2" {
            for (part, size) in [("attn_q", heads * HEAD), ("attn_k", HEAD), ("attn_v", HEAD)] {
                file = add(file, &format!("blk.{layer}.{part}.bias"), &[size]);
            }
        }
    }
    file
}

fn sizes(file: Gguf, architecture: &str, count: u64, heads: u64) -> Gguf {
    let key = |name: &str| format!("{architecture}.{name}");
    file.str("general.architecture", architecture)
        .str("general.name", "Tiny")
        .str("general.license", "apache-2.0")
        .u32("general.file_type", 0)
        .u32(&key("block_count"), count as u32)
        .u32(&key("context_length"), 256)
        .u32(&key("embedding_length"), HIDDEN as u32)
        .u32(&key("feed_forward_length"), FEED as u32)
        .u32(&key("attention.head_count"), heads as u32)
        .u32(&key("attention.head_count_kv"), 1)
        .u32(&key("attention.key_length"), HEAD as u32)
        .u32(&key("attention.value_length"), HEAD as u32)
        .f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
        .f32(&key("rope.freq_base"), 10_000.0)
}

/// A llama of two layers with byte-level BPE: 256 bytes, a few merges, three control tokens.
pub fn tiny_llama() -> Gguf {
    tiny_bpe("llama", "smollm")
}

/// A Qwen 2 of two layers: as a llama, with biases.
pub fn tiny_qwen2() -> Gguf {
    tiny_bpe("qwen2", "qwen2")
}

/// A Qwen 3 of two layers: as a llama, with norms of heads.
pub fn tiny_qwen3() -> Gguf {
    tiny_bpe("qwen3", "qwen2")
}

/// A Phi 3 of two layers: queries, keys and values in one matrix, gate and up in another, an output of its own.
pub fn tiny_phi3() -> Gguf {
    let file = tiny_bpe("phi3", "qwen2");
    let vocabulary = file.tensors[0].shape[1];
    file.tensor("output.weight", &[HIDDEN, vocabulary], noise(99))
}

/// A Granite of two layers: as a llama, with four factors.
pub fn tiny_granite() -> Gguf {
    tiny_bpe("granite", "smollm")
        .f32("granite.embedding_scale", 3.0)
        .f32("granite.residual_scale", 0.5)
        .f32("granite.attention.scale", 0.4)
        .f32("granite.logit_scale", 4.0)
}

fn tiny_bpe(architecture: &str, pretokenizer: &str) -> Gguf {
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d"];
    let mut tokens: Vec<String> = vec!["<s>".into(), "</s>".into(), "<|im_end|>".into()];
    tokens.extend((0..=255).map(|byte| byte_letter(byte).to_string()));
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let kinds: Vec<u8> = (0..tokens.len())
        .flat_map(|id| if id < 3 { 3_u32 } else { 1 }.to_le_bytes())
        .collect();
    let file = sizes(Gguf::default(), architecture, 2, HEADS)
        .u32(&format!("{architecture}.rope.dimension_count"), HEAD as u32)
        .str("tokenizer.ggml.model", "gpt2")
        .str("tokenizer.ggml.pre", pretokenizer)
        .set("tokenizer.ggml.tokens", strings(&tokens))
        .set("tokenizer.ggml.token_type", list(5, tokens.len() as u64, &kinds))
        .set("tokenizer.ggml.merges", strings(&merges))
        .u32("tokenizer.ggml.bos_token_id", 0)
        .u32("tokenizer.ggml.eos_token_id", 1)
        .bool("tokenizer.ggml.add_bos_token", false)
        .str(
            "tokenizer.chat_template",
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        );
    layers(file, tokens.len() as u64, 2, HEADS, architecture)
}

/// A Gemma 3 of two layers with SentencePiece: bytes, letters, a few pieces, control and user-defined tokens.
pub fn tiny_gemma() -> Gguf {
    tiny_gemma_of(2, HEADS)
}

/// The same with so many layers and query heads.
pub fn tiny_gemma_of(count: u64, heads: u64) -> Gguf {
    let mut tokens: Vec<(String, u32)> = [("<pad>", 3), ("<eos>", 3), ("<bos>", 3), ("<unk>", 2)]
        .map(|(text, kind)| (text.to_owned(), kind))
        .into();
    tokens.extend([("\n\n".to_owned(), 4), ("\u{2581}\u{2581}".to_owned(), 4)]);
    tokens.extend((0..=255).map(|byte| (format!("<0x{byte:02X}>"), 6)));
    for piece in [
        "he",
        "ll",
        "hell",
        "hello",
        "\u{2581}w",
        "or",
        "\u{2581}wor",
        "ld",
    ] {
        tokens.push((piece.to_owned(), 1));
    }
    tokens.extend((b'a'..=b'z').map(|letter| (char::from(letter).to_string(), 1)));
    tokens.push(("\u{2581}".to_owned(), 1));
    let (texts, kinds): (Vec<String>, Vec<u32>) = tokens.into_iter().unzip();
    let vocabulary = texts.len() as u64;
    let scores: Vec<u8> = (0..vocabulary)
        .flat_map(|id| (-(id as f32)).to_le_bytes())
        .collect();
    let kinds: Vec<u8> = kinds.into_iter().flat_map(u32::to_le_bytes).collect();
    let file = sizes(Gguf::default(), "gemma3", count, heads)
        .u32("gemma3.attention.sliding_window", 64)
        .str("tokenizer.ggml.model", "llama")
        .set("tokenizer.ggml.tokens", strings(&texts))
        .set("tokenizer.ggml.scores", list(FLOAT32, vocabulary, &scores))
        .set("tokenizer.ggml.token_type", list(5, vocabulary, &kinds))
        .u32("tokenizer.ggml.bos_token_id", 2)
        .u32("tokenizer.ggml.eos_token_id", 1)
        .bool("tokenizer.ggml.add_bos_token", true)
        .bool("tokenizer.ggml.add_space_prefix", false);
    layers(file, vocabulary, count, heads, "gemma3")
}
