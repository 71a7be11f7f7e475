//! ModelDeployment: a name on the bus and the model behind it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::{Device, KvType, Precision, Quantity};

mod status;

pub use status::{
    DeploymentInstance, HealthSummary, MemoryEstimate, ModelDeploymentStatus, ModelFacts, PlanReason,
    Rollback, StableRevision,
};

/// A name on the bus and the model that answers to it. The name stays; the model behind it may be
/// swapped, moved or restarted.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "freehold.dev",
    version = "v1alpha1",
    kind = "ModelDeployment",
    namespaced,
    status = "ModelDeploymentStatus",
    derive = "PartialEq",
    derive = "Default",
    shortname = "md",
    category = "freehold",
    doc = "A name on the bus and the model that answers to it. The name stays; the model behind it may be swapped, moved or restarted.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas"
    ),
    selectable = ".spec.activation.mode",
    selectable = ".spec.placement.device",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].status"
    ),
    printcolumn(
        name = "Status",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].reason"
    ),
    printcolumn(name = "Replicas", type_ = "string", json_path = ".status.replicaSummary"),
    printcolumn(name = "Model", type_ = "string", json_path = ".status.model.summary"),
    printcolumn(name = "Nodes", type_ = "string", json_path = ".status.nodeSummary"),
    printcolumn(
        name = "Memory",
        type_ = "string",
        json_path = ".status.memory.totalSummary",
        priority = 1
    ),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].message",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[x_kube(validation = Rule::new("(has(self.model) ? 1 : 0) + (has(self.variants) ? 1 : 0) + (has(self.external) ? 1 : 0) == 1").message("spec needs exactly one of model, variants or external"))]
#[x_kube(validation = Rule::new("!has(self.rollout) || !has(self.rollout.strategy) || self.rollout.strategy != 'Surge' || !has(self.placement) || !has(self.placement.surge) || self.placement.surge").message("spec.rollout.strategy Surge needs memory for two revisions, and spec.placement.surge is false: use strategy Replace"))]
#[x_kube(validation = Rule::new("!has(self.external) || !has(self.activation) || !has(self.activation.mode) || self.activation.mode == 'Always'").message("spec.activation.mode must be Always for an external model: there is nothing to unload"))]
pub struct ModelDeploymentSpec {
    /// The one model file behind the name. Exactly one of `model`, `variants` and `external` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelSource>,
    /// Several quantisations of one model, best first. The first that fits a machine is chosen, and
    /// the arithmetic is shown in `status.plan`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub variants: Vec<ModelVariant>,
    /// A remote provider behind the same name. Data leaves the machine, so a GovernancePolicy must allow it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<ExternalModel>,
    /// Further names for the same model, such as `gpt-4o-mini` for clients that cannot be changed. The
    /// first name is `metadata.name`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 128)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub aliases: Vec<String>,
    /// On how many machines the model runs. One machine runs at most one replica.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 64))]
    pub replicas: u32,
    /// Which machines and devices may run the model, and with how much memory.
    #[serde(default)]
    pub placement: Placement,
    /// How the engine runs the model.
    #[serde(default)]
    pub engine: EngineSettings,
    /// When the model is in memory.
    #[serde(default)]
    pub activation: Activation,
    /// How a new revision takes the place of the running one.
    #[serde(default)]
    pub rollout: Rollout,
    /// Stops the model and keeps the object: nothing is placed or fetched until this is false again.
    #[serde(default)]
    pub suspend: bool,
}

impl Default for ModelDeploymentSpec {
    fn default() -> Self {
        Self {
            model: None,
            variants: Vec::new(),
            external: None,
            aliases: Vec::new(),
            replicas: one(),
            placement: Placement::default(),
            engine: EngineSettings::default(),
            activation: Activation::default(),
            rollout: Rollout::default(),
            suspend: false,
        }
    }
}

fn one() -> u32 {
    1
}

/// Where a model's bytes come from, and what they must be. Exactly one of `path`, `url`,
/// `huggingFace`, `oci` and `persistentVolumeClaim` is set.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("(has(self.path) ? 1 : 0) + (has(self.url) ? 1 : 0) + (has(self.huggingFace) ? 1 : 0) + (has(self.oci) ? 1 : 0) + (has(self.persistentVolumeClaim) ? 1 : 0) == 1").message("a model needs exactly one source: path, url, huggingFace, oci or persistentVolumeClaim"))]
pub struct ModelSource {
    /// An absolute path on the machine that runs the model: a GGUF file, or a folder with
    /// `model.safetensors`, `config.json` and `tokenizer.json`. It is read in place, not copied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^/"), length(max = 4096))]
    pub path: Option<String>,
    /// An `https://` or `http://` address of one GGUF file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^https?://"), length(max = 2048))]
    pub url: Option<String>,
    /// A file in a repository of the Hugging Face hub, or of a mirror.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugging_face: Option<HuggingFaceSource>,
    /// An OCI artifact in a registry. Not carried out by this version: the deployment says so and stalls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oci: Option<OciSource>,
    /// A file on a volume claim. Not carried out by this version: the deployment says so and stalls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<VolumeSource>,
    /// SHA-256 of the file, 64 lower-case hexadecimal digits. Bytes that differ are thrown away and never loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^[0-9a-f]{64}$"))]
    pub sha256: Option<String>,
    /// SPDX identifier of the licence under which the model is used, such as `Apache-2.0`. Policies read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub licence: Option<String>,
    /// Size of the file, if it is known beforehand: lets the operator plan memory before the first fetch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Quantity>,
    /// A detached signature over the file. Not carried out by this version: the deployment says so and stalls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<ModelSignature>,
}

/// A file on the Hugging Face hub.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HuggingFaceSource {
    /// Owner and name of the repository, such as `HuggingFaceTB/SmolLM2-135M-Instruct-GGUF`.
    #[schemars(regex(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"))]
    pub repository: String,
    /// Path of the file in the repository.
    #[schemars(length(min = 1, max = 512))]
    pub file: String,
    /// Branch, tag or commit. A commit makes the deployment reproducible.
    #[serde(default = "main_branch")]
    #[schemars(length(min = 1, max = 128))]
    pub revision: String,
    /// Address of a mirror that speaks the hub's protocol; the machine's own setting (`HF_ENDPOINT`) if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^https?://"))]
    pub endpoint: Option<String>,
}

fn main_branch() -> String {
    "main".to_owned()
}

/// An artifact in an OCI registry.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OciSource {
    /// Reference with a tag or digest, such as `registry.local/models/smollm2@sha256:…`.
    #[schemars(length(min = 1, max = 512))]
    pub reference: String,
}

/// A file on a PersistentVolumeClaim in the deployment's namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeSource {
    /// Name of the claim.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
    /// Path of the file inside the volume.
    #[schemars(length(min = 1, max = 4096))]
    pub path: String,
}

/// A signature over the model's bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelSignature {
    /// Ed25519 public key of the signer, base64.
    #[schemars(length(min = 1, max = 128))]
    pub public_key: String,
    /// The signature, base64.
    #[schemars(length(min = 1, max = 256))]
    pub value: String,
}

/// One quantisation among several.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelVariant {
    /// Name of the variant, shown in status, such as `q8`.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Its model.
    pub model: ModelSource,
}

/// A remote provider that speaks the OpenAI API. Not carried out by this version: the deployment says so and stalls.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExternalModel {
    /// Base address, such as `https://llm.example.org/v1`.
    #[schemars(regex(pattern = "^https?://"))]
    pub endpoint: String,
    /// The provider's name for the model.
    #[schemars(length(min = 1, max = 256))]
    pub model: String,
    /// Secret in this namespace whose key `apiKey` holds the credential.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_name: Option<String>,
}

/// Which machines may run the model, on which device, with how much memory.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// Labels that a machine (its InferenceNode) must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<LabelSelector>,
    /// The device that runs the model.
    #[serde(default)]
    pub device: Device,
    /// Memory to reserve for one replica; overrides the arithmetic of weights + KV cache + overhead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Quantity>,
    /// Whether a rollout may hold two revisions in memory at once.
    #[serde(default = "yes")]
    pub surge: bool,
}

fn yes() -> bool {
    true
}

impl Default for Placement {
    fn default() -> Self {
        Self {
            node_selector: None,
            device: Device::Auto,
            memory: None,
            surge: true,
        }
    }
}

/// How the engine runs the model.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EngineSettings {
    /// Longest context in tokens, prompt and answer together. Absent: the model's own, but at most 8192.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 64, max = 1_048_576))]
    pub context_length: Option<u32>,
    /// How many requests are decoded at once.
    #[serde(default = "default_concurrency")]
    #[schemars(range(min = 1, max = 256))]
    pub concurrency: u32,
    /// How many further requests wait; one more is answered 429 with Retry-After.
    #[serde(default = "default_queue")]
    #[schemars(range(min = 0, max = 4096))]
    pub queue: u32,
    /// Number format of the KV cache.
    #[serde(default)]
    pub kv_type: KvType,
    /// How finely activations are rounded before they meet quantised weights. `Standard`: to 8 bits, as llama.cpp does it; where
    /// two tokens are nearly as likely, the other one may be written. `High`: to 16 bits; answers are those of 32-bit floats but
    /// where two tokens are all but equally likely, prompts and many requests at once take up to twice as long, and the model
    /// runs on the CPU. Absent: `Standard`.
    #[serde(default, skip_serializing_if = "Precision::is_standard")]
    pub precision: Precision,
    /// Tokens that the KV cache holds for all requests together; at least one context is. Absent: a full
    /// context for each request. Less memory is reserved with less: requests then share it, and when it
    /// runs out the latest one is set aside and goes on later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 64, max = 268_435_456))]
    pub kv_cache_tokens: Option<u32>,
    /// Whether prompts that start alike share their KV cache. They do so among the requests of one API key
    /// only, so that the time of an answer tells nobody what others have asked.
    #[serde(default = "yes")]
    pub prefix_cache: bool,
    /// Whether the engine guesses the next tokens from the text so far, and checks them: the same answers,
    /// and faster where they repeat or quote.
    #[serde(default = "yes")]
    pub speculation: bool,
    /// A smaller model with the same vocabulary that guesses the next tokens where the text gives no guess.
    /// Each guess is checked by the model: the same answers, and faster where the guesses are good and the
    /// draft is several times faster than the model. Where it does not pay, it rests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draft: Option<DraftModel>,
    /// Compute threads; absent: the machine's performance cores, or what an affinity or a quota leaves of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 512))]
    pub threads: Option<u32>,
}

/// A model that guesses for another one. Policies on the supply chain hold for it too.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DraftModel {
    /// An absolute path on the machine that runs the model: a GGUF file. It is read in place.
    #[schemars(regex(pattern = "^/"), length(max = 4096))]
    pub path: String,
    /// SHA-256 of the file, 64 lower-case hexadecimal digits. Another file is not loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^[0-9a-f]{64}$"))]
    pub sha256: Option<String>,
    /// SPDX identifier of its licence. Policies read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub licence: Option<String>,
    /// Memory that it takes: its file, and a KV cache like the model's. Absent: the plan leaves no room for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Quantity>,
}

fn default_concurrency() -> u32 {
    4
}

fn default_queue() -> u32 {
    32
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            context_length: None,
            concurrency: default_concurrency(),
            queue: default_queue(),
            kv_type: KvType::F16,
            precision: Precision::Standard,
            kv_cache_tokens: None,
            prefix_cache: true,
            speculation: true,
            draft: None,
            threads: None,
        }
    }
}

/// When the model is in memory.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Activation {
    /// Always in memory, or loaded by the first request.
    #[serde(default)]
    pub mode: ActivationMode,
    /// With `OnDemand`: seconds without a request after which the model leaves memory.
    #[serde(default = "default_idle_seconds")]
    #[schemars(range(min = 1, max = 604_800))]
    pub idle_seconds: u32,
}

fn default_idle_seconds() -> u32 {
    300
}

impl Default for Activation {
    fn default() -> Self {
        Self {
            mode: ActivationMode::Always,
            idle_seconds: default_idle_seconds(),
        }
    }
}

/// When a model is in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ActivationMode {
    /// Loaded as long as the deployment exists.
    #[default]
    Always,
    /// Loaded by the first request, unloaded after `idleSeconds`.
    OnDemand,
}

/// How a new revision takes the place of the running one.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// Surge, Replace, or the one that memory allows.
    #[serde(default)]
    pub strategy: RolloutStrategy,
    /// Seconds within which the new revision must be Ready; past that the last good one is put back.
    #[serde(default = "default_rollout_deadline")]
    #[schemars(range(min = 1, max = 86_400))]
    pub deadline_seconds: u32,
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            strategy: RolloutStrategy::Auto,
            deadline_seconds: default_rollout_deadline(),
        }
    }
}

fn default_rollout_deadline() -> u32 {
    1800
}

/// How a rollout uses memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RolloutStrategy {
    /// Surge where a machine has room for both revisions, else Replace.
    #[default]
    Auto,
    /// The new revision becomes Ready beside the old one before the name moves: no request fails.
    Surge,
    /// The old revision stops before the new one loads: less memory, a pause in serving.
    Replace,
}
