//! Decoding with and without guesses, in turn, on text that repeats and on text that does not.
//!
//! `bench_speculation MODEL.gguf [RUNS [AT_ONCE [TEMPERATURE [DRAFT.gguf]]]]`: medians of tokens a second, of one answer
//! or of several to the same question, and how many tokens of one were guessed and came true.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::Instant;

use freehold_engine::{
    Engine, EngineOptions, FinishReason, GenerateEvent, GenerateRequest, Prompt, SamplingParams,
};
use serde_json::json;

const USAGE: &str = "bench_speculation MODEL.gguf [RUNS [AT_ONCE [TEMPERATURE [DRAFT.gguf]]]]";

const PASSAGE: &str = "The harbour of Ostermoor lies at the mouth of two rivers, the Lenn and the Varre. \
Ships from the south bring copper, salt and oranges; ships from the north bring timber, furs and dried fish. \
In the year 1412 a fire destroyed the eastern quay, and the council ordered that every warehouse be rebuilt \
in stone. The lighthouse, which still stands, was paid for by a tax of one penny on every barrel of herring.";

fn prompts(engine: &Engine) -> Vec<(&'static str, Prompt)> {
    let chat = |text: String| {
        let messages = json!([{"role": "user", "content": text}]);
        match engine.render_chat(&messages, None) {
            Ok(_) => Prompt::Chat {
                messages,
                tools: None,
            },
            // A model without a template completes text.
            Err(_) => Prompt::Text(format!("{text}\n\n")),
        }
    };
    let rows = (0..12)
        .map(|i| format!("{{\"id\": {i}, \"name\": \"item {i}\", \"in_stock\": true, \"colour\": \"blue\"}}"))
        .collect::<Vec<_>>()
        .join("\n");
    vec![
        (
            "quote",
            chat(format!("Repeat this text word for word:\n\n{PASSAGE}")),
        ),
        (
            "edit",
            chat(format!(
                "Write this text again with every \"Ostermoor\" changed to \"Westfall\":\n\n{PASSAGE}"
            )),
        ),
        (
            "summary",
            chat(format!(
                "Summarise this text in three points, and quote for each the sentence that it comes from, word for word:\n\n\
                {PASSAGE}"
            )),
        ),
        ("json", Prompt::Text(rows)),
        (
            "list",
            Prompt::Text("Monday: open 9 to 5\nTuesday: open 9 to 5\nWednesday: open 9 to 5\n".to_owned()),
        ),
        (
            "story",
            chat("Tell me a story about a fox who learns to paint.".to_owned()),
        ),
        ("explain", chat("Explain how rain forms.".to_owned())),
        (
            "prose",
            Prompt::Text("The old man walked down to the river, where".to_owned()),
        ),
        ("poem", chat("Write a poem about winter mornings.".to_owned())),
    ]
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let Some(path) = arguments.next() else {
        eprintln!("usage: {USAGE}");
        std::process::exit(2);
    };
    let runs: usize = number(arguments.next(), 5).max(1);
    let at_once: usize = number(arguments.next(), 1).max(1);
    let temperature: f32 = number(arguments.next(), 0.0);
    let draft = arguments.next().map(PathBuf::from);
    let engines = [false, true].map(|speculate| {
        let options = EngineOptions {
            context_length: Some(2048),
            max_sequences: at_once as u32,
            speculate,
            draft: draft.clone().filter(|_| speculate),
            ..EngineOptions::default()
        };
        match Engine::load(Path::new(&path), &options, |_| ()) {
            Ok(engine) => engine,
            Err(error) => {
                eprintln!("{error}");
                std::process::exit(1);
            }
        }
    });
    println!(
        "{:10} {:>9} {:>9} {:>7} {:>9} {:>9}",
        "text", "plain/s", "guess/s", "ratio", "guessed", "true"
    );
    for (name, prompt) in prompts(&engines[0]) {
        let mut rates = [Vec::new(), Vec::new()];
        let before = engines[1].progress();
        for _ in 0..runs {
            for (engine, rates) in engines.iter().zip(&mut rates) {
                rates.push(decode(engine, &prompt, at_once, temperature));
            }
        }
        let after = engines[1].progress();
        let [plain, guess] = rates.map(|mut rates| {
            rates.sort_by(f64::total_cmp);
            rates[rates.len() / 2]
        });
        println!(
            "{name:10} {plain:9.1} {guess:9.1} {:7.2} {:9} {:9}",
            guess / plain,
            (after.guessed_tokens - before.guessed_tokens) / (runs * at_once) as u64,
            (after.accepted_tokens - before.accepted_tokens) / (runs * at_once) as u64,
        );
    }
}

fn number<N: std::str::FromStr>(argument: Option<String>, otherwise: N) -> N {
    argument.map_or(otherwise, |text| {
        text.parse().unwrap_or_else(|_| {
            eprintln!("{text:?} is no number; usage: {USAGE}");
            std::process::exit(2);
        })
    })
}

/// Tokens that end an answer.
fn ends(engine: &Engine) -> impl Iterator<Item = u32> {
    let tokenizer = engine.tokenizer();
    (0..tokenizer.vocab_size() as u32).filter(|&token| tokenizer.is_end_of_generation(token))
}

/// Tokens a second of all answers together, from the first that began to write to the last that ended.
fn decode(engine: &Engine, prompt: &Prompt, at_once: usize, temperature: f32) -> f64 {
    let request = |number: usize| GenerateRequest {
        id: "bench".to_owned(),
        prompt: prompt.clone(),
        max_tokens: Some(160),
        max_context: None,
        scope: String::new(),
        constraint: None,
        stop: Vec::new(),
        sampling: SamplingParams {
            temperature,
            seed: Some(number as u64),
            // Every answer reaches the same length.
            logit_bias: ends(engine).map(|token| (token, -100.0)).collect(),
            ..SamplingParams::default()
        },
    };
    let asked: Vec<_> = (0..at_once)
        .map(|number| {
            let (sender, events) = channel();
            let sink = Box::new(move |event| {
                let _ = sender.send(event);
                ControlFlow::Continue(())
            });
            (engine.generate(request(number), sink), events)
        })
        .collect();
    let mut began: Option<Instant> = None;
    let mut written = 0;
    for (handle, events) in &asked {
        if handle.is_err() {
            return f64::NAN;
        }
        for event in events {
            match event {
                GenerateEvent::Started { .. } => {}
                GenerateEvent::Text { .. } => {
                    began.get_or_insert_with(Instant::now);
                }
                GenerateEvent::Finished(finished) => {
                    assert_ne!(finished.reason, FinishReason::Cancelled);
                    written += finished.completion_tokens - 1;
                    break;
                }
            }
        }
    }
    began.map_or(f64::NAN, |began| written as f64 / began.elapsed().as_secs_f64())
}
