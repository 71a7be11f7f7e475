//! Made-up sequences of operations on two gadgets or two config maps, by two managers; each ends with a list of what
//! is there and a watch of all that came to be. A sequence that the servers answer differently is shrunk to the
//! shortest that still does.
//!
//! `FREEHOLD_TEST_SEQUENCES` says how many; what was found is best kept as a scripted case.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::subsequence;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Map, Value, json};

use crate::both::{Both, SUITE};
use crate::script::{Case, Step};
use crate::scripted::{NULLED, run_patiently};

/// Sequences of a run that does not say how many.
const SEQUENCES: u32 = 40;
/// Most attempts to make a sequence shorter: each is a run on both servers.
const SHRINKS: u32 = 500;

/// What a sequence is about.
#[derive(Clone, Copy, Debug)]
enum Made {
    /// Of a CustomResourceDefinition: the schema's rules, a status, managed lists and maps.
    Gadgets,
    /// Built in: no status, a strategic merge, an object that may turn immutable.
    ConfigMaps,
}

impl Made {
    fn path(self) -> &'static str {
        match self {
            Self::Gadgets => "gadgets",
            Self::ConfigMaps => "configmaps",
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_sequences_answer_alike() {
    let both = Arc::new(Both::start().await);
    let handle = tokio::runtime::Handle::current();
    let asked = std::env::var("FREEHOLD_TEST_SEQUENCES").ok();
    let cases = asked.map_or(SEQUENCES, |text| text.parse().unwrap());
    let number = AtomicUsize::new(0);
    let (whole, cut_short) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counted = (Arc::clone(&whole), Arc::clone(&cut_short));
    let run = move || {
        let config = Config {
            cases,
            max_shrink_iters: SHRINKS,
            failure_persistence: None,
            ..Config::default()
        };
        TestRunner::new(config)
            .run(&sequence(), |steps| {
                let case = Case {
                    case: "made up".to_owned(),
                    steps,
                };
                let number = 10_000 + number.fetch_add(1, Ordering::Relaxed);
                let running = run_patiently(Arc::clone(&both), number, "made up".to_owned(), case);
                let found = handle.block_on(running);
                let counter = if found.cut_short { &counted.1 } else { &counted.0 };
                counter.fetch_add(1, Ordering::Relaxed);
                if found.complaints.is_empty() {
                    Ok(())
                } else {
                    Err(TestCaseError::fail(found.complaints.join("\n")))
                }
            })
            .map_err(|error| error.to_string())
    };
    let outcome = tokio::time::timeout(SUITE, tokio::task::spawn_blocking(run)).await;
    if let Err(why) = outcome.unwrap().unwrap() {
        panic!("{why}");
    }
    let (whole, cut_short) = (whole.load(Ordering::Relaxed), cut_short.load(Ordering::Relaxed));
    println!("{whole} sequences were compared to their end, {cut_short} until \"{NULLED}\"");
    assert!(
        whole > 2 * cut_short,
        "most sequences must be compared to their end"
    );
}

/// Operations, and then what is there and how it came to be.
fn sequence() -> impl Strategy<Value = Vec<Step>> {
    prop_oneof![2 => Just(Made::Gadgets), 1 => Just(Made::ConfigMaps)]
        .prop_flat_map(|made| (Just(made), vec(operation(made), 1..12)))
        .prop_map(|(made, operations)| {
            let path = made.path();
            // A whole cluster puts a map of its own into each namespace.
            let all = format!("{path}?fieldSelector=metadata.name!=kube-root-ca.crt");
            let mut start = step(format!("GET {all}"), Value::Null);
            start
                .save
                .insert("start".to_owned(), "/metadata/resourceVersion".to_owned());
            let watch = format!("WATCH {all}&watch=true&resourceVersion=$start&timeoutSeconds=1");
            let end = [step(format!("GET {all}"), Value::Null), step(watch, Value::Null)];
            std::iter::once(start)
                .chain(operations.into_iter().flatten())
                .chain(end)
                .collect()
        })
}

fn step(action: String, body: Value) -> Step {
    Step {
        action,
        body: Some(body).filter(|body| !body.is_null()),
        text: None,
        content_type: None,
        accept: None,
        groups: Vec::new(),
        bare: false,
        save: BTreeMap::new(),
        times: None,
        pause_seconds: 0.0,
        differs: BTreeMap::new(),
    }
}

/// An operation, and a look at what it left, which keeps the resource version for the next.
fn operation(made: Made) -> BoxedStrategy<Vec<Step>> {
    let name = prop_oneof![Just("a"), Just("b")];
    let manager = prop_oneof![Just("one"), Just("two")];
    let common = prop_oneof![
        2 => Just("POST"), 2 => Just("PUT"), 2 => Just("MERGE"), 5 => Just("APPLY"), 2 => Just("FORCE"),
        1 => Just("DELETE"), 1 => Just("FINALIZERS"), 1 => Just("STALE"),
    ];
    let (kind, content) = match made {
        Made::Gadgets => {
            let kind = prop_oneof![16 => common, 2 => Just("STATUS"), 1 => Just("APPLYSTATUS")];
            (
                kind.boxed(),
                spec().prop_map(|spec| json!({"spec": spec})).boxed(),
            )
        }
        Made::ConfigMaps => (
            prop_oneof![16 => common, 3 => Just("STRATEGIC")].boxed(),
            data().boxed(),
        ),
    };
    let plural = made.path();
    (kind, name, manager, content, metadata(), status())
        .prop_map(move |(kind, name, manager, content, metadata, status)| {
            let mut whole = content;
            whole["metadata"] = metadata;
            whole["metadata"]["name"] = json!(name);
            let with_version = |mut whole: Value, version: &str| {
                whole["metadata"]["resourceVersion"] = json!(version);
                whole
            };
            let current = format!("$version{name}");
            let own_status = json!({"metadata": {"name": name}, "status": status});
            let path = format!("{plural}/{name}?fieldManager={manager}");
            let status_path = format!("{plural}/{name}/status?fieldManager={manager}");
            let done = match kind {
                "POST" => step(format!("POST {plural}?fieldManager={manager}"), whole),
                "PUT" => step(format!("PUT {path}"), with_version(whole, &current)),
                "STALE" => step(format!("PUT {path}"), with_version(whole, "1")),
                "STRATEGIC" => step(format!("STRATEGIC {path}"), whole),
                "MERGE" => step(format!("MERGE {path}"), whole),
                "APPLY" => step(format!("APPLY {path}"), whole),
                "FORCE" => step(format!("APPLY {path}&force=true"), whole),
                "STATUS" => step(format!("MERGE {status_path}"), json!({"status": status})),
                "APPLYSTATUS" => step(format!("APPLY {status_path}"), own_status),
                "DELETE" => step(format!("DELETE {plural}/{name}"), Value::Null),
                _ => step(format!("MERGE {path}"), json!({"metadata": {"finalizers": null}})),
            };
            let mut look = step(format!("GET {plural}/{name}"), Value::Null);
            look.save
                .insert(format!("version{name}"), "/metadata/resourceVersion".to_owned());
            vec![done, look]
        })
        .boxed()
}

/// What a config map holds. A key may stand in both maps, which is refused.
fn data() -> impl Strategy<Value = Value> {
    let texts = some(vec![
        ("a", one_of(&["1", "2"])),
        ("b", one_of(&["1", "2"])),
        ("c", one_of(&["3"])),
    ]);
    let bytes = some(vec![("y", one_of(&["AAE=", "AAI="])), ("c", one_of(&["AAM="]))]);
    let full = |map: &Value| *map != json!({});
    some(vec![
        ("data", texts.prop_filter("empty", full).boxed()),
        ("binaryData", bytes.prop_filter("empty", full).boxed()),
        (
            "immutable",
            prop_oneof![9 => Just(json!(false)), 1 => Just(json!(true))].boxed(),
        ),
    ])
}

fn some(fields: Vec<(&'static str, BoxedStrategy<Value>)>) -> impl Strategy<Value = Value> {
    let count = fields.len();
    subsequence(fields, 0..=count).prop_flat_map(|chosen| {
        let (names, values): (Vec<_>, Vec<_>) = chosen.into_iter().unzip();
        values.prop_map(move |values| {
            let fields = names.iter().map(|name| (*name).to_owned()).zip(values);
            Value::Object(fields.collect::<Map<_, _>>())
        })
    })
}

fn one_of(values: &'static [&'static str]) -> BoxedStrategy<Value> {
    prop::sample::select(values).prop_map(Value::from).boxed()
}

/// Lists and maps have something in them: see "A map that an apply empties" in docs/conformance.md.
fn spec() -> impl Strategy<Value = Value> {
    let texts = |texts: &'static [&'static str]| {
        let chosen = subsequence(texts.to_vec(), 1..=texts.len());
        chosen.prop_shuffle().prop_map(|list| json!(list)).boxed()
    };
    let parts = subsequence(vec!["p", "q", "r"], 1..=3)
        .prop_flat_map(|names| {
            let counts = vec(prop::option::of(1..4), names.len());
            (Just(names), counts)
        })
        .prop_map(|(names, counts)| {
            let parts = names.iter().zip(counts).map(|(name, count)| match count {
                Some(count) => json!({"name": name, "count": count}),
                None => json!({"name": name}),
            });
            Value::Array(parts.collect())
        });
    let limits = btree_map(prop::sample::select(vec!["a", "b"]), 1..4, 1..=2).prop_map(|map| json!(map));
    let rest = some(vec![
        ("size", (0..6).prop_map(Value::from).boxed()),
        ("note", one_of(&["xx", "yy", "z"])),
        ("tags", texts(&["s", "t", "u"])),
        ("steps", texts(&["k", "l"])),
        ("parts", parts.boxed()),
        ("limits", limits.boxed()),
        ("fixed", one_of(&["now", "then"])),
        (
            "whole",
            some(vec![("x", one_of(&["m"])), ("w", one_of(&["n", "o"]))])
                .prop_filter("empty", |v| *v != json!({}))
                .boxed(),
        ),
        (
            "nested",
            some(vec![("level", one_of(&["low", "high"]))])
                .prop_filter("empty", |v| *v != json!({}))
                .boxed(),
        ),
    ]);
    let color = prop_oneof![6 => Just(Some("red")), 3 => Just(Some("blue")), 1 => Just(None), 1 => Just(Some("pink"))];
    (color, rest).prop_map(|(color, mut rest)| {
        if let Some(color) = color {
            rest["color"] = json!(color);
        }
        rest
    })
}

fn metadata() -> impl Strategy<Value = Value> {
    some(vec![
        (
            "labels",
            some(vec![("l", one_of(&["1", "2"])), ("m", one_of(&["1"]))])
                .prop_filter("empty", |v| *v != json!({}))
                .boxed(),
        ),
        (
            "annotations",
            some(vec![("n", one_of(&["1", "2"]))])
                .prop_filter("empty", |v| *v != json!({}))
                .boxed(),
        ),
        ("finalizers", Just(json!(["example.com/hold"])).boxed()),
    ])
}

fn status() -> impl Strategy<Value = Value> {
    some(vec![
        ("phase", one_of(&["New", "Good"])),
        ("observed", (1..3).prop_map(Value::from).boxed()),
        (
            "conditions",
            one_of(&["True", "False"])
                .prop_map(|status| json!([{"type": "Ready", "status": status}]))
                .boxed(),
        ),
    ])
}
