//! What an engine takes of the machine. Each model is alone in a process of its own, so that the figures are its own.
#![allow(clippy::unwrap_used)] // a test may panic
#![cfg(target_os = "linux")]

mod common;

use std::time::Duration;

use common::ask::{answer, eventually, request, tokens};
use common::{GEMMA3, PROMPTS, SMOLLM2, model};
use freehold_engine::{Engine, EngineOptions, KvType};

/// Bytes of this process in memory: now (`VmRSS:`) or at most so far (`VmHWM:`).
fn resident(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Processor time of this process so far, in ticks of 10 ms.
fn ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_name = stat.rsplit(')').next().unwrap();
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn memory_stays_near_the_files_size_and_idleness_costs_nothing() {
    for name in ["smollm2", "gemma3"] {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--ignored", "--exact", "--nocapture", name]);
        let output = child.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        println!("{text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && text.contains("1 passed"), "{name}");
    }
}

#[test]
#[ignore = "run by memory_stays_near_the_files_size_and_idleness_costs_nothing, in a process of its own"]
fn smollm2() {
    let engine = within_bounds(SMOLLM2);
    costs_nothing_at_rest(&engine);
}

/// A quarter of a million tokens in its vocabulary, and the rows of its embeddings are over half of the file.
#[test]
#[ignore = "run by memory_stays_near_the_files_size_and_idleness_costs_nothing, in a process of its own"]
fn gemma3() {
    within_bounds(GEMMA3);
}

/// Loads a model, has it read a long prompt and answer, and looks at the memory.
fn within_bounds(name: &str) -> Engine {
    let path = model(name);
    let file = std::fs::metadata(&path).unwrap().len();
    let options = EngineOptions {
        context_length: Some(2048),
        max_sequences: 2,
        ..EngineOptions::default()
    };
    let engine = Engine::load(&path, &options, |_| ()).unwrap();
    let loaded = (resident("VmRSS:"), resident("VmHWM:"));
    let prompt: Vec<u32> = tokens(&engine, &PROMPTS.join(" "));
    let context = prompt.len() as u64 + 8;
    answer(&engine, request(prompt, 8));
    let kv = engine.facts().kv_bytes_per_token(KvType::F16) * context;
    let (now, most) = (resident("VmRSS:"), resident("VmHWM:"));
    let allowed = file * 13 / 10 + kv;
    println!(
        "{name}: {} MiB resident, {} at most ({} and {} when it was loaded), for a file of {} MiB and {} MiB of KV cache: \
         {} are allowed",
        now >> 20,
        most >> 20,
        loaded.0 >> 20,
        loaded.1 >> 20,
        file >> 20,
        kv >> 20,
        allowed >> 20
    );
    // While it was loaded too: the file and what is made of it are never there both, whole.
    assert!(
        now <= allowed && most <= allowed,
        "{now} bytes are resident, {most} were, {allowed} are allowed"
    );
    engine
}

fn costs_nothing_at_rest(engine: &Engine) {
    eventually("the engine is idle", || engine.progress().active == 0);
    let steps = engine.progress().steps;
    // The threads of the pool look for work a moment longer before they sleep.
    std::thread::sleep(Duration::from_millis(100));
    let before = ticks();
    std::thread::sleep(Duration::from_millis(500));
    let spent = ticks() - before;
    assert!(
        spent <= 1,
        "{spent} ticks of 10 ms were spent in half a second of rest"
    );
    assert_eq!(engine.progress().steps, steps);
}
