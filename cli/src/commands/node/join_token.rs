//! A join token: what a machine needs to fetch its own credential, and nothing that speaks for another.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::Args;
use freehold_node_agent::credential::Claims;
use serde::{Deserialize, Serialize};

use super::cluster::{self, Address, Release};
use super::{Admin, check_name};

const PREFIX: &str = "freehold-join-1.";

/// Settings of `freehold node token`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Name of the machine that shall join
    #[arg(value_name = "NODE")]
    node: String,
    /// Minutes within which it has to join
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(10..=1440))]
    minutes: u64,
    /// The cluster.
    #[command(flatten)]
    admin: Admin,
}

/// What it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct JoinToken {
    pub(super) node: String,
    server: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    authority: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_server_name: Option<String>,
    /// A token of the machine's own account, which lives as long as the join token.
    pub(super) token: String,
}

impl JoinToken {
    pub(super) fn address(&self) -> Address {
        Address {
            server: self.server.clone(),
            authority: self.authority.clone(),
            tls_server_name: self.tls_server_name.clone(),
        }
    }

    /// The account that it speaks for.
    pub(super) fn claims(&self) -> Result<Claims> {
        Claims::of(&self.token).map_err(|found| anyhow::anyhow!("the join token is damaged: {found}"))
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let json = serde_json::to_vec(self).map_err(|_| fmt::Error)?;
        write!(formatter, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(json))
    }
}

impl FromStr for JoinToken {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let words = "this is no join token: `freehold node token NAME` prints one, which begins with freehold-join-1.";
        let body = text.trim().strip_prefix(PREFIX).context(words)?;
        let json = URL_SAFE_NO_PAD
            .decode(body)
            .context("the join token is damaged: copy it whole")?;
        let token: Self =
            serde_json::from_slice(&json).context("the join token is damaged: copy it whole")?;
        check_name(&token.node)?;
        Ok(token)
    }
}

/// Makes a join token.
pub(super) async fn run(arguments: Arguments) -> Result<()> {
    check_name(&arguments.node)?;
    let (client, address) = arguments.admin.connect().await?;
    ensure!(
        !address.server.contains("//127.") && !address.server.contains("//localhost"),
        "the kubeconfig's API server is {}, which another machine does not reach: give its address with --server",
        address.server
    );
    let release = Release::find(&client).await?;
    let account = release.make_account(&client, &arguments.node).await?;
    let life = Duration::from_secs(arguments.minutes * 60);
    let token = cluster::token(&client, &account.namespace, &account.name, life).await?;
    let ends = Claims::of(&token).map_err(anyhow::Error::msg)?.expires;
    let join = JoinToken {
        node: arguments.node,
        server: address.server,
        authority: address.authority,
        tls_server_name: address.tls_server_name,
        token,
    };
    println!("{join}");
    eprintln!(
        "For {} alone, until {ends}. On that machine: sudo freehold node join --token -   (and paste it)",
        join.node
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_join_token_is_read_as_it_was_written_and_a_damaged_one_is_told() {
        let token = JoinToken {
            node: "attic".into(),
            server: "https://10.0.0.1:6443".into(),
            authority: Some("pem".into()),
            tls_server_name: None,
            token: "a.b.c".into(),
        };
        let text = token.to_string();
        assert_eq!(
            format!(" {text}\n").parse::<JoinToken>().expect("it reads"),
            token
        );
        for damaged in ["", "a.b.c", &text[..text.len() - 4]] {
            let error = damaged.parse::<JoinToken>().expect_err("damaged").to_string();
            assert!(error.contains("join token"), "{error}");
            assert!(!error.contains("a.b.c"), "{error}");
        }
    }
}
