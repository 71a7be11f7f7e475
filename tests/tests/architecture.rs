//! The shape of the house, held by a machine: which crate may depend on which.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

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

/// Every source file below a folder.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of this checkout") {
        let path = entry.expect("an entry of it").path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn unsafe_code_stands_where_contributing_says() {
    let tests = freehold_tests::folder();
    let root = tests.parent().expect("tests/ lies in it");
    let mut files = Vec::new();
    sources(root, &mut files);
    assert!(files.len() > 100, "{} files", files.len());
    // In two parts, so that this file is none of them.
    let allowance = concat!("allow(", "unsafe_code)");
    let allowing: BTreeSet<String> = files
        .iter()
        .filter(|path| std::fs::read_to_string(path).is_ok_and(|text| text.contains(allowance)))
        .map(|path| path.strip_prefix(root).unwrap_or(path).display().to_string())
        .collect();
    let places = [
        "node-agent/engine/src/kernels/mod.rs",
        "node-agent/engine/src/mmap.rs",
    ];
    assert_eq!(allowing, BTreeSet::from(places.map(str::to_owned)));
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

/// Fetched by version alone, and why that may be: nothing that the tests' verdict rests on.
const SOFT_PINS: [&str; 3] = [
    // The toolkit for `just check-cuda`, a gigabyte in a dozen packages, of which only compiling is asked.
    "tests/cuda/with-toolkit.sh",
    // Writers of random models for a benchmark, and an advice to people.
    "tests/peers/models.py",
    "tests/peers/llama_cpp.py",
];

/// Every script of a folder and of those in it.
fn scripts(folder: &std::path::Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder)
        .expect("a folder of the checkout")
        .flatten()
    {
        let path = entry.path();
        let is_script = path.extension().is_none_or(|end| end == "py" || end == "sh");
        if path.is_dir() {
            scripts(&path, found);
        } else if is_script {
            found.push(path);
        }
    }
}

#[test]
fn what_pip_fetches_is_held_to_its_sum() {
    let root = freehold_tests::folder().join("..");
    let mut commands = 0;
    let mut files = Vec::new();
    for folder in ["tests", "manifests"] {
        scripts(&root.join(folder), &mut files);
    }
    for path in files {
        let file = path
            .strip_prefix(&root)
            .expect("it lies there")
            .to_string_lossy()
            .into_owned();
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        for verb in ["install", "download"] {
            // In Python's lists of words, and in a shell's.
            for command in [
                format!("\"pip\", \"{verb}\""),
                format!("pip {verb}"),
                format!("pip\" {verb}"),
            ] {
                for (at, _) in text.match_indices(&command) {
                    let rest: String = text.chars().skip(text[..at].chars().count()).take(300).collect();
                    if SOFT_PINS.contains(&file.as_str()) {
                        continue;
                    }
                    commands += 1;
                    assert!(
                        rest.contains("--require-hashes"),
                        "{file}: `{command}` takes whatever is offered: add --require-hashes and the sums, or say in \
                         SOFT_PINS why not"
                    );
                }
            }
        }
    }
    assert!(commands >= 5, "only {commands} commands were found");
}
