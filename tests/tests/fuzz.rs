//! What fuzzers found, and what they begin with, through their own code: `just fuzz` runs them for longer.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test may panic

#[allow(dead_code)]
#[path = "../../node-agent/engine/tests/common/gguf.rs"]
mod gguf;
#[path = "../fuzz/src/targets.rs"]
mod targets;

use std::panic::catch_unwind;

/// Runs a fuzzer's code over its corpus, and over every beginning of a short entry.
fn replay(name: &str, target: fn(&[u8])) {
    let folder = freehold_tests::folder().join("fuzz/corpus").join(name);
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        for end in (0..=bytes.len()).rev().step_by(1 + bytes.len() / 64) {
            assert!(
                catch_unwind(|| target(&bytes[..end])).is_ok(),
                "{} up to byte {end}",
                path.display()
            );
        }
        count += 1;
    }
    assert!(count > 0, "{name} has no corpus");
}

#[test]
fn templates_do_no_harm() {
    replay("template", targets::template);
}

#[test]
fn texts_do_no_harm() {
    replay("text", targets::text);
}

#[test]
fn requests_do_no_harm() {
    replay("request", targets::request);
}

/// Small models are made here and not kept: each sound, and with bytes changed in its metadata and in its list of tensors.
#[test]
fn model_files_do_no_harm() {
    for (name, file) in targets::sound_models() {
        let (header, bytes) = file.parts();
        assert!(targets::gguf(&bytes), "{name} is not loaded");
        let tensors = header.saturating_sub(1500)..header;
        for place in (0..bytes.len().min(2000)).step_by(7).chain(tensors.step_by(5)) {
            let mut broken = bytes.clone();
            broken[place] ^= 0xff;
            assert!(
                catch_unwind(|| targets::gguf(&broken)).is_ok(),
                "{name}, byte {place}"
            );
        }
    }
}
