//! The decoder for GPUs against this engine's own kernels, on the device that every machine has: candle's CPU.
//!
//! With 32-bit floats both must write the same tokens. As people run it both round activations, each in its
//! own way, so the first difference is held to what that rounding explains.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::path::Path;

use common::ask::{Answer, answer, ask, request, tokens};
use common::gguf::{tiny_llama, tiny_qwen2, tiny_qwen3};
use common::{GEMMA3, PROMPTS, SMOLLM2, model};
use freehold_engine::{DeviceChoice, Engine, EngineOptions, KvType, Precision};

fn options(through_candle: bool, exact: bool) -> EngineOptions {
    EngineOptions {
        context_length: Some(1024),
        max_sequences: 8,
        kv_type: if exact { KvType::F32 } else { KvType::F16 },
        precision: if exact {
            Precision::Float
        } else {
            Precision::Standard
        },
        through_candle,
        ..EngineOptions::default()
    }
}

fn both(path: &Path, exact: bool) -> [Engine; 2] {
    [false, true].map(|through_candle| Engine::load(path, &options(through_candle, exact), |_| ()).unwrap())
}

/// Asks both for the same, and gives the widest difference of a log probability up to the first token that
/// differs, and how many answers are the same.
fn compare(path: &Path, exact: bool, prompts: &[&str]) -> (f32, usize) {
    let engines = both(path, exact);
    let answers = engines.each_ref().map(|engine| -> Vec<Answer> {
        let ask_for = |text: &&str| ask(engine, request(tokens(engine, text), 12)).unwrap();
        if exact {
            // All at once: batches of answers at different positions, prompts among them.
            let asked: Vec<_> = prompts.iter().map(ask_for).collect();
            asked.iter().map(|asked| asked.wait()).collect()
        } else {
            // Candle's sums depend on what is computed together, so activations on an edge are rounded otherwise
            // in other company, and who comes when is not the same each time.
            prompts.iter().map(|text| ask_for(text).wait()).collect()
        }
    });
    let [own, device] = answers;
    let (mut widest, mut equal) = (0.0_f32, 0);
    for (own, device) in own.iter().zip(&device) {
        assert!(!own.tokens.is_empty(), "an answer is empty");
        equal += usize::from(own.ids() == device.ids());
        for (a, b) in own.tokens.iter().zip(&device.tokens) {
            // Of the token that both like best, or of the two that they chose.
            widest = widest.max((a.logprob - b.logprob).abs());
            if a.token != b.token {
                break;
            }
        }
    }
    println!("{}: {widest}, {equal} of {} equal", path.display(), prompts.len());
    (widest, equal)
}

#[test]
fn with_floats_it_writes_what_the_kernels_write() {
    let long = PROMPTS[..22].join(" ");
    let mut prompts = PROMPTS[..7].to_vec();
    // Longer than a piece of rows.
    prompts.push(&long);
    let (widest, equal) = compare(&model(SMOLLM2), true, &prompts);
    assert_eq!(equal, prompts.len());
    assert!(widest < 2e-3, "{widest}");
}

#[test]
fn gemma_keeps_its_sliding_window() {
    let long = PROMPTS.join(" ").repeat(2);
    let prompts = [PROMPTS[0], PROMPTS[3], &long];
    let path = model(GEMMA3);
    let engine = Engine::load(&path, &options(false, false), |_| ()).unwrap();
    let length = tokens(&engine, &long).len();
    assert!(
        (600..1000).contains(&length),
        "beyond the window of 512: {length}"
    );
    drop(engine);
    let (widest, equal) = compare(&path, true, &prompts);
    assert_eq!(equal, prompts.len());
    assert!(widest < 2e-3, "{widest}");
}

#[test]
fn every_family_of_random_weights_is_the_same_too() {
    for file in [tiny_llama(), tiny_qwen2(), tiny_qwen3()] {
        let folder = tempfile::tempdir().unwrap();
        let path = file.write(folder.path());
        let (widest, equal) = compare(&path, true, &["hello world", "a", "one two three four"]);
        assert_eq!(equal, 3);
        assert!(widest < 1e-3, "{widest}");
    }
}

#[test]
fn as_people_run_it_differences_are_those_of_rounding() {
    let (widest, equal) = compare(&model(SMOLLM2), false, &PROMPTS[..16]);
    // The bounds that the kernels themselves are held to against the oracle.
    assert!(widest < 0.5, "{widest}");
    // Enough was compared up to its end. (Seven are equal where matrix units read prompts.)
    assert!(equal >= 4, "{equal} of 16 answers are equal");
}

#[test]
fn a_beginning_that_is_known_is_shared_and_changes_nothing() {
    let [_, engine] = both(&model(SMOLLM2), true);
    let prompt = tokens(&engine, &PROMPTS[..10].join(" "));
    let first = answer(&engine, request(prompt.clone(), 8));
    let again = answer(&engine, request(prompt.clone(), 8));
    assert_eq!(first.ids(), again.ids());
    let read = engine.progress().prompt_tokens;
    assert!(
        read < 2 * prompt.len() as u64,
        "the second time {read} tokens in all were read, {} each time",
        prompt.len()
    );
}

/// With a build for a GPU on a machine that has one, the answer to what is asked for here is that GPU.
#[test]
#[cfg(not(any(feature = "cuda", feature = "metal")))]
fn a_gpu_that_is_asked_for_in_vain_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = tiny_llama().write(folder.path());
    let asked = EngineOptions {
        device: DeviceChoice::Cuda,
        ..EngineOptions::default()
    };
    let engine = Engine::load(&path, &asked, |_| ()).unwrap();
    assert_eq!(engine.device(), DeviceChoice::Cpu);
    let reason = engine.device_reason().unwrap();
    assert!(
        reason.contains("Cuda was asked for") && reason.contains("on the CPU"),
        "{reason}"
    );
    assert_eq!(answer(&engine, request(tokens(&engine, "a"), 4)).tokens.len(), 4);
    for quiet in [DeviceChoice::Auto, DeviceChoice::Cpu] {
        let asked = EngineOptions {
            device: quiet,
            ..EngineOptions::default()
        };
        let engine = Engine::load(&path, &asked, |_| ()).unwrap();
        assert_eq!(engine.device_reason(), None, "nothing was missed");
    }
}
