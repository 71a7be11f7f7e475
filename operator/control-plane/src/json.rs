//! Reading JSON and YAML as the API server reads them: a field that is given twice is noted (the last one
//! counts), and a number without a fraction is an integer however it is written.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::schema::join;

/// What was read, and the paths of the fields that came twice.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Document {
    pub(crate) value: Value,
    pub(crate) duplicates: Vec<String>,
}

/// Reads JSON.
///
/// # Errors
/// What is wrong with it, and where.
pub(crate) fn read(bytes: &[u8]) -> Result<Document, serde_json::Error> {
    let duplicates = RefCell::default();
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Reader {
        path: String::new(),
        duplicates: &duplicates,
    }
    .deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(Document {
        value,
        duplicates: duplicates.into_inner(),
    })
}

/// Makes every number without a fraction an integer.
pub(crate) fn tidy_numbers(value: &mut Value) {
    match value {
        Value::Number(number) => {
            if let Some(whole) = number.as_f64().filter(|_| number.is_f64()).and_then(whole) {
                *number = whole;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(tidy_numbers),
        Value::Object(fields) => fields.values_mut().for_each(tidy_numbers),
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

/// The largest number up to which every whole number has a floating-point value of its own.
const EXACT: f64 = 9_007_199_254_740_992.0;

#[expect(clippy::cast_possible_truncation, reason = "bounded by EXACT")]
fn whole(number: f64) -> Option<Number> {
    (number.fract() == 0.0 && number.abs() <= EXACT).then(|| Number::from(number as i64))
}

struct Reader<'a> {
    path: String,
    duplicates: &'a RefCell<Vec<String>>,
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(whole(value).map_or_else(|| Value::from(value), Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        loop {
            let reader = Reader {
                path: format!("{}[{}]", self.path, list.len()),
                duplicates: self.duplicates,
            };
            match items.next_element_seed(reader)? {
                Some(item) => list.push(item),
                None => return Ok(Value::Array(list)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            let path = join(&self.path, &name);
            if object.contains_key(&name) {
                self.duplicates.borrow_mut().push(path.clone());
            }
            let reader = Reader {
                path,
                duplicates: self.duplicates,
            };
            let value = fields.next_value_seed(reader)?;
            object.insert(name, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_field_that_comes_twice_is_noted_and_the_last_one_counts() {
        let found = read(br#"{"a": {"b": 1, "b": 2}, "c": [{"d": 1, "d": 3}], "a2": 1}"#).unwrap();
        assert_eq!(found.value, json!({"a": {"b": 2}, "c": [{"d": 3}], "a2": 1}));
        assert_eq!(found.duplicates, ["a.b", "c[0].d"]);
    }

    #[test]
    fn numbers_without_a_fraction_are_integers() {
        let found = read(b"[5.0, 1e3, 2.5, -0.0, 1e30]").unwrap();
        assert_eq!(found.value.to_string(), "[5,1000,2.5,0,1e+30]");
        assert!(read(b"[1] 2").is_err());
        assert!(read(b"[1").is_err());
    }
}
