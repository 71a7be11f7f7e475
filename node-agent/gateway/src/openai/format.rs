//! `response_format` and `structured_outputs`: what the answer must look like.
//!
//! The first is OpenAI's; the second is vLLM's, for what OpenAI's API has no word for: regular expressions,
//! a choice of texts, and grammars.

use serde_json::Value;

use super::fields::{Fields, type_of, wrong_type};
use crate::error::ApiError;
use crate::worker::ConstraintInput;

/// Most texts to choose from.
const CHOICES_LIMIT: usize = 1024;

/// Takes both fields; one of them at most may ask for something.
pub(super) fn take(fields: &mut Fields) -> Result<Option<ConstraintInput>, ApiError> {
    match (take_response_format(fields)?, take_structured_outputs(fields)?) {
        (Some(_), Some(_)) => Err(ApiError::invalid(
            "structured_outputs",
            "structured_outputs and response_format both ask for a form; send one of them",
        )),
        (one, other) => Ok(one.or(other)),
    }
}

fn take_response_format(fields: &mut Fields) -> Result<Option<ConstraintInput>, ApiError> {
    let Some(format) = fields.take("response_format") else {
        return Ok(None);
    };
    if !format.is_object() {
        return Err(ApiError::invalid(
            "response_format",
            format!(
                "response_format is {} and must be an object with a type",
                type_of(&format)
            ),
        ));
    }
    let mut format = Fields::of(format, "response_format")?;
    match format.string("type")?.as_deref() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(ConstraintInput::JsonObject)),
        Some("json_schema") => {
            let mut named = Fields::of(format.required("json_schema")?, "response_format.json_schema")?;
            let path = named.at("schema");
            let schema = schema(named.required("schema")?, &path)?;
            // Schemas are always followed strictly, and need no name here.
            named.ignore(&["name", "description", "strict"]);
            named.finish()?;
            format.finish()?;
            Ok(Some(schema))
        }
        Some(kind) => {
            let kind: String = kind.chars().take(100).collect();
            Err(ApiError::invalid(
                "response_format.type",
                format!("response_format.type is {kind:?} and must be text, json_object or json_schema"),
            ))
        }
        None => Err(ApiError::invalid(
            "response_format.type",
            "response_format.type is missing; it must be text, json_object or json_schema",
        )),
    }
}

/// A schema: an object, or `true` for anything.
fn schema(schema: Value, path: &str) -> Result<ConstraintInput, ApiError> {
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(ConstraintInput::JsonSchema { schema }),
        other => Err(wrong_type(path, &other, "a JSON schema, which is an object")),
    }
}

fn take_structured_outputs(fields: &mut Fields) -> Result<Option<ConstraintInput>, ApiError> {
    let Some(asked) = fields.take("structured_outputs") else {
        return Ok(None);
    };
    let mut asked = Fields::of(asked, "structured_outputs")?;
    let mut found = Vec::new();
    match asked.take("json") {
        None => {}
        // vLLM's clients send schemas as text too.
        Some(Value::String(text)) => {
            let parsed = serde_json::from_str(&text).map_err(|error| {
                ApiError::invalid(
                    "structured_outputs.json",
                    format!("structured_outputs.json is text that is no JSON: {error}"),
                )
            })?;
            found.push(schema(parsed, "structured_outputs.json")?);
        }
        Some(value) => found.push(schema(value, "structured_outputs.json")?),
    }
    if let Some(regex) = asked.string("regex")? {
        found.push(ConstraintInput::Regex { regex });
    }
    if let Some(lark) = asked.string("grammar")? {
        found.push(ConstraintInput::Lark { lark });
    }
    if let Some(choices) = asked.take("choice") {
        found.push(choice(choices)?);
    }
    asked.finish()?;
    match (found.pop(), found.is_empty()) {
        (Some(one), true) => Ok(Some(one)),
        _ => Err(ApiError::invalid(
            "structured_outputs",
            "structured_outputs must hold exactly one of json, regex, choice and grammar",
        )),
    }
}

/// One of some texts.
fn choice(choices: Value) -> Result<ConstraintInput, ApiError> {
    let path = "structured_outputs.choice";
    let Value::Array(choices) = choices else {
        return Err(wrong_type(path, &choices, "an array of strings"));
    };
    if choices.is_empty() || choices.len() > CHOICES_LIMIT {
        return Err(ApiError::invalid(
            path,
            format!(
                "{path} has {} texts and must have 1 to {CHOICES_LIMIT}",
                choices.len()
            ),
        ));
    }
    let mut texts = Vec::new();
    for (index, text) in choices.into_iter().enumerate() {
        match text {
            Value::String(text) => texts.push(Value::String(text).to_string()),
            other => return Err(wrong_type(&format!("{path}[{index}]"), &other, "a string")),
        }
    }
    // A JSON string is a string of Lark.
    Ok(ConstraintInput::Lark {
        lark: format!("start: {}", texts.join(" | ")),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<Option<ConstraintInput>, ApiError> {
        take(&mut Fields::of(body, "").unwrap())
    }

    #[test]
    fn both_apis_ways_of_asking_are_read() {
        let schema = json!({"type": "object", "properties": {"b": {}, "a": {}}});
        let wanted = Some(ConstraintInput::JsonSchema {
            schema: schema.clone(),
        });
        let format = json!({"response_format": {"type": "json_schema",
            "json_schema": {"name": "x", "strict": true, "schema": schema}}});
        assert_eq!(read(format).unwrap(), wanted);
        assert_eq!(
            read(json!({"structured_outputs": {"json": schema}})).unwrap(),
            wanted
        );
        let text = json!({"structured_outputs": {"json": schema.to_string()}});
        assert_eq!(read(text).unwrap(), wanted);
        assert_eq!(read(json!({"response_format": {"type": "text"}})).unwrap(), None);
        let lark = "start: \"yes\" | \"no\\n\"".to_owned();
        assert_eq!(
            read(json!({"structured_outputs": {"choice": ["yes", "no\n"]}})).unwrap(),
            Some(ConstraintInput::Lark { lark })
        );
    }

    #[test]
    fn faults_are_told_by_field() {
        for (body, field) in [
            (
                json!({"response_format": {"type": "yaml"}}),
                "response_format.type",
            ),
            (json!({"response_format": {}}), "response_format.type"),
            (
                json!({"response_format": {"type": "json_schema"}}),
                "response_format.json_schema",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}),
                "response_format.json_schema.schema",
            ),
            (json!({"structured_outputs": {}}), "structured_outputs"),
            (
                json!({"structured_outputs": {"regex": "a", "json": {}}}),
                "structured_outputs",
            ),
            (
                json!({"structured_outputs": {"choice": []}}),
                "structured_outputs.choice",
            ),
            (
                json!({"structured_outputs": {"choice": [1]}}),
                "structured_outputs.choice[0]",
            ),
        ] {
            let error = read(body.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(field), "{body}");
        }
    }
}
