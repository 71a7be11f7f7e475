//! Properties of server-side apply that hold for any object and any managers.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::fields::field_schema;

fn schema() -> Value {
    schema_with_metadata(Some(
        &json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
            "a": {"type": "integer"}, "b": {"type": "integer"},
            "inner": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"},
                "deep": {"type": "object", "properties": {"z": {"type": "integer"}}}}},
            "labels": {"type": "object", "additionalProperties": {"type": "integer"}},
            "parts": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
                "items": {"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}, "m": {"type": "integer"}}}},
            "tags": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
            "whole": {"type": "array", "items": {"type": "integer"}},
        }}}}),
    ))
}

fn writer(manager: &str) -> Writer {
    Writer {
        status_apart: false,
        manager: manager.into(),
        api_version: "t/v1".into(),
        subresource: String::new(),
        now: "2026-01-01T00:00:00Z".into(),
    }
}

fn maybe<T: Strategy + 'static>(value: T) -> impl Strategy<Value = Option<T::Value>>
where
    T::Value: Clone,
{
    proptest::option::of(value)
}

fn number() -> impl Strategy<Value = i64> {
    0..3_i64
}

/// A configuration with some of the fields above.
fn configuration() -> impl Strategy<Value = Value> {
    let inner = (maybe(number()), maybe(number()), maybe(maybe(number()))).prop_map(|(x, y, deep)| {
        let mut inner = Map::new();
        for (name, value) in [("x", x), ("y", y)] {
            value.map(|value| inner.insert(name.to_owned(), json!(value)));
        }
        if let Some(z) = deep {
            let deep = z.map_or_else(|| json!({}), |z| json!({"z": z}));
            inner.insert("deep".to_owned(), deep);
        }
        Value::Object(inner)
    });
    let part = (maybe(number()), maybe(number()));
    let parts = proptest::collection::btree_map("[p-r]", part, 0..3).prop_map(|parts| {
        let parts = parts.into_iter().map(|(name, (n, m))| {
            let mut part = json!({"name": name});
            for (key, value) in [("n", n), ("m", m)] {
                if let Some(value) = value {
                    part[key] = json!(value);
                }
            }
            part
        });
        Value::Array(parts.collect())
    });
    let labels = proptest::collection::btree_map("[k-m]", number(), 0..3).prop_map(|labels| json!(labels));
    let tags = proptest::collection::btree_set("[s-u]", 0..3).prop_map(|tags| json!(tags));
    let whole = proptest::collection::vec(number(), 0..3).prop_map(|items| json!(items));
    let numbers = (maybe(number()), maybe(number()));
    (
        numbers,
        maybe(inner),
        maybe(labels),
        maybe(parts),
        maybe(tags),
        maybe(whole),
    )
        .prop_map(|((a, b), inner, labels, parts, tags, whole)| {
            let mut spec = Map::new();
            let fields = [
                ("a", a.map(|a| json!(a))),
                ("b", b.map(|b| json!(b))),
                ("inner", inner),
                ("labels", labels),
                ("parts", parts),
                ("tags", tags),
                ("whole", whole),
            ];
            for (name, value) in fields {
                value.map(|value| spec.insert(name.to_owned(), value));
            }
            json!({"apiVersion": "t/v1", "kind": "T", "metadata": {"name": "x"}, "spec": spec})
        })
}

fn applied(live: Option<&Value>, configuration: &Value, manager: &str) -> Value {
    apply(&schema(), live, configuration, &writer(manager), true).unwrap()
}

/// Every path that is set, without the structures on the way.
fn leaves(value: &Value) -> Vec<String> {
    fields_of(field_schema(Some(&schema()), "spec"), &value["spec"]).paths()
}

fn owned(object: &Value, manager: &str) -> FieldSet {
    let entries = entries(object).into_iter();
    entries
        .filter(|entry| entry.manager == manager)
        .fold(FieldSet::default(), |mut set, entry| {
            set.union(&entry.set);
            set
        })
}

/// Lists that identify their items have no order of their own, and nobody owns one with nothing in it.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.iter().filter(|(_, value)| **value != json!([]));
            Value::Object(kept.map(|(k, v)| (k.clone(), sorted(v))).collect())
        }
        Value::Array(items) if items.iter().any(|item| !item.is_number()) => {
            let mut items: Vec<Value> = items.iter().map(sorted).collect();
            items.sort_by_key(Value::to_string);
            Value::Array(items)
        }
        other => other.clone(),
    }
}

/// When something was applied, and in which order, depends on who came first.
fn timeless(mut object: Value) -> Value {
    let entries = object["metadata"]["managedFields"].as_array_mut();
    for entry in entries.into_iter().flatten() {
        entry["time"] = Value::Null;
    }
    sorted(&object)
}

proptest! {
    #[test]
    fn applying_twice_changes_nothing(first in configuration(), second in configuration()) {
        let live = applied(None, &first, "other");
        let once = applied(Some(&live), &second, "me");
        let mut later = writer("me");
        later.now = "2027-01-01T00:00:00Z".into();
        let twice = apply(&schema(), Some(&once), &second, &later, false).unwrap();
        prop_assert_eq!(twice, once);
    }

    #[test]
    fn everything_that_is_applied_is_there_and_owned(first in configuration(), second in configuration()) {
        let live = applied(Some(&applied(None, &first, "other")), &second, "me");
        let found = fields_of(Some(&schema()), &live);
        let mut missing = fields_of(Some(&schema()), &second);
        missing.subtract(&found);
        // Only an empty structure that another fills is not there as such.
        prop_assert!(missing.paths().iter().all(|path| {
            let pointer = path.replace('.', "/");
            second.pointer(&pointer).is_some_and(|value| value.as_object().is_some_and(Map::is_empty) || value.as_array().is_some_and(Vec::is_empty))
        }), "{:?} missing in {}", missing.paths(), live);
        let mut unowned = strip(fields_of(Some(&schema()), &second), &writer("me"));
        unowned.subtract(&owned(&live, "me"));
        prop_assert!(unowned.is_empty(), "{:?}", unowned.paths());
    }

    #[test]
    fn one_manager_alone_gets_exactly_what_it_applies(first in configuration(), second in configuration()) {
        let live = applied(Some(&applied(None, &first, "me")), &second, "me");
        // Who owns nothing in a structure does not own the structure.
        let nothing = |value: &Value| value.is_null() || *value == json!({});
        let (found, wanted) = (sorted(&live["spec"]), sorted(&second["spec"]));
        prop_assert!(found == wanted || (nothing(&found) && nothing(&wanted)), "{found} {wanted}");
    }

    #[test]
    fn what_is_owned_is_there(first in configuration(), second in configuration(), third in configuration()) {
        let live = applied(None, &first, "a");
        let live = applied(Some(&live), &second, "b");
        let live = applied(Some(&live), &third, "a");
        let there = fields_of(Some(&schema()), &live).with_named_fields(Some(&schema()));
        for manager in ["a", "b"] {
            let mut gone = owned(&live, manager);
            gone.subtract(&there);
            prop_assert!(gone.is_empty(), "{manager} owns {:?} in {}", gone.paths(), live);
        }
    }

    #[test]
    fn a_field_goes_only_when_its_last_owner_lets_go(first in configuration(), second in configuration(), third in configuration()) {
        let before = applied(Some(&applied(None, &first, "a")), &second, "b");
        let after = applied(Some(&before), &third, "a");
        let there = leaves(&after);
        let mut kept = owned(&before, "b");
        kept.subtract(&fields_of(Some(&schema()), &third));
        for path in kept.children.get("f:spec").map(FieldSet::paths).unwrap_or_default() {
            prop_assert!(there.contains(&path) || there.iter().any(|found| found.starts_with(&path)), "{path} of b went: {after}");
        }
        let mut left = owned(&before, "a");
        left.subtract(&owned(&before, "b"));
        left.subtract(&fields_of(Some(&schema()), &third));
        for path in left.children.get("f:spec").map(FieldSet::paths).unwrap_or_default() {
            prop_assert!(!there.contains(&path), "{path} of a stayed: {after}");
        }
    }

    #[test]
    fn managers_of_different_fields_may_come_in_any_order(first in configuration(), second in configuration()) {
        let mut other = second;
        let taken: Vec<String> = first["spec"].as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect();
        if let Some(spec) = other["spec"].as_object_mut() {
            spec.retain(|name, _| !taken.contains(name));
        }
        let one = applied(Some(&applied(None, &first, "a")), &other, "b");
        let two = applied(Some(&applied(None, &other, "b")), &first, "a");
        prop_assert_eq!(timeless(one), timeless(two));
    }

    #[test]
    fn without_force_nobody_loses_a_field(first in configuration(), second in configuration()) {
        let live = applied(None, &first, "a");
        match apply(&schema(), Some(&live), &second, &writer("b"), false) {
            Ok(merged) => prop_assert_eq!(owned(&merged, "a"), owned(&live, "a")),
            Err(error) => {
                prop_assert_eq!(error.reason, "Conflict");
                prop_assert!(error.causes.iter().all(|cause| cause.message == "conflict with \"a\""));
            }
        }
    }

    #[test]
    fn an_update_belongs_to_its_writer_and_an_equal_one_to_nobody(first in configuration(), second in configuration()) {
        let live = applied(None, &first, "a");
        let mut new = second;
        new["metadata"]["managedFields"] = live["metadata"]["managedFields"].clone();
        record_update(&schema(), true, &live, &mut new, &writer("editor"));
        let (changed, _) = compare(Some(&schema()), Some(&without_managed_fields(&live)), Some(&without_managed_fields(&new)));
        prop_assert_eq!(owned(&new, "editor"), strip(changed, &writer("editor")));
        let mut again = new.clone();
        record_update(&schema(), true, &new, &mut again, &writer("third"));
        prop_assert_eq!(again, new);
    }

    #[test]
    fn field_sets_are_written_and_read_without_loss(value in configuration()) {
        let set = strip(fields_of(Some(&schema()), &value), &writer("me"));
        prop_assume!(!set.is_empty());
        prop_assert_eq!(FieldSet::from_fields_v1(&set.to_fields_v1()), set);
    }

    #[test]
    fn foreign_field_sets_never_make_it_panic(first in configuration(), key in "[fkvi.]:?[a-z{}\"\\\\:]{0,8}", second in configuration()) {
        let mut live = applied(None, &first, "a");
        live["metadata"]["managedFields"] = json!([
            {"manager": "a", "operation": "Apply", "apiVersion": "t/v1", "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {key.clone(): {key: {}}}}},
            7, {"manager": 3, "fieldsV1": "x"},
        ]);
        let _ = apply(&schema(), Some(&live), &second, &writer("a"), false);
    }
}
