//! Families of which no real model is at hand, with random weights, against candle-transformers.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::path::Path;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::{quantized_llama, quantized_phi3, quantized_qwen2, quantized_qwen3};
use common::ask::{answer, request, tokens};
use common::gguf::{
    F32, Gguf, Tensor as Stored, tiny_gemma_of, tiny_granite, tiny_llama, tiny_phi3, tiny_qwen2, tiny_qwen3,
};
use freehold_engine::{Engine, EngineOptions, KvType, Precision};

type Step = Box<dyn FnMut(&Tensor, usize) -> candle_core::Result<Tensor>>;

/// Compares every answered token, and the likeliest in its place, with what the oracle computes.
fn equals_the_oracle(file: &Gguf, oracle: impl Fn(gguf_file::Content, &mut std::fs::File) -> Step) {
    equals_the_oracle_of(file, file, oracle);
}

/// The same, where the oracle reads another file.
fn equals_the_oracle_of(
    file: &Gguf,
    theirs: &Gguf,
    oracle: impl Fn(gguf_file::Content, &mut std::fs::File) -> Step,
) {
    let folder = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let path = file.write(folder.path());
    let mut oracle = {
        let mut file = std::fs::File::open(theirs.write(other.path())).unwrap();
        let content = gguf_file::Content::read(&mut file).unwrap();
        oracle(content, &mut file)
    };
    let engine = engine(&path);
    let mut varied = std::collections::BTreeSet::new();
    for text in ["hello world", "a", "one two three four five six seven eight nine"] {
        let mut input = tokens(&engine, text);
        let mut request = request(input.clone(), 12);
        request.sampling.logprobs = Some(5);
        let ours = answer(&engine, request);
        let mut position = 0;
        for token in &ours.tokens {
            let tensor = Tensor::new(input.as_slice(), &Device::Cpu)
                .unwrap()
                .unsqueeze(0)
                .unwrap();
            let logits = oracle(&tensor, position).unwrap().flatten_all().unwrap();
            let logits = logits.to_vec1::<f32>().unwrap();
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let base = most + logits.iter().map(|x| (x - most).exp()).sum::<f32>().ln();
            for top in &token.top {
                let difference = (logits[top.token as usize] - base - top.logprob).abs();
                assert!(difference < 1e-3, "{text:?}, token {}: {difference}", top.token);
            }
            position += input.len();
            input = vec![token.token];
            varied.insert(token.token);
        }
    }
    assert!(
        varied.len() > 3,
        "the model writes too little to tell anything: {varied:?}"
    );
}

fn engine(path: &Path) -> Engine {
    let options = EngineOptions {
        kv_type: KvType::F32,
        precision: Precision::Float,
        ..EngineOptions::default()
    };
    Engine::load(path, &options, |_| ()).unwrap()
}

#[test]
fn llama() {
    equals_the_oracle(&tiny_llama(), |content, file| {
        let mut model = quantized_llama::ModelWeights::from_gguf(content, file, &Device::Cpu).unwrap();
        Box::new(move |input, position| model.forward(input, position))
    });
}

#[test]
fn qwen2() {
    equals_the_oracle(&tiny_qwen2(), |content, file| {
        let mut model = quantized_qwen2::ModelWeights::from_gguf(content, file, &Device::Cpu).unwrap();
        Box::new(move |input, position| {
            if position == 0 {
                model.clear_kv_cache();
            }
            model.forward(input, position)
        })
    });
}

#[test]
fn qwen3() {
    // This key has candle compute with 32-bit floats.
    let file = tiny_qwen3().u32("general.dtype", 0);
    equals_the_oracle(&file, |content, file| {
        let mut model = quantized_qwen3::ModelWeights::from_gguf(content, file, &Device::Cpu).unwrap();
        Box::new(move |input, position| {
            if position == 0 {
                model.clear_kv_cache();
            }
            model.forward(input, position)
        })
    });
}

#[test]
fn phi3() {
    equals_the_oracle(&tiny_phi3(), |content, file| {
        let mut model = quantized_phi3::ModelWeights::from_gguf(false, content, file, &Device::Cpu).unwrap();
        Box::new(move |input, position| model.forward(input, position))
    });
}

/// What Granite multiplies with can be multiplied into a llama's weights beforehand.
#[test]
fn granite_is_a_llama_with_its_factors_in_the_weights() {
    let mut folded = tiny_llama();
    let words = folded
        .tensors
        .iter()
        .find(|t| t.name == "token_embd.weight")
        .unwrap();
    let mut output = Stored {
        name: "output.weight".to_owned(),
        ..words.clone()
    };
    times(1.0 / 4.0)(&mut output);
    folded.tensors.push(output);
    folded = folded.edit("token_embd.weight", times(3.0));
    for layer in 0..2 {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        // 16 numbers a head: attention divides by 4 of itself.
        folded = folded
            .edit(&name("attn_q"), times(0.4 * 4.0))
            .edit(&name("attn_output"), times(0.5))
            .edit(&name("ffn_down"), times(0.5));
    }
    equals_the_oracle_of(&tiny_granite(), &folded, |content, file| {
        let mut model = quantized_llama::ModelWeights::from_gguf(content, file, &Device::Cpu).unwrap();
        Box::new(move |input, position| model.forward(input, position))
    });
}

/// Multiplies the 32-bit floats of a tensor.
fn times(factor: f32) -> impl Fn(&mut Stored) {
    move |tensor: &mut Stored| {
        assert_eq!(tensor.kind, F32);
        for four in tensor.data.chunks_exact_mut(4) {
            let x = f32::from_le_bytes(<[u8; 4]>::try_from(&*four).unwrap());
            four.copy_from_slice(&(x * factor).to_le_bytes());
        }
    }
}

/// A Gemma 3 of 62 layers (27B) divides products of queries and keys by the root of hidden size / heads, 8 here;
/// one of 61 by that of a head's size, 16. So the first is the second with its queries made greater, when the last
/// layer adds nothing. On the kernels and through candle's tensors.
#[test]
fn gemma_27b_divides_attention_by_the_root_of_hidden_size_by_heads() {
    let mut last = tiny_gemma_of(62, 4);
    for part in ["post_attention_norm", "post_ffw_norm"] {
        last = last.edit(&format!("blk.61.{part}.weight"), times(0.0));
    }
    let mut kin = tiny_gemma_of(61, 4);
    for layer in 0..61 {
        kin = kin.edit(&format!("blk.{layer}.attn_q_norm.weight"), times(2.0_f32.sqrt()));
    }
    let folder = tempfile::tempdir().unwrap();
    let say = |name: &str, file: &Gguf, through_candle: bool| {
        let folder = folder.path().join(format!("{name}-{through_candle}"));
        std::fs::create_dir_all(&folder).unwrap();
        let options = EngineOptions {
            kv_type: KvType::F32,
            precision: Precision::Float,
            through_candle,
            ..EngineOptions::default()
        };
        let engine = Engine::load(&file.write(&folder), &options, |_| ()).unwrap();
        let mut request = request(tokens(&engine, "hello world hello hell"), 6);
        request.sampling.logprobs = Some(1);
        let answer = answer(&engine, request);
        answer
            .tokens
            .iter()
            .map(|token| token.logprob)
            .collect::<Vec<f32>>()
    };
    let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    for through_candle in [false, true] {
        let expected = say("kin", &kin, through_candle);
        let found = say("27b", &last, through_candle);
        assert!(apart(&found, &expected) < 1e-3, "{found:?} and {expected:?}");
        let plain = say("plain", &tiny_gemma_of(61, 4), through_candle);
        assert!(apart(&plain, &expected) > 1e-2, "the divisor tells: {plain:?}");
    }
}

/// A tensor that nothing reads would be left out of every answer without a word.
#[test]
fn a_tensor_without_a_part_in_the_model_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let load = |file: Gguf| Engine::load(&file.write(folder.path()), &EngineOptions::default(), |_| ());
    let with = |name: &str| tiny_llama().tensor(name, &[32], std::iter::repeat(1.0));
    let refused = load(with("blk.0.attn_q.bias")).unwrap_err().to_string();
    for part in ["blk.0.attn_q.bias", "llama", "another model's"] {
        assert!(refused.contains(part), "{refused}");
    }
    for unread in [
        "blk.1.attn_output.bias",
        "blk.0.rope_freqs.weight",
        "rope_factors_long.weight",
        "cls.bias",
    ] {
        assert!(load(with(unread)).is_err(), "{unread}");
    }
    for beside in [
        "v.patch_embd.bias",
        "a.conv1d.1.bias",
        "mm.soft_emb_norm.weight",
        "blk.0.attn_rot_embd",
    ] {
        load(with(beside)).unwrap();
    }
    let fused = tiny_phi3().tensor("blk.0.attn_qkv.bias", &[32], std::iter::repeat(1.0));
    assert!(
        load(fused)
            .unwrap_err()
            .to_string()
            .contains("blk.0.attn_qkv.bias")
    );
    // The output's matrix is one of those that are read, and must fit.
    let narrow = load(with("output.weight")).unwrap_err().to_string();
    assert!(narrow.contains("output.weight"), "{narrow}");
    let unsaid = load(tiny_llama().without("llama.attention.layer_norm_rms_epsilon"));
    let unsaid = unsaid.unwrap_err().to_string();
    assert!(unsaid.contains("layer_norm_rms_epsilon is missing"), "{unsaid}");
}

/// A context beyond the first is served with the long divisors, a shorter one with the short ones.
#[test]
fn phi3_takes_the_divisors_of_the_context_that_is_served() {
    let ones = || std::iter::repeat(1.0);
    let with = |short: f32, long: f32| {
        tiny_phi3()
            .u32("phi3.rope.scaling.original_context_length", 64)
            .tensor(
                "rope_factors_short.weight",
                &[8],
                ones().map(move |x: f32| x * short),
            )
            .tensor(
                "rope_factors_long.weight",
                &[8],
                ones().map(move |x: f32| x * long),
            )
    };
    let folder = tempfile::tempdir().unwrap();
    let say = |name: &str, file: &Gguf, context: u32| {
        let folder = folder.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let options = EngineOptions {
            kv_type: KvType::F32,
            precision: Precision::Float,
            context_length: Some(context),
            ..EngineOptions::default()
        };
        let engine = Engine::load(&file.write(&folder), &options, |_| ()).unwrap();
        let text = "one two three four five six";
        let mut request = request(tokens(&engine, text), 8);
        request.sampling.logprobs = Some(1);
        let answer = answer(&engine, request);
        answer
            .tokens
            .iter()
            .map(|token| token.logprob)
            .collect::<Vec<f32>>()
    };
    let plain = say("plain", &tiny_phi3(), 64);
    assert_eq!(say("short", &with(1.0, 5.0), 64), plain);
    assert_eq!(say("long", &with(5.0, 1.0), 128), plain);
    assert_ne!(say("other", &with(1.0, 5.0), 128), plain);
    let scaled = tiny_phi3().f32("phi3.rope.scaling.attn_factor", 1.5);
    assert_ne!(say("scaled", &scaled, 64), plain);
}

/// YaRN by its keys: with a factor of 1 nothing changes, with one of 4 something does.
#[test]
fn yarn_is_read_from_the_file() {
    let with = |factor: f32| {
        tiny_llama()
            .str("llama.rope.scaling.type", "yarn")
            .f32("llama.rope.scaling.factor", factor)
            .u32("llama.rope.scaling.original_context_length", 32)
    };
    let folder = tempfile::tempdir().unwrap();
    let say = |name: &str, file: &Gguf| {
        let folder = folder.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let engine = engine(&file.write(&folder));
        let mut request = request(tokens(&engine, "one two three four five six"), 8);
        request.sampling.logprobs = Some(1);
        let answer = answer(&engine, request);
        answer
            .tokens
            .iter()
            .map(|token| token.logprob)
            .collect::<Vec<f32>>()
    };
    let plain = say("plain", &tiny_llama());
    assert_eq!(say("one", &with(1.0)), plain);
    assert_ne!(say("four", &with(4.0)), plain);
}
