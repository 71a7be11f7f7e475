//! What the operator writes of a deployment.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{EngineSettings, ModelSource};
use crate::common::Violation;
use crate::energy::EnergyReport;

/// What the operator knows of a deployment.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelDeploymentStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Reconciling, Stalled, PolicyCompliant, ModelVerified, AcceleratorDegraded, Healthy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Replicas that are placed.
    #[serde(default)]
    pub replicas: u32,
    /// Replicas that answer (or, on demand, would).
    #[serde(default)]
    pub ready_replicas: u32,
    /// Ready and wanted replicas, as `1/1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica_summary: Option<String>,
    /// The machines that hold a replica, for the eye.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_summary: Option<String>,
    /// The names under which clients reach the model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// Base addresses of the gateways that route to it, for an OpenAI client's `base_url`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<String>,
    /// What the model turned out to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelFacts>,
    /// Memory of one replica, as arithmetic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryEstimate>,
    /// The revision that the spec asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Since when it asks for it: `spec.rollout.deadlineSeconds` counts from here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision_since: Option<Time>,
    /// Set while the last good revision serves in place of that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Rollback>,
    /// The last revision that became Ready, which a rollback puts back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stable: Option<StableRevision>,
    /// The replicas, one by one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub instances: Vec<DeploymentInstance>,
    /// Why each machine was or was not chosen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plan: Vec<PlanReason>,
    /// The rules that the deployment breaks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub violations: Vec<Violation>,
    /// The latest result of each probe that selects the deployment.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub health: Vec<HealthSummary>,
    /// Joules and money for a million tokens, or why that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<EnergyReport>,
}

/// What a model file turned out to be.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelFacts {
    /// One line for the eye, such as `llama 135M Q4_1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// SHA-256 of the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Whether that digest was asked for and matched.
    #[serde(default)]
    pub verified: bool,
    /// `gguf` or `safetensors`.
    #[serde(default)]
    pub format: String,
    /// Architecture, such as `llama`.
    #[serde(default)]
    pub architecture: String,
    /// Quantisation label, such as `Q4_1`.
    #[serde(default)]
    pub quantization: String,
    /// What the model does: `generate` or `embed`.
    #[serde(default)]
    pub task: String,
    /// Number of parameters.
    #[serde(default)]
    pub parameters: u64,
    /// Size of the file in bytes.
    #[serde(default)]
    pub file_bytes: u64,
    /// Bytes of the weights in memory.
    #[serde(default)]
    pub weight_bytes: u64,
    /// Bytes of KV cache for one token with the KV type in use.
    #[serde(default)]
    pub kv_bytes_per_token: u64,
    /// The model's own longest context in tokens.
    #[serde(default)]
    pub context_length: u32,
}

/// Memory of one replica: weights + KV cache + overhead.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemoryEstimate {
    /// Bytes of the weights.
    pub weight_bytes: u64,
    /// Bytes of the KV cache at the full context of every concurrent request.
    pub kv_bytes: u64,
    /// Bytes for activations, tokenizer and code.
    pub overhead_bytes: u64,
    /// The sum, or what `spec.placement.memory` says.
    pub total_bytes: u64,
    /// The sum for the eye, such as `412 MiB`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_summary: Option<String>,
    /// The arithmetic in one line.
    pub arithmetic: String,
}

/// A revision that served, kept so that it can be put back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StableRevision {
    /// Name of the revision.
    pub revision: String,
    /// Its model.
    pub model: ModelSource,
    /// Its engine settings.
    pub engine: EngineSettings,
}

/// A revision that failed, so that the last good one was put back. Any change of the spec ends it: what
/// the spec asks for then is tried anew.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rollback {
    /// The revision that failed.
    pub revision: String,
    /// The generation of the spec that asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
    /// What happened to it.
    pub message: String,
}

/// One replica of a deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentInstance {
    /// Node and revision, unique among the replicas.
    pub name: String,
    /// The machine.
    pub node: String,
    /// The revision.
    pub revision: String,
    /// Where it stands: Pending, Fetching, Verifying, Loading, Ready, Idle, Draining, Backoff, Failed, Refused.
    pub phase: String,
    /// What a person should know of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// How often its worker was restarted.
    #[serde(default)]
    pub restarts: u32,
}

/// Why a machine was, or was not, chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlanReason {
    /// The machine.
    pub node: String,
    /// `Chosen`, `Kept`, `Rejected` or `Spare`.
    pub decision: String,
    /// The reason, with its numbers.
    pub reason: String,
}

/// Latest result of one probe's check on one machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HealthSummary {
    /// The HealthProbe.
    pub probe: String,
    /// The check in it.
    pub check: String,
    /// The machine.
    pub node: String,
    /// `Healthy`, `Failing` or `Unknown`.
    pub state: String,
    /// What was seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}
