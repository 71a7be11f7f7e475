//! Laying one value over another by its schema, and taking fields out of it.

use serde_json::Value;

use crate::fields::{FieldSet, Shape, field_schema, item_element, item_schema, shape};
use crate::schema::ListKeys;

/// `patch` laid over `base`: fields and list items by their identity, leaves replaced.
pub(crate) fn merge(schema: Option<&Value>, base: &Value, patch: &Value) -> Value {
    match (shape(schema, base), shape(schema, patch)) {
        (Shape::Fields(before), Shape::Fields(after)) => {
            let mut merged = before.clone();
            for (name, value) in after {
                let value = match before.get(name) {
                    Some(old) => merge(field_schema(schema, name), old, value),
                    None => value.clone(),
                };
                merged.insert(name.clone(), value);
            }
            Value::Object(merged)
        }
        (Shape::Items(before, keys), Shape::Items(after, _)) => {
            let mut merged = before.to_vec();
            for item in after {
                let element = item_element(item, &keys);
                match merged.iter_mut().find(|old| item_element(old, &keys) == element) {
                    Some(old) if matches!(keys, ListKeys::Map(_)) => {
                        *old = merge(item_schema(schema), old, item)
                    }
                    Some(_) => {}
                    None => merged.push(item.clone()),
                }
            }
            Value::Array(merged)
        }
        _ => patch.clone(),
    }
}

/// `value` without the fields of `gone`. A structure that becomes empty stays, unless it goes itself.
pub(crate) fn without(schema: Option<&Value>, value: &Value, gone: &FieldSet) -> Value {
    match shape(schema, value) {
        Shape::Leaf => value.clone(),
        Shape::Fields(fields) => {
            let kept =
                fields
                    .iter()
                    .filter_map(|(name, child)| match gone.children.get(&format!("f:{name}")) {
                        Some(below) if below.here => None,
                        Some(below) => {
                            Some((name.clone(), without(field_schema(schema, name), child, below)))
                        }
                        None => Some((name.clone(), child.clone())),
                    });
            Value::Object(kept.collect())
        }
        Shape::Items(items, keys) => {
            let kept = items
                .iter()
                .filter_map(|item| match gone.children.get(&item_element(item, &keys)) {
                    Some(below) if below.here => None,
                    Some(below) => Some(without(item_schema(schema), item, below)),
                    None => Some(item.clone()),
                });
            Value::Array(kept.collect())
        }
    }
}
