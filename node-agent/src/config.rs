//! Settings of an agent.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::credential::Credential;
use crate::energy::EnergyPrice;
use crate::store::StoreOptions;

/// Renewals a minute: five, which leaves room for a status within six writes a minute. The operator
/// takes a machine as silent after 40 s, which is three renewals missed.
const HEARTBEAT: Duration = Duration::from_secs(12);

/// Where Linux shows RAPL.
pub(crate) const POWERCAP: &str = "/sys/class/powercap";

/// Settings of an agent.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Name of this machine: of its Lease and of its InferenceNode.
    pub node: String,
    /// Folder of the agent's own files: models, last accepted spec, audit, sockets.
    pub data_dir: PathBuf,
    /// Where the gateway listens; port 0 takes any free one.
    pub gateway_listen: SocketAddr,
    /// Host, or host and port, under which other machines and people reach the gateway; the address
    /// that it listens on if absent.
    pub gateway_advertise: Option<String>,
    /// The program that runs a worker; this program if absent.
    pub worker_program: Option<PathBuf>,
    /// The program that runs workers on the GPU, if it is not that one.
    pub gpu_worker: Option<PathBuf>,
    /// Its arguments in front of those of the worker.
    pub worker_arguments_prefix: Vec<String>,
    /// Time between two renewals of the Lease.
    pub heartbeat: Duration,
    /// Memory that all models together may take, in bytes; found out if absent.
    pub memory_limit: Option<u64>,
    /// Labels of the machine, for node selectors.
    pub labels: BTreeMap<String, String>,
    /// Settings of the model store.
    pub store: StoreOptions,
    /// Where `/metrics`, `/healthz` and `/readyz` of the agent are served, if anywhere.
    pub metrics_listen: Option<SocketAddr>,
    /// The kernel's folder of energy counters.
    pub powercap_dir: PathBuf,
    /// What a kilowatt hour costs here, if that shall be told.
    pub energy_price: Option<EnergyPrice>,
    /// The token that the agent keeps fresh itself; None where something else does, as the kubelet does.
    pub credential: Option<Credential>,
}

impl AgentConfig {
    /// The usual settings: gateway on loopback, on the usual port; workers are this same program.
    pub fn new(node: impl Into<String>, data_dir: impl Into<PathBuf>) -> Self {
        Self {
            node: node.into(),
            data_dir: data_dir.into(),
            gateway_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, freehold_crds::DEFAULT_GATEWAY_PORT)),
            gateway_advertise: None,
            worker_program: None,
            gpu_worker: None,
            worker_arguments_prefix: vec!["worker".to_owned()],
            heartbeat: HEARTBEAT,
            memory_limit: None,
            labels: BTreeMap::new(),
            store: StoreOptions::default(),
            metrics_listen: None,
            powercap_dir: PathBuf::from(POWERCAP),
            energy_price: None,
            credential: None,
        }
    }

    /// Base address of the gateway, for status and for other machines.
    pub(crate) fn gateway_url(&self, listening: SocketAddr) -> String {
        match &self.gateway_advertise {
            Some(host) if host.contains("://") => host.clone(),
            Some(host) if host.parse::<std::net::Ipv6Addr>().is_ok() => {
                format!("http://[{host}]:{}", listening.port())
            }
            Some(host) if host.parse::<SocketAddr>().is_ok() || host.contains(':') => {
                format!("http://{host}")
            }
            Some(host) => format!("http://{host}:{}", listening.port()),
            None => format!("http://{listening}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advertised_addresses_are_whole() {
        let listening: SocketAddr = "0.0.0.0:11480".parse().expect("an address");
        let mut config = AgentConfig::new("n", "/d");
        for (host, url) in [
            ("10.0.0.7", "http://10.0.0.7:11480"),
            ("pi-3", "http://pi-3:11480"),
            ("pi-3:80", "http://pi-3:80"),
            ("fd00::7", "http://[fd00::7]:11480"),
            ("[fd00::7]:80", "http://[fd00::7]:80"),
            ("https://models.lan", "https://models.lan"),
        ] {
            config.gateway_advertise = Some(host.to_owned());
            assert_eq!(config.gateway_url(listening), url);
        }
    }
}
