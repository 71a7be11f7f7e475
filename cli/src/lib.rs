//! The command that people use, and the all-in-one: control plane, operator and agent in one process.
//!
//! Each command is a module in [`commands`]; what they share stands beside it. Start reading at [`main`].

// A command line prints: that is what it is for.
#![allow(clippy::print_stdout)]

pub mod all_in_one;
pub mod commands;
pub mod connect;
pub mod manifests;
pub mod output;
pub mod sync;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Freehold runs AI models on hardware that you own, as your YAML says.
#[derive(Debug, Parser)]
#[command(name = "freehold", version, propagate_version = true, max_term_width = 100)]
#[command(
    after_help = "First steps:\n  freehold demo            fetch a small model, deploy it, ask it a question\n  freehold up              run everything on this machine, until Ctrl-C\n  freehold apply -f FILE   deploy what a manifest says\n  freehold chat NAME       talk to it"
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What `freehold` can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the whole way on one machine: fetch, deploy, ask, govern
    Demo(commands::demo::Arguments),
    /// Run control plane, operator and agent on this machine, until Ctrl-C
    Up(commands::up::Arguments),
    /// Create or change what manifests describe (server-side apply)
    Apply(commands::apply::Arguments),
    /// Show objects as tables, YAML or JSON
    Get(commands::get::Arguments),
    /// Delete objects
    Delete(commands::delete::Arguments),
    /// Talk to a deployed model
    Chat(commands::chat::Arguments),
    /// Show where models would run and why, without touching anything
    Plan(commands::plan::Arguments),
    /// Say what is wrong with this machine or a deployment, and what to do
    Doctor(commands::doctor::Arguments),
    /// Measure how fast this machine runs a model
    Bench(commands::bench::Arguments),
    /// Say what a model file holds, what memory it needs, and whether it is sound
    Inspect(commands::inspect::Arguments),
    /// Make this machine an agent of a cluster, without being a node of it
    Node(commands::node::Arguments),
    /// Make an API key and the hash of it that a GovernancePolicy holds
    Key(commands::key::Arguments),
    /// Print the version
    Version,
    /// Print a script that completes commands in your shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Runs one model; started by the agent
    #[command(hide = true)]
    Worker(freehold_node_agent::worker::WorkerArgs),
}

/// Runs the command line.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // Fails only when a provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let default = match cli.command {
        Command::Up(_) => "info,kube=warn,freehold_control_plane=warn",
        Command::Worker(_) => "info",
        _ => "warn",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    if let Command::Worker(arguments) = &cli.command {
        return freehold_node_agent::worker::run(arguments);
    }
    // Few threads: the arithmetic runs in the workers, and each idle thread costs memory.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(run(cli.command)),
        Err(error) => Err(error.into()),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo(arguments) => commands::demo::run(arguments).await?,
        Command::Up(arguments) => commands::up::run(arguments).await?,
        Command::Apply(arguments) => commands::apply::run(arguments).await?,
        Command::Get(arguments) => commands::get::run(arguments).await?,
        Command::Delete(arguments) => commands::delete::run(arguments).await?,
        Command::Chat(arguments) => commands::chat::run(arguments).await?,
        Command::Plan(arguments) => commands::plan::run(&arguments)?,
        Command::Doctor(arguments) => return commands::doctor::run(arguments).await,
        Command::Bench(arguments) => commands::bench::run(arguments).await?,
        Command::Inspect(arguments) => return commands::inspect::run(&arguments),
        Command::Node(arguments) => commands::node::run(arguments).await?,
        Command::Key(arguments) => commands::key::run(&arguments),
        Command::Version => println!("freehold {}", env!("CARGO_PKG_VERSION")),
        Command::Completions { shell } => {
            let mut command = <Cli as clap::CommandFactory>::command();
            clap_complete::generate(shell, &mut command, "freehold", &mut std::io::stdout());
        }
        Command::Worker(_) => {}
    }
    Ok(ExitCode::SUCCESS)
}
