//! `freehold-operator`: the controllers as a process of their own, for clusters.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum};
use freehold_operator::{Address, LeaderElection, OperatorConfig};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

/// Freehold's operator: plans what every machine runs and tells how it went. It finds the API by
/// KUBECONFIG, ~/.kube/config, or the service account of its pod.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    task: Option<Task>,
    /// Where /metrics, /healthz and /readyz are served.
    #[arg(long, env = "FREEHOLD_METRICS_LISTEN", default_value = "0.0.0.0:8080")]
    metrics_listen: SocketAddr,
    /// Work only while holding the leader's Lease; needed with more than one replica.
    #[arg(long, env = "FREEHOLD_LEADER_ELECT")]
    leader_elect: bool,
    /// Who this is, such as the pod's name; a random suffix makes it unique.
    #[arg(long, env = "FREEHOLD_IDENTITY", default_value = "freehold-operator")]
    identity: String,
    /// How log lines look. RUST_LOG chooses what is logged.
    #[arg(long, env = "FREEHOLD_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

/// What it does instead of operating.
#[derive(Debug, Subcommand)]
enum Task {
    /// Ask addresses until each has answered well, and say what was found; fails if one did not in time.
    Check {
        /// Seconds that each address has.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// Such as http://10.43.0.7:8080/readyz.
        #[arg(required = true)]
        addresses: Vec<Address>,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// For the eye.
    Text,
    /// One JSON object a line.
    Json,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match arguments.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    match run(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(error = format!("{error:#}"), "Ended");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments {
        task,
        metrics_listen,
        leader_elect,
        identity,
        log_format: _,
    } = arguments;
    if let Some(Task::Check { seconds, addresses }) = task {
        return check(&addresses, Duration::from_secs(seconds)).await;
    }
    // Fails only when a provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = kube::Client::try_default().await.context(
        "failed to find the Kubernetes API; set KUBECONFIG, or run in a pod with a service account",
    )?;
    let shutdown = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    let stop = shutdown.clone();
    tokio::spawn(async move {
        // Both arms only wait.
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("Stopping");
        stop.cancel();
    });
    let config = OperatorConfig {
        leader_election: leader_elect.then(LeaderElection::default),
        metrics_listen: Some(metrics_listen),
        identity: format!("{identity}-{:08x}", rand::random::<u32>()),
        forget_after: freehold_operator::FORGET_AFTER,
    };
    freehold_operator::run(config, client, shutdown).await?;
    Ok(())
}

async fn check(addresses: &[Address], within: Duration) -> anyhow::Result<()> {
    for address in addresses {
        freehold_operator::check(address, within)
            .await
            .with_context(|| format!("{address} is not well"))?;
        info!(%address, "Answered");
    }
    Ok(())
}
