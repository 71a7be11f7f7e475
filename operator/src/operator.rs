//! Starting, leading, stopping.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use freehold_crds::SYSTEM_NAMESPACE;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Node};
use kube::api::ListParams;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{Config, Event};
use kube::{Api, Client, ResourceExt};
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::controller::{self, Context};
use crate::events;
use crate::fleet::Shelves;
use crate::governance_policy::GovernancePolicies;
use crate::health_probe::HealthProbes;
use crate::inference_node::{AgentLeases, InferenceNodes};
use crate::leader::{Candidate, LeaderElection};
use crate::metrics::Metrics;
use crate::model_deployment::ModelDeployments;
use crate::planner::Planner;
use crate::server::{self, Readiness};
use crate::shelf::{Seen, Shelf};

/// Label selector of the agents' Leases.
const AGENT_LEASES: &str = "app.kubernetes.io/component=node-agent";
/// An operator that may see no Nodes asks again after this long.
const LOOK_FOR_MACHINES: Duration = Duration::from_secs(600);
/// What is under way at shutdown gets this long to end.
const DRAIN: Duration = Duration::from_secs(5);
/// Events that wait at shutdown get this long to be told.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Settings of the operator.
#[derive(Clone, Debug)]
pub struct OperatorConfig {
    /// Whether several operators share the work of one; None: this is the only one.
    pub leader_election: Option<LeaderElection>,
    /// Where `/metrics`, `/healthz` and `/readyz` are served; None: nowhere.
    pub metrics_listen: Option<SocketAddr>,
    /// Who this is, in the leader's Lease and in events. Unique among the candidates.
    pub identity: String,
    /// How long a machine without a Lease and without work is remembered; [`crate::FORGET_AFTER`] as a rule.
    pub forget_after: Duration,
}

/// Why the operator ended.
#[derive(Debug, thiserror::Error)]
pub enum RunOperator {
    /// The port for metrics is taken, or the address is not this machine's.
    #[error("failed to listen on {address} for metrics; choose another --metrics-listen")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A part of the operator ended though nobody asked it to: a bug.
    #[error("a part of the operator ended unexpectedly: {detail}")]
    PartEnded {
        /// Which, or how.
        detail: String,
    },
}

/// A running operator.
#[derive(Debug)]
pub struct Operator {
    metrics_address: Option<SocketAddr>,
    task: JoinHandle<Result<(), RunOperator>>,
}

impl Operator {
    /// Starts the operator; it works until `shutdown`.
    ///
    /// # Errors
    /// When the address for metrics cannot be listened on.
    pub async fn start(
        config: OperatorConfig,
        client: Client,
        shutdown: CancellationToken,
    ) -> Result<Self, RunOperator> {
        let metrics = Metrics::new();
        let readiness = Readiness::default();
        let mut metrics_address = None;
        if let Some(address) = config.metrics_listen {
            let listening =
                server::listen(address, metrics.clone(), readiness.clone(), shutdown.clone()).await;
            let (address, serve) = listening.map_err(|source| RunOperator::Listen { address, source })?;
            metrics_address = Some(address);
            info!(%address, "Serving metrics");
            tokio::spawn(async move {
                if let Err(error) = serve.await {
                    warn!(%error, "Stopped serving metrics");
                }
            });
        }
        let work = Work {
            client,
            identity: config.identity,
            forget_after: config.forget_after,
            metrics,
            readiness,
        };
        let task = tokio::spawn(async move {
            match config.leader_election {
                None => {
                    work.metrics.leader.set(1);
                    work.lead(shutdown).await
                }
                Some(settings) => work.campaign(settings, shutdown).await,
            }
        });
        Ok(Self {
            metrics_address,
            task,
        })
    }

    /// Where metrics are served.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// Waits for the operator's end.
    ///
    /// # Errors
    /// When it ended for another reason than its `shutdown`.
    pub async fn join(self) -> Result<(), RunOperator> {
        self.task.await.unwrap_or_else(|error| {
            Err(RunOperator::PartEnded {
                detail: error.to_string(),
            })
        })
    }
}

/// Runs the operator until `shutdown`.
///
/// # Errors
/// As [`Operator::start`] and [`Operator::join`].
pub async fn run(
    config: OperatorConfig,
    client: Client,
    shutdown: CancellationToken,
) -> Result<(), RunOperator> {
    Operator::start(config, client, shutdown).await?.join().await
}

struct Work {
    client: Client,
    identity: String,
    forget_after: Duration,
    metrics: Metrics,
    readiness: Readiness,
}

impl Work {
    /// Leads whenever it holds the Lease.
    async fn campaign(
        &self,
        settings: LeaderElection,
        shutdown: CancellationToken,
    ) -> Result<(), RunOperator> {
        let candidate = Candidate::new(self.client.clone(), self.identity.clone(), settings);
        loop {
            // Standing by is being ready: a rolling update waits for it.
            self.readiness.set(true);
            let lease = tokio::select! {
                lease = candidate.acquire() => lease,
                () = shutdown.cancelled() => return Ok(()),
            };
            self.metrics.leader.set(1);
            self.readiness.set(false);
            // Dropping `lead` aborts everything that it started, in the middle of whatever it does:
            // every write is a whole one, and the next leader looks at the world as it is.
            let ended = tokio::select! {
                ended = self.lead(shutdown.child_token()) => Ok(ended),
                lost = candidate.hold(lease) => Err(lost),
            };
            self.metrics.leader.set(0);
            match ended {
                Ok(ended) => {
                    candidate.release().await;
                    return ended;
                }
                Err(lost) => warn!(%lost, "Leads no more; stands by"),
            }
        }
    }

    /// Does the operator's work until `stop`.
    async fn lead(&self, stop: CancellationToken) -> Result<(), RunOperator> {
        let news = Arc::new(Notify::new());
        let shelves = Shelves::new(&news, self.forget_after);
        // Aborted when dropped.
        let mut watches = self.watch(&shelves, &news);
        tokio::select! {
            () = filled(&shelves) => {}
            ended = watches.join_next() => return Err(part_ended(ended)),
            () = stop.cancelled() => return Ok(()),
        }
        self.readiness.set(true);
        info!("Knows the fleet");

        let (plans, latest) = watch::channel(None);
        let (events, teller) = events::channel(self.client.clone(), &self.identity, self.metrics.clone());
        let context = Arc::new(Context {
            client: self.client.clone(),
            shelves: shelves.clone(),
            latest,
            events,
            metrics: self.metrics.clone(),
            failures: crate::backoff::Failures::default(),
            malformed: std::sync::Mutex::default(),
        });
        let planner = Planner {
            shelves,
            news,
            metrics: self.metrics.clone(),
            latest: plans,
        };
        let mut telling = JoinSet::new();
        telling.spawn(teller.run());
        let mut parts = JoinSet::new();
        parts.spawn(planner.run(stop.clone()));
        parts.spawn(controller::run::<InferenceNodes>(
            Arc::clone(&context),
            stop.clone(),
        ));
        parts.spawn(controller::run::<AgentLeases>(Arc::clone(&context), stop.clone()));
        parts.spawn(controller::run::<ModelDeployments>(
            Arc::clone(&context),
            stop.clone(),
        ));
        parts.spawn(controller::run::<GovernancePolicies>(
            Arc::clone(&context),
            stop.clone(),
        ));
        parts.spawn(controller::run::<HealthProbes>(context, stop.clone()));
        tokio::select! {
            () = stop.cancelled() => {}
            ended = parts.join_next() => {
                if !stop.is_cancelled() {
                    return Err(part_ended(ended));
                }
            }
            ended = watches.join_next() => return Err(part_ended(ended)),
        }
        let drained = async { while parts.join_next().await.is_some() {} };
        if timeout(DRAIN, drained).await.is_err() {
            warn!("Left work behind that did not end in time");
        }
        drop(parts);
        let _ = timeout(LAST_WORDS, telling.join_next()).await;
        Ok(())
    }

    fn watch(&self, shelves: &Shelves, news: &Arc<Notify>) -> JoinSet<()> {
        let client = || self.client.clone();
        let mut watches = JoinSet::new();
        let quietly = Config::default;
        watches.spawn(
            shelves
                .deployments
                .clone()
                .follow(Api::all(client()), quietly(), |_| {}),
        );
        watches.spawn(
            shelves
                .policies
                .clone()
                .follow(Api::all(client()), quietly(), |_| {}),
        );
        watches.spawn(
            shelves
                .probes
                .clone()
                .follow(Api::all(client()), quietly(), |_| {}),
        );
        watches.spawn(
            shelves
                .nodes
                .clone()
                .follow(Api::all(client()), quietly(), |_| {}),
        );
        let namespaces: Api<PartialObjectMeta<Namespace>> = Api::all(client());
        watches.spawn(shelves.namespaces.clone().follow(namespaces, quietly(), |_| {}));
        let leases: Api<Lease> = Api::namespaced(client(), SYSTEM_NAMESPACE);
        let (known, news) = (shelves.clone(), Arc::clone(news));
        let listen = move |seen: Seen<'_, Lease>| {
            if heard(&known, &seen) {
                news.notify_one();
            }
        };
        watches.spawn(
            shelves
                .leases
                .clone()
                .follow(leases, quietly().labels(AGENT_LEASES), listen),
        );
        watches.spawn(follow_machines(self.client.clone(), shelves.machines.clone()));
        watches
    }
}

/// Watches the cluster's machines where the API has such and the operator may see them. An API without
/// (Freehold's own) cordons by label alone.
async fn follow_machines(client: Client, shelf: Shelf<Node>) {
    let api: Api<Node> = Api::all(client);
    while let Err(kube::Error::Api(status)) = api.list_metadata(&ListParams::default().limit(1)).await
        && matches!(status.code, 403 | 404)
    {
        info!(reason = %status.message, "Sees no Nodes: kubectl cordon and drain are not heard of");
        shelf.leave_empty();
        tokio::time::sleep(LOOK_FOR_MACHINES).await;
    }
    // Whatever else is wrong, the watch tells and tries again.
    shelf.follow(api, Config::default(), |_| {}).await;
}

/// Takes note of a heartbeat; true when the plan may have to change.
fn heard(shelves: &Shelves, seen: &Seen<'_, Lease>) -> bool {
    let now = Instant::now();
    match seen {
        Seen::Failed => {
            shelves.heartbeats.turned_deaf();
            false
        }
        Seen::Recovered => {
            shelves.heartbeats.hears_again(now);
            true
        }
        Seen::Event(Event::Apply(lease) | Event::InitApply(lease)) => {
            let name = lease.name_any();
            let renewed = lease.spec.as_ref().and_then(|spec| spec.renew_time.as_ref());
            let known = shelves.lease(&name);
            let relabelled = known.is_none_or(|known| known.labels() != lease.labels());
            shelves.heartbeats.beat(&name, renewed, now) || relabelled
        }
        Seen::Event(Event::Delete(_) | Event::InitDone) => true,
        Seen::Event(Event::Init) => false,
    }
}

/// Waits until every shelf has been filled once.
async fn filled(shelves: &Shelves) {
    // The writers live as long as the shelves, so this ends only when all are filled.
    let _ = tokio::join!(
        shelves.deployments.filled(),
        shelves.policies.filled(),
        shelves.probes.filled(),
        shelves.nodes.filled(),
        shelves.leases.filled(),
        shelves.namespaces.filled(),
        shelves.machines.filled(),
    );
}

fn part_ended(ended: Option<Result<(), tokio::task::JoinError>>) -> RunOperator {
    let detail = match ended {
        Some(Err(error)) => error.to_string(),
        Some(Ok(())) | None => "it returned".to_owned(),
    };
    RunOperator::PartEnded { detail }
}
