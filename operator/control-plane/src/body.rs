//! The body of a request, read as what it says it is.

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Method};
use serde_json::Value;

use crate::error::ApiError;
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

/// What the method and the body ask for.
pub(crate) fn action(
    method: &Method,
    headers: &HeaderMap,
    body: Bytes,
    name: &str,
) -> Result<Action, ApiError> {
    let media_type = media_type(headers);
    Ok(match *method {
        Method::POST => Action::Create(parse_body(media_type, &body)?),
        Method::PUT => Action::Update(parse_body(media_type, &body)?),
        Method::PATCH => {
            let value = |media_type| parse_body(media_type, &body);
            Action::Patch(match media_type {
                "application/json-patch+json" => Patch::Json(value("application/json")?),
                "application/merge-patch+json" => Patch::Merge(value("application/json")?),
                "application/strategic-merge-patch+json" => Patch::Strategic(value("application/json")?),
                "application/apply-patch+yaml" => Patch::Apply(value("application/yaml")?),
                other => {
                    let allowed = "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml";
                    return Err(ApiError::unsupported_media_type(other, allowed));
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
    })
}

/// Clients say what they want of a deletion in its body, a dry run included.
fn delete_options(options: &Value) -> Result<DeleteOptions, ApiError> {
    let text = |pointer: &str| options.pointer(pointer).and_then(Value::as_str);
    let dry_run = match options.get("dryRun") {
        None | Some(Value::Null) => false,
        Some(Value::Array(list)) if list.iter().all(|item| item == "All") => !list.is_empty(),
        Some(other) => {
            return Err(ApiError::bad_request(format!(
                "dryRun is {other}; supported values: [\"All\"]"
            )));
        }
    };
    Ok(DeleteOptions {
        uid: text("/preconditions/uid").map(str::to_owned),
        resource_version: text("/preconditions/resourceVersion").map(str::to_owned),
        orphan: text("/propagationPolicy") == Some("Orphan"),
        dry_run,
    })
}

/// An object.
pub(crate) fn parse_body(media_type: &str, body: &[u8]) -> Result<Value, ApiError> {
    match media_type {
        "application/json" | "" => serde_json::from_slice(body)
            .map_err(|error| ApiError::bad_request(format!("the body is not valid JSON: {error}"))),
        "application/yaml" => {
            let text = std::str::from_utf8(body)
                .map_err(|error| ApiError::bad_request(format!("the body is not valid UTF-8: {error}")))?;
            // JSON is YAML too, and much quicker to read as what it is.
            serde_json::from_str(text)
                .or_else(|_| serde_yaml::from_str(text))
                .map_err(|error| ApiError::bad_request(format!("the body is not valid YAML: {error}")))
        }
        "application/vnd.kubernetes.protobuf" => protobuf::read(body).map_err(ApiError::bad_request),
        other => Err(ApiError::unsupported_media_type(
            other,
            "application/json, application/yaml, application/vnd.kubernetes.protobuf",
        )),
    }
}
