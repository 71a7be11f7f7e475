//! Reading one object, or many: selectors, pages, tables.

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::error::{ApiError, Cause};
use crate::http::parse_revision;
use crate::registry::Registry;
use crate::resource::Resource;
use crate::selector::Selector;
use crate::store::Key;
use crate::table;
use crate::watch::View;

/// One object.
pub(crate) fn get(
    registry: &Registry,
    resource: &Resource,
    namespace: &str,
    name: &str,
) -> Result<Value, ApiError> {
    let object = if resource.kind == "CustomResourceDefinition" {
        registry
            .crds
            .iter()
            .find(|crd| crd.pointer("/metadata/name").and_then(Value::as_str) == Some(name))
            .cloned()
    } else {
        registry
            .store
            .get(&Key::new(&resource.storage, namespace, name))
            .map(|object| Registry::served(resource, &object))
    };
    object.ok_or_else(|| ApiError::not_found(&resource.group, &resource.plural, name))
}

/// Where the next page begins.
#[derive(serde::Serialize, serde::Deserialize)]
struct Continue {
    /// None: as it is by then. Such a token comes with the refusal of one whose revision is forgotten.
    revision: Option<u64>,
    namespace: String,
    name: String,
}

/// Many objects, as the view wants them.
pub(crate) fn list(
    registry: &Registry,
    resource: &Resource,
    namespace: &str,
    selector: &Selector,
    query: &HashMap<String, String>,
    view: &View,
) -> Result<Value, ApiError> {
    let get = |name: &str| {
        query
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    };
    let limit = get("limit")
        .map(|text| {
            let limit = text.parse::<i64>();
            limit.map_err(|_| ApiError::bad_request(format!("limit is {text:?}; it must be a number")))
        })
        .transpose()?
        .and_then(|limit| usize::try_from(limit).ok());
    let after = get("continue").map(read_token).transpose()?;
    check_options(&get, after.is_some())?;
    let exact = (get("resourceVersionMatch") == Some("Exact"))
        .then(|| get("resourceVersion").map(parse_revision))
        .flatten()
        .transpose()?;
    let asked = after.as_ref().and_then(|after| after.revision).or(exact);
    let (mut objects, revision) = match snapshot(registry, resource, namespace, asked) {
        Ok(snapshot) => snapshot,
        Err(Forgotten) => return Err(too_old(after)),
    };
    objects.retain(|(_, object)| selector.matches(object));
    if let Some(after) = &after {
        objects.retain(|(key, _)| (&key.namespace, &key.name) > (&after.namespace, &after.name));
    }
    let remaining = limit
        .filter(|&limit| limit > 0)
        .map_or(0, |limit| objects.len().saturating_sub(limit));
    objects.truncate(objects.len() - remaining);
    let mut metadata = json!({"resourceVersion": revision.to_string()});
    if remaining > 0
        && let Some((key, _)) = objects.last()
    {
        metadata["continue"] = json!(write_token(&Continue {
            revision: Some(revision),
            namespace: key.namespace.clone(),
            name: key.name.clone()
        }));
        // How many of them would be selected is not counted, as in the API server.
        if get("labelSelector").or(get("fieldSelector")).is_none() {
            metadata["remainingItemCount"] = json!(remaining);
        }
    }
    let items: Vec<Value> = objects
        .iter()
        .map(|(_, object)| Registry::served(resource, object))
        .collect();
    Ok(match view {
        View::Object => list_document(resource, items, metadata),
        View::Partial => json!({
            "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
            "items": items.iter().map(table::partial).collect::<Vec<_>>(),
        }),
        View::Table(include) => table::table(resource, &items.iter().collect::<Vec<_>>(), metadata, include),
    })
}

/// Options that do not go together are refused, as the API server does.
pub(crate) fn check_options<'a>(
    get: &impl Fn(&str) -> Option<&'a str>,
    continues: bool,
) -> Result<(), ApiError> {
    let (version, matching) = (get("resourceVersion"), get("resourceVersionMatch"));
    let forbidden =
        |at: &'static str, why: &str| Cause::new("FieldValueForbidden", at, format!("Forbidden: {why}"));
    let at = "resourceVersionMatch";
    let mut causes = Vec::new();
    let watched = matches!(get("watch"), Some("true" | "1"));
    if watched {
        let initial = get("sendInitialEvents").is_some();
        match matching {
            Some("NotOlderThan") if initial => {}
            None if !initial => {}
            Some(_) if !initial => causes.push(forbidden(
                at,
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            )),
            _ => causes.push(forbidden(
                at,
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            )),
        }
        if let (Some(other), true) = (matching.filter(|matching| *matching != "NotOlderThan"), initial) {
            let message = format!("Unsupported value: {other:?}: supported values: \"NotOlderThan\"");
            causes.push(Cause::new("FieldValueNotSupported", at, message));
        }
        return if causes.is_empty() {
            Ok(())
        } else {
            Err(ApiError::invalid("meta.k8s.io", "ListOptions", "", causes))
        };
    }
    match (matching, version) {
        (Some(_), _) if continues => causes.push(forbidden(
            at,
            "resourceVersionMatch is forbidden when continue is provided",
        )),
        (Some(_), None) if get("sendInitialEvents").is_none() => {
            causes.push(forbidden(
                at,
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            ));
        }
        (Some("Exact"), Some("0")) => {
            causes.push(forbidden(
                at,
                "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
            ));
        }
        (None | Some("Exact" | "NotOlderThan"), _) => {}
        (Some(other), _) => {
            let message =
                format!("Unsupported value: {other:?}: supported values: \"Exact\", \"NotOlderThan\", \"\"");
            causes.push(Cause::new("FieldValueNotSupported", at, message));
        }
    }
    if get("sendInitialEvents").is_some() {
        causes.push(forbidden(
            "sendInitialEvents",
            "sendInitialEvents is forbidden for list",
        ));
    }
    if !causes.is_empty() {
        return Err(ApiError::invalid("meta.k8s.io", "ListOptions", "", causes));
    }
    version.map(parse_revision).transpose().map(drop)
}

/// A list that comes too late; of a page, with the token of a next page that need not fit to the ones before.
fn too_old(after: Option<Continue>) -> ApiError {
    let Some(after) = after else {
        return ApiError::expired("The resourceVersion for the provided list is too old.");
    };
    let mut error = ApiError::expired(
        "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter, or use the continue token in this response to retrieve the remainder of the results. Continuing with the provided token results in an inconsistent list - objects that were created, modified, or deleted between the time the first chunk was returned and now may show up in the list.",
    );
    let revision = None;
    error.next_page = Some(write_token(&Continue { revision, ..after }));
    error
}

/// The revision that was asked for is not remembered.
#[derive(Debug)]
pub(crate) struct Forgotten;

pub(crate) type Snapshot = (Vec<(Key, Arc<Value>)>, u64);

/// The objects of a resource (in a namespace, unless empty) now or at a revision, in order of their keys.
pub(crate) fn snapshot(
    registry: &Registry,
    resource: &Resource,
    namespace: &str,
    revision: Option<u64>,
) -> Result<Snapshot, Forgotten> {
    if resource.kind == "CustomResourceDefinition" {
        let named = |crd: &Value| {
            Key::new(
                "",
                "",
                crd.pointer("/metadata/name")
                    .and_then(Value::as_str)
                    .unwrap_or_default(),
            )
        };
        let crds = registry
            .crds
            .iter()
            .map(|crd| (named(crd), Arc::new(crd.clone())));
        let mut crds: Vec<_> = crds.collect();
        crds.sort_by(|(a, _), (b, _)| a.cmp(b));
        return Ok((crds, registry.store.revision()));
    }
    match revision {
        None => Ok(registry.store.list(&resource.storage, namespace)),
        Some(revision) => {
            let objects = registry.store.list_at(&resource.storage, namespace, revision);
            Ok((objects.map_err(|_| Forgotten)?, revision))
        }
    }
}

/// `XList`.
///
/// Items of built-in kinds do not say what they are, for their list does; lists of custom ones always speak of
/// a next page.
pub(crate) fn list_document(resource: &Resource, mut items: Vec<Value>, mut metadata: Value) -> Value {
    if resource.custom {
        if metadata.get("continue").is_none() {
            metadata["continue"] = json!("");
        }
    } else {
        for item in items.iter_mut().filter_map(Value::as_object_mut) {
            item.remove("apiVersion");
            item.remove("kind");
        }
    }
    json!({"kind": format!("{}List", resource.kind), "apiVersion": resource.api_version(), "metadata": metadata, "items": items})
}

fn write_token(token: &Continue) -> String {
    URL_SAFE_NO_PAD.encode(serde_json::to_vec(token).unwrap_or_default())
}

fn read_token(text: &str) -> Result<Continue, ApiError> {
    let bytes = URL_SAFE_NO_PAD.decode(text).ok();
    let token = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    token.ok_or_else(|| {
        ApiError::bad_request(
            "invalid continue token: continue key is not valid: it must be one that this server gave out",
        )
    })
}
