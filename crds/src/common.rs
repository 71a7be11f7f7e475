//! Types that more than one kind uses.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An amount of memory or disk, as Kubernetes writes it: `512Mi`, `4Gi`, `2G`, or plain bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Quantity(#[schemars(regex(pattern = r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$"))] pub String);

/// A quantity that does not read as a number of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{found:?} is not a quantity of bytes; write a number with an optional suffix Ki, Mi, Gi, Ti, k, M, G or T, such as \"4Gi\""
)]
pub struct ParseQuantity {
    /// The text as it was found.
    pub found: String,
}

impl Quantity {
    /// The amount in bytes, rounded up.
    ///
    /// # Errors
    /// When the text is not a number with a known suffix, or does not fit in 64 bits.
    pub fn bytes(&self) -> Result<u64, ParseQuantity> {
        let text = self.0.trim();
        let split = text
            .find(|c: char| !(c.is_ascii_digit() || c == '.'))
            .unwrap_or(text.len());
        let (number, suffix) = text.split_at(split);
        let unit: f64 = match suffix {
            "" => 1.0,
            "Ki" => 1024.0,
            "Mi" => 1024.0 * 1024.0,
            "Gi" => 1024.0 * 1024.0 * 1024.0,
            "Ti" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
            "k" => 1e3,
            "M" => 1e6,
            "G" => 1e9,
            "T" => 1e12,
            _ => {
                return Err(ParseQuantity {
                    found: self.0.clone(),
                });
            }
        };
        if let (Ok(whole), true) = (number.parse::<u64>(), suffix.is_empty()) {
            return Ok(whole);
        }
        let value = number.parse::<f64>().map_err(|_| ParseQuantity {
            found: self.0.clone(),
        })? * unit;
        // 2^63 is far beyond any machine and exactly representable.
        if !value.is_finite() || value >= 9_223_372_036_854_775_808.0 {
            return Err(ParseQuantity {
                found: self.0.clone(),
            });
        }
        Ok(value.ceil() as u64)
    }

    /// Bytes as a quantity without a suffix.
    #[must_use]
    pub fn from_bytes(bytes: u64) -> Self {
        Self(bytes.to_string())
    }
}

impl From<&str> for Quantity {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Namespace and name of an object, written `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Namespace of the object.
    pub namespace: String,
    /// Name of the object.
    pub name: String,
}

impl ObjectKey {
    /// A key from its two parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for ObjectKey {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
                Ok(Self::new(namespace, name))
            }
            _ => Err(format!("{text:?} is not namespace/name")),
        }
    }
}

/// The device that runs a model.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum Device {
    /// The best device of the machine that has room for the model.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An Apple GPU.
    Metal,
}

/// Number format of the KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum KvType {
    /// 16-bit floats: half the memory of F32, the usual choice.
    #[default]
    F16,
    /// 32-bit floats.
    F32,
    /// 8-bit integers with scales, as llama.cpp's q8_0: a little over half the memory of F16. Small models
    /// feel it (a log probability of a 135M model moves by 0.07 on average), large ones hardly.
    Q8,
}

/// How finely activations are rounded before they meet quantised weights. Weights of F16, BF16 and F32 meet them as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Precision {
    /// To 8 bits, as llama.cpp does it: where two tokens are nearly as likely the other one may be written.
    #[default]
    Standard,
    /// To 16 bits: answers are those of 32-bit floats but where two tokens are all but equally likely. Reading a prompt and
    /// answering many at once take up to twice as long. On the CPU only.
    High,
}

impl Precision {
    /// What is not written out: a model whose precision nobody chose keeps the revision that it had before there was a choice.
    #[must_use]
    pub fn is_standard(&self) -> bool {
        *self == Self::Standard
    }
}

/// Whether a rule holds or only records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Enforcement {
    /// What breaks a rule is not placed, not served.
    #[default]
    Enforce,
    /// What breaks a rule passes, and is recorded as a violation.
    Audit,
}

/// What was found to break a rule, where, and what mends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Violation {
    /// The GovernancePolicy whose rule is broken.
    pub policy: String,
    /// Path of the rule in the policy, such as `spec.supplyChain.requireDigest`.
    pub rule: String,
    /// The object that breaks it, as `namespace/name`.
    pub object: String,
    /// Path of the field in that object, such as `spec.model.sha256`.
    pub field: String,
    /// What was found there.
    pub evidence: String,
    /// What would mend it.
    pub remedy: String,
    /// Whether the rule was enforced or only recorded.
    pub enforcement: Enforcement,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_as_kubernetes_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("1Ki", 1024),
            ("1.5Gi", 1_610_612_736),
            ("2G", 2_000_000_000),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(Quantity::from(text).bytes(), Ok(bytes), "{text}");
        }
        for text in ["", "-1", "4GB", "1e400", "99999999999Ti", "Gi", "1.2.3"] {
            assert!(Quantity::from(text).bytes().is_err(), "{text}");
        }
    }
}
