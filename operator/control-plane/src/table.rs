//! `meta.k8s.io/v1` Table: what `kubectl get` prints.

use serde_json::{Value, json};

use crate::resource::{Column, Resource};

/// A table over `objects`.
pub(crate) fn table(resource: &Resource, objects: &[&Value], metadata: Value, include_object: &str) -> Value {
    let mut definitions = vec![json!({
        "name": "Name", "type": "string", "format": "name", "priority": 0,
        "description": "Name must be unique within a namespace.",
    })];
    definitions.extend(resource.columns.iter().map(|column| {
        json!({
            "name": column.name, "type": column.kind, "format": "", "priority": column.priority,
            "description": column.description,
        })
    }));
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| row(resource, object, include_object))
        .collect();
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
        "columnDefinitions": definitions, "rows": rows,
    })
}

fn row(resource: &Resource, object: &Value, include_object: &str) -> Value {
    let mut cells = vec![object.pointer("/metadata/name").cloned().unwrap_or_default()];
    cells.extend(resource.columns.iter().map(|column| cell(column, object)));
    let mut row = json!({"cells": cells});
    let attached = match include_object {
        "None" => None,
        "Object" => Some(object.clone()),
        _ => Some(partial(object)),
    };
    if let Some(attached) = attached {
        row["object"] = attached;
    }
    row
}

/// The object with nothing but its metadata.
pub(crate) fn partial(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": object.get("metadata").cloned().unwrap_or_default(),
    })
}

fn cell(column: &Column, object: &Value) -> Value {
    let involved = |key: &str| {
        let reference = object.get(key).unwrap_or(&Value::Null);
        let text = |name: &str| reference.get(name).and_then(Value::as_str).unwrap_or_default();
        json!(format!("{}/{}", text("kind").to_lowercase(), text("name")))
    };
    let value = match column.path.as_str() {
        "@dataCount" => {
            let count = object
                .get("data")
                .and_then(Value::as_object)
                .map_or(0, serde_json::Map::len);
            return json!(count);
        }
        "@involvedObject" => return involved("involvedObject"),
        "@regarding" => return involved("regarding"),
        "@lastSeen" => [
            "/series/lastObservedTime",
            "/lastTimestamp",
            "/eventTime",
            "/deprecatedLastTimestamp",
            "/metadata/creationTimestamp",
        ]
        .iter()
        .find_map(|pointer| object.pointer(pointer).filter(|value| value.is_string())),
        path => lookup(object, path),
    };
    match (column.kind.as_str(), value) {
        (_, None) => Value::Null,
        // kubectl shows a date cell as it comes, so the server says how long ago it was.
        ("date", Some(Value::String(time))) => json!(age(time, jiff::Timestamp::now())),
        ("integer" | "number" | "boolean", Some(value)) => value.clone(),
        (_, Some(Value::String(text))) => json!(text),
        (_, Some(value)) => json!(value.to_string()),
    }
}

/// The value at a JSONPath of the kind that printer columns use: fields, `[index]`, and
/// `[?(@.key=='value')]` or `[?(@.key=="value")]`.
pub(crate) fn lookup<'a>(object: &'a Value, path: &str) -> Option<&'a Value> {
    let mut value = object;
    let mut rest = path.trim_start_matches('$');
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix("[?(@.") {
            let (condition, after) = after.split_once(")]")?;
            let (key, wanted) = condition.split_once("==")?;
            let wanted = wanted.trim().trim_matches(['\'', '"']);
            value = value
                .as_array()?
                .iter()
                .find(|item| item.get(key.trim()).and_then(Value::as_str) == Some(wanted))?;
            rest = after;
        } else if let Some(after) = rest.strip_prefix('[') {
            let (index, after) = after.split_once(']')?;
            value = match index.parse::<usize>() {
                Ok(index) => value.get(index)?,
                Err(_) => value.get(index.trim_matches(['\'', '"']))?,
            };
            rest = after;
        } else {
            let after = rest.strip_prefix('.').unwrap_or(rest);
            let end = after.find(['.', '[']).unwrap_or(after.len());
            let (name, tail) = after.split_at(end);
            value = value.get(name)?;
            rest = tail;
        }
    }
    Some(value)
}

/// How long ago, as kubectl writes it: `45s`, `3m20s`, `5h`, `2d`.
pub(crate) fn age(time: &str, now: jiff::Timestamp) -> String {
    let Ok(then) = time.parse::<jiff::Timestamp>() else {
        return "<unknown>".to_owned();
    };
    let seconds = (now.as_second() - then.as_second()).max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let with_rest = |whole: i64, unit: &str, rest: i64, rest_unit: &str| {
        if rest == 0 {
            format!("{whole}{unit}")
        } else {
            format!("{whole}{unit}{rest}{rest_unit}")
        }
    };
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => with_rest(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => with_rest(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => with_rest(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        _ => with_rest(days / 365, "y", days % 365, "d"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printer_paths_reach_conditions_and_items() {
        let object =
            json!({"status": {"conditions": [{"type": "Ready", "status": "True"}], "list": ["a", "b"]}});
        assert_eq!(
            lookup(&object, ".status.conditions[?(@.type=='Ready')].status"),
            Some(&json!("True"))
        );
        assert_eq!(
            lookup(&object, ".status.conditions[?(@.type==\"Nope\")].status"),
            None
        );
        assert_eq!(lookup(&object, ".status.list[1]"), Some(&json!("b")));
    }

    #[test]
    fn ages_read_as_kubectl_writes_them() {
        let now: jiff::Timestamp = "2026-01-10T00:00:00Z".parse().unwrap();
        for (seconds, text) in [
            (45, "45s"),
            (119, "119s"),
            (200, "3m20s"),
            (3600, "60m"),
            (7200, "120m"),
            (14_400, "4h"),
            (172_800, "2d"),
            (200_000, "2d7h"),
        ] {
            let then = jiff::Timestamp::from_second(now.as_second() - seconds).unwrap();
            assert_eq!(age(&then.to_string(), now), text, "{seconds}");
        }
    }
}
