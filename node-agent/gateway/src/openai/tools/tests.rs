//! Calls in every family's syntax, whole and in pieces.

use proptest::prelude::*;

use super::*;

fn tools() -> Tools {
    let body = json!({"tools": [
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "clock"}},
    ]});
    Tools::take(&mut Fields::of(body, "").unwrap()).unwrap()
}

/// The answer in pieces of `size` characters, texts joined.
fn read(answer: &str, size: usize) -> Vec<Piece> {
    let mut parser = tools().parser().unwrap();
    let characters: Vec<char> = answer.chars().collect();
    let mut pieces: Vec<Piece> = characters
        .chunks(size)
        .flat_map(|chunk| parser.push(&chunk.iter().collect::<String>()))
        .collect();
    pieces.extend(parser.finish());
    let called = pieces.iter().any(|piece| matches!(piece, Piece::Call(_)));
    assert_eq!(parser.called(), called);
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        match (joined.last_mut(), piece) {
            (Some(Piece::Text(before)), Piece::Text(text)) => before.push_str(&text),
            (_, piece) => joined.push(piece),
        }
    }
    joined
}

fn text(text: &str) -> Piece {
    Piece::Text(text.to_owned())
}

fn call(name: &str, arguments: &str) -> Piece {
    Piece::Call(Call {
        name: name.to_owned(),
        arguments: arguments.to_owned(),
    })
}

#[test]
fn calls_of_each_family_are_found_however_they_are_cut() {
    let paris = call("weather", r#"{"city":"Paris"}"#);
    let hermes = r#"<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>"#;
    for (answer, expected) in [
        (hermes.to_owned(), vec![paris.clone()]),
        (
            format!("{hermes}\n{hermes}\n"),
            vec![paris.clone(), paris.clone()],
        ),
        (
            format!("I will look.\n\n{hermes}\nThere."),
            vec![text("I will look."), paris.clone(), text("\nThere.")],
        ),
        (hermes.replace("</tool_call>", ""), vec![paris.clone()]),
        (
            r#"{"name": "weather", "parameters": {"city": "Paris"}}"#.to_owned(),
            vec![paris.clone()],
        ),
        (
            r#"<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}"#.to_owned(),
            vec![paris.clone()],
        ),
        (
            r#" [TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "clock"}]"#
                .to_owned(),
            vec![paris.clone(), call("clock", "{}")],
        ),
        (
            "```json\n{\"name\": \"weather\", \"arguments\": \"{\\\"city\\\":\\\"Paris\\\"}\"}\n```"
                .to_owned(),
            vec![paris.clone()],
        ),
        (
            r#"{"type": "function", "function": {"name": "clock", "arguments": {}}}"#.to_owned(),
            vec![call("clock", "{}")],
        ),
        (
            r#"{"name": "weather", "parameters": {"city": "Paris"}}; {"name": "clock", "parameters": {}}"#
                .to_owned(),
            vec![paris.clone(), call("clock", "{}")],
        ),
        (
            r#"weather{"city": "Paris"}clock{}"#.to_owned(),
            vec![paris.clone(), call("clock", "{}")],
        ),
        (
            r#"[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]clock[ARGS]{}"#.to_owned(),
            vec![paris.clone(), call("clock", "{}")],
        ),
    ] {
        for size in [1, 2, 3, 7, 1000] {
            assert_eq!(read(&answer, size), expected, "{answer:?} by {size}");
        }
    }
}

#[test]
fn what_is_no_call_stays_text() {
    for answer in [
        "",
        "It is sunny.",
        "  {\"city\": \"Paris\"}",
        r#"{"name": "delete_everything", "arguments": {}}"#,
        r#"{"name": "weather", "arguments": [1]}"#,
        "<tool_call>{\"name\": \"weather\", </tool_call> and on",
        "<tool_call>{\"name\": \"weather\"",
        "a < b and <tool_",
        "<|python_tag|>print(1)",
        "ends with space \n ",
        "weather is what it is",
        "clock",
        "clock[ARGS]",
        "weather{\"city\": ",
        "clock{} and more",
        "{\"name\": \"clock\"} and more",
    ] {
        let expected = if answer.is_empty() {
            vec![]
        } else {
            vec![text(answer)]
        };
        for size in [1, 4, 1000] {
            assert_eq!(read(answer, size), expected, "{answer:?} by {size}");
        }
    }
}

#[test]
fn one_call_is_given_where_one_is_allowed() {
    let body = json!({"tools": tools().offered, "parallel_tool_calls": false});
    let mut parser = Tools::take(&mut Fields::of(body, "").unwrap())
        .unwrap()
        .parser()
        .unwrap();
    let block = "<tool_call>{\"name\": \"clock\"}</tool_call>";
    let mut found = parser.push(&format!("{block}{block}"));
    found.extend(parser.push("[{\"name\": \"clock\"}]"));
    found.extend(parser.finish());
    let calls = found.iter().filter(|piece| matches!(piece, Piece::Call(_)));
    assert_eq!(calls.count(), 1, "{found:?}");
    assert!(parser.called());
}

#[test]
fn references_within_parameters_still_lead_there() {
    let parameters = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/city"}, "again": {"$ref": "#"}, "$ref": {"type": "null"}},
        "$defs": {"city": {"enum": ["Paris"]}},
    });
    let tool = json!({"function": {"name": "go", "parameters": parameters}});
    let schema = json!({"anyOf": [call_schema((0, &json!({}))), call_schema((1, &tool))]});
    let arguments = &schema["anyOf"][1]["properties"]["arguments"];
    let target = |name: &str| {
        let reference = arguments["properties"][name]["$ref"].as_str().unwrap();
        schema.pointer(reference.strip_prefix('#').unwrap()).unwrap()
    };
    assert_eq!(target("from"), &json!({"enum": ["Paris"]}));
    assert_eq!(target("again"), arguments);
    assert_eq!(arguments["properties"]["$ref"], json!({"type": "null"}));
    assert!(arguments.get("$schema").is_none());
}

#[test]
fn a_demanded_call_becomes_a_schema() {
    let take = |choice: Value| {
        let body = json!({"tools": tools().offered, "tool_choice": choice});
        Tools::take(&mut Fields::of(body, "").unwrap())
    };
    let schema = |tools: Tools| match tools.constraint {
        Some(ConstraintInput::JsonSchema { schema }) => schema["anyOf"].as_array().unwrap().len(),
        _ => 0,
    };
    assert_eq!(schema(take(json!("required")).unwrap()), 2);
    assert_eq!(
        schema(take(json!({"type": "function", "function": {"name": "clock"}})).unwrap()),
        1
    );
    assert_eq!(schema(take(json!("auto")).unwrap()), 0);
    assert_eq!(take(json!("none")).unwrap(), Tools::default());
    let error = take(json!({"type": "function", "function": {"name": "x"}})).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("tool_choice.function.name"));
    assert!(take(json!("sometimes")).is_err());
}

proptest! {
    /// Text is never lost, but for space around calls.
    #[test]
    fn nothing_is_lost(parts in prop::collection::vec(prop_oneof![
        Just("<tool_call>".to_owned()), Just("</tool_call>".to_owned()), Just("{\"name\": \"clock\"}".to_owned()),
        Just(" \n".to_owned()), Just("clock".to_owned()), Just("[ARGS]".to_owned()), Just("{}".to_owned()),
        "[a-z<>{}\\[\\]|`é]{0,6}"], 0..8), size in 1_usize..9)
    {
        let answer = parts.concat();
        let found = read(&answer, size);
        prop_assert_eq!(&found, &read(&answer, 1000));
        if !found.iter().any(|piece| matches!(piece, Piece::Call(_))) {
            let joined: String = found.iter().map(|piece| match piece {
                Piece::Text(text) => text.as_str(),
                Piece::Call(_) => "",
            }).collect();
            prop_assert_eq!(joined, answer);
        }
    }
}
