//! The heartbeat: this machine's Lease, renewed as long as the agent lives.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use freehold_crds::SYSTEM_NAMESPACE;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::time::MissedTickBehavior;
use tracing::{debug, warn};

use crate::metrics::Metrics;
use crate::status::FIELD_MANAGER;

/// Label by which the operator knows an agent's Lease.
const COMPONENT_LABEL: (&str, &str) = ("app.kubernetes.io/component", "node-agent");
/// A renewal that takes longer is given up; the next one follows anyway.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// Renews the Lease until the task is dropped. The operator looks at whether it changes, by its own
/// clock; the time in it is for people.
pub(crate) async fn run(
    client: Client,
    node: String,
    labels: BTreeMap<String, String>,
    every: Duration,
    metrics: Arc<Metrics>,
) {
    let api: Api<Lease> = Api::namespaced(client, SYSTEM_NAMESPACE);
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    let mut labels = labels;
    labels.insert(COMPONENT_LABEL.0.to_owned(), COMPONENT_LABEL.1.to_owned());
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reachable = true;
    loop {
        ticks.tick().await;
        let lease = Patch::Apply(json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": node, "namespace": SYSTEM_NAMESPACE, "labels": labels},
            "spec": {
                "holderIdentity": node,
                "leaseDurationSeconds": 40,
                "renewTime": format!("{:.6}", jiff::Timestamp::now()),
            },
        }));
        let renewed = tokio::time::timeout(WRITE_LIMIT, api.patch(&node, &parameters, &lease));
        let problem = match renewed.await {
            Ok(Ok(_)) => {
                reachable = true;
                metrics.heartbeats.inc();
                continue;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", WRITE_LIMIT.as_secs()),
        };
        if std::mem::take(&mut reachable) {
            warn!(problem, "Failed to renew the Lease; trying on");
        } else {
            debug!(problem, "Failed to renew the Lease again");
        }
    }
}
