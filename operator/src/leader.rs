//! One operator works, others stand by: leader election over a Lease.
//!
//! A candidate takes the Lease when nobody holds it, or when it has not changed for as long as its
//! holder promised to renew it within. That time is taken on the candidate's own monotonic clock from
//! the last change that it saw, so clocks need not agree. The holder stops work well before that time
//! is over ([`LeaderElection::renew_within`]), and at once when another holds the Lease.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

/// Settings of the election. The defaults suit clusters: 15 s Lease, renewed every 5 s.
#[derive(Clone, Debug)]
pub struct LeaderElection {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// How long others wait for a silent holder.
    pub lease: Duration,
    /// How often the holder renews.
    pub renew_every: Duration,
    /// A holder that could not renew for this long stops: less than `lease`, by what its last writes may take.
    pub renew_within: Duration,
    /// How often a candidate looks, and a holder tries again after a failure.
    pub retry_every: Duration,
}

impl Default for LeaderElection {
    fn default() -> Self {
        Self {
            namespace: freehold_crds::SYSTEM_NAMESPACE.to_owned(),
            name: "freehold-operator".to_owned(),
            lease: Duration::from_secs(15),
            renew_every: Duration::from_secs(5),
            renew_within: Duration::from_secs(10),
            retry_every: Duration::from_secs(2),
        }
    }
}

/// Why a holder holds no more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Lost {
    /// Another took the Lease.
    #[error("{holder:?} holds the lease")]
    Taken {
        /// Who.
        holder: String,
    },
    /// The Lease could not be renewed in time.
    #[error("the lease could not be renewed within {} s", within.as_secs())]
    NotRenewed {
        /// The time.
        within: Duration,
    },
}

/// Someone who would lead.
pub(crate) struct Candidate {
    api: Api<Lease>,
    identity: String,
    settings: LeaderElection,
}

impl Candidate {
    pub(crate) fn new(client: Client, identity: String, settings: LeaderElection) -> Self {
        Self {
            api: Api::namespaced(client, &settings.namespace),
            identity,
            settings,
        }
    }

    /// Waits until this candidate holds the Lease.
    ///
    /// Cancel safety: dropped in the middle of taking the Lease, it may hold it without knowing; the
    /// Lease then runs out.
    pub(crate) async fn acquire(&self) -> Lease {
        let mut seen: Option<(Option<String>, Instant)> = None;
        let mut failing = false;
        loop {
            match self.try_acquire(&mut seen).await {
                Ok(Some(lease)) => {
                    info!(identity = self.identity, "Leads");
                    return lease;
                }
                Ok(None) => failing = false,
                Err(error) => {
                    if !failing {
                        warn!(%error, "Failed to take the leader's Lease; trying again");
                    }
                    failing = true;
                }
            }
            sleep(self.settings.retry_every).await;
        }
    }

    async fn try_acquire(
        &self,
        seen: &mut Option<(Option<String>, Instant)>,
    ) -> Result<Option<Lease>, kube::Error> {
        let now = Instant::now();
        let Some(lease) = self.api.get_opt(&self.settings.name).await? else {
            let lease = self.renewed(Lease::default(), true);
            return taken(self.api.create(&PostParams::default(), &lease).await);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.unwrap_or_default();
        let version = lease.metadata.resource_version.clone();
        let unchanged_since = match seen {
            Some((last, since)) if *last == version => *since,
            _ => {
                *seen = Some((version, now));
                now
            }
        };
        let promised = spec
            .lease_duration_seconds
            .and_then(|seconds| u64::try_from(seconds).ok());
        let promised = promised.map_or(self.settings.lease, Duration::from_secs);
        if !holder.is_empty() && holder != self.identity && now.duration_since(unchanged_since) < promised {
            debug!(holder, "Stands by");
            return Ok(None);
        }
        let lease = self.renewed(lease, holder != self.identity);
        // The resource version in it makes this fail if anybody was quicker.
        taken(
            self.api
                .replace(&self.settings.name, &PostParams::default(), &lease)
                .await,
        )
    }

    /// Renews the Lease until that fails for good.
    pub(crate) async fn hold(&self, mut lease: Lease) -> Lost {
        let mut renewed = Instant::now();
        let mut pause = self.settings.renew_every;
        loop {
            sleep(pause).await;
            let left = self.settings.renew_within.saturating_sub(renewed.elapsed());
            match timeout(left, self.renew(&lease)).await {
                Ok(Ok(held)) => {
                    lease = held;
                    renewed = Instant::now();
                    pause = self.settings.renew_every;
                    continue;
                }
                Ok(Err(Renew::Lost(lost))) => return lost,
                Ok(Err(Renew::Failed(error))) => {
                    warn!(%error, "Failed to renew the leader's Lease; trying again");
                }
                Err(_) => {}
            }
            let left = self.settings.renew_within.saturating_sub(renewed.elapsed());
            if left.is_zero() {
                return Lost::NotRenewed {
                    within: self.settings.renew_within,
                };
            }
            pause = self.settings.retry_every.min(left);
        }
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, Renew> {
        let renewed = self.renewed(lease.clone(), false);
        match self
            .api
            .replace(&self.settings.name, &PostParams::default(), &renewed)
            .await
        {
            Ok(lease) => Ok(lease),
            // Somebody wrote: a rival, or a person who set a label.
            Err(kube::Error::Api(status)) if status.code == 409 || status.code == 404 => {
                let found = self
                    .api
                    .get_opt(&self.settings.name)
                    .await
                    .map_err(Renew::Failed)?;
                let holder = found
                    .as_ref()
                    .and_then(|lease| lease.spec.as_ref()?.holder_identity.clone());
                match (found, holder) {
                    (Some(lease), Some(holder)) if holder == self.identity => Ok(lease),
                    (_, holder) => Err(Renew::Lost(Lost::Taken {
                        holder: holder.unwrap_or_default(),
                    })),
                }
            }
            Err(error) => Err(Renew::Failed(error)),
        }
    }

    /// Gives the Lease back, so that another can take it at once. Failing that, it runs out.
    pub(crate) async fn release(&self) {
        let release = async {
            let Some(mut lease) = self.api.get_opt(&self.settings.name).await? else {
                return Ok(());
            };
            let Some(spec) = lease
                .spec
                .as_mut()
                .filter(|s| s.holder_identity.as_ref() == Some(&self.identity))
            else {
                return Ok(());
            };
            spec.holder_identity = None;
            self.api
                .replace(&self.settings.name, &PostParams::default(), &lease)
                .await
                .map(|_| ())
        };
        match timeout(self.settings.retry_every, release).await {
            Ok(Ok(())) => info!(identity = self.identity, "Gave the leader's Lease back"),
            Ok(Err(error)) => warn!(%error, "Failed to give the leader's Lease back; it runs out by itself"),
            Err(_) => warn!("Failed to give the leader's Lease back in time; it runs out by itself"),
        }
    }

    /// The Lease as this candidate renews it, or takes it over.
    fn renewed(&self, mut lease: Lease, taken_over: bool) -> Lease {
        let now = MicroTime(k8s_openapi::jiff::Timestamp::now());
        lease.metadata.name = Some(self.settings.name.clone());
        lease.metadata.namespace = Some(self.settings.namespace.clone());
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        if taken_over {
            spec.acquire_time = Some(now.clone());
            spec.lease_transitions = Some(spec.lease_transitions.map_or(0, |n| n.saturating_add(1)));
        }
        spec.holder_identity = Some(self.identity.clone());
        spec.lease_duration_seconds = i32::try_from(self.settings.lease.as_secs().max(1)).ok();
        spec.renew_time = Some(now);
        lease
    }
}

enum Renew {
    Lost(Lost),
    Failed(kube::Error),
}

fn taken(written: Result<Lease, kube::Error>) -> Result<Option<Lease>, kube::Error> {
    match written {
        Ok(lease) => Ok(Some(lease)),
        // A rival was quicker.
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
        Err(error) => Err(error),
    }
}
