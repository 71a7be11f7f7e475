//! `freehold up`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use tokio_util::sync::CancellationToken;

use crate::all_in_one::{AllInOne, Settings, default_data_dir};
use crate::sync::FolderSync;

/// Settings of `freehold up`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Keep this folder applied: what is in it runs, what leaves it is removed
    #[arg(long, env = "FREEHOLD_MANIFESTS", value_name = "DIR")]
    pub manifests: Option<PathBuf>,
    /// Where things lie and listen.
    #[command(flatten)]
    pub settings: Settings,
}

/// Runs everything until Ctrl-C.
///
/// # Errors
/// What could not be started or stopped.
pub async fn run(arguments: Arguments) -> Result<()> {
    let data_dir = arguments
        .settings
        .data_dir
        .clone()
        .unwrap_or_else(default_data_dir);
    let all = AllInOne::start(&arguments.settings, &data_dir).await?;
    println!("OpenAI API    {}", all.base_url());
    println!("kubectl       export KUBECONFIG={}", all.kubeconfig().display());
    let shutdown = CancellationToken::new();
    let sync = match &arguments.manifests {
        Some(folder) => {
            let sync = FolderSync::new(all.client(), folder, "default")?;
            println!("Manifests     {} is kept applied", folder.display());
            Some(tokio::spawn(sync.run(shutdown.clone())))
        }
        None => None,
    };
    println!("Stop with Ctrl-C.");
    wait_for_signal().await?;
    shutdown.cancel();
    if let Some(sync) = sync {
        let _ = sync.await;
    }
    all.stop().await
}

/// Ends at Ctrl-C or SIGTERM.
///
/// # Errors
/// When signals cannot be listened for.
pub async fn wait_for_signal() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    // Both arms only wait.
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}
