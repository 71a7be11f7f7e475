//! The patches that a client may send: JSON (RFC 6902), merge (RFC 7386), strategic merge.

use serde_json::{Map, Value};

use crate::error::ApiError;

/// Applies a JSON patch.
///
/// # Errors
/// When the patch does not read, a path is not there, or a test fails.
pub(crate) fn json(object: &mut Value, patch: &Value) -> Result<(), ApiError> {
    let patch: json_patch::Patch = serde_json::from_value(patch.clone())
        .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))?;
    json_patch::patch(object, &patch).map_err(|error| {
        let code = http::StatusCode::UNPROCESSABLE_ENTITY;
        ApiError::new(
            code,
            "Invalid",
            format!("the server rejected our request due to an error in our request: {error}"),
        )
    })
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
            ("finalizers", Value::Array(added)) => {
                let list = object
                    .entry(key.clone())
                    .or_insert_with(|| Value::Array(Vec::new()));
                if let Value::Array(list) = list {
                    list.extend(
                        added
                            .iter()
                            .filter(|item| !list.contains(item))
                            .cloned()
                            .collect::<Vec<_>>(),
                    );
                }
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
            json!({"metadata": {"finalizers": ["a", "b"], "labels": {"y": "2"}}})
        );
    }

    #[test]
    fn a_json_patch_with_a_wrong_path_is_refused() {
        assert!(json(&mut json!({"a": 1}), &json!([{"op": "remove", "path": "/b"}])).is_err());
    }
}
