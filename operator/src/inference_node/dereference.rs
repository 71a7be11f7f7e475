//! What the plan and the Lease say of a machine.

use std::collections::{BTreeMap, BTreeSet};

use freehold_crds::{InferenceNode, InferenceNodeSpec};
use freehold_rules::plan::Liveness;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;

use crate::FIELD_MANAGER;
use crate::fleet::Shelves;
use crate::planner::Planned;

/// Label of an agent's Lease that marks it as one.
pub(super) const COMPONENT_LABEL: &str = "app.kubernetes.io/component";
/// Label of a machine's name, as Kubernetes has it.
const HOSTNAME_LABEL: &str = "kubernetes.io/hostname";

/// What a machine's object shall be.
pub(super) struct Wanted<'a> {
    pub(super) labels: BTreeMap<String, String>,
    pub(super) spec: &'a InferenceNodeSpec,
    pub(super) liveness: Liveness,
    /// The machine has been gone for so long that its object may go too.
    pub(super) forget: bool,
}

/// None while the plan does not know the machine, or its object is on the way out.
pub(super) fn dereference<'a>(
    node: &InferenceNode,
    planned: &'a Planned,
    shelves: &Shelves,
) -> Option<Wanted<'a>> {
    let name = node.name_any();
    if node.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let input = planned.input.nodes.iter().find(|input| input.name == name)?;
    // Without a Lease the labels stay that it brought.
    let labels = match shelves.lease(&name) {
        Some(lease) => labels_of(&lease),
        None => owned_labels(&node.metadata),
    };
    Some(Wanted {
        labels,
        spec: planned.plan.nodes.get(&name)?,
        liveness: input.liveness,
        forget: planned.forgettable.contains(&name),
    })
}

/// The labels that a machine takes over from its Lease.
pub(super) fn labels_of(lease: &Lease) -> BTreeMap<String, String> {
    let mut labels = lease.labels().clone();
    labels.remove(COMPONENT_LABEL);
    labels.insert(HOSTNAME_LABEL.to_owned(), lease.name_any());
    labels
}

/// The labels that the operator applied; others belong to people.
pub(super) fn owned_labels(metadata: &ObjectMeta) -> BTreeMap<String, String> {
    let applied = metadata.managed_fields.iter().flatten().filter(|entry| {
        entry.manager.as_deref() == Some(FIELD_MANAGER)
            && entry.operation.as_deref() == Some("Apply")
            && entry.subresource.is_none()
    });
    let keys: BTreeSet<String> = applied
        .filter_map(|entry| {
            entry
                .fields_v1
                .as_ref()?
                .0
                .pointer("/f:metadata/f:labels")?
                .as_object()
        })
        .flat_map(|labels| {
            labels
                .keys()
                .filter_map(|key| key.strip_prefix("f:"))
                .map(str::to_owned)
        })
        .collect();
    let labels = metadata.labels.iter().flatten();
    labels
        .filter(|(key, _)| keys.contains(*key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}
