//! Structural schemas: prune, default, validate. Values in, values out.
//!
//! The wording of errors is that of the Kubernetes API server, so that people find what they know.

use serde_json::Value;

use crate::cel::Rules;
use crate::error::Cause;
use crate::validate::{self, Patterns};

/// A CRD's schema with what is derived from it once.
pub(crate) struct Structural {
    schema: Value,
    rules: Rules,
    patterns: Patterns,
}

impl std::fmt::Debug for Structural {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Structural").finish_non_exhaustive()
    }
}

impl Structural {
    pub(crate) fn new(schema: Value) -> Self {
        Self {
            rules: Rules::compile(&schema),
            patterns: Patterns::compile(&schema),
            schema,
        }
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

    /// What is wrong with the object, empty when nothing is. What an update leaves as it was in `old` is
    /// not held against it, so that an object from before a stricter schema can still be changed.
    ///
    /// `causes` has what is wrong already: rules are asked only of an object that is whole. What is wrong with
    /// a status that comes through its own door is told as seen from there.
    pub(crate) fn validate(
        &self,
        object: &Value,
        old: Option<&Value>,
        subresource: &str,
        causes: &mut Vec<Cause>,
    ) {
        let mut found = validate::validate(&self.schema, &self.patterns, object, old);
        if !subresource.is_empty() {
            let above = format!("{subresource}.");
            for cause in &mut found {
                let inside = cause.field.strip_prefix(&above).unwrap_or(&cause.field);
                let (whole, inside) = (format!("{} in body", cause.field), format!("{inside} in body"));
                cause.message = cause.message.replace(&whole, &inside);
            }
        }
        causes.append(&mut found);
        // Rules assume that the shape is right.
        let blocking = |cause: &Cause| {
            matches!(
                cause.reason,
                "FieldValueNotSupported"
                    | "FieldValueRequired"
                    | "FieldValueTooLong"
                    | "FieldValueTooMany"
                    | "FieldValueTypeInvalid"
            )
        };
        if !self.rules.is_empty() && causes.iter().any(blocking) {
            causes.push(Cause::new("FieldValueInvalid", "<nil>", NOT_CHECKED));
        } else {
            causes.extend(self.rules.check(object, old));
        }
    }
}

/// What the API server adds when a broken shape kept it from asking the rules.
const NOT_CHECKED: &str = "Invalid value: null: some validation rules were not checked because the object was invalid; correct the existing errors to complete validation";

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

pub(crate) fn flag(schema: &Value, name: &str) -> bool {
    schema.get(name).and_then(Value::as_bool) == Some(true)
}

pub(crate) fn join(path: &str, key: &str) -> String {
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
                let nullable = flag(additional, "nullable");
                object.retain(|key, value| {
                    nullable || !value.is_null() || known.is_some_and(|known| known.contains_key(key))
                });
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
pub(crate) fn value_at<'a>(object: &'a Value, path: &str) -> Option<&'a Value> {
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
