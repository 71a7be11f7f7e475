//! Metadata values of a GGUF file.

use crate::InvalidModel;

/// One metadata value. Arrays are kept flat by their element kind, so that a vocabulary of a quarter of
/// a million tokens is two allocations and not as many strings.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any whole number.
    Int(i128),
    /// Any real number.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// UTF-8 text; bytes that are not are replaced.
    Str(String),
    /// Texts, as bytes in one arena.
    Strings(Strings),
    /// Whole numbers.
    Ints(Vec<i64>),
    /// Real numbers.
    Floats(Vec<f32>),
    /// Truth values.
    Bools(Vec<bool>),
}

/// Many byte strings in one arena.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strings {
    bytes: Vec<u8>,
    /// End of each string in `bytes`.
    ends: Vec<u32>,
}

impl Strings {
    /// Adds a string. False when the arena would pass 4 GiB.
    #[must_use]
    pub fn push(&mut self, text: &[u8]) -> bool {
        self.bytes.extend_from_slice(text);
        let end = u32::try_from(self.bytes.len());
        end.is_ok_and(|end| {
            self.ends.push(end);
            true
        })
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The string with this number.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        let end = *self.ends.get(index)? as usize;
        let start = index
            .checked_sub(1)
            .map_or(0, |before| self.ends[before] as usize);
        self.bytes.get(start..end)
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).map(|index| self.get(index).unwrap_or_default())
    }
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::Int(_) => "a whole number",
            Self::Float(_) => "a real number",
            Self::Bool(_) => "a truth value",
            Self::Str(_) => "a text",
            Self::Strings(_) => "a list of texts",
            Self::Ints(_) => "a list of whole numbers",
            Self::Floats(_) => "a list of real numbers",
            Self::Bools(_) => "a list of truth values",
        }
    }

    fn wrong(&self, key: &str, wanted: &str) -> InvalidModel {
        InvalidModel::inconsistent(key, self.kind(), wanted)
    }

    pub(crate) fn to_u32(&self, key: &str) -> Result<u32, InvalidModel> {
        match self {
            Self::Int(number) => u32::try_from(*number)
                .map_err(|_| InvalidModel::inconsistent(key, number, "a number from 0 to 4294967295")),
            other => Err(other.wrong(key, "a whole number")),
        }
    }

    pub(crate) fn to_f32(&self, key: &str) -> Result<f32, InvalidModel> {
        let number = match self {
            Self::Int(number) => *number as f64,
            Self::Float(number) => *number,
            other => return Err(other.wrong(key, "a number")),
        };
        if number.is_finite() {
            Ok(number as f32)
        } else {
            Err(InvalidModel::inconsistent(key, number, "a finite number"))
        }
    }

    pub(crate) fn to_bool(&self, key: &str) -> Result<bool, InvalidModel> {
        match self {
            Self::Bool(flag) => Ok(*flag),
            other => Err(other.wrong(key, "a truth value")),
        }
    }

    pub(crate) fn to_str(&self, key: &str) -> Result<&str, InvalidModel> {
        match self {
            Self::Str(text) => Ok(text),
            other => Err(other.wrong(key, "a text")),
        }
    }

    pub(crate) fn to_strings(&self, key: &str) -> Result<&Strings, InvalidModel> {
        match self {
            Self::Strings(list) => Ok(list),
            other => Err(other.wrong(key, "a list of texts")),
        }
    }

    pub(crate) fn to_floats(&self, key: &str) -> Result<&[f32], InvalidModel> {
        match self {
            Self::Floats(list) => Ok(list),
            other => Err(other.wrong(key, "a list of real numbers")),
        }
    }

    pub(crate) fn to_ints(&self, key: &str) -> Result<&[i64], InvalidModel> {
        match self {
            Self::Ints(list) => Ok(list),
            other => Err(other.wrong(key, "a list of whole numbers")),
        }
    }
}
