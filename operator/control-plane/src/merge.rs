//! Laying one value over another by its schema, and taking fields out of it.

use std::collections::VecDeque;

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
            Value::Array(merge_items(item_schema(schema), &keys, before, after))
        }
        _ => patch.clone(),
    }
}

/// Items of both, in the order of `after`; those of `before` alone stay where they are between their neighbours.
///
/// Source: structured-merge-diff, `merge.go`, `visitListItems`.
fn merge_items(schema: Option<&Value>, keys: &ListKeys, before: &[Value], after: &[Value]) -> Vec<Value> {
    let named = |items: &[Value]| -> Vec<String> {
        let elements = items.iter().map(|item| item_element(schema, item, keys));
        elements.collect()
    };
    let (old, new) = (named(before), named(after));
    let mut shared: VecDeque<&String> = new.iter().filter(|element| old.contains(element)).collect();
    let combined = |at: usize| -> Option<Value> {
        let item = after.get(at)?;
        let counterpart = old.iter().position(|element| new.get(at) == Some(element));
        Some(match counterpart.and_then(|at| before.get(at)) {
            Some(counterpart) if matches!(keys, ListKeys::Map(_)) => merge(schema, counterpart, item),
            _ => item.clone(),
        })
    };
    let (mut merged, mut done) = (Vec::new(), Vec::new());
    let (mut at_old, mut at_new) = (0, 0);
    while at_old < old.len() || at_new < new.len() {
        if let (Some(mine), Some(theirs)) = (old.get(at_old), new.get(at_new)) {
            if mine == theirs {
                merged.extend(combined(at_new));
                done.push(theirs);
                shared.pop_front();
                (at_old, at_new) = (at_old + 1, at_new + 1);
                continue;
            }
            if new.contains(mine) && shared.front().is_some_and(|next| *next != mine) {
                at_old += 1;
                continue;
            }
        }
        if let Some(mine) = old.get(at_old) {
            if !new.contains(mine) {
                merged.extend(before.get(at_old).cloned());
                at_old += 1;
                continue;
            }
            if done.contains(&mine) {
                at_old += 1;
            }
        }
        if let Some(theirs) = new.get(at_new) {
            merged.extend(combined(at_new));
            done.push(theirs);
            at_new += 1;
            if shared.front() == Some(&theirs) {
                shared.pop_front();
            }
        }
    }
    merged
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
            let kept = items.iter().filter_map(|item| {
                match gone.children.get(&item_element(item_schema(schema), item, &keys)) {
                    Some(below) if below.here => None,
                    Some(below) => Some(without(item_schema(schema), item, below)),
                    None => Some(item.clone()),
                }
            });
            Value::Array(kept.collect())
        }
    }
}
