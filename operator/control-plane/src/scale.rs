//! The `scale` subresource: how many replicas are wanted, and how many there are, for every kind alike.

use http::StatusCode;
use serde_json::{Value, json};

use crate::body::Action;
use crate::error::ApiError;
use crate::patch;
use crate::registry::{Patch, Registry, Target, WriteOptions, store_failed};

/// Where a kind keeps its numbers, as JSON pointers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scale {
    wanted: String,
    present: String,
    selector: Option<String>,
}

impl Scale {
    /// From the paths of a CRD, such as `.spec.replicas`.
    pub(crate) fn new(wanted: &str, present: &str, selector: Option<&str>) -> Self {
        let pointer = |path: &str| path.replace('.', "/");
        Self {
            wanted: pointer(wanted),
            present: pointer(present),
            selector: selector.map(pointer),
        }
    }

    /// The scale of an object.
    pub(crate) fn of(&self, object: &Value) -> Value {
        let count = |pointer: &str| object.pointer(pointer).and_then(Value::as_i64).unwrap_or(0);
        let mut metadata = json!({});
        for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
            if let Some(value) = object.pointer(&format!("/metadata/{field}")) {
                metadata[field] = value.clone();
            }
        }
        let mut scale = json!({
            "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata,
            "spec": {"replicas": count(&self.wanted)}, "status": {"replicas": count(&self.present)},
        });
        let selector = self.selector.as_ref().and_then(|pointer| object.pointer(pointer));
        if let Some(selector) = selector {
            scale["status"]["selector"] = selector.clone();
        }
        scale
    }
}

/// Sets how many replicas are wanted. Gives the scale as it is then.
pub(crate) fn write(
    registry: &Registry,
    target: Target<'_>,
    scale: &Scale,
    action: Action,
    options: &WriteOptions,
) -> Result<Value, ApiError> {
    registry.store.transact(
        !options.dry_run,
        |transaction| {
            let old = transaction.get(&target.key()).ok_or_else(|| target.not_found())?;
            let mut wanted = scale.of(&old);
            match action {
                Action::Update(body) => wanted = body,
                Action::Patch(Patch::Json(patch)) => patch::json(&mut wanted, &patch)?,
                Action::Patch(Patch::Merge(patch) | Patch::Strategic(patch) | Patch::Apply(patch)) => {
                    patch::merge(&mut wanted, &patch);
                }
                Action::Create(_) | Action::Delete(_) | Action::DeleteCollection(_) => {
                    return Err(ApiError::method_not_allowed());
                }
            }
            let count = wanted.pointer("/spec/replicas").cloned().unwrap_or(json!(0));
            if !count.is_i64() {
                let message = format!("Scale in version \"v1\" cannot be handled as a Scale: spec.replicas is {count}; it must be a number");
                return Err(ApiError::new(StatusCode::BAD_REQUEST, "BadRequest", message));
            }
            let mut new = old.as_ref().clone();
            set(&mut new, &scale.wanted, count);
            if let Some(version) = wanted.pointer("/metadata/resourceVersion") {
                new["metadata"]["resourceVersion"] = version.clone();
            }
            let object = registry.replace(transaction, target, &old, new, options)?;
            Ok(scale.of(&object))
        },
        store_failed,
    )
}

/// Sets the value at a pointer, with the structures on the way.
fn set(object: &mut Value, pointer: &str, value: Value) {
    let place = pointer
        .split('/')
        .filter(|name| !name.is_empty())
        .fold(object, |object, name| {
            if !object.is_object() {
                *object = json!({});
            }
            &mut object[name]
        });
    *place = value;
}
