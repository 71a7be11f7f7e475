//! GovernancePolicy: the owner's rules, and the gaps they reveal.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::{Enforcement, Violation};

/// The owner's rules for every deployment that it selects. Several policies apply together: each one
/// must be met, so the strictest wins, and no namespace can weaken another's rule.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "freehold.dev",
    version = "v1alpha1",
    kind = "GovernancePolicy",
    plural = "governancepolicies",
    status = "GovernancePolicyStatus",
    derive = "PartialEq",
    derive = "Default",
    shortname = "gp",
    category = "freehold",
    doc = "The owner's rules for every deployment that it selects. Several policies apply together: each one must be met, so the strictest wins, and no namespace can weaken another's rule.",
    selectable = ".spec.enforcement",
    printcolumn(name = "Enforcement", type_ = "string", json_path = ".spec.enforcement"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].status"
    ),
    printcolumn(name = "Deployments", type_ = "integer", json_path = ".status.deployments"),
    printcolumn(name = "Violations", type_ = "integer", json_path = ".status.violationCount"),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].message",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
pub struct GovernancePolicySpec {
    /// Namespaces that the policy covers, by their labels; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<LabelSelector>,
    /// Deployments that the policy covers, by their labels; absent: all in those namespaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
    /// Whether what breaks a rule is refused, or passes and is recorded.
    #[serde(default)]
    pub enforcement: Enforcement,
    /// The rules. An empty policy allows everything and says so.
    #[serde(flatten)]
    pub rules: PolicyRules,
}

/// The rules of a policy. What is absent is not restricted.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyRules {
    /// Where models may come from and what they must prove.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub supply_chain: Option<SupplyChainRules>,
    /// Where models may run and data may go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub residency: Option<ResidencyRules>,
    /// Who may call which name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<AccessRules>,
    /// How much may be asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitRules>,
    /// What may be said. Not carried out by this version: with Enforce the deployments it selects are held back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<ContentRules>,
    /// What is recorded of each request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditRules>,
    /// How far the watchdog may go by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autonomy: Option<AutonomyRules>,
    /// Rules of your own, as CEL over the deployment.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub expressions: Vec<ExpressionRule>,
}

/// Where models may come from and what they must prove.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SupplyChainRules {
    /// Every model needs `sha256` in its spec.
    #[serde(default)]
    pub require_digest: bool,
    /// Sources that are allowed, as patterns with `*`: `file:///srv/models/*`, `https://models.lan/*`,
    /// `hf://HuggingFaceTB/*`. Empty: any source.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(min = 1, max = 512)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub allowed_sources: Vec<String>,
    /// Sources that are never allowed, as patterns; they win over `allowedSources`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(min = 1, max = 512)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub denied_sources: Vec<String>,
    /// Digests that are allowed; empty: any. A model without `sha256` is then refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024), inner(regex(pattern = "^[0-9a-f]{64}$")))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub allowed_digests: Vec<String>,
    /// File formats that are allowed; empty: every format this version loads.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub allowed_formats: Vec<ModelFormat>,
    /// SPDX licences that are allowed; empty: any. A model without `licence` is then refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(min = 1, max = 128)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub allowed_licences: Vec<String>,
    /// Every model needs a signature. Not carried out by this version: with Enforce the deployments it selects are held back.
    #[serde(default)]
    pub require_signature: bool,
}

/// Format of a model file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ModelFormat {
    /// One GGUF file.
    Gguf,
    /// A folder with safetensors.
    Safetensors,
}

/// Where models may run and data may go.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResidencyRules {
    /// Labels of the machines that may run the model; absent: any machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<LabelSelector>,
    /// Whether a remote provider may stand behind a name.
    #[serde(default)]
    pub external: ExternalAccess,
}

/// Whether data may leave for a remote provider.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ExternalAccess {
    /// Never.
    #[default]
    Deny,
    /// Yes.
    Allow,
}

/// Who may call which name.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AccessRules {
    /// Requests without a known key are refused with 401.
    #[serde(default = "yes")]
    pub require_key: bool,
    /// The keys, stored only as hashes. `freehold key` makes one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub keys: Vec<ApiKey>,
}

impl Default for AccessRules {
    fn default() -> Self {
        Self {
            require_key: yes(),
            keys: Vec::new(),
        }
    }
}

fn yes() -> bool {
    true
}

/// A client's key, known only by its hash.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ApiKey {
    /// Who holds the key; stands in audit records in place of the key.
    #[schemars(length(min = 1, max = 128))]
    pub name: String,
    /// SHA-256 of the key, 64 lower-case hexadecimal digits. Keys need at least 128 random bits.
    #[schemars(regex(pattern = "^[0-9a-f]{64}$"))]
    pub sha256: String,
    /// Names (or aliases) that the key may call, as patterns with `*`; empty: every name the policy selects.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(min = 1, max = 256)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub models: Vec<String>,
}

/// How much may be asked. Requests and tokens are counted for each key (or, without keys, for each name).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LimitRules {
    /// Requests a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub requests_per_minute: Option<u32>,
    /// Tokens a minute, prompt and answer together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub tokens_per_minute: Option<u32>,
    /// Longest answer in tokens; a request that asks for more is refused, one that asks for nothing is capped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_048_576))]
    pub max_output_tokens: Option<u32>,
    /// Longest prompt and answer together, in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_048_576))]
    pub max_context_tokens: Option<u32>,
}

/// What may be said.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContentRules {
    /// The rules, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub rules: Vec<ContentRule>,
}

/// One rule over text.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContentRule {
    /// Name of the rule, in records.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Regular expression that the text is searched for.
    #[schemars(length(min = 1, max = 1024))]
    pub pattern: String,
    /// What happens on a match.
    #[serde(default)]
    pub action: ContentAction,
}

/// What a content rule does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ContentAction {
    /// The request is refused.
    #[default]
    Block,
    /// The match is replaced.
    Redact,
    /// The match is recorded.
    Disclose,
}

/// What is recorded of each request. Never its content.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AuditRules {
    /// Days for which records are kept; absent: until the owner removes them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 36_500))]
    pub retention_days: Option<u32>,
    /// What happens to a request whose record cannot be written.
    #[serde(default)]
    pub on_failure: AuditFailure,
}

/// What happens to a request whose record cannot be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AuditFailure {
    /// It is refused with 503.
    #[default]
    Deny,
    /// It is served, and the gap is counted.
    Allow,
}

/// How far the watchdog may go by itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutonomyRules {
    /// Most restarts an hour that a probe may cause on one replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub max_restarts_per_hour: Option<u32>,
    /// Most moves an hour between machines. This version never moves a replica because of a probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub max_moves_per_hour: Option<u32>,
}

/// A rule of the owner's, as CEL.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExpressionRule {
    /// Name of the rule, in violations.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// CEL that must be true. It sees `object` (the ModelDeployment), `namespace` and `source` (as in `allowedSources`).
    #[schemars(length(min = 1, max = 2048))]
    pub expression: String,
    /// What a person reads when it is not true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub message: Option<String>,
}

/// What the operator knows of a policy: the gap report.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GovernancePolicyStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Stalled, FullyEnforced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// How many deployments the policy selects.
    #[serde(default)]
    pub deployments: u32,
    /// How many violations stand.
    #[serde(default)]
    pub violation_count: u32,
    /// The violations, at most 100 of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub violations: Vec<Violation>,
    /// Rules that are set and that this version cannot hold.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gaps: Vec<String>,
}
