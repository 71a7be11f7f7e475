//! The options of a write: query parameters, checked as the API server checks them.

use std::collections::HashMap;

use http::header::USER_AGENT;
use http::{HeaderMap, Method};
use serde_json::{Value, json};

use crate::error::{ApiError, Cause};
use crate::registry::{FieldValidation, WriteOptions};

/// Most bytes of a field manager's name, as in the API server.
const FIELD_MANAGER_LIMIT: usize = 128;

/// Reads the options of a write. `applies` says that it is a server-side apply.
///
/// # Errors
/// What is wrong with them, all at once.
pub(crate) fn read(
    method: &Method,
    applies: bool,
    headers: &HeaderMap,
    query: &HashMap<String, String>,
) -> Result<WriteOptions, ApiError> {
    let get = |name: &str| {
        let value = query.get(name).map(String::as_str);
        value.filter(|value| !value.is_empty())
    };
    let mut causes = Vec::new();
    let given = get("fieldManager");
    if applies && given.is_none() {
        let message = "Required value: is required for apply patch";
        causes.push(Cause::new("FieldValueRequired", "fieldManager", message));
    }
    if given.is_some_and(|manager| manager.len() > FIELD_MANAGER_LIMIT) {
        let message = format!("Too long: may not be more than {FIELD_MANAGER_LIMIT} bytes");
        causes.push(Cause::new("FieldValueTooLong", "fieldManager", message));
    }
    if *method == Method::PATCH && !applies && get("force").is_some() {
        let message = "Forbidden: may not be specified for non-apply patch";
        causes.push(Cause::new("FieldValueForbidden", "force", message));
    }
    causes.extend(get("dryRun").and_then(|asked| wrong_dry_run(&[json!(asked)])));
    let field_validation = match get("fieldValidation") {
        None | Some("Warn") => FieldValidation::Warn,
        Some("Strict") => FieldValidation::Strict,
        Some("Ignore") => FieldValidation::Ignore,
        Some(other) => {
            let message = format!(
                "Unsupported value: {other:?}: supported values: \"\", \"Ignore\", \"Strict\", \"Warn\""
            );
            causes.push(Cause::new("FieldValueNotSupported", "fieldValidation", message));
            FieldValidation::Warn
        }
    };
    if !causes.is_empty() {
        let kind = match *method {
            Method::POST => "CreateOptions",
            Method::PUT => "UpdateOptions",
            Method::PATCH => "PatchOptions",
            _ => "DeleteOptions",
        };
        return Err(ApiError::invalid("meta.k8s.io", kind, "", causes));
    }
    let agent = headers.get(USER_AGENT).and_then(|v| v.to_str().ok());
    let agent = agent.unwrap_or("unknown");
    let from_agent = agent.split(['/', ' ']).next().unwrap_or("unknown");
    Ok(WriteOptions {
        dry_run: get("dryRun").is_some(),
        field_manager: given.unwrap_or(from_agent).to_owned(),
        field_validation,
        force: matches!(get("force"), Some("true" | "1")),
        now: crate::now(),
        duplicates: Vec::new(),
    })
}

/// What is wrong with the stages of a dry run, if anything: there is but one, `All`.
pub(crate) fn wrong_dry_run(stages: &[Value]) -> Option<Cause> {
    if stages.iter().all(|stage| stage == "All") {
        return None;
    }
    let found = Value::from(stages);
    let message = format!("Unsupported value: {found}: supported values: \"All\"");
    Some(Cause::new("FieldValueNotSupported", "dryRun", message))
}
