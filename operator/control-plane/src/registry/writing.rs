//! From a checked body to what is kept: what a client may not set, ownership, generation, no idle writes.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Registry, Target, WriteOptions, namespace, writer};
use crate::built_in;
use crate::built_in_rules;
use crate::error::ApiError;
use crate::events;
use crate::managed::{self, schema_with_metadata};
use crate::metadata;
use crate::store::Transaction;

impl Registry {
    /// Defaults and validation of the object as it would be kept.
    pub(super) fn finish(
        &self,
        target: Target<'_>,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<(), ApiError> {
        metadata::tidy(object);
        let mut causes = metadata::check(object, old);
        if let Some(schema) = &target.resource.schema {
            schema.prune(object);
            schema.default(object);
            if target.resource.custom {
                schema.validate(object, old, target.subresource, &mut causes);
            }
        }
        built_in::default(target.resource, object, old);
        if !target.resource.custom {
            built_in::check(target.resource, object)?;
            causes.extend(metadata::check_standard_finalizers(object));
            causes.extend(built_in_rules::check(&target.resource.kind, object, old));
            if target.resource.group == "events.k8s.io" && old.is_none() {
                causes.extend(built_in_rules::check_new_event(object));
            }
        }
        if !causes.is_empty() {
            let (group, kind) = (&target.resource.group, &target.resource.kind);
            let group = if kind == "Event" { "" } else { group };
            return Err(ApiError::invalid(group, kind, target.name, causes));
        }
        Ok(())
    }

    /// Ownership is recorded in the terms of the door through which the write came.
    pub(super) fn record(
        &self,
        target: Target<'_>,
        old: Option<&Value>,
        new: &mut Value,
        options: &WriteOptions,
    ) {
        let mut schema = schema_with_metadata(target.resource.schema.as_ref().map(|s| s.schema()));
        if target.resource.group == "events.k8s.io" {
            schema = events::schema_from_core(schema);
        }
        let empty = built_in::empty(&target.resource.kind);
        let mut shown = Self::served(target.resource, new);
        let before = Self::served(target.resource, old.unwrap_or(&empty));
        let writer = writer(target, options);
        managed::record_update(&schema, old.is_some(), &before, &mut shown, &writer);
        let entries = shown.pointer("/metadata/managedFields").cloned();
        if let Some(metadata) = new.get_mut("metadata").and_then(Value::as_object_mut) {
            match entries {
                Some(entries) => metadata.insert("managedFields".to_owned(), entries),
                None => metadata.remove("managedFields"),
            };
        }
    }

    /// Puts a new object.
    pub(super) fn insert(
        &self,
        transaction: &mut Transaction<'_>,
        target: Target<'_>,
        mut body: Value,
        options: &WriteOptions,
        entries: Option<Value>,
    ) -> Result<Arc<Value>, ApiError> {
        if target.resource.status_subresource
            && target.resource.custom
            && let Some(object) = body.as_object_mut()
        {
            object.remove("status");
        }
        let Some(metadata) = body.get_mut("metadata").and_then(Value::as_object_mut) else {
            return Err(ApiError::bad_request("metadata must be an object"));
        };
        for field in [
            "resourceVersion",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "selfLink",
            "managedFields",
        ] {
            metadata.remove(field);
        }
        metadata.insert("uid".to_owned(), json!(uuid::Uuid::new_v4().to_string()));
        metadata.insert("creationTimestamp".to_owned(), json!(options.now));
        if target.resource.custom {
            metadata.insert("generation".to_owned(), json!(1));
        }
        self.finish(target, &mut body, None)?;
        match entries {
            Some(entries) => body["metadata"]["managedFields"] = entries,
            None => self.record(target, None, &mut body, options),
        }
        if target.resource.kind == "Namespace" {
            let defaults = namespace(target.name, &options.now);
            (body["spec"], body["status"]) = (defaults["spec"].clone(), defaults["status"].clone());
        }
        let put = transaction.put(target.key(), body);
        Ok(if options.dry_run { unversioned(&put) } else { put })
    }

    /// Puts a changed object in place of `old`.
    pub(crate) fn replace(
        &self,
        transaction: &mut Transaction<'_>,
        target: Target<'_>,
        old: &Value,
        mut body: Value,
        options: &WriteOptions,
    ) -> Result<Arc<Value>, ApiError> {
        self.check_preconditions(target, old, &body)?;
        self.carry_over(target, old, &mut body);
        managed::keep_or_take_entries(old, &mut body, target.subresource);
        self.finish(target, &mut body, Some(old))?;
        self.record(target, Some(old), &mut body, options);
        Ok(self.put_if_changed(transaction, target, old, body, options.dry_run))
    }

    /// What a write through this door cannot change: the other half, identity, times; and the generation.
    pub(super) fn carry_over(&self, target: Target<'_>, old: &Value, new: &mut Value) {
        if target.resource.status_subresource {
            if target.subresource == "status" {
                let status = new.get("status").cloned();
                let entries = new.pointer("/metadata/managedFields").cloned();
                *new = old.clone();
                set_or_remove(new, "status", status);
                if let (Some(entries), Some(metadata)) =
                    (entries, new.get_mut("metadata").and_then(Value::as_object_mut))
                {
                    metadata.insert("managedFields".to_owned(), entries);
                }
            } else {
                set_or_remove(new, "status", old.get("status").cloned());
            }
        }
        let spec_changed = {
            let body = |value: &Value| {
                let object = value.as_object().cloned().unwrap_or_default();
                let parts = object
                    .into_iter()
                    .filter(|(key, _)| !matches!(key.as_str(), "metadata" | "status"));
                parts.collect::<std::collections::BTreeMap<_, _>>()
            };
            body(old) != body(new)
        };
        let Some(metadata) = new.get_mut("metadata").and_then(Value::as_object_mut) else {
            return;
        };
        for field in [
            "uid",
            "creationTimestamp",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "generation",
            "resourceVersion",
            "selfLink",
            "name",
            "namespace",
        ] {
            match old.pointer(&format!("/metadata/{field}")) {
                Some(value) => metadata.insert(field.to_owned(), value.clone()),
                None => metadata.remove(field),
            };
        }
        if spec_changed
            && target.resource.custom
            && let Some(generation) = metadata.get("generation").and_then(Value::as_i64)
        {
            metadata.insert("generation".to_owned(), json!(generation + 1));
        }
    }

    /// A write that changes nothing is not written; one that removes the last finalizer deletes.
    pub(super) fn put_if_changed(
        &self,
        transaction: &mut Transaction<'_>,
        target: Target<'_>,
        old: &Value,
        new: Value,
        dry_run: bool,
    ) -> Arc<Value> {
        if dry_run {
            return Arc::new(new);
        }
        if same_but_times(old, &new) {
            return Arc::new(old.clone());
        }
        let finalizers = new
            .pointer("/metadata/finalizers")
            .and_then(Value::as_array)
            .is_some_and(|f| !f.is_empty());
        if new.pointer("/metadata/deletionTimestamp").is_some() && !finalizers {
            let last = Arc::new(new);
            self.remove(transaction, &target.key());
            return last;
        }
        transaction.put(target.key(), new)
    }
}

/// Equal, or different only in the times of managedFields.
fn same_but_times(old: &Value, new: &Value) -> bool {
    let timeless = |value: &Value| {
        let mut value = value.clone();
        for entry in value
            .pointer_mut("/metadata/managedFields")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            entry["time"] = Value::Null;
        }
        value
    };
    old == new || timeless(old) == timeless(new)
}

fn set_or_remove(object: &mut Value, key: &str, value: Option<Value>) {
    if let Some(object) = object.as_object_mut() {
        match value {
            Some(value) => object.insert(key.to_owned(), value),
            None => object.remove(key),
        };
    }
}

/// What would be there after a dry run has no version yet.
fn unversioned(object: &Value) -> Arc<Value> {
    let mut object = object.clone();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("resourceVersion");
    }
    Arc::new(object)
}
