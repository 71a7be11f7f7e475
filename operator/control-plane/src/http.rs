//! The whole API as one function from request to response.
//!
//! It is served in process (as a tower service), on localhost with TLS, and in tests; it does not know
//! which. Start reading at [`Api::handle`].

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::body::{Action, PATCHES, action, media_type, parse_body};
use crate::discovery;
use crate::error::ApiError;
use crate::listing;
use crate::options;
use crate::registry::{Patch, Registry, Target, WriteOptions, Written};
use crate::scale;
use crate::selector::Selector;
use crate::table;
use crate::watch::{View, WatchOptions, watch};

/// Largest body of a request, as in the API server.
const BODY_LIMIT: usize = 3 << 20;
/// A client that takes longer to send its body is let go.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a watch lasts unless it asks for less.
const WATCH_TIMEOUT: Duration = Duration::from_secs(3600);

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) groups: Vec<String>,
}

/// The API.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) registry: Arc<Registry>,
    /// Ends the watches.
    pub(crate) shutdown: CancellationToken,
}

/// A path that names objects.
struct ObjectPath {
    resource: usize,
    namespace: String,
    name: String,
    subresource: String,
}

impl Api {
    /// Answers one request.
    pub(crate) async fn handle<B>(&self, request: Request<B>, user: &User) -> Response<Body>
    where
        B: http_body::Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (parts, body) = request.into_parts();
        let body = Limited::new(body, BODY_LIMIT).collect();
        let body = match tokio::time::timeout(BODY_TIMEOUT, body).await {
            Err(_) => return error_response(&ApiError::slow_body(BODY_TIMEOUT)),
            Ok(body) => body,
        };
        let body = match body {
            Ok(body) => body.to_bytes(),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => {
                return error_response(&ApiError::too_large(BODY_LIMIT));
            }
            Err(error) => {
                return error_response(&ApiError::bad_request(format!(
                    "failed to read the body: {error}"
                )));
            }
        };
        match self.answer(&parts, body, user).await {
            Ok(response) => response,
            Err(error) => {
                if error.code.is_server_error() {
                    tracing::error!(method = %parts.method, path = parts.uri.path(), error = error.message, "Failed to answer API request");
                }
                error_response(&error)
            }
        }
    }

    async fn answer(
        &self,
        parts: &http::request::Parts,
        body: Bytes,
        user: &User,
    ) -> Result<Response<Body>, ApiError> {
        let path = parts.uri.path().trim_end_matches('/');
        let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
        let resources = &self.registry.resources;
        if let (["api" | "apis"], &Method::GET) = (segments.as_slice(), &parts.method)
            && let Some(content_type) = discovery::wants_aggregated(accepted(&parts.headers))
        {
            let document = discovery::aggregated(resources, segments == ["api"]);
            return Ok(response(
                StatusCode::OK,
                content_type,
                Body::from(document.to_string()),
            ));
        }
        let document = match segments.as_slice() {
            ["healthz" | "livez" | "readyz", ..] => return Ok(text_response("ok")),
            ["version"] => Some(discovery::version()),
            ["api"] => Some(discovery::core_versions()),
            ["apis"] => Some(discovery::group_list(resources)),
            ["apis", group] => discovery::one_group(resources, group),
            ["api", version] => discovery::resource_list(resources, "", version),
            ["apis", group, version] => discovery::resource_list(resources, group, version),
            ["openapi", "v3"] => Some(discovery::openapi_index(resources)),
            ["openapi", "v3", "api", version] => discovery::openapi_document(resources, "", version),
            ["openapi", "v3", "apis", group, version] => {
                discovery::openapi_document(resources, group, version)
            }
            _ => {
                let path = self.object_path(&segments).ok_or_else(ApiError::no_resource)?;
                return self.objects(parts, &path, body, user).await;
            }
        };
        if parts.method != Method::GET {
            return Err(ApiError::method_not_allowed());
        }
        Ok(json_response(
            StatusCode::OK,
            &document.ok_or_else(ApiError::no_resource)?,
        ))
    }

    fn object_path(&self, segments: &[&str]) -> Option<ObjectPath> {
        let (group, version, rest) = match segments {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return None,
        };
        let find = |plural: &str, namespaced: Option<bool>| {
            self.registry.resources.iter().position(|r| {
                r.group == group
                    && r.version == version
                    && r.plural == plural
                    && namespaced.is_none_or(|n| r.namespaced == n)
            })
        };
        // `/namespaces/x/things` is about things; `/namespaces/x` and `/namespaces/x/status` about x.
        if let ["namespaces", namespace, plural, rest @ ..] = rest
            && let Some(resource) = find(plural, Some(true))
        {
            let name = rest.first().copied().unwrap_or_default();
            let subresource = rest.get(1).copied().unwrap_or_default();
            let path = ObjectPath {
                resource,
                namespace: decode(namespace),
                name: decode(name),
                subresource: subresource.to_owned(),
            };
            return (rest.len() <= 2).then_some(path);
        }
        let plural = rest.first()?;
        let resource = find(plural, None)?;
        let name = rest.get(1).copied().unwrap_or_default();
        let subresource = rest.get(2).copied().unwrap_or_default();
        let path = ObjectPath {
            resource,
            namespace: String::new(),
            name: decode(name),
            subresource: subresource.to_owned(),
        };
        (rest.len() <= 3).then_some(path)
    }

    async fn objects(
        &self,
        parts: &http::request::Parts,
        path: &ObjectPath,
        body: Bytes,
        user: &User,
    ) -> Result<Response<Body>, ApiError> {
        let resource = self
            .registry
            .resources
            .get(path.resource)
            .ok_or_else(ApiError::no_resource)?;
        let served = match path.subresource.as_str() {
            "" => true,
            "status" => resource.status_subresource,
            "scale" => resource.scale.is_some(),
            _ => false,
        };
        if !served {
            let missing = ApiError::not_found(&resource.group, &resource.plural, &path.name);
            return Err(if resource.custom {
                missing
            } else {
                ApiError::no_resource()
            });
        }
        let query: HashMap<String, String> =
            form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes())
                .into_owned()
                .collect();
        let named = !path.name.is_empty();
        let read_only = !resource.verbs.contains(&"update");
        let nowhere = resource.namespaced && path.namespace.is_empty();
        match (&parts.method, named) {
            (&Method::GET, _) => self.read(parts, path, &query).await,
            (&Method::POST, false) if resource.verbs == ["create"] => {
                review(resource, &parts.headers, &body, user)
            }
            _ if read_only => Err(ApiError::method_not_allowed()),
            (&Method::POST, _) if nowhere => Err(ApiError::method_not_allowed()),
            (&Method::POST, true) | (&Method::DELETE, _) if !path.subresource.is_empty() => {
                Err(ApiError::not_supported(resource, &parts.method))
            }
            (&Method::PUT | &Method::PATCH, false) if resource.custom => {
                Err(ApiError::bad_request("name must be provided"))
            }
            (&Method::POST, false)
            | (&Method::PUT | &Method::PATCH | &Method::DELETE, true)
            | (&Method::DELETE, false) => self.write(parts, path, body, query).await,
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    async fn read(
        &self,
        parts: &http::request::Parts,
        path: &ObjectPath,
        query: &HashMap<String, String>,
    ) -> Result<Response<Body>, ApiError> {
        let resource = self
            .registry
            .resources
            .get(path.resource)
            .ok_or_else(ApiError::no_resource)?;
        let view = view(&parts.headers, query)?;
        let get = |name: &str| {
            query
                .get(name)
                .map(String::as_str)
                .filter(|value| !value.is_empty())
        };
        let flag = |name: &str| matches!(get(name), Some("true" | "1"));
        let selector = Selector::parse(resource, get("labelSelector"), get("fieldSelector"))?;
        // An object that is named by its path is read and not watched, as in the API server.
        if flag("watch") && path.name.is_empty() {
            listing::check_options(&get, false)?;
            let after = match get("resourceVersion") {
                None | Some("0") => None,
                Some(text) => Some(parse_revision(text)?),
            };
            let asked = get("timeoutSeconds")
                .and_then(|text| text.parse().ok())
                .map(Duration::from_secs);
            let options = WatchOptions {
                namespace: path.namespace.clone(),
                selector,
                after,
                bookmarks: flag("allowWatchBookmarks"),
                initial_events: flag("sendInitialEvents"),
                timeout: asked.unwrap_or(WATCH_TIMEOUT).min(WATCH_TIMEOUT),
                view,
            };
            let stream = watch(
                Arc::clone(&self.registry),
                path.resource,
                options,
                self.shutdown.child_token(),
            )?;
            return Ok(response(
                StatusCode::OK,
                "application/json",
                Body::from_stream(stream),
            ));
        }
        if path.name.is_empty() {
            let list = listing::list(&self.registry, resource, &path.namespace, &selector, query, &view)?;
            return Ok(json_response(StatusCode::OK, &list));
        }
        let object = listing::get(&self.registry, resource, &path.namespace, &path.name)?;
        if let (Some(scale), "scale") = (&resource.scale, path.subresource.as_str()) {
            return Ok(json_response(StatusCode::OK, &scale.of(&object)));
        }
        Ok(json_response(StatusCode::OK, &shown(resource, &object, &view)))
    }

    async fn write(
        &self,
        parts: &http::request::Parts,
        path: &ObjectPath,
        body: Bytes,
        query: HashMap<String, String>,
    ) -> Result<Response<Body>, ApiError> {
        let (action, duplicates) = action(&parts.method, &parts.headers, body, &path.name)?;
        if matches!(action, Action::Patch(Patch::Strategic(_)))
            && self
                .registry
                .resources
                .get(path.resource)
                .is_some_and(|resource| resource.custom)
        {
            return Err(ApiError::unsupported_media_type(PATCHES));
        }
        let applies = matches!(action, Action::Patch(Patch::Apply(_)));
        let options = WriteOptions {
            duplicates,
            ..options::read(&parts.method, applies, &parts.headers, &query)?
        };
        let (registry, resource) = (Arc::clone(&self.registry), path.resource);
        let (namespace, name, subresource) = (
            path.namespace.clone(),
            path.name.clone(),
            path.subresource.clone(),
        );
        // Off the async threads: a write waits for the disk.
        let outcome = tokio::task::spawn_blocking(move || {
            let resource = registry
                .resources
                .get(resource)
                .ok_or_else(ApiError::no_resource)?;
            let target = Target {
                resource,
                namespace: &namespace,
                name: &name,
                subresource: &subresource,
            };
            perform(&registry, target, action, &query, &options)
        });
        let outcome = outcome
            .await
            .map_err(|error| ApiError::internal(format!("the write ended unexpectedly: {error}")))??;
        let resource = self
            .registry
            .resources
            .get(path.resource)
            .ok_or_else(ApiError::no_resource)?;
        let mut response = json_response(
            outcome.code,
            &match outcome.object {
                Some(object) => shown(
                    resource,
                    &Registry::served(resource, &object),
                    &view(&parts.headers, &HashMap::new())?,
                ),
                None => outcome.document,
            },
        );
        for warning in outcome.warnings {
            let text = format!("299 - {warning:?}");
            if let Ok(value) = HeaderValue::from_str(&text) {
                response.headers_mut().append("Warning", value);
            }
        }
        Ok(response)
    }
}

struct Outcome {
    code: StatusCode,
    object: Option<Arc<Value>>,
    document: Value,
    warnings: Vec<String>,
}

fn perform(
    registry: &Registry,
    target: Target<'_>,
    action: Action,
    query: &HashMap<String, String>,
    options: &WriteOptions,
) -> Result<Outcome, ApiError> {
    let written = |written: Written| Outcome {
        code: if written.created {
            StatusCode::CREATED
        } else {
            StatusCode::OK
        },
        object: Some(written.object),
        document: Value::Null,
        warnings: written.warnings,
    };
    if let (Some(scale), "scale") = (&target.resource.scale, target.subresource) {
        return Ok(Outcome {
            code: StatusCode::OK,
            object: None,
            document: scale::write(registry, target, scale, action, options)?,
            warnings: Vec::new(),
        });
    }
    match action {
        Action::Create(body) => registry.create(target, body, options).map(written),
        Action::Update(body) => registry.update(target, body, options).map(written),
        Action::Patch(patch) => registry.patch(target, patch, options).map(written),
        Action::Delete(wanted) => {
            let (object, gone) = registry.delete(target, &wanted, options)?;
            let uid = object.pointer("/metadata/uid").cloned().unwrap_or_default();
            let mut details = json!({"name": target.name, "kind": target.resource.plural, "uid": uid});
            if !target.resource.group.is_empty() {
                details["group"] = json!(target.resource.group);
            }
            let document = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details});
            // As the API server: a Status once it is gone, the object while finalizers hold it.
            Ok(Outcome {
                code: StatusCode::OK,
                object: (!gone).then_some(object),
                document,
                warnings: Vec::new(),
            })
        }
        Action::DeleteCollection(wanted) => {
            let get = |name: &str| query.get(name).map(String::as_str);
            let selector = Selector::parse(target.resource, get("labelSelector"), get("fieldSelector"))?;
            let deleted = registry.delete_collection(target, &selector, &wanted, options)?;
            let items: Vec<Value> = deleted
                .iter()
                .map(|object| Registry::served(target.resource, object))
                .collect();
            let document = listing::list_document(
                target.resource,
                items,
                json!({"resourceVersion": registry.store.revision().to_string()}),
            );
            Ok(Outcome {
                code: StatusCode::OK,
                object: None,
                document,
                warnings: Vec::new(),
            })
        }
    }
}

/// `kubectl auth whoami` and `kubectl auth can-i`.
fn review(
    resource: &crate::resource::Resource,
    headers: &HeaderMap,
    body: &Bytes,
    user: &User,
) -> Result<Response<Body>, ApiError> {
    let mut review: Value = if body.is_empty() {
        json!({})
    } else {
        parse_body(media_type(headers), body)?
    };
    if !review.is_object() {
        return Err(ApiError::bad_request(format!(
            "the body must be a {} object",
            resource.kind
        )));
    }
    review["apiVersion"] = json!(resource.api_version());
    review["kind"] = json!(resource.kind);
    review["status"] = if resource.kind == "SelfSubjectReview" {
        json!({"userInfo": {"username": user.name, "groups": user.groups}})
    } else {
        json!({"allowed": true, "reason": "the holder of this machine's token may do everything"})
    };
    Ok(json_response(StatusCode::CREATED, &review))
}

fn accepted(headers: &HeaderMap) -> &str {
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
    accept.unwrap_or_default()
}

fn view(headers: &HeaderMap, query: &HashMap<String, String>) -> Result<View, ApiError> {
    let accept = accepted(headers);
    for option in accept.split(',') {
        if option.contains("as=Table") {
            let include = query.get("includeObject").cloned().unwrap_or_default();
            if !matches!(include.as_str(), "" | "None" | "Metadata" | "Object") {
                return Err(ApiError::bad_request(format!(
                    "Unable to convert to Table as requested: includeObject: Invalid value: {include:?}: must be 'Metadata', 'Object', 'None', or empty"
                )));
            }
            return Ok(View::Table(include));
        }
        if option.contains("as=PartialObjectMetadata") {
            return Ok(View::Partial);
        }
        if option.trim().starts_with("application/json") || option.trim() == "*/*" {
            return Ok(View::Object);
        }
    }
    Ok(View::Object)
}

fn shown(resource: &crate::resource::Resource, object: &Value, view: &View) -> Value {
    match view {
        View::Object => object.clone(),
        View::Partial => table::partial(object),
        View::Table(include) => {
            let revision = object
                .pointer("/metadata/resourceVersion")
                .cloned()
                .unwrap_or_default();
            table::table(resource, &[object], json!({"resourceVersion": revision}), include)
        }
    }
}

/// Reads a resource version.
pub(crate) fn parse_revision(text: &str) -> Result<u64, ApiError> {
    text.parse().map_err(|_| {
        ApiError::bad_request(format!(
            "resourceVersion: Invalid value: {text:?}: must be a number that this server gave out"
        ))
    })
}

fn decode(segment: &str) -> String {
    percent_encoding::percent_decode_str(segment)
        .decode_utf8_lossy()
        .into_owned()
}

fn response(code: StatusCode, content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = code;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn json_response(code: StatusCode, value: &Value) -> Response<Body> {
    response(code, "application/json", Body::from(value.to_string()))
}

fn text_response(text: &'static str) -> Response<Body> {
    response(StatusCode::OK, "text/plain; charset=utf-8", Body::from(text))
}

/// An error as the API tells it.
pub(crate) fn error_response(error: &ApiError) -> Response<Body> {
    json_response(error.code, &error.to_status())
}
