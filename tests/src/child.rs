//! A program that ends with the test that started it, however the test ends.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

use anyhow::{Context, Result};

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub struct Program {
    name: String,
    log: PathBuf,
    child: Child,
    /// The thread that started the program waits for this to close: the kernel kills the program when its
    /// starter ends, which covers a test process that is itself killed.
    _starter: mpsc::Sender<()>,
}

impl Program {
    /// Starts `command` with its output in `folder`.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(name: &str, command: &Path, arguments: &[String], folder: &Path) -> Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let output = File::create(&log).with_context(|| format!("failed to create {log:?}"))?;
        let errors = output.try_clone().context("failed to share the log")?;
        let mut command = bound_to_starter(command);
        command
            .args(arguments)
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
        let (starter, ends) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            let _ = tell.send(command.spawn());
            let _ = ends.recv();
        });
        let child = told.recv().context("the starter ended")?;
        Ok(Self {
            name: name.to_owned(),
            log,
            child: child.with_context(|| format!("failed to start {name}"))?,
            _starter: starter,
        })
    }

    /// Why it is not running any more, if so.
    pub fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok().flatten()?;
        Some(format!(
            "{} ended with {status}:\n{}",
            self.name,
            self.last_words()
        ))
    }

    /// The end of its log.
    #[must_use]
    pub fn last_words(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills it at once, as a power cut would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
    }
}

/// On Linux `setpriv` asks the kernel to kill the program when its starter is gone.
fn bound_to_starter(program: &Path) -> Command {
    let setpriv = Path::new("/usr/bin/setpriv");
    if !setpriv.is_file() {
        return Command::new(program);
    }
    let mut command = Command::new(setpriv);
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}
