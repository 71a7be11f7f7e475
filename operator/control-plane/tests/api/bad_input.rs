//! What no client should send. Each gets an answer that says what is wrong, and the next request is served.

use std::convert::Infallible;
use std::time::Instant;

use bytes::Bytes;
use freehold_control_plane::ControlPlane;
use futures::StreamExt;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use proptest::prelude::*;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::support::{in_memory, widget_yaml};

const WIDGETS: &str = "/apis/test.example.com/v1/namespaces/default/widgets";

async fn send(
    control_plane: &ControlPlane,
    method: Method,
    path: &str,
    content_type: &str,
    body: impl Into<Bytes>,
) -> (StatusCode, Value) {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", content_type);
    let request = request.body(Full::new(body.into())).unwrap();
    let response = control_plane.service().oneshot(request).await.unwrap();
    let code = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (code, serde_json::from_slice(&body).unwrap_or_default())
}

/// Sends, and expects a Status with this code and this in its message.
async fn refused(
    control_plane: &ControlPlane,
    (method, path, content_type): (Method, &str, &str),
    body: impl Into<Bytes>,
    code: u16,
    expected: &str,
) {
    let what = format!("{method} {path} {content_type}");
    let (found, status) = send(control_plane, method, path, content_type, body).await;
    assert_eq!(found.as_u16(), code, "{what}: {status}");
    assert_eq!(
        (&status["kind"], &status["status"], &status["code"]),
        (&json!("Status"), &json!("Failure"), &json!(code))
    );
    let message = status["message"].as_str().unwrap();
    assert!(
        message.contains(expected),
        "{what}: no {expected:?} in {message:?}"
    );
}

#[tokio::test]
async fn bodies_that_are_not_what_they_should_be() {
    let api = in_memory();
    let post = (Method::POST, WIDGETS, "application/json");
    let widget = |change: Value| {
        let mut object: Value = serde_json::from_str(&widget_yaml("w", &json!({"color": "red"}))).unwrap();
        json_patch::merge(&mut object, &change);
        object.to_string()
    };
    refused(&api, post.clone(), "", 400, "the body is not valid JSON").await;
    refused(
        &api,
        post.clone(),
        "{\"kind\":",
        400,
        "the body is not valid JSON",
    )
    .await;
    refused(
        &api,
        post.clone(),
        &b"\xff\xfe\x00"[..],
        400,
        "the body is not valid JSON",
    )
    .await;
    refused(
        &api,
        post.clone(),
        "[1, 2]",
        400,
        "the body must be a Widget object",
    )
    .await;
    refused(&api, post.clone(), "[".repeat(100_000), 400, "recursion limit").await;
    refused(
        &api,
        post.clone(),
        widget(json!({"kind": "Gadget"})),
        422,
        "kind: Invalid value: \"Gadget\": must be Widget",
    )
    .await;
    refused(
        &api,
        post.clone(),
        widget(json!({"apiVersion": "v2"})),
        400,
        "does not match the expected API version",
    )
    .await;
    refused(
        &api,
        post.clone(),
        widget(json!({"metadata": 5})),
        400,
        "metadata must be an object",
    )
    .await;
    refused(
        &api,
        post.clone(),
        widget(json!({"metadata": {"labels": ["a"]}})),
        400,
        "metadata cannot be handled",
    )
    .await;
    refused(
        &api,
        post.clone(),
        widget(json!({"metadata": {"namespace": "other"}})),
        400,
        "does not match the namespace",
    )
    .await;
    refused(
        &api,
        post.clone(),
        widget(json!({"metadata": {"labels": {"a": "b c"}}})),
        422,
        "metadata.labels: Invalid value",
    )
    .await;
    refused(
        &api,
        post.clone(),
        widget(json!({"spec": [1]})),
        422,
        "spec in body must be of type object",
    )
    .await;
    refused(
        &api,
        post.clone(),
        widget(json!({"spec": null})),
        422,
        "spec: Required value",
    )
    .await;
    let huge = json!({"spec": {"size": 1e300}});
    refused(
        &api,
        post.clone(),
        widget(huge),
        422,
        "should be less than or equal to 100",
    )
    .await;
    refused(
        &api,
        post,
        vec![b' '; (3 << 20) + 1],
        413,
        "larger than the limit of 3145728 bytes",
    )
    .await;
    refused(
        &api,
        (Method::POST, WIDGETS, "text/html"),
        "<p>",
        415,
        "application/json",
    )
    .await;
    let protobuf = (
        Method::POST,
        "/api/v1/namespaces/default/configmaps",
        "application/vnd.kubernetes.protobuf",
    );
    refused(&api, protobuf.clone(), &b"k8s\0\x0a\xff"[..], 400, "protobuf").await;
    refused(&api, protobuf, "{}", 400, "not a Kubernetes protobuf object").await;
    let maps = (
        Method::POST,
        "/api/v1/namespaces/default/configmaps",
        "application/json",
    );
    refused(
        &api,
        maps,
        r#"{"metadata":{"name":"c"},"data":{"n":1}}"#,
        400,
        "cannot be handled as a ConfigMap",
    )
    .await;
    let (code, _) = send(&api, Method::POST, WIDGETS, "application/json", widget(json!({}))).await;
    assert_eq!(
        code,
        StatusCode::CREATED,
        "all that left the next request unharmed"
    );
}

#[tokio::test]
async fn patches_that_are_not_patches() {
    let api = in_memory();
    let path = format!("{WIDGETS}/w");
    let managed = format!("{path}?fieldManager=me");
    let patch = |kind: &'static str| {
        let applies = kind == "application/apply-patch+yaml";
        (
            Method::PATCH,
            if applies { managed.as_str() } else { path.as_str() },
            kind,
        )
    };
    let (json, merge, apply) = (
        "application/json-patch+json",
        "application/merge-patch+json",
        "application/apply-patch+yaml",
    );
    refused(
        &api,
        patch(merge),
        "{}",
        404,
        r#"widgets.test.example.com "w" not found"#,
    )
    .await;
    send(
        &api,
        Method::POST,
        WIDGETS,
        "application/json",
        widget_yaml("w", &json!({"color": "red"})),
    )
    .await;
    refused(&api, patch(json), "{}", 400, "error decoding patch").await;
    refused(
        &api,
        patch(json),
        r#"[{"op":"fly","path":"/spec"}]"#,
        422,
        "the server rejected our request",
    )
    .await;
    refused(
        &api,
        patch(json),
        r#"[{"op":"remove","path":"/spec/nothing"}]"#,
        422,
        "the server rejected our request",
    )
    .await;
    refused(
        &api,
        patch(json),
        r#"[{"op":"remove","path":"/metadata"}]"#,
        400,
        "",
    )
    .await;
    refused(&api, patch(merge), "[]", 400, "the body must be a Widget object").await;
    refused(&api, patch(merge), r#"{"metadata":{"name":"other"}}"#, 400, "").await;
    let unmanaged = (Method::PATCH, path.as_str(), apply);
    refused(&api, unmanaged, "{}", 422, "is required for apply patch").await;
    refused(&api, patch(apply), "a: [", 400, "the body is not valid YAML").await;
    refused(
        &api,
        patch(apply),
        "just text",
        400,
        "the body must be a Widget object",
    )
    .await;
    refused(
        &api,
        patch(apply),
        r#"{"metadata":{"managedFields":[{}]}}"#,
        400,
        "metadata.managedFields must be nil",
    )
    .await;
    refused(
        &api,
        patch("application/x-unknown"),
        "{}",
        415,
        "application/merge-patch+json",
    )
    .await;
    let bomb = (0..30).fold("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned(), |text, n| {
        let all = vec![format!("*a{n}"); 10].join(",");
        format!("{text}a{}: &a{} [{all}]\n", n + 1, n + 1)
    });
    let begin = Instant::now();
    refused(&api, patch(apply), bomb, 400, "the body is not valid YAML").await;
    assert!(
        begin.elapsed().as_secs() < 5,
        "a bomb of aliases took {:?}",
        begin.elapsed()
    );
}

#[tokio::test]
async fn paths_and_parameters_that_nobody_serves() {
    let api = in_memory();
    let get = |path: String| (Method::GET, path, "application/json");
    for (path, code, expected) in [
        (
            "/nowhere".to_owned(),
            404,
            "could not find the requested resource",
        ),
        ("/apis/other.example.com/v1".to_owned(), 404, "could not find"),
        (format!("{WIDGETS}/w/scale"), 404, "\"w\" not found"),
        (format!("{WIDGETS}/w/status/more"), 404, "could not find"),
        ("/apis/test.example.com/v1/widgets/w".to_owned(), 404, ""),
        (
            format!("{WIDGETS}?labelSelector=a%20in%20b"),
            400,
            "unable to parse requirement",
        ),
        (
            format!("{WIDGETS}?fieldSelector=nonsense"),
            400,
            "can't understand",
        ),
        (
            format!("{WIDGETS}?fieldSelector=spec.size%3D1"),
            400,
            "field label not supported: spec.size",
        ),
        (format!("{WIDGETS}?limit=many"), 400, "limit"),
        (format!("{WIDGETS}?limit=99999999999999999999999"), 400, "limit"),
        (
            format!("{WIDGETS}?watch=true&resourceVersion=x"),
            400,
            "resourceVersion",
        ),
        (
            format!("{WIDGETS}?continue=%FF%FE"),
            400,
            "continue key is not valid",
        ),
        (format!("{WIDGETS}/%00%ff"), 404, "not found"),
    ] {
        let (method, path, kind) = get(path);
        refused(&api, (method, &path, kind), "", code, expected).await;
    }
    let body = || widget_yaml("w", &json!({"color": "red"}));
    for query in [
        "dryRun=Some",
        "fieldValidation=Maybe",
        &format!("fieldManager={}", "m".repeat(129)),
    ] {
        let path = format!("{WIDGETS}?{query}");
        refused(
            &api,
            (Method::POST, &path, "application/json"),
            body(),
            422,
            "CreateOptions",
        )
        .await;
    }
    let wrong = refused(
        &api,
        (Method::PUT, WIDGETS, "application/json"),
        body(),
        400,
        "name must be provided",
    );
    wrong.await;
    refused(
        &api,
        (Method::POST, "/version", "application/json"),
        "{}",
        405,
        "does not allow this method",
    )
    .await;
    let crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    refused(
        &api,
        (Method::POST, crds, "application/json"),
        "{}",
        405,
        "does not allow this method",
    )
    .await;
    let status = (
        Method::DELETE,
        &*format!("{WIDGETS}/w/status"),
        "application/json",
    );
    refused(&api, status, "", 405, "delete is not supported").await;
}

/// Time stands still but for the waiting.
#[tokio::test(start_paused = true)]
async fn a_body_that_never_ends_is_given_up() {
    let api = in_memory();
    let begun = futures::stream::iter([Ok::<_, Infallible>(http_body::Frame::data(Bytes::from_static(
        b"{",
    )))]);
    let body = StreamBody::new(begun.chain(futures::stream::pending()));
    let request = Request::builder()
        .method(Method::POST)
        .uri(WIDGETS)
        .body(body)
        .unwrap();
    let response = api.service().oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::REQUEST_TIMEOUT);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever is sent wherever, the server answers and takes no blame.
    #[test]
    fn nothing_that_is_sent_breaks_the_server(
        method in prop::sample::select(vec![Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE]),
        path in "(/(api|apis|v1|test.example.com|namespaces|default|widgets|configmaps|events|w|status|[a-z%/.]{0,8})){0,8}",
        query in "((fieldSelector|labelSelector|limit|continue|dryRun|force|fieldManager)=[a-z0-9,!()=%]{0,12}&?){0,3}",
        content_type in prop::sample::select(vec![
            "application/json", "application/yaml", "application/merge-patch+json", "application/json-patch+json",
            "application/apply-patch+yaml", "application/strategic-merge-patch+json", "application/vnd.kubernetes.protobuf",
        ]),
        body in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..64),
            "[{\\[\"a-z0-9:,\\]} ]{0,64}".prop_map(String::into_bytes),
            any_json().prop_map(|value| value.to_string().into_bytes()),
        ],
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let api = in_memory();
            send(&api, Method::POST, WIDGETS, "application/json", widget_yaml("w", &json!({"color": "red"}))).await;
            let target = format!("{path}?{query}");
            if target.parse::<http::Uri>().is_err() || !target.starts_with('/') {
                return;
            }
            let (code, status) = send(&api, method.clone(), &target, content_type, body.clone()).await;
            assert!(!blames_itself(code, &status), "{method} {target}: {status}");
            for path in ["", "/status"] {
                let (code, status) = send(&api, Method::PATCH, &format!("{WIDGETS}/w{path}?fieldManager=m"), content_type, body.clone()).await;
                assert!(!blames_itself(code, &status), "{content_type}: {status}");
            }
        });
    }
}

/// An error of the server's own. An applied object that does not fit its schema is called one by the API
/// server too, so it is here.
fn blames_itself(code: StatusCode, status: &Value) -> bool {
    let message = status["message"].as_str().unwrap_or_default();
    code.is_server_error() && !message.starts_with("failed to create typed patch object")
}

/// Objects that are nearly Widgets.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z{}.:]{0,6}".prop_map(Value::from),
    ];
    let key = prop::sample::select(vec![
        "metadata",
        "spec",
        "status",
        "labels",
        "finalizers",
        "managedFields",
        "name",
        "color",
        "size",
        "parts",
        "tags",
        "conditions",
        "type",
        "f:spec",
        "$patch",
        "data",
        "ownerReferences",
        "uid",
    ]);
    leaf.prop_recursive(5, 24, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key.clone().prop_map(str::to_owned), inner, 0..5)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}
