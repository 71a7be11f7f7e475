//! The gateway itself: what it holds, and how the agent drives it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use freehold_crds::inference_node::CompiledPolicy;
use freehold_rules::govern::limits::Limiter;
use tokio::sync::{Semaphore, watch};

use crate::audit::AuditLog;
use crate::bus::{Activator, Activity, ActivityBook, BusState, Snapshot, lock};
use crate::metrics::Metrics;

/// Bytes of a request body that are accounted for together.
pub(crate) const BODY_UNIT: usize = 4096;

/// Settings of a gateway.
#[derive(Clone, Debug)]
pub struct GatewayOptions {
    /// Name of this machine, as in `Backend.node`.
    pub node: String,
    /// Folder of the audit files; made where it is missing.
    pub audit_dir: PathBuf,
    /// Longest request body in bytes.
    pub request_body_limit: usize,
    /// Most memory for request bodies in flight, all together, in bytes; what goes beyond gets 503.
    pub body_memory_limit: usize,
    /// Longest time for the head of a request, and for which an idle connection is kept.
    pub header_read_limit: Duration,
    /// Longest time for the body of a request.
    pub body_read_limit: Duration,
    /// Longest time for which a client may take nothing of its answer; then it counts as gone.
    pub write_stall_limit: Duration,
    /// Longest time for which a request waits for a sleeping model.
    pub activation_limit: Duration,
    /// For how long an idle connection is kept at the end: a request that is on its way just then is answered, with
    /// the word that the connection ends with it. Closed at once, it would cost that client its request.
    pub linger_limit: Duration,
    /// Longest time for which requests in flight may finish at the end.
    pub drain_limit: Duration,
    /// Most connections at once; further ones wait to be accepted.
    pub connection_limit: usize,
}

impl GatewayOptions {
    /// The usual settings for a machine.
    pub fn new(node: impl Into<String>, audit_dir: impl Into<PathBuf>) -> Self {
        Self {
            node: node.into(),
            audit_dir: audit_dir.into(),
            // A context of a million tokens is about 4 MB of text.
            request_body_limit: 8 << 20,
            body_memory_limit: 256 << 20,
            header_read_limit: Duration::from_secs(30),
            body_read_limit: Duration::from_secs(60),
            write_stall_limit: Duration::from_secs(30),
            activation_limit: Duration::from_secs(60),
            linger_limit: Duration::from_secs(1),
            drain_limit: Duration::from_secs(10),
            connection_limit: 4096,
        }
    }
}

/// Why a gateway did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenGateway {
    /// The audit folder cannot be used.
    #[error("failed to open the audit folder {dir:?}; it must be a folder that the agent may write")]
    OpenAudit {
        /// The folder.
        dir: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// The bus of one machine. A handle: clones share everything.
#[derive(Clone)]
pub struct Gateway {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) options: GatewayOptions,
    pub(crate) activator: Arc<dyn Activator>,
    bus: watch::Sender<Arc<Snapshot>>,
    pub(crate) activity: ActivityBook,
    pub(crate) limiter: Mutex<Limiter>,
    pub(crate) metrics: Metrics,
    pub(crate) audit: AuditLog,
    /// One permit for each [`BODY_UNIT`] of a body in flight.
    pub(crate) body_memory: Arc<Semaphore>,
    /// The start of the limiter's clock.
    started: Instant,
}

impl Gateway {
    /// A gateway that knows no name yet: it answers 503 until the first [`Gateway::apply`].
    ///
    /// # Errors
    /// When the audit folder cannot be made.
    pub fn open(options: GatewayOptions, activator: Arc<dyn Activator>) -> Result<Self, OpenGateway> {
        let audit = AuditLog::open(options.audit_dir.clone(), options.node.clone()).map_err(|source| {
            OpenGateway::OpenAudit {
                dir: options.audit_dir.clone(),
                source,
            }
        })?;
        let body_units = (options.body_memory_limit / BODY_UNIT).min(Semaphore::MAX_PERMITS);
        Ok(Self {
            inner: Arc::new(Inner {
                body_memory: Arc::new(Semaphore::new(body_units)),
                options,
                activator,
                bus: watch::Sender::new(Arc::new(Snapshot::default())),
                activity: ActivityBook::default(),
                limiter: Mutex::default(),
                metrics: Metrics::new(),
                audit,
                started: Instant::now(),
            }),
        })
    }

    /// Takes up a new state of the bus. Requests that began under the old one finish under it.
    pub fn apply(&self, state: BusState) {
        lock(&self.inner.limiter).retain(&state.policies);
        self.inner.activity.retain(&state.workers);
        self.inner.audit.keep_days(retention_days(&state.policies));
        self.inner.bus.send_replace(Arc::new(Snapshot::new(state)));
    }

    /// How busy an assignment is.
    #[must_use]
    pub fn activity(&self, assignment: &str) -> Activity {
        self.inner.activity.of(assignment)
    }

    /// The gateway's metrics as Prometheus reads them, for an agent that serves them with its own.
    #[must_use]
    pub fn metrics(&self) -> String {
        self.inner.metrics.text()
    }

    /// Waits until the audit records so far are on the disk.
    pub async fn flush_audit(&self) {
        self.inner.audit.flush().await;
    }

    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.inner.bus.borrow())
    }

    pub(crate) fn watch_bus(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.inner.bus.subscribe()
    }

    /// Time on the limiter's clock.
    pub(crate) fn now(&self) -> Duration {
        self.inner.started.elapsed()
    }
}

/// For how long audit files are kept. A file holds the records of all deployments, so it stays as long
/// as the policy that keeps longest wants it; a policy that names no days keeps for good.
fn retention_days(policies: &[CompiledPolicy]) -> Option<u32> {
    policies
        .iter()
        .filter_map(|policy| policy.rules.audit.as_ref())
        .map(|audit| audit.retention_days)
        .reduce(|one, other| Some(one?.max(other?)))
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use freehold_crds::governance_policy::{AuditRules, PolicyRules};

    fn keeps(days: Option<u32>) -> CompiledPolicy {
        CompiledPolicy {
            rules: PolicyRules {
                audit: Some(AuditRules {
                    retention_days: days,
                    ..AuditRules::default()
                }),
                ..PolicyRules::default()
            },
            ..CompiledPolicy::default()
        }
    }

    #[test]
    fn the_longest_retention_wins() {
        assert_eq!(retention_days(&[CompiledPolicy::default()]), None);
        assert_eq!(retention_days(&[keeps(Some(7)), keeps(Some(30))]), Some(30));
        assert_eq!(retention_days(&[keeps(Some(7)), keeps(None)]), None);
    }
}
