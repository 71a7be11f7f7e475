//! Validation of a value against a structural schema, with the wording of the API server.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;
use serde_json::{Map, Value};

use crate::error::Cause;
use crate::schema::{ListKeys, flag, join, list_keys};

/// The regular expressions of a schema, compiled once.
#[derive(Default)]
pub(crate) struct Patterns(BTreeMap<String, Regex>);

impl Patterns {
    pub(crate) fn compile(schema: &Value) -> Self {
        let mut patterns = Self::default();
        patterns.collect(schema);
        patterns
    }

    fn collect(&mut self, schema: &Value) {
        match schema {
            Value::Object(object) => {
                // One that does not compile (a property may have the name) is left out and never fails.
                if let Some(text) = object.get("pattern").and_then(Value::as_str)
                    && let Ok(regex) = Regex::new(text)
                {
                    self.0.insert(text.to_owned(), regex);
                }
                object.values().for_each(|value| self.collect(value));
            }
            Value::Array(items) => items.iter().for_each(|value| self.collect(value)),
            _ => {}
        }
    }

    fn refuses(&self, pattern: &str, text: &str) -> bool {
        self.0.get(pattern).is_some_and(|regex| !regex.is_match(text))
    }
}

/// What is wrong with `object`. Parts that are as they were in `old` are not looked at.
pub(crate) fn validate(
    schema: &Value,
    patterns: &Patterns,
    object: &Value,
    old: Option<&Value>,
) -> Vec<Cause> {
    let mut validation = Validation {
        patterns,
        causes: Vec::new(),
    };
    validation.value(schema, object, old, "");
    validation.causes
}

struct Validation<'a> {
    patterns: &'a Patterns,
    causes: Vec<Cause>,
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_i64() || n.is_u64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// A value in an error: structures by their type only.
pub(crate) fn brief(value: &Value) -> String {
    match value {
        Value::Object(_) => "\"object\"".to_owned(),
        Value::Array(_) => "\"array\"".to_owned(),
        Value::Null => "\"null\"".to_owned(),
        other => other.to_string(),
    }
}

fn type_matches(schema: &Value, value: &Value) -> bool {
    if flag(schema, "x-kubernetes-int-or-string") {
        return matches!(type_name(value), "integer" | "string");
    }
    match schema.get("type").and_then(Value::as_str) {
        None => true,
        Some("number") => value.is_number(),
        Some("integer") => {
            type_name(value) == "integer" || value.as_f64().is_some_and(|number| number.fract() == 0.0)
        }
        Some(wanted) => wanted == type_name(value),
    }
}

/// Whether a text has the format, for the formats that the API server checks and people use.
fn has_format(format: &str, text: &str) -> bool {
    use base64::Engine;
    match format {
        "date-time" => text.contains(['T', 't', ' ']) && text.parse::<jiff::Timestamp>().is_ok(),
        "date" => text.len() == 10 && text.parse::<jiff::civil::Date>().is_ok(),
        "byte" => base64::engine::general_purpose::STANDARD.decode(text).is_ok(),
        "ipv4" => text.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<std::net::Ipv6Addr>().is_ok(),
        "uuid" => uuid::Uuid::parse_str(text).is_ok(),
        _ => true,
    }
}

fn plural(count: u64, word: &str) -> String {
    format!("{count} {word}{}", if count == 1 { "" } else { "s" })
}

impl Validation<'_> {
    fn add(&mut self, reason: &'static str, at: &str, message: String) {
        self.causes.push(Cause::new(reason, at, message));
    }

    fn invalid(&mut self, at: &str, value: &Value, what: &str) {
        let message = format!("Invalid value: {}: {at} in body {what}", brief(value));
        self.add("FieldValueInvalid", at, message);
    }

    fn value(&mut self, schema: &Value, value: &Value, old: Option<&Value>, path: &str) {
        if old == Some(value) || (value.is_null() && flag(schema, "nullable")) {
            return;
        }
        let at = if path.is_empty() { "<nil>" } else { path };
        let right_type = type_matches(schema, value);
        if !right_type {
            let wanted = schema.get("type").and_then(Value::as_str);
            let wanted = wanted.unwrap_or("integer,string");
            let found = type_name(value);
            let message =
                format!("Invalid value: {found:?}: {at} in body must be of type {wanted}: {found:?}");
            self.add("FieldValueTypeInvalid", at, message);
        }
        self.alternatives(schema, value, path, at);
        if right_type {
            match value {
                Value::String(text) => self.text(schema, value, text, at),
                Value::Number(number) => self.number(schema, value, number.as_f64().unwrap_or(0.0), at),
                _ => {}
            }
        }
        if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
            && !allowed.contains(value)
        {
            let supported = allowed.iter().map(|allowed| match allowed {
                Value::String(text) => format!("{text:?}"),
                other => format!("{:?}", other.to_string()),
            });
            let supported: Vec<String> = supported.collect();
            let message = format!(
                "Unsupported value: {}: supported values: {}",
                brief(value),
                supported.join(", ")
            );
            self.add("FieldValueNotSupported", at, message);
        }
        if right_type {
            match value {
                Value::Object(object) => self.object(schema, object, old, path),
                Value::Array(items) => self.array(schema, items, old, path),
                _ => {}
            }
        }
    }

    fn text(&mut self, schema: &Value, value: &Value, text: &str, at: &str) {
        let limit = |name: &str| schema.get(name).and_then(Value::as_u64);
        let length = text.chars().count() as u64;
        if let Some(most) = limit("maxLength").filter(|most| length > *most) {
            let message = format!("Too long: may not be more than {}", plural(most, "byte"));
            self.add("FieldValueTooLong", at, message);
        }
        if let Some(least) = limit("minLength").filter(|least| length < *least) {
            self.invalid(at, value, &format!("should be at least {least} chars long"));
        }
        if let Some(pattern) = schema.get("pattern").and_then(Value::as_str)
            && self.patterns.refuses(pattern, text)
        {
            self.invalid(at, value, &format!("should match '{pattern}'"));
        }
        if let Some(format) = schema.get("format").and_then(Value::as_str)
            && !has_format(format, text)
        {
            let message = format!("Invalid value: {text:?}: {at} in body must be of type {format}: {text:?}");
            self.add("FieldValueTypeInvalid", at, message);
        }
    }

    fn number(&mut self, schema: &Value, value: &Value, found: f64, at: &str) {
        let bound = |name: &str| schema.get(name).and_then(Value::as_f64);
        if let Some(factor) = bound("multipleOf").filter(|factor| *factor > 0.0) {
            let times = found / factor;
            // A quotient that is whole but for rounding counts as whole.
            if (times - times.round()).abs() > 1e-9 * times.abs().max(1.0) {
                self.invalid(at, value, &format!("should be a multiple of {factor}"));
            }
        }
        if let Some(most) = bound("maximum") {
            if flag(schema, "exclusiveMaximum") && found >= most {
                self.invalid(at, value, &format!("should be less than {most}"));
            } else if found > most {
                self.invalid(at, value, &format!("should be less than or equal to {most}"));
            }
        }
        if let Some(least) = bound("minimum") {
            if flag(schema, "exclusiveMinimum") && found <= least {
                self.invalid(at, value, &format!("should be greater than {least}"));
            } else if found < least {
                self.invalid(at, value, &format!("should be greater than or equal to {least}"));
            }
        }
    }

    /// allOf, anyOf, oneOf and not. Like the API server, the errors of the closest alternative are told too.
    fn alternatives(&mut self, schema: &Value, value: &Value, path: &str, at: &str) {
        let check = |schema: &Value| -> Vec<Cause> {
            let mut inner = Validation {
                patterns: self.patterns,
                causes: Vec::new(),
            };
            inner.value(schema, value, None, path);
            inner.causes
        };
        let results = |name: &str| -> Vec<Vec<Cause>> {
            let list = schema.get(name).and_then(Value::as_array);
            list.into_iter().flatten().map(check).collect()
        };
        let valid = |results: &[Vec<Cause>]| results.iter().filter(|causes| causes.is_empty()).count();
        let closest = |results: Vec<Vec<Cause>>| results.into_iter().min_by_key(Vec::len).unwrap_or_default();
        let mut found = Vec::new();
        let mut fail = |what: String| {
            let message = format!("Invalid value: \"\": {at:?} {what}");
            found.push(Cause::new("FieldValueInvalid", "<nil>", message));
        };
        let mut more = Vec::new();
        let any = results("anyOf");
        if !any.is_empty() && valid(&any) == 0 {
            fail("must validate at least one schema (anyOf)".to_owned());
            more.extend(closest(any));
        }
        let one = results("oneOf");
        match valid(&one) {
            0 if !one.is_empty() => {
                fail("must validate one and only one schema (oneOf). Found none valid".to_owned());
                more.extend(closest(one));
            }
            0 | 1 => {}
            count => fail(format!(
                "must validate one and only one schema (oneOf). Found {count} valid alternatives"
            )),
        }
        let all = results("allOf");
        if valid(&all) < all.len() {
            let none = if valid(&all) == 0 { ". None validated" } else { "" };
            fail(format!("must validate all the schemas (allOf){none}"));
            more.extend(all.into_iter().flatten());
        }
        if schema.get("not").is_some_and(|not| check(not).is_empty()) {
            fail("must not validate the schema (not)".to_owned());
        }
        self.causes.append(&mut found);
        self.causes.append(&mut more);
    }

    fn object(&mut self, schema: &Value, object: &Map<String, Value>, old: Option<&Value>, path: &str) {
        let limit = |name: &str| schema.get(name).and_then(Value::as_u64);
        let count = object.len() as u64;
        let at = if path.is_empty() { "<nil>" } else { path };
        if let Some(most) = limit("maxProperties").filter(|most| count > *most) {
            let message = format!("Too many: {count}: must have at most {}", plural(most, "item"));
            self.add("FieldValueTooMany", at, message);
        }
        if let Some(least) = limit("minProperties").filter(|least| count < *least) {
            let what = format!("should have at least {least} properties");
            self.invalid(at, &Value::from(count), &what);
        }
        let required = schema.get("required").and_then(Value::as_array);
        for name in required.into_iter().flatten().filter_map(Value::as_str) {
            if !object.contains_key(name) {
                self.add(
                    "FieldValueRequired",
                    &join(path, name),
                    "Required value".to_owned(),
                );
            }
        }
        let properties = schema.get("properties").and_then(Value::as_object);
        let additional = schema.get("additionalProperties").filter(|a| a.is_object());
        for (key, value) in object {
            if path.is_empty() && matches!(key.as_str(), "metadata" | "apiVersion" | "kind") {
                continue;
            }
            if let Some(child) = properties.and_then(|p| p.get(key)).or(additional) {
                self.value(child, value, old.and_then(|old| old.get(key)), &join(path, key));
            }
        }
    }

    fn array(&mut self, schema: &Value, items: &[Value], old: Option<&Value>, path: &str) {
        let limit = |name: &str| schema.get(name).and_then(Value::as_u64);
        let count = items.len() as u64;
        if let Some(most) = limit("maxItems").filter(|most| count > *most) {
            let message = format!("Too many: {count}: must have at most {}", plural(most, "item"));
            self.add("FieldValueTooMany", path, message);
            // The items of a list beyond measure are not looked at: their errors would be too many as well.
            return;
        }
        if let Some(least) = limit("minItems").filter(|least| count < *least) {
            let what = format!("should have at least {least} items");
            self.invalid(path, &Value::from(count), &what);
        }
        let keys = list_keys(schema);
        let identity = |item: &Value| match &keys {
            ListKeys::Map(keys) => {
                let fields = keys
                    .iter()
                    .filter_map(|k| Some((k.clone(), item.get(k)?.clone())));
                Some(Value::Object(fields.collect()))
            }
            ListKeys::Set => Some(item.clone()),
            ListKeys::Atomic => None,
        };
        let before = old.and_then(Value::as_array);
        if let Some(child) = schema.get("items") {
            for (index, item) in items.iter().enumerate() {
                let same = identity(item)
                    .and_then(|wanted| before?.iter().find(|old| identity(old).as_ref() == Some(&wanted)));
                self.value(child, item, same, &format!("{path}[{index}]"));
            }
        }
        let mut seen = BTreeSet::new();
        for (index, item) in items.iter().enumerate() {
            if let Some(identity) = identity(item)
                && !seen.insert(identity.to_string())
            {
                let message = format!("Duplicate value: {identity}");
                self.add("FieldValueDuplicate", &format!("{path}[{index}]"), message);
            }
        }
    }
}
