//! The shape of the house, held by a machine: which crate may depend on which.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Layers from the ground up. A crate may use what stands in layers below its own, nothing beside it.
const LAYERS: &[&[&str]] = &[
    &["freehold-crds"],
    &["freehold-rules"],
    &["freehold-control-plane", "freehold-engine", "freehold-gateway"],
    &["freehold-operator", "freehold-node-agent"],
    &["freehold"],
    &["freehold-tests"],
];

/// The engine computes and knows nothing of Kubernetes; rules decide and touch nothing.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("freehold-crds", &["tokio", "reqwest", "axum"]),
    (
        "freehold-rules",
        &["tokio", "reqwest", "axum", "kube-client", "rand"],
    ),
    (
        "freehold-engine",
        &["tokio", "kube", "freehold-crds", "freehold-rules"],
    ),
];

fn dependencies(kinds: &[DependencyKind]) -> BTreeMap<String, BTreeSet<String>> {
    let metadata = MetadataCommand::new()
        .no_deps()
        .exec()
        .expect("cargo metadata runs in a checkout");
    let named = metadata.packages.iter().map(|package| {
        let wanted = package
            .dependencies
            .iter()
            .filter(|dependency| kinds.contains(&dependency.kind));
        (
            package.name.to_string(),
            wanted.map(|dependency| dependency.name.clone()).collect(),
        )
    });
    named.collect()
}

fn layer(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&name))
}

#[test]
fn dependencies_run_one_way() {
    for (name, used) in dependencies(&[DependencyKind::Normal, DependencyKind::Build]) {
        let own = layer(&name).unwrap_or_else(|| panic!("{name} has no layer: give it one here and in docs"));
        for dependency in used.iter().filter(|dependency| layer(dependency).is_some()) {
            assert!(
                layer(dependency) < Some(own),
                "{name} must not depend on {dependency}"
            );
        }
    }
}

#[test]
fn operator_and_agent_never_meet_even_in_tests() {
    let all = dependencies(&[
        DependencyKind::Normal,
        DependencyKind::Build,
        DependencyKind::Development,
    ]);
    assert!(!all["freehold-operator"].contains("freehold-node-agent"));
    assert!(!all["freehold-node-agent"].contains("freehold-operator"));
}

#[test]
fn pure_crates_stay_pure() {
    let all = dependencies(&[DependencyKind::Normal]);
    for (name, forbidden) in FORBIDDEN {
        for dependency in *forbidden {
            assert!(
                !all[*name].contains(*dependency),
                "{name} must not depend on {dependency}"
            );
        }
    }
}
