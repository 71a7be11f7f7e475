//! Speaking to systemd and launchd, by their own commands.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::layout::{Layout, Platform};
use super::plist::LABEL;

const UNIT: &str = "freehold-node-agent.service";
/// launchd does not tell when a service is ready; its gateway does.
const READY: Duration = Duration::from_secs(90);
/// An agent that ends so soon after it said that it is ready is not.
const SETTLE: Duration = Duration::from_secs(3);

/// The agent as its service manager knows it.
pub(super) struct Service<'a> {
    layout: &'a Layout,
    gateway: String,
}

impl<'a> Service<'a> {
    /// `gateway` is where the agent's gateway listens, as `host:port`.
    pub(super) fn new(layout: &'a Layout, gateway: String) -> Self {
        Self { layout, gateway }
    }

    /// What [`Self::enable`] does, for people.
    pub(super) fn commands(&self) -> Vec<String> {
        match self.layout.platform {
            Platform::Systemd => vec![
                "systemctl daemon-reload".to_owned(),
                format!("systemctl enable {UNIT}"),
                format!("systemctl restart {UNIT}"),
            ],
            Platform::Launchd => vec![format!(
                "launchctl bootstrap system {}",
                self.layout.service.display()
            )],
        }
    }

    /// Starts it, now and with the machine. Returns once it is ready.
    pub(super) fn enable(&self) -> Result<()> {
        match self.layout.platform {
            Platform::Systemd => {
                run("systemctl", &["daemon-reload"])?;
                run("systemctl", &["enable", "--quiet", UNIT])?;
                self.restart()
            }
            Platform::Launchd => {
                let _ = run("launchctl", &["bootout", &target()]);
                run("launchctl", &["bootstrap", "system", &text(&self.layout.service)])?;
                self.until_ready()
            }
        }
    }

    /// Starts it anew. Returns once it is ready and stays so.
    pub(super) fn restart(&self) -> Result<()> {
        match self.layout.platform {
            Platform::Systemd => run("systemctl", &["restart", UNIT]).map(drop),
            Platform::Launchd => run("launchctl", &["kickstart", "-k", &target()]).map(drop),
        }
        .with_context(|| format!("the agent did not start:\n{}", self.last_words()))?;
        self.until_ready()
    }

    /// Stops it, now and for good. It need not be there.
    pub(super) fn disable(&self) -> Result<()> {
        if !self.layout.service.exists() {
            return Ok(());
        }
        match self.layout.platform {
            Platform::Systemd => {
                run("systemctl", &["disable", "--quiet", "--now", UNIT])?;
            }
            Platform::Launchd => {
                if self.is_active() {
                    run("launchctl", &["bootout", &target()])?;
                }
            }
        }
        Ok(())
    }

    /// After its file is gone.
    pub(super) fn forget(&self) -> Result<()> {
        if self.layout.platform == Platform::Systemd {
            run("systemctl", &["daemon-reload"])?;
            // What it remembers of a unit that failed.
            let _ = run("systemctl", &["reset-failed", UNIT]);
        }
        Ok(())
    }

    pub(super) fn is_active(&self) -> bool {
        match self.layout.platform {
            Platform::Systemd => run("systemctl", &["is-active", "--quiet", UNIT]).is_ok(),
            Platform::Launchd => run("launchctl", &["print", &target()]).is_ok(),
        }
    }

    /// What the manager says of it, in a line.
    pub(super) fn describe(&self) -> String {
        match self.layout.platform {
            Platform::Systemd => {
                let shown = run(
                    "systemctl",
                    &["show", UNIT, "--property=ActiveState,SubState,NRestarts,MainPID"],
                );
                shown.map_or_else(
                    |error| format!("{error:#}"),
                    |text| text.trim().replace('\n', " "),
                )
            }
            Platform::Launchd => if self.is_active() { "loaded" } else { "not loaded" }.to_owned(),
        }
    }

    /// Whether its gateway answers.
    pub(super) fn answers(&self) -> bool {
        use std::io::{Read, Write};
        use std::net::ToSocketAddrs;
        let ask = || -> std::io::Result<bool> {
            let patience = Duration::from_secs(5);
            let address = self.gateway.to_socket_addrs()?.next();
            let address = address.ok_or_else(|| std::io::Error::other("no address"))?;
            let mut stream = std::net::TcpStream::connect_timeout(&address, patience)?;
            stream.set_read_timeout(Some(patience))?;
            stream.write_all(b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
            let mut answer = [0; 16];
            stream.read_exact(&mut answer)?;
            Ok(answer.starts_with(b"HTTP/1.") && answer.get(9..12) == Some(b"200"))
        };
        ask().unwrap_or(false)
    }

    fn until_ready(&self) -> Result<()> {
        let begun = Instant::now();
        while !self.answers() {
            ensure!(
                begun.elapsed() < READY && self.is_active(),
                "the agent runs, but its gateway at {} does not answer:\n{}",
                self.gateway,
                self.last_words()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        std::thread::sleep(SETTLE);
        if !self.is_active() || !self.answers() {
            bail!(
                "the agent ended soon after it had started:\n{}",
                self.last_words()
            );
        }
        Ok(())
    }

    /// The end of its log.
    fn last_words(&self) -> String {
        let words = match self.layout.platform {
            Platform::Systemd => run(
                "journalctl",
                &["--unit", UNIT, "--lines", "10", "--no-pager", "--output", "cat"],
            ),
            Platform::Launchd => run("tail", &["-n", "10", "/Library/Logs/freehold-node-agent.log"]),
        };
        words.unwrap_or_default()
    }
}

fn target() -> String {
    format!("system/{LABEL}")
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("failed to run {program}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{program} {} ended with {}: {}",
        arguments.join(" "),
        output.status,
        errors.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
