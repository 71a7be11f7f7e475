//! `/v1/models`: the names that a caller may use.

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use freehold_crds::inference_node::Route;
use http::HeaderMap;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::exchange::{key_of, visible};
use crate::gateway::Gateway;

fn entry(route: &Route) -> Value {
    json!({
        "id": route.name,
        "object": "model",
        "created": route.created,
        "owned_by": format!("{}/{}", route.namespace, route.deployment),
    })
}

/// The routes that a caller may use and that no rule holds back.
fn usable<'a>(snapshot: &'a crate::bus::Snapshot, headers: &HeaderMap) -> Result<Vec<&'a Route>, ApiError> {
    let mut routes = visible(snapshot, key_of(headers).as_ref())?;
    routes.retain(|route| route.refusal.is_none());
    Ok(routes)
}

pub(crate) async fn list(State(gateway): State<Gateway>, headers: HeaderMap) -> Response {
    let snapshot = gateway.snapshot();
    match usable(&snapshot, &headers) {
        Ok(routes) => {
            let data: Vec<_> = routes.into_iter().map(entry).collect();
            Json(json!({"object": "list", "data": data})).into_response()
        }
        Err(error) => error.into_response(),
    }
}

pub(crate) async fn one(
    State(gateway): State<Gateway>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Response {
    let snapshot = gateway.snapshot();
    match usable(&snapshot, &headers) {
        Ok(routes) => match routes.iter().find(|route| route.name == name) {
            Some(route) => Json(entry(route)).into_response(),
            None => {
                let names: Vec<_> = routes.iter().map(|route| route.name.as_str()).collect();
                ApiError::unknown_model(&name, &names).into_response()
            }
        },
        Err(error) => error.into_response(),
    }
}
