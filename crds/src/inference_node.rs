//! InferenceNode: one machine. Its spec is the machine's whole desired state, its status the agent's word.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::{Device, Enforcement};
use crate::energy::{EnergyMeter, EnergyUse};
use crate::governance_policy::PolicyRules;
use crate::health_probe::{Check, Remediation};
use crate::model_deployment::{Activation, EngineSettings, ModelFacts, ModelSource};

/// One machine. The operator writes everything that the machine shall do into `spec`; the agent on it
/// watches this one object and answers in `status`. People read it; they do not write it.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "freehold.dev",
    version = "v1alpha1",
    kind = "InferenceNode",
    status = "InferenceNodeStatus",
    derive = "PartialEq",
    derive = "Default",
    shortname = "inode",
    category = "freehold",
    doc = "One machine. The operator writes everything that the machine shall do into spec; the agent on it watches this one object and answers in status. People read it; they do not write it.",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].status"
    ),
    printcolumn(
        name = "Reachable",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Reachable')].status"
    ),
    printcolumn(name = "Models", type_ = "string", json_path = ".status.summary"),
    printcolumn(
        name = "Memory",
        type_ = "string",
        json_path = ".status.inventory.memorySummary"
    ),
    printcolumn(
        name = "Devices",
        type_ = "string",
        json_path = ".status.inventory.deviceSummary"
    ),
    printcolumn(
        name = "Gateway",
        type_ = "string",
        json_path = ".status.gatewayAddress",
        priority = 1
    ),
    printcolumn(
        name = "Version",
        type_ = "string",
        json_path = ".status.inventory.agentVersion",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
pub struct InferenceNodeSpec {
    /// Set once the operator has planned for this machine. An object that was just made has nothing in it
    /// yet, which is not the same as nothing being wanted: until then the agent does what it did before.
    #[serde(default, skip_serializing_if = "is_false")]
    pub planned: bool,
    /// The models that this machine holds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    // The API server asks what the rules inside may cost at most, and refuses a kind without a bound here.
    #[schemars(length(max = 1024))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub assignments: Vec<Assignment>,
    /// The rules that its gateway and store hold.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub policies: Vec<CompiledPolicy>,
    /// The probes that it runs on those models.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    // The API server asks what the rules inside may cost at most, and refuses a kind without a bound here.
    #[schemars(length(max = 1024))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub probes: Vec<CompiledProbe>,
    /// The names that its gateway answers to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub routes: Vec<Route>,
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// One revision of one deployment on this machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Assignment {
    /// `namespace.deployment.revision`, unique on the machine.
    pub name: String,
    /// Namespace of the deployment.
    pub namespace: String,
    /// Name of the deployment.
    pub deployment: String,
    /// Revision: a hash over model and engine settings.
    pub revision: String,
    /// Where the bytes come from.
    pub model: ModelSource,
    /// How the engine runs it.
    #[serde(default)]
    pub engine: EngineSettings,
    /// Device to use.
    #[serde(default)]
    pub device: Device,
    /// When it is in memory.
    #[serde(default)]
    pub activation: Activation,
    /// Memory that the plan reserves for it, in bytes; 0 while the model's size is not known yet.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Formats that the rules allow, checked before loading; empty: every one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed_formats: Vec<crate::governance_policy::ModelFormat>,
}

/// A policy, as far as this machine must hold it.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CompiledPolicy {
    /// Name of the GovernancePolicy.
    pub name: String,
    /// Its generation.
    #[serde(default)]
    pub generation: i64,
    /// Whether it holds or only records.
    #[serde(default)]
    pub enforcement: Enforcement,
    /// The deployments that it selects, as `namespace/name`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub deployments: Vec<String>,
    /// Its rules that hold at run time: access, limits, audit, autonomy.
    #[serde(default)]
    pub rules: PolicyRules,
}

/// A probe with the deployments that it selects.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CompiledProbe {
    /// `namespace.name` of the HealthProbe.
    pub name: String,
    /// Namespace of the HealthProbe and of the deployments.
    pub namespace: String,
    /// Name of the HealthProbe.
    pub probe: String,
    /// Names of the deployments that it selects.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub deployments: Vec<String>,
    /// What is checked.
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub checks: Vec<Check>,
    /// Seconds between two rounds.
    pub period_seconds: u32,
    /// Failures in a row that count.
    pub failure_threshold: u32,
    /// Successes in a row that count.
    pub success_threshold: u32,
    /// What the supervisor may do.
    #[serde(default)]
    pub remediation: Remediation,
    /// The replicas on other machines, where `remediation.minHealthyPercent` asks for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elsewhere: Option<ReplicaCount>,
}

/// Replicas and how many of them are well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaCount {
    /// Those that answer, on a machine that is heard, without a check of the probe failing.
    pub healthy: u32,
    /// All of them.
    pub all: u32,
}

/// A name on the bus and what stands behind it.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    /// The name that clients send as `model`.
    pub name: String,
    /// Namespace of the deployment.
    pub namespace: String,
    /// Name of the deployment.
    pub deployment: String,
    /// When the deployment was made, in Unix seconds: `created` in the OpenAI API.
    #[serde(default)]
    pub created: i64,
    /// Who can answer, best first: the first that is ready takes the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backends: Vec<Backend>,
    /// Set where a rule forbids serving the name: what the client is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
}

/// A worker that can answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Backend {
    /// The machine.
    pub node: String,
    /// The assignment on it.
    pub assignment: String,
    /// Address of that machine's gateway, for other machines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
}

/// What the agent says of its machine.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InferenceNodeStatus {
    /// The generation of the spec that the agent has taken up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, by the agent; Reachable, and Reconciling while the machine is silent, by the operator.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Ready and assigned models, as `2/2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// Base address of the machine's gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_address: Option<String>,
    /// What the machine has.
    #[serde(default)]
    pub inventory: Inventory,
    /// What the machine's energy counters say, or why they say nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<EnergyMeter>,
    /// Each assignment, and those that are still on their way out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub instances: Vec<Instance>,
}

/// What a machine has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Inventory {
    /// Operating system, such as `linux`.
    #[serde(default)]
    pub os: String,
    /// Processor architecture, such as `x86_64`.
    #[serde(default)]
    pub architecture: String,
    /// Name of the processor.
    #[serde(default)]
    pub cpu: String,
    /// Cores that the agent may use.
    #[serde(default)]
    pub cores: u32,
    /// Installed memory in bytes (the container's limit where there is one).
    #[serde(default)]
    pub memory_bytes: u64,
    /// Memory that models may take together, in bytes.
    #[serde(default)]
    pub allocatable_bytes: u64,
    /// Memory for the eye.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_summary: Option<String>,
    /// Size of the model store's disk in bytes.
    #[serde(default)]
    pub disk_bytes: u64,
    /// Free bytes on it, rounded to whole GiB so that it changes seldom.
    #[serde(default)]
    pub disk_free_bytes: u64,
    /// Accelerators.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<Accelerator>,
    /// Devices for the eye.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_summary: Option<String>,
    /// Version of the agent.
    #[serde(default)]
    pub agent_version: String,
}

/// An accelerator.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Accelerator {
    /// Cuda or Metal.
    pub kind: Device,
    /// Name of the product.
    pub name: String,
    /// Its memory in bytes.
    pub memory_bytes: u64,
    /// Version of its driver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// Whether this machine's agent can run models on it.
    #[serde(default)]
    pub usable: bool,
    /// Why it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Where an instance stands.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum Phase {
    /// Known, and nothing done yet (or waiting for memory).
    #[default]
    Pending,
    /// Its bytes are being fetched.
    Fetching,
    /// Its bytes are being checked.
    Verifying,
    /// A worker is loading it.
    Loading,
    /// It answers.
    Ready,
    /// On demand, and out of memory until the first request.
    Idle,
    /// Off the bus; finishes what it has.
    Draining,
    /// Its worker ended; it is started again after a pause.
    Backoff,
    /// It cannot run without a change.
    Failed,
    /// The machine will not run it; see reason.
    Refused,
}

/// One assignment as the agent sees it.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Instance {
    /// Name of the assignment.
    pub name: String,
    /// Where it stands.
    pub phase: Phase,
    /// Reason, machine-readable, one of the constants of `conditions::reason`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What a person should know of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Progress of a fetch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<FetchProgress>,
    /// What the model turned out to be, once its bytes are here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelFacts>,
    /// Device in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
    /// Why that device is not the one that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_reason: Option<String>,
    /// Restarts since the assignment came.
    #[serde(default)]
    pub restarts: u32,
    /// How the worker ended last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<String>,
    /// Milliseconds that loading took, the first forward pass included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_ms: Option<u64>,
    /// Resident memory of the worker in bytes, rounded to 16 MiB so that it changes seldom.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident_bytes: Option<u64>,
    /// Tokens generated so far, brought up to date with every other news or every five minutes.
    #[serde(default)]
    pub tokens_generated: u64,
    /// Tokens of prompts read so far, those of a shared prefix once; as seldom as `tokensGenerated`.
    #[serde(default)]
    pub prompt_tokens: u64,
    /// Energy that it was charged with; absent where the machine has no counter for its device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<EnergyUse>,
    /// Latest results of the probes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<ProbeResult>,
}

/// Progress of a fetch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FetchProgress {
    /// Bytes that are here.
    pub bytes_done: u64,
    /// Bytes in all, 0 while that is not known.
    #[serde(default)]
    pub bytes_total: u64,
    /// Seconds left at the present pace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<u64>,
}

/// Latest result of one check.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProbeResult {
    /// Name of the compiled probe.
    pub probe: String,
    /// Name of the check.
    pub check: String,
    /// Where it stands, thresholds applied.
    pub state: ProbeState,
    /// What was seen, steady enough not to be news each time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Restarts that it caused within its window.
    #[serde(default)]
    pub restarts: u32,
    /// Whether its budget is spent.
    #[serde(default)]
    pub suspended: bool,
}

/// Where a check stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ProbeState {
    /// No result yet.
    #[default]
    Unknown,
    /// Within bounds.
    Healthy,
    /// Out of bounds as often as the threshold says.
    Failing,
}
