//! Events are stored once and served twice: as `v1` and as `events.k8s.io/v1`.

use serde_json::{Map, Value, json};

/// Names that differ between the two, as (core, events.k8s.io).
const RENAMED: &[(&str, &str)] = &[
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("source", "deprecatedSource"),
];

fn renamed(object: &Value, api_version: &str, name: impl Fn(&str) -> Option<&'static str>) -> Value {
    let mut converted = Map::new();
    for (key, value) in object.as_object().into_iter().flatten() {
        let key = name(key).map_or_else(|| key.clone(), str::to_owned);
        converted.insert(key, value.clone());
    }
    converted.insert("apiVersion".to_owned(), json!(api_version));
    Value::Object(converted)
}

/// From `events.k8s.io/v1` to `v1`.
pub(crate) fn to_core(object: &Value) -> Value {
    renamed(object, "v1", |key| {
        RENAMED.iter().find(|(_, new)| *new == key).map(|(core, _)| *core)
    })
}

/// From `v1` to `events.k8s.io/v1`, which does not show names that are empty.
pub(crate) fn from_core(object: &Value) -> Value {
    let mut event = renamed(object, "events.k8s.io/v1", new_name);
    if let Some(fields) = event.as_object_mut() {
        fields.retain(|key, value| {
            !(matches!(key.as_str(), "reportingController" | "reportingInstance") && *value == "")
        });
    }
    event
}

fn new_name(core: &str) -> Option<&'static str> {
    RENAMED
        .iter()
        .find(|(name, _)| *name == core)
        .map(|(_, new)| *new)
}

/// The schema of core events, for events of the other group.
pub(crate) fn schema_from_core(mut schema: Value) -> Value {
    if let Some(properties) = schema.get_mut("properties") {
        let mut named = renamed(properties, "", new_name);
        named["apiVersion"] = json!({"type": "string"});
        *properties = named;
    }
    schema
}
