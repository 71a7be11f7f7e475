//! Field ownership: `metadata.managedFields`, server-side apply, and what other writes do to ownership.

use http::StatusCode;
use serde_json::{Map, Value, json};

use crate::error::{ApiError, Cause};
use crate::fields::{FieldSet, compare, fields_of};
use crate::merge::{merge, without};
use crate::typed;

/// Who writes, and through which door.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Writer {
    pub(crate) manager: String,
    pub(crate) api_version: String,
    /// Empty, or `status`.
    pub(crate) subresource: String,
    /// Whether status has a door of its own, so that through the other nobody comes to own it: not even by its defaults.
    pub(crate) status_apart: bool,
    /// RFC 3339 in whole seconds.
    pub(crate) now: String,
}

/// One entry of `managedFields`.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    manager: String,
    operation: String,
    api_version: String,
    subresource: String,
    time: Value,
    set: FieldSet,
}

impl Entry {
    fn is(&self, writer: &Writer, operation: &str) -> bool {
        self.manager == writer.manager
            && self.operation == operation
            && self.subresource == writer.subresource
            && (operation == "Apply" || self.api_version == writer.api_version)
    }

    /// As the API server calls it in a conflict.
    fn described(&self) -> String {
        let mut who = format!("{:?}", self.manager);
        if !self.subresource.is_empty() {
            who.push_str(&format!(" with subresource {:?}", self.subresource));
        }
        if self.operation == "Update" {
            who.push_str(&format!(" using {}", self.api_version));
        }
        who
    }

    fn to_value(&self) -> Value {
        let mut entry = Map::new();
        entry.insert("manager".to_owned(), json!(self.manager));
        entry.insert("operation".to_owned(), json!(self.operation));
        entry.insert("apiVersion".to_owned(), json!(self.api_version));
        if !self.time.is_null() {
            entry.insert("time".to_owned(), self.time.clone());
        }
        entry.insert("fieldsType".to_owned(), json!("FieldsV1"));
        entry.insert("fieldsV1".to_owned(), self.set.to_fields_v1());
        if !self.subresource.is_empty() {
            entry.insert("subresource".to_owned(), json!(self.subresource));
        }
        Value::Object(entry)
    }
}

fn entries(object: &Value) -> Vec<Entry> {
    let list = object
        .pointer("/metadata/managedFields")
        .and_then(Value::as_array);
    let text = |value: &Value, key: &str| {
        value
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let entries = list.into_iter().flatten().map(|value| Entry {
        manager: text(value, "manager"),
        operation: text(value, "operation"),
        api_version: text(value, "apiVersion"),
        subresource: text(value, "subresource"),
        time: value.get("time").cloned().unwrap_or_default(),
        set: value
            .get("fieldsV1")
            .map(FieldSet::from_fields_v1)
            .unwrap_or_default(),
    });
    entries.collect()
}

fn store_entries(object: &mut Value, mut entries: Vec<Entry>) {
    entries.retain(|entry| !entry.set.is_empty());
    // Applies first, then updates by time: the order in which the API server lists them.
    entries.sort_by_key(|e| {
        (
            e.operation != "Apply",
            e.time.to_string(),
            e.manager.clone(),
            e.subresource.clone(),
        )
    });
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        let list: Vec<Value> = entries.iter().map(Entry::to_value).collect();
        if list.is_empty() {
            metadata.remove("managedFields");
        } else {
            metadata.insert("managedFields".to_owned(), Value::Array(list));
        }
    }
}

/// Metadata has the same shape for every kind; a CRD's schema says nothing of it.
pub(crate) fn schema_with_metadata(schema: Option<&Value>) -> Value {
    let mut schema = schema.cloned().unwrap_or_else(|| json!({"type": "object"}));
    let text = || json!({"type": "string"});
    let number = || json!({"type": "integer"});
    let texts = || json!({"type": "object", "additionalProperties": {"type": "string"}});
    let metadata = json!({"type": "object", "properties": {
        "name": text(), "namespace": text(), "generateName": text(), "uid": text(), "resourceVersion": text(),
        "creationTimestamp": text(), "deletionTimestamp": text(), "selfLink": text(),
        "generation": number(), "deletionGracePeriodSeconds": number(),
        "labels": texts(), "annotations": texts(),
        "managedFields": {"type": "array", "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
        "finalizers": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
        "ownerReferences": {
            "type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["uid"],
            "items": {"type": "object", "x-kubernetes-map-type": "atomic", "properties": {
                "apiVersion": text(), "kind": text(), "name": text(), "uid": text(),
                "controller": {"type": "boolean"}, "blockOwnerDeletion": {"type": "boolean"},
            }},
        },
    }});
    if let Some(object) = schema.as_object_mut() {
        let properties = object.entry("properties").or_insert_with(|| json!({}));
        if let Some(properties) = properties.as_object_mut() {
            properties.insert("metadata".to_owned(), metadata);
            properties.insert("apiVersion".to_owned(), text());
            properties.insert("kind".to_owned(), text());
        }
    }
    schema
}

/// What nobody owns: identity, and what the server writes itself.
fn strip(mut set: FieldSet, writer: &Writer) -> FieldSet {
    for element in ["f:apiVersion", "f:kind"] {
        set = set.without(element);
    }
    set = if writer.subresource == "status" {
        set.without("f:spec")
    } else if writer.status_apart {
        set.without("f:status")
    } else {
        set
    };
    if let Some(metadata) = set.children.get_mut("f:metadata") {
        for name in [
            "name",
            "namespace",
            "uid",
            "creationTimestamp",
            "generation",
            "resourceVersion",
            "selfLink",
            "managedFields",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
        ] {
            metadata.children.remove(&format!("f:{name}"));
        }
        metadata.here = false;
    }
    set.children.retain(|_, child| !child.is_empty());
    set.here = false;
    set
}

fn without_managed_fields(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
        metadata.remove("resourceVersion");
        metadata.remove("generation");
    }
    object
}

/// Ownership before an update: that of `old`, unless the writer sends another, as kubectl does to turn what
/// it once applied by itself into what it applies through the server. An empty list, or one of an empty entry,
/// clears it.
pub(crate) fn keep_or_take_entries(old: &Value, new: &mut Value, subresource: &str) {
    let kept = old.pointer("/metadata/managedFields");
    let Some(metadata) = new.get_mut("metadata").and_then(Value::as_object_mut) else {
        return;
    };
    let sent = metadata.remove("managedFields");
    let sent = sent.as_ref().and_then(Value::as_array);
    let readable = |entry: &Value| {
        let text = |key: &str| entry.get(key).is_some_and(Value::is_string);
        let operation = entry.get("operation").and_then(Value::as_str);
        text("manager")
            && text("apiVersion")
            && matches!(operation, Some("Apply" | "Update"))
            && entry.get("fieldsV1").is_some_and(Value::is_object)
    };
    let entries = match sent {
        Some(list) if subresource.is_empty() && (list.is_empty() || *list == [json!({})]) => None,
        Some(list) if subresource.is_empty() && list.iter().all(readable) => Some(json!(list)),
        _ => kept.cloned(),
    };
    if let Some(entries) = entries {
        metadata.insert("managedFields".to_owned(), entries);
    }
}

/// Most managers that are recorded for updates. Those beyond it are one, from the oldest on: an object that passes
/// through many hands would else grow with each. As in the API server.
const UPDATE_MANAGERS: usize = 10;
/// The name of that one.
const OLDEST_MANAGERS: &str = "ancient-changes";

/// Makes one manager of the oldest that updated through the same version, so that no more than
/// [`UPDATE_MANAGERS`] are left.
fn cap_update_managers(entries: &mut Vec<Entry>) {
    entries.retain(|entry| !entry.set.is_empty());
    let count = |entries: &[Entry]| entries.iter().filter(|entry| entry.operation == "Update").count();
    if count(entries) <= UPDATE_MANAGERS {
        return;
    }
    // By time, and in one second by how the API server writes them down: as JSON.
    let mut oldest: Vec<Entry> = entries
        .extract_if(.., |entry| entry.operation == "Update")
        .collect();
    oldest.sort_by_key(|entry| {
        (
            entry.time.to_string(),
            entry.manager.clone(),
            entry.subresource.clone(),
        )
    });
    let mut kept: Vec<Entry> = Vec::new();
    let mut left = oldest.len();
    for entry in oldest {
        let first = kept.iter_mut().find(|kept| kept.api_version == entry.api_version);
        match first {
            Some(first) if left > UPDATE_MANAGERS => {
                first.manager = OLDEST_MANAGERS.to_owned();
                first.subresource = String::new();
                first.set.union(&entry.set);
                first.time = entry.time;
                left -= 1;
            }
            _ => kept.push(entry),
        }
    }
    entries.append(&mut kept);
}

/// Records a create, update or patch: what changed now belongs to the writer, what is gone to nobody.
/// `new` comes with the ownership as it was; see [`keep_or_take_entries`]. Of an object that `exists` and whose
/// fields nobody owns, ownership is not recorded until somebody applies.
pub(crate) fn record_update(schema: &Value, exists: bool, old: &Value, new: &mut Value, writer: &Writer) {
    if exists && new.pointer("/metadata/managedFields").is_none() {
        return;
    }
    let before = without_managed_fields(old);
    let after = without_managed_fields(new);
    let (changed, removed) = compare(Some(schema), Some(&before), Some(&after));
    let (changed, removed) = (strip(changed, writer), strip(removed, writer));
    let mut entries = entries(new);
    for entry in &mut entries {
        entry.set.subtract(&removed);
        if !entry.is(writer, "Update") {
            entry.set.subtract(&changed);
        }
    }
    if !changed.is_empty() {
        let time = json!(writer.now);
        match entries.iter_mut().find(|entry| entry.is(writer, "Update")) {
            Some(entry) => {
                entry.set.union(&changed);
                (entry.time, entry.api_version) = (time, writer.api_version.clone());
            }
            None => entries.push(Entry {
                manager: writer.manager.clone(),
                operation: "Update".to_owned(),
                api_version: writer.api_version.clone(),
                subresource: writer.subresource.clone(),
                time,
                set: changed,
            }),
        }
    }
    cap_update_managers(&mut entries);
    store_entries(new, entries);
}

/// Whether an applied configuration has the types of its schema.
///
/// # Errors
/// Everything that does not fit.
pub(crate) fn check_types(schema: &Value, applied: &Value) -> Result<(), ApiError> {
    typed::check(schema, applied).map_err(|why| untyped(applied, &why))
}

/// `live`, whose fields belong to a manager of this name where nobody's ownership was recorded before.
pub(crate) fn with_first_owner(schema: &Value, empty: &Value, live: &Value, writer: &Writer) -> Value {
    let mut owned = live.clone();
    if live.pointer("/metadata/managedFields").is_none() {
        let first = Writer {
            manager: "before-first-apply".to_owned(),
            subresource: String::new(),
            ..writer.clone()
        };
        record_update(schema, false, empty, &mut owned, &first);
    }
    owned
}

/// Server-side apply: `applied` laid over `live`, as its manager's whole intent.
///
/// # Errors
/// A conflict, when a field that would change belongs to another manager and `force` is false.
pub(crate) fn apply(
    schema: &Value,
    live: Option<&Value>,
    applied: &Value,
    writer: &Writer,
    force: bool,
) -> Result<Value, ApiError> {
    let base = live.cloned().unwrap_or_else(|| json!({"metadata": {}}));
    let intent = strip(fields_of(Some(schema), &without_managed_fields(applied)), writer);
    let mut merged = merge(Some(schema), &base, &without_managed_fields(applied));
    let mut entries = entries(&base);
    let previous = entries.iter().find(|entry| entry.is(writer, "Apply"));
    if let Some(previous) = previous.map(|entry| entry.set.clone()) {
        let mut owned = fields_of(Some(schema), applied);
        for entry in entries.iter().filter(|entry| !entry.is(writer, "Apply")) {
            owned.union(&entry.set);
        }
        merged = prune(schema, &merged, &previous, &owned);
    }

    let (mut changed, removed) = compare(
        Some(schema),
        Some(&without_managed_fields(&base)),
        Some(&without_managed_fields(&merged)),
    );
    changed = strip(changed, writer);
    let removed = strip(removed, writer);
    let mut conflicts = Vec::new();
    let settled = taken_over_from_client_side_apply(schema, &base, writer);
    for entry in entries.iter_mut().filter(|entry| !entry.is(writer, "Apply")) {
        let contested = entry.set.intersection(&changed);
        if !contested.is_empty() {
            let mut disputed = contested.clone();
            disputed.subtract(&settled);
            if !disputed.is_empty() {
                conflicts.push((entry.clone(), disputed));
            }
            entry.set.subtract(&contested);
        }
        entry.set.subtract(&removed);
    }
    if !conflicts.is_empty() && !force {
        return Err(conflict(&conflicts));
    }
    // To own what is there already is no change of the object, and has no time.
    let unchanged = live.is_some() && without_managed_fields(&base) == without_managed_fields(&merged);
    match entries.iter_mut().find(|entry| entry.is(writer, "Apply")) {
        Some(entry) => {
            if !unchanged {
                entry.time = json!(writer.now);
            }
            (entry.set, entry.api_version) = (intent, writer.api_version.clone());
        }
        None => entries.push(Entry {
            manager: writer.manager.clone(),
            operation: "Apply".to_owned(),
            api_version: writer.api_version.clone(),
            subresource: writer.subresource.clone(),
            time: if unchanged { Value::Null } else { json!(writer.now) },
            set: intent,
        }),
    }
    store_entries(&mut merged, entries);
    Ok(merged)
}

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Where kubectl noted what it applied by itself, the note follows what it applies through the server, so that
/// it can go back.
pub(crate) fn note_applied(merged: &mut Value, applied: &Value, writer: &Writer) {
    fn sorted(value: &Value) -> Value {
        match value {
            Value::Object(fields) => {
                let fields: std::collections::BTreeMap<_, _> = fields.iter().collect();
                Value::Object(fields.into_iter().map(|(k, v)| (k.clone(), sorted(v))).collect())
            }
            Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
            other => other.clone(),
        }
    }
    let note = merged
        .pointer_mut("/metadata/annotations")
        .and_then(|all| all.get_mut(LAST_APPLIED));
    if let (Some(note), "kubectl", "") = (note, writer.manager.as_str(), writer.subresource.as_str()) {
        let mut applied = applied.clone();
        if let Some(annotations) = applied
            .pointer_mut("/metadata/annotations")
            .and_then(Value::as_object_mut)
        {
            annotations.remove(LAST_APPLIED);
        }
        *note = json!(format!("{}\n", sorted(&applied)));
    }
}

/// What kubectl applied by itself, and nobody changed since, kubectl may change through the server.
fn taken_over_from_client_side_apply(schema: &Value, live: &Value, writer: &Writer) -> FieldSet {
    let annotation = live.pointer("/metadata/annotations/kubectl.kubernetes.io~1last-applied-configuration");
    let applied = annotation
        .and_then(Value::as_str)
        .map(serde_json::from_str::<Value>);
    let (true, Some(Ok(applied))) = (writer.manager == "kubectl", applied) else {
        return FieldSet::default();
    };
    let mut unchanged = fields_of(Some(schema), &applied);
    let (changed, removed) = compare(Some(schema), Some(&applied), Some(live));
    unchanged.subtract(&changed);
    unchanged.subtract(&removed);
    unchanged
}

/// The API server has no code of its own for a configuration that does not have the types of its schema.
fn untyped(applied: &Value, why: &str) -> ApiError {
    let text = |pointer: &str| {
        applied
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let (group, version) = text("/apiVersion")
        .split_once('/')
        .unwrap_or(("", text("/apiVersion")));
    let message = format!(
        "failed to create typed patch object ({}/{}; {group}/{version}, Kind={}): {why}",
        text("/metadata/namespace"),
        text("/metadata/name"),
        text("/kind")
    );
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "", message)
}

/// Takes out what was applied before and is applied no more, unless somebody owns it.
///
/// What is in a structure that goes as a whole goes with it (a default that the server put there), unless
/// somebody owns it; what stands beside it and belongs to nobody stays.
fn prune(schema: &Value, merged: &Value, previous: &FieldSet, owned: &FieldSet) -> Value {
    let schema = Some(schema);
    let named = |value: &Value| fields_of(schema, value).with_named_fields(schema);
    let (all, previous) = (named(merged), previous.with_named_fields(schema));

    let mut kept = named(&without(schema, merged, &previous));
    kept.union(&owned.with_named_fields(schema));
    let mut gone = all.clone();
    gone.subtract(&kept);

    let remaining = named(&without(schema, merged, &gone));
    let mut gone = all;
    gone.subtract(&remaining);
    without(schema, merged, &gone.intersection(&previous))
}

fn conflict(conflicts: &[(Entry, FieldSet)]) -> ApiError {
    let mut conflicts: Vec<(String, &Entry, Vec<String>)> = conflicts
        .iter()
        .map(|(entry, contested)| (entry.described(), entry, contested.paths()))
        .collect();
    conflicts.sort_by(|(_, a, _), (_, b, _)| (&a.manager, &a.operation).cmp(&(&b.manager, &b.operation)));
    let mut causes = Vec::new();
    let mut lines = Vec::new();
    for (who, _, paths) in &conflicts {
        lines.push(format!("conflicts with {who}:"));
        lines.extend(paths.iter().map(|path| format!("- {path}")));
        causes.extend(
            paths
                .iter()
                .map(|path| Cause::new("FieldManagerConflict", path, format!("conflict with {who}"))),
        );
    }
    let message = match causes.as_slice() {
        [one] => format!("Apply failed with 1 conflict: {}: {}", one.message, one.field),
        several => format!(
            "Apply failed with {} conflicts: {}",
            several.len(),
            lines.join("\n")
        ),
    };
    let mut error = ApiError::new(StatusCode::CONFLICT, "Conflict", message);
    error.causes = causes;
    error
}

#[cfg(test)]
#[path = "managed_properties.rs"]
mod properties;
#[cfg(test)]
#[path = "managed_tests.rs"]
mod tests;
