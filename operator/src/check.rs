//! `freehold-operator check URL…`: whether what should answer does. `helm test` runs it in the operator's own image, which
//! has neither a shell nor curl.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::header::HOST;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::Instant;

/// One question takes no longer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two questions to what does not answer well.
const PAUSE: Duration = Duration::from_secs(1);
/// Of an answer, no more is read, for it is only shown.
const LONGEST_ANSWER: usize = 1024;

/// An address to ask, such as `http://10.43.0.7:8080/readyz`. An IPv6 address may stand without brackets, as in
/// Kubernetes's own variables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    host: String,
    port: u16,
    path: String,
}

/// A text that is no such address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found:?} is no address; write http://HOST:PORT/PATH")]
pub struct ParseAddress {
    found: String,
}

impl FromStr for Address {
    type Err = ParseAddress;

    fn from_str(text: &str) -> Result<Self, ParseAddress> {
        let parsed = || {
            let rest = text.strip_prefix("http://")?;
            let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
            let (host, port) = authority.rsplit_once(':')?;
            let host = host.trim_start_matches('[').trim_end_matches(']');
            let good = |letter: char| letter.is_ascii_alphanumeric() || ".-:".contains(letter);
            let path = format!("/{path}");
            if host.is_empty() || !host.chars().all(good) || path.parse::<hyper::Uri>().is_err() {
                return None;
            }
            Some(Self {
                host: host.to_owned(),
                port: port.parse().ok()?,
                path,
            })
        };
        parsed().ok_or_else(|| ParseAddress {
            found: text.to_owned(),
        })
    }
}

impl Address {
    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.authority(), self.path)
    }
}

/// Why an address did not answer well.
#[derive(Debug, thiserror::Error)]
pub enum Ask {
    /// Nobody listens there, or nobody is there.
    #[error("failed to connect")]
    Connect(#[source] std::io::Error),
    /// Somebody is there and does not speak HTTP.
    #[error("failed to read an answer")]
    Answer(#[source] hyper::Error),
    /// It says that it is not well.
    #[error("it answers {status}: {said}")]
    Unwell {
        /// The answer's status.
        status: hyper::StatusCode,
        /// The beginning of the answer.
        said: String,
    },
    /// It does not say anything.
    #[error("no answer within {} s", PATIENCE.as_secs())]
    Silent,
}

/// Asks until the answer is a success, or `within` is over: then the last failure.
///
/// # Errors
/// When it did not answer well in time.
pub async fn check(address: &Address, within: Duration) -> Result<(), Ask> {
    let deadline = Instant::now() + within;
    loop {
        let failure = match tokio::time::timeout(PATIENCE, ask(address)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(failure)) => failure,
            Err(_) => Ask::Silent,
        };
        if Instant::now() + PAUSE > deadline {
            return Err(failure);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn ask(address: &Address) -> Result<(), Ask> {
    let stream = TcpStream::connect((address.host.as_str(), address.port))
        .await
        .map_err(Ask::Connect)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(Ask::Answer)?;
    // Ends with the sender; what it says of its end, the sender has said.
    let connection = tokio::spawn(connection);
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = address.path.parse().unwrap_or_default();
    if let Ok(host) = address.authority().parse() {
        request.headers_mut().insert(HOST, host);
    }
    let answer = sender.send_request(request).await.map_err(Ask::Answer)?;
    let status = answer.status();
    if status.is_success() {
        connection.abort();
        return Ok(());
    }
    let body = Limited::new(answer.into_body(), LONGEST_ANSWER).collect().await;
    let said = body.map_or_else(|_| Bytes::new(), |body| body.to_bytes());
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    connection.abort();
    Err(Ask::Unwell { status, said })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_kubernetes_writes_them() {
        for (text, shown) in [
            ("http://10.43.0.7:8080/readyz", "http://10.43.0.7:8080/readyz"),
            ("http://fd00::7:8080/readyz", "http://[fd00::7]:8080/readyz"),
            ("http://[fd00::7]:8080/a?b=c", "http://[fd00::7]:8080/a?b=c"),
            (
                "http://freehold-gateway.models.svc:11480",
                "http://freehold-gateway.models.svc:11480/",
            ),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
        }
        for text in [
            "http://$(FREEHOLD_OPERATOR_SERVICE_HOST):8080/readyz",
            "https://10.43.0.7:8080/",
            "http://10.43.0.7/readyz",
            "http://:8080/",
            "http://a:99999/",
            "10.43.0.7:8080",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
