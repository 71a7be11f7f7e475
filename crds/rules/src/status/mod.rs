//! From observations to status: conditions as kstatus reads them, and words as people do.
//!
//! Every function gives the whole of what the operator writes and is idempotent: fed its own result it gives it again.
//! `Reconciling` and `Stalled` are there only while they are true.

mod deployment;
mod node;
mod policy;
mod probe;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

pub use deployment::deployment_status;
pub use node::node_conditions;
pub use policy::policy_status;
pub use probe::probe_status;

/// Conditions under construction: what is unchanged keeps its time.
pub(crate) struct Conditions<'a> {
    old: &'a [Condition],
    generation: Option<i64>,
    now: Timestamp,
    list: Vec<Condition>,
}

/// Longest message of a condition, as in Kubernetes's own validation.
const MESSAGE_LIMIT: usize = 32_768;

impl<'a> Conditions<'a> {
    pub(crate) fn new(old: &'a [Condition], generation: Option<i64>, now: Timestamp) -> Self {
        Self {
            old,
            generation,
            now,
            list: Vec::new(),
        }
    }

    /// Sets a condition; `status` None is Unknown.
    pub(crate) fn set(&mut self, kind: &str, status: Option<bool>, reason: &str, message: impl Into<String>) {
        let status = match status {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        };
        let before = self
            .old
            .iter()
            .find(|condition| condition.type_ == kind && condition.status == status);
        // Kubernetes writes times in whole seconds; a finer one would never compare equal to itself.
        let whole = Timestamp::from_second(self.now.as_second()).unwrap_or(self.now);
        let mut message = message.into();
        if message.len() > MESSAGE_LIMIT {
            message = message.chars().take(MESSAGE_LIMIT / 4).collect();
        }
        self.list.push(Condition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message,
            observed_generation: self.generation,
            last_transition_time: before
                .map_or(Time(whole), |condition| condition.last_transition_time.clone()),
        });
    }

    /// Sets a condition that is there only while it is true.
    pub(crate) fn set_if(&mut self, holds: bool, kind: &str, reason: &str, message: impl Into<String>) {
        if holds {
            self.set(kind, Some(true), reason, message);
        }
    }

    pub(crate) fn finish(self) -> Vec<Condition> {
        self.list
    }
}
