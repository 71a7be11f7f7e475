//! What each verb does to objects: the API's semantics over the [`Store`].
//!
//! Everything here is synchronous and touches nothing but the store, so it runs off the async threads.
//! Start reading at [`Registry::create`].

use std::sync::Arc;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};

use crate::built_in;
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
        let mut body = self.check_identity(target, body)?;
        let name = match body.pointer("/metadata/name").and_then(Value::as_str) {
            Some(name) if !name.is_empty() => name.to_owned(),
            _ => metadata::generated_name(&body).ok_or_else(|| {
                target.invalid(
                    "",
                    vec![Cause::new(
                        "FieldValueRequired",
                        "metadata.name",
                        "Required value: name or generateName is required",
                    )],
                )
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
                if transaction.get(&target.key()).is_some() {
                    return Err(ApiError::already_exists(
                        &target.resource.group,
                        &target.resource.plural,
                        &name,
                    ));
                }
                let object = self.insert(transaction, target, body, options, None)?;
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
        let mut body = self.check_identity(target, body)?;
        check_name_of_url(target, &body)?;
        let revision = body.pointer("/metadata/resourceVersion").and_then(Value::as_str);
        if !target.resource.unconditional_update && revision.is_none_or(str::is_empty) {
            let message = "Invalid value: 0: must be specified for an update";
            let cause = Cause::new("FieldValueInvalid", "metadata.resourceVersion", message);
            return Err(target.invalid(target.name, vec![cause]));
        }
        let warnings = self.prepare(target, &mut body, options)?;
        self.store.transact(
            !options.dry_run,
            |transaction| {
                let old = transaction.get(&target.key()).ok_or_else(|| target.not_found())?;
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
                let mut body = self.check_identity(target, body)?;
                check_name_of_url(target, &body)?;
                let warnings = self.prepare(target, &mut body, options)?;
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
        let mut body = self.check_identity(target, body)?;
        body["metadata"]["name"] = json!(target.name);
        // Unknown fields are refused by `managed::apply`, however strictly the client asks for validation.
        let warnings = Vec::new();
        let schema = schema_with_metadata(target.resource.schema.as_ref().map(|s| s.schema()));
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
                if let Some(old) = &old {
                    self.check_preconditions(target, old, &body)?;
                }
                let mut merged = managed::apply(&schema, old.as_deref(), &body, &writer, options.force)?;
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
                        self.finish(target, &mut merged, Some(&old))?;
                        self.put_if_changed(transaction, target, &old, merged)
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
    fn check_identity(&self, target: Target<'_>, mut body: Value) -> Result<Value, ApiError> {
        let resource = target.resource;
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
            let found = object.entry(field).or_insert_with(|| json!(wanted));
            if found.as_str() != Some(&wanted) {
                return Err(ApiError::bad_request(format!(
                    "the {field} in the data ({found}) does not match the expected {field} ({wanted})"
                )));
            }
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
        let unknown = schema.prune(body);
        let quoted: Vec<String> = unknown
            .iter()
            .map(|path| format!("unknown field {path:?}"))
            .collect();
        match options.field_validation {
            _ if unknown.is_empty() => {}
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
                causes.extend(schema.validate(object, old));
            }
        }
        built_in::default(target.resource, object);
        if !causes.is_empty() {
            return Err(target.invalid(target.name, causes));
        }
        built_in::check(target.resource, object)
    }

    fn check_namespace(&self, transaction: &Transaction<'_>, target: Target<'_>) -> Result<(), ApiError> {
        if !target.resource.namespaced {
            return Ok(());
        }
        let namespace = transaction.get(&Key::new("namespaces", "", target.namespace));
        let namespace = namespace.ok_or_else(|| ApiError::not_found("", "namespaces", target.namespace))?;
        if namespace.pointer("/metadata/deletionTimestamp").is_some() {
            let what = format!(
                "{} {:?} is forbidden: unable to create new content in namespace {} because it is being terminated",
                target.resource.plural, target.name, target.namespace
            );
            return Err(ApiError::forbidden(what));
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
        if target.resource.kind == "Namespace" {
            let defaults = namespace(target.name, &options.now);
            json_patch::merge(
                &mut body,
                &json!({"spec": defaults["spec"], "status": defaults["status"], "metadata": {"labels": defaults["metadata"]["labels"]}}),
            );
        }
        self.finish(target, &mut body, None)?;
        match entries {
            Some(entries) => body["metadata"]["managedFields"] = entries,
            None => {
                let schema = schema_with_metadata(target.resource.schema.as_ref().map(|s| s.schema()));
                managed::record_update(&schema, None, &mut body, &writer(target, options));
            }
        }
        Ok(transaction.put(target.key(), body))
    }

    /// Puts a changed object in place of `old`.
    fn replace(
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
        let schema = schema_with_metadata(target.resource.schema.as_ref().map(|s| s.schema()));
        managed::record_update(&schema, Some(old), &mut body, &writer(target, options));
        Ok(self.put_if_changed(transaction, target, old, body))
    }

    fn check_preconditions(&self, target: Target<'_>, old: &Value, body: &Value) -> Result<(), ApiError> {
        for (field, why) in [
            (
                "/metadata/uid",
                "Precondition failed: UID in precondition differs from UID in object meta",
            ),
            (
                "/metadata/resourceVersion",
                "the object has been modified; please apply your changes to the latest version and try again",
            ),
        ] {
            let wanted = body
                .pointer(field)
                .and_then(Value::as_str)
                .filter(|text| !text.is_empty());
            if let Some(wanted) = wanted
                && old.pointer(field).and_then(Value::as_str) != Some(wanted)
            {
                return Err(target.conflict(why));
            }
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
            "name",
            "namespace",
        ] {
            match old.pointer(&format!("/metadata/{field}")) {
                Some(value) => metadata.insert(field.to_owned(), value.clone()),
                None => metadata.remove(field),
            };
        }
        if spec_changed && let Some(generation) = metadata.get("generation").and_then(Value::as_i64) {
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
    ) -> Arc<Value> {
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
