//! `freehold demo`: the whole way on one machine.
//!
//! Every step really happens, and the command ends with 0 only if all of them did.

mod model;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use freehold_crds::ModelDeployment;
use indicatif::{ProgressBar, ProgressStyle};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use crate::all_in_one::{AllInOne, Settings, default_data_dir};
use crate::commands::{chat, up};
use crate::{manifests, output, sync};

/// Settings of `freehold demo`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Leave everything running until Ctrl-C
    #[arg(long)]
    pub keep: bool,
    /// The question to ask
    #[arg(
        long,
        default_value = "What is the capital of France? Answer in one sentence."
    )]
    pub question: String,
    /// Use this model file and fetch nothing; it must be the demo's own
    #[arg(long, value_name = "FILE")]
    pub model_file: Option<PathBuf>,
    /// Where things lie and listen.
    #[command(flatten)]
    pub settings: Settings,
}

/// The demo's manifests, the same that stand in manifests/examples/demo.
const MANIFESTS: &[(&str, &str)] = &[
    (
        "governance-policy.yaml",
        include_str!("../../../manifests/examples/demo/governance-policy.yaml"),
    ),
    (
        "model-deployment.yaml",
        include_str!("../../../manifests/examples/demo/model-deployment.yaml"),
    ),
    (
        "health-probe.yaml",
        include_str!("../../../manifests/examples/demo/health-probe.yaml"),
    ),
];
const DEPLOYMENT: &str = "smollm2";
/// A hub download on a slow line, and the load, fit in this.
const READY_WITHIN: Duration = Duration::from_secs(1800);

/// Runs the demo.
///
/// # Errors
/// The first step that did not happen.
pub async fn run(arguments: Arguments) -> Result<()> {
    let started = Instant::now();
    let data_dir = arguments
        .settings
        .data_dir
        .clone()
        .unwrap_or_else(|| default_data_dir().join("demo"));
    let mut settings = arguments.settings.clone();
    // A demo beside a running `freehold up` takes free ports and is not in its way.
    for address in [&mut settings.listen, &mut settings.api_listen] {
        if std::net::TcpListener::bind(*address).is_err() {
            address.set_port(0);
        }
    }
    heading("Starting control plane, operator and agent in this process");
    let all = AllInOne::start(&settings, &data_dir).await?;
    println!("  API      {}", all.kubeconfig().display());
    println!("  gateway  {}", all.base_url());
    let outcome = show(&arguments, &all).await;
    if outcome.is_ok() && arguments.keep {
        println!("\nEverything goes on running. Stop it with Ctrl-C.");
        up::wait_for_signal().await?;
    }
    let stopped = all.stop().await;
    outcome?;
    stopped?;
    if !arguments.keep {
        println!(
            "\nDone in {:.1} s; everything is stopped. Run it with --keep to go on from here.",
            started.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

async fn show(arguments: &Arguments, all: &AllInOne) -> Result<()> {
    heading("The model: SmolLM2-135M-Instruct, 94 MiB, Apache-2.0");
    model::provide(all.store(), arguments.model_file.as_deref()).await?;

    heading("Applying manifests/examples/demo");
    let client = all.client();
    let applied_at = Instant::now();
    for (name, text) in MANIFESTS {
        for manifest in manifests::parse(name, text)? {
            let (object, applied) = sync::apply(&client, &manifest, "default", false).await?;
            println!(
                "  {} {}",
                manifests::title(&object),
                format!("{applied:?}").to_lowercase()
            );
        }
    }

    heading("The way to Ready");
    let deployment = wait_ready(&client).await?;
    let load_ms = load_time(&client).await;
    println!(
        "  Ready after {:.2} s{}",
        applied_at.elapsed().as_secs_f64(),
        load_ms
            .map(|ms| format!(", {:.2} s of it loading the model", ms as f64 / 1000.0))
            .unwrap_or_default()
    );
    if let Some(memory) = deployment
        .status
        .as_ref()
        .and_then(|status| status.memory.as_ref())
    {
        println!("  memory: {}", memory.arithmetic);
    }

    heading("Asking through the OpenAI API");
    println!("  > {}\n", arguments.question);
    let gateway = chat::Client::new(&all.base_url(), None)?;
    let messages = [json!({"role": "user", "content": arguments.question})];
    print!("  ");
    let answer = gateway
        .stream(
            DEPLOYMENT,
            &messages,
            &json!({"temperature": 0, "max_tokens": 64}),
            chat::print_piece,
        )
        .await?;
    println!();
    if answer.text.trim().is_empty() {
        bail!("the model gave an empty answer");
    }
    let first = answer.first_piece.unwrap_or_default();
    let rest = answer.duration.saturating_sub(first).as_secs_f64();
    let pace = if answer.completion_tokens > 1 && rest > 0.0 {
        format!(
            ", then {:.0} tokens/s",
            (answer.completion_tokens - 1) as f64 / rest
        )
    } else {
        String::new()
    };
    println!(
        "\n  {} tokens; the first after {:.0} ms{pace}",
        answer.completion_tokens,
        first.as_secs_f64() * 1000.0
    );

    heading("What kubectl get shows");
    for plural in [
        "namespaces/default/modeldeployments",
        "governancepolicies",
        "namespaces/default/healthprobes",
        "inferencenodes",
    ] {
        let path = format!(
            "/apis/{}/{}/{plural}",
            freehold_crds::GROUP,
            freehold_crds::VERSION
        );
        let lines = output::table(&client, &path, false, false).await?;
        if lines.is_empty() {
            bail!("{plural} should have an object, and has none");
        }
        lines.iter().for_each(|line| println!("  {line}"));
        println!();
    }
    next_steps(arguments, all);
    Ok(())
}

fn heading(text: &str) {
    println!("\n== {text}");
}

/// Follows the deployment's status until it is ready or cannot be.
async fn wait_ready(client: &Client) -> Result<ModelDeployment> {
    let api: Api<ModelDeployment> = Api::namespaced(client.clone(), "default");
    let bar = ProgressBar::new(100);
    bar.set_style(
        ProgressStyle::with_template("  {bar:30} {percent:>3} %  {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    let (begun, mut told) = (Instant::now(), String::new());
    loop {
        let deployment = api.get(DEPLOYMENT).await?;
        let status = deployment.status.clone().unwrap_or_default();
        let current = status.observed_generation == deployment.metadata.generation;
        let condition = |kind: &str| status.conditions.iter().find(|c| c.type_ == kind && current);
        if let Some(condition) = condition("Ready") {
            let line = format!("{}: {}", condition.reason, condition.message);
            if let Some(percent) = percent(&condition.message) {
                bar.set_position(percent);
                bar.set_message(condition.message.clone());
            }
            // Progress within a phase is the bar's; a log (no terminal) gets one line a phase.
            if condition.reason != told {
                bar.suspend(|| println!("  {line}"));
                told.clone_from(&condition.reason);
            }
            if condition.status == "True" {
                bar.finish_and_clear();
                return Ok(deployment);
            }
        }
        if let Some(stalled) = condition("Stalled").filter(|c| c.status == "True") {
            bar.finish_and_clear();
            bail!(
                "{} cannot become ready: {}",
                deployment.name_any(),
                stalled.message
            );
        }
        if begun.elapsed() > READY_WITHIN {
            bail!(
                "{} is not ready after {} s; last status: {told}",
                deployment.name_any(),
                READY_WITHIN.as_secs()
            );
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The number before `%` in a message such as `mini: fetching 41 % (…)`.
fn percent(message: &str) -> Option<u64> {
    message.split(" %").next()?.rsplit(' ').next()?.parse().ok()
}

async fn load_time(client: &Client) -> Option<u64> {
    let nodes: Api<freehold_crds::InferenceNode> = Api::all(client.clone());
    let nodes = nodes.list(&kube::api::ListParams::default()).await.ok()?;
    let mut instances = nodes
        .items
        .into_iter()
        .filter_map(|node| node.status)
        .flat_map(|status| status.instances);
    instances.find_map(|instance| instance.load_ms)
}

fn next_steps(arguments: &Arguments, all: &AllInOne) {
    heading("What to try next");
    let keep = if arguments.keep {
        ""
    } else {
        "  (start it again with: freehold demo --keep)\n"
    };
    let (kubeconfig, base_url) = (all.kubeconfig().display(), all.base_url());
    println!(
        "{keep}  kubectl      export KUBECONFIG={kubeconfig}
               kubectl get freehold -A;  kubectl describe md {DEPLOYMENT};  kubectl explain md.spec
  curl         curl -N {base_url}/chat/completions -H 'Content-Type: application/json' \\
                 -d '{{\"model\":\"{DEPLOYMENT}\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Hello!\"}}]}}'
  openai       OpenAI(base_url=\"{base_url}\", api_key=\"none\").chat.completions.create(model=\"{DEPLOYMENT}\", ...)
  chat         freehold chat {DEPLOYMENT} --base-url {base_url}"
    );
}

/// Fails the build of this crate's tests when a manifest is not what the API accepts.
#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn the_demos_manifests_read_and_name_the_demos_model() {
        let objects: Vec<_> = MANIFESTS
            .iter()
            .flat_map(|(name, text)| manifests::parse(name, text).context("reads").unwrap())
            .collect();
        assert_eq!(objects.len(), 3);
        let text = MANIFESTS[1].1;
        assert!(text.contains(model::SHA256) && text.contains(DEPLOYMENT));
    }

    #[test]
    fn progress_is_read_from_the_message() {
        assert_eq!(
            percent("mini: fetching 41 % (40 MiB of 94 MiB, 12 s left)"),
            Some(41)
        );
        assert_eq!(percent("mini: loading"), None);
    }
}
