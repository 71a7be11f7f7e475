//! The body of a request, read as what it says it is.

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Method};
use serde_json::Value;

use crate::error::{ApiError, Cause};
use crate::json::{self, Document};
use crate::options::wrong_dry_run;
use crate::protobuf;
use crate::registry::Patch;
use crate::removal::DeleteOptions;

/// What a write is.
pub(crate) enum Action {
    Create(Value),
    Update(Value),
    Patch(Patch),
    Delete(DeleteOptions),
    DeleteCollection(DeleteOptions),
}

/// The media type of the body, without its parameters.
pub(crate) fn media_type(headers: &HeaderMap) -> &str {
    let content_type = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok());
    let content_type = content_type.unwrap_or("application/json");
    content_type.split(';').next().unwrap_or_default().trim()
}

/// The patches that every kind takes.
pub(crate) const PATCHES: &str =
    "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml";

/// What the method and the body ask for.
pub(crate) fn action(
    method: &Method,
    headers: &HeaderMap,
    body: Bytes,
    name: &str,
) -> Result<(Action, Vec<String>), ApiError> {
    let media_type = media_type(headers);
    let mut duplicates = Vec::new();
    let mut parse_body = |media_type: &str, body: &[u8]| {
        let document = read_document(media_type, body)?;
        duplicates.extend(document.duplicates);
        Ok::<_, ApiError>(document.value)
    };
    let action = match *method {
        Method::POST => Action::Create(parse_body(media_type, &body)?),
        Method::PUT => Action::Update(parse_body(media_type, &body)?),
        Method::PATCH => {
            let mut value = |media_type| parse_body(media_type, &body);
            Action::Patch(match media_type {
                "application/json-patch+json" => Patch::Json(value("application/json")?),
                "application/merge-patch+json" => Patch::Merge(value("application/json")?),
                "application/strategic-merge-patch+json" => Patch::Strategic(value("application/json")?),
                "application/apply-patch+yaml" => Patch::Apply(value("application/yaml")?),
                _ => {
                    return Err(ApiError::unsupported_media_type(PATCHES));
                }
            })
        }
        _ => {
            let options = if body.is_empty() {
                Value::Null
            } else {
                parse_body(media_type, &body)?
            };
            let wanted = delete_options(&options)?;
            if name.is_empty() {
                Action::DeleteCollection(wanted)
            } else {
                Action::Delete(wanted)
            }
        }
    };
    Ok((action, duplicates))
}

/// Clients say what they want of a deletion in its body, a dry run included.
fn delete_options(options: &Value) -> Result<DeleteOptions, ApiError> {
    let text = |pointer: &str| options.pointer(pointer).and_then(Value::as_str);
    if text("/kind").is_some_and(|kind| kind != "DeleteOptions") {
        let (kind, version) = (
            text("/kind").unwrap_or_default(),
            text("/apiVersion").unwrap_or_default(),
        );
        return Err(ApiError::bad_request(format!(
            "no kind {kind:?} is registered for version {version:?} here: the body of a delete is a DeleteOptions"
        )));
    }
    let stages = options.get("dryRun").and_then(Value::as_array);
    let stages = stages.map(Vec::as_slice).unwrap_or_default();
    let mut causes = Vec::new();
    let at = "propagationPolicy";
    match text("/propagationPolicy") {
        Some(policy) if options.get("orphanDependents").is_some() => {
            let message = format!(
                "Invalid value: {policy:?}: orphanDependents and deletionPropagation cannot be both set"
            );
            causes.push(Cause::new("FieldValueInvalid", at, message));
        }
        None | Some("Foreground" | "Background" | "Orphan") => {}
        Some(other) => {
            let message = format!(
                "Unsupported value: {other:?}: supported values: \"Foreground\", \"Background\", \"Orphan\", \"nil\""
            );
            causes.push(Cause::new("FieldValueNotSupported", at, message));
        }
    }
    causes.extend(wrong_dry_run(stages));
    if !causes.is_empty() {
        return Err(ApiError::invalid("meta.k8s.io", "DeleteOptions", "", causes));
    }
    Ok(DeleteOptions {
        uid: text("/preconditions/uid").map(str::to_owned),
        resource_version: text("/preconditions/resourceVersion").map(str::to_owned),
        orphan: text("/propagationPolicy") == Some("Orphan"),
        dry_run: !stages.is_empty(),
    })
}

/// An object.
pub(crate) fn parse_body(media_type: &str, body: &[u8]) -> Result<Value, ApiError> {
    read_document(media_type, body).map(|document| document.value)
}

fn read_document(media_type: &str, body: &[u8]) -> Result<Document, ApiError> {
    let plain = |mut value: Value| {
        json::tidy_numbers(&mut value);
        Document {
            value,
            duplicates: Vec::new(),
        }
    };
    match media_type {
        "application/json" | "" => json::read(body)
            .map_err(|error| ApiError::bad_request(format!("the body is not valid JSON: {error}"))),
        "application/yaml" => {
            let text = std::str::from_utf8(body)
                .map_err(|error| ApiError::bad_request(format!("the body is not valid UTF-8: {error}")))?;
            // JSON is YAML too, and much quicker to read as what it is.
            json::read(body)
                .or_else(|_| serde_yaml::from_str(text).map(plain))
                .map_err(|error| ApiError::bad_request(format!("the body is not valid YAML: {error}")))
        }
        "application/vnd.kubernetes.protobuf" => {
            protobuf::read(body).map(plain).map_err(ApiError::bad_request)
        }
        _ => Err(ApiError::unsupported_media_type(
            "application/json, application/yaml, application/vnd.kubernetes.protobuf",
        )),
    }
}
