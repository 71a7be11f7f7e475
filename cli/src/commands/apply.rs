//! `freehold apply`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;

use crate::connect::Connection;
use crate::manifests;
use crate::sync::{self, Applied};

/// Settings of `freehold apply`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// File, folder, or - for standard input; may be given several times
    #[arg(short, long, required = true, value_name = "PATH")]
    pub filename: Vec<PathBuf>,
    /// Check everything and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// The API.
    #[command(flatten)]
    pub connection: Connection,
}

/// Applies manifests.
///
/// # Errors
/// When a manifest does not read (nothing is applied then), or the API refuses one.
pub async fn run(arguments: Arguments) -> Result<()> {
    let mut all = Vec::new();
    for path in &arguments.filename {
        all.extend(manifests::read(path)?);
    }
    if all.is_empty() {
        bail!("there are no manifests in what -f names");
    }
    let (client, namespace) = arguments.connection.client().await?;
    let mut failed = 0;
    for manifest in &all {
        match sync::apply(&client, manifest, &namespace, arguments.dry_run).await {
            Ok((object, applied)) => {
                let word = match applied {
                    Applied::Created => "created",
                    Applied::Configured => "configured",
                    Applied::Unchanged => "unchanged",
                };
                let note = if arguments.dry_run { " (dry run)" } else { "" };
                println!("{} {word}{note}", manifests::title(&object));
            }
            Err(error) => {
                failed += 1;
                eprintln!("error: {error:#}");
            }
        }
    }
    if failed > 0 {
        bail!(
            "{failed} of {} objects were refused; the others were applied",
            all.len()
        );
    }
    Ok(())
}
