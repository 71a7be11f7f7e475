//! One agent in a folder of its own, on free ports, with the worker program of this build.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use freehold_control_plane::{ControlPlane, Options};
use freehold_crds::InferenceNode;
use freehold_crds::inference_node::{
    Assignment, Backend, CompiledProbe, InferenceNodeSpec, InferenceNodeStatus, Instance, Phase, Route,
};
use freehold_crds::model_deployment::{EngineSettings, ModelSource};
use freehold_node_agent::{Agent, AgentConfig};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

pub(crate) const NODE: &str = "here";
/// For what takes a load or an answer, on a machine that is busy with other tests too; a test that needs
/// it all has failed.
const LIMIT: Duration = Duration::from_secs(120);

/// The chat model. A missing file is a failed test, never a skipped one.
pub(crate) fn chat_model() -> PathBuf {
    model("SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// The folder of the embedding model.
pub(crate) fn embedding_model() -> PathBuf {
    let folder = model("all-MiniLM-L6-v2");
    assert!(
        folder.join("model.safetensors").is_file(),
        "run ./tests/run, which fetches the test models"
    );
    folder
}

fn model(name: &str) -> PathBuf {
    let folder = std::env::var_os("FREEHOLD_TEST_MODELS").map_or_else(
        || {
            let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
            let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
            cache
                .unwrap_or_else(|| home.join(".cache"))
                .join("freehold/models")
        },
        PathBuf::from,
    );
    let path = folder.join(name);
    assert!(
        path.exists(),
        "{path:?} is missing: run ./tests/run, which fetches the test models"
    );
    path
}

/// A client of an API that is not there.
pub(crate) fn no_api() -> Client {
    let refuse = tower::service_fn(|_: http::Request<kube::client::Body>| async {
        Err::<http::Response<axum::body::Body>, _>(std::io::Error::other("the API is gone"))
    });
    Client::new(refuse, "default")
}

/// An assignment `home.NAME.REVISION` of a model that is read in place.
pub(crate) fn assignment(name: &str, revision: &str, path: &Path) -> Assignment {
    Assignment {
        name: format!("home.{name}.{revision}"),
        namespace: "home".to_owned(),
        deployment: name.to_owned(),
        revision: revision.to_owned(),
        model: ModelSource {
            path: Some(path.display().to_string()),
            ..ModelSource::default()
        },
        engine: EngineSettings {
            context_length: Some(256),
            concurrency: 2,
            // Threads that wait for each other are slow beside other tests; one is enough for this model.
            threads: Some(1),
            ..EngineSettings::default()
        },
        ..Assignment::default()
    }
}

/// A route NAME to these assignments, best first.
pub(crate) fn route(name: &str, assignments: &[&Assignment]) -> Route {
    let backend = |assignment: &&Assignment| Backend {
        node: NODE.to_owned(),
        assignment: assignment.name.clone(),
        address: None,
    };
    Route {
        name: name.to_owned(),
        namespace: "home".to_owned(),
        deployment: name.to_owned(),
        created: 1,
        backends: assignments.iter().map(backend).collect(),
        refusal: None,
    }
}

/// A spec that serves each assignment under its deployment's name.
pub(crate) fn spec(assignments: &[Assignment]) -> InferenceNodeSpec {
    InferenceNodeSpec {
        routes: assignments
            .iter()
            .map(|assignment| route(&assignment.deployment, &[assignment]))
            .collect(),
        assignments: assignments.to_vec(),
        ..InferenceNodeSpec::default()
    }
}

/// An agent under test.
pub(crate) struct Machine {
    agent: Option<Agent>,
    shutdown: CancellationToken,
    pub(crate) folder: PathBuf,
    /// Removed with the machine.
    temporary: Option<tempfile::TempDir>,
    http: reqwest::Client,
    pub(crate) control_plane: Option<ControlPlane>,
}

/// What differs between tests.
#[derive(Default)]
pub(crate) struct Setup {
    pub(crate) memory_limit: Option<u64>,
    /// Heartbeats that a test does not wait for stay out of the count of writes.
    pub(crate) heartbeat: Option<Duration>,
}

impl Machine {
    /// With the embedded control plane, in memory.
    pub(crate) async fn start(setup: Setup, mut spec: InferenceNodeSpec) -> Self {
        spec.planned = true;
        let options = Options {
            data_dir: None,
            crds: freehold_crds::all(),
        };
        let control_plane = ControlPlane::open(options).expect("a control plane");
        let nodes: Api<InferenceNode> = Api::all(control_plane.client());
        nodes
            .create(&PostParams::default(), &InferenceNode::new(NODE, spec))
            .await
            .expect("created");
        let temporary = tempfile::tempdir().expect("a folder");
        let folder = temporary.path().to_owned();
        let client = control_plane.client();
        let mut machine = Self::start_in(folder, client, setup).await;
        machine.temporary = Some(temporary);
        machine.control_plane = Some(control_plane);
        machine
    }

    /// In a given folder, with a given API.
    pub(crate) async fn start_in(folder: PathBuf, client: Client, setup: Setup) -> Self {
        let _ = tracing_subscriber::fmt()
            .with_env_filter("info,kube=warn")
            .with_test_writer()
            .try_init();
        let config = AgentConfig {
            gateway_listen: "127.0.0.1:0".parse().expect("an address"),
            worker_program: Some(env!("CARGO_BIN_EXE_freehold-node-agent").into()),
            memory_limit: setup.memory_limit,
            heartbeat: setup.heartbeat.unwrap_or(Duration::from_secs(10)),
            ..AgentConfig::new(NODE, folder.clone())
        };
        let shutdown = CancellationToken::new();
        let agent = Agent::start(config, client, shutdown.clone())
            .await
            .expect("an agent");
        let http = reqwest::Client::builder()
            .timeout(LIMIT)
            .build()
            .expect("a client");
        Self {
            agent: Some(agent),
            shutdown,
            folder,
            temporary: None,
            http,
            control_plane: None,
        }
    }

    pub(crate) async fn stop(&mut self) {
        self.shutdown.cancel();
        if let Some(agent) = self.agent.take() {
            agent.join().await;
        }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        let agent = self.agent.as_ref().expect("a running agent");
        format!("http://{}{path}", agent.gateway_address())
    }

    /// One chat; status and body.
    pub(crate) async fn chat(&self, model: &str) -> (u16, Value) {
        let body = json!({
            "model": model,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 12,
            "temperature": 0,
        });
        self.post("/v1/chat/completions", body).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        match self.http.post(self.url(path)).json(&body).send().await {
            Ok(answer) => {
                let status = answer.status().as_u16();
                (status, answer.json().await.unwrap_or(Value::Null))
            }
            Err(error) => (0, json!(error.to_string())),
        }
    }

    /// Asks until the answer is a good one, and gives its text.
    pub(crate) async fn chat_until_answered(&self, model: &str) -> String {
        let body = eventually("an answer", || async {
            let (status, body) = self.chat(model).await;
            if status == 200 {
                Ok(body)
            } else {
                Err(format!("{status} {body}"))
            }
        })
        .await;
        body["choices"][0]["message"]["content"]
            .as_str()
            .expect("text")
            .to_owned()
    }

    pub(crate) fn nodes(&self) -> Api<InferenceNode> {
        Api::all(self.control_plane.as_ref().expect("a control plane").client())
    }

    /// What the operator would do.
    pub(crate) async fn set_spec(&self, mut spec: InferenceNodeSpec) -> i64 {
        spec.planned = true;
        let patch = json!([{"op": "replace", "path": "/spec", "value": spec}]);
        let patch = Patch::<()>::Json(serde_json::from_value(patch).expect("a patch"));
        let patched = self
            .nodes()
            .patch(NODE, &PatchParams::default(), &patch)
            .await
            .expect("patched");
        patched.metadata.generation.expect("a generation")
    }

    pub(crate) async fn status(&self) -> InferenceNodeStatus {
        self.nodes()
            .get(NODE)
            .await
            .expect("a node")
            .status
            .unwrap_or_default()
    }

    /// Waits for an instance to be as asked.
    pub(crate) async fn instance(&self, name: &str, is: impl Fn(&Instance) -> bool) -> Instance {
        eventually(name, || async {
            let status = self.status().await;
            let found = status
                .instances
                .iter()
                .find(|instance| instance.name == name && is(instance));
            found.cloned().ok_or_else(|| format!("{:#?}", status.instances))
        })
        .await
    }

    pub(crate) async fn phase(&self, name: &str, phase: Phase) -> Instance {
        self.instance(name, |instance| instance.phase == phase).await
    }

    /// Process ids of this machine's workers.
    pub(crate) fn workers(&self) -> Vec<i32> {
        workers_of(&self.folder)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Processes with a `--socket` in `folder`.
pub(crate) fn workers_of(folder: &Path) -> Vec<i32> {
    let run = format!("{}/", folder.join("run").display());
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    processes
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let command = std::fs::read(entry.path().join("cmdline")).ok()?;
            String::from_utf8_lossy(&command).contains(&run).then_some(pid)
        })
        .collect()
}

pub(crate) fn kill(pid: i32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a process");
    rustix::process::kill_process(pid, signal).expect("killed");
}

/// Keeps `spec` where an agent finds its last accepted one.
pub(crate) fn keep_spec(folder: &Path, spec: &InferenceNodeSpec) {
    let kept = json!({"generation": 5, "spec": spec});
    std::fs::write(folder.join("spec.json"), kept.to_string()).expect("written");
}

/// Looks until `look` is content; fails with what it saw last.
pub(crate) async fn eventually<T, F>(what: &str, mut look: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    let deadline = Instant::now() + LIMIT;
    loop {
        match look().await {
            Ok(found) => return found,
            Err(seen) if Instant::now() > deadline => panic!("no {what} within {LIMIT:?}; last seen: {seen}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// A probe on all of `deployments`.
pub(crate) fn probe(name: &str, deployments: &[&str]) -> CompiledProbe {
    CompiledProbe {
        name: format!("home.{name}"),
        namespace: "home".to_owned(),
        probe: name.to_owned(),
        deployments: deployments.iter().map(|&name| name.to_owned()).collect(),
        period_seconds: 1,
        failure_threshold: 2,
        success_threshold: 1,
        ..CompiledProbe::default()
    }
}
