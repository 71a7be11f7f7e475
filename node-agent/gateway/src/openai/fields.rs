//! Reading a JSON object field by field: every fault names its field, and what nobody reads is unknown.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;

/// An object whose fields are taken out one by one. `null` is the same as absent, as in OpenAI's API.
#[derive(Debug)]
pub(crate) struct Fields {
    /// Path of the object, empty at the top.
    path: String,
    map: Map<String, Value>,
}

/// The word for a value's type.
pub(crate) fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

impl Fields {
    /// The fields of `value`, which stands at `path`.
    pub(crate) fn of(value: Value, path: impl Into<String>) -> Result<Self, ApiError> {
        let path = path.into();
        match value {
            Value::Object(map) => Ok(Self { path, map }),
            other if path.is_empty() => Err(ApiError::bad_request(format!(
                "the request body is {} and must be an object",
                type_of(&other)
            ))),
            other => Err(wrong_type(&path, &other, "an object")),
        }
    }

    /// Path of one of the fields.
    pub(crate) fn at(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.swap_remove(name).filter(|value| !value.is_null())
    }

    /// A field that must be there.
    pub(crate) fn required(&mut self, name: &str) -> Result<Value, ApiError> {
        self.take(name).ok_or_else(|| {
            let path = self.at(name);
            ApiError::invalid(&path, format!("{path} is missing"))
        })
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(&self.at(name), &other, "a string")),
        }
    }

    pub(crate) fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong_type(&self.at(name), &other, "true or false")),
        }
    }

    pub(crate) fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<u32>,
    ) -> Result<Option<u32>, ApiError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let path = self.at(name);
        let Value::Number(number) = &value else {
            return Err(wrong_type(&path, &value, "a whole number"));
        };
        match number.as_u64().and_then(|number| u32::try_from(number).ok()) {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(out_of_range(&path, &value, "a whole number ", &range)),
        }
    }

    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<f32>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        number_in(&self.at(name), &value, &range).map(Some)
    }

    /// Takes fields that are known and change nothing here.
    pub(crate) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.map.swap_remove(*name);
        }
    }

    /// Refuses what nobody took.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        match self.map.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((name, _)) => {
                let name: String = name.chars().take(100).collect();
                let path = self.at(&name);
                Err(ApiError::unsupported(
                    &path,
                    format!("{path} is not a field that this gateway knows; remove it"),
                ))
            }
        }
    }
}

/// A number at `path` within bounds.
pub(crate) fn number_in(path: &str, value: &Value, range: &RangeInclusive<f32>) -> Result<f32, ApiError> {
    let Value::Number(number) = value else {
        return Err(wrong_type(path, value, "a number"));
    };
    match number.as_f64() {
        Some(number) if (f64::from(*range.start())..=f64::from(*range.end())).contains(&number) => {
            Ok(number as f32)
        }
        _ => Err(out_of_range(path, value, "", range)),
    }
}

fn out_of_range(path: &str, found: &Value, what: &str, range: &RangeInclusive<impl Display>) -> ApiError {
    ApiError::invalid(
        path,
        format!(
            "{path} is {found} and must be {what}from {} to {}",
            range.start(),
            range.end()
        ),
    )
}

pub(crate) fn wrong_type(path: &str, found: &Value, wanted: &str) -> ApiError {
    ApiError::invalid(path, format!("{path} is {} and must be {wanted}", type_of(found)))
}

/// The tokens of an array of numbers.
pub(crate) fn tokens(path: &str, values: &[Value]) -> Result<Vec<u32>, ApiError> {
    values
        .iter()
        .enumerate()
        .map(|(index, value)| {
            value
                .as_u64()
                .and_then(|token| u32::try_from(token).ok())
                .ok_or_else(|| {
                    let path = format!("{path}[{index}]");
                    let message = format!("{path} is {} and must be a token's number", type_of(value));
                    ApiError::invalid(path, message)
                })
        })
        .collect()
}
