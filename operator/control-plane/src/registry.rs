//! What each verb does to objects: the API's semantics over the [`Store`].
//!
//! Everything here is synchronous and touches nothing but the store, so it runs off the async threads.
//! Start reading at [`Registry::create`].

use std::sync::Arc;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};

use crate::built_in;
use crate::built_in_rules;
use crate::error::{ApiError, Cause};
use crate::events;
use crate::managed::{self, Writer, schema_with_metadata};
use crate::metadata;
use crate::patch;
use crate::resource::{self, Resource};
use crate::store::{Key, Store, StoreError, Transaction};

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
enum Door {
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
    fn name_in<'b>(&'b self, body: &'b Value) -> &'b str {
        let stated = body.pointer("/metadata/name").and_then(Value::as_str);
        stated.unwrap_or(self.name)
    }

    fn invalid(&self, name: &str, causes: Vec<Cause>) -> ApiError {
        ApiError::invalid(&self.resource.group, &self.resource.kind, name, causes)
    }

    fn check_name(&self) -> Result<(), ApiError> {
        metadata::check_name(&self.resource.kind, self.name)
            .map_err(|cause| self.invalid(self.name, vec![cause]))
    }
}

/// The resources and their objects.
pub(crate) struct Registry {
    pub(crate) resources: Vec<Resource>,
    pub(crate) store: Store,
    /// CRDs as they are served.
    pub(crate) crds: Vec<Value>,
}

/// Namespaces that are always there.
pub(crate) const NAMESPACES: &[&str] = &["default", "kube-system", freehold_crds::SYSTEM_NAMESPACE];

pub(crate) fn store_failed(error: StoreError) -> ApiError {
    ApiError::internal(format!("failed to write the store: {error}; nothing was changed"))
}

impl Registry {
    pub(crate) fn new(store: Store, crds: &[CustomResourceDefinition], now: &str) -> Result<Self, String> {
        let resources = resource::all(crds)?;
        let served = crds.iter().map(|crd| {
            let mut value = resource::served_crd(crd, now);
            let metadata = json!({"uid": stable_uid(crd.metadata.name.as_deref().unwrap_or_default()), "creationTimestamp": now, "generation": 1, "resourceVersion": "1"});
            json_patch::merge(&mut value, &json!({"metadata": metadata}));
            value
        });
        let registry = Self {
            crds: served.collect(),
            resources,
            store,
        };
        for name in NAMESPACES {
            let key = Key::new("namespaces", "", name);
            if registry.store.get(&key).is_none() {
                let object = namespace(name, now);
                let put = |transaction: &mut Transaction<'_>| Ok(transaction.put(key, object));
                registry
                    .store
                    .transact(true, put, |error: StoreError| error.to_string())?;
            }
        }
        Ok(registry)
    }

    /// An object as it is served to readers of `resource`.
    pub(crate) fn served(resource: &Resource, object: &Value) -> Value {
        if resource.group == "events.k8s.io" {
            events::from_core(object)
        } else {
            object.clone()
        }
    }

    pub(crate) fn create(
        &self,
        target: Target<'_>,
        body: Value,
        options: &WriteOptions,
    ) -> Result<Written, ApiError> {
        let mut body = self.check_identity(target, body, Door::Write)?;
        let name = match body.pointer("/metadata/name").and_then(Value::as_str) {
            Some(name) if !name.is_empty() => name.to_owned(),
            _ => metadata::generated_name(&body).ok_or_else(|| {
                let message = "Required value: name or generateName is required";
                let mut causes = vec![Cause::new("FieldValueRequired", "metadata.name", message)];
                let schema = target.resource.schema.as_ref().filter(|_| target.resource.custom);
                if let Some(schema) = schema {
                    schema.validate(&body, None, "", &mut causes);
                }
                target.invalid("", causes)
            })?,
        };
        let target = Target {
            name: &name,
            ..target
        };
        target.check_name()?;
        body["metadata"]["name"] = json!(name);
        let warnings = self.prepare(target, &mut body, options)?;
        self.store.transact(
            !options.dry_run,
            |transaction| {
                self.check_namespace(transaction, target)?;
                let present = transaction.get(&target.key());
                let versioned = revision_of(&body).is_some();
                // What is wrong with the object is told first; nothing is kept of it then.
                let object = self.insert(transaction, target, body, options, None)?;
                if let Some(present) = present {
                    let (group, plural) = (&target.resource.group, &target.resource.plural);
                    let mut error = ApiError::already_exists(group, plural, &name);
                    if present.pointer("/metadata/deletionTimestamp").is_some() {
                        error.message = format!("object is being deleted: {}", error.message);
                    }
                    return Err(error);
                }
                if versioned {
                    return Err(ApiError::new(
                        http::StatusCode::INTERNAL_SERVER_ERROR,
                        "",
                        "resourceVersion should not be set on objects to be created",
                    ));
                }
                Ok(Written {
                    object,
                    created: true,
                    warnings,
                })
            },
            store_failed,
        )
    }

    pub(crate) fn update(
        &self,
        target: Target<'_>,
        body: Value,
        options: &WriteOptions,
    ) -> Result<Written, ApiError> {
        let mut body = self.check_identity(target, body, Door::Write)?;
        check_name_of_url(target, &body)?;
        let unconditional = revision_of(&body).is_none();
        let warnings = self.prepare(target, &mut body, options)?;
        self.store.transact(
            !options.dry_run,
            |transaction| {
                let Some(old) = transaction.get(&target.key()) else {
                    if !(unconditional && target.resource.created_by_update) {
                        return Err(target.not_found());
                    }
                    self.check_namespace(transaction, target)?;
                    target.check_name()?;
                    let object = self.insert(transaction, target, body, options, None)?;
                    return Ok(Written {
                        object,
                        created: true,
                        warnings,
                    });
                };
                if unconditional && !target.resource.unconditional_update {
                    let message = "Invalid value: 0: must be specified for an update";
                    let cause = Cause::new("FieldValueInvalid", "metadata.resourceVersion", message);
                    let (group, plural) = (&target.resource.group, &target.resource.plural);
                    return Err(ApiError::invalid(group, plural, target.name, vec![cause]));
                }
                let object = self.replace(transaction, target, &old, body, options)?;
                Ok(Written {
                    object,
                    created: false,
                    warnings,
                })
            },
            store_failed,
        )
    }

    pub(crate) fn patch(
        &self,
        target: Target<'_>,
        patch: Patch,
        options: &WriteOptions,
    ) -> Result<Written, ApiError> {
        if let Patch::Apply(body) = patch {
            return self.apply(target, body, options);
        }
        self.store.transact(
            !options.dry_run,
            |transaction| {
                let old = transaction.get(&target.key()).ok_or_else(|| target.not_found())?;
                let mut body = Self::served(target.resource, &old);
                match &patch {
                    Patch::Json(patch) => patch::json(&mut body, patch)?,
                    Patch::Merge(patch) => patch::merge(&mut body, patch),
                    Patch::Strategic(patch) => patch::strategic(&mut body, patch),
                    Patch::Apply(_) => {}
                }
                let patched = body.to_string();
                let mut body = self.check_identity(target, body, Door::Patch)?;
                check_name_of_url(target, &body)?;
                let warnings = self
                    .prepare(target, &mut body, options)
                    .map_err(|error| patch::not_strict(error, &patched))?;
                check_uid(target, &old, &body)?;
                let object = self.replace(transaction, target, &old, body, options)?;
                Ok(Written {
                    object,
                    created: false,
                    warnings,
                })
            },
            store_failed,
        )
    }

    fn apply(&self, target: Target<'_>, body: Value, options: &WriteOptions) -> Result<Written, ApiError> {
        if body
            .pointer("/metadata/managedFields")
            .is_some_and(|m| m.as_array().is_none_or(|list| !list.is_empty()))
        {
            return Err(ApiError::bad_request("metadata.managedFields must be nil"));
        }
        let schema = schema_with_metadata(target.resource.schema.as_ref().map(|s| s.schema()));
        let stated = body.clone();
        let mut body = self.check_identity(target, body, Door::Apply)?;
        check_name_of_url(target, &body)?;
        managed::check_types(&schema, &stated)?;
        // Unknown fields are refused by `managed::apply`, however strictly the client asks for validation.
        let warnings = Vec::new();
        let writer = writer(target, options);
        self.store.transact(
            !options.dry_run,
            |transaction| {
                let old = transaction.get(&target.key());
                if old.is_none() && target.subresource == "status" {
                    return Err(target.not_found());
                }
                // Each door shows only its half of the object, so the other half cannot be owned through it.
                if target.resource.status_subresource
                    && let Some(object) = body.as_object_mut()
                {
                    if target.subresource == "status" {
                        object.retain(|key, _| {
                            matches!(key.as_str(), "apiVersion" | "kind" | "metadata" | "status")
                        });
                    } else {
                        object.remove("status");
                    }
                }
                match &old {
                    Some(old) => self.check_preconditions(target, old, &body)?,
                    None => check_no_uid(target, &body)?,
                }
                let empty = built_in::empty(&target.resource.kind);
                let owned = old
                    .as_deref()
                    .map(|old| managed::with_first_owner(&schema, &empty, old, &writer));
                let mut merged = managed::apply(&schema, owned.as_ref(), &body, &writer, options.force)?;
                merged["apiVersion"] = json!(target.resource.api_version());
                merged["kind"] = json!(target.resource.kind);
                let object = match old {
                    None => {
                        self.check_namespace(transaction, target)?;
                        target.check_name()?;
                        self.finish(target, &mut merged, None)?;
                        let entries = merged.pointer("/metadata/managedFields").cloned();
                        let object = self.insert(transaction, target, merged, options, entries)?;
                        return Ok(Written {
                            object,
                            created: true,
                            warnings,
                        });
                    }
                    Some(old) => {
                        self.carry_over(target, &old, &mut merged);
                        managed::note_applied(&mut merged, &stated, &writer);
                        self.finish(target, &mut merged, Some(&old))?;
                        self.put_if_changed(transaction, target, &old, merged, options.dry_run)
                    }
                };
                Ok(Written {
                    object,
                    created: false,
                    warnings,
                })
            },
            store_failed,
        )
    }

    /// apiVersion, kind and namespace must be those of the URL; absent ones are filled in.
    fn check_identity(&self, target: Target<'_>, mut body: Value, door: Door) -> Result<Value, ApiError> {
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

    fn check_unknown(
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

    /// Unknown fields, defaults, and what the client may not set.
    fn prepare(
        &self,
        target: Target<'_>,
        body: &mut Value,
        options: &WriteOptions,
    ) -> Result<Vec<String>, ApiError> {
        let mut warnings = Vec::new();
        self.check_unknown(target, body, options, &mut warnings)?;
        if let Some(schema) = &target.resource.schema {
            schema.default(body);
        }
        warnings.extend(metadata::finalizer_warnings(body).filter(|_| target.resource.custom));
        Ok(warnings)
    }

    /// Defaults and validation of the object as it would be kept.
    fn finish(&self, target: Target<'_>, object: &mut Value, old: Option<&Value>) -> Result<(), ApiError> {
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
    fn record(&self, target: Target<'_>, old: Option<&Value>, new: &mut Value, options: &WriteOptions) {
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

    fn check_namespace(&self, transaction: &Transaction<'_>, target: Target<'_>) -> Result<(), ApiError> {
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

    /// Puts a new object.
    fn insert(
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

    fn check_preconditions(&self, target: Target<'_>, old: &Value, body: &Value) -> Result<(), ApiError> {
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

    /// What a write through this door cannot change: the other half, identity, times; and the generation.
    fn carry_over(&self, target: Target<'_>, old: &Value, new: &mut Value) {
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
    fn put_if_changed(
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

/// The resource version that a body is based on.
fn revision_of(body: &Value) -> Option<&str> {
    let text = body.pointer("/metadata/resourceVersion").and_then(Value::as_str);
    text.filter(|text| !text.is_empty() && *text != "0")
}

/// What would be there after a dry run has no version yet.
fn unversioned(object: &Value) -> Arc<Value> {
    let mut object = object.clone();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("resourceVersion");
    }
    Arc::new(object)
}

/// apiVersion and kind must be those of the resource.
fn check_kind(target: Target<'_>, body: &Value, door: Door) -> Result<(), ApiError> {
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
fn check_uid(target: Target<'_>, old: &Value, new: &Value) -> Result<(), ApiError> {
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
fn check_no_uid(target: Target<'_>, body: &Value) -> Result<(), ApiError> {
    let uid = body.pointer("/metadata/uid").and_then(Value::as_str);
    match uid.filter(|uid| !uid.is_empty()) {
        None => Ok(()),
        Some(uid) => Err(target.conflict(&format!(
            "uid mismatch: the provided object specified uid {uid}, and no existing object was found"
        ))),
    }
}

/// An object keeps its name.
fn check_name_of_url(target: Target<'_>, body: &Value) -> Result<(), ApiError> {
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

fn writer(target: Target<'_>, options: &WriteOptions) -> Writer {
    Writer {
        manager: options.field_manager.clone(),
        api_version: target.resource.api_version(),
        subresource: target.subresource.to_owned(),
        now: options.now.clone(),
    }
}

fn namespace(name: &str, now: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "uid": uuid::Uuid::new_v4().to_string(), "creationTimestamp": now,
            "labels": {"kubernetes.io/metadata.name": name}},
        "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"},
    })
}

/// The same uid for the same CRD at every start.
fn stable_uid(name: &str) -> String {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(name.as_bytes());
    let bytes: [u8; 16] = std::array::from_fn(|at| digest[at]);
    uuid::Builder::from_random_bytes(bytes).into_uuid().to_string()
}
