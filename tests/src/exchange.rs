//! One request to an API server and its answer, the same for a real one and for the embedded one.

use std::time::Duration;

use anyhow::{Context, Result};
use kube::Client;
use kube::client::Body;
use serde_json::Value;

/// An answer that takes longer is none.
const PATIENCE: Duration = Duration::from_secs(60);

/// A request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Method of HTTP.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Content type of the body.
    pub content_type: Option<String>,
    /// What the client wants to read.
    pub accept: Option<String>,
    /// The body as it is sent.
    pub body: String,
}

impl Request {
    /// A request without a body.
    #[must_use]
    pub fn new(method: &str, path: impl Into<String>) -> Self {
        Self {
            method: method.to_owned(),
            path: path.into(),
            content_type: None,
            accept: None,
            body: String::new(),
        }
    }

    /// The same with a JSON body.
    #[must_use]
    pub fn with_body(mut self, content_type: &str, body: &Value) -> Self {
        self.content_type = Some(content_type.to_owned());
        self.body = body.to_string();
        self
    }
}

/// What came back.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Status code of HTTP.
    pub code: u16,
    /// Texts of the `Warning` headers.
    pub warnings: Vec<String>,
    /// The body; of a watch, the list of its events; text that is not JSON as a string.
    pub body: Value,
}

/// Sends a request and reads the whole answer.
///
/// # Errors
/// When there is no answer. A refusal is an answer.
pub async fn send(client: &Client, request: &Request) -> Result<Answer> {
    let mut builder = http::Request::builder()
        .method(request.method.as_str())
        .uri(&request.path)
        .header(http::header::USER_AGENT, "conformance/1");
    if let Some(content_type) = &request.content_type {
        builder = builder.header(http::header::CONTENT_TYPE, content_type);
    }
    let accept = request.accept.as_deref().unwrap_or("application/json");
    let sent = builder
        .header(http::header::ACCEPT, accept)
        .body(Body::from(request.body.clone().into_bytes()))
        .with_context(|| format!("{} {} is no request", request.method, request.path))?;
    let exchange = async {
        let response = client.send(sent).await?;
        let (parts, body) = response.into_parts();
        let bytes = body.collect_bytes().await?;
        Ok::<_, kube::Error>((parts, bytes))
    };
    let (parts, bytes) = tokio::time::timeout(PATIENCE, exchange)
        .await
        .with_context(|| {
            format!(
                "no answer to {} {} within {PATIENCE:?}",
                request.method, request.path
            )
        })?
        .with_context(|| format!("failed to send {} {}", request.method, request.path))?;
    let warnings = parts.headers.get_all(http::header::WARNING).iter();
    let warnings = warnings.filter_map(|value| value.to_str().ok());
    Ok(Answer {
        code: parts.status.as_u16(),
        warnings: warnings.map(str::to_owned).collect(),
        body: read(&String::from_utf8_lossy(&bytes), request.path.contains("watch=")),
    })
}

fn read(text: &str, events: bool) -> Value {
    let lines = || {
        let lines = text.lines().map(serde_json::from_str);
        lines.collect::<Result<Vec<Value>, _>>().map(Value::Array)
    };
    let refused = |value: &Value| value.get("kind").is_some_and(|kind| kind == "Status");
    match serde_json::from_str::<Value>(text) {
        Ok(value) if !events || refused(&value) => value,
        _ if events => lines().unwrap_or_else(|_| Value::String(text.to_owned())),
        _ => Value::String(text.to_owned()),
    }
}
