//! Gemma 3 against candle-transformers.
//!
//! The oracle is the unquantised `gemma3`, fed with the file's own weights as floats: the quantised one
//! computes SiLU where Gemma has GELU, and forgets the sliding window when it writes. The quantised
//! kernels round activations to 8 bits, which moves a log probability by up to 1; so the engine too is
//! told to compute with floats, and what is compared is the model alone.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::collections::HashMap;

use candle_core::quantized::gguf_file;
use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::gemma3;
use common::ask::{answer, request, tokens};
use common::{GEMMA3, PROMPTS, model};
use freehold_engine::{Engine, EngineOptions, KvType, Precision, TokenLogprob};

const CONTEXT: usize = 1024;
const WINDOW: usize = 512;

/// Name in a checkpoint, and whether the file holds it with 1 added (norms).
fn checkpoint_name(name: &str) -> (String, bool) {
    let parts: Vec<&str> = name.split('.').collect();
    if let ["blk", layer, part, "weight"] = parts.as_slice() {
        let (part, norm) = match *part {
            "attn_q" => ("self_attn.q_proj", false),
            "attn_k" => ("self_attn.k_proj", false),
            "attn_v" => ("self_attn.v_proj", false),
            "attn_output" => ("self_attn.o_proj", false),
            "attn_q_norm" => ("self_attn.q_norm", true),
            "attn_k_norm" => ("self_attn.k_norm", true),
            "attn_norm" => ("input_layernorm", true),
            "post_attention_norm" => ("post_attention_layernorm", true),
            "ffn_norm" => ("pre_feedforward_layernorm", true),
            "post_ffw_norm" => ("post_feedforward_layernorm", true),
            "ffn_gate" => ("mlp.gate_proj", false),
            "ffn_up" => ("mlp.up_proj", false),
            "ffn_down" => ("mlp.down_proj", false),
            other => panic!("tensor {other} of the file is unknown to the oracle"),
        };
        return (format!("model.layers.{layer}.{part}.weight"), norm);
    }
    match name {
        "token_embd.weight" => ("model.embed_tokens.weight".to_owned(), false),
        "output_norm.weight" => ("model.norm.weight".to_owned(), true),
        other => panic!("tensor {other} of the file is unknown to the oracle"),
    }
}

fn oracle() -> gemma3::Model {
    let mut file = std::fs::File::open(model(GEMMA3)).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut weights = HashMap::new();
    for name in content.tensor_infos.keys() {
        let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap();
        let tensor = tensor.dequantize(&Device::Cpu).unwrap();
        let (name, norm) = checkpoint_name(name);
        let tensor = if norm { (tensor - 1.0).unwrap() } else { tensor };
        weights.insert(name, tensor);
    }
    let config = gemma3::Config {
        attention_bias: false,
        head_dim: 256,
        hidden_activation: Activation::GeluPytorchTanh,
        hidden_size: 640,
        intermediate_size: 2048,
        num_attention_heads: 4,
        num_hidden_layers: 18,
        num_key_value_heads: 1,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        rope_local_base_freq: 1e4,
        vocab_size: 262_144,
        final_logit_softcapping: None,
        attn_logit_softcapping: None,
        query_pre_attn_scalar: 256,
        sliding_window: WINDOW,
        sliding_window_pattern: 6,
        max_position_embeddings: CONTEXT,
    };
    let weights = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    gemma3::Model::new(false, &config, weights).unwrap()
}

/// Log probabilities after `input`.
fn step(oracle: &mut gemma3::Model, input: &[u32], position: usize) -> Vec<f32> {
    let input = Tensor::new(input, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let logits = oracle.forward(&input, position).unwrap();
    let logits = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|x| (x - most).exp()).sum();
    logits.iter().map(|x| x - most - sum.ln()).collect()
}

/// How far the likeliest tokens' log probabilities are from the oracle's.
fn distance(ours: &TokenLogprob, reference: &[f32]) -> f32 {
    let apart = ours
        .top
        .iter()
        .map(|top| (top.logprob - reference[top.token as usize]).abs());
    apart.fold(0.0, f32::max)
}

fn engine(exact: bool) -> Engine {
    let options = EngineOptions {
        context_length: Some(CONTEXT as u32),
        kv_type: if exact { KvType::F32 } else { KvType::F16 },
        precision: if exact {
            Precision::Float
        } else {
            Precision::Standard
        },
        ..EngineOptions::default()
    };
    Engine::load(&model(GEMMA3), &options, |_| ()).unwrap()
}

#[test]
fn answers_equal_the_oracles_inside_and_beyond_the_sliding_window() {
    let (engine, mut oracle) = (engine(true), oracle());
    let ask = |prompt: &[u32], count: u32| {
        let mut request = request(prompt.to_vec(), count);
        request.sampling.logprobs = Some(5);
        answer(&engine, request)
    };
    let mut worst = 0.0_f32;
    for text in PROMPTS.iter().step_by(5) {
        let mut input = tokens(&engine, text);
        let ours = ask(&input, 8);
        let mut position = 0;
        oracle.clear_kv_cache();
        for token in &ours.tokens {
            let reference = step(&mut oracle, &input, position);
            let best = reference.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let gap = best - reference[token.token as usize];
            assert!(
                gap < 0.005,
                "{text:?}: token {:?} is {gap} from the best",
                token.text
            );
            worst = worst.max(distance(token, &reference));
            position += input.len();
            input = vec![token.token];
        }
    }
    println!("largest difference of a log probability inside the window: {worst}");
    assert!(worst < 0.005, "log probabilities differ by {worst}");

    // The oracle keeps to the window only token by token, so it reads the end of the prompt that way.
    let prompt = tokens(&engine, &PROMPTS.join(" ").repeat(3))[..WINDOW + 20].to_vec();
    let (whole, rest) = prompt.split_at(WINDOW - 2);
    oracle.clear_kv_cache();
    let mut reference = step(&mut oracle, whole, 0);
    for (index, token) in rest.iter().enumerate() {
        reference = step(&mut oracle, &[*token], whole.len() + index);
    }
    let beyond = distance(&ask(&prompt, 1).tokens[0], &reference);
    println!("largest difference of a log probability beyond the window: {beyond}");
    assert!(beyond < 0.005, "log probabilities differ by {beyond}");
}

#[test]
fn rows_of_a_batch_equal_the_rows_alone() {
    let engine = engine(false);
    let prompts: Vec<_> = PROMPTS[..4].iter().map(|text| tokens(&engine, text)).collect();
    let alone: Vec<_> = prompts
        .iter()
        .map(|prompt| answer(&engine, request(prompt.clone(), 6)))
        .collect();
    let asked: Vec<_> = prompts
        .iter()
        .map(|prompt| common::ask::ask(&engine, request(prompt.clone(), 6)).unwrap())
        .collect();
    for (asked, alone) in asked.iter().zip(&alone) {
        let together = asked.wait();
        assert_eq!(together.ids(), alone.ids());
        assert_eq!(together.text, alone.text);
    }
}

#[test]
fn quantised_it_still_writes_sense() {
    let engine = engine(false);
    let answer = answer(&engine, request(tokens(&engine, "Paris is the capital of"), 4));
    assert!(answer.text.contains("France"), "{:?}", answer.text);
}
