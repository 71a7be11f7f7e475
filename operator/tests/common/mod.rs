//! A world for the operator: the embedded control plane, scripted agents, and a line to the API that
//! counts writes and can be cut.
//!
//! Time is tokio's paused clock: it stands still while anything works and leaps to the next timer when
//! nothing does, so an hour of heartbeats takes a moment and no test waits for a real second.
#![allow(dead_code, reason = "each test file uses its part")]

use std::convert::Infallible;
use std::fmt::Debug;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use freehold_control_plane::{ApiService, ControlPlane, Options};
use freehold_crds::inference_node::{Assignment, Instance, Inventory, Phase};
use freehold_crds::model_deployment::ModelFacts;
use freehold_crds::{
    GovernancePolicy, InferenceNode, InferenceNodeStatus, ModelDeployment, SYSTEM_NAMESPACE,
};
use freehold_operator::{LeaderElection, Operator, OperatorConfig};
use futures::future::BoxFuture;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::events::v1::Event;
use kube::api::{ListParams, Patch, PatchParams};
use kube::client::Body;
use kube::runtime::wait::{Condition, await_condition};
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// Longest wait for anything, in the tests' time.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// Memory of a scripted machine.
pub const MACHINE_BYTES: u64 = 4 << 30;

/// The API and who uses it.
pub struct World {
    pub control_plane: ControlPlane,
    /// A person's client.
    pub client: Client,
    ended: CancellationToken,
}

impl Drop for World {
    fn drop(&mut self) {
        self.ended.cancel();
        self.control_plane.shutdown();
    }
}

impl World {
    pub fn new() -> Self {
        Self::with_crds(freehold_crds::all())
    }

    pub fn with_crds(
        crds: Vec<
            k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
        >,
    ) -> Self {
        let control_plane = ControlPlane::open(Options { data_dir: None, crds }).unwrap();
        Self {
            client: control_plane.client(),
            control_plane,
            ended: CancellationToken::new(),
        }
    }

    /// A line to the API of its own.
    pub fn line(&self) -> Line {
        Line {
            api: self.control_plane.service(),
            writes: Arc::default(),
            cut: Arc::default(),
            refusing: Arc::default(),
        }
    }

    /// Starts an operator on a line of its own.
    pub async fn operator(&self) -> Running {
        self.operator_as("operator", None).await
    }

    /// Starts an operator that competes for the lead.
    pub async fn candidate(&self, identity: &str) -> Running {
        self.operator_as(identity, Some(LeaderElection::default())).await
    }

    async fn operator_as(&self, identity: &str, leader_election: Option<LeaderElection>) -> Running {
        let line = self.line();
        let shutdown = self.ended.child_token();
        let config = OperatorConfig {
            leader_election,
            metrics_listen: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
            identity: identity.to_owned(),
            forget_after: freehold_operator::FORGET_AFTER,
        };
        let operator = Operator::start(config, line.client(), shutdown.clone())
            .await
            .unwrap();
        Running {
            operator,
            line,
            shutdown,
        }
    }

    /// Starts a scripted agent.
    pub fn agent(&self, name: &str) -> Agent {
        Agent::start(self, name)
    }

    pub fn deployments(&self) -> Api<ModelDeployment> {
        Api::namespaced(self.client.clone(), "default")
    }

    pub fn policies(&self) -> Api<GovernancePolicy> {
        Api::all(self.client.clone())
    }

    pub fn nodes(&self) -> Api<InferenceNode> {
        Api::all(self.client.clone())
    }

    pub fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), SYSTEM_NAMESPACE)
    }

    /// Applies an object as a person would.
    pub async fn apply<K>(&self, api: &Api<K>, object: &Value) -> K
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize,
    {
        let mut object = object.clone();
        object["apiVersion"] = json!(K::api_version(&()));
        object["kind"] = json!(K::kind(&()));
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let person = PatchParams::apply("person");
        api.patch(&name, &person, &Patch::Apply(&object)).await.unwrap()
    }

    /// Applies a deployment of a file of 100 MiB.
    pub async fn deploy(&self, name: &str) -> ModelDeployment {
        self.apply(&self.deployments(), &deployment(name)).await
    }

    /// Events about an object, as (reason, note, times told), oldest first.
    pub async fn events(&self, name: &str) -> Vec<(String, String, i32)> {
        let api: Api<Event> = Api::namespaced(self.client.clone(), "default");
        let mut events = api.list(&ListParams::default()).await.unwrap().items;
        events.sort_by_key(|event| event.event_time.clone());
        let about =
            |event: &Event| event.regarding.as_ref().and_then(|r| r.name.clone()).as_deref() == Some(name);
        let events = events.into_iter().filter(about);
        events
            .map(|e| {
                let times = e.series.map_or(1, |series| series.count);
                (e.reason.unwrap_or_default(), e.note.unwrap_or_default(), times)
            })
            .collect()
    }

    /// Waits until an object is as it should be; tells what it was like when it never is.
    pub async fn until<K>(&self, api: &Api<K>, name: &str, what: &str, holds: impl Fn(&K) -> bool) -> K
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    {
        let condition = |object: Option<&K>| object.is_some_and(&holds);
        match tokio::time::timeout(PATIENCE, await_condition(api.clone(), name, condition)).await {
            Ok(found) => found.unwrap().unwrap(),
            Err(_) => panic!("{name} never {what}; last seen: {:#?}", api.get_opt(name).await),
        }
    }

    pub async fn until_ready(&self, name: &str) -> ModelDeployment {
        self.until(&self.deployments(), name, "became Ready", |d| {
            condition(d, "Ready").is_some_and(|(status, _)| status == "True")
        })
        .await
    }

    /// Waits until the one assignment of a deployment is on a machine; returns the machine.
    pub async fn until_placed(&self, name: &str) -> String {
        let deployments = self.deployments();
        let placed = self.until(&deployments, name, "was placed", |d| {
            d.status
                .as_ref()
                .is_some_and(|status| status.node_summary.is_some())
        });
        placed.await.status.unwrap().node_summary.unwrap()
    }

    /// What a machine shall hold, as names of deployments.
    pub async fn assigned(&self, node: &str) -> Vec<String> {
        let node = self.nodes().get(node).await.unwrap();
        node.spec.assignments.into_iter().map(|a| a.deployment).collect()
    }
}

/// A deployment of a file of 100 MiB.
pub fn deployment(name: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"model": {"path": format!("/models/{name}.gguf"), "size": "100Mi"}},
    })
}

/// Status and reason of a condition.
pub fn condition(deployment: &ModelDeployment, kind: &str) -> Option<(String, String)> {
    let conditions = &deployment.status.as_ref()?.conditions;
    let condition = conditions.iter().find(|c| c.type_ == kind)?;
    Some((condition.status.clone(), condition.reason.clone()))
}

/// Status of a machine's condition.
pub fn node_condition(node: &InferenceNode, kind: &str) -> Option<String> {
    let conditions = &node.status.as_ref()?.conditions;
    conditions
        .iter()
        .find(|c| c.type_ == kind)
        .map(|c| c.status.clone())
}

/// A running operator.
pub struct Running {
    pub operator: Operator,
    pub line: Line,
    pub shutdown: CancellationToken,
}

impl Running {
    /// Stops it and waits for its end.
    pub async fn stop(self) {
        self.shutdown.cancel();
        self.operator.join().await.unwrap();
    }
}

/// A line to the API that counts what is written over it, and can be cut.
#[derive(Clone)]
pub struct Line {
    api: ApiService,
    writes: Arc<Mutex<Vec<String>>>,
    cut: Arc<AtomicBool>,
    refusing: Arc<AtomicBool>,
}

impl Line {
    pub fn client(&self) -> Client {
        Client::new(self.clone(), "default")
    }

    /// From now on nothing comes through, watches under way included.
    pub fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::SeqCst);
    }

    /// From now on writes are counted and refused; reads and watches go on.
    pub fn refuse_writes(&self, refuse: bool) {
        self.refusing.store(refuse, Ordering::SeqCst);
    }

    /// What was written so far, events and the leader's Lease aside, as `METHOD path`.
    pub fn writes(&self) -> Vec<String> {
        let writes = self.writes.lock().unwrap();
        let counted = writes
            .iter()
            .filter(|write| !write.contains("/events") && !write.contains("/leases"));
        counted.cloned().collect()
    }

    /// Everything that was written so far.
    pub fn all_writes(&self) -> usize {
        self.writes.lock().unwrap().len()
    }
}

impl tower::Service<http::Request<Body>> for Line {
    type Response = http::Response<axum::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if self.cut.load(Ordering::SeqCst) {
            let mut response = http::Response::new(axum::body::Body::from("the line is cut"));
            *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
            return Box::pin(async { Ok(response) });
        }
        if request.method() != http::Method::GET {
            let write = format!("{} {}", request.method(), request.uri().path());
            self.writes.lock().unwrap().push(write);
            if self.refusing.load(Ordering::SeqCst) {
                let mut response = http::Response::new(axum::body::Body::from("no room on the disk"));
                *response.status_mut() = http::StatusCode::INTERNAL_SERVER_ERROR;
                return Box::pin(async { Ok(response) });
            }
        }
        let answer = self.api.call(request);
        let cut = Arc::clone(&self.cut);
        Box::pin(async move {
            let response = answer.await?;
            // A cut ends a watch at its next word.
            Ok(response.map(|body| {
                let stream = futures::StreamExt::take_while(body.into_data_stream(), move |_| {
                    let through = !cut.load(Ordering::SeqCst);
                    async move { through }
                });
                axum::body::Body::from_stream(stream)
            }))
        })
    }
}

type Script = Box<dyn Fn(&Assignment) -> Instance + Send>;

/// An agent that sends heartbeats and answers assignments as its script says.
pub struct Agent {
    name: String,
    script: Arc<Mutex<Script>>,
    rewritten: Arc<tokio::sync::Notify>,
    silent: Arc<AtomicBool>,
    pub heartbeats: Arc<AtomicU64>,
    stop: CancellationToken,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// An instance in some phase, with the facts of a model of 100 MiB once its bytes are here.
pub fn instance(assignment: &Assignment, phase: Phase) -> Instance {
    let here = !matches!(phase, Phase::Pending | Phase::Fetching | Phase::Failed);
    Instance {
        name: assignment.name.clone(),
        phase,
        model: here.then(|| ModelFacts {
            summary: Some("llama 135M Q4_1".into()),
            format: "gguf".into(),
            architecture: "llama".into(),
            file_bytes: 100 << 20,
            weight_bytes: 100 << 20,
            kv_bytes_per_token: 1024,
            context_length: 2048,
            ..ModelFacts::default()
        }),
        ..Instance::default()
    }
}

impl Agent {
    fn start(world: &World, name: &str) -> Self {
        let agent = Self {
            name: name.to_owned(),
            script: Arc::new(Mutex::new(Box::new(|assignment| {
                instance(assignment, Phase::Ready)
            }))),
            rewritten: Arc::default(),
            silent: Arc::default(),
            heartbeats: Arc::default(),
            stop: world.ended.child_token(),
        };
        let client = world.line().client();
        let (silent, beats, stop) = (
            Arc::clone(&agent.silent),
            Arc::clone(&agent.heartbeats),
            agent.stop.clone(),
        );
        let heart = beat(client.clone(), name.to_owned(), silent, beats);
        let answers = answer(
            client,
            name.to_owned(),
            Arc::clone(&agent.script),
            Arc::clone(&agent.rewritten),
            Arc::clone(&agent.silent),
        );
        tokio::spawn(async move {
            tokio::select! {
                () = heart => {}
                () = answers => {}
                () = stop.cancelled() => {}
            }
        });
        agent
    }

    /// Answers assignments otherwise from now on.
    pub fn behave(&self, script: impl Fn(&Assignment) -> Instance + Send + 'static) {
        *self.script.lock().unwrap() = Box::new(script);
        self.rewritten.notify_one();
    }

    /// Sends no heartbeats and no status (or does again).
    pub fn silence(&self, silent: bool) {
        self.silent.store(silent, Ordering::SeqCst);
        self.rewritten.notify_one();
    }
}

async fn beat(client: Client, name: String, silent: Arc<AtomicBool>, beats: Arc<AtomicU64>) {
    static SEQUENCE: AtomicI64 = AtomicI64::new(0);
    let api: Api<Lease> = Api::namespaced(client, SYSTEM_NAMESPACE);
    loop {
        if !silent.load(Ordering::SeqCst) {
            // A clock of its own, decades off: only change may count.
            let second = SEQUENCE.fetch_add(1, Ordering::SeqCst);
            let renewed = k8s_openapi::jiff::Timestamp::from_second(second).unwrap();
            let lease = json!({
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": name, "labels": {"app.kubernetes.io/component": "node-agent", "zone": "attic"}},
                "spec": {
                    "holderIdentity": name,
                    "leaseDurationSeconds": 40,
                    "renewTime": k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(renewed),
                },
            });
            let parameters = PatchParams::apply("freehold-node-agent").force();
            api.patch(&name, &parameters, &Patch::Apply(&lease))
                .await
                .unwrap();
            beats.fetch_add(1, Ordering::SeqCst);
        }
        tokio::time::sleep(Duration::from_secs(10)).await;
    }
}

async fn answer(
    client: Client,
    name: String,
    script: Arc<Mutex<Script>>,
    rewritten: Arc<tokio::sync::Notify>,
    silent: Arc<AtomicBool>,
) {
    use futures::StreamExt;
    let api: Api<InferenceNode> = Api::all(client);
    let mut changes = kube::runtime::watcher::watch_object(api.clone(), &name).boxed();
    let mut node: Option<InferenceNode> = None;
    let mut told: Option<InferenceNodeStatus> = None;
    loop {
        tokio::select! {
            change = changes.next() => match change {
                Some(Ok(change)) => node = change,
                Some(Err(_)) => continue,
                None => return,
            },
            () = rewritten.notified() => {}
        }
        let Some(node) = &node else {
            told = None;
            continue;
        };
        if silent.load(Ordering::SeqCst) {
            continue;
        }
        let instances = {
            let script = script.lock().unwrap();
            node.spec.assignments.iter().map(&**script).collect()
        };
        let status = InferenceNodeStatus {
            observed_generation: node.metadata.generation,
            gateway_address: Some(format!("http://{name}:11480")),
            inventory: Inventory {
                os: "linux".into(),
                architecture: "x86_64".into(),
                memory_bytes: 2 * MACHINE_BYTES,
                allocatable_bytes: MACHINE_BYTES,
                ..Inventory::default()
            },
            instances,
            ..InferenceNodeStatus::default()
        };
        if told.as_ref() == Some(&status) {
            continue;
        }
        let body = json!({
            "apiVersion": "freehold.dev/v1alpha1",
            "kind": "InferenceNode",
            "metadata": {"name": name},
            "status": status,
        });
        let parameters = PatchParams::apply("freehold-node-agent").force();
        match api.patch_status(&name, &parameters, &Patch::Apply(&body)).await {
            Ok(_) => told = Some(status),
            // Deleted a moment ago: the watch is about to tell so.
            Err(kube::Error::Api(refusal)) if refusal.is_not_found() => {}
            Err(error) => panic!("{name} could not tell its status: {error}"),
        }
    }
}

/// Lets the tests' time pass. Nothing is waited for: what must not happen gets the time to happen.
pub async fn let_pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

/// A condition for [`await_condition`] from a closure, spelled out for inference.
pub fn gone<K>() -> impl Condition<K> {
    |object: Option<&K>| object.is_none()
}
