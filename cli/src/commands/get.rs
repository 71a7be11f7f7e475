//! `freehold get`.

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use kube::Client;
use kube::discovery::{ApiCapabilities, ApiResource, Discovery, Scope};
use serde_json::Value;

use crate::connect::Connection;
use crate::output;

/// Settings of `freehold get`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Kind (or its short name), or `all` for everything of Freehold's
    #[arg(default_value = "all")]
    pub kind: String,
    /// Name of one object
    pub name: Option<String>,
    /// How to show it
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub output: Format,
    /// Every namespace
    #[arg(short = 'A', long)]
    pub all_namespaces: bool,
    /// The API.
    #[command(flatten)]
    pub connection: Connection,
}

/// How objects are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table.
    Table,
    /// A table with every column.
    Wide,
    /// YAML.
    Yaml,
    /// JSON.
    Json,
}

/// Finds a kind by its plural, singular, kind or short name.
///
/// # Errors
/// When it is not served; the message names what is.
pub async fn find_kind(client: &Client, wanted: &str) -> Result<(ApiResource, ApiCapabilities)> {
    let discovery = Discovery::new(client.clone())
        .filter(&[freehold_crds::GROUP, "", "coordination.k8s.io"])
        .run()
        .await?;
    let lower = wanted.to_lowercase();
    let mut known = Vec::new();
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            let short = short_name(&resource.kind);
            if lower == resource.plural
                || lower == resource.kind.to_lowercase()
                || Some(lower.as_str()) == short
            {
                return Ok((resource, capabilities));
            }
            known.push(resource.plural);
        }
    }
    bail!(
        "{wanted:?} is not a kind that is served here; there are {}",
        known.join(", ")
    )
}

fn short_name(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "ModelDeployment" => "md",
        "GovernancePolicy" => "gp",
        "HealthProbe" => "hp",
        "InferenceNode" => "inode",
        "Namespace" => "ns",
        "ConfigMap" => "cm",
        "Event" => "ev",
        _ => return None,
    })
}

/// Path of a resource's list, or of one object, in the API.
#[must_use]
pub fn path(resource: &ApiResource, scope: &Scope, namespace: Option<&str>, name: Option<&str>) -> String {
    let prefix = if resource.group.is_empty() {
        format!("/api/{}", resource.version)
    } else {
        format!("/apis/{}/{}", resource.group, resource.version)
    };
    let within = namespace
        .filter(|_| *scope == Scope::Namespaced)
        .map(|namespace| format!("/namespaces/{namespace}"))
        .unwrap_or_default();
    let name = name.map(|name| format!("/{name}")).unwrap_or_default();
    format!("{prefix}{within}/{}{name}", resource.plural)
}

/// Shows objects.
///
/// # Errors
/// When the kind is not served or the API refuses.
pub async fn run(arguments: Arguments) -> Result<()> {
    let (client, namespace) = arguments.connection.client().await?;
    let kinds: Vec<&str> = if arguments.kind == "all" {
        vec!["md", "gp", "hp", "inode"]
    } else {
        vec![&arguments.kind]
    };
    let mut printed = false;
    for kind in kinds {
        let (resource, capabilities) = find_kind(&client, kind).await?;
        let namespaced = capabilities.scope == Scope::Namespaced;
        let within = (!arguments.all_namespaces).then_some(namespace.as_str());
        let path = path(&resource, &capabilities.scope, within, arguments.name.as_deref());
        match arguments.output {
            Format::Table | Format::Wide => {
                let lines = output::table(
                    &client,
                    &path,
                    arguments.output == Format::Wide,
                    namespaced && arguments.all_namespaces,
                )
                .await?;
                if !lines.is_empty() {
                    if printed {
                        println!();
                    }
                    println!("{}", lines.join("\n"));
                    printed = true;
                }
            }
            Format::Yaml | Format::Json => {
                let request = http::Request::get(&path).body(Vec::new())?;
                let value: Value = client.request(request).await?;
                let text = if arguments.output == Format::Json {
                    serde_json::to_string_pretty(&value)?
                } else {
                    serde_yaml::to_string(&value).context("failed to write YAML")?
                };
                println!("{}", text.trim_end());
                printed = true;
            }
        }
    }
    if !printed {
        println!("Nothing is there yet. `freehold apply -f FILE` deploys what a manifest says.");
    }
    Ok(())
}
