//! `freehold doctor`: what is wrong, and what to do about it.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use freehold_crds::{GovernancePolicy, HealthProbe, InferenceNode, ModelDeployment};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{Api, Client, ResourceExt};

use crate::all_in_one::default_data_dir;
use crate::connect::Connection;
use crate::output;

/// Settings of `freehold doctor`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Look only at this deployment
    pub deployment: Option<String>,
    /// The API.
    #[command(flatten)]
    pub connection: Connection,
}

/// Least free disk before we speak of it: a small model with room to spare.
const LOW_DISK_BYTES: u64 = 5 << 30;
/// Memory below which hardly a model fits.
const LOW_MEMORY_BYTES: u64 = 1 << 30;
/// An API that does not answer within this time is not there.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Findings {
    problems: usize,
}

impl Findings {
    fn good(&self, text: &str) {
        println!("  ok       {text}");
    }

    fn bad(&mut self, text: &str, advice: &str) {
        self.problems += 1;
        println!("  PROBLEM  {text}\n           {advice}");
    }

    fn note(&self, text: &str) {
        println!("  note     {text}");
    }
}

/// Looks at this machine and at what is deployed; ends with 1 when something is wrong.
///
/// # Errors
/// None so far: what cannot be looked at is a finding.
pub async fn run(arguments: Arguments) -> Result<ExitCode> {
    let mut findings = Findings::default();
    if arguments.deployment.is_none() {
        println!("This machine");
        machine(&mut findings);
    }
    println!("\nWhat is deployed");
    match arguments.connection.client().await {
        Err(error) => findings.bad(
            &format!("{error:#}"),
            "start it with `freehold up`, or name another kubeconfig",
        ),
        Ok((client, namespace)) => {
            let looked = tokio::time::timeout(
                PATIENCE,
                deployed(&mut findings, client, &namespace, arguments.deployment.as_deref()),
            )
            .await;
            match looked {
                Ok(Ok(())) => {}
                Ok(Err(error)) => findings.bad(
                    &format!("the API does not answer: {error:#}"),
                    "start it with `freehold up`, or name another kubeconfig with --kubeconfig",
                ),
                Err(_) => findings.bad(
                    "the API does not answer in time",
                    "look at its log, and at the load of its machine",
                ),
            }
        }
    }
    match findings.problems {
        0 => println!("\nNo problems found."),
        1 => println!("\n1 problem found."),
        count => println!("\n{count} problems found."),
    }
    Ok(if findings.problems == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn machine(findings: &mut Findings) {
    let data_dir = default_data_dir();
    let existing = data_dir
        .ancestors()
        .find(|folder| folder.exists())
        .unwrap_or(&data_dir)
        .to_owned();
    let gpu = freehold_node_agent::gpu::GpuSupport::find(std::path::Path::new(""), None);
    let inventory = freehold_node_agent::inventory::read(&existing, None, &gpu);
    findings.good(&format!(
        "{} on {}, {} cores: {}",
        inventory.os, inventory.architecture, inventory.cores, inventory.cpu
    ));
    let memory = format!(
        "{} of memory, {} of it for models",
        output::bytes(inventory.memory_bytes),
        output::bytes(inventory.allocatable_bytes)
    );
    if inventory.allocatable_bytes < LOW_MEMORY_BYTES {
        findings.bad(
            &memory,
            "hardly a model fits: close other programs, or raise the container's limit",
        );
    } else {
        findings.good(&memory);
    }
    let disk = format!(
        "{} free for models in {}",
        output::bytes(inventory.disk_free_bytes),
        data_dir.display()
    );
    if inventory.disk_free_bytes < LOW_DISK_BYTES {
        findings.bad(&disk, "free some disk, or move the store with --data-dir");
    } else {
        findings.good(&disk);
    }
    if inventory.devices.is_empty() {
        findings.note("no NVIDIA GPU is seen (its driver's library is not installed); models run on the CPU");
    }
    for device in &inventory.devices {
        let text = format!("{} with {}", device.name, output::bytes(device.memory_bytes));
        if device.usable {
            findings.good(&text);
        } else {
            findings.note(&format!("{text}: this version computes on the CPU only"));
        }
    }
    let writable = std::fs::create_dir_all(&data_dir).and_then(|()| {
        let probe = data_dir.join(".doctor");
        std::fs::write(&probe, b"")?;
        std::fs::remove_file(probe)
    });
    match writable {
        Ok(()) => findings.good(&format!("{} can be written", data_dir.display())),
        Err(error) => findings.bad(
            &format!("{} cannot be written: {error}", data_dir.display()),
            "give yourself the right to, or choose another with --data-dir",
        ),
    }
}

fn ready(conditions: &[Condition]) -> Option<&Condition> {
    conditions.iter().find(|condition| condition.type_ == "Ready")
}

/// Tells of one object by its conditions.
fn tell(findings: &mut Findings, what: &str, conditions: &[Condition]) {
    match ready(conditions) {
        None => findings.bad(
            &format!("{what} has no status"),
            "no operator has looked at it: is one running?",
        ),
        Some(condition) if condition.status == "True" => {
            findings.good(&format!("{what}: {}", condition.message))
        }
        Some(condition) => {
            let stalled = conditions
                .iter()
                .any(|c| c.type_ == "Stalled" && c.status == "True");
            let advice = if stalled {
                "it stays so until something is changed, as the message says"
            } else {
                "it is being worked on; look again in a while"
            };
            findings.bad(
                &format!("{what}: {} ({})", condition.message, condition.reason),
                advice,
            );
        }
    }
    let bad = |kind: &str, status: &str| conditions.iter().find(|c| c.type_ == kind && c.status == status);
    for (kind, status) in [
        ("Healthy", "False"),
        ("PolicyCompliant", "False"),
        ("AcceleratorDegraded", "True"),
        ("RemediationSuspended", "True"),
        ("FullyEnforced", "False"),
    ] {
        if let Some(condition) = bad(kind, status) {
            findings.bad(
                &format!("{what} {kind}={status}: {}", condition.message),
                "see `freehold get` with -o yaml for the whole status",
            );
        }
    }
}

async fn deployed(
    findings: &mut Findings,
    client: Client,
    namespace: &str,
    only: Option<&str>,
) -> Result<()> {
    let deployments: Api<ModelDeployment> = Api::all(client.clone());
    let mut found = 0;
    for deployment in deployments.list(&Default::default()).await?.items {
        let name = deployment.name_any();
        if only.is_some_and(|only| only != name) {
            continue;
        }
        found += 1;
        let conditions = deployment
            .status
            .as_ref()
            .map(|s| s.conditions.clone())
            .unwrap_or_default();
        tell(
            findings,
            &format!(
                "ModelDeployment {}/{name}",
                deployment.namespace().unwrap_or_default()
            ),
            &conditions,
        );
        if only.is_some() {
            for reason in deployment.status.iter().flat_map(|status| &status.plan) {
                findings.note(&format!("{} {}: {}", reason.node, reason.decision, reason.reason));
            }
        }
    }
    if let Some(only) = only {
        if found == 0 {
            findings.bad(
                &format!("no ModelDeployment is named {only:?} (namespace {namespace})"),
                "see `freehold get md -A` for what there is",
            );
        }
        return Ok(());
    }
    if found == 0 {
        findings.note("no model is deployed; `freehold apply -f FILE` deploys one");
    }
    let policies: Api<GovernancePolicy> = Api::all(client.clone());
    for policy in policies.list(&Default::default()).await?.items {
        let conditions = policy
            .status
            .as_ref()
            .map(|s| s.conditions.clone())
            .unwrap_or_default();
        tell(
            findings,
            &format!("GovernancePolicy {}", policy.name_any()),
            &conditions,
        );
    }
    let probes: Api<HealthProbe> = Api::all(client.clone());
    for probe in probes.list(&Default::default()).await?.items {
        let conditions = probe
            .status
            .as_ref()
            .map(|s| s.conditions.clone())
            .unwrap_or_default();
        tell(
            findings,
            &format!(
                "HealthProbe {}/{}",
                probe.namespace().unwrap_or_default(),
                probe.name_any()
            ),
            &conditions,
        );
    }
    let nodes: Api<InferenceNode> = Api::all(client);
    let nodes = nodes.list(&Default::default()).await?.items;
    if nodes.is_empty() {
        findings.bad(
            "no machine runs models",
            "start an agent: `freehold up`, or the Helm chart's DaemonSet",
        );
    }
    for node in nodes {
        let status = node.status.clone().unwrap_or_default();
        match status.observed_generation == node.metadata.generation {
            true => tell(
                findings,
                &format!("InferenceNode {}", node.name_any()),
                &status.conditions,
            ),
            false => findings.bad(
                &format!(
                    "InferenceNode {} has not taken up its latest spec",
                    node.name_any()
                ),
                "is its agent running? look at its log",
            ),
        }
    }
    Ok(())
}
