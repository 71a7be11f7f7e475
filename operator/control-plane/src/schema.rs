//! Structural schemas: prune, default, validate. Values in, values out.
//!
//! The wording of errors is that of the Kubernetes API server, so that people find what they know.

use std::collections::BTreeSet;

use kube_cel::{CompiledSchema, Validator, compile_schema};
use regex::Regex;
use serde_json::{Map, Value};

use crate::error::Cause;

/// A CRD's schema with what is derived from it once.
pub(crate) struct Structural {
    schema: Value,
    rules: CompiledSchema,
}

impl std::fmt::Debug for Structural {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Structural").finish_non_exhaustive()
    }
}

impl Structural {
    pub(crate) fn new(schema: Value) -> Self {
        let rules = compile_schema(&schema);
        Self { schema, rules }
    }

    /// The schema as it stands in the CRD.
    pub(crate) fn schema(&self) -> &Value {
        &self.schema
    }

    /// Removes fields that the schema does not know and gives their paths.
    pub(crate) fn prune(&self, object: &mut Value) -> Vec<String> {
        let mut unknown = Vec::new();
        if let Some(object) = object.as_object_mut() {
            let properties = self.schema.get("properties").and_then(Value::as_object);
            let known = |key: &str| matches!(key, "apiVersion" | "kind" | "metadata");
            let keys: Vec<String> = object.keys().filter(|key| !known(key)).cloned().collect();
            for key in keys {
                match (properties.and_then(|p| p.get(&key)), object.get_mut(&key)) {
                    (Some(schema), Some(value)) => prune(schema, value, &key, &mut unknown),
                    _ => {
                        object.remove(&key);
                        unknown.push(key);
                    }
                }
            }
            if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
                let keys: Vec<String> = metadata
                    .keys()
                    .filter(|k| !METADATA_FIELDS.contains(&k.as_str()))
                    .cloned()
                    .collect();
                for key in keys {
                    metadata.remove(&key);
                    unknown.push(format!("metadata.{key}"));
                }
            }
        }
        unknown
    }

    /// Fills in defaults.
    pub(crate) fn default(&self, object: &mut Value) {
        default(&self.schema, object);
    }

    /// What is wrong with the object, empty when nothing is. `old` makes transition rules hold.
    pub(crate) fn validate(&self, object: &Value, old: Option<&Value>) -> Vec<Cause> {
        let mut causes = Vec::new();
        validate(&self.schema, object, "", &mut causes);
        // Rules assume that the shape is right; the API server also stops before them.
        if causes.is_empty()
            && let Err(errors) = Validator::new().validate_compiled(&self.rules, object, old)
        {
            for error in errors.into_iter() {
                let found = value_at(object, &error.field_path);
                let message = format!(
                    "Invalid value: {}: {}",
                    brief(found.unwrap_or(&Value::Null)),
                    error.message
                );
                causes.push(Cause::new("FieldValueInvalid", error.field_path.clone(), message));
            }
        }
        causes
    }
}

/// Fields of ObjectMeta.
const METADATA_FIELDS: &[&str] = &[
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "labels",
    "managedFields",
    "name",
    "namespace",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];

fn flag(schema: &Value, name: &str) -> bool {
    schema.get(name).and_then(Value::as_bool) == Some(true)
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

fn prune(schema: &Value, value: &mut Value, path: &str, unknown: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            let properties = schema.get("properties").and_then(Value::as_object);
            let additional = schema.get("additionalProperties").filter(|a| a.is_object());
            let keep = flag(schema, "x-kubernetes-preserve-unknown-fields")
                || schema.get("additionalProperties").and_then(Value::as_bool) == Some(true)
                || flag(schema, "x-kubernetes-embedded-resource");
            let keys: Vec<String> = object.keys().cloned().collect();
            for key in keys {
                let child = properties.and_then(|p| p.get(&key)).or(additional);
                match (child, object.get_mut(&key)) {
                    (Some(child), Some(value)) => prune(child, value, &join(path, &key), unknown),
                    _ if keep => {}
                    _ => {
                        object.remove(&key);
                        unknown.push(join(path, &key));
                    }
                }
            }
        }
        Value::Array(items) => {
            if let Some(child) = schema.get("items") {
                for (index, item) in items.iter_mut().enumerate() {
                    prune(child, item, &format!("{path}[{index}]"), unknown);
                }
            }
        }
        _ => {}
    }
}

fn default(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(object) => {
            if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
                for (key, child) in properties {
                    let absent = match object.get(key) {
                        None => true,
                        // An explicit null where none is allowed counts as absent, as in the API server.
                        Some(Value::Null) => !flag(child, "nullable"),
                        Some(_) => false,
                    };
                    if absent {
                        match child.get("default") {
                            Some(default) => {
                                object.insert(key.clone(), default.clone());
                            }
                            None => {
                                if object.get(key).is_some() {
                                    object.remove(key);
                                }
                            }
                        }
                    }
                    if let Some(value) = object.get_mut(key) {
                        default(child, value);
                    }
                }
            }
            if let Some(additional) = schema.get("additionalProperties").filter(|a| a.is_object()) {
                let known = schema.get("properties").and_then(Value::as_object);
                for (key, value) in object.iter_mut() {
                    if known.is_none_or(|k| !k.contains_key(key)) {
                        default(additional, value);
                    }
                }
            }
        }
        Value::Array(items) => {
            if let Some(child) = schema.get("items") {
                for item in items {
                    default(child, item);
                }
            }
        }
        _ => {}
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_i64() || n.is_u64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// A value in an error: short ones whole, long ones by their type.
fn brief(value: &Value) -> String {
    match value {
        Value::Object(_) => "\"object\"".to_owned(),
        Value::Array(_) => "\"array\"".to_owned(),
        other => other.to_string(),
    }
}

fn type_matches(schema: &Value, value: &Value) -> bool {
    if flag(schema, "x-kubernetes-int-or-string") {
        return matches!(type_name(value), "integer" | "string");
    }
    match schema.get("type").and_then(Value::as_str) {
        None => true,
        Some("number") => value.is_number(),
        Some("integer") => {
            type_name(value) == "integer" || value.as_f64().is_some_and(|number| number.fract() == 0.0)
        }
        Some(wanted) => wanted == type_name(value),
    }
}

fn validate(schema: &Value, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    let at = if path.is_empty() { "<nil>" } else { path };
    let mut invalid = |what: String| {
        let message = format!("Invalid value: {}: {at} in body {what}", brief(value));
        causes.push(Cause::new("FieldValueInvalid", at, message));
    };
    if value.is_null() && flag(schema, "nullable") {
        return;
    }
    if !type_matches(schema, value) {
        let wanted = schema
            .get("type")
            .and_then(Value::as_str)
            .unwrap_or("integer or string");
        let message = format!(
            "Invalid value: {:?}: {at} in body must be of type {wanted}: {:?}",
            type_name(value),
            type_name(value)
        );
        causes.push(Cause::new("FieldValueTypeInvalid", at, message));
        return;
    }
    let number = |name: &str| schema.get(name).and_then(Value::as_f64);
    if let Some(found) = value.as_f64().filter(|_| value.is_number()) {
        if let Some(least) = number("minimum").filter(|least| found < *least) {
            invalid(format!("should be greater than or equal to {least}"));
        }
        if let Some(most) = number("maximum").filter(|most| found > *most) {
            invalid(format!("should be less than or equal to {most}"));
        }
    }
    if let Some(text) = value.as_str() {
        let length = text.chars().count() as f64;
        if let Some(least) = number("minLength").filter(|least| length < *least) {
            invalid(format!("should be at least {least} chars long"));
        }
        if let Some(most) = number("maxLength").filter(|most| length > *most) {
            invalid(format!("should be at most {most} chars long"));
        }
        if let Some(pattern) = schema.get("pattern").and_then(Value::as_str)
            && Regex::new(pattern).is_ok_and(|regex| !regex.is_match(text))
        {
            invalid(format!("should match '{pattern}'"));
        }
    }
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
        && !allowed.contains(value)
    {
        let supported: Vec<String> = allowed.iter().map(Value::to_string).collect();
        let message = format!(
            "Unsupported value: {}: supported values: {}",
            brief(value),
            supported.join(", ")
        );
        causes.push(Cause::new("FieldValueNotSupported", at, message));
    }
    match value {
        Value::Object(object) => validate_object(schema, object, path, causes),
        Value::Array(items) => validate_array(schema, items, path, causes),
        _ => {}
    }
}

fn validate_object(schema: &Value, object: &Map<String, Value>, path: &str, causes: &mut Vec<Cause>) {
    for required in schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        let name = required.as_str().unwrap_or_default();
        if !object.contains_key(name) {
            causes.push(Cause::new(
                "FieldValueRequired",
                join(path, name),
                "Required value",
            ));
        }
    }
    let properties = schema.get("properties").and_then(Value::as_object);
    let additional = schema.get("additionalProperties").filter(|a| a.is_object());
    for (key, value) in object {
        if path.is_empty() && matches!(key.as_str(), "metadata" | "apiVersion" | "kind") {
            continue;
        }
        if let Some(child) = properties.and_then(|p| p.get(key)).or(additional) {
            validate(child, value, &join(path, key), causes);
        }
    }
}

fn validate_array(schema: &Value, items: &[Value], path: &str, causes: &mut Vec<Cause>) {
    let limit = |name: &str| schema.get(name).and_then(Value::as_u64);
    let count = items.len() as u64;
    if let Some(least) = limit("minItems").filter(|least| count < *least) {
        let message = format!("Invalid value: {count}: {path} in body should have at least {least} items");
        causes.push(Cause::new("FieldValueInvalid", path, message));
    }
    if let Some(most) = limit("maxItems").filter(|most| count > *most) {
        let message = format!("Too many: {count}: must have at most {most} items");
        causes.push(Cause::new("FieldValueTooMany", path, message));
        return;
    }
    if let Some(child) = schema.get("items") {
        for (index, item) in items.iter().enumerate() {
            validate(child, item, &format!("{path}[{index}]"), causes);
        }
    }
    let keys = list_keys(schema);
    let mut seen = BTreeSet::new();
    for (index, item) in items.iter().enumerate() {
        let identity = match keys {
            ListKeys::Map(ref keys) => Value::Object(
                keys.iter()
                    .filter_map(|k| Some((k.clone(), item.get(k)?.clone())))
                    .collect(),
            ),
            ListKeys::Set => item.clone(),
            ListKeys::Atomic => return,
        };
        if !seen.insert(identity.to_string()) {
            let message = format!("Duplicate value: {identity}");
            causes.push(Cause::new(
                "FieldValueDuplicate",
                format!("{path}[{index}]"),
                message,
            ));
        }
    }
}

/// How the items of a list are told apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ListKeys {
    /// The list is one value.
    Atomic,
    /// Each item is its own identity.
    Set,
    /// These fields identify an item.
    Map(Vec<String>),
}

/// How the items of the list that `schema` describes are told apart.
pub(crate) fn list_keys(schema: &Value) -> ListKeys {
    match schema.get("x-kubernetes-list-type").and_then(Value::as_str) {
        Some("set") => ListKeys::Set,
        Some("map") => {
            let keys = schema.get("x-kubernetes-list-map-keys").and_then(Value::as_array);
            ListKeys::Map(
                keys.into_iter()
                    .flatten()
                    .filter_map(|k| k.as_str().map(str::to_owned))
                    .collect(),
            )
        }
        _ => ListKeys::Atomic,
    }
}

/// The value at a path such as `spec.checks[0].name`.
fn value_at<'a>(object: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.')
        .filter(|part| !part.is_empty())
        .try_fold(object, |value, part| {
            let (name, rest) = part.split_once('[').unwrap_or((part, ""));
            let value = if name.is_empty() { value } else { value.get(name)? };
            rest.split('[')
                .filter(|r| !r.is_empty())
                .try_fold(value, |value, index| {
                    value.get(index.trim_end_matches(']').parse::<usize>().ok()?)
                })
        })
}
