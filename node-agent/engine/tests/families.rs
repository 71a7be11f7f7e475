//! Families of which no real model is at hand, with random weights, against candle-transformers.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::path::Path;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::{quantized_llama, quantized_qwen2, quantized_qwen3};
use common::ask::{answer, request, tokens};
use common::gguf::{Gguf, tiny_llama, tiny_qwen2, tiny_qwen3};
use freehold_engine::{Engine, EngineOptions, KvType};

type Step = Box<dyn FnMut(&Tensor, usize) -> candle_core::Result<Tensor>>;

/// Compares every answered token, and the likeliest in its place, with what the oracle computes.
fn equals_the_oracle(file: &Gguf, oracle: impl Fn(gguf_file::Content, &mut std::fs::File) -> Step) {
    let folder = tempfile::tempdir().unwrap();
    let path = file.write(folder.path());
    let mut oracle = {
        let mut file = std::fs::File::open(&path).unwrap();
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
        exact: true,
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
