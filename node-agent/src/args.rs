//! The agent's command line, parsed once into an [`AgentConfig`].

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use freehold_crds::{DEFAULT_GATEWAY_PORT, Quantity};

use crate::config::{AgentConfig, POWERCAP};
use crate::credential::Credential;
use crate::energy::EnergyPrice;
use crate::store::StoreOptions;
use crate::worker::WorkerArgs;

/// The agent of one machine: it runs the models that the operator assigns to it
#[derive(Debug, Parser)]
#[command(name = "freehold-node-agent", version, args_conflicts_with_subcommands = true)]
pub struct Arguments {
    /// What to be instead of an agent.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to be an agent.
    #[command(flatten)]
    pub agent: AgentArgs,
}

/// What this program is besides an agent.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs one model; started by the agent
    #[command(hide = true)]
    Worker(WorkerArgs),
}

/// Settings of an agent.
#[derive(Args, Debug)]
pub struct AgentArgs {
    /// Name of this machine; in a cluster, that of its Node
    #[arg(long, env = "FREEHOLD_NODE")]
    node: Option<String>,
    /// Folder for models, audit records and the last accepted spec
    #[arg(long, env = "FREEHOLD_DATA_DIR", default_value = "/var/lib/freehold")]
    data_dir: PathBuf,
    /// Where the gateway listens
    #[arg(long, env = "FREEHOLD_GATEWAY_LISTEN", default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_GATEWAY_PORT)))]
    gateway_listen: SocketAddr,
    /// Host (and port) under which others reach the gateway, if not the one it listens on
    #[arg(long, env = "FREEHOLD_GATEWAY_ADVERTISE")]
    gateway_advertise: Option<String>,
    /// Most memory for all models together, such as 6Gi; otherwise found out
    #[arg(long, env = "FREEHOLD_MEMORY_LIMIT")]
    memory_limit: Option<String>,
    /// Program that runs models on the GPU: this one, built with --features cuda; tried once at the start
    #[arg(long, env = "FREEHOLD_GPU_WORKER")]
    gpu_worker: Option<PathBuf>,
    /// Seconds between two heartbeats
    #[arg(long, env = "FREEHOLD_HEARTBEAT_SECONDS", default_value_t = 12, value_parser = clap::value_parser!(u64).range(1..=20))]
    heartbeat_seconds: u64,
    /// Labels of this machine, as key=value
    #[arg(long = "label", env = "FREEHOLD_LABELS", value_delimiter = ',', value_parser = label)]
    labels: Vec<(String, String)>,
    /// Where /metrics, /healthz and /readyz are served; nowhere if absent
    #[arg(long, env = "FREEHOLD_METRICS_LISTEN")]
    metrics_listen: Option<SocketAddr>,
    /// Price of a kilowatt hour, such as 0.32: models' status and metrics then tell money too
    #[arg(long, env = "FREEHOLD_ENERGY_PRICE", value_parser = price)]
    energy_price: Option<f64>,
    /// Currency of that price
    #[arg(long, env = "FREEHOLD_ENERGY_CURRENCY", default_value = "EUR", value_parser = currency)]
    energy_currency: String,
    /// The kernel's folder of energy counters; a container needs the machine's own
    #[arg(long, env = "FREEHOLD_POWERCAP_DIR", default_value = POWERCAP)]
    powercap_dir: PathBuf,
    /// File with the token of this machine's account, which the agent renews; `freehold node join` writes it
    #[arg(long, env = "FREEHOLD_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Age in seconds at which that token is renewed; half of its life if absent
    #[arg(long, env = "FREEHOLD_TOKEN_RENEW_SECONDS", requires = "token_file", value_parser = clap::value_parser!(u64).range(1..))]
    token_renew_seconds: Option<u64>,
    /// Seconds without progress after which the agent aborts, to be started again; systemd watches by itself
    #[arg(long, env = "FREEHOLD_WATCHDOG_SECONDS", value_parser = clap::value_parser!(u64).range(3..))]
    watchdog_seconds: Option<u64>,
    /// Hugging Face hub or a mirror of it
    #[arg(long, env = "HF_ENDPOINT")]
    hub_endpoint: Option<String>,
    /// Token for that hub
    #[arg(long, env = "HF_TOKEN", hide_env_values = true)]
    hub_token: Option<String>,
}

fn price(text: &str) -> Result<f64, String> {
    let price = text.parse::<f64>().ok();
    price
        .filter(|price| price.is_finite() && *price >= 0.0)
        .ok_or_else(|| format!("{text:?} is not a price, such as 0.32"))
}

/// A price and its currency as an agent is told them.
///
/// # Errors
/// What does not read.
pub fn energy_price(price_text: &str, currency_text: &str) -> Result<EnergyPrice, String> {
    Ok(EnergyPrice {
        per_kilowatt_hour: price(price_text)?,
        currency: currency(currency_text)?,
    })
}

fn currency(text: &str) -> Result<String, String> {
    if (1..=8).contains(&text.chars().count()) && text.chars().all(char::is_alphabetic) {
        Ok(text.to_owned())
    } else {
        Err(format!("{text:?} is not a currency, such as EUR"))
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not key=value")),
    }
}

impl AgentArgs {
    /// How long the agent may make no progress where no service manager watches it.
    #[must_use]
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog_seconds.map(Duration::from_secs)
    }

    /// The settings, checked as far as they can be without the machine.
    ///
    /// # Errors
    /// The option that does not read.
    pub fn into_config(self) -> Result<AgentConfig, String> {
        let node = self
            .node
            .or_else(host_name)
            .ok_or("--node is not given, and this machine has no name")?;
        let memory_limit = self.memory_limit.map(|text| Quantity(text).bytes()).transpose();
        let usual = StoreOptions::default();
        let hub_endpoint = self.hub_endpoint.map_or(usual.hub_endpoint, |address| {
            address.trim_end_matches('/').to_owned()
        });
        Ok(AgentConfig {
            gateway_listen: self.gateway_listen,
            gateway_advertise: self.gateway_advertise,
            heartbeat: Duration::from_secs(self.heartbeat_seconds),
            memory_limit: memory_limit.map_err(|error| format!("--memory-limit: {error}"))?,
            labels: self.labels.into_iter().collect::<BTreeMap<_, _>>(),
            metrics_listen: self.metrics_listen,
            gpu_worker: self.gpu_worker,
            powercap_dir: self.powercap_dir,
            energy_price: self.energy_price.map(|per_kilowatt_hour| EnergyPrice {
                per_kilowatt_hour,
                currency: self.energy_currency,
            }),
            credential: self.token_file.map(|token_file| Credential {
                token_file,
                renew_after: self.token_renew_seconds.map(Duration::from_secs),
            }),
            store: StoreOptions {
                hub_endpoint,
                hub_token: self.hub_token,
                reserve_bytes: usual.reserve_bytes,
            },
            ..AgentConfig::new(node, self.data_dir)
        })
    }
}

/// The machine's own name, as Kubernetes would write it.
fn host_name() -> Option<String> {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .to_lowercase();
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(arguments: &[&str]) -> Result<AgentConfig, String> {
        let program = std::iter::once(&"freehold-node-agent");
        let parsed =
            Arguments::try_parse_from(program.chain(arguments)).map_err(|error| error.to_string())?;
        parsed.agent.into_config()
    }

    #[test]
    fn options_become_settings() {
        let arguments = [
            "--node",
            "pi",
            "--data-dir",
            "/d",
            "--memory-limit",
            "2Gi",
            "--label",
            "room=attic,gpu=none",
        ];
        let config = config(&arguments).expect("settings");
        assert_eq!((config.node.as_str(), config.memory_limit), ("pi", Some(2 << 30)));
        assert_eq!(config.labels.get("gpu").map(String::as_str), Some("none"));
    }

    #[test]
    fn what_does_not_read_is_named() {
        assert!(
            config(&["--node", "a", "--memory-limit", "lots"])
                .expect_err("no")
                .contains("--memory-limit")
        );
        assert!(
            config(&["--node", "a", "--label", "x"])
                .expect_err("no")
                .contains("key=value")
        );
        assert!(config(&["--node", "a", "--heartbeat-seconds", "0"]).is_err());
        for price in ["free", "-1", "NaN", "inf"] {
            let argument = format!("--energy-price={price}");
            assert!(
                config(&["--node", "a", &argument])
                    .expect_err("no")
                    .contains("such as 0.32")
            );
        }
    }
}
