//! What answers share and guess must not be seen in what they say: prefixes, forks, speculation, preemption.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use common::ask::{Answer, answer, ask, eventually, request, tokens};
use common::{PROMPTS, SMOLLM2, model};
use freehold_engine::{Engine, EngineOptions, GenerateRequest, KvType};

fn load(options: EngineOptions) -> Engine {
    Engine::load(&model(SMOLLM2), &options, |_| ()).unwrap()
}

fn options() -> EngineOptions {
    EngineOptions {
        context_length: Some(640),
        max_sequences: 8,
        ..EngineOptions::default()
    }
}

/// Neither shares nor guesses.
fn plain() -> Engine {
    load(EngineOptions {
        prefix_tokens: Some(0),
        speculate: false,
        ..options()
    })
}

fn long_prompt(engine: &Engine, count: usize) -> Vec<u32> {
    let mut prompt = tokens(engine, &PROMPTS.join(" ").repeat(3));
    prompt.truncate(count);
    assert_eq!(prompt.len(), count);
    prompt
}

/// Text to be said again, and drawn answers among greedy ones.
fn requests(engine: &Engine) -> Vec<GenerateRequest> {
    let repeat = "{\"name\": \"Ann\", \"age\": 7}\n{\"name\": \"Bob\", \"age\": 7}\n".repeat(4);
    (0..6_usize)
        .map(|index| {
            let text = if index % 2 == 0 { &repeat } else { PROMPTS[index] };
            let mut request = request(tokens(engine, text), 40);
            // No token that ends an answer is ever chosen.
            request.sampling.logit_bias = vec![(0, -100.0), (2, -100.0)];
            if index % 3 == 2 {
                request.sampling.temperature = 0.8;
                request.sampling.seed = Some(index as u64);
            }
            request
        })
        .collect()
}

#[test]
fn guessing_changes_nothing_but_the_time() {
    let (plain, engine) = (plain(), load(options()));
    let requests = requests(&plain);
    let expected: Vec<_> = requests.iter().map(|r| answer(&plain, r.clone())).collect();
    assert_eq!(plain.progress().guessed_tokens, 0);
    for (request, expected) in requests.iter().zip(&expected) {
        let found = answer(&engine, request.clone());
        assert_eq!((&found.text, &found.tokens), (&expected.text, &expected.tokens));
    }
    let progress = engine.progress();
    for r in &expected {
        println!("{:?}", r.text);
    }
    // How many depends on what a guess costs meanwhile.
    assert!(progress.accepted_tokens > 0, "{progress:?}");
    assert!(progress.steps < plain.progress().steps, "{progress:?}");
    // And all at once.
    let asked: Vec<_> = requests
        .iter()
        .map(|r| ask(&engine, r.clone()).unwrap())
        .collect();
    for (asked, expected) in asked.iter().zip(&expected) {
        assert_eq!(asked.wait().text, expected.text);
    }
}

#[test]
fn a_prompt_that_begins_alike_is_read_once_and_answered_the_same() {
    let (plain, engine) = (plain(), load(options()));
    let first = request(long_prompt(&engine, 300), 12);
    let mut second = first.clone();
    let Some(prompt) = (match &mut second.prompt {
        freehold_engine::Prompt::Tokens(tokens) => Some(tokens),
        _ => None,
    }) else {
        unreachable!("requests of these tests hold tokens")
    };
    // It goes on otherwise in the middle of a block.
    prompt.truncate(203);
    prompt.extend(tokens(&engine, " and then she said that it was"));
    let read = prompt.len() as u64;
    let expected = [&first, &second].map(|r| answer(&plain, r.clone()));
    assert_eq!(answer(&engine, first.clone()).tokens, expected[0].tokens);
    let before = engine.progress();
    assert_eq!(answer(&engine, second.clone()).tokens, expected[1].tokens);
    let after = engine.progress();
    assert_eq!(after.shared_prompt_tokens - before.shared_prompt_tokens, 203);
    assert_eq!(after.prompt_tokens - before.prompt_tokens, read - 203);
    assert_eq!(answer(&engine, first.clone()).tokens, expected[0].tokens);

    // Somebody else's question is not answered faster for it.
    let before = engine.progress();
    second.scope = "somebody else".to_owned();
    assert_eq!(answer(&engine, second).tokens, expected[1].tokens);
    let after = engine.progress();
    assert_eq!(after.shared_prompt_tokens, before.shared_prompt_tokens);
}

#[test]
fn many_answers_to_one_prompt_read_it_once() {
    let engine = load(options());
    let mut request = request(long_prompt(&engine, 250), 8);
    request.sampling.temperature = 1.0;
    let asked: Vec<_> = (0..6)
        .map(|seed| {
            request.sampling.seed = Some(seed);
            ask(&engine, request.clone()).unwrap()
        })
        .collect();
    let answers: Vec<_> = asked.iter().map(|asked| asked.wait().text).collect();
    assert!(answers.iter().any(|text| text != &answers[0]), "{answers:?}");
    let progress = engine.progress();
    assert!(progress.prompt_tokens <= 250 + 5, "{progress:?}");
    eventually("everything is given back", || {
        engine.progress().kv_blocks_used == 0
    });
}

#[test]
fn where_the_cache_is_full_answers_wait_and_end_as_they_would_have() {
    let plain = plain();
    // Room for one and a half of the four.
    let engine = load(EngineOptions {
        kv_tokens: Some(640),
        ..options()
    });
    let requests: Vec<_> = (0..4_usize)
        .map(|index| {
            let mut prompt = long_prompt(&plain, 150 + index);
            prompt.rotate_left(index);
            let mut request = request(prompt, 250);
            // No token that ends an answer is ever chosen.
            request.sampling.logit_bias = vec![(0, -100.0), (2, -100.0)];
            request.sampling.temperature = if index == 2 { 0.7 } else { 0.0 };
            request.sampling.seed = Some(4);
            request
        })
        .collect();
    let expected: Vec<_> = requests.iter().map(|r| answer(&plain, r.clone())).collect();
    let asked: Vec<_> = requests
        .iter()
        .map(|r| ask(&engine, r.clone()).unwrap())
        .collect();
    for (index, (asked, expected)) in asked.iter().zip(&expected).enumerate() {
        let found = asked.wait();
        assert_eq!(found.finished.completion_tokens, 250, "answer {index}");
        assert_eq!(found.text, expected.text, "answer {index}");
    }
    let progress = engine.progress();
    assert!(progress.preemptions > 0, "{progress:?}");
    eventually("everything is given back", || {
        engine.progress().kv_blocks_used == 0
    });
}

#[test]
fn a_cache_of_8_bits_stays_near_one_of_32() {
    let [exact, small] =
        [KvType::F32, KvType::Q8].map(|kv_type| load(EngineOptions { kv_type, ..options() }));
    let mut differences = Vec::new();
    for text in &PROMPTS[..12] {
        let request = request(tokens(&exact, text), 1);
        let [a, b] = [&exact, &small].map(|engine| answer(engine, request.clone()).tokens);
        if let (Some(a), Some(b)) = (a.first(), b.first())
            && a.token == b.token
        {
            differences.push((a.logprob - b.logprob).abs());
        }
    }
    let mean = differences.iter().sum::<f32>() / differences.len() as f32;
    println!("mean difference of a log probability: {mean}, {differences:?}");
    assert!(
        differences.len() >= 8 && mean > 0.0 && mean < 0.12,
        "{differences:?}"
    );
}

#[test]
fn a_cache_too_small_for_one_context_is_refused_with_its_bounds() {
    let options = EngineOptions {
        kv_tokens: Some(100),
        ..options()
    };
    let error = Engine::load(&model(SMOLLM2), &options, |_| ())
        .unwrap_err()
        .to_string();
    assert!(error.contains("kv_tokens") && error.contains("640"), "{error}");
}

/// What an answer left in the cache is used for a prompt only if the prompt would leave the same.
#[test]
fn a_chat_that_goes_on_is_answered_as_if_it_were_new() {
    let engine = load(options());
    let mut text = tokens(&engine, PROMPTS[0]);
    for turn in PROMPTS[1..5].iter().map(|next| tokens(&engine, next)) {
        let written = answer(&engine, request(text.clone(), 40)).ids();
        text.extend(written);
        text.extend(turn);
    }
    let goes_on = answer(&engine, request(text.clone(), 40));
    let new = answer(&load(options()), request(text, 40));
    assert_eq!(goes_on.ids(), new.ids());
    let logprobs = |answer: &Answer| {
        answer
            .tokens
            .iter()
            .map(|token| token.logprob)
            .collect::<Vec<_>>()
    };
    assert_eq!(logprobs(&goes_on), logprobs(&new), "to the bit");
}

#[test]
fn the_score_of_a_text_is_that_of_writing_it() {
    // Matrix units round what they read otherwise than what is written is rounded.
    let instructions = freehold_engine::instructions();
    let engine = load(EngineOptions {
        instructions: instructions.into_iter().find(|name| name != "amx"),
        ..options()
    });
    let prompt = tokens(&engine, PROMPTS[0]);
    let written = answer(&engine, request(prompt.clone(), 12));
    let mut text = prompt.clone();
    text.extend(written.ids());
    let scores = engine.score(&text).unwrap();
    assert_eq!(scores.len(), text.len() - 1);
    for (token, score) in written.tokens.iter().zip(&scores[prompt.len() - 1..]) {
        assert!((token.logprob - score).abs() < 1e-4, "{} {score}", token.logprob);
    }
    // Longer than a step, and twice the same: nothing was shared.
    let long = long_prompt(&engine, 500);
    let scores = engine.score(&long).unwrap();
    assert_eq!(scores.len(), 499);
    assert_eq!(engine.score(&long).unwrap(), scores);
}
