//! Bounds-checked reading of bytes.

use crate::InvalidModel;

use super::value::{Strings, Value};

/// Longest name of a key or tensor. ggml itself allows 64 for tensors; keys are a little longer.
pub(super) const MAX_NAME_BYTES: u64 = 1024;
/// Longest single text: chat templates reach tens of KiB, nothing sound comes near this.
const MAX_TEXT_BYTES: u64 = 16 << 20;

/// Longest list: vocabularies and merges stay far below 4 million, and a byte in the file may become
/// eight in memory.
const MAX_LIST: u64 = 1 << 22;
/// Text of one list together.
const MAX_LIST_TEXT_BYTES: usize = 256 << 20;

/// A place in the bytes of a file.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn offset(&self) -> usize {
        self.at
    }

    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    pub(super) fn malformed(
        &self,
        what: impl Into<String>,
        found: impl ToString,
        allowed: impl Into<String>,
    ) -> InvalidModel {
        self.malformed_at(self.at, what, found, allowed)
    }

    #[allow(clippy::needless_pass_by_value)] // callers hand over numbers, texts and errors alike
    pub(super) fn malformed_at(
        &self,
        at: usize,
        what: impl Into<String>,
        found: impl ToString,
        allowed: impl Into<String>,
    ) -> InvalidModel {
        InvalidModel::Malformed {
            what: crate::error::quote(&what.into()),
            offset: at as u64,
            found: crate::error::quote(&found.to_string()),
            allowed: allowed.into(),
        }
    }

    pub(super) fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8], InvalidModel> {
        let end = self.at.checked_add(count);
        let Some(slice) = end.and_then(|end| self.bytes.get(self.at..end)) else {
            let found = format!("{count} bytes long and {} are left", self.left());
            return Err(self.malformed(what, found, "the file is truncated or damaged"));
        };
        self.at += count;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], InvalidModel> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, InvalidModel> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, InvalidModel> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A number of things of which each takes at least `least_bytes` of what is left.
    pub(super) fn count(&mut self, what: &str, least_bytes: u64) -> Result<u64, InvalidModel> {
        let at = self.at;
        let count = self.u64(what)?;
        let most = self.left() / least_bytes;
        if count > most {
            return Err(self.malformed_at(
                at,
                what,
                count,
                format!("the rest of the file has room for {most}"),
            ));
        }
        Ok(count)
    }

    /// The same, with a bound of its own.
    pub(super) fn bounded_count(
        &mut self,
        what: &str,
        least_bytes: u64,
        limit: u64,
    ) -> Result<u64, InvalidModel> {
        let at = self.at;
        let count = self.count(what, least_bytes)?;
        if count > limit {
            return Err(self.malformed_at(at, what, count, format!("at most {limit} are allowed")));
        }
        Ok(count)
    }

    fn text_bytes(&mut self, what: &str, limit: u64) -> Result<&'a [u8], InvalidModel> {
        let at = self.at;
        let length = self.count(what, 1)?;
        if length > limit {
            return Err(self.malformed_at(
                at,
                what,
                format!("{length} bytes long"),
                format!("at most {limit} bytes are allowed"),
            ));
        }
        self.take(length as usize, what)
    }

    pub(super) fn text(&mut self, what: &str, limit: u64) -> Result<String, InvalidModel> {
        Ok(String::from_utf8_lossy(self.text_bytes(what, limit)?).into_owned())
    }

    /// A metadata value of any type.
    pub(super) fn value(&mut self, key: &str) -> Result<Value, InvalidModel> {
        let what = format!("metadata {key}");
        let kind = self.u32(&what)?;
        if kind == ARRAY {
            return self.list(&what);
        }
        if kind == TEXT {
            return Ok(Value::Str(self.text(&what, MAX_TEXT_BYTES)?));
        }
        self.scalar(kind, &what)
    }

    fn scalar(&mut self, kind: u32, what: &str) -> Result<Value, InvalidModel> {
        Ok(match kind {
            0 => Value::Int(u8::from_le_bytes(self.array(what)?).into()),
            1 => Value::Int(i8::from_le_bytes(self.array(what)?).into()),
            2 => Value::Int(u16::from_le_bytes(self.array(what)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array(what)?).into()),
            4 => Value::Int(self.u32(what)?.into()),
            5 => Value::Int(i32::from_le_bytes(self.array(what)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(what)?).into()),
            7 => match self.array(what)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(self.malformed(what, other, "a truth value is 0 or 1")),
            },
            10 => Value::Int(self.u64(what)?.into()),
            11 => Value::Int(i64::from_le_bytes(self.array(what)?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array(what)?)),
            other => return Err(self.malformed(what, format!("of type {other}"), "types are 0 to 12")),
        })
    }

    fn list(&mut self, what: &str) -> Result<Value, InvalidModel> {
        let kind = self.u32(what)?;
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            // Lists of lists have no use in a model, and nesting is a way to exhaust a reader.
            ARRAY => {
                return Err(self.malformed(
                    what,
                    "a list of lists",
                    "lists hold numbers, texts or truth values",
                ));
            }
            other => {
                return Err(self.malformed(what, format!("a list of type {other}"), "types are 0 to 12"));
            }
        };
        let count = self.bounded_count(what, least, MAX_LIST)?;
        if kind == TEXT {
            let (mut list, mut bytes) = (Strings::default(), 0_usize);
            for _ in 0..count {
                let text = self.text_bytes(what, MAX_NAME_BYTES * 64)?;
                bytes += text.len();
                if bytes > MAX_LIST_TEXT_BYTES || !list.push(text) {
                    return Err(self.malformed(
                        what,
                        "more text than a list may hold",
                        format!("at most {MAX_LIST_TEXT_BYTES} bytes are allowed"),
                    ));
                }
            }
            return Ok(Value::Strings(list));
        }
        let (mut ints, mut floats, mut bools) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..count {
            match self.scalar(kind, what)? {
                Value::Int(number) => ints.push(
                    i64::try_from(number)
                        .map_err(|_| self.malformed(what, number, "a number that fits 63 bits"))?,
                ),
                Value::Float(number) => floats.push(number as f32),
                Value::Bool(flag) => bools.push(flag),
                Value::Str(_) | Value::Strings(_) | Value::Ints(_) | Value::Floats(_) | Value::Bools(_) => {}
            }
        }
        Ok(match kind {
            6 | 12 => Value::Floats(floats),
            7 => Value::Bools(bools),
            _ => Value::Ints(ints),
        })
    }
}

const TEXT: u32 = 8;
const ARRAY: u32 = 9;
