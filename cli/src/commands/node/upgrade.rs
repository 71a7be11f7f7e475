//! `freehold node upgrade`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use super::layout::{Layout, Platform};
use super::need_root;
use super::program::Program;
use super::service::Service;
use super::status::gateway_of;

/// Settings of `freehold node upgrade`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// The new agent; the one beside this command or in PATH if absent
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

/// Puts a newer agent in place.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    need_root("upgrading")?;
    let layout = Layout::of(Platform::here()?);
    let node = layout.joined()?;
    let target = &layout.program;
    let old = Program::find(Some(target)).context("the agent that is in place does not run")?;
    let new = Program::find(arguments.agent.as_deref())?;
    ensure!(
        fs::canonicalize(&new.path)? != fs::canonicalize(target)?,
        "{} is the agent that is in place: name the new one with --agent",
        new.path.display()
    );
    if fs::read(&new.path)? == fs::read(target)? {
        println!("{node} runs this very agent already ({})", old.version);
        return Ok(());
    }
    let service = Service::new(&layout, gateway_of(&layout));
    let previous = target.with_extension("previous");
    let _ = fs::remove_file(&previous);
    // A second name for the old one: what runs keeps its file, and it comes back by renaming.
    fs::hard_link(target, &previous).with_context(|| format!("failed to keep {}", previous.display()))?;
    new.install(target)?;
    if let Err(failed) = service.restart() {
        fs::rename(&previous, target).with_context(|| {
            format!(
                "the new agent is not ready ({failed:#}), and {} could not be put back",
                previous.display()
            )
        })?;
        service
            .restart()
            .context("the new agent is not ready, the old one was put back, and does not start either")?;
        bail!(
            "the new agent ({}) did not become ready, so the old one ({}) was put back and runs: {failed:#}",
            new.version,
            old.version
        );
    }
    fs::remove_file(&previous).with_context(|| format!("failed to remove {}", previous.display()))?;
    println!("{node} runs {} now; it was {}", new.version, old.version);
    Ok(())
}
