//! Checks of `metadata` that hold for every kind. The wording is that of the API server.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;

use crate::error::{ApiError, Cause};

/// A random name behind `generateName`.
pub(crate) fn generated_name(body: &Value) -> Option<String> {
    let prefix = body
        .pointer("/metadata/generateName")
        .and_then(Value::as_str)
        .filter(|p| !p.is_empty())?;
    // Five letters, as in Kubernetes; enough because a clash is answered with AlreadyExists. What is made is
    // never longer than a label, so that it can be one.
    let random = uuid::Uuid::new_v4().simple().to_string();
    let prefix: String = prefix.chars().take(63 - 5).collect();
    Some(format!("{prefix}{}", random.get(..5)?))
}

/// Names are DNS subdomains, those of namespaces DNS labels.
pub(crate) fn check_name(kind: &str, name: &str) -> Result<(), Cause> {
    let label = |label: &str| {
        let inside = label
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        !label.is_empty() && inside && !label.starts_with('-') && !label.ends_with('-')
    };
    let invalid = |rule: &str| {
        let message = format!("Invalid value: {name:?}: {rule}");
        Err(Cause::new("FieldValueInvalid", "metadata.name", message))
    };
    if kind == "Namespace" && name.contains('.') {
        return invalid("must not contain dots");
    }
    if kind != "Namespace" && name.len() > 253 {
        return invalid("must be no more than 253 characters");
    }
    let (valid, rule) = if kind == "Namespace" {
        (
            name.len() <= 63 && label(name),
            "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')",
        )
    } else {
        (
            name.split('.').all(label),
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')",
        )
    };
    if valid { Ok(()) } else { invalid(rule) }
}

/// Metadata of a wrong type is refused before anything looks into it.
pub(crate) fn check_types(body: &Value) -> Result<(), ApiError> {
    let Some(metadata) = body.get("metadata") else {
        return Ok(());
    };
    ObjectMeta::deserialize(metadata)
        .map(drop)
        .map_err(|error| ApiError::bad_request(format!("metadata cannot be handled as ObjectMeta: {error}")))
}

/// Empty maps and lists say nothing, and are not kept.
pub(crate) fn tidy(object: &mut Value) {
    let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else {
        return;
    };
    metadata.retain(|_, value| match value {
        Value::Null => false,
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::String(_) | Value::Number(_) | Value::Bool(_) => true,
    });
}

/// What is wrong with the labels, and with finalizers that are added too late.
pub(crate) fn check(object: &Value, old: Option<&Value>) -> Vec<Cause> {
    let mut causes = Vec::new();
    let labels = object.pointer("/metadata/labels").and_then(Value::as_object);
    for (key, value) in labels.into_iter().flatten() {
        let mut errors = label_key_errors(key);
        errors.extend(value.as_str().and_then(label_value_error));
        for message in errors {
            causes.push(Cause::new("FieldValueInvalid", "metadata.labels", message));
        }
    }
    let annotations = object.pointer("/metadata/annotations").and_then(Value::as_object);
    for (key, _) in annotations.into_iter().flatten() {
        // Letters of any case are as good: annotations need not be labels.
        for message in label_key_errors(&key.to_lowercase()) {
            let message = message.replacen(&format!("{:?}", key.to_lowercase()), &format!("{key:?}"), 1);
            causes.push(Cause::new("FieldValueInvalid", "metadata.annotations", message));
        }
    }
    causes.extend(check_owners(object));
    let finalizers = |object: &Value| -> Vec<String> {
        let list = object.pointer("/metadata/finalizers").and_then(Value::as_array);
        let texts = list.into_iter().flatten().filter_map(Value::as_str);
        texts.map(str::to_owned).collect()
    };
    for finalizer in finalizers(object) {
        for message in label_key_errors(&finalizer) {
            causes.push(Cause::new("FieldValueInvalid", "metadata.finalizers", message));
        }
    }
    if let Some(old) = old.filter(|old| old.pointer("/metadata/deletionTimestamp").is_some()) {
        let before = finalizers(old);
        let added: Vec<String> = finalizers(object)
            .into_iter()
            .filter(|finalizer| !before.contains(finalizer))
            .collect();
        if !added.is_empty() {
            let message = format!(
                "Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
                added
                    .iter()
                    .map(|f| format!("{f:?}"))
                    .collect::<Vec<_>>()
                    .join(", ")
            );
            causes.push(Cause::new("FieldValueForbidden", "metadata.finalizers", message));
        }
    }
    causes
}

/// Finalizers of one's own carry one's domain, or may be taken for those of others.
pub(crate) fn finalizer_warnings(object: &Value) -> impl Iterator<Item = String> {
    let list = object.pointer("/metadata/finalizers").and_then(Value::as_array);
    let plain = list
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .filter(|name| !name.contains('/'));
    plain.map(|name| {
        format!("metadata.finalizers: {name:?}: prefer a domain-qualified finalizer name to avoid accidental conflicts with other finalizer writers")
    })
}

/// Built-in kinds take no finalizer that is neither qualified nor one of Kubernetes' own.
pub(crate) fn check_standard_finalizers(object: &Value) -> Vec<Cause> {
    let list = object.pointer("/metadata/finalizers").and_then(Value::as_array);
    let named = list
        .into_iter()
        .flatten()
        .enumerate()
        .filter_map(|(at, name)| Some((at, name.as_str()?)));
    let strange = named.filter(|(_, name)| {
        !name.contains('/') && !matches!(*name, "kubernetes" | "orphan" | "foregroundDeletion")
    });
    strange
        .map(|(at, name)| {
            let message = format!(
                "Invalid value: {name:?}: name is neither a standard finalizer name nor is it fully qualified"
            );
            Cause::new("FieldValueInvalid", format!("metadata.finalizers[{at}]"), message)
        })
        .collect()
}

/// What is wrong with the references to owners.
fn check_owners(object: &Value) -> Vec<Cause> {
    let owners = object
        .pointer("/metadata/ownerReferences")
        .and_then(Value::as_array);
    let owners: Vec<&Value> = owners.into_iter().flatten().collect();
    let text = |owner: &Value, field: &str| -> String {
        let text = owner.get(field).and_then(Value::as_str);
        text.unwrap_or_default().to_owned()
    };
    let mut causes = Vec::new();
    for owner in &owners {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if text(owner, field).is_empty() {
                let what = if field == "apiVersion" {
                    "version must not be empty"
                } else {
                    "must not be empty"
                };
                let message = format!("Invalid value: \"\": {what}");
                let at = format!("metadata.ownerReferences.{field}");
                causes.push(Cause::new("FieldValueInvalid", at, message));
            }
        }
    }
    let controls = |owner: &&&Value| owner.get("controller") == Some(&Value::Bool(true));
    let controllers: Vec<String> = owners
        .iter()
        .filter(controls)
        .map(|owner| format!("{}/{}", text(owner, "kind"), text(owner, "name")))
        .collect();
    if let [first, second, ..] = controllers.as_slice() {
        let found = Value::from(owners.into_iter().cloned().collect::<Vec<_>>());
        let message = format!(
            "Invalid value: {found}: Only one reference can have Controller set to true. Found \"true\" in references for {first} and {second}"
        );
        causes.push(Cause::new(
            "FieldValueInvalid",
            "metadata.ownerReferences",
            message,
        ));
    }
    causes
}

/// What is wrong with a label's key.
pub(crate) fn label_key_errors(key: &str) -> Vec<String> {
    let mut errors = Vec::new();
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    const NAME: &str = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
    let mut wrong = |what: &str| errors.push(format!("Invalid value: {key:?}: {what}"));
    if name.contains('/') {
        wrong(&format!(
            "a valid label key {NAME} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
        ));
        return errors;
    }
    if prefix == Some("") {
        wrong("prefix part must be non-empty");
    } else if prefix.is_some_and(|prefix| check_name("", prefix).is_err()) {
        wrong(
            "prefix part a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')",
        );
    }
    if name.is_empty() {
        wrong("name part must be non-empty");
    } else if name.len() > 63 {
        wrong("name part must be no more than 63 bytes");
    }
    if name.is_empty() || !has_label_letters(name) {
        wrong(&format!("name part {NAME}"));
    }
    errors
}

/// What is wrong with a label's value.
pub(crate) fn label_value_error(value: &str) -> Option<String> {
    if value.len() > 63 {
        Some(format!("Invalid value: {value:?}: must be no more than 63 bytes"))
    } else if has_label_letters(value) {
        None
    } else {
        Some(format!(
            "Invalid value: {value:?}: a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
        ))
    }
}

fn has_label_letters(text: &str) -> bool {
    let edge = |byte: Option<u8>| byte.is_none_or(|b| b.is_ascii_alphanumeric());
    edge(text.bytes().next())
        && edge(text.bytes().last())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(object: Value, old: Option<Value>) -> Vec<String> {
        let causes = check(&object, old.as_ref());
        causes.into_iter().map(|cause| cause.field).collect()
    }

    #[test]
    fn labels_are_what_kubernetes_takes() {
        let good = json!({"app.kubernetes.io/part-of": "x", "a": "", "A_b": "1.0"});
        assert!(fields(json!({"metadata": {"labels": good}}), None).is_empty());
        for (key, value) in [
            ("a b", "x"),
            ("a", "b c"),
            ("-a", "x"),
            ("a/", "x"),
            ("A/b", "x"),
            ("a", "x-"),
        ] {
            let labels = json!({key: value});
            let mut found = fields(json!({"metadata": {"labels": labels}}), None);
            found.dedup();
            assert_eq!(found, ["metadata.labels"], "{key}={value}");
        }
    }

    #[test]
    fn an_object_that_is_going_takes_no_new_finalizer() {
        let old = json!({"metadata": {"deletionTimestamp": "x", "finalizers": ["a/b"]}});
        let new = json!({"metadata": {"finalizers": ["a/b", "c/d"]}});
        assert_eq!(fields(new.clone(), Some(old.clone())), ["metadata.finalizers"]);
        assert!(fields(new, Some(json!({"metadata": {}}))).is_empty());
        assert!(fields(json!({"metadata": {"finalizers": []}}), Some(old)).is_empty());
    }
}
