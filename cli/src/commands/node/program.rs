//! The agent's program: finding one that runs, and putting it in place.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::layout::write;

const NAME: &str = "freehold-node-agent";

/// An agent's program, and what it says of its version.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) path: PathBuf,
    pub(super) version: String,
}

impl Program {
    /// The one that is named, or the one beside this command, or the one in PATH.
    pub(super) fn find(named: Option<&Path>) -> Result<Self> {
        let path = match named {
            Some(path) => path.to_owned(),
            None => Self::nearby().with_context(|| {
                format!("no {NAME} lies beside this command or in PATH: name one with --agent")
            })?,
        };
        let version = version(&path)?;
        Ok(Self { path, version })
    }

    fn nearby() -> Option<PathBuf> {
        let beside = std::env::current_exe()
            .ok()
            .and_then(|own| Some(own.parent()?.join(NAME)));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let in_path = std::env::split_paths(&path).map(|folder| folder.join(NAME));
        beside.into_iter().chain(in_path).find(|path| path.is_file())
    }

    /// Copies it to where the service expects it, in one step: a running one is not disturbed.
    pub(super) fn install(&self, target: &Path) -> Result<()> {
        if fs::canonicalize(&self.path).ok() == fs::canonicalize(target).ok() && target.exists() {
            return Ok(());
        }
        let content =
            fs::read(&self.path).with_context(|| format!("failed to read {}", self.path.display()))?;
        write(target, 0o755, &content)
    }
}

/// What a program says of itself.
fn version(path: &Path) -> Result<String> {
    let output = Command::new(path)
        .arg("--version")
        .env_clear()
        .output()
        .with_context(|| {
            format!(
                "failed to run {}; is it built for this machine's processor?",
                path.display()
            )
        })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.trim().strip_prefix(NAME).map(str::trim);
    ensure!(
        output.status.success() && version.is_some(),
        "{} is no {NAME}: asked for its version, it said {:?}",
        path.display(),
        text.trim()
    );
    Ok(version.unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_agent_is_not_installed() {
        let error = Program::find(Some(Path::new("/bin/echo")))
            .expect_err("no agent")
            .to_string();
        assert!(error.contains("is no freehold-node-agent"), "{error}");
        let error = Program::find(Some(Path::new("/nowhere/agent")))
            .expect_err("no file")
            .to_string();
        assert!(error.contains("failed to run"), "{error}");
    }
}
