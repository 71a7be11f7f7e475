//! The engine against candle-transformers, which computes the same model another way.
//!
//! Two questions, kept apart. Is the model right? Both compute with 32-bit floats, and must write the same tokens.
//! And what does rounding activations to 8 bits cost? The engine as people run it beside 32-bit floats; the bounds are
//! those that the rounding explains; with [`Precision::High`], which rounds to 16 bits, hardly anything is left. (An oracle that rounds by the same rule was tried: it differs as much, for a sum in
//! another order makes another number of the next rounding; see docs/benchmarks.md.) Candle reads from the environment
//! that it is to turn weights into floats, so the oracle runs in a process of its own.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama;
use common::ask::{Answer, answer, ask, request, tokens};
use common::{PROMPTS, SMOLLM2, model};
use freehold_engine::{Engine, EngineOptions, KvType, Precision};

/// Has candle turn quantised weights to floats when they are loaded.
const FLOATS: &str = "CANDLE_DEQUANTIZE_ALL";

/// Tokens of each answer of the engine that rounds: its bounds were measured at this length.
const ROUNDED_TOKENS: u32 = 16;

/// Tokens of each answer; 64 in the long form (`just oracle`).
fn answer_tokens() -> u32 {
    std::env::var("FREEHOLD_TEST_TOKENS").map_or(16, |tokens| tokens.parse().unwrap())
}

/// The model, or another of the same kind: `just oracle FILE`.
fn file() -> PathBuf {
    std::env::var_os("FREEHOLD_TEST_ORACLE_FILE").map_or_else(|| model(SMOLLM2), PathBuf::from)
}

fn engine(precision: Precision, kv_type: KvType) -> Engine {
    let options = EngineOptions {
        context_length: Some(512),
        max_sequences: 8,
        max_queued: PROMPTS.len() as u32,
        kv_type,
        precision,
        ..EngineOptions::default()
    };
    Engine::load(&file(), &options, |_| ()).unwrap()
}

/// Logits of the last token of each of some inputs, `[batch, vocabulary]`; see [`step`].
type Oracle<'a> = dyn FnMut(&Tensor, usize) -> candle_core::Result<Tensor> + 'a;

fn candle() -> impl FnMut(&Tensor, usize) -> candle_core::Result<Tensor> {
    let mut file = std::fs::File::open(file()).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut model = quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    move |inputs, position| model.forward(inputs, position)
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|x| (x - most).exp()).sum();
    logits.iter().map(|x| x - most - sum.ln()).collect()
}

/// Log probabilities after each of some inputs of one length, which begin at `position`.
fn step(oracle: &mut Oracle<'_>, inputs: &[&[u32]], position: usize) -> Vec<Vec<f32>> {
    let shape = (inputs.len(), inputs[0].len());
    let inputs = Tensor::from_vec(inputs.concat(), shape, &Device::Cpu).unwrap();
    let logits = oracle(&inputs, position).unwrap();
    let logits = logits.to_vec2::<f32>().unwrap();
    logits.iter().map(|logits| log_softmax(logits)).collect()
}

/// What was found over many answers.
#[derive(Debug, Default)]
struct Comparison {
    answers: usize,
    /// Answers that equal the oracle's to the last token.
    equal_answers: usize,
    tokens: usize,
    /// The gaps between the oracle's best and the token that the engine took in its place, where an answer first
    /// left the oracle's; the narrowest first.
    first_gaps: Vec<f32>,
    /// Mean and largest difference of the log probability of a token that was taken.
    mean_difference: f32,
    largest_difference: f32,
}

impl Comparison {
    fn widest_first_gap(&self) -> f32 {
        self.first_gaps.last().copied().unwrap_or(0.0)
    }
}

/// Lets the engine answer, then has the oracle read what it wrote.
fn compare(engine: &Engine, oracle: &mut Oracle<'_>, count: u32) -> Comparison {
    let prompts: Vec<Vec<u32>> = PROMPTS.iter().map(|text| tokens(engine, text)).collect();
    let asked: Vec<_> = prompts
        .iter()
        .map(|prompt| ask(engine, request(prompt.clone(), count)).unwrap())
        .collect();
    // Prompts of one length are read together, for the oracle reads only one token of each at a time.
    let mut groups: BTreeMap<usize, Vec<(&[u32], Answer)>> = BTreeMap::new();
    for (prompt, asked) in prompts.iter().zip(&asked) {
        groups
            .entry(prompt.len())
            .or_default()
            .push((prompt, asked.wait()));
    }
    let mut found = Comparison::default();
    let mut sum = 0.0;
    for (length, group) in groups {
        let mut inputs: Vec<Vec<u32>> = group.iter().map(|(prompt, _)| prompt.to_vec()).collect();
        let mut equal = vec![true; group.len()];
        let longest = group.iter().map(|(_, answer)| answer.tokens.len()).max().unwrap();
        for index in 0..longest {
            let position = if index == 0 { 0 } else { length + index - 1 };
            let views: Vec<&[u32]> = inputs.iter().map(Vec::as_slice).collect();
            let references = step(oracle, &views, position);
            for (row, reference) in references.iter().enumerate() {
                // An answer that has ended is read on with any token.
                let Some(taken) = group[row].1.tokens.get(index) else {
                    inputs[row] = vec![0];
                    continue;
                };
                let theirs = reference[taken.token as usize];
                let best = reference.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                if best > theirs && equal[row] {
                    equal[row] = false;
                    found.first_gaps.push(best - theirs);
                }
                let difference = (theirs - taken.logprob).abs();
                sum += difference;
                found.largest_difference = found.largest_difference.max(difference);
                found.tokens += 1;
                inputs[row] = vec![taken.token];
            }
        }
        found.answers += group.len();
        found.equal_answers += equal.iter().filter(|equal| **equal).count();
    }
    found.mean_difference = sum / found.tokens as f32;
    found.first_gaps.sort_by(f32::total_cmp);
    println!("{found:?}");
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
    assert!(output.status.success() && text.contains("4 passed"));
}

#[test]
#[ignore = "run by the_engine_equals_the_oracle, in a process of its own"]
fn with_floats_every_token_is_the_oracles() {
    assert!(std::env::var_os(FLOATS).is_some(), "set {FLOATS}=1");
    let found = compare(
        &engine(Precision::Float, KvType::F32),
        &mut candle(),
        answer_tokens(),
    );
    assert_eq!(found.equal_answers, found.answers);
    // Enough was compared. Some answers end by themselves before 64 tokens: 2871 of 3200 are left.
    assert!(
        found.answers >= 50 && found.tokens * 5 > found.answers * answer_tokens() as usize * 4,
        "{found:?}"
    );
    assert!(found.largest_difference < 2e-3);
}

#[test]
#[ignore = "run by the_engine_equals_the_oracle, in a process of its own"]
fn as_people_run_it_tokens_differ_only_where_two_are_nearly_as_likely() {
    assert!(std::env::var_os(FLOATS).is_some(), "set {FLOATS}=1");
    let found = compare(
        &engine(Precision::Standard, KvType::F16),
        &mut candle(),
        ROUNDED_TOKENS,
    );
    // Measured: 0.37 and 0.041, with a 16-bit cache. Rounding activations to 12 bits in place of 8 leaves
    // 0.002 and 0.003: it is the rounding, and not the model, which the test above holds to 0.0003.
    assert!(found.widest_first_gap() < 0.5);
    assert!(found.mean_difference < 0.06);
}

#[test]
#[ignore = "run by the_engine_equals_the_oracle, in a process of its own"]
fn with_high_precision_an_answer_leaves_the_oracles_only_where_two_tokens_are_all_but_equal() {
    assert!(std::env::var_os(FLOATS).is_some(), "set {FLOATS}=1");
    let found = compare(
        &engine(Precision::High, KvType::F16),
        &mut candle(),
        answer_tokens(),
    );
    assert!(found.widest_first_gap() < 0.05);
    assert!(found.mean_difference < 0.003);
}

#[test]
#[ignore = "run by the_engine_equals_the_oracle, in a process of its own"]
fn a_long_prompt_in_parts_equals_the_whole() {
    assert!(std::env::var_os(FLOATS).is_some(), "set {FLOATS}=1");
    let engine = engine(Precision::Float, KvType::F32);
    // Two at once share the steps, so each is read in parts of 128 rows.
    let prompt = tokens(&engine, &PROMPTS[..22].join(" "));
    assert!(prompt.len() > 200, "{}", prompt.len());
    let asked: Vec<_> = (0..2)
        .map(|_| ask(&engine, request(prompt.clone(), 1)).unwrap())
        .collect();
    let reference = step(&mut candle(), &[&prompt], 0).remove(0);
    for asked in asked {
        let answer = asked.wait();
        let token = &answer.tokens[0];
        assert!((reference[token.token as usize] - token.logprob).abs() < 2e-3);
    }
}

#[test]
fn many_at_once_answer_as_each_alone() {
    for precision in [Precision::Standard, Precision::High] {
        let engine = engine(precision, KvType::F16);
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
}
