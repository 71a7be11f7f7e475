//! The rules of a schema: `x-kubernetes-validations`.

use std::collections::BTreeSet;

use kube_cel::{CompiledSchema, Validator, compile_schema};
use serde_json::Value;

use crate::error::Cause;
use crate::schema::value_at;
use crate::validate::brief;

/// The compiled rules of a schema.
pub(crate) struct Rules {
    compiled: CompiledSchema,
    /// Expressions of every rule in the schema.
    all: BTreeSet<String>,
    /// Those whose message is an expression: it tells the value itself if it wants to.
    with_message_expression: BTreeSet<String>,
    /// Those that blame another field than the one they stand at.
    with_field_path: BTreeSet<String>,
}

impl Rules {
    pub(crate) fn compile(schema: &Value) -> Self {
        let mut rules = Self {
            compiled: compile_schema(schema),
            all: BTreeSet::new(),
            with_message_expression: BTreeSet::new(),
            with_field_path: BTreeSet::new(),
        };
        rules.note(schema);
        rules
    }

    fn note(&mut self, schema: &Value) {
        let rules = schema.get("x-kubernetes-validations").and_then(Value::as_array);
        for rule in rules.into_iter().flatten() {
            let text = |key: &str| rule.get(key).and_then(Value::as_str);
            let expression = text("rule").unwrap_or_default();
            self.all.insert(expression.to_owned());
            if text("messageExpression").is_some() {
                self.with_message_expression.insert(expression.to_owned());
            }
            if text("fieldPath").is_some() {
                self.with_field_path.insert(expression.to_owned());
            }
        }
        match schema {
            Value::Object(object) => object.values().for_each(|value| self.note(value)),
            Value::Array(items) => items.iter().for_each(|value| self.note(value)),
            _ => {}
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The rules that do not hold. `old` makes transition rules hold.
    pub(crate) fn check(&self, object: &Value, old: Option<&Value>) -> Vec<Cause> {
        if self.is_empty() {
            return Vec::new();
        }
        let Err(errors) = Validator::new().validate_compiled(&self.compiled, object, old) else {
            return Vec::new();
        };
        let mut causes = Vec::new();
        for error in &errors {
            let found = value_at(object, &error.field_path);
            let unchanged = old.is_some_and(|old| value_at(old, &error.field_path) == found);
            if unchanged && !error.rule.contains("oldSelf") && !self.with_field_path.contains(&error.rule) {
                continue;
            }
            let message = error.message.trim();
            // Structures are not told, and an expression tells what it wants.
            let value = match found {
                _ if self.with_message_expression.contains(&error.rule) => None,
                Some(Value::Object(_) | Value::Array(_)) => None,
                Some(value) => Some(brief(value)),
                None => Some("\"null\"".to_owned()),
            };
            let told = |word: &str| match &value {
                Some(value) => format!("{word}: {value}: {message}"),
                None => format!("{word}: {message}"),
            };
            let (reason, message) = match error.reason.as_deref() {
                Some("FieldValueRequired") => ("FieldValueRequired", format!("Required value: {message}")),
                Some("FieldValueForbidden") => ("FieldValueForbidden", format!("Forbidden: {message}")),
                Some("FieldValueDuplicate") => ("FieldValueDuplicate", told("Duplicate value")),
                _ => ("FieldValueInvalid", told("Invalid value")),
            };
            let at = if error.field_path.is_empty() {
                "<nil>"
            } else {
                &error.field_path
            };
            causes.push(Cause::new(reason, at, message));
        }
        causes
    }
}
