//! Whether a machine is heard: the one thing that its agent cannot tell itself.

use std::time::Duration;

use freehold_crds::InferenceNode;
use freehold_crds::conditions::{self, reason};
use freehold_rules::plan::Liveness;
use freehold_rules::status::node_conditions;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
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

/// Writes the operator's conditions, where they differ. The entries of `conditions` are keyed by their type,
/// so this write and the agent's never meet.
pub(super) async fn update_status(
    node: &InferenceNode,
    liveness: Liveness,
    context: &Context,
) -> Result<(), ReconcileObject> {
    let present: Vec<Condition> = node
        .status
        .iter()
        .flat_map(|status| &status.conditions)
        .filter(|condition| is_ours(condition))
        .cloned()
        .collect();
    let unheard = match liveness {
        Liveness::Alive => Duration::ZERO,
        Liveness::Silent => SILENT_AFTER,
        Liveness::Lost => LOST_AFTER,
    };
    let wanted = node_conditions(&present, liveness, unheard.as_secs(), now());
    if alike(&present, &wanted) {
        return Ok(());
    }
    let name = node.name_any();
    let status = json!({"conditions": wanted});
    let written = apply_status::<DeserializeGuard<InferenceNode>>(&context.client, None, &name, &status);
    let Some(written) = ask("write the status of", KIND, &name, written).await? else {
        return Ok(());
    };
    context.metrics.writes.get_or_create(&Kind { kind: KIND }).inc();
    context.shelves.nodes.wrote(written);
    let warning = liveness != Liveness::Alive;
    let said = |list: &[Condition]| {
        let mut reachable = list.iter().filter(|one| one.type_ == conditions::REACHABLE);
        reachable.next().map(|one| one.message.clone())
    };
    let (before, message) = (said(&present), said(&wanted).unwrap_or_default());
    // That a machine is heard is a story only after it was not.
    let news = before.map_or(warning, |before| before != message);
    if news {
        let reason = if warning { reason::NODE_SILENT } else { "NodeHeard" };
        let story = Story::new(warning, reason, format!("{liveness:?}"), message);
        context.events.tell(&node.object_ref(&()), [story]);
    }
    Ok(())
}

fn is_ours(condition: &Condition) -> bool {
    condition.type_ == conditions::REACHABLE
        || (condition.type_ == conditions::RECONCILING && condition.reason == reason::NODE_SILENT)
}

/// Whether the same is said, in whatever order.
fn alike(present: &[Condition], wanted: &[Condition]) -> bool {
    present.len() == wanted.len() && wanted.iter().all(|condition| present.contains(condition))
}
