//! `freehold node join`.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::{IpAddr, ToSocketAddrs, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use freehold_crds::{DEFAULT_GATEWAY_PORT, InferenceNode};
use freehold_node_agent::credential::Claims;
use kube::{Api, Client};
use serde_json::json;

use super::cluster::{self, Address, Release};
use super::join_token::JoinToken;
use super::layout::{self, File, Layout, Platform};
use super::program::Program;
use super::service::Service;
use super::{Admin, check_name, host_name, need_root, plist, unit};

/// The operator makes a machine's object when it hears of it first.
const HEARD: Duration = Duration::from_secs(30);
const HOUR: u64 = 3600;

/// Settings of `freehold node join`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Join token that `freehold node token` printed, or - to read it from standard input
    #[arg(long, env = "FREEHOLD_JOIN_TOKEN", hide_env_values = true, conflicts_with_all = ["kubeconfig", "node"])]
    token: Option<String>,
    /// Name of this machine in the cluster; its host name if absent
    #[arg(long)]
    node: Option<String>,
    /// The cluster, without a join token.
    #[command(flatten)]
    admin: Admin,
    /// The agent's program; the one beside this command or in PATH if absent
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Where its gateway listens; the network that leads to the API server if absent
    #[arg(long, value_name = "ADDRESS:PORT")]
    gateway_listen: Option<std::net::SocketAddr>,
    /// Host (and port) under which others reach that gateway, if not the one it listens on
    #[arg(long, value_name = "HOST")]
    gateway_advertise: Option<String>,
    /// Labels of this machine for the placement of models, as key=value
    #[arg(long = "label", value_delimiter = ',', value_name = "KEY=VALUE")]
    labels: Vec<String>,
    /// Most memory for all models together, such as 6Gi; otherwise found out
    #[arg(long)]
    memory_limit: Option<String>,
    /// Hours for which a credential holds. It is renewed at half of that, so a machine may be off for the other half
    #[arg(long, default_value_t = 168, value_parser = clap::value_parser!(u64).range(1..=8760))]
    credential_hours: u64,
    /// Age in seconds at which the agent renews it, instead of half of its life
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    renew_after: Option<u64>,
    /// User that the agent runs as (macOS: the one who called sudo if absent; Linux: one that systemd makes up)
    #[arg(long)]
    user: Option<String>,
    /// Only show what would be made and written
    #[arg(long)]
    dry_run: bool,
    /// What starts services there, for a dry run elsewhere
    #[arg(long, value_enum, requires = "dry_run")]
    platform: Option<Platform>,
}

/// Where the credential comes from.
struct Source {
    client: Client,
    address: Address,
    node: String,
    /// None: the join token's account, which is there.
    release: Option<Release>,
    account: Option<(String, String)>,
}

impl Arguments {
    async fn source(&self) -> Result<Source> {
        let Some(token) = &self.token else {
            let node = self.node.clone().unwrap_or_else(host_name);
            check_name(&node)?;
            let (client, address) = self.admin.connect().await?;
            let release = Release::find(&client).await?;
            return Ok(Source {
                client,
                address,
                node,
                release: Some(release),
                account: None,
            });
        };
        let mut text = token.clone();
        if text == "-" {
            text.clear();
            std::io::stdin()
                .read_to_string(&mut text)
                .context("failed to read the join token from standard input")?;
        }
        let token: JoinToken = text.parse()?;
        let claims = token.claims()?;
        ensure!(
            claims.expires > jiff::Timestamp::now(),
            "the join token ended at {}: make a new one with `freehold node token {}`",
            claims.expires,
            token.node
        );
        let mut address = token.address();
        if let Some(server) = &self.admin.server {
            address.server.clone_from(server);
        }
        Ok(Source {
            client: address.client(&token.token).await?,
            address,
            node: token.node,
            release: None,
            account: Some((claims.namespace, claims.account)),
        })
    }

    fn settings(
        &self,
        node: &str,
        layout: &Layout,
        address: &Address,
    ) -> Result<BTreeMap<&'static str, String>> {
        let text = |path: PathBuf| path.display().to_string();
        let mut settings = BTreeMap::from([
            ("FREEHOLD_NODE", node.to_owned()),
            ("FREEHOLD_DATA_DIR", text(layout.data.clone())),
            ("FREEHOLD_TOKEN_FILE", text(layout.token())),
            ("KUBECONFIG", text(layout.kubeconfig())),
        ]);
        let towards = towards(&address.server);
        let listen = match (self.gateway_listen, towards) {
            (Some(listen), _) => listen,
            (None, Some(own)) if !own.is_loopback() => {
                let any: IpAddr = if own.is_ipv4() {
                    [0; 4].into()
                } else {
                    [0_u16; 8].into()
                };
                (any, DEFAULT_GATEWAY_PORT).into()
            }
            _ => ([127, 0, 0, 1], DEFAULT_GATEWAY_PORT).into(),
        };
        settings.insert("FREEHOLD_GATEWAY_LISTEN", listen.to_string());
        match (&self.gateway_advertise, towards) {
            (Some(host), _) => drop(settings.insert("FREEHOLD_GATEWAY_ADVERTISE", host.clone())),
            (None, Some(own)) if listen.ip().is_unspecified() => {
                settings.insert("FREEHOLD_GATEWAY_ADVERTISE", own.to_string());
            }
            (None, _) => {}
        }
        if !self.labels.is_empty() {
            for label in &self.labels {
                ensure!(
                    label.split_once('=').is_some_and(|(key, _)| !key.is_empty())
                        && !label.contains(['\n', ',']),
                    "--label {label:?} is not key=value"
                );
            }
            settings.insert("FREEHOLD_LABELS", self.labels.join(","));
        }
        if let Some(limit) = &self.memory_limit {
            freehold_crds::Quantity(limit.clone())
                .bytes()
                .map_err(|error| anyhow::anyhow!("--memory-limit: {error}"))?;
            settings.insert("FREEHOLD_MEMORY_LIMIT", limit.clone());
        }
        if let Some(seconds) = self.renew_after {
            settings.insert("FREEHOLD_TOKEN_RENEW_SECONDS", seconds.to_string());
        }
        Ok(settings)
    }

    /// Whom the agent runs as; None: whom the platform chooses.
    fn user(&self, platform: Platform) -> Option<String> {
        let caller = || std::env::var("SUDO_USER").ok();
        match platform {
            Platform::Systemd => None,
            Platform::Launchd => self.user.clone().or_else(caller),
        }
    }
}

/// What is written, the credential last: until it is there, no agent could speak for this machine.
fn files(
    layout: &Layout,
    node: &str,
    address: &Address,
    settings: &BTreeMap<&'static str, String>,
    user: Option<&str>,
    token: &str,
) -> Result<Vec<File>> {
    let service = match layout.platform {
        Platform::Systemd => unit::unit(layout, &gpu_groups()),
        Platform::Launchd => plist::plist(layout, settings, user),
    };
    // The name first: with it, `freehold node leave` undoes whatever followed.
    let mut files = vec![
        File::new(layout.node(), 0o600, format!("{node}\n")),
        File::new(layout.service.clone(), 0o644, service),
    ];
    if let Some(path) = layout.environment() {
        // A person may put secrets into it.
        files.push(File::new(path, 0o600, unit::environment(settings)));
    }
    let user = json!({"tokenFile": layout.token()});
    files.push(File::new(layout.kubeconfig(), 0o600, address.kubeconfig(&user)?));
    files.push(File {
        secret: Some("a token of this machine's account"),
        ..File::new(layout.token(), 0o600, token.to_owned())
    });
    Ok(files)
}

/// Joins.
pub(super) async fn run(arguments: Arguments) -> Result<()> {
    let platform = match arguments.platform {
        Some(platform) => platform,
        None => Platform::here()?,
    };
    ensure!(
        platform == Platform::Launchd || arguments.user.is_none(),
        "--user is for macOS: on Linux systemd makes a user up for the agent, which owns nothing but its own folder"
    );
    if !arguments.dry_run {
        need_root("joining")?;
    }
    let layout = Layout::of(platform);
    let source = arguments.source().await?;
    let (node, address) = (&source.node, &source.address);
    if let Ok(other) = layout.joined() {
        ensure!(
            other == *node,
            "this machine is {other:?} in a cluster already: `freehold node leave` first"
        );
    }
    let settings = arguments.settings(node, &layout, address)?;
    let user = arguments.user(platform);
    let gateway = settings["FREEHOLD_GATEWAY_LISTEN"]
        .replace("0.0.0.0", "127.0.0.1")
        .replace("[::]", "[::1]");
    let service = Service::new(&layout, gateway);
    let files = |token: &str| files(&layout, node, address, &settings, user.as_deref(), token);
    if arguments.dry_run {
        return show(&arguments, &source, &layout, &service, &files("")?);
    }
    // Everything that may be refused comes before anything is written.
    let program = Program::find(arguments.agent.as_deref())?;
    let (namespace, account) = match (&source.release, &source.account) {
        (Some(release), _) => {
            let account = release.make_account(&source.client, node).await?;
            let whose = if account.of_chart { "the chart's" } else { "made" };
            println!("Account {}/{} ({whose})", account.namespace, account.name);
            (account.namespace, account.name)
        }
        (None, Some(known)) => known.clone(),
        (None, None) => anyhow::bail!("the join token names no account"),
    };
    let life = Duration::from_secs(arguments.credential_hours * HOUR);
    let token = cluster::token(&source.client, &namespace, &account, life).await?;
    let ends = Claims::of(&token).map_err(anyhow::Error::msg)?.expires;
    program.install(&layout.program)?;
    println!("Agent {} at {}", program.version, layout.program.display());
    for file in files(&token)? {
        file.write()?;
        println!("Wrote {}", file.path.display());
    }
    layout::hand_over(&layout, user.as_deref())?;
    service.enable().context(
        "the machine has joined, but its agent does not run; `freehold node leave` undoes all of it",
    )?;
    println!("The agent runs; its credential holds until {ends} and is renewed long before");
    tell_whether_heard(&address.client(&token).await?, node).await;
    Ok(())
}

async fn tell_whether_heard(client: &Client, node: &str) {
    let machines: Api<InferenceNode> = Api::all(client.clone());
    let named = kube::api::ListParams::default().fields(&format!("metadata.name={node}"));
    let heard = async {
        while !machines
            .list(&named)
            .await
            .is_ok_and(|found| !found.items.is_empty())
        {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    if tokio::time::timeout(HEARD, heard).await.is_ok() {
        println!("The cluster knows this machine as {node}: kubectl get inferencenode {node}");
    } else {
        println!(
            "The operator has not taken notice of {node} within {} s; is it running? kubectl -n freehold-system get pods",
            HEARD.as_secs()
        );
    }
}

fn show(
    arguments: &Arguments,
    source: &Source,
    layout: &Layout,
    service: &Service<'_>,
    files: &[File],
) -> Result<()> {
    for object in source
        .release
        .iter()
        .flat_map(|release| release.objects(&source.node))
    {
        println!(
            "--- would be applied\n{}",
            serde_yaml::to_string(&object)?.trim_end()
        );
    }
    println!(
        "--- would be asked for: a token of {} h",
        arguments.credential_hours
    );
    println!("--- would be copied to {}", layout.program.display());
    for file in files {
        println!(
            "--- would be written: {} ({:04o})",
            file.path.display(),
            file.mode
        );
        match file.secret {
            Some(what) => println!("({what})"),
            None => println!("{}", file.content.trim_end()),
        }
    }
    for command in service.commands() {
        println!("--- would be run: {command}");
    }
    Ok(())
}

/// This machine's own address on the way to the API server.
fn towards(server: &str) -> Option<IpAddr> {
    let uri: http::Uri = server.parse().ok()?;
    let port = uri.port_u16().unwrap_or(443);
    let host = uri.host()?.trim_matches(['[', ']']).to_owned();
    let address = (host, port).to_socket_addrs().ok()?.next()?;
    let any: IpAddr = if address.is_ipv4() {
        [0; 4].into()
    } else {
        [0_u16; 8].into()
    };
    // Nothing is sent: connecting only asks the routes.
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(address).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Groups that own GPUs, of those that this machine has.
fn gpu_groups() -> Vec<String> {
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let here = |name: &&str| groups.lines().any(|line| line.split(':').next() == Some(name));
    ["video", "render"]
        .iter()
        .copied()
        .filter(here)
        .map(str::to_owned)
        .collect()
}
