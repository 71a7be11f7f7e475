//! `freehold plan`: the plan and its reasons, offline.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use freehold_crds::inference_node::{Instance, Phase};
use freehold_crds::model_deployment::ModelFacts;
use freehold_crds::{GovernancePolicy, HealthProbe, InferenceNode, ModelDeployment};
use freehold_engine::{KvType, inspect};
use freehold_rules::plan::{FleetInput, NodeInput, Plan, plan, revision_name};
use freehold_rules::validate::{key_of, validate_policy, validate_probe};
use freehold_rules::{check, status};
use jiff::Timestamp;
use kube::ResourceExt;
use serde::de::DeserializeOwned;

use crate::manifests::{self, Manifest};
use crate::{all_in_one, output};

/// Settings of `freehold plan`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// File, folder, or - for standard input; InferenceNodes in it are the machines to plan for
    #[arg(short, long, required = true, value_name = "PATH")]
    pub filename: Vec<PathBuf>,
    /// Memory for models of the machine to plan for, such as 16Gi; this machine's if absent
    #[arg(long, value_name = "QUANTITY")]
    pub memory: Option<String>,
    /// Label of the machine to plan for, key=value; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub label: Vec<String>,
}

/// Plans manifests and prints what would happen and why.
///
/// # Errors
/// When a manifest does not read, or something cannot be placed as it asks.
pub fn run(arguments: &Arguments) -> Result<()> {
    let mut input = FleetInput::default();
    for path in &arguments.filename {
        for manifest in manifests::read(path)? {
            add(&mut input, &manifest)?;
        }
    }
    if input.nodes.is_empty() {
        input.nodes.push(this_machine(arguments)?);
    }
    add_local_facts(&mut input);
    let now = Timestamp::now();
    let planned = plan(&input, now);
    let breaches = check::check(&planned, &input);
    if let Some(breach) = breaches.first() {
        bail!("the plan breaks its own invariants ({breach}): please report this");
    }
    let unplaced = print(&input, &planned, now);
    for policy in &input.policies {
        if let Err(errors) = validate_policy(policy) {
            bail!(
                "GovernancePolicy {}: {}",
                policy.name_any(),
                errors
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join("; ")
            );
        }
    }
    for probe in &input.probes {
        if let Err(errors) = validate_probe(probe) {
            bail!(
                "HealthProbe {}: {}",
                key_of(probe),
                errors
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join("; ")
            );
        }
    }
    if unplaced > 0 {
        bail!(
            "{unplaced} of {} deployments cannot be placed as they ask",
            input.deployments.len()
        );
    }
    Ok(())
}

fn typed<T: DeserializeOwned>(manifest: &Manifest) -> Result<T> {
    let value = serde_json::to_value(&manifest.object)?;
    serde_json::from_value(value)
        .map_err(|error| anyhow!("{}: {}: {error}", manifest.origin, manifest.title()))
}

fn add(input: &mut FleetInput, manifest: &Manifest) -> Result<()> {
    let kind = manifest
        .object
        .types
        .as_ref()
        .map(|types| types.kind.clone())
        .unwrap_or_default();
    let namespaced = |namespace: &mut Option<String>| {
        namespace.get_or_insert_with(|| "default".to_owned());
    };
    match kind.as_str() {
        "ModelDeployment" => {
            let mut object: ModelDeployment = typed(manifest)?;
            namespaced(&mut object.metadata.namespace);
            input.deployments.push(object);
        }
        "GovernancePolicy" => input.policies.push(typed(manifest)?),
        "HealthProbe" => {
            let mut object: HealthProbe = typed(manifest)?;
            namespaced(&mut object.metadata.namespace);
            input.probes.push(object);
        }
        "InferenceNode" => {
            let node: InferenceNode = typed(manifest)?;
            input.nodes.push(NodeInput {
                name: node.name_any(),
                cordoned: freehold_rules::labels::cordon(node.labels()),
                labels: node.labels().clone(),
                generation: node.metadata.generation.unwrap_or(0),
                spec: node.spec.clone(),
                status: node.status.clone().unwrap_or_default(),
                ..NodeInput::default()
            });
        }
        "Namespace" => {
            input
                .namespaces
                .insert(manifest.object.name_any(), manifest.object.labels().clone());
        }
        _ => {}
    }
    Ok(())
}

fn this_machine(arguments: &Arguments) -> Result<NodeInput> {
    let memory = arguments
        .memory
        .as_deref()
        .map(|text| freehold_crds::Quantity::from(text).bytes())
        .transpose()
        .context("--memory")?;
    let mut node = NodeInput {
        name: "this-machine".to_owned(),
        ..NodeInput::default()
    };
    node.status.inventory = freehold_node_agent::inventory::read(
        std::path::Path::new("/"),
        None,
        &freehold_node_agent::gpu::GpuSupport::find(std::path::Path::new(""), None),
    );
    if let Some(bytes) = memory {
        (node.name, node.status.inventory.allocatable_bytes) = ("planned-machine".to_owned(), bytes);
    }
    for label in &arguments.label {
        let (key, value) = label
            .split_once('=')
            .ok_or_else(|| anyhow!("--label is {label:?}; write key=value"))?;
        node.labels.insert(key.to_owned(), value.to_owned());
    }
    Ok(node)
}

/// Models that lie on this machine are looked into, so that the plan reckons with their real sizes: files
/// that a `path` names, and what the local store has by digest.
fn add_local_facts(input: &mut FleetInput) {
    let store = all_in_one::default_data_dir().join("agent/models/blobs");
    let mut instances = Vec::new();
    for deployment in &input.deployments {
        let models = deployment
            .spec
            .model
            .iter()
            .chain(deployment.spec.variants.iter().map(|variant| &variant.model));
        for model in models {
            let local = model.path.clone().map(PathBuf::from);
            let path = local.or_else(|| model.sha256.as_ref().map(|sha256| store.join(sha256)));
            let Some(Ok(facts)) = path
                .filter(|path| path.exists())
                .map(|path| inspect::inspect(&path))
            else {
                continue;
            };
            let revision = revision_name(model, &deployment.spec.engine, deployment.spec.placement.device);
            let key = key_of(deployment);
            let model = ModelFacts {
                summary: Some(facts.summary()),
                file_bytes: facts.file_bytes,
                weight_bytes: facts.weight_bytes,
                kv_bytes_per_token: facts.kv_bytes_per_token(KvType::F16),
                context_length: facts.context_length,
                ..ModelFacts::default()
            };
            let name = format!("{}.{}.{revision}", key.namespace, key.name);
            instances.push(Instance {
                name,
                phase: Phase::Pending,
                model: Some(model),
                ..Instance::default()
            });
        }
    }
    if let Some(node) = input.nodes.first_mut() {
        for instance in instances {
            if !node
                .status
                .instances
                .iter()
                .any(|known| known.name == instance.name)
            {
                node.status.instances.push(instance);
            }
        }
    }
}

/// Prints the plan; gives how many deployments are not placed as they ask.
fn print(input: &FleetInput, planned: &Plan, now: Timestamp) -> usize {
    let mut unplaced = 0;
    for deployment in &input.deployments {
        let key = key_of(deployment);
        let Some(entry) = planned.deployments.get(&key) else {
            continue;
        };
        let variant = entry
            .variant
            .as_ref()
            .map(|variant| format!(" (variant {variant})"))
            .unwrap_or_default();
        println!(
            "ModelDeployment {key}{variant}, revision {}",
            entry.revision.as_deref().unwrap_or("-")
        );
        let memory = entry.memory.as_ref().map_or(
            "not known before the model is fetched (set spec.model.size to plan with it)".to_owned(),
            |m| m.arithmetic.clone(),
        );
        println!("  memory: {memory}");
        let rows: Vec<Vec<String>> = entry
            .reasons
            .iter()
            .map(|r| vec![format!("  {}", r.node), r.decision.clone(), r.reason.clone()])
            .collect();
        output::align(&rows).iter().for_each(|line| println!("{line}"));
        if let Some(obstacle) = &entry.obstacle {
            unplaced += 1;
            println!("  {}: {}", obstacle.reason, obstacle.message);
        }
        for violation in &entry.violations {
            println!(
                "  {:?}: policy {} {} at {}: {}; {}",
                violation.enforcement,
                violation.policy,
                violation.rule,
                violation.field,
                violation.evidence,
                violation.remedy
            );
        }
        println!();
    }
    for policy in &input.policies {
        let status: freehold_crds::GovernancePolicyStatus =
            status::policy_status(policy as &GovernancePolicy, planned, input, now);
        println!(
            "GovernancePolicy {}: {} deployments, {} violations{}",
            policy.name_any(),
            status.deployments,
            status.violation_count,
            if status.gaps.is_empty() {
                String::new()
            } else {
                format!(", cannot hold {}", status.gaps.join(", "))
            }
        );
    }
    let rows: Vec<Vec<String>> = planned
        .nodes
        .iter()
        .map(|(name, spec)| {
            let reserved: u64 = spec.assignments.iter().map(|a| a.memory_bytes).sum();
            let room = input
                .nodes
                .iter()
                .find(|node| node.name == *name)
                .map_or(0, |node| node.status.inventory.allocatable_bytes);
            vec![
                format!("Machine {name}"),
                format!("{} models", spec.assignments.len()),
                format!("{} of {} reserved", output::bytes(reserved), output::bytes(room)),
            ]
        })
        .collect();
    output::align(&rows).iter().for_each(|line| println!("{line}"));
    unplaced
}
