//! Writes to the API: server-side apply, with this operator as the one manager of what it applies.

use std::fmt::Debug;

use kube::api::{Patch, PatchParams};
use kube::core::Request;
use kube::{Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::FIELD_MANAGER;

/// Applies `status` (and nothing else of the object) and returns the object as the API has it then,
/// or None when it is gone.
pub(crate) async fn apply_status<K>(
    client: &Client,
    namespace: Option<&str>,
    name: &str,
    status: &impl Serialize,
) -> Result<Option<K>, kube::Error>
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug,
{
    let body = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {"name": name, "namespace": namespace},
        "status": status,
    });
    let request = Request::new(K::url_path(&(), namespace));
    let request = request
        .patch_subresource("status", name, &params(), &Patch::Apply(body))
        .map_err(kube::Error::BuildRequest)?;
    gone_is_none(client.request(request).await)
}

/// Applies a cluster-wide object: its labels and its spec.
pub(crate) async fn apply<K>(
    client: &Client,
    name: &str,
    labels: &impl Serialize,
    spec: &impl Serialize,
) -> Result<K, kube::Error>
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug,
{
    let body = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
    });
    let request = Request::new(K::url_path(&(), None));
    let request = request
        .patch(name, &params(), &Patch::Apply(body))
        .map_err(kube::Error::BuildRequest)?;
    client.request(request).await
}

/// The object as plain JSON, for what does not read as its type; None when it is gone.
pub(crate) async fn read_raw<K>(
    client: &Client,
    namespace: Option<&str>,
    name: &str,
) -> Result<Option<Value>, kube::Error>
where
    K: Resource<DynamicType = ()>,
{
    let request = Request::new(K::url_path(&(), namespace));
    let request = request
        .get(name, &kube::api::GetParams::default())
        .map_err(kube::Error::BuildRequest)?;
    gone_is_none(client.request(request).await)
}

/// No other writer has a say in these fields, so the apply is forced.
fn params() -> PatchParams {
    PatchParams::apply(FIELD_MANAGER).force()
}

fn gone_is_none<T>(answer: Result<T, kube::Error>) -> Result<Option<T>, kube::Error> {
    match answer {
        Ok(object) => Ok(Some(object)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(error),
    }
}
