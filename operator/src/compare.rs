//! Whether two documents say the same. The API server may keep the entries of a keyed list, or the
//! members of a set, in another order than they were sent; that is no difference.

use serde::Serialize;
use serde_json::Value;

/// Fields that key the entries of a list.
const KEYS: [&str; 2] = ["name", "type"];

/// Whether two values say the same.
pub(crate) fn same<T: Serialize>(left: &T, right: &T) -> bool {
    // What cannot be written as JSON cannot be sent either; the write will tell.
    match (serde_json::to_value(left), serde_json::to_value(right)) {
        (Ok(left), Ok(right)) => canonical(left) == canonical(right),
        _ => false,
    }
}

fn canonical(value: Value) -> Value {
    match value {
        Value::Array(items) => {
            let mut items: Vec<Value> = items.into_iter().map(canonical).collect();
            let all_have = |key: &str| {
                items
                    .iter()
                    .all(|item| item.get(key).is_some_and(Value::is_string))
            };
            if let Some(key) = KEYS.into_iter().find(|key| all_have(key)) {
                items.sort_by(|a, b| a[key].as_str().cmp(&b[key].as_str()));
            } else if items.iter().all(Value::is_string) {
                items.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
            }
            Value::Array(items)
        }
        Value::Object(fields) => Value::Object(
            fields
                .into_iter()
                .map(|(key, value)| (key, canonical(value)))
                .collect(),
        ),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn order_counts_only_where_it_means_something() {
        let keyed = |a, b| json!({"routes": [{"name": a}, {"name": b}]});
        assert!(same(&keyed("x", "y"), &keyed("y", "x")));
        let backends = |a, b| json!({"backends": [{"node": a}, {"node": b}]});
        assert!(!same(&backends("x", "y"), &backends("y", "x")));
        assert!(same(
            &json!({"a": 1, "b": ["p", "q"]}),
            &json!({"b": ["q", "p"], "a": 1})
        ));
        assert!(!same(&json!({"a": 1}), &json!({"a": 2})));
    }
}
