//! Where the real models are, and prompts to try on them.
#![allow(dead_code)] // every test file uses its own part

pub mod ask;
pub mod gguf;

use std::path::PathBuf;

/// A real model that `./tests/run` fetched.
pub fn model(name: &str) -> PathBuf {
    let cache = || {
        let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let base = base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
        base.expect("HOME is set").join("freehold/models")
    };
    let folder = std::env::var_os("FREEHOLD_TEST_MODELS").map_or_else(cache, PathBuf::from);
    let path = folder.join(name);
    assert!(
        path.exists(),
        "{} is not there: run ./tests/run, which fetches the test models",
        path.display()
    );
    path
}

/// The chat model of the tests.
pub const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// The base model with SentencePiece, sliding window and mixed quantisation.
pub const GEMMA3: &str = "gemma-3-270m-Q4_K_M.gguf";
/// The encoder.
pub const MINILM: &str = "all-MiniLM-L6-v2";

/// Texts of many kinds.
pub const PROMPTS: &[&str] = &[
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "1 + 1 = 2, 2 + 2 = 4, 3 + 3 =",
    "Water boils at a temperature of",
    "The quick brown fox jumps over the",
    "To be, or not to be, that is",
    "SELECT name, age FROM users WHERE",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three primary colors are",
    "In 1969, Neil Armstrong",
    "Ingredients:\n- 2 eggs\n- 100 g flour\n-",
    "Q: What is the largest planet?\nA:",
    "Photosynthesis is the process by which",
    "import numpy as np\n\nx = np.",
    "La capitale de l'Allemagne est",
    "Das Wetter ist heute sehr",
    "<html>\n<head>\n<title>",
    "The mitochondria is the",
    "She opened the door and saw",
    "{\"name\": \"Alice\", \"age\":",
    "Chapter 1\n\nIt was a dark and",
    "The largest ocean on Earth is",
    "My favourite book is",
    "How do I sort a list in Python?",
    "function add(a, b) {",
    "The recipe begins with",
    "He was born in 1879 in",
    "The opposite of hot is",
    "A triangle has",
    "Dogs are",
    "The best way to learn a language is",
    "for (int i = 0; i <",
    "E = mc",
    "The moon is",
    "I think, therefore",
    "Breaking news:",
    "In the year 2050,",
    "The human heart",
    "Roses are red,",
    "Monday, Tuesday, Wednesday,",
    "The stock market",
    "Bonjour, je m'appelle",
    "git commit -m",
    "Steps to make tea:\n1.",
    "The history of Rome begins",
    "An apple a day",
    "To install the program, run",
    "Yesterday I went to the",
    "| Name | Age |\n|---|---|\n|",
];
