//! What the API server asks of built-in kinds beyond their types, with its wording.

use serde_json::{Map, Value};

use crate::error::Cause;

/// What is wrong with an object of a built-in kind, as it would be kept.
pub(crate) fn check(kind: &str, object: &Value, old: Option<&Value>) -> Vec<Cause> {
    match kind {
        "ConfigMap" => [keys(object, &["data", "binaryData"]), immutable(object, old)].concat(),
        "Secret" => [
            keys(object, &["data"]),
            secret_type(object, old),
            immutable(object, old),
        ]
        .concat(),
        "Lease" => lease(object),
        "Event" if old.is_none() => event(object),
        _ => Vec::new(),
    }
}

fn invalid(at: &str, value: &str, what: &str) -> Cause {
    Cause::new("FieldValueInvalid", at, format!("Invalid value: {value}: {what}"))
}

fn fields<'a>(object: &'a Value, name: &str) -> Option<&'a Map<String, Value>> {
    object.get(name).and_then(Value::as_object)
}

fn keys(object: &Value, maps: &[&str]) -> Vec<Cause> {
    let mut causes = Vec::new();
    for (at, map) in maps.iter().enumerate() {
        for key in fields(object, map).into_iter().flat_map(Map::keys) {
            let place = format!("{map}[{key}]");
            let elsewhere = maps
                .get(at + 1)
                .filter(|other| fields(object, other).is_some_and(|other| other.contains_key(key)));
            if let Some(other) = elsewhere {
                causes.push(invalid(
                    &place,
                    &format!("{key:?}"),
                    &format!("duplicate of key present in {other}"),
                ));
            }
            if let Some(what) = wrong_key(key) {
                causes.push(invalid(&place, &format!("{key:?}"), &what));
            }
        }
    }
    causes
}

/// Keys become file names, so they must be able to.
fn wrong_key(key: &str) -> Option<String> {
    let letter = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if key.len() > 253 {
        Some("must be no more than 253 characters".to_owned())
    } else if key.is_empty() || !key.bytes().all(letter) {
        Some("a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')".to_owned())
    } else if matches!(key, "." | "..") {
        Some(format!("must not be '{key}'"))
    } else if key.starts_with("..") {
        Some("must not start with '..'".to_owned())
    } else {
        None
    }
}

fn immutable(object: &Value, old: Option<&Value>) -> Vec<Cause> {
    let Some(old) = old.filter(|old| old.get("immutable") == Some(&Value::Bool(true))) else {
        return Vec::new();
    };
    let forbidden = |at: &str| {
        let message = "Forbidden: field is immutable when `immutable` is set";
        Cause::new("FieldValueForbidden", at, message)
    };
    let mut causes = Vec::new();
    if object.get("immutable") != Some(&Value::Bool(true)) {
        causes.push(forbidden("immutable"));
    }
    for map in ["data", "binaryData"] {
        if fields(object, map).unwrap_or(&Map::new()) != fields(old, map).unwrap_or(&Map::new()) {
            causes.push(forbidden(map));
        }
    }
    causes
}

fn secret_type(object: &Value, old: Option<&Value>) -> Vec<Cause> {
    let kind = |object: &Value| {
        object
            .get("type")
            .and_then(Value::as_str)
            .unwrap_or("Opaque")
            .to_owned()
    };
    let found = kind(object);
    if old.is_some_and(|old| kind(old) != found) {
        return vec![invalid("type", &format!("{found:?}"), "field is immutable")];
    }
    let required: &[&str] = match found.as_str() {
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        _ => &[],
    };
    let absent = required
        .iter()
        .filter(|key| !fields(object, "data").is_some_and(|data| data.contains_key(**key)));
    let cause = |key: &&str| Cause::new("FieldValueRequired", format!("data[{key}]"), "Required value");
    absent.map(cause).collect()
}

/// Whether a time is written with the six digits behind the second that the API server asks for.
pub(crate) fn micro_time(kind: &str, object: &Value) -> Result<(), String> {
    let pointers: &[&str] = match kind {
        "Lease" => &["/spec/acquireTime", "/spec/renewTime"],
        "Event" => &["/eventTime", "/series/lastObservedTime"],
        _ => &[],
    };
    for pointer in pointers {
        let Some(time) = object.pointer(pointer).and_then(Value::as_str) else {
            continue;
        };
        let digits = time.split_once('.').map_or("", |(_, rest)| rest);
        let digits = digits.bytes().take_while(u8::is_ascii_digit).count();
        if digits != 6 || time.parse::<jiff::Timestamp>().is_err() {
            return Err(format!(
                "parsing time {time:?}: it must be written with six digits behind the second, as in 2006-01-02T15:04:05.000000Z"
            ));
        }
    }
    Ok(())
}

fn lease(object: &Value) -> Vec<Cause> {
    let number = |field: &str| object.pointer(&format!("/spec/{field}")).and_then(Value::as_i64);
    let mut causes = Vec::new();
    if let Some(seconds) = number("leaseDurationSeconds").filter(|seconds| *seconds <= 0) {
        let value = seconds.to_string();
        causes.push(invalid(
            "spec.leaseDurationSeconds",
            &value,
            "must be greater than 0",
        ));
    }
    if let Some(count) = number("leaseTransitions").filter(|count| *count < 0) {
        let value = count.to_string();
        causes.push(invalid(
            "spec.leaseTransitions",
            &value,
            "must be greater than or equal to 0",
        ));
    }
    causes
}

/// Events lie in the namespace of what they tell of; those that say when they happened say all the rest.
fn event(object: &Value) -> Vec<Cause> {
    let text = |pointer: &str| {
        object
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let (own, involved) = (text("/metadata/namespace"), text("/involvedObject/namespace"));
    // What lies in no namespace is told of in `default` or `kube-system`.
    let fits = involved == own || (involved.is_empty() && matches!(own, "default" | "kube-system"));
    if !fits {
        let value = format!("{involved:?}");
        return vec![invalid(
            "involvedObject.namespace",
            &value,
            "does not match event.namespace",
        )];
    }
    Vec::new()
}

/// What the newer group asks for besides.
pub(crate) fn check_new_event(object: &Value) -> Vec<Cause> {
    let text = |name: &str| object.get(name).and_then(Value::as_str).unwrap_or_default();
    if text("eventTime").is_empty() {
        return vec![Cause::new("FieldValueRequired", "eventTime", "Required value")];
    }
    let mut causes = Vec::new();
    for (name, at) in [
        ("reportingComponent", "reportingController"),
        ("reportingInstance", "reportingInstance"),
        ("action", "action"),
        ("reason", "reason"),
    ] {
        if text(name).is_empty() {
            causes.push(Cause::new("FieldValueRequired", at, "Required value"));
        }
    }
    let kind = text("type");
    if !matches!(kind, "Normal" | "Warning") {
        causes.push(invalid("type", "\"\"", &format!("has invalid value: {kind}")));
    }
    causes
}
