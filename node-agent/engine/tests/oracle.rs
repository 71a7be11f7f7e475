//! The engine against candle-transformers, which computes the same models another way.

mod common;

use std::ops::ControlFlow;
use std::sync::mpsc;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama;
use common::{PROMPTS, SMOLLM2, model};
use freehold_engine::{
    Engine, EngineOptions, GenerateEvent, GenerateRequest, KvType, Prompt, SamplingParams, Special,
};

const TOKENS: usize = 24;

fn options() -> EngineOptions {
    // A 32-bit cache, as the oracle has: differences are then the arithmetic's alone.
    EngineOptions {
        context_length: Some(512),
        kv_type: KvType::F32,
        max_sequences: 8,
        ..EngineOptions::default()
    }
}

/// The answer's text, and the tokens with their logprobs.
fn answer(engine: &Engine, prompt: Vec<u32>, max_tokens: usize) -> Vec<(u32, f32)> {
    let (sender, receiver) = mpsc::channel();
    let request = GenerateRequest {
        id: "test".into(),
        prompt: Prompt::Tokens(prompt),
        max_tokens: Some(max_tokens as u32),
        max_context: None,
        stop: Vec::new(),
        sampling: SamplingParams {
            logprobs: Some(1),
            ..SamplingParams::default()
        },
    };
    let sink = Box::new(move |event| {
        let _ = sender.send(event);
        ControlFlow::Continue(())
    });
    let _handle = engine.generate(request, sink).unwrap();
    let mut tokens = Vec::new();
    for event in receiver {
        match event {
            GenerateEvent::Text { tokens: more, .. } => {
                tokens.extend(more.iter().map(|t| (t.token, t.logprob)))
            }
            GenerateEvent::Finished(_) => break,
            GenerateEvent::Started { .. } => {}
        }
    }
    tokens
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|x| (x - most).exp()).sum();
    logits.iter().map(|x| x - most - sum.ln()).collect()
}

#[test]
fn llama_answers_equal_the_oracles_token_by_token() {
    let path = model(SMOLLM2);
    let engine = Engine::load(&path, &options(), |_| ()).unwrap();
    let mut file = std::fs::File::open(&path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut oracle = quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    let mut worst = 0.0_f32;
    for prompt in PROMPTS {
        let prompt = engine.tokenizer().encode(
            prompt,
            Special {
                add: true,
                parse: false,
            },
        );
        let ours = answer(&engine, prompt.clone(), TOKENS);
        let (mut input, mut position) = (prompt, 0);
        for (index, &(token, logprob)) in ours.iter().enumerate() {
            let tensor = Tensor::new(input.as_slice(), &Device::Cpu)
                .unwrap()
                .unsqueeze(0)
                .unwrap();
            let logits = oracle
                .forward(&tensor, position)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap();
            position += input.len();
            let reference = log_softmax(&logits);
            let best = reference
                .iter()
                .enumerate()
                .max_by(|a, b| a.1.total_cmp(b.1))
                .unwrap()
                .0;
            let gap = reference[best] - reference[token as usize];
            assert!(
                gap < 0.02,
                "token {index}: ours {token}, oracle {best}, {gap} apart"
            );
            worst = worst.max((reference[token as usize] - logprob).abs());
            input = vec![token];
        }
    }
    // Float sums in another order; the weights are the same bits.
    assert!(worst < 0.02, "log probabilities differ by {worst}");
    println!(
        "largest difference of a log probability over {} prompts: {worst}",
        PROMPTS.len()
    );
}

#[test]
fn many_at_once_answer_as_each_alone() {
    let engine = Engine::load(&model(SMOLLM2), &options(), |_| ()).unwrap();
    let prompts: Vec<Vec<u32>> = PROMPTS[..8]
        .iter()
        .map(|p| {
            engine.tokenizer().encode(
                p,
                Special {
                    add: true,
                    parse: false,
                },
            )
        })
        .collect();
    let alone: Vec<Vec<u32>> = prompts
        .iter()
        .map(|p| answer(&engine, p.clone(), 16).into_iter().map(|t| t.0).collect())
        .collect();
    let together: Vec<Vec<u32>> = std::thread::scope(|scope| {
        let threads: Vec<_> = prompts
            .iter()
            .map(|p| scope.spawn(|| answer(&engine, p.clone(), 16)))
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap().into_iter().map(|t| t.0).collect())
            .collect()
    });
    assert_eq!(alone, together);
}

#[test]
fn a_long_prompt_in_parts_equals_the_whole() {
    // Longer than one step's budget of prompt rows, so it is read in three parts.
    let engine = Engine::load(&model(SMOLLM2), &options(), |_| ()).unwrap();
    let text = PROMPTS.join(" ");
    let prompt = engine.tokenizer().encode(
        &text,
        Special {
            add: true,
            parse: false,
        },
    );
    assert!(prompt.len() > 200, "{}", prompt.len());
    let mut file = std::fs::File::open(model(SMOLLM2)).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut oracle = quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    let tensor = Tensor::new(prompt.as_slice(), &Device::Cpu)
        .unwrap()
        .unsqueeze(0)
        .unwrap();
    let logits = oracle
        .forward(&tensor, 0)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1::<f32>()
        .unwrap();
    let reference = log_softmax(&logits);
    let (token, logprob) = answer(&engine, prompt, 1)[0];
    assert!(
        (reference[token as usize] - logprob).abs() < 0.02,
        "{} {logprob}",
        reference[token as usize]
    );
}
