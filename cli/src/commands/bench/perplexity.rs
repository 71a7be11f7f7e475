//! Perplexity of a text, as llama.cpp's own program computes it, so that the two can be compared.
//!
//! The text is cut into windows of equal length. In each, the first half is context and the second half counts;
//! a model whose texts begin with a token of their own sees that token in the place of each window's first.
//! Source: llama.cpp, `tools/perplexity`.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use freehold_engine::{Engine, EngineOptions, KvType, Precision, Special};
use serde::Serialize;

/// What to read, and how.
#[derive(Debug)]
pub struct Reading {
    /// GGUF file.
    pub model: PathBuf,
    /// UTF-8 text of at least two windows.
    pub text: PathBuf,
    /// Tokens in a window.
    pub window: usize,
    /// How finely the engine computes; with floats its cache has them too.
    pub precision: Precision,
    /// Threads that compute.
    pub threads: Option<u32>,
    /// Vector instructions; the best if absent.
    pub instructions: Option<String>,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Perplexity {
    /// e to the mean of the negative log probabilities.
    pub perplexity: f64,
    /// Tokens that counted.
    pub counted_tokens: usize,
    /// Tokens in a window.
    pub window_tokens: usize,
}

/// Reads the whole text with the model.
///
/// # Errors
/// When the model does not load, or the text is shorter than two windows.
pub fn measure(reading: &Reading, mut step: impl FnMut(usize, usize)) -> Result<Perplexity> {
    let Reading {
        model,
        text,
        window,
        precision,
        threads,
        instructions,
    } = reading;
    let window = *window;
    let text = std::fs::read_to_string(text).with_context(|| format!("failed to read {}", text.display()))?;
    let options = EngineOptions {
        context_length: Some(u32::try_from(window + 2)?),
        max_sequences: 1,
        threads: *threads,
        instructions: instructions.clone(),
        precision: *precision,
        kv_type: match precision {
            Precision::Float => KvType::F32,
            Precision::Standard | Precision::High => KvType::F16,
        },
        prefix_tokens: Some(0),
        speculate: false,
        ..EngineOptions::default()
    };
    let engine = Engine::load(model, &options, |_| ())
        .with_context(|| format!("failed to load {}", model.display()))?;
    ensure!(
        engine.context_length() > window,
        "the model's context holds {} tokens and a window has {window}; give a smaller --window",
        engine.context_length()
    );
    let special = |add| Special { add, parse: false };
    let tokens = engine.tokenizer().encode(&text, special(true));
    // What the model wants at the beginning of every text.
    let begin = engine.tokenizer().encode("", special(true)).first().copied();
    let windows = tokens.len() / window;
    ensure!(
        windows >= 2,
        "the text has {} tokens; two windows of {window} are the least",
        tokens.len()
    );
    let (mut sum, mut counted) = (0.0_f64, 0);
    for (index, tokens) in tokens.chunks_exact(window).enumerate() {
        let mut tokens = tokens.to_vec();
        if let (Some(first), Some(begin)) = (tokens.first_mut(), begin) {
            *first = begin;
        }
        // Score `i` is that of token `i + 1`.
        let scores = engine.score(&tokens)?;
        for score in &scores[window / 2..] {
            sum -= f64::from(*score);
            counted += 1;
        }
        step(index + 1, windows);
    }
    Ok(Perplexity {
        perplexity: (sum / counted as f64).exp(),
        counted_tokens: counted,
        window_tokens: window,
    })
}
