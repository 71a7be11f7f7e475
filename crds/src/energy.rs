//! Energy: what counters say, what models were charged with, what a million tokens cost.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The energy counters of a machine. They count what the whole processor or GPU draws, at rest and for other
/// programs too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EnergyMeter {
    /// The counters that are read, such as `package-0` (RAPL) or the name of a GPU (NVML).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub counters: Vec<String>,
    /// Why there is no counter, or one less than the machine has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Joules since the agent started, whoever drew them; absent without a counter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joules: Option<u64>,
    /// Price of a kilowatt hour here, as the agent's owner set it, such as `0.32`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price_per_kilowatt_hour: Option<String>,
    /// Its currency, such as `EUR`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub currency: Option<String>,
}

/// Energy that a model was charged with: of every interval in which it read or wrote tokens, its share by
/// tokens among the models at work on the same device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EnergyUse {
    /// Joules since the agent started.
    pub joules: u64,
    /// Tokens of prompts and answers that they were spent on.
    pub tokens: u64,
}

/// What a deployment draws, over all its replicas since their agents started. Figures count tokens of prompts
/// and answers together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EnergyReport {
    /// For the eye, such as `512 kJ and 0.0455 EUR per million tokens`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// Joules that were measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joules: Option<u64>,
    /// Tokens that they were spent on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Joules for a million tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joules_per_million_tokens: Option<u64>,
    /// Money for a million tokens, such as `0.0455`; absent where no price is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_per_million_tokens: Option<String>,
    /// Its currency, such as `EUR`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub currency: Option<String>,
    /// Why a figure is absent, or does not cover every replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}
