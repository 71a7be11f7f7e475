//! What server-side apply and other writers do to fields and to their ownership.

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
        status_apart: false,
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
    record_update(&schema(), true, &old, &mut live, &writer("kubectl-edit"));
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
        "Apply failed with 1 conflict: conflict with \"kubectl-edit\" using t/v1: .spec.size"
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
