//! `freehold node`: makes this machine an agent of a cluster without being a node of it.
//!
//! ```text
//!  admin ──kubeconfig──▶ account of this machine alone ──token──▶ files ──▶ systemd or launchd ──▶ agent
//!        └─ `node token` ─▶ join token ─▶ `node join` on the machine, which never sees the admin's kubeconfig
//! ```
//! [`cluster`] makes the account, [`layout`] says what lies where, [`unit`] and [`plist`] are the service,
//! [`service`] speaks to its manager. The agent renews its token itself.

mod cluster;
mod join;
mod join_token;
mod layout;
mod leave;
mod plist;
mod program;
mod service;
mod status;
mod unit;
mod upgrade;

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use clap::{Args, Subcommand};

/// Settings of `freehold node`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a join token for one machine, with your own rights in the cluster
    Token(join_token::Arguments),
    /// Make this machine an agent of a cluster: a credential of its own, a service that runs
    Join(join::Arguments),
    /// Undo that: the service, its files, and what stands for this machine in the cluster
    Leave(leave::Arguments),
    /// Put a newer agent in place; the old one comes back if the new one does not become ready
    Upgrade(upgrade::Arguments),
    /// Say whether this machine's agent runs, how long its credential lasts, and what the cluster sees of it
    Status(status::Arguments),
}

/// The administrator's way into the cluster.
#[derive(Args, Clone, Debug, Default)]
pub struct Admin {
    /// Kubeconfig of one who may make accounts and bind roles; else $KUBECONFIG, else ~/.kube/config
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Address of the API server as this machine reaches it, if not the one in the kubeconfig
    #[arg(long, value_name = "URL")]
    server: Option<String>,
}

/// Runs `freehold node`.
///
/// # Errors
/// What went wrong, with what to do about it.
pub async fn run(arguments: Arguments) -> Result<()> {
    match arguments.command {
        Command::Token(arguments) => join_token::run(arguments).await,
        Command::Join(arguments) => join::run(arguments).await,
        Command::Leave(arguments) => leave::run(arguments).await,
        Command::Upgrade(arguments) => upgrade::run(&arguments),
        Command::Status(arguments) => status::run(&arguments).await,
    }
}

fn need_root(what: &str) -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "{what} writes to folders of the system and starts a service: run it with sudo, or look first with --dry-run where there is one"
    );
    Ok(())
}

/// The name becomes that of the machine's objects and the end of its account's.
fn check_name(node: &str) -> Result<()> {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let fits = |part: &str| {
        !part.is_empty() && part.bytes().all(inner) && !part.starts_with('-') && !part.ends_with('-')
    };
    if node == "freehold-operator" {
        bail!("a machine cannot be called {node:?}: the operators' Lease bears that name");
    }
    ensure!(
        node.len() <= 200 && node.split('.').all(fits),
        "a machine cannot be called {node:?}: a name has lower-case letters, digits, '-' and '.', at most 200 of them; give one with --node"
    );
    Ok(())
}

/// This machine's own name, as Kubernetes would write it.
fn host_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_named_as_kubernetes_names_nodes() {
        for name in ["attic-pc", "a.lan", "x"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in [
            "",
            "Attic",
            "a_b",
            "-a",
            "a..b",
            "freehold-operator",
            &"a".repeat(201),
        ] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }
}
