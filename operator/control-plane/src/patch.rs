//! The patches that a client may send: JSON (RFC 6902), merge (RFC 7386), strategic merge.

use serde_json::{Map, Value};

use crate::error::{ApiError, Cause};

/// Applies a JSON patch.
///
/// # Errors
/// When the patch does not read, a path is not there, or a test fails.
pub(crate) fn json(object: &mut Value, patch: &Value) -> Result<(), ApiError> {
    let rejected = |error: String| {
        let what = format!("the server rejected our request due to an error in our request: {error}");
        ApiError::new(http::StatusCode::UNPROCESSABLE_ENTITY, "Invalid", what).about("", "", "")
    };
    let operations = patch
        .as_array()
        .is_some_and(|list| list.iter().all(|operation| operation.get("op").is_some()));
    let patch: json_patch::Patch = serde_json::from_value(patch.clone()).map_err(|error| {
        if operations {
            rejected(error.to_string())
        } else {
            ApiError::bad_request(format!("error decoding patch: {error}"))
        }
    })?;
    json_patch::patch(object, &patch).map_err(|error| rejected(error.to_string()))
}

/// What a strict reader says of a patched object: it blames the patch.
pub(crate) fn not_strict(error: ApiError, patched: &str) -> ApiError {
    let Some((_, strict)) = error.message.split_once("strict decoding error: ") else {
        return error;
    };
    let message = format!("Invalid value: {patched:?}: strict decoding error: {strict}");
    let mut error = ApiError::invalid(
        "",
        "",
        "",
        vec![Cause::new("FieldValueInvalid", "patch", message)],
    );
    error.message = format!(" {}", error.message.trim_start());
    error
}

/// Applies a merge patch: null removes, lists are replaced.
pub(crate) fn merge(object: &mut Value, patch: &Value) {
    json_patch::merge(object, patch);
}

/// Applies a strategic merge patch to a built-in kind. The few kinds that are served here have no lists
/// that merge by key except owner references and finalizers; directives are honoured.
pub(crate) fn strategic(object: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *object = patch.clone();
        return;
    };
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    let Value::Object(object) = object else { return };
    if patch.get("$patch").and_then(Value::as_str) == Some("replace") {
        *object = patch
            .iter()
            .filter(|(key, _)| key.as_str() != "$patch")
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        return;
    }
    for (key, value) in patch.iter().filter(|(key, _)| !key.starts_with('$')) {
        match (key.as_str(), value) {
            (_, Value::Null) => {
                object.remove(key);
            }
            ("finalizers" | "ownerReferences", Value::Array(given)) => {
                let before = object.get(key).and_then(Value::as_array).cloned();
                let list = merge_items(before.unwrap_or_default(), given);
                object.insert(key.clone(), Value::Array(list));
            }
            _ => strategic_or_replace(object.entry(key.clone()).or_insert(Value::Null), value),
        }
    }
    if let Some(Value::Array(gone)) = patch.get("$deleteFromPrimitiveList/finalizers")
        && let Some(Value::Array(list)) = object.get_mut("finalizers")
    {
        list.retain(|item| !gone.contains(item));
    }
}

/// Items that the patch names come first, in its order; owners are told apart by their uid.
fn merge_items(mut before: Vec<Value>, given: &[Value]) -> Vec<Value> {
    let same = |a: &Value, b: &Value| match (a.get("uid"), b.get("uid")) {
        (None, None) => a == b,
        (a, b) => a == b,
    };
    let mut merged = Vec::new();
    for item in given {
        let old = before.iter().position(|old| same(old, item));
        let mut object = old.map_or(Value::Null, |at| before.remove(at));
        if item.get("$patch").and_then(Value::as_str) == Some("delete") {
            continue;
        }
        strategic_or_replace(&mut object, item);
        merged.push(object);
    }
    merged.append(&mut before);
    merged
}

fn strategic_or_replace(target: &mut Value, value: &Value) {
    if value.is_object() {
        strategic(target, value);
    } else {
        *target = value.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn strategic_merge_keeps_finalizers_of_others() {
        let mut object = json!({"metadata": {"finalizers": ["a"], "labels": {"x": "1", "y": "2"}}});
        strategic(
            &mut object,
            &json!({"metadata": {"$setElementOrder/finalizers": ["a", "b"], "finalizers": ["b"], "labels": {"x": null}}}),
        );
        assert_eq!(
            object,
            json!({"metadata": {"finalizers": ["b", "a"], "labels": {"y": "2"}}})
        );
    }

    #[test]
    fn a_json_patch_with_a_wrong_path_is_refused() {
        assert!(json(&mut json!({"a": 1}), &json!([{"op": "remove", "path": "/b"}])).is_err());
    }
}
