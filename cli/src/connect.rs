//! Finding the API: the kubeconfig that is named, the one of `freehold up` on this machine, or the user's.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use crate::all_in_one::default_data_dir;

/// Which API to talk to.
#[derive(Args, Clone, Debug, Default)]
pub struct Connection {
    /// Kubeconfig of the API; else $KUBECONFIG, else that of `freehold up` on this machine, else ~/.kube/config
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace; that of the kubeconfig if absent
    #[arg(long, short, value_name = "NAME")]
    pub namespace: Option<String>,
}

impl Connection {
    /// A client, and the namespace to use.
    ///
    /// # Errors
    /// When no kubeconfig is found or it cannot be used.
    pub async fn client(&self) -> Result<(Client, String)> {
        let local = default_data_dir().join("kubeconfig");
        let chosen = match (&self.kubeconfig, std::env::var_os("KUBECONFIG")) {
            (Some(path), _) => Some(path.clone()),
            (None, None) if local.is_file() => Some(local),
            _ => None,
        };
        let config = match chosen {
            Some(path) => {
                let kubeconfig = Kubeconfig::read_from(&path).with_context(|| format!("failed to read {}", path.display()))?;
                Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.with_context(|| format!("failed to use {}", path.display()))?
            }
            None => Config::infer().await.context("no API is known: start one with `freehold up`, or name a kubeconfig with --kubeconfig or KUBECONFIG")?,
        };
        let namespace = self
            .namespace
            .clone()
            .unwrap_or_else(|| config.default_namespace.clone());
        Ok((Client::try_from(config)?, namespace))
    }
}
