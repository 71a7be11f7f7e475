//! An agent as its caller sees it: started, asked for its address, waited for.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use freehold_gateway::{Gateway, GatewayOptions};
use kube::Client;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{error, info};

use crate::config::AgentConfig;
use crate::energy::{self, Books};
use crate::error::StartAgent;
use crate::gpu::GpuSupport;
use crate::metrics::Metrics;
use crate::spec_file::SpecFile;
use crate::status::{Publisher, Snapshot};
use crate::store::ModelStore;
use crate::supervisor::{self, Supervisor, Tools, Wake, run_dir};
use crate::watch::Observed;
use crate::{credential, heartbeat, inventory};

/// A running agent.
pub struct Agent {
    gateway_address: SocketAddr,
    gateway: Gateway,
    store: ModelStore,
    supervisor: Wake,
    running: JoinHandle<()>,
}

impl Agent {
    /// Starts an agent, which runs until `shutdown`. It serves what its last accepted spec says at once,
    /// whether or not the API behind `client` answers.
    ///
    /// # Errors
    /// [`StartAgent`], before anything runs.
    pub async fn start(
        config: AgentConfig,
        client: Client,
        shutdown: CancellationToken,
    ) -> Result<Self, StartAgent> {
        check_node_name(&config.node)?;
        let (folder_lock, sockets) = prepare_folder(&config.data_dir)?;
        let worker_program = match &config.worker_program {
            Some(program) => program.clone(),
            None => std::env::current_exe().map_err(StartAgent::FindProgram)?,
        };
        let store = ModelStore::open(config.data_dir.join("models"), config.store.clone())?;
        let metrics = Arc::new(Metrics::new());
        let (wake, inbox) = supervisor::inbox();
        let options = GatewayOptions::new(config.node.clone(), config.data_dir.join("audit"));
        let gateway = Gateway::open(options, Arc::new(wake.clone()))?;
        let listener = listen(config.gateway_listen).await?;
        let gateway_address = listener.local_addr().unwrap_or(config.gateway_listen);
        let metrics_listener = match config.metrics_listen {
            Some(address) => Some(listen(address).await?),
            None => None,
        };
        let (data_dir, memory_limit) = (config.data_dir.clone(), config.memory_limit);
        let (own, gpu_worker) = (worker_program.clone(), config.gpu_worker.clone());
        let found = tokio::task::spawn_blocking(move || {
            let gpu = GpuSupport::find(&own, gpu_worker.as_deref());
            let inventory = inventory::read(&data_dir, memory_limit, &gpu);
            (gpu, inventory)
        });
        let (gpu, inventory) = found.await.unwrap_or_default();
        let gpu_worker = gpu.program.clone().filter(|_| !inventory.devices.is_empty());

        let file = SpecFile::in_folder(&config.data_dir);
        let (spec_sender, spec) = watch::channel(file.load().unwrap_or_default());
        let (observed_sender, observed) = watch::channel(Observed::default());
        let (snapshot_sender, snapshot) = watch::channel(Snapshot::default());
        let (books_sender, books) = watch::channel(Books::default());
        info!(
            node = %config.node,
            gateway = %gateway_address,
            memory = inventory.memory_summary,
            kept_generation = spec.borrow().generation,
            "Started agent"
        );

        let tools = Tools {
            data_dir: config.data_dir.clone(),
            run_dir: sockets,
            worker_program,
            gpu_worker,
            worker_arguments_prefix: config.worker_arguments_prefix.clone(),
            allocatable_bytes: inventory.allocatable_bytes,
            store: store.clone(),
            gateway: gateway.clone(),
            metrics: Arc::clone(&metrics),
        };
        let measuring = energy::run(
            config.powercap_dir.clone(),
            energy::READ_EVERY,
            config.energy_price.clone(),
            snapshot.clone(),
            books_sender,
            Arc::clone(&metrics),
        );
        let publisher = Publisher {
            client: client.clone(),
            node: config.node.clone(),
            gateway_address: config.gateway_url(gateway_address),
            data_dir: config.data_dir.clone(),
            memory_limit,
            gpu,
            inventory,
            snapshot,
            observed,
            energy: books,
            metrics: Arc::clone(&metrics),
        };
        let watching = crate::watch::run(
            client.clone(),
            config.node.clone(),
            file,
            spec_sender,
            observed_sender,
        );
        let credential = credential::run(client.clone(), config.credential.clone());
        let renewing = heartbeat::run(
            client,
            config.node,
            config.labels,
            config.heartbeat,
            Arc::clone(&metrics),
        );
        let supervisor = wake.clone();
        let parts = Parts {
            supervisor: Supervisor::new(tools, (wake, inbox), spec, snapshot_sender),
            publisher,
            gateway: gateway.clone(),
            listener,
            metrics: metrics_listener.map(|listener| (listener, metrics)),
            _folder_lock: folder_lock,
        };
        let background = [
            AbortOnDropHandle::new(tokio::spawn(watching)),
            AbortOnDropHandle::new(tokio::spawn(renewing)),
            AbortOnDropHandle::new(tokio::spawn(measuring)),
            AbortOnDropHandle::new(tokio::spawn(credential)),
        ];
        let running = tokio::spawn(parts.run(shutdown, background));
        Ok(Self {
            gateway_address,
            gateway,
            store,
            supervisor,
            running,
        })
    }

    /// Whether the supervisor, which everything here waits for, still takes up what it is told. False when it
    /// has not done so within `patience`.
    pub async fn is_alive(&self, patience: Duration) -> bool {
        self.supervisor.is_alive(patience).await
    }

    /// Where the gateway listens.
    #[must_use]
    pub fn gateway_address(&self) -> SocketAddr {
        self.gateway_address
    }

    /// The gateway, for callers in this process.
    #[must_use]
    pub fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    /// The model store, for callers that bring a file.
    #[must_use]
    pub fn store(&self) -> &ModelStore {
        &self.store
    }

    /// Waits until the agent has ended after its `shutdown`: requests finished or cut off, workers
    /// ended, the last status written.
    pub async fn join(self) {
        if let Err(error) = self.running.await
            && error.is_panic()
        {
            error!(%error, "The agent broke");
        }
    }
}

/// What runs, and ends in a certain order.
struct Parts {
    supervisor: Supervisor,
    publisher: Publisher,
    gateway: Gateway,
    listener: TcpListener,
    metrics: Option<(TcpListener, Arc<Metrics>)>,
    /// Held until everything has ended.
    _folder_lock: std::fs::File,
}

impl Parts {
    async fn run(self, shutdown: CancellationToken, background: [AbortOnDropHandle<()>; 4]) {
        let publishing = CancellationToken::new();
        let publisher = tokio::spawn(self.publisher.run(publishing.clone()));
        let monitoring = self.metrics.map(|(listener, metrics)| {
            let router = monitor(self.gateway.clone(), metrics);
            AbortOnDropHandle::new(tokio::spawn(async move {
                if let Err(error) = axum::serve(listener, router).await {
                    error!(%error, "Stopped serving metrics");
                }
            }))
        });
        let gateway = self.gateway.clone();
        let serving = {
            let shutdown = shutdown.clone();
            tokio::spawn(async move {
                if let Err(error) = gateway.serve(self.listener, shutdown).await {
                    error!(%error, "Stopped serving the bus");
                }
            })
        };
        // Requests in flight finish on both sides before the last word is written.
        self.supervisor.run(shutdown).await;
        let _ = serving.await;
        publishing.cancel();
        let _ = publisher.await;
        drop((background, monitoring));
        info!("Stopped agent");
    }
}

fn monitor(gateway: Gateway, metrics: Arc<Metrics>) -> Router {
    let text = move || {
        let (agent, bus) = (metrics.text(), gateway.metrics());
        // One exposition has one end.
        std::future::ready(format!("{}{bus}", agent.trim_end().trim_end_matches("# EOF")))
    };
    Router::new()
        .route("/metrics", get(text))
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(|| async { "ok" }))
}

async fn listen(address: SocketAddr) -> Result<TcpListener, StartAgent> {
    TcpListener::bind(address)
        .await
        .map_err(|source| StartAgent::Listen { address, source })
}

/// The folder of this agent alone, and in it one for sockets, cleared of what an earlier agent left.
fn prepare_folder(data_dir: &PathBuf) -> Result<(std::fs::File, PathBuf), StartAgent> {
    let unusable = |source: std::io::Error| StartAgent::PrepareFolder {
        path: data_dir.clone(),
        source,
    };
    std::fs::create_dir_all(data_dir).map_err(unusable)?;
    let lock = run_dir::lock(data_dir).map_err(unusable)?;
    let lock = lock.ok_or_else(|| StartAgent::FolderInUse {
        path: data_dir.clone(),
    })?;
    let sockets = run_dir::prepare(data_dir).map_err(unusable)?;
    run_dir::clear(&sockets);
    Ok((lock, sockets))
}

/// The name becomes that of two objects.
fn check_node_name(node: &str) -> Result<(), StartAgent> {
    let fits = |part: &str| {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        !part.is_empty() && part.bytes().all(inner) && !part.starts_with('-') && !part.ends_with('-')
    };
    if node.len() <= 253 && node.split('.').all(fits) {
        return Ok(());
    }
    Err(StartAgent::InvalidSetting {
        setting: "--node",
        found: node.to_owned(),
        allowed: "a machine's name has lower-case letters, digits, '-' and '.', at most 253 of them",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_named_as_kubernetes_names_nodes() {
        for node in ["pi-3", "a.lan", "x"] {
            assert!(check_node_name(node).is_ok(), "{node}");
        }
        for node in ["", "Pi", "a_b", "-a", "a-", "a..b", "../x", &"a".repeat(254)] {
            assert!(check_node_name(node).is_err(), "{node}");
        }
    }

    #[test]
    fn a_folder_in_use_is_said_to_be_so() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().to_owned();
        let first = prepare_folder(&path).expect("free");
        assert!(matches!(
            prepare_folder(&path),
            Err(StartAgent::FolderInUse { .. })
        ));
        drop(first);
        assert!(prepare_folder(&path).is_ok());
    }
}
