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

// `printcolumn(…)` stands once a column; clippy takes the repeated keys in it for duplicates.
#![allow(clippy::duplicated_attributes)]

pub mod common;
pub mod conditions;
pub mod energy;
pub mod governance_policy;
pub mod health_probe;
pub mod inference_node;
pub mod model_deployment;

pub use common::{Device, Enforcement, KvType, ObjectKey, Precision, Quantity};
pub use governance_policy::{GovernancePolicy, GovernancePolicySpec, GovernancePolicyStatus};
pub use health_probe::{HealthProbe, HealthProbeSpec, HealthProbeStatus};
pub use inference_node::{InferenceNode, InferenceNodeSpec, InferenceNodeStatus};
pub use model_deployment::{ModelDeployment, ModelDeploymentSpec, ModelDeploymentStatus};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSON, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
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
    let mut crds = vec![
        ModelDeployment::crd(),
        GovernancePolicy::crd(),
        HealthProbe::crd(),
        InferenceNode::crd(),
    ];
    for version in crds.iter_mut().flat_map(|crd| &mut crd.spec.versions) {
        if let Some(schema) = version
            .schema
            .as_mut()
            .and_then(|schema| schema.open_api_v3_schema.as_mut())
        {
            drop_foreign_formats(schema);
            default_empty_spec(schema);
            default_unseen_status(schema);
        }
    }
    crds
}

/// A spec that may be empty is empty when it is not there.
///
/// An API server turns a spec whose last field is applied no more into null, and refuses it then unless there is
/// a default: without one the operator could not take the last assignment from a machine.
fn default_empty_spec(schema: &mut JSONSchemaProps) {
    let properties = schema.properties.as_mut();
    let spec = properties.and_then(|properties| properties.get_mut("spec"));
    let nothing = |length: Option<usize>| length.is_none_or(|length| length == 0);
    let may_be_empty = |spec: &&mut JSONSchemaProps| {
        nothing(spec.required.as_ref().map(Vec::len))
            && nothing(spec.x_kubernetes_validations.as_ref().map(Vec::len))
    };
    if let Some(spec) = spec.filter(may_be_empty) {
        spec.default = Some(JSON(serde_json::json!({})));
    }
}

/// An object that its controller has not seen yet says so: Flux's own kinds do the same.
///
/// kstatus takes an object without a status for one that is as it should be, and an expression that asks for a field
/// of it is an error.
fn default_unseen_status(schema: &mut JSONSchemaProps) {
    let properties = schema.properties.as_mut();
    if let Some(status) = properties.and_then(|properties| properties.get_mut("status")) {
        status.default = Some(JSON(serde_json::json!({"observedGeneration": -1})));
        // Null is kept where it is allowed, and is the default where it is not.
        status.nullable = None;
    }
}

/// Formats such as `uint32` are not Kubernetes's; its API server warns of them. Bounds say the same.
fn drop_foreign_formats(schema: &mut JSONSchemaProps) {
    const KNOWN: &[&str] = &["int32", "int64", "float", "double", "date-time", "byte"];
    if schema
        .format
        .as_deref()
        .is_some_and(|format| !KNOWN.contains(&format))
    {
        schema.format = None;
    }
    schema
        .properties
        .iter_mut()
        .flat_map(|properties| properties.values_mut())
        .for_each(drop_foreign_formats);
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        drop_foreign_formats(items);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(additional)) = &mut schema.additional_properties {
        drop_foreign_formats(additional);
    }
}
