//! `freehold-node-agent`: the agent of one machine, and, as `worker`, the processes that it starts.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use freehold_node_agent::args::{AgentArgs, Arguments, Command};
use freehold_node_agent::{Agent, service, worker};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,kube=warn"));
    // stdout is the worker's line to its agent.
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let arguments = Arguments::parse();
    match arguments.command {
        Some(Command::Worker(arguments)) => worker::run(&arguments),
        None => match run(arguments.agent) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                tracing::error!("{error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

#[tokio::main]
async fn run(arguments: AgentArgs) -> anyhow::Result<()> {
    let watchdog = arguments.watchdog();
    let config = arguments.into_config().map_err(anyhow::Error::msg)?;
    let client = kube::Client::try_default()
        .await
        .context("failed to find the API; set KUBECONFIG, or run inside a cluster")?;
    let shutdown = CancellationToken::new();
    let agent = Agent::start(config, client, shutdown.clone()).await?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    service::ready();
    // Signals are levels that stay until they are taken, and a beat that is dropped is sent anew by nobody.
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        () = service::beat(&agent, watchdog) => {}
    }
    service::stopping();
    shutdown.cancel();
    agent.join().await;
    Ok(())
}
