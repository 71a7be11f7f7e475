//! What llguidance says of one token and of all of them, over a vocabulary made by hand.

#[path = "../../tests/common/gguf.rs"]
#[allow(dead_code, reason = "other tests write whole models with it")]
mod gguf;

use std::collections::BTreeSet;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::gguf::GgufFile;
use gguf::{Gguf, list, strings};

const END: &str = "</s>";

/// Letters, and pieces in which much ends and begins.
fn tokenizer() -> Tokenizer {
    let letters = (0x20..0x7f_u8).map(|byte| char::from(byte).to_string());
    let pieces = [
        "{\"",
        "\":",
        "\": ",
        "\", \"",
        "\"}",
        "\"},",
        "[{\"",
        "true",
        "false",
        "null",
        "12",
        "2026",
        "-1",
        "e1",
        "0.5",
        "ab",
        "abc",
        " ab",
        "  ",
        "\n",
        "na",
        "name",
        "age",
        "yes",
        "no",
        "}]",
        "[]",
        "],",
        "----------------",
        "------------------------",
        "m\u{e4}ybe",
        "\u{e4}",
        "\\u",
        "\\n",
    ];
    let words: BTreeSet<String> = letters.chain(pieces.map(str::to_owned)).collect();
    let words: Vec<String> = ["<unk>", END]
        .into_iter()
        .map(str::to_owned)
        .chain(words.into_iter().map(|word| word.replace(' ', "\u{2581}")))
        .collect();
    let kinds: Vec<u8> = (0..words.len())
        .map(|id| if id < 2 { 3_i32 } else { 1 })
        .flat_map(i32::to_le_bytes)
        .collect();
    let scores: Vec<u8> = (0..words.len())
        .flat_map(|id| (-(id as f32)).to_le_bytes())
        .collect();
    let count = words.len() as u64;
    let file = Gguf::default()
        .str("tokenizer.ggml.model", "llama")
        .set("tokenizer.ggml.tokens", strings(&words))
        .set("tokenizer.ggml.token_type", list(5, count, &kinds))
        .set("tokenizer.ggml.scores", list(gguf::FLOAT32, count, &scores))
        .u32("tokenizer.ggml.eos_token_id", 1);
    let folder = TempDir::new().unwrap();
    Tokenizer::from_gguf(&GgufFile::open(&file.write(folder.path())).unwrap()).unwrap()
}

fn constraints() -> Vec<Constraint> {
    let person = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age"],
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    });
    let schemas = [
        person.clone(),
        json!({"type": "array", "items": person, "minItems": 1, "maxItems": 3}),
        json!({"type": "string"}),
        json!({"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}),
        json!({"type": "number"}),
        json!({"enum": ["yes", "no", null, 12]}),
        json!({"anyOf": [{"type": "boolean"}, {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}]}),
    ];
    let mut constraints: Vec<Constraint> = schemas.into_iter().map(Constraint::JsonSchema).collect();
    constraints.push(Constraint::JsonObject);
    for expression in [
        "([a-z]+ ){3,7}",
        "(ab|abc|-)*",
        "[0-9]{3}-[0-9]{4}",
        ".{0,20}",
        "(.|\n)*x",
    ] {
        constraints.push(Constraint::Regex(expression.to_owned()));
    }
    for grammar in [
        "start: \"yes\" | \"no\" | \"m\u{e4}ybe\"",
        "start: expr\nexpr: term (\"+\" term)*\nterm: NUMBER | \"(\" expr \")\"\nNUMBER: /[0-9]+/",
    ] {
        constraints.push(Constraint::Lark(grammar.to_owned()));
    }
    constraints
}

#[test]
fn each_token_is_allowed_alone_where_it_is_among_all() {
    let tokenizer = tokenizer();
    let grammars = Grammars::default();
    // Rows beyond the tokenizer's tokens, as models have them.
    let size = tokenizer.vocab_size() + 3;
    let (mut compared, mut complete) = (0, 0);
    for constraint in constraints() {
        for seed in 0..6 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut guide = grammars.compile(&constraint, &tokenizer).unwrap();
            for _ in 0..80 {
                let alone: Vec<bool> = (0..size as u32)
                    .map(|token| guide.allows(token).unwrap())
                    .collect();
                let mut logits = vec![0.0; size];
                guide.mask(&mut logits).unwrap();
                let among: Vec<bool> = logits.iter().map(|logit| *logit == 0.0).collect();
                assert_eq!(alone, among, "{constraint:?}, seed {seed}");
                compared += size;
                let allowed: Vec<u32> = (0..size as u32).filter(|&token| alone[token as usize]).collect();
                let token = allowed[rng.random_range(0..allowed.len())];
                if guide.advance(token).unwrap() || tokenizer.is_end_of_generation(token) {
                    complete += 1;
                    break;
                }
            }
        }
    }
    assert!(compared > 100_000 && complete > 20, "{compared}, {complete}");
}

#[test]
fn a_long_answer_that_needs_no_other_token_does_not_use_its_grammar_up() {
    let tokenizer = tokenizer();
    let constraint = Constraint::Regex("(.|\n){0,100000}".to_owned());
    let grammars = Grammars::default();
    let mut rng = StdRng::seed_from_u64(1);
    // As many questions a token as there may be with `top_p`, and one, as there mostly are.
    for (questions, tokens) in [(8, 6_000), (1, 30_000)] {
        let mut guide = grammars.compile(&constraint, &tokenizer).unwrap();
        for written in 0..tokens {
            let mut token = 0;
            for _ in 0..questions {
                token = rng.random_range(2..tokenizer.vocab_size() as u32);
                assert_eq!(guide.allows(token), Ok(true), "after {written} tokens");
            }
            assert_eq!(guide.advance(token), Ok(false), "after {written} tokens");
        }
    }
}

#[test]
fn a_grammar_that_goes_on_in_thousands_of_ways_ends_its_answer_and_not_those_of_others() {
    let tokenizer = tokenizer();
    let ways = 4000;
    // After the first dash each of them may come at every dash: minutes for a token of many, if nobody looked.
    let mut source = "start: \"a\" \"-\" way\nway: ".to_owned();
    source.push_str(
        &(0..ways)
            .map(|way| format!("w{way}"))
            .collect::<Vec<_>>()
            .join(" | "),
    );
    for way in 0..ways {
        source.push_str(&format!("\nw{way}: \"-\" way"));
    }
    let grammars = Grammars::default();
    let token = |text: &str| {
        (0..tokenizer.vocab_size() as u32)
            .find(|&token| tokenizer.token_text(token) == text)
            .unwrap()
    };
    for alone in [true, false] {
        let mut guide = grammars
            .compile(&Constraint::Lark(source.clone()), &tokenizer)
            .unwrap();
        assert_eq!(guide.allows(token("a")), Ok(true));
        assert_eq!(guide.advance(token("a")), Ok(false));
        let asked = if alone {
            guide.allows(token("------------------------")).err()
        } else {
            guide.mask(&mut vec![0.0; tokenizer.vocab_size()]).err()
        };
        let told = asked.unwrap();
        assert!(told.contains("longer than 500 ms"), "{told}");
        // It stays ended.
        assert!(guide.allows(token("-")).is_err());
    }
}
