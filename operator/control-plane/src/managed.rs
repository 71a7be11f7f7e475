//! Field ownership: `metadata.managedFields`, server-side apply, and what other writes do to ownership.

use http::StatusCode;
use serde_json::{Map, Value, json};

use crate::error::{ApiError, Cause};
use crate::fields::{FieldSet, Shape, compare, field_schema, fields_of, item_element, item_schema, shape};
use crate::schema::ListKeys;

/// Who writes, and through which door.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Writer {
    pub(crate) manager: String,
    pub(crate) api_version: String,
    /// Empty, or `status`.
    pub(crate) subresource: String,
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
    }

    fn to_value(&self) -> Value {
        let mut entry = Map::new();
        entry.insert("manager".to_owned(), json!(self.manager));
        entry.insert("operation".to_owned(), json!(self.operation));
        entry.insert("apiVersion".to_owned(), json!(self.api_version));
        entry.insert("time".to_owned(), self.time.clone());
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
    let metadata = json!({"type": "object", "properties": {
        "finalizers": {"type": "array", "x-kubernetes-list-type": "set"},
        "ownerReferences": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["uid"]},
    }});
    if let Some(object) = schema.as_object_mut() {
        let properties = object.entry("properties").or_insert_with(|| json!({}));
        if let Some(properties) = properties.as_object_mut() {
            properties.insert("metadata".to_owned(), metadata);
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
            "generateName",
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
/// it once applied by itself into what it applies through the server. A list of one empty entry clears it.
pub(crate) fn keep_or_take_entries(old: &Value, new: &mut Value, subresource: &str) {
    let kept = old.pointer("/metadata/managedFields");
    let Some(metadata) = new.get_mut("metadata").and_then(Value::as_object_mut) else {
        return;
    };
    let sent = metadata.remove("managedFields");
    let sent = sent.as_ref().and_then(Value::as_array).filter(|list| !list.is_empty());
    let readable = |entry: &Value| {
        let text = |key: &str| entry.get(key).is_some_and(Value::is_string);
        let operation = entry.get("operation").and_then(Value::as_str);
        text("manager")
            && text("apiVersion")
            && matches!(operation, Some("Apply" | "Update"))
            && entry.get("fieldsV1").is_some_and(Value::is_object)
    };
    let entries = match sent {
        Some(list) if subresource.is_empty() && *list == [json!({})] => None,
        Some(list) if subresource.is_empty() && list.iter().all(readable) => Some(json!(list)),
        _ => kept.cloned(),
    };
    if let Some(entries) = entries {
        metadata.insert("managedFields".to_owned(), entries);
    }
}

/// Records a create, update or patch: what changed now belongs to the writer, what is gone to nobody.
/// `new` comes with the ownership as it was; see [`keep_or_take_entries`].
pub(crate) fn record_update(schema: &Value, old: Option<&Value>, new: &mut Value, writer: &Writer) {
    let before = old.map(without_managed_fields);
    let after = without_managed_fields(new);
    let (changed, removed) = compare(Some(schema), before.as_ref(), Some(&after));
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
    store_entries(new, entries);
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

    // What this manager applied before and applies no more goes, unless another owns it too.
    let previous = entries
        .iter()
        .find(|entry| entry.is(writer, "Apply"))
        .map(|e| e.set.clone())
        .unwrap_or_default();
    let mut gone = previous;
    gone.subtract(&intent);
    for entry in entries.iter().filter(|entry| !entry.is(writer, "Apply")) {
        gone.subtract(&entry.set);
    }
    remove(Some(schema), &mut merged, &gone, &intent);

    let (mut changed, removed) = compare(
        Some(schema),
        Some(&without_managed_fields(&base)),
        Some(&without_managed_fields(&merged)),
    );
    changed = strip(changed, writer);
    let removed = strip(removed, writer);
    let mut conflicts = Vec::new();
    for entry in entries.iter_mut().filter(|entry| !entry.is(writer, "Apply")) {
        let contested = entry.set.intersection(&changed);
        if !contested.is_empty() {
            conflicts.push((entry.clone(), contested.clone()));
            entry.set.subtract(&contested);
        }
        entry.set.subtract(&removed);
    }
    if !conflicts.is_empty() && !force {
        return Err(conflict(&conflicts));
    }
    match entries.iter_mut().find(|entry| entry.is(writer, "Apply")) {
        Some(entry) => {
            let unchanged = entry.set == intent && changed.is_empty() && removed.is_empty();
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
            time: json!(writer.now),
            set: intent,
        }),
    }
    store_entries(&mut merged, entries);
    Ok(merged)
}

fn conflict(conflicts: &[(Entry, FieldSet)]) -> ApiError {
    let mut causes = Vec::new();
    let mut lines = Vec::new();
    for (entry, contested) in conflicts {
        let mut who = format!("conflict with {:?}", entry.manager);
        if !entry.subresource.is_empty() {
            who.push_str(&format!(" with subresource {:?}", entry.subresource));
        }
        if entry.operation == "Update" {
            who.push_str(&format!(" using {}", entry.api_version));
            if let Some(time) = entry.time.as_str() {
                who.push_str(&format!(" at {time}"));
            }
        }
        let paths = contested.paths();
        if paths.len() == 1 {
            lines.push(format!("{who}: {}", paths.concat()));
        } else {
            lines.push(format!("{who}:\n- {}", paths.join("\n- ")));
        }
        causes.extend(
            paths
                .into_iter()
                .map(|path| Cause::new("FieldManagerConflict", path, who.clone())),
        );
    }
    let plural = if causes.len() == 1 { "" } else { "s" };
    let message = format!(
        "Apply failed with {} conflict{plural}: {}",
        causes.len(),
        lines.join("\n")
    );
    let mut error = ApiError::new(StatusCode::CONFLICT, "Conflict", message);
    error.causes = causes;
    error
}

/// `patch` laid over `base`: fields and list items by their identity, leaves replaced.
fn merge(schema: Option<&Value>, base: &Value, patch: &Value) -> Value {
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

/// Takes the paths of `gone` out of `value`. Where a parent of something in `keep` would go, it stays.
fn remove(schema: Option<&Value>, value: &mut Value, gone: &FieldSet, keep: &FieldSet) {
    let keys = match shape(schema, value) {
        Shape::Items(_, keys) => Some(keys),
        Shape::Fields(_) | Shape::Leaf => None,
    };
    match value {
        Value::Object(object) => {
            for (element, below) in &gone.children {
                let Some(name) = element.strip_prefix("f:") else {
                    continue;
                };
                let kept = keep.children.get(element);
                let Some(child) = object.get_mut(name) else {
                    continue;
                };
                let was_filled = child.as_object().is_some_and(|o| !o.is_empty())
                    || child.as_array().is_some_and(|a| !a.is_empty());
                remove(
                    field_schema(schema, name),
                    child,
                    below,
                    kept.unwrap_or(&FieldSet::default()),
                );
                let emptied = was_filled
                    && (child.as_object().is_some_and(Map::is_empty)
                        || child.as_array().is_some_and(Vec::is_empty));
                if (below.here || emptied) && kept.is_none() && (emptied || below.children.is_empty()) {
                    object.remove(name);
                }
            }
        }
        Value::Array(items) => {
            let Some(keys) = keys else { return };
            items.retain_mut(|item| {
                let element = item_element(item, &keys);
                let Some(below) = gone.children.get(&element) else {
                    return true;
                };
                if below.here {
                    return false;
                }
                let kept = keep.children.get(&element).cloned().unwrap_or_default();
                remove(item_schema(schema), item, below, &kept);
                true
            });
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema() -> Value {
        schema_with_metadata(Some(
            &json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
                "size": {"type": "integer"}, "color": {"type": "string"},
                "parts": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
                    "items": {"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}}},
                "tags": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
                "atomic": {"type": "array", "items": {"type": "integer"}},
            }}}}),
        ))
    }

    fn writer(manager: &str) -> Writer {
        Writer {
            manager: manager.into(),
            api_version: "t/v1".into(),
            subresource: String::new(),
            now: "2026-01-01T00:00:00Z".into(),
        }
    }

    fn object(spec: Value) -> Value {
        json!({"apiVersion": "t/v1", "kind": "T", "metadata": {"name": "x"}, "spec": spec})
    }

    #[test]
    fn applying_twice_changes_nothing() {
        let intent = object(json!({"size": 1, "parts": [{"name": "a", "n": 1}], "tags": ["x"]}));
        let once = apply(&schema(), None, &intent, &writer("a"), false).unwrap();
        let mut later = writer("a");
        later.now = "2027-01-01T00:00:00Z".into();
        assert_eq!(
            apply(&schema(), Some(&once), &intent, &later, false).unwrap(),
            once
        );
    }

    #[test]
    fn two_managers_keep_out_of_each_others_way() {
        let a = object(json!({"size": 1, "parts": [{"name": "a", "n": 1}]}));
        let b = object(json!({"color": "red", "parts": [{"name": "b", "n": 2}]}));
        let one = apply(&schema(), None, &a, &writer("a"), false).unwrap();
        let both = apply(&schema(), Some(&one), &b, &writer("b"), false).unwrap();
        assert_eq!(
            both["spec"],
            json!({"size": 1, "parts": [{"name": "a", "n": 1}, {"name": "b", "n": 2}], "color": "red"})
        );
        // a gives up its part: only that goes.
        let less = apply(
            &schema(),
            Some(&both),
            &object(json!({"size": 1})),
            &writer("a"),
            false,
        )
        .unwrap();
        assert_eq!(
            less["spec"],
            json!({"size": 1, "parts": [{"name": "b", "n": 2}], "color": "red"})
        );
    }

    #[test]
    fn another_managers_field_is_a_conflict_unless_forced() {
        let live = apply(&schema(), None, &object(json!({"size": 1})), &writer("a"), false).unwrap();
        let error = apply(
            &schema(),
            Some(&live),
            &object(json!({"size": 2})),
            &writer("b"),
            false,
        )
        .unwrap_err();
        assert_eq!(
            error.message,
            "Apply failed with 1 conflict: conflict with \"a\": .spec.size"
        );
        let forced = apply(
            &schema(),
            Some(&live),
            &object(json!({"size": 2})),
            &writer("b"),
            true,
        )
        .unwrap();
        assert_eq!(forced["spec"]["size"], 2);
        let managers: Vec<&str> = forced["metadata"]["managedFields"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| e["manager"].as_str().unwrap())
            .collect();
        assert_eq!(managers, ["b"]);
    }

    #[test]
    fn an_equal_value_is_shared_and_stays_when_one_lets_go() {
        let live = apply(&schema(), None, &object(json!({"size": 1})), &writer("a"), false).unwrap();
        let shared = apply(
            &schema(),
            Some(&live),
            &object(json!({"size": 1, "color": "x"})),
            &writer("b"),
            false,
        )
        .unwrap();
        let left = apply(
            &schema(),
            Some(&shared),
            &object(json!({"color": "x"})),
            &writer("b"),
            false,
        )
        .unwrap();
        assert_eq!(left["spec"], json!({"size": 1, "color": "x"}));
    }

    #[test]
    fn an_update_takes_what_it_changes() {
        let mut live = apply(
            &schema(),
            None,
            &object(json!({"size": 1, "color": "x"})),
            &writer("a"),
            false,
        )
        .unwrap();
        let old = live.clone();
        live["spec"]["size"] = json!(5);
        record_update(&schema(), Some(&old), &mut live, &writer("kubectl-edit"));
        let error = apply(
            &schema(),
            Some(&live),
            &object(json!({"size": 1, "color": "x"})),
            &writer("a"),
            false,
        )
        .unwrap_err();
        assert_eq!(
            error.message,
            "Apply failed with 1 conflict: conflict with \"kubectl-edit\" using t/v1 at 2026-01-01T00:00:00Z: .spec.size"
        );
    }

    #[test]
    fn set_items_and_atomic_lists() {
        let live = apply(
            &schema(),
            None,
            &object(json!({"tags": ["x", "y"], "atomic": [1, 2]})),
            &writer("a"),
            false,
        )
        .unwrap();
        let next = apply(
            &schema(),
            Some(&live),
            &object(json!({"tags": ["y", "z"], "atomic": [3]})),
            &writer("a"),
            false,
        )
        .unwrap();
        assert_eq!(next["spec"], json!({"tags": ["y", "z"], "atomic": [3]}));
    }
}
