//! Tokenizers against those that the models were trained with: Hugging Face's `tokenizers`, built from the
//! GGUF's own vocabulary, and recorded answers of Google's sentencepiece (see `fixtures/`).
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use common::gguf::{Gguf, strings};
use common::{GEMMA3, SMOLLM2, model};
use freehold_engine::gguf::{GgufFile, Strings, Value};
use freehold_engine::{Special, Tokenizer};
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

const PLAIN: Special = Special {
    add: false,
    parse: false,
};

/// Texts of many kinds: languages, code, white space, digits, emoji, control characters, noise.
static TEXTS: LazyLock<Vec<String>> =
    LazyLock::new(|| serde_json::from_str(include_str!("fixtures/texts.json")).unwrap());

static SMOLLM2_FILE: LazyLock<GgufFile> = LazyLock::new(|| GgufFile::open(&model(SMOLLM2)).unwrap());
static GEMMA3_FILE: LazyLock<GgufFile> = LazyLock::new(|| GgufFile::open(&model(GEMMA3)).unwrap());
static SMOLLM2_OURS: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_gguf(&SMOLLM2_FILE).unwrap());
static GEMMA3_OURS: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_gguf(&GEMMA3_FILE).unwrap());
static SMOLLM2_REFERENCE: LazyLock<Reference> = LazyLock::new(|| byte_level("smollm", false));
static GEMMA3_REFERENCE: LazyLock<Reference> = LazyLock::new(gemma);

fn list<'a>(file: &'a GgufFile, key: &str) -> &'a Strings {
    match file.value(key).unwrap() {
        Value::Strings(list) => list,
        other => panic!("{key} is {other:?}"),
    }
}

fn texts(file: &GgufFile, key: &str) -> Vec<String> {
    let lossy = |text| String::from_utf8_lossy(text).into_owned();
    list(file, key).iter().map(lossy).collect()
}

struct Reference(tokenizers::Tokenizer);

impl Reference {
    fn new(parts: serde_json::Value) -> Self {
        let bytes = serde_json::to_vec(&parts).unwrap();
        Self(tokenizers::Tokenizer::from_bytes(bytes).unwrap())
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        self.0.encode_fast(text, false).unwrap().get_ids().to_vec()
    }
}

/// The rules of families, as their published tokenizer.json have them; `default` is llama.cpp's.
fn pre_tokenizer(name: &str) -> serde_json::Value {
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let first = match name {
        "gpt-2" => return byte_level(true),
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            return json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]});
        }
        "llama-bpe" | "llama3" | "dbrx" => split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        "qwen2" => split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        "tekken" => split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        "gpt-4o" => split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        "default" => {
            let splits = [
                split(r"[\p{P}\$\+<=>\^~\|]+"),
                split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
                split(r"\p{N}+"),
                split("[0-9][0-9][0-9]"),
                byte_level(false),
            ];
            return json!({"type": "Sequence", "pretokenizers": splits});
        }
        other => panic!("no rules for {other}"),
    };
    json!({"type": "Sequence", "pretokenizers": [first, byte_level(false)]})
}

/// SmolLM2's vocabulary and merges with these rules.
fn byte_level(name: &str, ignore_merges: bool) -> Reference {
    let tokens = texts(&SMOLLM2_FILE, "tokenizer.ggml.tokens");
    let vocab: HashMap<&str, usize> = tokens
        .iter()
        .enumerate()
        .map(|(id, text)| (text.as_str(), id))
        .collect();
    let merges = texts(&SMOLLM2_FILE, "tokenizer.ggml.merges");
    let merges: Vec<_> = merges
        .iter()
        .map(|merge| merge.split_once(' ').unwrap())
        .collect();
    Reference::new(json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": pre_tokenizer(name),
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges},
    }))
}

/// SentencePiece as transformers converts it: every way to put a piece together is a merge, best score first.
fn gemma() -> Reference {
    let file = &*GEMMA3_FILE;
    let tokens = texts(file, "tokenizer.ggml.tokens");
    let (Value::Floats(scores), Value::Ints(kinds)) = (
        file.value("tokenizer.ggml.scores").unwrap(),
        file.value("tokenizer.ggml.token_type").unwrap(),
    ) else {
        panic!("scores and kinds are numbers");
    };
    let vocab: HashMap<&str, usize> = tokens
        .iter()
        .enumerate()
        .map(|(id, text)| (text.as_str(), id))
        .collect();
    let ordinary = |text: &str| vocab.get(text).is_some_and(|&id| kinds[id] == 1);
    let mut merges: Vec<(f32, &str, &str)> = Vec::new();
    for (id, text) in tokens.iter().enumerate().filter(|(id, _)| kinds[*id] == 1) {
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if ordinary(left) && ordinary(right) {
                merges.push((scores[id], left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    let merges: Vec<_> = merges.into_iter().map(|(_, left, right)| (left, right)).collect();
    let added: Vec<_> = (0..tokens.len())
        .filter(|&id| kinds[id] == 4)
        .map(|id| {
            json!({"id": id, "content": tokens[id].replace('\u{2581}', " "), "special": false, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false})
        })
        .collect();
    Reference::new(json!({
        "version": "1.0", "added_tokens": added, "pre_tokenizer": null,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": true, "fuse_unk": true, "unk_token": "<unk>"},
    }))
}

/// The same vocabulary under other rules, as a file of its own.
fn with_rules(name: &str) -> Tokenizer {
    let kinds = vec![1_i32; list(&SMOLLM2_FILE, "tokenizer.ggml.tokens").len()];
    let kinds: Vec<u8> = kinds.into_iter().flat_map(i32::to_le_bytes).collect();
    let copy = |key: &str| strings(&list(&SMOLLM2_FILE, key).iter().collect::<Vec<_>>());
    let file = Gguf::default()
        .str("tokenizer.ggml.model", "gpt2")
        .str("tokenizer.ggml.pre", name)
        .set("tokenizer.ggml.tokens", copy("tokenizer.ggml.tokens"))
        .set(
            "tokenizer.ggml.token_type",
            common::gguf::list(5, kinds.len() as u64 / 4, &kinds),
        )
        .set("tokenizer.ggml.merges", copy("tokenizer.ggml.merges"));
    let folder = TempDir::new().unwrap();
    Tokenizer::from_gguf(&GgufFile::open(&file.write(folder.path())).unwrap()).unwrap()
}

#[track_caller]
fn assert_same(ours: &Tokenizer, reference: &Reference, text: &str) {
    let (ours, theirs) = (ours.encode(text, PLAIN), reference.encode(text));
    assert_eq!(ours, theirs, "{text:?}");
}

/// Pieces that meet each other in ways that nobody thought of.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => "[a-zA-Z]{1,12}",
        2 => "[ \t\r\n\u{a0}\u{3000}]{1,6}",
        2 => "[0-9]{1,7}",
        2 => "[!-/:-@\\[-`{-~]{1,5}",
        2 => "\\PC{1,6}",
        1 => any::<String>(),
        1 => "('s|'LL|'re|\u{2019}t|n't|'d'x)",
        1 => "(<[a-z]{1,6}>|</[a-z]{1,6}>|\\[multimodal\\]|<unused[0-9]{1,3}>)",
        1 => "[\u{300}-\u{36f}\u{200b}-\u{200f}\u{fe0f}]{1,4}",
        1 => "[\u{1f1e6}-\u{1f1ff}\u{1f600}-\u{1f64f}\u{1f3fb}-\u{1f3ff}\u{200d}]{1,5}",
        1 => "[\u{4e00}-\u{4e80}\u{3041}-\u{3096}\u{ac00}-\u{ac40}\u{e01}-\u{e3a}\u{627}-\u{64a}]{1,6}",
        1 => "[\u{0}-\u{1f}\u{7f}-\u{9f}]{1,3}",
        1 => ("[a-z ]{1,3}", 2_usize..12).prop_map(|(part, times)| part.repeat(times)),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

#[test]
fn byte_level_bpe_equals_the_reference() {
    for text in &*TEXTS {
        assert_same(&SMOLLM2_OURS, &SMOLLM2_REFERENCE, text);
    }
    let all = TEXTS.concat();
    assert_same(&SMOLLM2_OURS, &SMOLLM2_REFERENCE, &all);
}

#[test]
fn every_familys_rules_cut_words_as_the_reference_does() {
    for (name, ignore_merges) in [
        ("gpt-2", false),
        ("llama-bpe", true),
        ("llama3", true),
        ("dbrx", false),
        ("qwen2", false),
        ("tekken", true),
        ("gpt-4o", false),
        ("default", false),
    ] {
        let (ours, reference) = (with_rules(name), byte_level(name, ignore_merges));
        for text in &*TEXTS {
            let (ours, theirs) = (ours.encode(text, PLAIN), reference.encode(text));
            assert_eq!(ours, theirs, "{name}: {text:?}");
        }
    }
}

#[test]
fn sentencepiece_equals_googles_own() {
    let recorded: Vec<Vec<u32>> = serde_json::from_str(include_str!("fixtures/gemma_tokens.json")).unwrap();
    assert_eq!(recorded.len(), TEXTS.len());
    for (text, recorded) in TEXTS.iter().zip(&recorded) {
        assert_eq!(&GEMMA3_OURS.encode(text, PLAIN), recorded, "{text:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn any_text_becomes_the_references_tokens(text in text()) {
        assert_same(&SMOLLM2_OURS, &SMOLLM2_REFERENCE, &text);
        assert_same(&GEMMA3_OURS, &GEMMA3_REFERENCE, &text);
    }

    #[test]
    fn any_text_comes_back_from_its_tokens(text in text()) {
        let sayable: String = text.chars().filter(|&c| SMOLLM2_OURS.decode(&SMOLLM2_REFERENCE.encode(&c.to_string())) == c.to_string()).collect();
        prop_assert_eq!(SMOLLM2_OURS.decode(&SMOLLM2_OURS.encode(&sayable, PLAIN)), sayable);
        // SentencePiece cannot tell U+2581 from a space.
        let expected = text.replace('\u{2581}', " ");
        prop_assert_eq!(GEMMA3_OURS.decode(&GEMMA3_OURS.encode(&text, PLAIN)), expected);
    }
}

#[test]
fn every_text_comes_back_from_its_tokens() {
    for text in &*TEXTS {
        let expected = text.replace('\u{2581}', " ");
        assert_eq!(GEMMA3_OURS.decode(&GEMMA3_OURS.encode(text, PLAIN)), expected);
    }
    // All but a few control characters and bytes of rare scripts are in this vocabulary.
    let back = TEXTS
        .iter()
        .filter(|text| SMOLLM2_OURS.decode(&SMOLLM2_OURS.encode(text, PLAIN)) == **text);
    assert!(back.count() * 10 > TEXTS.len() * 8);
}

#[test]
fn every_token_is_the_bytes_that_it_is_decoded_to() {
    // Tokens one by one give the bytes of all together: streaming shows what decoding shows.
    for (ours, text) in [&*SMOLLM2_OURS, &*GEMMA3_OURS]
        .into_iter()
        .zip([TEXTS.concat(), TEXTS.concat()])
    {
        let tokens = ours.encode(&text, PLAIN);
        let mut bytes = Vec::new();
        for &token in &tokens {
            ours.append_bytes(token, &mut bytes);
        }
        assert_eq!(String::from_utf8_lossy(&bytes), ours.decode(&tokens));
    }
    assert_eq!(SMOLLM2_OURS.decode(&[u32::MAX]), "");
    assert_eq!(GEMMA3_OURS.decode(&[u32::MAX, 262_144]), "");
}

#[test]
fn control_tokens_are_text_unless_asked_for() {
    let parse = Special {
        add: true,
        parse: true,
    };
    let cases = [
        (&*SMOLLM2_OURS, "<|im_start|>", 1, "<|im_end|>", None),
        (&*GEMMA3_OURS, "<start_of_turn>", 105, "<end_of_turn>", Some(2)),
    ];
    for (tokenizer, begin, begin_id, end, bos) in cases {
        let text = format!("{begin}user\nhi{end}\n");
        let parsed = tokenizer.encode(&text, parse);
        let bos: Vec<u32> = bos.into_iter().collect();
        assert_eq!(parsed[..bos.len()], bos);
        assert_eq!(parsed[bos.len()], begin_id);
        assert!(parsed.iter().any(|&token| tokenizer.is_end_of_generation(token)));
        assert_eq!(tokenizer.decode(&parsed), "user\nhi\n");
        let plain = tokenizer.encode(&text, PLAIN);
        assert!(plain.len() > parsed.len());
        assert!(!plain.iter().any(|&token| tokenizer.is_end_of_generation(token)));
        assert_eq!(tokenizer.decode(&plain), text);
    }
}

#[test]
fn control_tokens_in_plain_text_never_become_control_tokens() {
    for (file, ours) in [(&*SMOLLM2_FILE, &*SMOLLM2_OURS), (&*GEMMA3_FILE, &*GEMMA3_OURS)] {
        let Value::Ints(kinds) = file.value("tokenizer.ggml.token_type").unwrap() else {
            panic!("kinds are numbers");
        };
        for (text, _) in texts(file, "tokenizer.ggml.tokens")
            .iter()
            .zip(kinds)
            .filter(|(_, kind)| **kind == 3)
        {
            let tokens = ours.encode(&format!("a{text}{text} b"), PLAIN);
            assert!(tokens.iter().all(|&token| kinds[token as usize] != 3), "{text}");
        }
    }
}

#[test]
fn hostile_texts_take_time_in_proportion() {
    const LENGTH: usize = 1 << 20;
    let runs: [(&str, String); 12] = [
        ("letters", "a".repeat(LENGTH)),
        ("pairs", "ab".repeat(LENGTH / 2)),
        ("spaces", " ".repeat(LENGTH)),
        ("spaces and a letter", " ".repeat(LENGTH) + "a"),
        ("lines", "\n".repeat(LENGTH)),
        ("spaces and lines", " \n".repeat(LENGTH / 2)),
        ("digits", "1".repeat(LENGTH)),
        ("signs", "!".repeat(LENGTH)),
        ("marks", "\u{301}".repeat(LENGTH / 2)),
        ("apostrophes", "'".repeat(LENGTH)),
        ("emoji", "👨‍👩‍👧".repeat(LENGTH / 18)),
        ("control", "\u{1}".repeat(LENGTH)),
    ];
    let mut slowest = (Duration::ZERO, String::new());
    let (tekken, unnamed) = (with_rules("tekken"), with_rules("default"));
    for (name, ours) in [
        ("SmolLM2", &*SMOLLM2_OURS),
        ("Gemma 3", &*GEMMA3_OURS),
        ("Tekken", &tekken),
        ("no rules named", &unnamed),
    ] {
        for (what, text) in &runs {
            let started = Instant::now();
            let tokens = ours.encode(text, PLAIN);
            let took = started.elapsed();
            assert!(tokens.len() <= 4 * text.len());
            // n log n of a mebibyte is well under a second; n squared would be hours.
            assert!(took < Duration::from_secs(10), "{name}, {what}: {took:?}");
            if took > slowest.0 {
                slowest = (took, format!("{name}, {what}"));
            }
        }
    }
    println!("slowest mebibyte: {slowest:?}");
}

#[test]
fn a_vocabulary_of_a_quarter_of_a_million_loads_at_once() {
    let file = &*GEMMA3_FILE;
    let started = Instant::now();
    let tokenizer = Tokenizer::from_gguf(file).unwrap();
    println!("Gemma 3's tokenizer took {:?}", started.elapsed());
    assert_eq!(tokenizer.vocab_size(), 262_144);
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
}
