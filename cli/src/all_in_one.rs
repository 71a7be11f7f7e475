//! Control plane, operator and agent in one process, for one machine.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use freehold_control_plane::{ControlPlane, Options, Server};
use freehold_node_agent::{Agent, AgentConfig};
use freehold_operator::{Operator, OperatorConfig};
use tokio_util::sync::CancellationToken;

/// Where things lie and listen.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Folder of everything that is kept: objects, models, keys, records
    #[arg(long, env = "FREEHOLD_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Where the gateway (the OpenAI API) listens; port 0 takes any free one
    #[arg(long, env = "FREEHOLD_LISTEN", value_name = "ADDRESS", default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, freehold_crds::DEFAULT_GATEWAY_PORT)))]
    pub listen: SocketAddr,
    /// Where the API for kubectl listens; port 0 takes any free one
    #[arg(
        long,
        env = "FREEHOLD_API_LISTEN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:11443"
    )]
    pub api_listen: SocketAddr,
    /// Name of this machine; its host name if absent
    #[arg(long, env = "FREEHOLD_NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// Memory that all models together may take, such as 4Gi; found out if absent
    #[arg(long, env = "FREEHOLD_MEMORY_LIMIT", value_name = "QUANTITY")]
    pub memory_limit: Option<String>,
}

/// A Lease a quarter of a minute keeps an all-in-one alive with four writes a minute; there is no other
/// machine that would have to notice its end sooner.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// `$FREEHOLD_DATA_DIR`, else the user's data folder.
#[must_use]
pub fn default_data_dir() -> PathBuf {
    let home = || std::env::var_os("HOME").map_or_else(|| PathBuf::from("."), PathBuf::from);
    let base = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from);
    base.unwrap_or_else(|| home().join(".local/share"))
        .join("freehold")
}

/// Everything that runs.
pub struct AllInOne {
    control_plane: ControlPlane,
    server: Server,
    operator: Operator,
    agent: Agent,
    shutdown: CancellationToken,
}

impl AllInOne {
    /// Starts everything in `data_dir`.
    ///
    /// # Errors
    /// What could not be started, and what to do.
    pub async fn start(settings: &Settings, data_dir: &Path) -> Result<Self> {
        let memory_limit = settings
            .memory_limit
            .as_deref()
            .map(|text| freehold_crds::Quantity::from(text).bytes())
            .transpose()
            .context("--memory-limit")?;
        let shutdown = CancellationToken::new();
        let options = Options {
            data_dir: Some(data_dir.join("control-plane")),
            crds: freehold_crds::all(),
        };
        let control_plane = ControlPlane::open(options)?;
        let server = control_plane.serve(settings.api_listen, data_dir).await?;
        // The only operator: the store's lock keeps a second process out, so no Lease is needed.
        let config = OperatorConfig {
            leader_election: None,
            metrics_listen: None,
            identity: "all-in-one".to_owned(),
            forget_after: freehold_operator::FORGET_AFTER,
        };
        let operator = Operator::start(config, control_plane.client(), shutdown.clone()).await?;
        let node = settings.node_name.clone().unwrap_or_else(host_name);
        let mut config = AgentConfig::new(node, data_dir.join("agent"));
        config.gateway_listen = settings.listen;
        config.heartbeat = HEARTBEAT;
        config.memory_limit = memory_limit;
        config.store.hub_token = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty());
        if let Ok(endpoint) = std::env::var("HF_ENDPOINT") {
            config.store.hub_endpoint = endpoint.trim_end_matches('/').to_owned();
        }
        config.gpu_worker = std::env::var_os("FREEHOLD_GPU_WORKER").map(Into::into);
        if let Ok(price) = std::env::var("FREEHOLD_ENERGY_PRICE") {
            let currency = std::env::var("FREEHOLD_ENERGY_CURRENCY").unwrap_or_else(|_| "EUR".to_owned());
            let price = freehold_node_agent::args::energy_price(&price, &currency);
            config.energy_price = Some(
                price
                    .map_err(anyhow::Error::msg)
                    .context("FREEHOLD_ENERGY_PRICE")?,
            );
        }
        let agent = Agent::start(config, control_plane.client(), shutdown.clone()).await?;
        Ok(Self {
            control_plane,
            server,
            operator,
            agent,
            shutdown,
        })
    }

    /// A client with every right.
    #[must_use]
    pub fn client(&self) -> kube::Client {
        self.control_plane.client()
    }

    /// The kubeconfig that kubectl needs.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        self.server.kubeconfig()
    }

    /// Base address of the OpenAI API.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.agent.gateway_address())
    }

    /// The agent's model store.
    #[must_use]
    pub fn store(&self) -> &freehold_node_agent::store::ModelStore {
        self.agent.store()
    }

    /// Stops everything: requests under way end, workers stop, nothing is lost.
    ///
    /// # Errors
    /// When the operator ended badly.
    pub async fn stop(self) -> Result<()> {
        self.shutdown.cancel();
        self.agent.join().await;
        let ended = self.operator.join().await;
        self.control_plane.shutdown();
        self.server.shutdown().await;
        ended.context("the operator ended badly")
    }
}

/// The machine's name, as far as it is a name that an object can have.
fn host_name() -> String {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .to_lowercase();
    let clean: String = name
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '.' {
                c
            } else {
                '-'
            }
        })
        .collect();
    let clean = clean.trim_matches(['-', '.']).to_owned();
    if clean.is_empty() {
        "localhost".to_owned()
    } else {
        clean
    }
}
