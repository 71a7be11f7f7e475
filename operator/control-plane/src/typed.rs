//! Whether an applied configuration has the types of its schema.
//!
//! Server-side apply refuses what it cannot lay over the live object: a field that is not declared, a value
//! of another type, two items of a list with one identity. The wording is that of the API server.

use serde_json::{Map, Value};

use crate::fields::{field_schema, is_declared, item_element, item_schema, written};
use crate::schema::{ListKeys, flag, list_keys};

/// Checks the whole object.
///
/// # Errors
/// Everything that does not fit, as the API server writes it.
pub(crate) fn check(schema: &Value, object: &Value) -> Result<(), String> {
    let mut errors = Vec::new();
    walk(Some(schema), object, "", &mut errors);
    match errors.as_slice() {
        [] => Ok(()),
        [error] => Err(error.clone()),
        several => Err(format!("errors:\n  {}", several.join("\n  "))),
    }
}

fn walk(schema: Option<&Value>, value: &Value, path: &str, errors: &mut Vec<String>) {
    let Some(schema) = schema else { return };
    if value.is_null() {
        return;
    }
    if flag(schema, "x-kubernetes-int-or-string") {
        if !value.is_number() && !value.is_string() {
            errors.push(format!("{path}: expected any scalar, got {}", boxed(value)));
        }
        return;
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("integer" | "number") if !value.is_number() => {
            let found = go_type(value);
            errors.push(format!("{path}: expected numeric (int or float), got {found}"));
        }
        Some("string") if !value.is_string() => {
            let found = go_literal(value);
            errors.push(format!(
                "{path}: expected string, got &value.valueUnstructured{{Value:{found}}}"
            ));
        }
        Some("boolean") if !value.is_boolean() => {
            errors.push(format!("{path}: expected boolean, got {}", boxed(value)));
        }
        Some("array") => match value {
            Value::Array(items) => list(schema, items, path, errors),
            _ => errors.push(format!("{path}: expected list, got {}", boxed(value))),
        },
        Some("object") => match value {
            Value::Object(object) => map(schema, object, path, errors),
            _ => errors.push(format!("{path}: expected map, got {}", boxed(value))),
        },
        _ => {}
    }
}

fn map(schema: &Value, object: &Map<String, Value>, path: &str, errors: &mut Vec<String>) {
    let open = flag(schema, "x-kubernetes-preserve-unknown-fields")
        || flag(schema, "x-kubernetes-embedded-resource")
        || schema.get("additionalProperties").is_some();
    for (name, value) in object {
        if !is_declared(Some(schema), name) && !open {
            errors.push(format!("{path}.{name}: field not declared in schema"));
            continue;
        }
        walk(
            field_schema(Some(schema), name),
            value,
            &format!("{path}.{name}"),
            errors,
        );
    }
}

fn list(schema: &Value, items: &[Value], path: &str, errors: &mut Vec<String>) {
    let keys = list_keys(schema);
    let mut seen = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let at = match &keys {
            ListKeys::Atomic => format!("{path}[{index}]"),
            keys => {
                if let Err(why) = identifiable(keys, schema, item) {
                    errors.push(format!("{path}: element {index}: {why}"));
                    continue;
                }
                let element = item_element(item_schema(Some(schema)), item, keys);
                let shown = written(&element);
                if seen.contains(&element) {
                    errors.push(format!("{path}: duplicate entries for key {shown}"));
                    continue;
                }
                seen.push(element);
                format!("{path}{shown}")
            }
        };
        walk(item_schema(Some(schema)), item, &at, errors);
    }
}

/// Whether an item can be told apart from others.
fn identifiable(keys: &ListKeys, schema: &Value, item: &Value) -> Result<(), String> {
    match keys {
        ListKeys::Atomic => Ok(()),
        ListKeys::Set => match item {
            Value::Object(_) => {
                Err("associative list without keys has an element that's a map type".to_owned())
            }
            Value::Array(_) => Err("not supported: associative list with lists as elements".to_owned()),
            Value::Null => {
                Err("associative list without keys has an element that's an explicit null".to_owned())
            }
            _ => Ok(()),
        },
        ListKeys::Map(names) => {
            let Some(item) = item.as_object() else {
                let what = if item.is_null() {
                    "a null element"
                } else {
                    "non-map elements"
                };
                return Err(format!("associative list with keys may not have {what}"));
            };
            let absent: Vec<&String> = names
                .iter()
                .filter(|name| !item.contains_key(*name))
                .filter(|name| {
                    let field = field_schema(item_schema(Some(schema)), name);
                    field.and_then(|field| field.get("default")).is_none()
                })
                .collect();
            if absent.is_empty() || absent.len() < names.len() {
                return Ok(());
            }
            Err(format!(
                "associative list with keys has an element that omits all key fields {names:?} (and doesn't have default values for any key fields)"
            ))
        }
    }
}

/// The type of a decoded value, as Go names it.
fn go_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "<nil>",
        Value::Bool(_) => "bool",
        Value::Number(number) if number.is_f64() => "float64",
        Value::Number(_) => "int64",
        Value::String(_) => "string",
        Value::Array(_) => "[]interface {}",
        Value::Object(_) => "map[string]interface {}",
    }
}

/// A value as Go writes it plainly.
fn go_plain(value: &Value) -> String {
    match value {
        Value::Null => "<nil>".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(go_plain).collect();
            format!("[{}]", items.join(" "))
        }
        Value::Object(object) => {
            let fields = object.iter().map(|(k, v)| format!("{k}:{}", go_plain(v)));
            format!("map[{}]", fields.collect::<Vec<_>>().join(" "))
        }
        other => other.to_string(),
    }
}

/// A value as Go writes it in source.
fn go_literal(value: &Value) -> String {
    match value {
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(go_literal).collect();
            format!("[]interface {{}}{{{}}}", items.join(", "))
        }
        Value::Object(object) => {
            let fields = object.iter().map(|(k, v)| format!("{k:?}:{}", go_literal(v)));
            let fields: Vec<String> = fields.collect();
            format!("map[string]interface {{}}{{{}}}", fields.join(", "))
        }
        Value::String(text) => format!("{text:?}"),
        other => go_plain(other),
    }
}

fn boxed(value: &Value) -> String {
    format!("&{{{}}}", go_plain(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_does_not_fit_the_schema_is_told_with_its_path() {
        let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
            "size": {"type": "integer"}, "color": {"type": "string"}, "on": {"type": "boolean"},
            "port": {"x-kubernetes-int-or-string": true},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "tags": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
            "parts": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
                "items": {"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}}},
        }}}});
        for (spec, error) in [
            (
                json!({"size": "x"}),
                ".spec.size: expected numeric (int or float), got string",
            ),
            (
                json!({"size": null, "free": {"a": [1]}, "port": 1, "labels": {"a": "b"}}),
                "",
            ),
            (
                json!({"color": 5}),
                ".spec.color: expected string, got &value.valueUnstructured{Value:5}",
            ),
            (json!({"on": "yes"}), ".spec.on: expected boolean, got &{yes}"),
            (
                json!({"port": true}),
                ".spec.port: expected any scalar, got &{true}",
            ),
            (json!({"labels": [1]}), ".spec.labels: expected map, got &{[1]}"),
            (
                json!({"labels": {"a": 1}}),
                ".spec.labels.a: expected string, got &value.valueUnstructured{Value:1}",
            ),
            (
                json!({"parts": {"a": 1}}),
                ".spec.parts: expected list, got &{map[a:1]}",
            ),
            (
                json!({"colour": "red"}),
                ".spec.colour: field not declared in schema",
            ),
            (
                json!({"tags": ["a", "a"]}),
                ".spec.tags: duplicate entries for key [=\"a\"]",
            ),
            (
                json!({"tags": [{}]}),
                ".spec.tags: element 0: associative list without keys has an element that's a map type",
            ),
            (
                json!({"parts": [{"name": "a"}, {"name": "a"}]}),
                ".spec.parts: duplicate entries for key [name=\"a\"]",
            ),
            (
                json!({"parts": [{"n": 1}]}),
                ".spec.parts: element 0: associative list with keys has an element that omits all key fields [\"name\"] (and doesn't have default values for any key fields)",
            ),
            (
                json!({"parts": [{"name": "a", "n": "b"}]}),
                ".spec.parts[name=\"a\"].n: expected numeric (int or float), got string",
            ),
            (
                json!({"color": 5, "size": []}),
                "errors:\n  .spec.color: expected string, got &value.valueUnstructured{Value:5}\n  .spec.size: expected numeric (int or float), got []interface {}",
            ),
        ] {
            let found = check(&schema, &json!({"spec": spec})).err().unwrap_or_default();
            assert_eq!(found, error);
        }
    }
}
