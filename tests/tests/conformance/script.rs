//! Scripted cases: their form, and how one runs on one server.
//!
//! ```yaml
//! - case: an update without a resource version
//!   steps:
//!   - {do: POST gadgets, body: {metadata: {name: a}, spec: {color: red}}, save: {uid: /metadata/uid}}
//!   - {do: PUT gadgets/a -> 422, body: {metadata: {name: a}, spec: {color: blue}}}
//! ```
//! A step says method and path; `-> 422` is the code that the real server must give, so that a case keeps
//! testing what it is there for. Paths begin with a resource of [`RESOURCES`] or with a slash. Besides HTTP's
//! own, methods are MERGE, JSONPATCH, STRATEGIC, APPLY (patches), TABLE, PARTIAL (views of GET) and WATCH.
//! `save` keeps parts of an answer, `$name` puts them into later steps, `$ns` is the case's own namespace.
//! Bodies of POST, PUT and APPLY get apiVersion and kind from the resource, unless `bare` is set.

use std::collections::BTreeMap;

use freehold_tests::exchange::{Answer, Request};
use serde::Deserialize;
use serde_json::Value;

/// Short names of resources: apiVersion, kind, path; `$ns` stands for the namespace.
const RESOURCES: &[(&str, &str, &str, &str)] = &[
    (
        "configmaps",
        "v1",
        "ConfigMap",
        "/api/v1/namespaces/$ns/configmaps",
    ),
    ("secrets", "v1", "Secret", "/api/v1/namespaces/$ns/secrets"),
    ("events", "v1", "Event", "/api/v1/namespaces/$ns/events"),
    ("namespaces", "v1", "Namespace", "/api/v1/namespaces"),
    (
        "newevents",
        "events.k8s.io/v1",
        "Event",
        "/apis/events.k8s.io/v1/namespaces/$ns/events",
    ),
    (
        "leases",
        "coordination.k8s.io/v1",
        "Lease",
        "/apis/coordination.k8s.io/v1/namespaces/$ns/leases",
    ),
    (
        "crds",
        "apiextensions.k8s.io/v1",
        "CustomResourceDefinition",
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
    ),
    (
        "gadgets",
        "test.example.com/v1",
        "Gadget",
        "/apis/test.example.com/v1/namespaces/$ns/gadgets",
    ),
    (
        "models",
        "freehold.dev/v1alpha1",
        "ModelDeployment",
        "/apis/freehold.dev/v1alpha1/namespaces/$ns/modeldeployments",
    ),
    (
        "probes",
        "freehold.dev/v1alpha1",
        "HealthProbe",
        "/apis/freehold.dev/v1alpha1/namespaces/$ns/healthprobes",
    ),
    (
        "policies",
        "freehold.dev/v1alpha1",
        "GovernancePolicy",
        "/apis/freehold.dev/v1alpha1/governancepolicies",
    ),
    (
        "nodes",
        "freehold.dev/v1alpha1",
        "InferenceNode",
        "/apis/freehold.dev/v1alpha1/inferencenodes",
    ),
];

const TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
const PARTIAL: &str = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io,application/json";
const PARTIAL_LIST: &str =
    "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io,application/json";

/// A case of a file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// What it is about.
    pub case: String,
    pub steps: Vec<Step>,
}

/// One request.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Step {
    #[serde(rename = "do")]
    pub action: String,
    #[serde(default)]
    pub body: Option<Value>,
    /// A body that is not JSON.
    #[serde(default)]
    pub text: Option<String>,
    /// Content type, where it is not the usual one of the method.
    #[serde(default)]
    pub content_type: Option<String>,
    /// What the client reads, where it is not the usual one of the method.
    #[serde(default)]
    pub accept: Option<String>,
    /// Of the lists of groups in the answer, only these are compared: who serves more tells of more.
    #[serde(default)]
    pub groups: Vec<String>,
    #[serde(default)]
    pub bare: bool,
    /// Name to JSON pointer.
    #[serde(default)]
    pub save: BTreeMap<String, String>,
    /// The step is done so often, with `$i` counting from 1.
    #[serde(default)]
    pub times: Option<u32>,
    /// How long to wait before it: the API server's times are whole seconds, and what is done in another second is
    /// seen to be.
    #[serde(default)]
    pub pause_seconds: f32,
    /// Places that differ (pointers, or beginnings of them), each with a heading of docs/conformance.md.
    #[serde(default)]
    pub differs: BTreeMap<String, String>,
}

impl Step {
    /// The code that the real server must give.
    pub fn code(&self) -> Option<u16> {
        let (_, code) = self.action.split_once("->")?;
        Some(code.trim().parse().unwrap())
    }

    /// Whether the real server may answer from a cache that lags behind its store: watches do, and lists that name a
    /// resource version.
    pub fn asks_a_cache(&self) -> bool {
        self.action.contains("watch=")
            || self.action.contains("/watch/")
            || self.action.contains("resourceVersion=")
    }

    /// The request, with `saved` put in.
    pub fn request(&self, saved: &BTreeMap<String, String>) -> Request {
        let action = self.action.split("->").next().unwrap_or_default().trim();
        let (method, path) = action
            .split_once(' ')
            .unwrap_or_else(|| panic!("{action} has no path"));
        let short = path.split(['/', '?']).next().unwrap_or_default();
        let resource = RESOURCES.iter().find(|resource| resource.0 == short);
        let path = match resource {
            Some((short, _, _, whole)) => path.replacen(short, whole, 1),
            None => path.to_owned(),
        };
        assert!(path.starts_with('/'), "{action}: no such resource");
        let mut body = self.body.clone();
        if let (Some((_, version, kind, _)), Some(Value::Object(object)), false) =
            (resource, &mut body, self.bare)
            && matches!(method, "POST" | "PUT" | "APPLY")
        {
            object
                .entry("apiVersion")
                .or_insert_with(|| Value::from(*version));
            object.entry("kind").or_insert_with(|| Value::from(*kind));
        }
        let patch = |kind: &'static str| ("PATCH", Some(kind), None);
        let list = !path
            .split('?')
            .next()
            .is_some_and(|path| is_named(path, resource.map(|r| r.3)));
        let (method, content_type, accept) = match method {
            "MERGE" => patch("application/merge-patch+json"),
            "JSONPATCH" => patch("application/json-patch+json"),
            "STRATEGIC" => patch("application/strategic-merge-patch+json"),
            "APPLY" => patch("application/apply-patch+yaml"),
            "TABLE" => ("GET", None, Some(TABLE)),
            "PARTIAL" => ("GET", None, Some(if list { PARTIAL_LIST } else { PARTIAL })),
            "WATCH" => ("GET", None, None),
            other => (other, Some("application/json"), None),
        };
        let text = match (&body, &self.text) {
            (Some(body), _) => body.to_string(),
            (None, text) => text.clone().unwrap_or_default(),
        };
        let has_body = !text.is_empty();
        Request {
            method: method.to_owned(),
            path: fill(&path, saved),
            content_type: self
                .content_type
                .clone()
                .or(content_type.filter(|_| has_body).map(str::to_owned)),
            accept: self.accept.clone().or(accept.map(str::to_owned)),
            body: fill(&text, saved),
        }
    }

    /// The answer with the groups that are compared.
    pub fn compared(&self, mut answer: Answer) -> Answer {
        if self.groups.is_empty() {
            return answer;
        }
        for list in ["groups", "items"] {
            if let Some(Value::Array(groups)) = answer.body.get_mut(list) {
                let name = |group: &Value| {
                    group
                        .get("name")
                        .or_else(|| group.pointer("/metadata/name"))
                        .cloned()
                };
                groups.retain(|group| {
                    name(group).is_some_and(|name| self.groups.iter().any(|kept| name == kept.as_str()))
                });
                groups.sort_by_key(|group| name(group).map(|name| name.to_string()));
            }
        }
        answer
    }

    /// Keeps what the step asks for.
    pub fn keep(&self, answer: &Answer, saved: &mut BTreeMap<String, String>) {
        for (name, pointer) in &self.save {
            let found = answer.body.pointer(pointer);
            let text = match found {
                Some(Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
                None => String::new(),
            };
            saved.insert(name.clone(), text);
        }
    }
}

fn is_named(path: &str, base: Option<&str>) -> bool {
    base.is_some_and(|base| path.len() > base.len())
}

/// Puts saved values in the place of their names, the longest names first.
fn fill(text: &str, saved: &BTreeMap<String, String>) -> String {
    let mut names: Vec<&String> = saved.keys().collect();
    names.sort_by_key(|name| std::cmp::Reverse(name.len()));
    names.into_iter().fold(text.to_owned(), |text, name| {
        text.replace(&format!("${name}"), &saved[name])
    })
}

/// Every file of cases, with its name.
pub fn files() -> Vec<(&'static str, Vec<Case>)> {
    let read = |name: &'static str, text: &str| {
        let cases = serde_yaml::from_str(text).unwrap_or_else(|error| panic!("{name}: {error}"));
        (name, cases)
    };
    vec![
        read("create", include_str!("cases/create.yaml")),
        read("update", include_str!("cases/update.yaml")),
        read("patch", include_str!("cases/patch.yaml")),
        read("apply", include_str!("cases/apply.yaml")),
        read("delete", include_str!("cases/delete.yaml")),
        read("list", include_str!("cases/list.yaml")),
        read("watch", include_str!("cases/watch.yaml")),
        read("table", include_str!("cases/table.yaml")),
        read("validation", include_str!("cases/validation.yaml")),
        read("built_in", include_str!("cases/built_in.yaml")),
        read("freehold", include_str!("cases/freehold.yaml")),
        read("discovery", include_str!("cases/discovery.yaml")),
    ]
}
