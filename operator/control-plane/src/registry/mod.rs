//! What each verb does to objects: the API's semantics over the [`Store`].
//!
//! Everything here is synchronous and touches nothing but the store, so it runs off the async threads.
//! Start reading at [`Registry::create`].

mod checks;
mod target;
mod writing;

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
use checks::{check_name_of_url, check_no_uid, check_uid};
use target::Door;

pub(crate) use target::{FieldValidation, Patch, Target, WriteOptions, Written};

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
}

/// The resource version that a body is based on.
fn revision_of(body: &Value) -> Option<&str> {
    let text = body.pointer("/metadata/resourceVersion").and_then(Value::as_str);
    text.filter(|text| !text.is_empty() && *text != "0")
}

fn writer(target: Target<'_>, options: &WriteOptions) -> Writer {
    Writer {
        status_apart: target.resource.status_subresource,
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
