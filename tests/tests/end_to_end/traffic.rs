//! A person's program in a pod of its own, calling a model.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use freehold_tests::child::Program;
use freehold_tests::person::{ask, client};
use serde_json::{Value, json};

use crate::world::{PATIENCE, World, network_of};

/// A pod that waits, in whose network clients run.
pub struct Desk {
    /// What stands before a program that shall run there.
    enter: Vec<String>,
}

impl Desk {
    pub async fn on(world: &World, node: &str) -> Self {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "desk", "namespace": "default"},
            "spec": {"nodeName": node, "terminationGracePeriodSeconds": 1,
                "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [{"name": "desk", "image": "localhost/pause:1", "imagePullPolicy": "Never",
                    "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}]}});
        world
            .until("a pod for clients is there", || {
                let said = world.person.kubectl(&["apply", "-f", "-"], &pod.to_string());
                if said.good { Ok(()) } else { Err(said.errors) }
            })
            .await;
        let look = || {
            let pod = world.person.get(&["pod", "desk"]).remove(0);
            let address = pod["status"]["podIP"].as_str().map(str::to_owned);
            address.ok_or_else(|| pod["status"].to_string())
        };
        let (address, _) = world.until("it has an address", look).await;
        Self {
            enter: [vec!["nsenter".to_owned()], network_of(world.node(node), &address)].concat(),
        }
    }

    /// What stands behind `nsenter` for a program that shall run there.
    pub fn network(&self) -> &[String] {
        &self.enter[1..]
    }

    /// One question.
    pub fn ask(&self, url: &str, model: &str) -> Result<String, String> {
        ask(&self.enter, url, model)
    }

    /// Question after question, until it is dropped.
    pub fn traffic(&self, world: &World, name: &str, url: &str, model: &str) -> Traffic {
        let mut arguments = self.enter[1..].to_vec();
        arguments.extend(client());
        arguments.extend([url.to_owned(), model.to_owned(), "--forever".to_owned()]);
        let folder = world.cluster.server.folder();
        let program = std::path::Path::new("/usr/bin/nsenter");
        let program = Program::start(name, program, &arguments, folder).unwrap();
        Traffic {
            _program: program,
            log: folder.join(format!("{name}.log")),
            name: name.to_owned(),
        }
    }
}

/// Questions under way.
pub struct Traffic {
    _program: Program,
    log: PathBuf,
    name: String,
}

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs_f64()
}

impl Traffic {
    fn answers(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.log).unwrap();
        text.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// Waits until `count` questions in a row that were asked from now on are answered well. The time until
    /// the first of them was asked.
    pub async fn until_well(&self, world: &World, why: &str, count: usize) -> Duration {
        let (asked, begun) = (now(), Instant::now());
        loop {
            let answers = self.answers();
            let since: Vec<&Value> = answers
                .iter()
                .filter(|a| a["at"].as_f64().unwrap() >= asked)
                .collect();
            let well = since.iter().rev().take_while(|a| a["problem"].is_null()).count();
            if well >= count {
                let first = since[since.len() - well]["at"].as_f64().unwrap();
                let bad: Vec<&&Value> = since.iter().filter(|a| !a["problem"].is_null()).collect();
                println!(
                    "{}: {why}: well after {:.1} s; {} of {} questions failed on the way {:?}",
                    self.name,
                    first - asked,
                    bad.len(),
                    since.len(),
                    bad.first().map(|a| a["problem"].to_string()),
                );
                return Duration::from_secs_f64((first - asked).max(0.0));
            }
            assert!(begun.elapsed() < PATIENCE, "{why}: {since:?}\n{}", world.pods());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// What was said of those that failed.
    pub fn problems(&self) -> Vec<String> {
        let answers = self.answers();
        let failed = answers.iter().filter(|a| !a["problem"].is_null());
        failed.map(Value::to_string).collect()
    }

    /// How many of those asked so far failed, and how many there were.
    pub fn count(&self) -> (usize, usize) {
        let answers = self.answers();
        (
            answers.iter().filter(|a| !a["problem"].is_null()).count(),
            answers.len(),
        )
    }
}
