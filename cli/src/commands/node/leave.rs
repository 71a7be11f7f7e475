//! `freehold node leave`.

use anyhow::{Context, Result};
use clap::Args;

use super::cluster::Release;
use super::layout::{self, Layout, Platform};
use super::service::Service;
use super::{Admin, need_root};

/// Settings of `freehold node leave`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// The cluster that it leaves.
    #[command(flatten)]
    admin: Admin,
    /// Leave the cluster's objects for an administrator to delete: only this machine is cleared
    #[arg(long, conflicts_with_all = ["kubeconfig", "server"])]
    local_only: bool,
    /// Remove the models and the audit records too
    #[arg(long)]
    purge: bool,
}

/// Leaves.
pub(super) async fn run(arguments: Arguments) -> Result<()> {
    need_root("leaving")?;
    let layout = Layout::of(Platform::here()?);
    let node = layout.joined()?;
    // What may be refused first: a machine that is half gone is worse than one that stays.
    let cluster = if arguments.local_only {
        None
    } else {
        let (client, _) = arguments.admin.connect().await.context(
            "an administrator's kubeconfig is needed to delete what stands for this machine; without one: --local-only",
        )?;
        let release = Release::find(&client).await?;
        Some((client, release))
    };
    let service = Service::new(&layout, String::new());
    service.disable()?;
    println!("Stopped the agent");
    if let Some((client, release)) = cluster {
        for gone in release.forget(&client, &node).await? {
            println!("Deleted {gone}");
        }
    }
    let previous = layout.program.with_extension("previous");
    let mut paths = vec![layout.service.clone(), layout.program.clone(), previous];
    paths.extend(layout.settings.clone());
    // systemd lets a folder of a user that it makes up lie elsewhere, behind a link.
    let real = std::fs::canonicalize(&layout.data).unwrap_or_else(|_| layout.data.clone());
    if arguments.purge {
        paths.push(layout.data.clone());
        paths.push(real);
    } else {
        paths.push(layout.credential());
        paths.push(real.join("spec.json"));
    }
    for path in paths {
        if layout::remove(&path)? {
            println!("Removed {}", path.display());
        }
    }
    service.forget()?;
    if !arguments.purge && layout.data.exists() {
        println!(
            "Models and audit records stay in {} (--purge removes them)",
            layout.data.display()
        );
    }
    if arguments.local_only {
        println!(
            "In the cluster {node} still has an account: an administrator deletes it with its bindings, its Lease and inferencenode {node}"
        );
    }
    println!("{node} has left");
    Ok(())
}
