//! What it costs at rest: memory and processor time of every program, and writes at the API server by kind.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::world::World;

/// Resident memory of a process in MiB.
fn resident(process: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = text
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap_or_default();
    let kib: f64 = line
        .split_whitespace()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or_default();
    kib / 1024.0
}

/// Processor time of a process so far, in hundredths of a second.
fn ticks(process: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let after = text.rsplit_once(") ").map(|(_, after)| after).unwrap_or_default();
    let field = |n: usize| -> f64 {
        after
            .split(' ')
            .nth(n)
            .and_then(|n| n.parse().ok())
            .unwrap_or_default()
    };
    field(11) + field(12)
}

/// Writes so far at the API server, by verb and resource.
fn writes(world: &World) -> BTreeMap<String, f64> {
    let text = world.person.kubectl(&["get", "--raw", "/metrics"], "").unwrap();
    let mut found = BTreeMap::new();
    for line in text
        .lines()
        .filter(|line| line.starts_with("apiserver_request_total{"))
    {
        let label = |name: &str| -> String {
            let after = line.split(&format!("{name}=\"")).nth(1).unwrap_or_default();
            after.split('"').next().unwrap_or_default().to_owned()
        };
        let verb = label("verb");
        if !matches!(verb.as_str(), "POST" | "PUT" | "PATCH" | "APPLY" | "DELETE") {
            continue;
        }
        let part = label("subresource");
        let name = format!(
            "{verb} {}{}{part}",
            label("resource"),
            if part.is_empty() { "" } else { "/" }
        );
        let count: f64 = line.rsplit(' ').next().unwrap().parse().unwrap();
        *found.entry(name).or_default() += count;
    }
    found
}

/// Looks for so long while nothing is asked, and prints it as rows of a table.
pub async fn at_rest(world: &World, nodes: &[String], time: Duration) {
    let mut programs: Vec<(String, u32)> = Vec::new();
    for node in &world.cluster.nodes {
        for (what, words) in [
            ("node-agent", "/usr/bin/freehold-node-agent"),
            ("operator", "/usr/bin/freehold-operator"),
        ] {
            for process in world.processes(&node.name, words) {
                let line = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
                let is_worker = String::from_utf8_lossy(&line).contains("\0worker");
                let what = if is_worker { "worker" } else { what };
                programs.push((format!("{what} on {}", node.name), process));
            }
        }
        let names = ["kubelet", "containerd", "kube-proxy"];
        for (name, process) in names.iter().zip(node.process_ids()) {
            programs.push((format!("{name} on {}", node.name), process));
        }
    }
    for (name, process) in ["kube-apiserver", "kine"]
        .iter()
        .zip(world.cluster.server.process_ids())
    {
        programs.push(((*name).to_owned(), process));
    }
    let controllers = ["kube-controller-manager", "kube-scheduler"];
    for (name, process) in controllers.iter().zip(world.cluster.process_ids()) {
        programs.push(((*name).to_owned(), process));
    }
    let (before, written): (Vec<f64>, _) = (programs.iter().map(|(_, p)| ticks(*p)).collect(), writes(world));
    tokio::time::sleep(time).await;
    println!(
        "at rest for {} s, models on {nodes:?}:\n| program | MiB resident | % of a core |",
        time.as_secs()
    );
    for ((name, process), before) in programs.iter().zip(before) {
        let percent = (ticks(*process) - before) / time.as_secs_f64();
        println!("| {name} | {:.1} | {percent:.2} |", resident(*process));
    }
    println!("| write | a second |");
    for (name, count) in writes(world) {
        let more = count - written.get(&name).copied().unwrap_or_default();
        if more > 0.0 {
            println!("| {name} | {:.3} |", more / time.as_secs_f64());
        }
    }
}
