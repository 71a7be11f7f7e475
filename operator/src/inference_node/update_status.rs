//! Whether a machine is heard: the one thing that its agent cannot tell itself.

use freehold_crds::InferenceNode;
use freehold_crds::conditions::{self, reason};
use freehold_rules::plan::Liveness;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::core::DeserializeGuard;
use kube::{Resource, ResourceExt};
use serde_json::json;

use super::KIND;
use crate::controller::{Context, ReconcileObject, ask};
use crate::liveness::{LOST_AFTER, SILENT_AFTER};
use crate::metrics::Kind;
use crate::planner::now;
use crate::story::Story;
use crate::writes::apply_status;

/// Writes the one condition, where it differs. The entries of `conditions` are keyed by their type,
/// so this write and the agent's never meet.
pub(super) async fn update_status(
    node: &InferenceNode,
    liveness: Liveness,
    context: &Context,
) -> Result<(), ReconcileObject> {
    let present = node
        .status
        .iter()
        .flat_map(|status| &status.conditions)
        .find(|condition| condition.type_ == conditions::REACHABLE);
    let mut wanted = condition(liveness);
    if let Some(present) = present {
        if present.status == wanted.status
            && present.reason == wanted.reason
            && present.message == wanted.message
        {
            return Ok(());
        }
        if present.status == wanted.status {
            wanted.last_transition_time = present.last_transition_time.clone();
        }
    }
    let name = node.name_any();
    let status = json!({"conditions": [wanted]});
    let written = apply_status::<DeserializeGuard<InferenceNode>>(&context.client, None, &name, &status);
    let Some(written) = ask("write the status of", KIND, &name, written).await? else {
        return Ok(());
    };
    context.metrics.writes.get_or_create(&Kind { kind: KIND }).inc();
    context.shelves.nodes.wrote(written);
    let warning = liveness != Liveness::Alive;
    // That a machine is heard is a story only after it was not.
    if warning || present.is_some() {
        let reason = if warning { reason::NODE_SILENT } else { "NodeHeard" };
        let story = Story::new(warning, reason, format!("{liveness:?}"), wanted.message);
        context.events.tell(&node.object_ref(&()), [story]);
    }
    Ok(())
}

fn condition(liveness: Liveness) -> Condition {
    let (status, reason, message) = match liveness {
        Liveness::Alive => ("True", reason::AS_EXPECTED, "heartbeats arrive".to_owned()),
        Liveness::Silent => (
            "False",
            reason::NODE_SILENT,
            format!(
                "no heartbeat for {} s: no requests are sent there; look at the machine, its agent and its network",
                SILENT_AFTER.as_secs()
            ),
        ),
        Liveness::Lost => (
            "False",
            reason::NODE_SILENT,
            format!(
                "no heartbeat for {} s: its models are placed elsewhere; look at the machine, its agent and its network",
                LOST_AFTER.as_secs()
            ),
        ),
    };
    Condition {
        type_: conditions::REACHABLE.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        last_transition_time: Time(now()),
        observed_generation: None,
    }
}
