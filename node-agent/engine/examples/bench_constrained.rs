//! Decoding freely and held to a schema, in turn: what following it costs.
//!
//! `bench_constrained MODEL.gguf [RUNS [TEMPERATURE [TOP_P [TOP_K]]]]` (0: off): medians of tokens a second, one answer
//! and eight at once. The constraints are loose enough that every answer reaches the same length as the free ones; guesses are off
//! for both, then on for both.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use freehold_engine::{
    Constraint, Engine, EngineOptions, GenerateEvent, GenerateRequest, GenerationHandle, Prompt,
    SamplingParams,
};
use serde_json::json;

/// Tokens of each answer.
const ANSWER_TOKENS: u32 = 128;

fn constraints() -> Vec<(&'static str, Option<Constraint>)> {
    let people = json!({
        "type": "array", "minItems": 200,
        "items": {
            "type": "object", "additionalProperties": false, "required": ["name", "age", "notes"],
            "properties": {
                "name": {"type": "string", "maxLength": 30},
                "age": {"type": "integer", "minimum": 0, "maximum": 120},
                "notes": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4},
            },
        },
    });
    let long = json!({"type": "object", "additionalProperties": false, "required": ["text"],
        "properties": {"text": {"type": "string", "minLength": 4000}}});
    vec![
        ("free", None),
        ("records", Some(Constraint::JsonSchema(people))),
        ("long text", Some(Constraint::JsonSchema(long))),
        ("regex", Some(Constraint::Regex("([a-z]+ ){400,500}".to_owned()))),
    ]
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let Some(path) = arguments.next() else {
        eprintln!("usage: bench_constrained MODEL.gguf [RUNS [TEMPERATURE [TOP_P [TOP_K]]]]");
        std::process::exit(2);
    };
    let runs: usize = arguments.next().and_then(|runs| runs.parse().ok()).unwrap_or(5);
    let mut number = || {
        arguments
            .next()
            .and_then(|value| value.parse().ok())
            .unwrap_or(0.0)
    };
    let sampling = SamplingParams {
        temperature: number(),
        top_p: number(),
        top_k: number() as u32,
        ..SamplingParams::default()
    };
    for speculate in [false, true] {
        let options = EngineOptions {
            context_length: Some(1024),
            max_sequences: 8,
            speculate,
            ..EngineOptions::default()
        };
        let engine = match Engine::load(Path::new(&path), &options, |_| ()) {
            Ok(engine) => engine,
            Err(error) => {
                eprintln!("{error}");
                std::process::exit(1);
            }
        };
        let began = Instant::now();
        drop(ask(
            &engine,
            constraints().pop().and_then(|(_, constraint)| constraint),
            &sampling,
        ));
        println!(
            "guesses {}; the first constraint took {} ms, the tree of tokens included",
            if speculate { "on" } else { "off" },
            began.elapsed().as_millis()
        );
        for answers in [1, 8] {
            let kinds = constraints();
            let mut rates = vec![Vec::new(); kinds.len()];
            for _ in 0..runs {
                for ((_, constraint), rates) in kinds.iter().zip(&mut rates) {
                    rates.push(decode(&engine, constraint.as_ref(), answers, &sampling));
                }
            }
            let mut free = f64::NAN;
            for ((name, _), mut rates) in kinds.iter().zip(rates) {
                rates.sort_by(f64::total_cmp);
                let rate = rates[rates.len() / 2];
                if *name == "free" {
                    free = rate;
                }
                println!(
                    "{answers} at once  {name:10} {rate:8.1} tokens/s  {:5.3}",
                    rate / free
                );
            }
        }
    }
}

fn ask(
    engine: &Engine,
    constraint: Option<Constraint>,
    sampling: &SamplingParams,
) -> (GenerationHandle, Receiver<GenerateEvent>) {
    let request = GenerateRequest {
        id: "bench".to_owned(),
        prompt: Prompt::Text("Some people and what is known of them:\n".to_owned()),
        max_tokens: Some(ANSWER_TOKENS),
        max_context: None,
        scope: String::new(),
        constraint,
        stop: Vec::new(),
        sampling: SamplingParams {
            // The free ones must not end before the others.
            logit_bias: ends(engine).map(|token| (token, -100.0)).collect(),
            ..sampling.clone()
        },
    };
    let (sender, events) = channel();
    let sink = Box::new(move |event| {
        let _ = sender.send(event);
        ControlFlow::Continue(())
    });
    match engine.generate(request, sink) {
        Ok(handle) => (handle, events),
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
}

/// Tokens that end an answer.
fn ends(engine: &Engine) -> impl Iterator<Item = u32> {
    let tokenizer = engine.tokenizer();
    (0..tokenizer.vocab_size() as u32).filter(|&token| tokenizer.is_end_of_generation(token))
}

/// Tokens a second of all answers together, from the first that began to write to the last that ended.
fn decode(
    engine: &Engine,
    constraint: Option<&Constraint>,
    answers: usize,
    sampling: &SamplingParams,
) -> f64 {
    let asked: Vec<_> = (0..answers)
        .map(|_| ask(engine, constraint.cloned(), sampling))
        .collect();
    let mut written = 0;
    let mut began: Option<Instant> = None;
    for (_handle, events) in &asked {
        for event in events {
            match event {
                GenerateEvent::Text { .. } => {
                    began.get_or_insert_with(Instant::now);
                }
                GenerateEvent::Finished(finished) => {
                    assert_eq!(finished.completion_tokens, ANSWER_TOKENS as usize);
                    written += finished.completion_tokens;
                    break;
                }
                GenerateEvent::Started { .. } => {}
            }
        }
    }
    began.map_or(f64::NAN, |began| {
        (written - answers) as f64 / began.elapsed().as_secs_f64()
    })
}
