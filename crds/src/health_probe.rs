//! HealthProbe: what healthy means, and what may be done about its absence.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::{Device, Quantity};

/// Says what healthy means for the deployments that it selects in its namespace, and what the
/// watchdog may do when they are not. Being slow is not a reason to restart; standing still is.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "freehold.dev",
    version = "v1alpha1",
    kind = "HealthProbe",
    namespaced,
    status = "HealthProbeStatus",
    derive = "PartialEq",
    derive = "Default",
    shortname = "hp",
    category = "freehold",
    doc = "Says what healthy means for the deployments that it selects in its namespace, and what the watchdog may do when they are not. Being slow is not a reason to restart; standing still is.",
    selectable = ".spec.remediation.action",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].status"
    ),
    printcolumn(name = "Healthy", type_ = "string", json_path = ".status.summary"),
    printcolumn(
        name = "Remediation",
        type_ = "string",
        json_path = ".spec.remediation.action"
    ),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].message",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
pub struct HealthProbeSpec {
    /// Deployments that are probed, by their labels; absent: all in the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
    /// What is checked.
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub checks: Vec<Check>,
    /// Seconds between two rounds of checks.
    #[serde(default = "default_period")]
    #[schemars(range(min = 1, max = 86_400))]
    pub period_seconds: u32,
    /// Failures in a row after which a check counts as failing.
    #[serde(default = "default_failure_threshold")]
    #[schemars(range(min = 1, max = 100))]
    pub failure_threshold: u32,
    /// Successes in a row after which it counts as healthy again.
    #[serde(default = "default_success_threshold")]
    #[schemars(range(min = 1, max = 100))]
    pub success_threshold: u32,
    /// What the watchdog may do when a check counts as failing.
    #[serde(default)]
    pub remediation: Remediation,
}

impl Default for HealthProbeSpec {
    fn default() -> Self {
        Self {
            selector: None,
            checks: Vec::new(),
            period_seconds: default_period(),
            failure_threshold: default_failure_threshold(),
            success_threshold: default_success_threshold(),
            remediation: Remediation::default(),
        }
    }
}

fn default_period() -> u32 {
    30
}
fn default_failure_threshold() -> u32 {
    3
}
fn default_success_threshold() -> u32 {
    1
}

/// One check: a name and exactly one of the checks below.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("(has(self.progress) ? 1 : 0) + (has(self.inference) ? 1 : 0) + (has(self.tokensPerSecond) ? 1 : 0) + (has(self.latency) ? 1 : 0) + (has(self.device) ? 1 : 0) + (has(self.memory) ? 1 : 0) + (has(self.temperature) ? 1 : 0) + (has(self.disk) ? 1 : 0) == 1").message("a check needs exactly one of progress, inference, tokensPerSecond, latency, device, memory, temperature or disk"))]
pub struct Check {
    /// Name of the check, in results.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Work in flight must advance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProgressCheck>,
    /// A question must get the expected answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inference: Option<InferenceCheck>,
    /// Decoding must not be slower than this. Slowness is reported; it never causes a restart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<TokensPerSecondCheck>,
    /// The first token must come within this time. Slowness is reported; it never causes a restart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<LatencyCheck>,
    /// The model must run on this device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceCheck>,
    /// The worker must stay within this memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryCheck>,
    /// The machine must stay cooler than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<TemperatureCheck>,
    /// The model store's disk must keep this much free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskCheck>,
}

/// Work in flight must advance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProgressCheck {
    /// Seconds without a step of the engine, while it has work, after which it stands still.
    #[serde(default = "default_stall_seconds")]
    #[schemars(range(min = 1, max = 86_400))]
    pub stall_seconds: u32,
}

impl Default for ProgressCheck {
    fn default() -> Self {
        Self {
            stall_seconds: default_stall_seconds(),
        }
    }
}

fn default_stall_seconds() -> u32 {
    60
}

/// A question must get the expected answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InferenceCheck {
    /// The question, asked greedily (temperature 0). For an embedding model it is embedded.
    #[schemars(length(min = 1, max = 4096))]
    pub prompt: String,
    /// A regular expression that the answer must match; absent: any answer will do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub expect: Option<String>,
    /// Longest answer in tokens.
    #[serde(default = "default_probe_tokens")]
    #[schemars(range(min = 1, max = 1024))]
    pub max_tokens: u32,
    /// Seconds within which the answer must be complete. While the model makes progress on other
    /// work, a late answer is reported as slow and does not cause a restart.
    #[serde(default = "default_probe_timeout")]
    #[schemars(range(min = 1, max = 3600))]
    pub timeout_seconds: u32,
}

impl Default for InferenceCheck {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            expect: None,
            max_tokens: default_probe_tokens(),
            timeout_seconds: default_probe_timeout(),
        }
    }
}

fn default_probe_tokens() -> u32 {
    16
}
fn default_probe_timeout() -> u32 {
    30
}

/// Decoding must not be slower than this.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokensPerSecondCheck {
    /// Tokens a second of one sequence, measured on real requests and on inference checks.
    #[schemars(range(min = 0.001, max = 1_000_000.0))]
    pub minimum: f64,
}

/// The first token must come within this time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LatencyCheck {
    /// Milliseconds to the first token.
    #[schemars(range(min = 1, max = 3_600_000))]
    pub max_time_to_first_token_ms: u32,
}

/// The model must run on this device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeviceCheck {
    /// The device; `Auto` allows any.
    #[serde(default)]
    pub expected: Device,
}

/// The worker must stay within this memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemoryCheck {
    /// Most resident memory of the worker.
    pub maximum: Quantity,
}

/// The machine must stay cooler than this.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TemperatureCheck {
    /// Degrees Celsius of the hottest sensor.
    #[schemars(range(min = 1, max = 150))]
    pub maximum_celsius: u32,
}

/// The model store's disk must keep this much free.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DiskCheck {
    /// Least free disk.
    pub minimum_free: Quantity,
}

/// What the watchdog may do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Remediation {
    /// The remedy. `Relocate` and `Rollback` are not carried out by this version and are reported as a gap.
    #[serde(default)]
    pub action: RemediationAction,
    /// Restarts that are allowed within `windowSeconds`; then the watchdog holds and says so.
    #[serde(default = "default_budget")]
    #[schemars(range(min = 0, max = 100))]
    pub budget: u32,
    /// Seconds over which the budget counts.
    #[serde(default = "default_window")]
    #[schemars(range(min = 1, max = 604_800))]
    pub window_seconds: u32,
    /// Seconds that a worker runs before a probe may restart it.
    #[serde(default = "default_minimum_run")]
    #[schemars(range(min = 0, max = 86_400))]
    pub minimum_run_seconds: u32,
    /// Seconds after a restart before the next; doubled each time within the window.
    #[serde(default = "default_cooldown")]
    #[schemars(range(min = 0, max = 86_400))]
    pub cooldown_seconds: u32,
    /// Percentage of the fleet's replicas that must be healthy for a remedy to go ahead.
    #[serde(default)]
    #[schemars(range(min = 0, max = 100))]
    pub min_healthy_percent: u32,
}

fn default_budget() -> u32 {
    3
}
fn default_window() -> u32 {
    3600
}
fn default_minimum_run() -> u32 {
    60
}
fn default_cooldown() -> u32 {
    30
}

impl Default for Remediation {
    fn default() -> Self {
        Self {
            action: RemediationAction::None,
            budget: default_budget(),
            window_seconds: default_window(),
            minimum_run_seconds: default_minimum_run(),
            cooldown_seconds: default_cooldown(),
            min_healthy_percent: 0,
        }
    }
}

/// What the watchdog does about a failing check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RemediationAction {
    /// Nothing but reporting.
    #[default]
    None,
    /// The worker is restarted where it is.
    Restart,
    /// The replica moves to another machine.
    Relocate,
    /// The last good revision is put back.
    Rollback,
}

/// What the operator knows of a probe.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthProbeStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Healthy, Stalled, RemediationSuspended.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Healthy and known checks, as `3/3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// The latest result of every check on every replica.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub results: Vec<TargetResult>,
    /// What the probe asks for and this version cannot do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gaps: Vec<String>,
}

/// Latest result of one check on one replica.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TargetResult {
    /// The deployment.
    pub deployment: String,
    /// The machine.
    pub node: String,
    /// The check.
    pub check: String,
    /// `Healthy`, `Failing` or `Unknown`.
    pub state: String,
    /// What was seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Restarts that this check caused within the window.
    #[serde(default)]
    pub restarts: u32,
}
