//! `freehold node status`.

use anyhow::{Context, Result, bail};
use clap::Args;
use freehold_crds::InferenceNode;
use freehold_node_agent::Credential;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};

use super::layout::{Layout, Platform};
use super::need_root;
use super::service::Service;

/// Settings of `freehold node status`.
#[derive(Args, Debug)]
pub struct Arguments {}

/// Where the agent's gateway listens, as its settings say.
pub(super) fn gateway_of(layout: &Layout) -> String {
    let path = layout.environment().unwrap_or_else(|| layout.service.clone());
    let text = std::fs::read_to_string(path).unwrap_or_default();
    listening(&text).unwrap_or_else(|| format!("127.0.0.1:{}", freehold_crds::DEFAULT_GATEWAY_PORT))
}

/// The address after the setting's name, in a file of either kind.
fn listening(text: &str) -> Option<String> {
    let after = text.split("FREEHOLD_GATEWAY_LISTEN").nth(1)?;
    let after = after
        .trim_start_matches("</key><string>")
        .trim_start_matches(['=', '"']);
    let address: std::net::SocketAddr = after.split(['"', '<', '\n']).next()?.trim().parse().ok()?;
    let mut address = address;
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() {
            [127, 0, 0, 1].into()
        } else {
            [0, 0, 0, 0, 0, 0, 0, 1].into()
        });
    }
    Some(address.to_string())
}

/// Tells how it stands.
pub(super) async fn run(_: &Arguments) -> Result<()> {
    need_root("looking at the agent's credential")?;
    let layout = Layout::of(Platform::here()?);
    let node = layout.joined()?;
    let service = Service::new(&layout, gateway_of(&layout));
    let mut wrong = Vec::new();
    println!("Machine     {node}");
    println!("Service     {}", service.describe());
    if !service.is_active() {
        wrong.push("the agent does not run".to_owned());
    }
    if service.answers() {
        println!("Gateway     answers");
    } else {
        println!("Gateway     does not answer");
        wrong.push("its gateway does not answer".to_owned());
    }
    let credential = Credential {
        token_file: layout.token(),
        renew_after: None,
    };
    match credential.claims() {
        Ok(claims) => {
            println!(
                "Credential  {}/{} until {}",
                claims.namespace, claims.account, claims.expires
            );
            if claims.expires < jiff::Timestamp::now() {
                wrong.push("its credential has ended: `freehold node join` again".to_owned());
            }
        }
        Err(error) => wrong.push(error.to_string()),
    }
    match seen(&layout, &node).await {
        Ok(Some(machine)) => {
            let status = machine.status.unwrap_or_default();
            let conditions: Vec<String> = status
                .conditions
                .iter()
                .map(|condition| format!("{}={}", condition.type_, condition.status))
                .collect();
            println!(
                "Cluster     {} models {}",
                conditions.join(" "),
                status.summary.unwrap_or_default()
            );
        }
        Ok(None) => wrong.push(format!(
            "the cluster has no machine {node}: does the operator run?"
        )),
        Err(error) => wrong.push(format!("the API server does not answer: {error:#}")),
    }
    if wrong.is_empty() {
        return Ok(());
    }
    bail!("{}", wrong.join("; "))
}

/// What the cluster says of this machine, asked with the machine's own credential.
async fn seen(layout: &Layout, node: &str) -> Result<Option<InferenceNode>> {
    let kubeconfig =
        Kubeconfig::read_from(layout.kubeconfig()).context("failed to read the agent's kubeconfig")?;
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    config.connect_timeout = Some(std::time::Duration::from_secs(5));
    let machines: Api<InferenceNode> = Api::all(Client::try_from(config)?);
    let named = kube::api::ListParams::default().fields(&format!("metadata.name={node}"));
    Ok(machines.list(&named).await?.items.pop())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gateway_is_found_in_settings_of_both_kinds() {
        assert_eq!(
            listening("A=\"b\"\nFREEHOLD_GATEWAY_LISTEN=\"0.0.0.0:11480\"\n").as_deref(),
            Some("127.0.0.1:11480")
        );
        let plist = "<key>FREEHOLD_GATEWAY_LISTEN</key><string>10.0.0.7:80</string>";
        assert_eq!(listening(plist).as_deref(), Some("10.0.0.7:80"));
        assert_eq!(listening("nothing"), None);
    }
}
