//! Answers held to schemas, expressions and grammars, by a real model, checked by another program's judgement.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use common::ask::{answer, ask, request, tokens};
use common::{SMOLLM2, model};
use freehold_engine::{
    Constraint, Engine, EngineOptions, FinishReason, GenerateRequest, Reject, TokenLogprob,
};
use serde_json::{Value, json};

fn engine() -> Engine {
    let options = EngineOptions {
        context_length: Some(768),
        max_sequences: 4,
        ..EngineOptions::default()
    };
    Engine::load(&model(SMOLLM2), &options, |_| ()).unwrap()
}

fn constrained(engine: &Engine, text: &str, constraint: Constraint) -> GenerateRequest {
    let mut request = request(tokens(engine, text), 300);
    request.constraint = Some(constraint);
    request
}

/// Every answer of these is finite, so each must be complete.
fn schemas() -> Vec<Value> {
    let short = json!({"type": "string", "maxLength": 12});
    let person = json!({
        "type": "object",
        "properties": {"name": short, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
        "required": ["name", "age"], "additionalProperties": false
    });
    let object = |properties: Value, required: Value| json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false});
    vec![
        person.clone(),
        json!({"type": "boolean"}),
        json!({"type": "null"}),
        json!({"type": "integer", "minimum": 3, "maximum": 17}),
        json!({"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}),
        json!({"type": "integer", "minimum": -9, "maximum": -3}),
        json!({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 1000}),
        short.clone(),
        json!({"type": "string", "minLength": 5, "maxLength": 9}),
        json!({"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}),
        json!({"type": "string", "format": "date"}),
        json!({"type": "string", "format": "uuid"}),
        json!({"type": "string", "format": "ipv4"}),
        json!({"enum": ["red", "green", "blue"]}),
        json!({"enum": [1, "two", null, {"three": 3}]}),
        json!({"const": {"fixed": [1, 2, "\u{e9}\u{1f980}"]}}),
        json!({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}),
        json!({"type": "array", "items": person, "minItems": 1, "maxItems": 2}),
        json!({"type": "array", "prefixItems": [short, {"type": "integer", "maximum": 99, "minimum": 0}],
               "items": false, "minItems": 2}),
        json!({"type": ["boolean", "null"]}),
        json!({"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 9}]}),
        json!({"oneOf": [object(json!({"kind": {"const": "a"}, "x": {"type": "boolean"}}), json!(["kind", "x"])),
                         object(json!({"kind": {"const": "b"}, "y": {"type": "null"}}), json!(["kind", "y"]))]}),
        json!({"allOf": [{"type": "integer"}, {"minimum": 10}, {"maximum": 12}]}),
        object(
            json!({"a": {"type": "boolean"}, "b": {"type": "boolean"}}),
            json!(["b"]),
        ),
        object(
            json!({"deep": object(json!({"deeper": object(json!({"deepest": {"type": "boolean"}}),
            json!(["deepest"]))}), json!(["deeper"]))}),
            json!(["deep"]),
        ),
        json!({"$defs": {"flag": {"type": "boolean"}},
               "type": "array", "items": {"$ref": "#/$defs/flag"}, "minItems": 1, "maxItems": 3}),
        json!({"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "additionalProperties": false,
               "properties": {"next": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}}, "required": ["next"]}}}),
        object(
            json!({"quote \" and \\ slash": {"type": "boolean"}}),
            json!(["quote \" and \\ slash"]),
        ),
        object(
            json!({"\u{fc}ml\u{e4}ut": {"enum": ["\u{df}", "\u{1f600}"]}}),
            json!(["\u{fc}ml\u{e4}ut"]),
        ),
        json!({"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 0}),
        // As a demanded call of a tool whose parameters have definitions of their own.
        json!({"anyOf": [object(
            json!({"name": {"const": "go"}, "arguments": {
                "type": "object", "additionalProperties": false, "required": ["to"],
                "properties": {"to": {"$ref": "#/anyOf/0/properties/arguments/$defs/city"}},
                "$defs": {"city": {"enum": ["Paris", "Rome"]}}}}),
            json!(["name", "arguments"]),
        )]}),
        object(
            json!({"city": {"enum": ["Paris", "Rome"]}, "unit": {"enum": ["C", "F"]}}),
            json!(["city", "unit"]),
        ),
    ]
}

#[test]
fn every_answer_is_what_its_schema_allows() {
    let engine = engine();
    let schemas = schemas();
    assert!(schemas.len() >= 30);
    for (index, schema) in schemas.iter().enumerate() {
        let mut texts = Vec::new();
        // With log probabilities all tokens are asked about at each place, without only the likeliest.
        for (temperature, logprobs) in [(0.0, Some(5)), (0.0, None), (1.2, Some(5)), (1.2, None)] {
            let text = format!("An example of JSON for the schema {schema}:\n");
            let mut request = constrained(&engine, &text, Constraint::JsonSchema(schema.clone()));
            request.sampling.temperature = temperature;
            request.sampling.seed = Some(index as u64);
            request.sampling.logprobs = logprobs;
            let found = answer(&engine, request);
            assert_eq!(
                found.finished.reason,
                FinishReason::Stop,
                "{schema}: {:?}",
                found.text
            );
            let finite = |token: &TokenLogprob| {
                token.logprob.is_finite() && token.top.iter().all(|top| top.logprob.is_finite())
            };
            assert!(found.tokens.iter().all(finite), "{schema}: {:?}", found.tokens);
            let value: Value = serde_json::from_str(&found.text)
                .unwrap_or_else(|error| panic!("{schema}: {:?}: {error}", found.text));
            let valid = jsonschema::validate(schema, &value);
            assert!(valid.is_ok(), "{schema}: {value}: {valid:?}");
            texts.push(found.text);
        }
        assert_eq!(texts[0], texts[1], "{schema}");
    }
    let progress = engine.progress();
    assert!(
        progress.accepted_tokens > 0,
        "what is forced is guessed: {progress:?}"
    );
}

#[test]
fn an_object_of_any_shape_begins_as_one_and_is_cut_only_by_its_length() {
    let engine = engine();
    let mut request = constrained(&engine, "Some JSON about a cat: ", Constraint::JsonObject);
    request.max_tokens = Some(20);
    let found = answer(&engine, request);
    assert!(found.text.starts_with('{'), "{:?}", found.text);
    match found.finished.reason {
        FinishReason::Stop => assert!(serde_json::from_str::<Value>(&found.text).is_ok()),
        FinishReason::Length => assert_eq!(found.finished.completion_tokens, 20),
        other => panic!("{other:?}"),
    }
}

#[test]
fn expressions_and_grammars_hold_among_free_answers() {
    let engine = engine();
    let free = request(tokens(&engine, "Once upon a time"), 30);
    let alone = answer(&engine, free.clone());
    let regex = constrained(
        &engine,
        "My number is ",
        Constraint::Regex("[0-9]{3}-[0-9]{4}".to_owned()),
    );
    let lark = "start: \"yes\" | \"no\" | \"m\u{e4}ybe\"";
    let lark = constrained(&engine, "Is it so? ", Constraint::Lark(lark.to_owned()));
    let asked = [free, regex, lark].map(|request| ask(&engine, request).unwrap());
    let [free, number, word] = asked.map(|asked| asked.wait());
    assert_eq!(free.text, alone.text);
    assert!(
        number.text.len() == 8 && number.text.as_bytes()[3] == b'-',
        "{:?}",
        number.text
    );
    assert!(
        ["yes", "no", "m\u{e4}ybe"].contains(&word.text.as_str()),
        "{:?}",
        word.text
    );
}

#[test]
fn what_cannot_be_followed_is_refused_by_name() {
    let engine = engine();
    for constraint in [
        Constraint::JsonSchema(json!({"type": "colour"})),
        Constraint::JsonSchema(json!({"$ref": "https://example.com/schema"})),
        Constraint::JsonSchema(json!({"type": "integer", "minimum": 5, "maximum": 4})),
        Constraint::JsonSchema(json!(false)),
        Constraint::Regex("(".to_owned()),
        Constraint::Lark("start: missing".to_owned()),
        Constraint::Lark("x".repeat(300 << 10)),
    ] {
        let error = ask(&engine, constrained(&engine, "x", constraint.clone())).err();
        let Some(Reject::InvalidRequest { field, found, .. }) = error else {
            panic!("{constraint:?}: {error:?}");
        };
        assert_eq!(field, "response_format");
        assert!(found.len() < 500, "{found}");
        println!("{found}");
    }
    // It serves on.
    assert_eq!(
        answer(&engine, request(tokens(&engine, "Hello"), 3))
            .finished
            .completion_tokens,
        3
    );
}

#[test]
fn a_fault_in_a_schema_is_told_with_its_place() {
    let engine = engine();
    for (schema, place) in [
        (
            json!({"type": "object", "properties": {"a/b": {"not": {"type": "null"}}}}),
            "#/properties/a~1b/not",
        ),
        (
            json!({"items": {"type": "text"}, "type": "array"}),
            "#/items/type",
        ),
        (
            json!({"anyOf": [{"type": "null"}, {"type": "string", "minLength": -1}]}),
            "#/anyOf/1/minLength",
        ),
        (json!({"type": "array", "uniqueItems": true}), "#/uniqueItems"),
        (
            json!({"properties": {"when": {"type": "string", "format": "moon"}}}),
            "#/properties/when/format",
        ),
    ] {
        let refused = ask(
            &engine,
            constrained(&engine, "x", Constraint::JsonSchema(schema.clone())),
        )
        .err();
        let Some(Reject::InvalidRequest { found, allowed, .. }) = refused else {
            panic!("{schema}: {refused:?}");
        };
        assert!(found.contains(&format!(" at {place} (")), "{schema}: {found}");
        assert!(allowed.contains("patternProperties"), "{allowed}");
    }
}
