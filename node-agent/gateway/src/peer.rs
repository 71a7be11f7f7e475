//! Passing a request on to another machine's gateway, and its answer back, as they come.

use std::io;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::exchange::{Exchange, HOP_HEADER};

/// Longest wait for a connection: machines of one owner are near each other.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// Longest error of another gateway that is read, in bytes.
const ERROR_LIMIT: usize = 64 << 10;
/// Headers of the answer that reach the client.
const PASSED_BACK: [http::HeaderName; 3] = [header::CONTENT_TYPE, header::CACHE_CONTROL, header::RETRY_AFTER];

/// Why another machine's gateway did not take a request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ForwardRequest {
    #[error("{address:?} is not an address of a gateway; it must read http://HOST:PORT")]
    Address { address: String },
    #[error("failed to connect to {authority}")]
    Connect {
        authority: String,
        #[source]
        source: io::Error,
    },
    #[error("lost the gateway at {authority}")]
    Lost {
        authority: String,
        #[source]
        source: hyper::Error,
    },
    #[error("failed to write the request")]
    Write(#[source] http::Error),
}

impl ForwardRequest {
    /// Whether the other gateway surely did not begin the request, so that it may go elsewhere.
    pub(crate) fn is_unserved(&self) -> bool {
        !matches!(self, Self::Lost { .. })
    }
}

/// An answer of another gateway, whose head is here.
pub(crate) struct PeerAnswer {
    response: http::Response<Incoming>,
    connection: AbortOnDropHandle<()>,
}

/// Sends a request, as the client wrote it, to the gateway at `address`.
pub(crate) async fn forward(
    address: &str,
    path: &str,
    headers: &HeaderMap,
    request_id: &str,
    body: Bytes,
) -> Result<PeerAnswer, ForwardRequest> {
    let authority = authority_of(address).ok_or_else(|| ForwardRequest::Address {
        address: address.to_owned(),
    })?;
    let unconnected = |source| ForwardRequest::Connect {
        authority: authority.clone(),
        source,
    };
    let stream = timeout(CONNECT_LIMIT, TcpStream::connect(&authority))
        .await
        .map_err(|_| unconnected(io::ErrorKind::TimedOut.into()))?
        .map_err(unconnected)?;
    stream.set_nodelay(true).map_err(unconnected)?;
    let lost = |source| ForwardRequest::Lost {
        authority: authority.clone(),
        source,
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(lost)?;
    let connection = AbortOnDropHandle::new(tokio::spawn(async move {
        // Its errors also reach the body that is read from it.
        let _ = connection.await;
    }));
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(path)
        .header(header::HOST, &authority)
        .header(header::CONTENT_TYPE, "application/json")
        .header("x-request-id", request_id)
        .header(HOP_HEADER, HeaderValue::from_static("1"));
    if let Some(authorization) = headers.get(header::AUTHORIZATION) {
        request = request.header(header::AUTHORIZATION, authorization);
    }
    let request = request.body(Full::new(body)).map_err(ForwardRequest::Write)?;
    let response = sender.send_request(request).await.map_err(lost)?;
    Ok(PeerAnswer { response, connection })
}

/// `host:port` of `http://host:port` or `host:port`.
fn authority_of(address: &str) -> Option<String> {
    let uri: Uri = address.trim_end_matches('/').parse().ok()?;
    if uri.scheme_str().is_some_and(|scheme| scheme != "http") {
        return None;
    }
    let authority = uri.authority()?;
    let port = authority.port_u16().unwrap_or(if uri.scheme().is_some() {
        80
    } else {
        freehold_crds::DEFAULT_GATEWAY_PORT
    });
    Some(format!("{}:{port}", authority.host()))
}

impl PeerAnswer {
    pub(crate) fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// What the other gateway says of an error.
    pub(crate) async fn error_message(self) -> Option<String> {
        let body = Limited::new(self.response.into_body(), ERROR_LIMIT).collect();
        let body = timeout(CONNECT_LIMIT, body).await.ok()?.ok()?.to_bytes();
        let error: serde_json::Value = serde_json::from_slice(&body).ok()?;
        error
            .get("error")?
            .get("message")?
            .as_str()
            .map(ToOwned::to_owned)
    }

    /// The answer as this gateway's own. The exchange ends with its last byte.
    pub(crate) fn into_response(self, exchange: Exchange) -> Response {
        let (head, body) = self.response.into_parts();
        let code = head.status.as_u16();
        let passing = Some((body, exchange, self.connection));
        let bytes = stream::unfold(passing, move |passing| async move {
            let (mut body, mut exchange, connection) = passing?;
            loop {
                return match body.frame().await {
                    Some(Ok(frame)) => {
                        let Ok(data) = frame.into_data() else {
                            continue;
                        };
                        if code == 200 {
                            exchange.piece();
                        }
                        Some((Ok(data), Some((body, exchange, connection))))
                    }
                    Some(Err(error)) => {
                        exchange.end(StatusCode::BAD_GATEWAY.as_u16());
                        Some((Err(error), None))
                    }
                    None => {
                        exchange.end(code);
                        None
                    }
                };
            }
        });
        let mut response = Response::new(Body::from_stream(bytes));
        *response.status_mut() = head.status;
        for name in PASSED_BACK {
            if let Some(value) = head.headers.get(&name) {
                response.headers_mut().insert(name, value.clone());
            }
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_gateways_are_read() {
        for (address, expected) in [
            ("http://10.0.0.3:11480", Some("10.0.0.3:11480")),
            ("http://10.0.0.3:11480/", Some("10.0.0.3:11480")),
            ("http://[fd00::1]:80", Some("[fd00::1]:80")),
            ("pi-3:11480", Some("pi-3:11480")),
            ("pi-3", Some("pi-3:11480")),
            ("https://pi-3:1", None),
            ("", None),
        ] {
            assert_eq!(authority_of(address).as_deref(), expected, "{address}");
        }
    }
}
