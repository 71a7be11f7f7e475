//! Discovery and OpenAPI documents: how clients learn what is served.

use serde_json::{Map, Value, json};

use crate::resource::Resource;

/// Version that the server reports. Clients decide by it what they may ask for.
pub(crate) fn version() -> Value {
    json!({
        "major": "1", "minor": "36", "gitVersion": concat!("v1.36.0+freehold-", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "", "compiler": "rustc", "platform": format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH),
    })
}

/// `/api`.
pub(crate) fn core_versions() -> Value {
    json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
}

fn group_versions(resources: &[Resource]) -> Vec<(&str, &str)> {
    let mut found: Vec<(&str, &str)> = Vec::new();
    for resource in resources.iter().filter(|resource| !resource.group.is_empty()) {
        let pair = (resource.group.as_str(), resource.version.as_str());
        if !found.contains(&pair) {
            found.push(pair);
        }
    }
    found
}

fn group(group: &str, version: &str) -> Value {
    let version = json!({"groupVersion": format!("{group}/{version}"), "version": version});
    json!({"name": group, "versions": [version], "preferredVersion": version})
}

/// `/apis`.
pub(crate) fn group_list(resources: &[Resource]) -> Value {
    let groups: Vec<Value> = group_versions(resources)
        .into_iter()
        .map(|(g, v)| group(g, v))
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `/apis/{group}`.
pub(crate) fn one_group(resources: &[Resource], name: &str) -> Option<Value> {
    let (name, version) = group_versions(resources).into_iter().find(|(g, _)| *g == name)?;
    let mut value = group(name, version);
    value["kind"] = json!("APIGroup");
    value["apiVersion"] = json!("v1");
    Some(value)
}

/// `/api/v1` and `/apis/{group}/{version}`.
pub(crate) fn resource_list(resources: &[Resource], group: &str, version: &str) -> Option<Value> {
    let mut list = Vec::new();
    for resource in resources
        .iter()
        .filter(|r| r.group == group && r.version == version)
    {
        let mut entry = json!({
            "name": resource.plural, "singularName": resource.singular, "namespaced": resource.namespaced,
            "kind": resource.kind, "verbs": resource.verbs,
        });
        if !resource.short_names.is_empty() {
            entry["shortNames"] = json!(resource.short_names);
        }
        if !resource.categories.is_empty() {
            entry["categories"] = json!(resource.categories);
        }
        list.push(entry);
        if resource.status_subresource {
            list.push(json!({
                "name": format!("{}/status", resource.plural), "singularName": "", "namespaced": resource.namespaced,
                "kind": resource.kind, "verbs": ["get", "patch", "update"],
            }));
        }
        if resource.scale.is_some() {
            list.push(json!({
                "name": format!("{}/scale", resource.plural), "singularName": "", "namespaced": resource.namespaced,
                "group": "autoscaling", "version": "v1", "kind": "Scale", "verbs": ["get", "patch", "update"],
            }));
        }
    }
    let group_version = if group.is_empty() {
        version.to_owned()
    } else {
        format!("{group}/{version}")
    };
    (!list.is_empty()).then(|| json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": list}))
}

/// What a client accepts that wants to learn of all groups in one answer.
const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// The content type of [`aggregated`], if a client accepts that, wherever in its list: as the API server has it.
pub(crate) fn wants_aggregated(accept: &str) -> Option<&'static str> {
    let mut parts = accept.split(',').map(|part| part.replace(' ', ""));
    parts.any(|part| part == AGGREGATED).then_some(AGGREGATED)
}

/// `/api` and `/apis` in one document: groups, versions, resources.
pub(crate) fn aggregated(resources: &[Resource], core: bool) -> Value {
    let groups = if core {
        vec![("", "v1")]
    } else {
        group_versions(resources)
    };
    let items: Vec<Value> = groups
        .into_iter()
        .map(|(group, version)| {
            let of_group = resources.iter().filter(|r| r.group == group && r.version == version);
            let mut of_group: Vec<&Resource> = of_group.collect();
            of_group.sort_by_key(|resource| &resource.plural);
            let entries: Vec<Value> = of_group.into_iter().map(aggregated_resource).collect();
            let metadata = if group.is_empty() { json!({}) } else { json!({"name": group}) };
            json!({"metadata": metadata, "versions": [{"version": version, "resources": entries, "freshness": "Current"}]})
        })
        .collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items})
}

fn aggregated_resource(resource: &Resource) -> Value {
    let kind = json!({"group": resource.group, "version": resource.version, "kind": resource.kind});
    let mut entry = json!({
        "resource": resource.plural, "responseKind": kind, "singularResource": resource.singular,
        "scope": if resource.namespaced { "Namespaced" } else { "Cluster" }, "verbs": resource.verbs,
    });
    if !resource.short_names.is_empty() {
        entry["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        entry["categories"] = json!(resource.categories);
    }
    let mut parts = Vec::new();
    let mut part = |name: &str, kind: &Value| {
        parts.push(json!({"subresource": name, "responseKind": kind, "verbs": ["get", "patch", "update"]}));
    };
    if resource.status_subresource {
        part("status", &kind);
    }
    if resource.scale.is_some() {
        part(
            "scale",
            &json!({"group": "autoscaling", "version": "v1", "kind": "Scale"}),
        );
    }
    if !parts.is_empty() {
        entry["subresources"] = json!(parts);
    }
    entry
}

fn document_path(group: &str, version: &str) -> String {
    if group.is_empty() {
        format!("api/{version}")
    } else {
        format!("apis/{group}/{version}")
    }
}

/// `/openapi/v3`: which documents there are.
pub(crate) fn openapi_index(resources: &[Resource]) -> Value {
    let mut paths = Map::new();
    for (group, version) in std::iter::once(("", "v1")).chain(group_versions(resources)) {
        let path = document_path(group, version);
        let url = format!("/openapi/v3/{path}?hash={}", env!("CARGO_PKG_VERSION"));
        paths.insert(path, json!({"serverRelativeURL": url}));
    }
    json!({"paths": paths})
}

/// `/openapi/v3/…`: the document of one group and version.
pub(crate) fn openapi_document(resources: &[Resource], group: &str, version: &str) -> Option<Value> {
    let mut schemas = Map::new();
    let mut paths = Map::new();
    for resource in resources
        .iter()
        .filter(|r| r.group == group && r.version == version)
    {
        let kind = json!([{"group": resource.group, "version": resource.version, "kind": resource.kind}]);
        schemas.insert(schema_name(resource), object_schema(resource, &kind));
        let prefix = format!("/{}", document_path(group, version));
        let base = if resource.namespaced {
            format!("{prefix}/namespaces/{{namespace}}/{}", resource.plural)
        } else {
            format!("{prefix}/{}", resource.plural)
        };
        paths.insert(
            base.clone(),
            json!({"get": operation("list", &kind), "post": operation("post", &kind)}),
        );
        paths.insert(format!("{base}/{{name}}"), json!({
            "get": operation("get", &kind), "put": operation("put", &kind), "patch": operation("patch", &kind),
            "delete": operation("delete", &kind),
        }));
    }
    if schemas.is_empty() {
        return None;
    }
    schemas.insert(METADATA_SCHEMA.to_owned(), metadata_schema());
    Some(json!({
        "openapi": "3.0.0", "info": {"title": "Freehold", "version": version},
        "paths": paths, "components": {"schemas": schemas},
    }))
}

const METADATA_SCHEMA: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";

fn schema_name(resource: &Resource) -> String {
    let group = if resource.group.is_empty() {
        "io.k8s.api.core".to_owned()
    } else {
        reversed(&resource.group)
    };
    format!("{group}.{}.{}", resource.version, resource.kind)
}

fn reversed(group: &str) -> String {
    group.split('.').rev().collect::<Vec<_>>().join(".")
}

/// kubectl looks here for the parameters that a server understands.
fn operation(action: &str, kind: &Value) -> Value {
    let parameter = |name: &str, kind: &str| json!({"name": name, "in": "query", "schema": {"type": kind, "uniqueItems": true}});
    let parameters = match action {
        "get" | "list" => vec![],
        _ => vec![
            parameter("dryRun", "string"),
            parameter("fieldManager", "string"),
            parameter("fieldValidation", "string"),
            parameter("force", "boolean"),
        ],
    };
    json!({
        "x-kubernetes-action": action, "x-kubernetes-group-version-kind": kind.get(0), "parameters": parameters,
        "responses": {"200": {"description": "OK"}},
    })
}

fn object_schema(resource: &Resource, kind: &Value) -> Value {
    let mut schema = resource
        .schema
        .as_ref()
        .map_or_else(|| json!({"type": "object"}), |s| s.schema().clone());
    if let Some(object) = schema.as_object_mut() {
        let properties = object.entry("properties").or_insert_with(|| json!({}));
        if let Some(properties) = properties.as_object_mut() {
            let text = |description: &str| json!({"type": "string", "description": description});
            properties.insert(
                "apiVersion".into(),
                text("APIVersion defines the versioned schema of this representation of an object."),
            );
            properties.insert(
                "kind".into(),
                text("Kind is a string value representing the REST resource this object represents."),
            );
            let reference = json!({"allOf": [{"$ref": format!("#/components/schemas/{METADATA_SCHEMA}")}], "default": {}, "description": "Standard object's metadata."});
            properties.insert("metadata".into(), reference);
        }
        object.insert("x-kubernetes-group-version-kind".into(), kind.clone());
    }
    schema
}

fn metadata_schema() -> Value {
    let text = json!({"type": "string"});
    let map = json!({"type": "object", "additionalProperties": {"type": "string"}});
    json!({"type": "object", "description": "ObjectMeta is metadata that all persisted resources must have.", "properties": {
        "name": text, "namespace": text, "generateName": text, "uid": text, "resourceVersion": text,
        "generation": {"type": "integer"}, "creationTimestamp": text, "deletionTimestamp": text,
        "deletionGracePeriodSeconds": {"type": "integer"}, "selfLink": text,
        "labels": map, "annotations": map,
        "finalizers": {"type": "array", "items": {"type": "string"}},
        "ownerReferences": {"type": "array", "items": {"type": "object"}},
        "managedFields": {"type": "array", "items": {"type": "object"}},
    }})
}
