//! A gateway on a port of its own, with one worker and one name, and a client that shows every byte.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use freehold_crds::governance_policy::{AccessRules, ApiKey, AuditRules, LimitRules, PolicyRules};
use freehold_crds::inference_node::{Backend, CompiledPolicy, Route};
use freehold_gateway::{Activator, BusState, Gateway, GatewayOptions, NoActivation, WorkerEndpoint};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::worker::FakeWorker;

/// Name of the machine.
pub const NODE: &str = "here";
/// The one assignment; its revision is `r1`.
pub const ASSIGNMENT: &str = "team.chat.r1";
/// Longest wait for anything that should happen at once.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until something holds, and says what was last seen if it does not.
pub async fn eventually<T: std::fmt::Debug>(mut look: impl FnMut() -> T, holds: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = look();
        if holds(&seen) {
            return seen;
        }
        assert!(Instant::now() < deadline, "last seen: {seen:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

pub struct Bus {
    pub gateway: Gateway,
    pub address: SocketAddr,
    pub folder: TempDir,
    pub shutdown: CancellationToken,
    pub server: AbortOnDropHandle<()>,
}

impl Bus {
    /// A gateway that was told nothing yet.
    pub async fn bare(set: impl FnOnce(&mut GatewayOptions), activator: Arc<dyn Activator>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut options = GatewayOptions::new(NODE, folder.path().join("audit"));
        set(&mut options);
        let gateway = Gateway::open(options, activator).expect("a gateway");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let shutdown = CancellationToken::new();
        let server = tokio::spawn({
            let (gateway, shutdown) = (gateway.clone(), shutdown.clone());
            async move { gateway.serve(listener, shutdown).await.expect("serves") }
        });
        Self {
            gateway,
            address,
            folder,
            shutdown,
            server: AbortOnDropHandle::new(server),
        }
    }

    /// A gateway whose name `chat` is answered by one worker, under these policies.
    pub async fn with_policies(policies: Vec<CompiledPolicy>) -> (Self, FakeWorker) {
        Self::with(|_| {}, policies).await
    }

    pub async fn with(
        set: impl FnOnce(&mut GatewayOptions),
        policies: Vec<CompiledPolicy>,
    ) -> (Self, FakeWorker) {
        let bus = Self::bare(set, Arc::new(NoActivation)).await;
        let worker = bus.worker("chat");
        let mut state = state(&worker);
        state.policies = policies;
        bus.gateway.apply(state);
        (bus, worker)
    }

    /// A gateway whose name `chat` is answered by one worker.
    pub async fn start() -> (Self, FakeWorker) {
        Self::with_policies(Vec::new()).await
    }

    /// A worker that the gateway does not know yet.
    pub fn worker(&self, name: &str) -> FakeWorker {
        FakeWorker::start(self.socket(name))
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.sock"))
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_as(None, path, body).await
    }

    pub async fn post_as(&self, key: Option<&str>, path: &str, body: &Value) -> Answer {
        let body = serde_json::to_vec(body).expect("JSON");
        let bearer = key.map(|key| format!("Bearer {key}"));
        self.call(Method::POST, path, &headers(bearer.as_deref()), body)
            .await
            .whole()
            .await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.get_as(None, path).await
    }

    pub async fn get_as(&self, key: Option<&str>, path: &str) -> Answer {
        let bearer = key.map(|key| format!("Bearer {key}"));
        self.call(Method::GET, path, &headers(bearer.as_deref()), Vec::new())
            .await
            .whole()
            .await
    }

    /// Sends a request on a connection of its own and returns when the head of the answer is here.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Call {
        let stream = TcpStream::connect(self.address).await.expect("a connection");
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .expect("a connection");
        let connection = AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = connection.await;
        }));
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.address.to_string());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).expect("a request");
        let response = tokio::time::timeout(PATIENCE, sender.send_request(request))
            .await
            .expect("an answer in time")
            .expect("an answer");
        let (head, body) = response.into_parts();
        Call {
            status: head.status,
            headers: head.headers,
            body,
            buffered: Vec::new(),
            _connection: connection,
        }
    }

    /// Begins a stream and returns when its head is here.
    pub async fn stream(&self, path: &str, body: &Value) -> Call {
        let body = serde_json::to_vec(body).expect("JSON");
        self.call(Method::POST, path, &headers(None), body).await
    }

    /// Stops the server and waits until it has.
    pub async fn stop(self) -> TempDir {
        self.shutdown.cancel();
        tokio::time::timeout(PATIENCE * 2, self.server)
            .await
            .expect("stops in time")
            .expect("stops");
        self.folder
    }

    /// Lines of the audit log so far.
    pub async fn audit(&self) -> Vec<Value> {
        self.gateway.flush_audit().await;
        read_audit(&self.folder.path().join("audit"))
    }
}

pub fn read_audit(dir: &std::path::Path) -> Vec<Value> {
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .expect("the folder")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
        .iter()
        .flat_map(|path| {
            let text = std::fs::read_to_string(path).expect("a file");
            text.lines()
                .map(|line| serde_json::from_str(line).expect("a line of JSON"))
                .collect::<Vec<Value>>()
        })
        .collect()
}

fn headers(authorization: Option<&str>) -> Vec<(&'static str, &str)> {
    let mut headers = vec![("content-type", "application/json")];
    headers.extend(authorization.map(|value| ("authorization", value)));
    headers
}

/// An answer whose head is here. Dropping it closes the connection.
pub struct Call {
    pub status: StatusCode,
    pub headers: HeaderMap,
    body: Incoming,
    buffered: Vec<u8>,
    _connection: AbortOnDropHandle<()>,
}

impl Call {
    pub async fn whole(self) -> Answer {
        let body = tokio::time::timeout(PATIENCE, self.body.collect())
            .await
            .expect("a body in time")
            .expect("a body")
            .to_bytes();
        Answer {
            status: self.status,
            headers: self.headers,
            body,
        }
    }

    /// The next `data` of a stream of events; `None` at its end.
    pub async fn event(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffered.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.buffered.drain(..end + 2).collect();
                let event = String::from_utf8(event).expect("UTF-8");
                let data = event.trim_end().strip_prefix("data: ").expect("a data field");
                return Some(data.to_owned());
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame())
                .await
                .expect("an event in time")?;
            let frame = frame.expect("the stream goes on");
            self.buffered.extend_from_slice(frame.data_ref().expect("data"));
        }
    }

    /// All that is left of a stream: its chunks, and whether `[DONE]` came last.
    pub async fn events(mut self) -> (Vec<Value>, bool) {
        let mut chunks = Vec::new();
        let mut done = false;
        while let Some(data) = self.event().await {
            assert!(!done, "{data} after [DONE]");
            if data == "[DONE]" {
                done = true;
            } else {
                chunks.push(serde_json::from_str(&data).expect("JSON"));
            }
        }
        (chunks, done)
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("text"))
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("UTF-8")
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .map_err(|_| self.text().to_owned())
            .expect("JSON")
    }

    #[track_caller]
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text());
        self.json()
    }

    /// The error in OpenAI's shape: exactly its four fields.
    #[track_caller]
    pub fn error(&self, status: u16) -> Error {
        assert_eq!(self.status.as_u16(), status, "{}", self.text());
        let body = self.json();
        let error = body.get("error").and_then(Value::as_object).expect("an error");
        assert_eq!(
            error.keys().collect::<Vec<_>>(),
            ["message", "type", "param", "code"]
        );
        let text = |name: &str| error[name].as_str().map(ToOwned::to_owned);
        Error {
            message: text("message").expect("a message"),
            kind: text("type").expect("a type"),
            param: text("param"),
            code: text("code"),
        }
    }
}

#[derive(Debug)]
pub struct Error {
    pub message: String,
    pub kind: String,
    pub param: Option<String>,
    pub code: Option<String>,
}

/// A bus on which `chat` (deployment `team/chat`) is answered by `worker`.
pub fn state(worker: &FakeWorker) -> BusState {
    BusState {
        routes: vec![route("chat", vec![backend(NODE, ASSIGNMENT, None)])],
        policies: Vec::new(),
        workers: BTreeMap::from([(ASSIGNMENT.to_owned(), ready(worker))]),
        coming_back: false,
    }
}

pub fn route(name: &str, backends: Vec<Backend>) -> Route {
    Route {
        name: name.to_owned(),
        namespace: "team".to_owned(),
        deployment: "chat".to_owned(),
        created: 1_700_000_000,
        backends,
        refusal: None,
    }
}

pub fn backend(node: &str, assignment: &str, address: Option<String>) -> Backend {
    Backend {
        node: node.to_owned(),
        assignment: assignment.to_owned(),
        address,
    }
}

pub fn ready(worker: &FakeWorker) -> WorkerEndpoint {
    WorkerEndpoint {
        socket: worker.socket.clone(),
        ready: true,
        context_length: 2048,
        ..WorkerEndpoint::default()
    }
}

pub fn policy(name: &str, rules: PolicyRules) -> CompiledPolicy {
    CompiledPolicy {
        name: name.to_owned(),
        deployments: vec!["team/chat".to_owned()],
        rules,
        ..CompiledPolicy::default()
    }
}

pub fn limits(limits: LimitRules) -> CompiledPolicy {
    policy(
        "limits",
        PolicyRules {
            limits: Some(limits),
            ..PolicyRules::default()
        },
    )
}

pub fn access(keys: &[(&str, &str, &[&str])]) -> CompiledPolicy {
    let keys = keys
        .iter()
        .map(|(name, secret, models)| ApiKey {
            name: (*name).to_owned(),
            sha256: hex::encode(Sha256::digest(secret)),
            models: models.iter().map(|model| (*model).to_owned()).collect(),
        })
        .collect();
    policy(
        "access",
        PolicyRules {
            access: Some(AccessRules {
                require_key: true,
                keys,
            }),
            ..PolicyRules::default()
        },
    )
}

pub fn audit(rules: AuditRules) -> CompiledPolicy {
    policy(
        "audit",
        PolicyRules {
            audit: Some(rules),
            ..PolicyRules::default()
        },
    )
}
