//! Deleting: finalizers, namespaces, and what belongs to what is gone.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::error::ApiError;
use crate::registry::{NAMESPACES, Registry, Target, WriteOptions, store_failed};
use crate::resource::Resource;
use crate::selector::Selector;
use crate::store::{Key, Transaction};

/// What a delete asks for.
#[derive(Clone, Debug, Default)]
pub(crate) struct DeleteOptions {
    pub(crate) uid: Option<String>,
    pub(crate) resource_version: Option<String>,
    /// Leave what belongs to it.
    pub(crate) orphan: bool,
    pub(crate) dry_run: bool,
}

impl Registry {
    /// Deletes one object. Gives it and whether it is gone (or waits for its finalizers).
    pub(crate) fn delete(
        &self,
        target: Target<'_>,
        wanted: &DeleteOptions,
        options: &WriteOptions,
    ) -> Result<(Arc<Value>, bool), ApiError> {
        check_removable(target.resource, target.name)?;
        self.store.transact(
            !(options.dry_run || wanted.dry_run),
            |transaction| {
                let object = transaction.get(&target.key()).ok_or_else(|| target.not_found())?;
                for (field, called, wanted, hint) in [
                    ("uid", "UID", &wanted.uid, "The object might have been deleted and then recreated"),
                    ("resourceVersion", "ResourceVersion", &wanted.resource_version, "The object might have been modified"),
                ] {
                    let found = object.pointer(&format!("/metadata/{field}")).and_then(Value::as_str);
                    if let Some(wanted) = wanted
                        && found != Some(wanted)
                    {
                        let why = format!("the {called} in the precondition ({wanted}) does not match the {called} in record ({}). {hint}", found.unwrap_or_default());
                        let (group, kind) = (&target.resource.group, &target.resource.kind);
                        return Err(ApiError::conflict(group, kind, target.name, &why));
                    }
                }
                if wanted.orphan {
                    orphan(transaction, &object);
                }
                Ok(self.start_deletion(transaction, &target.key(), &object, &options.now))
            },
            store_failed,
        )
    }

    /// Deletes everything that matches, and gives it as it was.
    pub(crate) fn delete_collection(
        &self,
        target: Target<'_>,
        selector: &Selector,
        wanted: &DeleteOptions,
        options: &WriteOptions,
    ) -> Result<Vec<Arc<Value>>, ApiError> {
        let storage = &target.resource.storage;
        self.store.transact(
            !(options.dry_run || wanted.dry_run),
            |transaction| {
                let inside = |key: &Key| {
                    key.storage == *storage
                        && (target.namespace.is_empty() || key.namespace == target.namespace)
                };
                let found = transaction.find(|key, object| inside(key) && selector.matches(object));
                for (key, _) in &found {
                    check_removable(target.resource, &key.name)?;
                }
                for (key, object) in &found {
                    self.start_deletion(transaction, key, object, &options.now);
                }
                Ok(found.into_iter().map(|(_, object)| object).collect())
            },
            store_failed,
        )
    }

    fn start_deletion(
        &self,
        transaction: &mut Transaction<'_>,
        key: &Key,
        object: &Arc<Value>,
        now: &str,
    ) -> (Arc<Value>, bool) {
        let finalizers = object
            .pointer("/metadata/finalizers")
            .and_then(Value::as_array)
            .is_some_and(|f| !f.is_empty());
        let waits =
            finalizers || (key.storage == "namespaces" && !self.empty_namespace(transaction, &key.name, now));
        if !waits {
            return (
                self.remove(transaction, key)
                    .unwrap_or_else(|| Arc::clone(object)),
                true,
            );
        }
        if object.pointer("/metadata/deletionTimestamp").is_some() {
            return (Arc::clone(object), false);
        }
        let mut marked = object.as_ref().clone();
        json_patch::merge(
            &mut marked,
            &json!({"metadata": {"deletionTimestamp": now, "deletionGracePeriodSeconds": 0}}),
        );
        if key.storage == "namespaces" {
            marked["status"]["phase"] = json!("Terminating");
        }
        if let Some(generation) = marked.pointer("/metadata/generation").and_then(Value::as_i64) {
            marked["metadata"]["generation"] = json!(generation + 1);
        }
        (transaction.put(key.clone(), marked), false)
    }

    /// Takes an object away, and then what belonged to nothing else, and the namespace that waited for it.
    pub(crate) fn remove(&self, transaction: &mut Transaction<'_>, key: &Key) -> Option<Arc<Value>> {
        let last = transaction.delete(key)?;
        let now = last
            .pointer("/metadata/deletionTimestamp")
            .and_then(Value::as_str)
            .map_or_else(crate::now, str::to_owned);
        if let Some(uid) = last.pointer("/metadata/uid").and_then(Value::as_str) {
            let owned = transaction.find(|_, object| owners(object).any(|owner| owner == uid));
            for (key, object) in owned {
                let alive = owners(&object).any(|owner| owner != uid && exists(transaction, owner));
                if !alive {
                    self.start_deletion(transaction, &key, &object, &now);
                }
            }
        }
        if !key.namespace.is_empty() {
            let home = Key::new("namespaces", "", &key.namespace);
            let terminating = transaction
                .get(&home)
                .is_some_and(|n| n.pointer("/metadata/deletionTimestamp").is_some());
            if terminating
                && transaction
                    .find(|other, _| other.namespace == key.namespace)
                    .is_empty()
            {
                transaction.delete(&home);
            }
        }
        Some(last)
    }

    /// Deletes what is in a namespace; true when nothing is left.
    fn empty_namespace(&self, transaction: &mut Transaction<'_>, name: &str, now: &str) -> bool {
        for (key, object) in transaction.find(|key, _| key.namespace == name) {
            self.start_deletion(transaction, &key, &object, now);
        }
        transaction.find(|key, _| key.namespace == name).is_empty()
    }

    /// Deletes events that are older than `before`.
    pub(crate) fn expire_events(&self, before: jiff::Timestamp) -> Result<usize, ApiError> {
        let old = |object: &Value| {
            let times = [
                "/series/lastObservedTime",
                "/lastTimestamp",
                "/eventTime",
                "/metadata/creationTimestamp",
            ];
            let last = times
                .iter()
                .find_map(|pointer| object.pointer(pointer)?.as_str()?.parse::<jiff::Timestamp>().ok());
            last.is_none_or(|last| last < before)
        };
        if !self
            .store
            .list("events", "")
            .0
            .iter()
            .any(|(_, object)| old(object))
        {
            return Ok(0);
        }
        self.store.transact(
            true,
            |transaction| {
                let expired = transaction.find(|key, object| key.storage == "events" && old(object));
                expired.iter().for_each(|(key, _)| drop(transaction.delete(key)));
                Ok(expired.len())
            },
            store_failed,
        )
    }
}

/// The namespaces that everything else stands on stay.
fn check_removable(resource: &Resource, name: &str) -> Result<(), ApiError> {
    if resource.kind == "Namespace" && NAMESPACES.contains(&name) {
        let why = "this namespace may not be deleted";
        return Err(ApiError::forbidden("", "namespaces", name, why));
    }
    Ok(())
}

fn owners(object: &Value) -> impl Iterator<Item = &str> {
    let owners = object
        .pointer("/metadata/ownerReferences")
        .and_then(Value::as_array);
    owners
        .into_iter()
        .flatten()
        .filter_map(|owner| owner.get("uid")?.as_str())
}

fn exists(transaction: &Transaction<'_>, uid: &str) -> bool {
    !transaction
        .find(|_, object| object.pointer("/metadata/uid").and_then(Value::as_str) == Some(uid))
        .is_empty()
}

/// Takes the reference to `owner` out of everything that it owns.
fn orphan(transaction: &mut Transaction<'_>, owner: &Value) {
    let Some(uid) = owner.pointer("/metadata/uid").and_then(Value::as_str) else {
        return;
    };
    for (key, object) in transaction.find(|_, object| owners(object).any(|owner| owner == uid)) {
        let mut object = object.as_ref().clone();
        if let Some(list) = object
            .pointer_mut("/metadata/ownerReferences")
            .and_then(Value::as_array_mut)
        {
            list.retain(|owner| owner.get("uid").and_then(Value::as_str) != Some(uid));
        }
        transaction.put(key, object);
    }
}
