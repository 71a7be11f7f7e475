//! What a write is about, and what comes with it.

use std::sync::Arc;

use serde_json::Value;

use crate::error::{ApiError, Cause};
use crate::metadata;
use crate::resource::Resource;
use crate::store::Key;

/// How strictly unknown fields are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum FieldValidation {
    /// Unknown fields are an error.
    Strict,
    /// Unknown fields are dropped with a warning.
    #[default]
    Warn,
    /// Unknown fields are dropped.
    Ignore,
}

/// What comes with every write.
#[derive(Clone, Debug)]
pub(crate) struct WriteOptions {
    pub(crate) dry_run: bool,
    pub(crate) field_manager: String,
    pub(crate) field_validation: FieldValidation,
    pub(crate) force: bool,
    /// RFC 3339 in whole seconds.
    pub(crate) now: String,
    /// Paths of fields that the body has twice.
    pub(crate) duplicates: Vec<String>,
}

/// What a body is for: each door checks its identity in its own way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Door {
    /// A whole object, made or replaced.
    Write,
    /// What a patch made of an object.
    Patch,
    Apply,
}

/// The body of a patch.
#[derive(Clone, Debug)]
pub(crate) enum Patch {
    Json(Value),
    Merge(Value),
    Strategic(Value),
    Apply(Value),
}

/// What a write gives back.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) object: Arc<Value>,
    pub(crate) created: bool,
    pub(crate) warnings: Vec<String>,
}

/// Which object (or collection) of which resource.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<'a> {
    pub(crate) resource: &'a Resource,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    /// Empty, or `status`.
    pub(crate) subresource: &'a str,
}

impl Target<'_> {
    pub(crate) fn key(&self) -> Key {
        Key::new(&self.resource.storage, self.namespace, self.name)
    }

    pub(crate) fn not_found(&self) -> ApiError {
        ApiError::not_found(&self.resource.group, &self.resource.plural, self.name)
    }

    pub(crate) fn conflict(&self, why: &str) -> ApiError {
        ApiError::conflict(&self.resource.group, &self.resource.plural, self.name, why)
    }

    /// The name that a body states, or else that of the path.
    pub(super) fn name_in<'b>(&'b self, body: &'b Value) -> &'b str {
        let stated = body.pointer("/metadata/name").and_then(Value::as_str);
        stated.unwrap_or(self.name)
    }

    pub(super) fn invalid(&self, name: &str, causes: Vec<Cause>) -> ApiError {
        ApiError::invalid(&self.resource.group, &self.resource.kind, name, causes)
    }

    pub(super) fn check_name(&self) -> Result<(), ApiError> {
        metadata::check_name(&self.resource.kind, self.name)
            .map_err(|cause| self.invalid(self.name, vec![cause]))
    }
}
