//! A control plane to test, and the ways to talk to it.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use freehold_control_plane::{ControlPlane, Options, Server};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Whatever is waited for has happened by then, or never will.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// The CRD of the Widget.
pub fn crds() -> Vec<CustomResourceDefinition> {
    vec![serde_yaml::from_str(include_str!("widget.yaml")).unwrap()]
}

/// A control plane that keeps everything in memory.
pub fn in_memory() -> ControlPlane {
    ControlPlane::open(Options {
        data_dir: None,
        crds: crds(),
    })
    .unwrap()
}

/// Widgets of the namespace `default`.
pub fn widgets(client: &kube::Client) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), "default", &widget_resource())
}

pub fn widget_resource() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("test.example.com", "v1", "Widget"))
}

/// A Widget with the given spec.
pub fn widget(name: &str, spec: &Value) -> DynamicObject {
    let value = json!({
        "apiVersion": "test.example.com/v1", "kind": "Widget", "metadata": {"name": name}, "spec": spec,
    });
    serde_json::from_value(value).unwrap()
}

/// The same as YAML, for kubectl.
pub fn widget_yaml(name: &str, spec: &Value) -> String {
    serde_json::to_string(&widget(name, spec)).unwrap()
}

/// The Status of a refused request.
pub fn refusal<T: std::fmt::Debug>(outcome: Result<T, kube::Error>) -> kube::core::Status {
    match outcome {
        Err(kube::Error::Api(status)) => *status,
        other => panic!("expected the API to refuse, found {other:?}"),
    }
}

/// Waits until `holds` gives something.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut holds: impl FnMut() -> F) -> T {
    let attempt = async {
        loop {
            if let Some(found) = holds().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let outcome = tokio::time::timeout(DEADLINE, attempt).await;
    outcome.unwrap_or_else(|_| panic!("it did not happen within {DEADLINE:?}: {what}"))
}

/// A control plane on a port of this machine, with a kubectl that knows it.
pub struct Served {
    pub control_plane: ControlPlane,
    pub server: Server,
    pub folder: TempDir,
}

/// What kubectl did.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// What it printed, when it ended well.
    pub fn text(self) -> String {
        assert_eq!(self.code, 0, "kubectl failed: {self:?}");
        self.stdout
    }

    /// What it complained of, when it did not.
    pub fn complaint(self) -> String {
        assert_ne!(self.code, 0, "kubectl did what it should not: {self:?}");
        self.stderr
    }
}

impl Served {
    pub async fn start() -> Self {
        Self::with(crds()).await
    }

    pub async fn with(crds: Vec<CustomResourceDefinition>) -> Self {
        let folder = TempDir::new().unwrap();
        let control_plane = ControlPlane::open(Options {
            data_dir: Some(folder.path().to_owned()),
            crds,
        })
        .unwrap();
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let server = control_plane.serve(address, folder.path()).await.unwrap();
        Self {
            control_plane,
            server,
            folder,
        }
    }

    /// A kubectl command, not yet started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(kubectl());
        command
            .args(arguments)
            .env("KUBECONFIG", self.server.kubeconfig())
            .env("HOME", self.folder.path())
            .env("KUBECTL_EXTERNAL_DIFF", "diff -u -N")
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    pub async fn kubectl(&self, arguments: &[&str]) -> Outcome {
        outcome(self.command(arguments), "").await
    }

    /// The same with something on its standard input.
    pub async fn kubectl_with(&self, arguments: &[&str], input: &str) -> Outcome {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped());
        outcome(command, input).await
    }

    /// Writes a file into the folder in which kubectl runs.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }
}

pub async fn outcome(mut command: Command, input: &str) -> Outcome {
    let mut child = command.spawn().unwrap();
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).await.unwrap();
    }
    let output = tokio::time::timeout(DEADLINE, child.wait_with_output())
        .await
        .unwrap_or_else(|_| panic!("kubectl did not end: {command:?}"))
        .unwrap();
    Outcome {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The real kubectl.
fn kubectl() -> PathBuf {
    let named = std::env::var_os("FREEHOLD_TEST_KUBECTL").map(PathBuf::from);
    let path = named.unwrap_or_else(|| {
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
        let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from);
        cache.join("freehold/bin/kubectl")
    });
    assert!(
        path.is_file(),
        "no kubectl at {}: run ./tests/run, which fetches it, or set FREEHOLD_TEST_KUBECTL",
        path.display()
    );
    path
}
