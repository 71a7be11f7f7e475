//! `meta.k8s.io/v1` Table: what `kubectl get` prints.

use serde_json::{Value, json};

use crate::json_path::{lookup, show};
use crate::resource::{Column, Resource};

/// What Kubernetes says of every name.
const NAME: &str = "Name must be unique within a namespace. Is required when creating resources, although some resources may allow a client to request the generation of an appropriate name automatically. Name is primarily intended for creation idempotence and configuration definition. Cannot be updated. More info: https://kubernetes.io/docs/concepts/overview/working-with-objects/names#names";

/// What a column is: what its definition says, or the documentation of the field that it shows.
fn described(resource: &Resource, column: &Column) -> String {
    if !column.description.is_empty() {
        return column.description.clone();
    }
    if resource.custom {
        return format!(
            "Custom resource definition column (in JSONPath format): {}",
            column.path
        );
    }
    if column.path == ".metadata.name" {
        return NAME.to_owned();
    }
    if column.path == ".metadata.creationTimestamp" {
        return CREATED.to_owned();
    }
    let path = if column.path == "@dataCount" {
        ".data"
    } else {
        &column.path
    };
    let pointer = path.replace('.', "/properties/") + "/description";
    let schema = resource.schema.as_ref().map(crate::schema::Structural::schema);
    let found = schema.and_then(|schema| schema.pointer(&pointer)?.as_str());
    found.unwrap_or_default().to_owned()
}

/// What Kubernetes says of every age.
const CREATED: &str = "CreationTimestamp is a timestamp representing the server time when this object was created. It is not guaranteed to be set in happens-before order across separate operations. Clients may not set this value. It is represented in RFC3339 form and is in UTC.\n\nPopulated by the system. Read-only. Null for lists. More info: https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#metadata";

/// A table over `objects`.
pub(crate) fn table(resource: &Resource, objects: &[&Value], metadata: Value, include_object: &str) -> Value {
    let mut definitions = Vec::new();
    if resource.name_first {
        definitions.push(json!({
            "name": "Name", "type": "string", "format": "name", "priority": 0,
            "description": NAME,
        }));
    }
    definitions.extend(resource.columns.iter().map(|column| {
        json!({
            "name": column.name, "type": if resource.custom || resource.kind == DEFINITION { &column.kind } else { "string" },
            "format": if column.path == ".metadata.name" { "name" } else { "" }, "priority": column.priority,
            "description": described(resource, column),
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
    let name = object.pointer("/metadata/name").cloned().unwrap_or_default();
    let mut cells = if resource.name_first {
        vec![name]
    } else {
        Vec::new()
    };
    // Events are printed in their older form, whichever group is asked.
    let core = (resource.group == "events.k8s.io").then(|| crate::events::to_core(object));
    let object = core.as_ref().unwrap_or(object);
    cells.extend(
        resource
            .columns
            .iter()
            .map(|column| cell(column, object, resource.custom)),
    );
    let mut row = json!({"cells": cells});
    let attached = match include_object {
        "None" => Some(Value::Null),
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

/// Definitions of kinds are listed by a printer of their own, which shows times as they are.
const DEFINITION: &str = "CustomResourceDefinition";
const UNKNOWN: &str = "<unknown>";

/// How long ago the first of these times is that is there.
fn seen(object: &Value, pointers: &[&str]) -> String {
    let time = pointers
        .iter()
        .find_map(|pointer| object.pointer(pointer)?.as_str());
    time.map_or(UNKNOWN.to_owned(), |time| age(time, jiff::Timestamp::now()))
}

fn cell(column: &Column, object: &Value, custom: bool) -> Value {
    let text = |pointer: &str| {
        object
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let first = || {
        seen(
            object,
            &["/firstTimestamp", "/deprecatedFirstTimestamp", "/eventTime"],
        )
    };
    let value = match column.path.as_str() {
        "@dataCount" => {
            let count = |map: &str| {
                object
                    .get(map)
                    .and_then(Value::as_object)
                    .map_or(0, serde_json::Map::len)
            };
            return json!(count("data") + count("binaryData"));
        }
        "@involvedObject" => {
            let (kind, name) = (text("/involvedObject/kind"), text("/involvedObject/name"));
            return json!(format!("{}/{name}", kind.to_lowercase()));
        }
        "@source" => {
            let either = |one: &str, other: &str| {
                if one.is_empty() {
                    other.to_owned()
                } else {
                    one.to_owned()
                }
            };
            let parts = [
                either(text("/source/component"), text("/reportingComponent")),
                either(text("/source/host"), text("/reportingInstance")),
            ];
            let parts: Vec<&str> = parts
                .iter()
                .map(String::as_str)
                .filter(|part| !part.is_empty())
                .collect();
            return json!(parts.join(", "));
        }
        "@count" => {
            let count = |pointer: &str| {
                object
                    .pointer(pointer)
                    .and_then(Value::as_i64)
                    .filter(|count| *count > 0)
            };
            return json!(count("/series/count").or(count("/count")).unwrap_or(1));
        }
        "@firstSeen" => return json!(first()),
        "@lastSeen" => {
            let last = seen(object, &["/series/lastObservedTime", "/lastTimestamp"]);
            return json!(if last == UNKNOWN { first() } else { last });
        }
        path => lookup(object, path),
    };
    if !custom && column.name == "Created At" {
        return value.cloned().unwrap_or_default();
    }
    if !custom && column.kind == "string" {
        return json!(value.map(show).unwrap_or_default().trim());
    }
    let Some(value) = value else { return Value::Null };
    match column.kind.as_str() {
        "string" => json!(show(value)),
        "integer" => value
            .as_i64()
            .or_else(|| value.as_f64().map(|number| number as i64))
            .map_or(Value::Null, |number| json!(number)),
        "number" if value.is_number() => value.clone(),
        "boolean" if value.is_boolean() => value.clone(),
        // kubectl shows a date cell as it comes, so the server says how long ago it was.
        "date" => value
            .as_str()
            .map_or(Value::Null, |time| json!(age(time, jiff::Timestamp::now()))),
        _ => Value::Null,
    }
}

/// How long ago, as kubectl writes it: `45s`, `3m20s`, `5h`, `2d`.
pub(crate) fn age(time: &str, now: jiff::Timestamp) -> String {
    let Ok(then) = time.parse::<jiff::Timestamp>() else {
        return "<invalid>".to_owned();
    };
    let seconds = now.as_second() - then.as_second();
    // A clock that is a little behind is no error; one that is far behind shows.
    if seconds < -1 {
        return "<invalid>".to_owned();
    }
    let seconds = seconds.max(0);
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

    fn column(kind: &str, path: &str) -> Column {
        Column {
            name: "C".to_owned(),
            kind: kind.to_owned(),
            description: String::new(),
            priority: 0,
            path: path.to_owned(),
        }
    }

    #[test]
    fn a_cell_holds_what_its_column_promises_or_nothing() {
        let object = json!({"a": {"text": "x", "whole": 3, "part": 2.5, "yes": true, "list": ["a", 1], "time": "not a time"}});
        for (kind, path, cell_value) in [
            ("string", ".a.text", json!("x")),
            ("string", ".a.whole", json!("3")),
            ("string", ".a.list", json!("[\"a\",1]")),
            ("string", ".a.missing", Value::Null),
            ("integer", ".a.whole", json!(3)),
            ("integer", ".a.part", json!(2)),
            ("integer", ".a.text", Value::Null),
            ("number", ".a.part", json!(2.5)),
            ("boolean", ".a.yes", json!(true)),
            ("boolean", ".a.text", Value::Null),
            ("date", ".a.time", json!("<invalid>")),
            ("date", ".a.whole", Value::Null),
        ] {
            assert_eq!(
                cell(&column(kind, path), &object, true),
                cell_value,
                "{kind} at {path}"
            );
        }
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
