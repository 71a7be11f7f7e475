//! The engine against candle-transformers, which computes the same model another way.
//!
//! Two questions, kept apart. Is the model right? Both compute with 32-bit floats, and must write the same
//! tokens. What does rounding activations to 8 bits cost? The engine as people run it is held to the same
//! oracle, and the bounds are those that the rounding explains. Candle reads from the environment that it
//! is to turn weights into floats, so the oracle runs in a process of its own.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama;
use common::ask::{answer, ask, request, tokens};
use common::{PROMPTS, SMOLLM2, model};
use freehold_engine::{Engine, EngineOptions, KvType, TokenLogprob};

/// Has candle turn quantised weights to floats when they are loaded.
const FLOATS: &str = "CANDLE_DEQUANTIZE_ALL";

/// Tokens of each answer; `FREEHOLD_TEST_TOKENS` for the long form (`just oracle`).
fn answer_tokens() -> u32 {
    std::env::var("FREEHOLD_TEST_TOKENS").map_or(16, |tokens| tokens.parse().unwrap())
}

fn engine(exact: bool) -> Engine {
    let options = EngineOptions {
        context_length: Some(512),
        max_sequences: 8,
        // A 32-bit cache, as the oracle has, where all else is too.
        kv_type: if exact { KvType::F32 } else { KvType::F16 },
        exact,
        ..EngineOptions::default()
    };
    Engine::load(&model(SMOLLM2), &options, |_| ()).unwrap()
}

fn oracle() -> quantized_llama::ModelWeights {
    let mut file = std::fs::File::open(model(SMOLLM2)).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap()
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|x| (x - most).exp()).sum();
    logits.iter().map(|x| x - most - sum.ln()).collect()
}

/// Log probabilities after `input`, which begins at `position`.
fn step(oracle: &mut quantized_llama::ModelWeights, input: &[u32], position: usize) -> Vec<f32> {
    let input = Tensor::new(input, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let logits = oracle.forward(&input, position).unwrap();
    log_softmax(&logits.flatten_all().unwrap().to_vec1::<f32>().unwrap())
}

/// What was found over many answers.
#[derive(Debug, Default)]
struct Comparison {
    answers: usize,
    /// Answers that equal the oracle's to the last token.
    equal_answers: usize,
    tokens: usize,
    /// The widest gap between the oracle's best and the token that the engine took in its place.
    widest_gap: f32,
    /// The widest of the gaps at which an answer first left the oracle's.
    widest_first_gap: f32,
    /// Mean and largest difference of the log probability of a token that was taken.
    mean_difference: f32,
    largest_difference: f32,
}

/// Lets the engine answer, then has the oracle read what it wrote.
fn compare(engine: &Engine, oracle: &mut quantized_llama::ModelWeights) -> Comparison {
    let mut found = Comparison::default();
    let mut sum = 0.0;
    for text in PROMPTS {
        let mut input = tokens(engine, text);
        let ours = answer(engine, request(input.clone(), answer_tokens()));
        let (mut position, mut equal) = (0, true);
        for TokenLogprob { token, logprob, .. } in &ours.tokens {
            let reference = step(oracle, &input, position);
            let best = reference.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let gap = best - reference[*token as usize];
            if gap > 0.0 && equal {
                equal = false;
                found.widest_first_gap = found.widest_first_gap.max(gap);
            }
            found.widest_gap = found.widest_gap.max(gap);
            let difference = (reference[*token as usize] - logprob).abs();
            sum += difference;
            found.largest_difference = found.largest_difference.max(difference);
            found.tokens += 1;
            position += input.len();
            input = vec![*token];
        }
        found.answers += 1;
        found.equal_answers += usize::from(equal);
    }
    found.mean_difference = sum / found.tokens as f32;
    println!("{found:#?}");
    found
}

#[test]
fn the_engine_equals_the_oracle() {
    let own = std::env::current_exe().unwrap();
    let mut child = std::process::Command::new(own);
    child.args(["--ignored", "--nocapture", "--test-threads=1"]);
    let output = child.env(FLOATS, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("3 passed"));
}

#[test]
#[ignore = "run by the_engine_equals_the_oracle, in a process of its own"]
fn with_floats_every_token_is_the_oracles() {
    assert!(std::env::var_os(FLOATS).is_some(), "set {FLOATS}=1");
    let found = compare(&engine(true), &mut oracle());
    assert_eq!(found.equal_answers, found.answers);
    assert!(found.largest_difference < 2e-3);
}

#[test]
#[ignore = "run by the_engine_equals_the_oracle, in a process of its own"]
fn as_people_run_it_tokens_differ_only_where_two_are_nearly_as_likely() {
    assert!(std::env::var_os(FLOATS).is_some(), "set {FLOATS}=1");
    let found = compare(&engine(false), &mut oracle());
    // Measured: 0.37 and 0.041, with a 16-bit cache. Rounding activations to 12 bits in place of 8 leaves
    // 0.002 and 0.003: it is the rounding, and not the model, which the test above holds to 0.0003.
    assert!(found.widest_first_gap < 0.5);
    assert!(found.mean_difference < 0.06);
}

#[test]
#[ignore = "run by the_engine_equals_the_oracle, in a process of its own"]
fn a_long_prompt_in_parts_equals_the_whole() {
    assert!(std::env::var_os(FLOATS).is_some(), "set {FLOATS}=1");
    let engine = engine(true);
    // Two at once share the steps, so each is read in parts of 128 rows.
    let prompt = tokens(&engine, &PROMPTS[..22].join(" "));
    assert!(prompt.len() > 200, "{}", prompt.len());
    let asked: Vec<_> = (0..2)
        .map(|_| ask(&engine, request(prompt.clone(), 1)).unwrap())
        .collect();
    let reference = step(&mut oracle(), &prompt, 0);
    for asked in asked {
        let answer = asked.wait();
        let token = &answer.tokens[0];
        assert!((reference[token.token as usize] - token.logprob).abs() < 2e-3);
    }
}

#[test]
fn many_at_once_answer_as_each_alone() {
    let engine = engine(false);
    let ask_for = |text: &&str| request(tokens(&engine, text), 16);
    let alone: Vec<_> = PROMPTS[..8]
        .iter()
        .map(|text| answer(&engine, ask_for(text)))
        .collect();
    let asked: Vec<_> = PROMPTS[..8]
        .iter()
        .map(|text| ask(&engine, ask_for(text)).unwrap())
        .collect();
    for (asked, alone) in asked.iter().zip(&alone) {
        let together = asked.wait();
        // To the bit: the log probabilities too.
        assert_eq!(together.tokens, alone.tokens);
        assert_eq!(together.text, alone.text);
    }
}
