//! The built-in kinds: their schemas, their checks, and the little that a server fills in for them.
//!
//! Their types come from k8s-openapi, so there is no second description of them here.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::{coordination::v1::Lease, core::v1};
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::built_in_rules;
use crate::error::ApiError;
use crate::resource::Resource;
use crate::schema::Structural;

/// The schema of a built-in kind that is stored.
pub(crate) fn schema(kind: &str) -> Option<Structural> {
    match kind {
        "ConfigMap" => structural::<v1::ConfigMap>(),
        "Secret" => structural::<v1::Secret>(),
        "Namespace" => structural::<v1::Namespace>(),
        "Event" => structural::<v1::Event>(),
        "Lease" => structural::<Lease>(),
        _ => None,
    }
}

fn structural<T: JsonSchema>() -> Option<Structural> {
    let settings = SchemaSettings::openapi3().with(|settings| settings.inline_subschemas = true);
    let schema = settings.into_generator().into_root_schema_for::<T>();
    let mut schema = serde_json::to_value(schema).ok()?;
    // Metadata is described once, for every kind; see `discovery`.
    schema.get_mut("properties")?.as_object_mut()?.remove("metadata");
    schema.as_object_mut()?.remove("$schema");
    // A reference to an object is one value; the generated schema does not say so.
    for reference in ["involvedObject", "related", "regarding"] {
        if let Some(found) = schema.pointer_mut(&format!("/properties/{reference}")) {
            found["x-kubernetes-map-type"] = json!("atomic");
        }
    }
    Some(Structural::new(schema))
}

/// An object is of its kind when it reads as the kind's type.
pub(crate) fn check(resource: &Resource, object: &Value) -> Result<(), ApiError> {
    fn reads<T: DeserializeOwned>(object: &Value) -> Result<(), String> {
        T::deserialize(object)
            .map(drop)
            .map_err(|error| error.to_string())
    }
    let outcome = match resource.kind.as_str() {
        "ConfigMap" => reads::<v1::ConfigMap>(object),
        "Secret" => reads::<v1::Secret>(object),
        "Namespace" => reads::<v1::Namespace>(object),
        "Event" => reads::<v1::Event>(object),
        "Lease" => reads::<Lease>(object),
        _ => Ok(()),
    };
    let (kind, version) = (&resource.kind, &resource.version);
    let outcome = outcome.and_then(|()| built_in_rules::micro_time(kind, object));
    outcome.map_err(|error| {
        ApiError::bad_request(format!(
            "{kind} in version {version:?} cannot be handled as a {kind}: {error}"
        ))
    })
}

/// A Secret's `stringData` is only ever written: it becomes `data` before anybody sees it.
pub(crate) fn fold_string_data(resource: &Resource, object: &mut Value) {
    if resource.kind != "Secret" || !resource.group.is_empty() {
        return;
    }
    let Some(secret) = object.as_object_mut() else {
        return;
    };
    let well_formed = |value: &Value| {
        let texts = value.as_object();
        texts.is_some_and(|texts| texts.values().all(Value::is_string))
    };
    // Anything else stays where it is, and is refused as what it is.
    if !secret.get("stringData").is_some_and(well_formed) {
        return;
    }
    let texts = secret.remove("stringData").unwrap_or_default();
    let data = secret.entry("data").or_insert_with(|| json!({}));
    if data.is_null() {
        *data = json!({});
    }
    if let (Some(data), Value::Object(texts)) = (data.as_object_mut(), texts) {
        for (key, text) in texts {
            let text = text.as_str().unwrap_or_default();
            data.insert(key, json!(STANDARD.encode(text)));
        }
    }
}

/// An object of the kind with nothing in it: what the kind's type shows even then. Nobody owns these fields.
pub(crate) fn empty(kind: &str) -> Value {
    match kind {
        "Lease" => json!({"spec": {}}),
        "Event" => json!({
            "involvedObject": {}, "source": {}, "firstTimestamp": null, "lastTimestamp": null, "eventTime": null,
            "reportingComponent": "", "reportingInstance": "",
        }),
        "Namespace" => json!({"spec": {}, "status": {}}),
        _ => json!({}),
    }
}

/// What an object gets where it says nothing, and what no client can change.
pub(crate) fn default(resource: &Resource, object: &mut Value, old: Option<&Value>) {
    if resource.custom {
        return;
    }
    let name = object.pointer("/metadata/name").cloned().unwrap_or_default();
    let Some(fields) = object.as_object_mut() else {
        return;
    };
    if let Value::Object(empty) = empty(&resource.kind) {
        for (key, value) in empty {
            let present = fields.entry(key).or_insert_with(|| value.clone());
            if present.is_null() {
                *present = value;
            }
        }
    }
    match resource.kind.as_str() {
        "Secret" => {
            fields.entry("type").or_insert_with(|| json!("Opaque"));
        }
        "Namespace" => {
            if let Some(spec) = old.and_then(|old| old.get("spec")) {
                fields.insert("spec".to_owned(), spec.clone());
            }
            json_patch::merge(
                object,
                &json!({"metadata": {"labels": {"kubernetes.io/metadata.name": name}}}),
            );
        }
        _ => {}
    }
    tidy(&resource.kind, object);
}

fn maps(kind: &str) -> &'static [&'static str] {
    match kind {
        "ConfigMap" => &["data", "binaryData"],
        "Secret" => &["data"],
        _ => &[],
    }
}

/// Texts by key that are null are empty.
pub(crate) fn fill_nulls(resource: &Resource, object: &mut Value) {
    let maps = if resource.custom {
        &[]
    } else {
        maps(&resource.kind)
    };
    for map in maps {
        let entries = object.get_mut(*map).and_then(Value::as_object_mut);
        let values = entries.into_iter().flat_map(serde_json::Map::values_mut);
        for value in values.filter(|value| value.is_null()) {
            *value = json!("");
        }
    }
}

/// Maps without an entry are not shown.
fn tidy(kind: &str, object: &mut Value) {
    for map in maps(kind) {
        let Some(found) = object.get_mut(*map) else {
            continue;
        };
        let bare = found.is_null() || found.as_object().is_some_and(serde_json::Map::is_empty);
        if let (true, Some(fields)) = (bare, object.as_object_mut()) {
            fields.remove(*map);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stored_kind_has_a_schema_without_references() {
        for kind in ["ConfigMap", "Secret", "Namespace", "Event", "Lease"] {
            let schema = schema(kind).unwrap();
            let text = schema.schema().to_string();
            assert!(!text.contains("$ref"), "{kind}: {text}");
            assert!(schema.schema().pointer("/properties/kind").is_some(), "{kind}");
        }
    }
}
