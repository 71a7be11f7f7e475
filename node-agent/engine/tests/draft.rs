//! A draft model must not be seen in what is said: only in the time it takes.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use common::ask::{answer, ask, eventually, request, tokens};
use common::{GEMMA3, PROMPTS, SMOLLM2, model};
use freehold_engine::{Engine, EngineOptions, GenerateRequest, Precision};

/// The model computes with 32-bit floats, which takes several times as long as its draft: the same file at 8 bits.
fn options() -> EngineOptions {
    EngineOptions {
        context_length: Some(640),
        max_sequences: 4,
        precision: Precision::Float,
        ..EngineOptions::default()
    }
}

fn with_draft(options: EngineOptions) -> Engine {
    let options = EngineOptions {
        draft: Some(model(SMOLLM2)),
        ..options
    };
    Engine::load(&model(SMOLLM2), &options, |_| ()).unwrap()
}

fn requests(engine: &Engine) -> Vec<GenerateRequest> {
    (0..4_usize)
        .map(|index| {
            let mut request = request(tokens(engine, PROMPTS[index]), 32);
            request.sampling.logit_bias = vec![(0, -100.0), (2, -100.0)];
            if index == 3 {
                request.sampling.temperature = 0.8;
                request.sampling.seed = Some(3);
            }
            request
        })
        .collect()
}

#[test]
fn a_draft_model_guesses_well_and_changes_no_answer() {
    let plain = EngineOptions {
        speculate: false,
        ..options()
    };
    let plain = Engine::load(&model(SMOLLM2), &plain, |_| ()).unwrap();
    let engine = with_draft(options());
    let requests = requests(&plain);
    let expected: Vec<_> = requests.iter().map(|r| answer(&plain, r.clone())).collect();
    for (request, expected) in requests.iter().zip(&expected) {
        let found = answer(&engine, request.clone());
        assert_eq!((&found.text, &found.tokens), (&expected.text, &expected.tokens));
    }
    // How much is guessed depends on what a guess costs, and that on what else the machine does meanwhile; how many guesses come
    // true does not, nor that each saves a step. A draft that hardly guesses is no draft: one token an answer is the least.
    let progress = engine.progress();
    assert!(progress.accepted_tokens >= requests.len() as u64, "{progress:?}");
    assert!(
        progress.accepted_tokens * 3 > progress.guessed_tokens,
        "{progress:?}"
    );
    assert!(
        progress.steps + progress.accepted_tokens <= plain.progress().steps + requests.len() as u64,
        "{progress:?}, and without a draft {:?}",
        plain.progress()
    );

    // All at once, and once more beside a long text that is being read.
    let long = request(tokens(&engine, &PROMPTS.join(" ").repeat(3))[..400].to_vec(), 2);
    let long = ask(&engine, long).unwrap();
    let asked: Vec<_> = requests
        .iter()
        .map(|r| ask(&engine, r.clone()).unwrap())
        .collect();
    for (asked, expected) in asked.iter().zip(&expected) {
        assert_eq!(asked.wait().text, expected.text);
    }
    long.wait();
    eventually("all blocks are free", || engine.progress().kv_blocks_used == 0);
}

#[test]
fn where_the_cache_is_full_there_are_fewer_guesses_and_the_same_answers() {
    let small = EngineOptions {
        context_length: Some(128),
        kv_tokens: Some(128),
        prefix_tokens: Some(0),
        precision: Precision::Standard,
        ..options()
    };
    let plain = EngineOptions {
        speculate: false,
        ..small.clone()
    };
    let plain = Engine::load(&model(SMOLLM2), &plain, |_| ()).unwrap();
    let engine = with_draft(small);
    let requests: Vec<_> = requests(&plain)
        .into_iter()
        .map(|r| GenerateRequest {
            max_tokens: Some(70),
            ..r
        })
        .collect();
    let expected: Vec<_> = requests.iter().map(|r| answer(&plain, r.clone())).collect();
    let asked: Vec<_> = requests
        .iter()
        .map(|r| ask(&engine, r.clone()).unwrap())
        .collect();
    for (asked, expected) in asked.iter().zip(&expected) {
        assert_eq!(asked.wait().text, expected.text);
    }
    assert!(engine.progress().preemptions > 0, "{:?}", engine.progress());
}

#[test]
fn a_draft_with_other_words_is_refused_and_says_what_to_do() {
    let options = EngineOptions {
        draft: Some(model(GEMMA3)),
        ..options()
    };
    let refused = Engine::load(&model(SMOLLM2), &options, |_| ()).unwrap_err();
    let told = refused.to_string();
    assert!(
        told.contains("gemma") && told.contains("take it out of the settings"),
        "{told}"
    );
    let cause = std::error::Error::source(&refused).unwrap().to_string();
    assert!(
        cause.contains("vocabulary is of 262144 tokens, and the model's of 49152"),
        "{cause}"
    );
}
