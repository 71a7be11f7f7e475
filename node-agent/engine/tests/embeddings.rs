//! The encoder against candle-transformers' BERT, its tokenizer against the `tokenizers` crate.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert;
use common::{MINILM, PROMPTS, model};
use freehold_engine::{Engine, EngineOptions, ModelKind, Prompt, Reject, Special};
use tokenizers::Tokenizer as Reference;

/// Texts that try the WordPiece tokenizer and the encoder, beyond the prompts.
const TEXTS: &[&str] = &[
    "a",
    "Freehold serves models on machines that people own.",
    "UPPER lower MiXeD, with (punctuation)! and... more?",
    "Crème brûlée à la carte, naïve façade, Ångström, żółć",
    "東京は日本の首都です。",
    "Москва — столица России",
    "emoji 🎉🎊 and zero\u{200d}width\u{feff} and\ttabs\r\nand lines",
    "antidisestablishmentarianism supercalifragilisticexpialidocious",
    "3.14159 is about 22/7; 1,000,000 > 999_999 #hash @at $5.00",
    "control\u{0}\u{7}\u{fffd}characters",
    "हिन्दी में एक वाक्य और ภาษาไทยหนึ่งประโยค",
];

fn texts() -> Vec<String> {
    let mut texts: Vec<String> = TEXTS.iter().chain(PROMPTS).map(|&text| text.to_owned()).collect();
    // One that fills most of the positions, and one word that is longer than WordPiece takes.
    texts.push(PROMPTS.join(" ").repeat(2).chars().take(1500).collect());
    texts.push("x".repeat(300));
    texts
}

fn engine() -> Engine {
    Engine::load(&model(MINILM), &EngineOptions::default(), |_| ()).unwrap()
}

fn reference_tokenizer() -> Reference {
    let mut tokenizer = Reference::from_file(model(MINILM).join("tokenizer.json")).unwrap();
    // The file pads and cuts to 128 tokens, for training.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).unwrap();
    tokenizer
}

fn reference_model() -> bert::BertModel {
    let config = std::fs::read(model(MINILM).join("config.json")).unwrap();
    let config: bert::Config = serde_json::from_slice(&config).unwrap();
    let weights = std::fs::read(model(MINILM).join("model.safetensors")).unwrap();
    let weights = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu).unwrap();
    bert::BertModel::load(weights, &config).unwrap()
}

fn reference_vector(model: &bert::BertModel, tokens: &[u32]) -> Vec<f32> {
    let ids = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let hidden = model.forward(&ids, &ids.zeros_like().unwrap(), None).unwrap();
    let mean = hidden.mean(1).unwrap().squeeze(0).unwrap();
    let mean = mean.to_vec1::<f32>().unwrap();
    let length = mean.iter().map(|x| x * x).sum::<f32>().sqrt();
    mean.iter().map(|x| x / length).collect()
}

#[test]
fn vectors_equal_the_oracles() {
    let (engine, oracle, tokenizer) = (engine(), reference_model(), reference_tokenizer());
    assert_eq!(engine.kind(), ModelKind::Embed);
    let texts = texts();
    let prompts: Vec<Prompt> = texts.iter().cloned().map(Prompt::Text).collect();
    let embeddings = engine.embed(&prompts).unwrap();
    let (mut worst, mut count) = (0.0_f32, 0);
    for (text, ours) in texts.iter().zip(&embeddings.vectors) {
        let tokens = tokenizer.encode(text.as_str(), true).unwrap();
        let theirs = reference_vector(&oracle, tokens.get_ids());
        assert_eq!(ours.len(), theirs.len());
        let cosine: f32 = ours.iter().zip(&theirs).map(|(x, y)| x * y).sum();
        let length: f32 = ours.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((length - 1.0).abs() < 1e-5, "{text:?}: length {length}");
        assert!(1.0 - cosine < 1e-5, "{text:?}: cosine {cosine}");
        let apart = ours.iter().zip(&theirs).map(|(x, y)| (x - y).abs());
        worst = worst.max(apart.fold(0.0, f32::max));
        count += tokens.len();
    }
    assert!(worst < 1e-4, "components differ by {worst}");
    assert_eq!(embeddings.prompt_tokens, count);
    println!(
        "largest difference of a component over {} texts: {worst}",
        texts.len()
    );
}

#[test]
fn tokens_equal_the_references() {
    let (engine, tokenizer) = (engine(), reference_tokenizer());
    let special = Special {
        add: true,
        parse: false,
    };
    for text in &texts() {
        let theirs = tokenizer.encode(text.as_str(), true).unwrap();
        assert_eq!(
            engine.tokenizer().encode(text, special),
            theirs.get_ids(),
            "{text:?}"
        );
    }
    // What a user types is never a control token.
    let typed = engine.tokenizer().encode("[SEP]", special);
    assert!(typed.len() > 3, "{typed:?}");
}

#[test]
fn likeness_follows_meaning() {
    let texts = [
        "A cat sits on the mat.",
        "The kitten rests on a rug.",
        "Interest rates rose by half a percent.",
    ];
    let prompts = texts.map(|text| Prompt::Text(text.to_owned()));
    let vectors = engine().embed(&prompts).unwrap().vectors;
    let likeness =
        |a: usize, b: usize| -> f32 { vectors[a].iter().zip(&vectors[b]).map(|(x, y)| x * y).sum() };
    assert!(likeness(0, 1) > 0.4 && likeness(0, 1) > likeness(0, 2) + 0.3);
}

#[test]
fn texts_beyond_the_positions_are_refused() {
    let engine = engine();
    let prompt = |count: usize| [Prompt::Tokens(vec![2003; count])];
    assert!(engine.embed(&prompt(512)).is_ok());
    assert_eq!(
        engine.embed(&prompt(513)).err(),
        Some(Reject::PromptTooLong {
            prompt_tokens: 513,
            context_length: 512
        })
    );
    let empty = engine.embed(&[Prompt::Tokens(Vec::new())]).unwrap_err();
    assert!(empty.to_string().contains("empty"), "{empty}");
    assert!(engine.embed(&[]).unwrap().vectors.is_empty());
}

#[test]
fn texts_that_nobody_waits_for_any_more_are_not_computed() {
    let engine = engine();
    // Four texts fill a portion.
    let texts = vec![Prompt::Tokens(vec![2003; 250]); 12];
    let asked = std::cell::Cell::new(0);
    let wanted = || {
        asked.set(asked.get() + 1);
        // Once a text while they are read, once a portion then: two of three portions.
        asked.get() <= 12 + 2
    };
    assert_eq!(engine.embed_while(&texts, wanted).err(), Some(Reject::Stopping));
    assert_eq!(engine.progress().steps, 2);
    assert_eq!(engine.progress().prompt_tokens, 8 * 250);
    // One that does not fit refuses all, and nothing is computed.
    let texts = [texts, vec![Prompt::Tokens(vec![2003; 513])]].concat();
    assert!(matches!(engine.embed(&texts), Err(Reject::PromptTooLong { .. })));
    assert_eq!(engine.progress().steps, 2);
}

#[test]
fn an_encoder_does_not_write() {
    let request = common::ask::request(vec![101], 4);
    let refused = common::ask::ask(&engine(), request).err().unwrap();
    assert!(refused.to_string().contains("/v1/embeddings"), "{refused}");
}

#[test]
fn damaged_folders_are_refused_with_the_reason() {
    let whole = model(MINILM);
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(whole.join(name), folder.path().join(name)).unwrap();
    }
    let load = || {
        let error = Engine::load(folder.path(), &EngineOptions::default(), |_| ()).unwrap_err();
        format!("{error}")
    };
    let change = |name: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>| {
        let bytes = std::fs::read(whole.join(name)).unwrap();
        std::fs::write(folder.path().join(name), change(bytes)).unwrap();
    };
    let replace = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(from, to).into_bytes()
    };
    change("model.safetensors", &|mut bytes| {
        bytes.truncate(bytes.len() / 2);
        bytes
    });
    assert!(load().contains("model.safetensors"), "{}", load());
    change("model.safetensors", &|mut bytes| {
        bytes[..8].fill(0xff);
        bytes
    });
    assert!(load().contains("model.safetensors"), "{}", load());
    change("model.safetensors", &|bytes| bytes);
    for (from, to, reason) in [
        ("\"bert\"", "\"gpt2\"", "model_type"),
        ("384", "383", "hidden_size"),
        ("384", "768", "shape of tensor"),
        (
            "\"num_hidden_layers\": 6",
            "\"num_hidden_layers\": 7",
            "encoder.layer.6",
        ),
        (
            "\"num_hidden_layers\": 6",
            "\"num_hidden_layers\": 4000000000",
            "num_hidden_layers",
        ),
        ("\"gelu\"", "\"swish\"", "hidden_act"),
        ("{", "{{", "config.json"),
    ] {
        change("config.json", &replace(from, to));
        assert!(load().contains(reason), "{from} to {to}: {}", load());
    }
    change("config.json", &|bytes| bytes);
    change("tokenizer.json", &replace("\"WordPiece\"", "\"Unigram\""));
    assert!(load().contains("tokenizer.json"), "{}", load());
    std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    assert!(load().contains("failed to open"), "{}", load());
}
