//! Whether two answers are the same but for what no two servers share: uids, times, resource versions.
//!
//! These are not left out but renamed in the order in which they first occur, so that "the uid stayed" and
//! "the resource version moved" are compared as well.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::LazyLock;

use regex::Regex;
use serde_json::{Map, Value, json};

use crate::exchange::Answer;

#[expect(clippy::expect_used, reason = "the patterns are constants")]
fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a constant pattern is valid")
}

static UID: LazyLock<Regex> =
    LazyLock::new(|| pattern("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"));
static AGE: LazyLock<Regex> = LazyLock::new(|| pattern("^([0-9]+[smhdy]){1,2}$"));
static TIME: LazyLock<Regex> = LazyLock::new(|| pattern("^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}Z$"));
static TOO_OLD: LazyLock<Regex> = LazyLock::new(|| pattern(r"resource version: \d+ \(\d+\)"));
static PRECONDITION: LazyLock<Regex> = LazyLock::new(|| pattern(r"(precondition|record) \(\d+\)"));
static TOO_LARGE: LazyLock<Regex> = LazyLock::new(|| pattern(r"resource version: \d+, current: \d+"));

/// The names that one side's uids and resource versions were given so far.
#[derive(Clone, Debug, Default)]
pub struct Renamed {
    uids: BTreeMap<String, usize>,
    revisions: BTreeMap<String, usize>,
}

impl Renamed {
    /// The answer as it can be compared.
    pub fn comparable(&mut self, answer: &Answer) -> Value {
        let mut body = answer.body.clone();
        if let Value::Array(events) = &mut body {
            // A plain bookmark comes when the server has time for it.
            let plain = |event: &Value| {
                event.get("type").is_some_and(|kind| kind == "BOOKMARK")
                    && event.pointer("/object/metadata/annotations").is_none()
            };
            events.retain(|event| !plain(event));
        }
        self.value(&mut body, "", false);
        json!({"code": answer.code, "warnings": answer.warnings, "body": body})
    }

    fn value(&mut self, value: &mut Value, key: &str, of_list: bool) {
        match value {
            Value::Object(object) => self.object(object, key, of_list),
            Value::Array(items) => {
                for item in items.iter_mut() {
                    self.value(item, key, false);
                }
                if key == "managedFields" {
                    // The server orders them by time, and a second may pass between two writes on one side.
                    items.sort_by_key(|entry| {
                        let text = |key: &str| entry.get(key).map(Value::to_string);
                        (
                            text("operation"),
                            text("manager"),
                            text("subresource"),
                            text("fieldsV1"),
                        )
                    });
                }
            }
            Value::String(text) => {
                if let Some(renamed) = self.text(text, key, of_list) {
                    *text = renamed;
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    fn object(&mut self, object: &mut Map<String, Value>, key: &str, of_list: bool) {
        settle_causes(object);
        let fields = std::mem::take(object).into_iter();
        *object = fields
            .map(|(name, value)| (self.text(&name, "", false).unwrap_or(name), value))
            .collect();
        let is_list = object.contains_key("items") || object.contains_key("rows");
        let is_bookmark = object.get("type").is_some_and(|kind| kind == "BOOKMARK");
        let generated = object
            .get("generateName")
            .and_then(Value::as_str)
            .map(str::to_owned);
        for (name, value) in object.iter_mut() {
            let inner_list = match name.as_str() {
                "metadata" => is_list || of_list,
                "object" => is_bookmark,
                _ => false,
            };
            if let (true, "name", Some(prefix), Some(text)) =
                (key == "metadata", name.as_str(), &generated, value.as_str())
                && let Some(kept) = text.len().checked_sub(RANDOM).and_then(|at| text.get(..at))
                && prefix.starts_with(kept)
            {
                *value = json!(format!("{kept}<random>"));
                continue;
            }
            self.value(value, name, inner_list || (key == "metadata" && of_list));
        }
    }

    fn text(&mut self, text: &str, key: &str, of_list: bool) -> Option<String> {
        match key {
            "resourceVersion" if text.is_empty() || text == "0" => None,
            "resourceVersion" if of_list => Some("<revision of the list>".to_owned()),
            "resourceVersion" => {
                let next = self.revisions.len() + 1;
                let number = self.revisions.entry(text.to_owned()).or_insert(next);
                Some(format!("<revision {number}>"))
            }
            "creationTimestamp" | "deletionTimestamp" | "time" | "lastTransitionTime" => {
                Some("<time>".to_owned())
            }
            "continue" if !text.is_empty() => Some("<token>".to_owned()),
            "cells" if TIME.is_match(text) => Some("<time>".to_owned()),
            "cells" if AGE.is_match(text) => Some("<age>".to_owned()),
            "message" if TOO_OLD.is_match(text) => {
                Some(TOO_OLD.replace_all(text, "resource version: <old>").into_owned())
            }
            "message" if TOO_LARGE.is_match(text) => Some(
                TOO_LARGE
                    .replace_all(text, "resource version: <large>")
                    .into_owned(),
            ),
            "message" if PRECONDITION.is_match(text) => {
                Some(PRECONDITION.replace_all(text, "$1 (<revision>)").into_owned())
            }
            _ if UID.is_match(text) => {
                let renamed = UID.replace_all(text, |found: &regex::Captures<'_>| {
                    let next = self.uids.len() + 1;
                    let number = self.uids.entry(found[0].to_owned()).or_insert(next);
                    format!("<uid {number}>")
                });
                Some(renamed.into_owned())
            }
            _ => None,
        }
    }
}

/// Letters that a server puts behind a `generateName`.
const RANDOM: usize = 5;

/// The server finds what is wrong in no order of its own, and some of it twice: in the list of causes as well as
/// in the text that is made from it.
fn settle_causes(status: &mut Map<String, Value>) {
    let Some(causes) = status.get("details").and_then(|details| details.get("causes")) else {
        return;
    };
    let mut causes = causes.as_array().cloned().unwrap_or_default();
    causes.sort_by_key(Value::to_string);
    causes.dedup();
    let text = |cause: &Value, key: &str| {
        cause
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let told: Vec<String> = causes
        .iter()
        .map(|cause| format!("{}: {}", text(cause, "field"), text(cause, "message")))
        .collect();
    let message = status.get("message").and_then(Value::as_str).unwrap_or_default();
    if let Some((what, _)) = message.split_once(" is invalid: [") {
        let settled = format!("{what} is invalid: [{}]", told.join(", "));
        status.insert("message".to_owned(), json!(settled));
    }
    if let Some(details) = status.get_mut("details") {
        details["causes"] = json!(causes);
    }
}

/// One place at which two answers are not the same.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// JSON pointer.
    pub at: String,
    /// What the real server has there.
    pub real: Option<Value>,
    /// What the embedded one has there.
    pub embedded: Option<Value>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: &Option<Value>| value.as_ref().map_or("nothing".to_owned(), Value::to_string);
        write!(
            f,
            "{}\n      real:     {}\n      embedded: {}",
            self.at,
            shown(&self.real),
            shown(&self.embedded)
        )
    }
}

/// Every place at which two values are not the same.
#[must_use]
pub fn differences(real: &Value, embedded: &Value) -> Vec<Difference> {
    let mut found = Vec::new();
    compare(Some(real), Some(embedded), String::new(), &mut found);
    found
}

fn compare(real: Option<&Value>, embedded: Option<&Value>, at: String, found: &mut Vec<Difference>) {
    match (real, embedded) {
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            let keys = a.keys().chain(b.keys().filter(|key| !a.contains_key(*key)));
            for key in keys {
                let escaped = key.replace('~', "~0").replace('/', "~1");
                compare(a.get(key), b.get(key), format!("{at}/{escaped}"), found);
            }
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) if a.len() == b.len() => {
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                compare(Some(a), Some(b), format!("{at}/{index}"), found);
            }
        }
        (a, b) if a == b => {}
        (a, b) => found.push(Difference {
            at,
            real: a.cloned(),
            embedded: b.cloned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(body: Value) -> Answer {
        Answer {
            code: 200,
            warnings: Vec::new(),
            body,
        }
    }

    #[test]
    fn what_servers_give_out_is_compared_by_identity_and_not_by_value() {
        let object = |uid: &str, revision: &str| {
            answer(
                json!({"metadata": {"uid": uid, "resourceVersion": revision, "creationTimestamp": "2026-01-01T00:00:00Z"}}),
            )
        };
        let (a, b) = (
            "5a4b7c1e-0000-4000-8000-000000000001",
            "5a4b7c1e-0000-4000-8000-000000000002",
        );
        let (mut real, mut embedded) = (Renamed::default(), Renamed::default());
        let first = (
            real.comparable(&object(a, "7")),
            embedded.comparable(&object(b, "9")),
        );
        assert_eq!(first.0, first.1);
        let moved = (
            real.comparable(&object(a, "8")),
            embedded.comparable(&object(b, "9")),
        );
        assert_eq!(
            differences(&moved.0, &moved.1)[0].at,
            "/body/metadata/resourceVersion"
        );
    }

    #[test]
    fn a_difference_names_its_place() {
        let found = differences(&json!({"a": [1, {"b/c": 2}]}), &json!({"a": [1, {"b/c": 3}]}));
        assert_eq!(
            found,
            [Difference {
                at: "/a/1/b~1c".to_owned(),
                real: Some(json!(2)),
                embedded: Some(json!(3))
            }]
        );
    }
}
