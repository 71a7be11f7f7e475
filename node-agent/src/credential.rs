//! The credential of a machine outside the cluster: a token of an account of its own, which ends.
//!
//! The agent asks for the next one with the one it has, long before that ends, and replaces the file. Its
//! client reads the file again within a minute (the kubeconfig names it as `tokenFile`). A machine that was off
//! for longer than a token lives has to join again.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::PostParams;
use kube::{Api, Client};
use serde::Deserialize;
use tracing::{debug, error, info, warn};

/// The clock is looked at this often: a machine that slept wakes with less time left than a timer thinks.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// Between two attempts. Half of a token's life is left when the first is made.
const RETRY: Duration = Duration::from_secs(20);
/// An attempt that takes longer is given up.
const ATTEMPT: Duration = Duration::from_secs(15);
/// The shortest life that an API server gives a token.
const SHORTEST_LIFE: i64 = 600;

/// A token file, and when its token is renewed.
#[derive(Clone, Debug)]
pub struct Credential {
    /// The file.
    pub token_file: PathBuf,
    /// Age at which the token is renewed; half of its life if absent.
    pub renew_after: Option<Duration>,
}

/// Why a token is not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewToken {
    /// The file is not there, or not this user's to read.
    #[error("failed to read the token in {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file holds something else.
    #[error("{path:?} holds no token of a service account: {found}")]
    NotAToken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it. Nothing of the token itself.
        found: &'static str,
    },
    /// The API server refused or did not answer.
    #[error("failed to get a new token of {account} in namespace {namespace}")]
    Ask {
        /// The account.
        account: String,
        /// Its namespace.
        namespace: String,
        /// What it said.
        #[source]
        source: kube::Error,
    },
    /// No answer came.
    #[error("the API server did not answer within {} s", ATTEMPT.as_secs())]
    Silence,
    /// The new token cannot be kept.
    #[error("failed to write the new token to {path:?}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// Whom a token speaks for, and how long. Nothing here proves it: only the API server can.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// Namespace of the account.
    pub namespace: String,
    /// The account.
    pub account: String,
    /// When it was issued.
    pub issued: Timestamp,
    /// When it ends.
    pub expires: Timestamp,
}

#[derive(Deserialize)]
struct Payload {
    sub: String,
    iat: i64,
    exp: i64,
}

impl Claims {
    /// What a token says of itself.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of(token: &str) -> Result<Self, &'static str> {
        let payload = token.trim().split('.').nth(1).ok_or("it is no JSON web token")?;
        let payload = URL_SAFE_NO_PAD
            .decode(payload)
            .map_err(|_| "its middle part is no base64")?;
        let payload: Payload = serde_json::from_slice(&payload)
            .map_err(|_| "it does not say whom it speaks for, since when and until when")?;
        let account = payload.sub.strip_prefix("system:serviceaccount:");
        let (namespace, account) = account
            .and_then(|name| name.split_once(':'))
            .ok_or("it speaks for no service account")?;
        let time = |seconds| Timestamp::from_second(seconds).map_err(|_| "its times are out of range");
        Ok(Self {
            namespace: namespace.to_owned(),
            account: account.to_owned(),
            issued: time(payload.iat)?,
            expires: time(payload.exp)?,
        })
    }

    /// Seconds from its issue to its end.
    fn life(&self) -> i64 {
        (self.expires.as_second() - self.issued.as_second()).max(0)
    }

    /// Seconds until it is renewed; none or less: now.
    fn rest(&self, renew_after: Option<Duration>, now: Timestamp) -> i64 {
        let half = self.life() / 2;
        let age = renew_after.map_or(half, |age| i64::try_from(age.as_secs()).unwrap_or(half));
        self.issued.as_second() + age - now.as_second()
    }
}

impl Credential {
    /// What the token in the file says of itself.
    ///
    /// # Errors
    /// [`RenewToken::Read`] and [`RenewToken::NotAToken`].
    pub fn claims(&self) -> Result<Claims, RenewToken> {
        let path = || self.token_file.clone();
        let token = fs::read_to_string(&self.token_file)
            .map_err(|source| RenewToken::Read { path: path(), source })?;
        Claims::of(&token).map_err(|found| RenewToken::NotAToken { path: path(), found })
    }

    async fn renew(&self, client: &Client, old: &Claims) -> Result<Claims, RenewToken> {
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), &old.namespace);
        let request = TokenRequest {
            spec: TokenRequestSpec {
                expiration_seconds: Some(old.life().max(SHORTEST_LIFE)),
                ..TokenRequestSpec::default()
            },
            ..TokenRequest::default()
        };
        let parameters = PostParams::default();
        let asked = accounts.create_token_request(&old.account, &parameters, &request);
        let answer = tokio::time::timeout(ATTEMPT, asked)
            .await
            .map_err(|_| RenewToken::Silence)?
            .map_err(|source| RenewToken::Ask {
                account: old.account.clone(),
                namespace: old.namespace.clone(),
                source,
            })?;
        let token = answer.status.map(|status| status.token).unwrap_or_default();
        let path = || self.token_file.clone();
        let claims = Claims::of(&token).map_err(|found| RenewToken::NotAToken { path: path(), found })?;
        replace(&self.token_file, token.as_bytes())
            .map_err(|source| RenewToken::Write { path: path(), source })?;
        Ok(claims)
    }
}

/// Replaces a file that only its owner reads, whole or not at all.
///
/// # Errors
/// What the system said.
pub fn replace(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("new");
    let mut options = fs::OpenOptions::new();
    // One that was left behind may have other rights: a new file gets the right ones.
    let _ = fs::remove_file(&temporary);
    let mut file = options
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

/// Keeps the token fresh until the task is dropped.
pub(crate) async fn run(client: Client, credential: Option<Credential>) {
    let Some(credential) = credential else { return };
    let mut known = true;
    loop {
        let pause = match attempt(&client, &credential).await {
            Ok(rest) => {
                known = true;
                rest
            }
            Err(problem) => {
                let problem = chain(&problem);
                if std::mem::take(&mut known) {
                    warn!(problem, "Failed to renew this machine's token; trying on");
                } else {
                    debug!(problem, "Failed to renew the token again");
                }
                RETRY
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Renews the token if it is time to. The pause until the next look.
async fn attempt(client: &Client, credential: &Credential) -> Result<Duration, RenewToken> {
    let claims = credential.claims()?;
    let now = Timestamp::now();
    let rest = claims.rest(credential.renew_after, now);
    if rest > 0 {
        return Ok(Duration::from_secs(rest.unsigned_abs()).min(LOOK_EVERY));
    }
    if now > claims.expires {
        error!(
            ended = %claims.expires,
            "This machine's token has ended, so the cluster does not hear it any more; join again: freehold node join"
        );
    }
    let new = credential.renew(client, &claims).await?;
    info!(account = %new.account, expires = %new.expires, "Renewed this machine's token");
    Ok(Duration::from_secs(1))
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn token(payload: &str) -> String {
        format!("head.{}.signature", URL_SAFE_NO_PAD.encode(payload))
    }

    #[test]
    fn a_token_tells_whom_it_speaks_for_and_until_when() {
        let text = r#"{"sub": "system:serviceaccount:models:freehold-host-attic", "iat": 1000, "exp": 4600}"#;
        let claims = Claims::of(&token(text)).expect("a token");
        assert_eq!(
            (claims.namespace.as_str(), claims.account.as_str()),
            ("models", "freehold-host-attic")
        );
        let at = |second| Timestamp::from_second(second).expect("a time");
        assert_eq!(claims.rest(None, at(1000)), 1800, "half of its life");
        assert_eq!(claims.rest(Some(Duration::from_secs(60)), at(1000)), 60);
        assert!(claims.rest(None, at(2800)) <= 0);
    }

    #[test]
    fn what_is_no_token_of_an_account_is_told_without_showing_it() {
        for found in [
            "",
            "secret",
            "a.b!.c",
            &token("{}"),
            &token(r#"{"sub": "me", "iat": 1, "exp": 2}"#),
        ] {
            let folder = tempfile::tempdir().expect("a folder");
            let credential = Credential {
                token_file: folder.path().join("token"),
                renew_after: None,
            };
            fs::write(&credential.token_file, found).expect("written");
            let error = credential.claims().expect_err("no token").to_string();
            assert!(error.contains("holds no token"), "{error}");
            assert!(found.is_empty() || !error.contains(found), "{error}");
        }
    }

    #[test]
    fn a_file_is_replaced_whole_and_stays_its_owners() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("token");
        fs::write(&path, "old").expect("written");
        fs::write(folder.path().join("token.new"), "left behind, for everybody").expect("written");
        replace(&path, b"new").expect("replaced");
        assert_eq!(fs::read_to_string(&path).expect("there"), "new");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
    }
}
