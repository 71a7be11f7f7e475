//! What the statuses told while something happened: watches, from before it until after.

use std::path::PathBuf;

use freehold_tests::child::Program;
use freehold_tests::parts::kubectl;
use serde_json::Value;

use crate::world::{World, condition};

/// Watches of some objects.
pub struct Watches {
    logs: Vec<PathBuf>,
    _programs: Vec<Program>,
}

impl Watches {
    /// Of each object, as kubectl's words for it. Each is seen once already.
    pub async fn of(world: &World, name: &str, objects: &[&[&str]]) -> Self {
        let folder = world.cluster.server.folder();
        let mut watches = Self {
            logs: Vec::new(),
            _programs: Vec::new(),
        };
        for (number, object) in objects.iter().enumerate() {
            let name = format!("{name}-{number}");
            let mut arguments = vec![format!(
                "--kubeconfig={}",
                world.cluster.server.kubeconfig().display()
            )];
            arguments.extend(["get", "--watch", "--output-watch-events", "--output=json"].map(str::to_owned));
            arguments.extend(object.iter().map(|&word| word.to_owned()));
            let program = Program::start(&name, &kubectl().unwrap(), &arguments, folder);
            watches._programs.push(program.unwrap());
            watches.logs.push(folder.join(format!("{name}.log")));
        }
        world
            .until("the watches have begun", || {
                let seen: Vec<usize> = (0..objects.len()).map(|n| watches.objects(n).len()).collect();
                if seen.iter().all(|count| *count > 0) {
                    Ok(())
                } else {
                    Err(format!("{seen:?}"))
                }
            })
            .await;
        watches
    }

    /// All that one of them was, in the order in which it was so.
    pub fn objects(&self, number: usize) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.logs[number]).unwrap();
        let events = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        // The last may be half written.
        events
            .map_while(Result::ok)
            .map(|mut event| event["object"].take())
            .collect()
    }

    /// What is to be seen of it, one after the other, without the same twice in a row.
    pub fn story<T: PartialEq>(&self, number: usize, view: impl Fn(&Value) -> T) -> Vec<T> {
        let mut story: Vec<T> = self.objects(number).iter().map(view).collect();
        story.dedup();
        story
    }
}

/// A deployment's word on itself and on one machine's replica: is it Ready, how many answer, how often was the
/// worker there restarted, where it stands.
pub fn of_model(model: &Value, node: &str) -> (String, u64, u64, String) {
    let instances = model["status"]["instances"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let here = instances
        .into_iter()
        .find(|instance| instance["node"] == node)
        .unwrap_or_default();
    (
        condition(model, "Ready"),
        model["status"]["readyReplicas"].as_u64().unwrap_or_default(),
        here["restarts"].as_u64().unwrap_or_default(),
        here["phase"].as_str().unwrap_or_default().to_owned(),
    )
}

/// A machine's word: is it reachable, and where its replica stands, with its restarts and its last exit.
pub fn of_machine(machine: &Value) -> (String, String, u64, String) {
    let instance = &machine["status"]["instances"][0];
    let text = |field: &str| instance[field].as_str().unwrap_or_default().to_owned();
    (
        condition(machine, "Reachable"),
        text("phase"),
        instance["restarts"].as_u64().unwrap_or_default(),
        text("lastExit"),
    )
}
