//! Manifests from files, folders and standard input.
//!
//! Every error names the file and the document in it; one bad document makes the whole set an error,
//! so that nothing is half applied and nothing is pruned by mistake.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use kube::api::DynamicObject;
use serde_json::Value;

/// One object, and where it came from.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// File and number of the document in it, for messages.
    pub origin: String,
    /// The object.
    pub object: DynamicObject,
}

impl Manifest {
    /// `Kind namespace/name`, for messages.
    #[must_use]
    pub fn title(&self) -> String {
        title(&self.object)
    }
}

/// `Kind namespace/name`, for messages.
#[must_use]
pub fn title(object: &DynamicObject) -> String {
    let kind = object
        .types
        .as_ref()
        .map_or("Object", |types| types.kind.as_str());
    let name = object.metadata.name.as_deref().unwrap_or("?");
    match &object.metadata.namespace {
        Some(namespace) => format!("{kind} {namespace}/{name}"),
        None => format!("{kind} {name}"),
    }
}

/// Reads every manifest under `path`: a file, a folder (its `.yaml`, `.yml` and `.json`, below it too),
/// or `-` for standard input.
///
/// # Errors
/// When something cannot be read, or is not a Kubernetes object.
pub fn read(path: &Path) -> Result<Vec<Manifest>> {
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("failed to read standard input")?;
        return parse("standard input", &text);
    }
    let mut manifests = Vec::new();
    for file in files(path)? {
        let text =
            std::fs::read_to_string(&file).with_context(|| format!("failed to read {}", file.display()))?;
        manifests.extend(parse(&file.display().to_string(), &text)?);
    }
    Ok(manifests)
}

/// The manifest files under `path`, sorted, so that a folder always reads alike. Kustomize's own files
/// and hidden folders (such as `.git`) are passed over.
///
/// # Errors
/// When the path is not there or cannot be listed.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let metadata = std::fs::metadata(path).with_context(|| format!("failed to read {}", path.display()))?;
    if metadata.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    let entries = std::fs::read_dir(path).with_context(|| format!("failed to list {}", path.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let hidden = name.starts_with('.') || name.starts_with("kustomization.");
        let manifest = path
            .extension()
            .is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
        if hidden {
            continue;
        } else if path.is_dir() {
            found.extend(files(&path)?);
        } else if manifest {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Reads the documents of one text.
///
/// # Errors
/// When a document is not YAML, or not an object with `apiVersion`, `kind` and `metadata.name`.
pub fn parse(origin: &str, text: &str) -> Result<Vec<Manifest>> {
    let documents: Vec<Value> =
        serde_yaml::from_multiple(text).map_err(|error| anyhow!("{origin} is not valid YAML: {error}"))?;
    let mut manifests = Vec::new();
    for (number, document) in documents.into_iter().enumerate() {
        let origin = format!("{origin} (document {})", number + 1);
        if document.is_null() {
            continue;
        }
        if document.get("kind").and_then(Value::as_str) == Some("List") {
            let items = document
                .get("items")
                .and_then(Value::as_array)
                .cloned()
                .unwrap_or_default();
            for item in items {
                manifests.push(manifest(origin.clone(), item)?);
            }
            continue;
        }
        manifests.push(manifest(origin, document)?);
    }
    Ok(manifests)
}

fn manifest(origin: String, document: Value) -> Result<Manifest> {
    for field in ["/apiVersion", "/kind", "/metadata/name"] {
        let found = document
            .pointer(field)
            .and_then(Value::as_str)
            .unwrap_or_default();
        if found.is_empty() {
            let name = field.trim_start_matches('/').replace('/', ".");
            bail!("{origin}: {name} is missing; a manifest needs apiVersion, kind and metadata.name");
        }
    }
    let object =
        serde_json::from_value(document).with_context(|| format!("{origin} is not a Kubernetes object"))?;
    Ok(Manifest { origin, object })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_documents_and_lists_are_read_in_order() {
        let text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\n---\napiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: ConfigMap, metadata: {name: b, namespace: a}}\n";
        let titles: Vec<String> = parse("t", text).unwrap().iter().map(Manifest::title).collect();
        assert_eq!(titles, ["Namespace a", "ConfigMap a/b"]);
    }

    #[test]
    fn a_document_without_a_name_says_where_it_stands() {
        let error = parse("models.yaml", "a: 1\n---\napiVersion: v1\nkind: X\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("models.yaml (document 1): apiVersion is missing"),
            "{error}"
        );
    }

    #[test]
    fn a_folder_is_read_sorted_without_hidden_and_kustomize_files() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "b.yaml",
            "a.yml",
            "kustomization.yaml",
            ".hidden.yaml",
            "notes.txt",
        ] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let names: Vec<_> = files(folder.path())
            .unwrap()
            .iter()
            .map(|f| f.file_name().unwrap().to_owned())
            .collect();
        assert_eq!(names, ["a.yml", "b.yaml"]);
    }
}
