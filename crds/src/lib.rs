//! Wire types of Freehold's resources: what people write, what agents report.
//!
//! Four kinds in the API group [`GROUP`], version [`VERSION`]:
//!
//! | kind | scope | who writes `spec` | who writes `status` |
//! |---|---|---|---|
//! | [`ModelDeployment`] | namespaced | people | operator |
//! | [`GovernancePolicy`] | cluster | people | operator |
//! | [`HealthProbe`] | namespaced | people | operator |
//! | [`InferenceNode`] | cluster | operator | that machine's agent |
//!
//! Doc comments on fields become `kubectl explain`, so they are the user manual. The types hold no
//! decisions: those live in `freehold-rules`. Start reading at [`model_deployment`].

pub mod common;
pub mod conditions;
pub mod governance_policy;
pub mod health_probe;
pub mod inference_node;
pub mod model_deployment;

pub use common::{Device, Enforcement, KvType, ObjectKey, Quantity};
pub use governance_policy::{GovernancePolicy, GovernancePolicySpec, GovernancePolicyStatus};
pub use health_probe::{HealthProbe, HealthProbeSpec, HealthProbeStatus};
pub use inference_node::{InferenceNode, InferenceNodeSpec, InferenceNodeStatus};
pub use model_deployment::{ModelDeployment, ModelDeploymentSpec, ModelDeploymentStatus};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

/// API group of every kind here.
pub const GROUP: &str = "freehold.dev";
/// The one served and stored version.
pub const VERSION: &str = "v1alpha1";
/// Namespace of the operator's and the agents' Leases.
pub const SYSTEM_NAMESPACE: &str = "freehold-system";
/// Port on which a node's gateway listens unless told otherwise.
pub const DEFAULT_GATEWAY_PORT: u16 = 11_480;

/// The four CustomResourceDefinitions, in the order in which a person meets them.
#[must_use]
pub fn all() -> Vec<CustomResourceDefinition> {
    vec![
        ModelDeployment::crd(),
        GovernancePolicy::crd(),
        HealthProbe::crd(),
        InferenceNode::crd(),
    ]
}
