//! The operator's share of an InferenceNode's status: whether the machine is heard, which a silent agent cannot tell.

use freehold_crds::conditions::{self, reason};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use super::Conditions;
use crate::plan::Liveness;

/// `Reachable`, and `Reconciling` while a machine is not heard: its agent's `Ready` is its last word, and nobody who
/// judges the object as kstatus does shall take that for today's.
///
/// `old` is what the object has; `unheard_seconds` how long a machine of this liveness has been silent at least.
#[must_use]
pub fn node_conditions(
    old: &[Condition],
    liveness: Liveness,
    unheard_seconds: u64,
    now: Timestamp,
) -> Vec<Condition> {
    let mut set = Conditions::new(old, None, now);
    let done = match liveness {
        Liveness::Alive => {
            set.set(
                conditions::REACHABLE,
                Some(true),
                reason::AS_EXPECTED,
                "heartbeats arrive",
            );
            return set.finish();
        }
        Liveness::Silent => "no requests are sent there",
        Liveness::Lost => "its models are placed elsewhere",
    };
    set.set(
        conditions::REACHABLE,
        Some(false),
        reason::NODE_SILENT,
        format!(
            "no heartbeat for {unheard_seconds} s: {done}; look at the machine, its agent and its network"
        ),
    );
    set.set(
        conditions::RECONCILING,
        Some(true),
        reason::NODE_SILENT,
        "waiting for the machine's heartbeat; what its agent says here is from before",
    );
    set.finish()
}
