//! Running helm and kubectl as a person would.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::parts::{cache, kubectl, part};
use serde_json::Value;

/// The chart of this tree.
#[must_use]
pub fn chart() -> PathBuf {
    crate::folder().join("../charts/freehold")
}

/// That of the version before: what people have who upgrade.
///
/// Nothing is released yet, so it is the chart as commit a2c3509 had it (`git archive a2c3509 charts/freehold`), under
/// the version 0.0.1. It lies here because the clone that is tested may be shallow; a release puts its own
/// chart in its place. None that is older will do for an upgrade under traffic: before that commit, a pod that ended
/// was gone before everybody had heard of it.
#[must_use]
pub fn previous_chart() -> PathBuf {
    crate::folder().join("chart/freehold-0.0.1")
}

/// What the official OpenAI client is told by a model at this address, or the last line of its complaint. What stands
/// in `enter` comes before the command, such as a way into another network.
///
/// # Errors
/// When there is no answer.
pub fn ask(enter: &[String], url: &str, model: &str) -> Result<String, String> {
    let [python, client] = client();
    let mut words = enter.to_vec();
    words.extend([python, client, url.to_owned(), model.to_owned()]);
    let (program, arguments) = words.split_first().ok_or("no command")?;
    let said = Said::of(&Command::new(program).args(arguments).output().unwrap());
    if said.good {
        Ok(said.out.trim().to_owned())
    } else {
        Err(said.errors.lines().last().unwrap_or_default().to_owned())
    }
}

/// Python with the official client, and the program that asks by it.
#[must_use]
pub fn client() -> [String; 2] {
    let python = cache().join("venv/bin/python");
    let client = crate::folder().join("clients/chat.py");
    [python.display().to_string(), client.display().to_string()]
}

/// Who runs commands, and against what.
#[derive(Debug)]
pub struct Person {
    kubeconfig: Option<PathBuf>,
    home: tempfile::TempDir,
}

/// What a command said.
#[derive(Debug)]
pub struct Said {
    /// Whether it ended well.
    pub good: bool,
    /// What it printed.
    pub out: String,
    /// What it complained of.
    pub errors: String,
}

impl Said {
    /// What a program said that has ended.
    #[must_use]
    pub fn of(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            good: output.status.success(),
            out: text(&output.stdout),
            errors: text(&output.stderr),
        }
    }

    /// What it printed; a panic with its words if it failed.
    pub fn unwrap(self) -> String {
        assert!(self.good, "{}\n{}", self.out, self.errors);
        self.out
    }

    /// What it complained of; a panic if it did not.
    pub fn unwrap_err(self) -> String {
        assert!(!self.good, "succeeded: {}", self.out);
        self.errors
    }
}

impl Person {
    /// One with this kubeconfig, or with none.
    #[must_use]
    pub fn new(kubeconfig: Option<&Path>) -> Self {
        Self {
            kubeconfig: kubeconfig.map(Path::to_owned),
            home: tempfile::tempdir().unwrap(),
        }
    }

    /// Any program, with this on its standard input.
    #[must_use]
    pub fn run(&self, program: &Path, arguments: &[&str], input: &str) -> Said {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("HOME", self.home.path())
            .env("XDG_CACHE_HOME", self.home.path())
            .env_remove("KUBECONFIG")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(kubeconfig) = &self.kubeconfig {
            command.env("KUBECONFIG", kubeconfig);
        }
        let mut child = command.spawn().unwrap();
        // A program that does not read its input may end before it is written.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        Said::of(&child.wait_with_output().unwrap())
    }

    /// helm, with values in YAML.
    #[must_use]
    pub fn helm(&self, arguments: &[&str], values: &str) -> Said {
        let file = self.home.path().join("values.yaml");
        std::fs::write(&file, values).unwrap();
        let mut all = arguments.to_vec();
        let takes_values = matches!(
            arguments.first(),
            Some(&("install" | "upgrade" | "template" | "lint"))
        );
        if takes_values {
            all.extend(["--values", file.to_str().unwrap()]);
        }
        self.run(&part("helm").unwrap(), &all, "")
    }

    /// kubectl, with this on its standard input.
    #[must_use]
    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Said {
        self.run(&kubectl().unwrap(), arguments, input)
    }

    /// Objects as kubectl gives them.
    #[must_use]
    pub fn get(&self, arguments: &[&str]) -> Vec<Value> {
        let mut all = vec!["get", "-o", "json"];
        all.extend(arguments);
        let list: Value = serde_json::from_str(&self.kubectl(&all, "").unwrap()).unwrap();
        match list.get("items").and_then(Value::as_array) {
            Some(items) => items.clone(),
            None => vec![list],
        }
    }
}

/// The objects of a manifest.
#[must_use]
pub fn objects(manifest: &str) -> Vec<Value> {
    manifest
        .split("\n---")
        .map(|text| serde_yaml::from_str::<Value>(text.trim_start_matches("---")))
        .map(Result::unwrap)
        .filter(|object| object.is_object())
        .collect()
}
