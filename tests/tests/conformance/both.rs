//! The two servers.

use std::time::Duration;

use freehold_control_plane::{ControlPlane, Options, Server};
use freehold_tests::api_server::{ApiServer, Storage, install};
use freehold_tests::exchange::{Answer, Request, send};
use freehold_tests::named::namespace_prefix;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Client;
use serde_json::json;
use tempfile::TempDir;

/// A real server and the embedded one, with the same kinds.
pub struct Both {
    pub real: Client,
    pub embedded: Client,
    pub control_plane: ControlPlane,
    pub server: ApiServer,
}

/// The kinds of this project, and the Gadget, which has a little of everything.
pub fn crds() -> Vec<CustomResourceDefinition> {
    let mut crds = freehold_crds::all();
    crds.push(serde_yaml::from_str(include_str!("gadget.yaml")).unwrap());
    crds
}

impl Both {
    /// The real server stands on etcd, or on what `FREEHOLD_TEST_STORAGE` names.
    pub async fn start() -> Self {
        let named = std::env::var("FREEHOLD_TEST_STORAGE").unwrap_or_default();
        Self::start_on(match named.as_str() {
            "" | "etcd" => Storage::Etcd,
            "kine" => Storage::Kine,
            other => panic!("FREEHOLD_TEST_STORAGE is {other:?}; it may be etcd or kine"),
        })
        .await
    }

    pub async fn start_on(storage: Storage) -> Self {
        Self::with(ApiServer::start(storage).await.unwrap()).await
    }

    /// With a real server that is there already.
    pub async fn with(server: ApiServer) -> Self {
        let control_plane = ControlPlane::open(Options {
            data_dir: None,
            crds: crds(),
        })
        .unwrap();
        let real = server.client().await.unwrap();
        install(&real, &crds()).await.unwrap();
        Self {
            embedded: control_plane.client(),
            control_plane,
            real,
            server,
        }
    }

    /// The same request to both.
    pub async fn ask(&self, real: &Request, embedded: &Request) -> (Answer, Answer) {
        let answers = tokio::join!(send(&self.real, real), send(&self.embedded, embedded));
        (answers.0.unwrap(), answers.1.unwrap())
    }

    /// A namespace that nobody else uses.
    pub async fn namespace(&self, name: &str) -> String {
        let name = format!("{}{name}", namespace_prefix());
        let body = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        let request = Request::new("POST", "/api/v1/namespaces").with_body("application/json", &body);
        let (real, embedded) = self.ask(&request, &request).await;
        assert_eq!((real.code, embedded.code), (201, 201), "{real:?} {embedded:?}");
        name
    }

    /// The embedded one on a port, for programs.
    pub async fn serve_embedded(&self) -> (Server, TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let server = self.control_plane.serve(address, folder.path()).await.unwrap();
        (server, folder)
    }
}

/// A whole suite takes no longer.
pub const SUITE: Duration = Duration::from_secs(600);
