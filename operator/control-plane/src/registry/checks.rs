//! What a body must be before anything is done with it, and in whose words the answer is.

use serde_json::{Value, json};

use super::{Door, FieldValidation, Registry, Target, WriteOptions};
use crate::built_in;
use crate::error::{ApiError, Cause};
use crate::events;
use crate::metadata;
use crate::store::{Key, Transaction};

impl Registry {
    /// apiVersion, kind and namespace must be those of the URL; absent ones are filled in.
    pub(super) fn check_identity(
        &self,
        target: Target<'_>,
        mut body: Value,
        door: Door,
    ) -> Result<Value, ApiError> {
        let resource = target.resource;
        check_kind(target, &body, door)?;
        let expected = [
            ("apiVersion", resource.api_version()),
            ("kind", resource.kind.clone()),
        ];
        let Some(object) = body.as_object_mut() else {
            return Err(ApiError::bad_request(format!(
                "the body must be a {} object",
                resource.kind
            )));
        };
        for (field, wanted) in expected {
            object.entry(field).or_insert_with(|| json!(wanted));
        }
        let metadata = object.entry("metadata").or_insert_with(|| json!({}));
        let Some(metadata) = metadata.as_object_mut() else {
            return Err(ApiError::bad_request("metadata must be an object"));
        };
        if resource.namespaced {
            let found = metadata
                .entry("namespace")
                .or_insert_with(|| json!(target.namespace));
            if found.as_str() != Some(target.namespace) {
                return Err(ApiError::bad_request(
                    "the namespace of the provided object does not match the namespace sent on the request",
                ));
            }
        } else {
            metadata.remove("namespace");
        }
        metadata::check_types(&body)?;
        built_in::fill_nulls(resource, &mut body);
        built_in::fold_string_data(resource, &mut body);
        Ok(if resource.group == "events.k8s.io" {
            events::to_core(&body)
        } else {
            body
        })
    }

    pub(super) fn check_unknown(
        &self,
        target: Target<'_>,
        body: &mut Value,
        options: &WriteOptions,
        warnings: &mut Vec<String>,
    ) -> Result<(), ApiError> {
        let Some(schema) = &target.resource.schema else {
            return Ok(());
        };
        let mut unknown = schema.prune(body);
        unknown.sort();
        let mut quoted: Vec<String> = options
            .duplicates
            .iter()
            .map(|path| format!("duplicate field {path:?}"))
            .collect();
        quoted.extend(unknown.iter().map(|path| format!("unknown field {path:?}")));
        match options.field_validation {
            _ if quoted.is_empty() => {}
            FieldValidation::Strict => {
                let resource = target.resource;
                let message = format!(
                    "{} in version {:?} cannot be handled as a {}: strict decoding error: {}",
                    resource.kind,
                    resource.version,
                    resource.kind,
                    quoted.join(", ")
                );
                return Err(ApiError::bad_request(message));
            }
            FieldValidation::Warn => warnings.extend(quoted),
            FieldValidation::Ignore => {}
        }
        Ok(())
    }

    pub(super) fn check_namespace(
        &self,
        transaction: &Transaction<'_>,
        target: Target<'_>,
    ) -> Result<(), ApiError> {
        if !target.resource.namespaced {
            return Ok(());
        }
        let namespace = transaction.get(&Key::new("namespaces", "", target.namespace));
        let namespace = namespace.ok_or_else(|| ApiError::not_found("", "namespaces", target.namespace))?;
        if namespace.pointer("/metadata/deletionTimestamp").is_some() {
            let why = format!(
                "unable to create new content in namespace {} because it is being terminated",
                target.namespace
            );
            let (group, plural) = (&target.resource.group, &target.resource.plural);
            return Err(ApiError::forbidden(group, plural, target.name, &why));
        }
        Ok(())
    }

    pub(super) fn check_preconditions(
        &self,
        target: Target<'_>,
        old: &Value,
        body: &Value,
    ) -> Result<(), ApiError> {
        let text = |object: &'_ Value, field: &str| -> String {
            let text = object.pointer(field).and_then(Value::as_str);
            text.unwrap_or_default().to_owned()
        };
        let (wanted, found) = (text(body, "/metadata/uid"), text(old, "/metadata/uid"));
        if !wanted.is_empty() && wanted != found {
            return Err(target.conflict(&format!(
                "Precondition failed: UID in precondition: {wanted}, UID in object meta: {found}"
            )));
        }
        let wanted = text(body, "/metadata/resourceVersion");
        if !wanted.is_empty() && wanted != text(old, "/metadata/resourceVersion") {
            return Err(target.conflict(
                "the object has been modified; please apply your changes to the latest version and try again",
            ));
        }
        Ok(())
    }
}

/// apiVersion and kind must be those of the resource.
pub(super) fn check_kind(target: Target<'_>, body: &Value, door: Door) -> Result<(), ApiError> {
    let resource = target.resource;
    let text = |field: &str| body.get(field).and_then(Value::as_str).unwrap_or_default();
    let (version, kind) = (text("apiVersion"), text("kind"));
    let (wanted_version, wanted_kind) = (resource.api_version(), &resource.kind);
    let (same_version, same_kind) = (version == wanted_version, kind == wanted_kind);
    if (same_version && same_kind) || !body.is_object() {
        return Ok(());
    }
    let invalid = |field: &str, found: &str, wanted: &str| {
        let message = format!("Invalid value: {found:?}: must be {wanted}");
        let cause = Cause::new("FieldValueInvalid", field, message);
        Err(ApiError::invalid(
            &resource.group,
            kind,
            target.name_in(body),
            vec![cause],
        ))
    };
    let unlike = |field: &str, found: &str, wanted: &str| {
        Err(ApiError::bad_request(format!(
            "the {field} in the data ({found}) does not match the expected {field} ({wanted})"
        )))
    };
    match door {
        Door::Apply => {
            let version = if version.is_empty() { "/" } else { version };
            Err(ApiError::bad_request(format!(
                "invalid object type: {version}, Kind={kind}"
            )))
        }
        Door::Write if resource.custom && kind.is_empty() => Err(ApiError::bad_request(format!(
            "the object provided is unrecognized (must be of type {wanted_kind}): Object 'Kind' is missing"
        ))),
        Door::Write if !same_version && !version.is_empty() => {
            unlike("API version", version, &wanted_version)
        }
        Door::Patch if resource.custom && !same_version => invalid("apiVersion", version, &wanted_version),
        _ if same_kind || kind.is_empty() => Ok(()),
        _ if resource.custom => invalid("kind", kind, wanted_kind),
        _ => unlike("kind", kind, wanted_kind),
    }
}

/// A patch cannot make an object another one.
pub(super) fn check_uid(target: Target<'_>, old: &Value, new: &Value) -> Result<(), ApiError> {
    let uid = |object: &Value| object.pointer("/metadata/uid").cloned();
    let found = uid(new).filter(|found| !found.is_null());
    if found.is_none() || found == uid(old) {
        return Ok(());
    }
    let message = format!("Invalid value: {}: field is immutable", found.unwrap_or_default());
    let cause = Cause::new("FieldValueInvalid", "metadata.uid", message);
    Err(target.invalid(target.name, vec![cause]))
}

/// Who applies with a uid means an object that is there.
pub(super) fn check_no_uid(target: Target<'_>, body: &Value) -> Result<(), ApiError> {
    let uid = body.pointer("/metadata/uid").and_then(Value::as_str);
    match uid.filter(|uid| !uid.is_empty()) {
        None => Ok(()),
        Some(uid) => Err(target.conflict(&format!(
            "uid mismatch: the provided object specified uid {uid}, and no existing object was found"
        ))),
    }
}

/// An object keeps its name.
pub(super) fn check_name_of_url(target: Target<'_>, body: &Value) -> Result<(), ApiError> {
    let name = target.name;
    match body
        .pointer("/metadata/name")
        .and_then(Value::as_str)
        .unwrap_or_default()
    {
        "" => Err(ApiError::bad_request(format!(
            "the name of the object ({name} based on URL) was undeterminable: name must be provided"
        ))),
        found if found != name => Err(ApiError::bad_request(format!(
            "the name of the object ({found}) does not match the name on the URL ({name})"
        ))),
        _ => Ok(()),
    }
}
