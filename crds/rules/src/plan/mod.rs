//! The plan: what every machine shall hold, and why.
//!
//! [`plan`] is one function of the fleet's snapshot. Deployments are planned oldest first, so a newcomer
//! never takes a machine from who was there before; a replica that may stay stays; the same input, in
//! whatever order, gives the same plan; and a plan that was applied asks for nothing more.

mod compile;
mod fleet;
pub mod memory;
mod placement;
mod revision;

use std::collections::{BTreeMap, BTreeSet};

use freehold_crds::common::Violation;
use freehold_crds::inference_node::InferenceNodeSpec;
use freehold_crds::model_deployment::{MemoryEstimate, ModelFacts, PlanReason, StableRevision};
use freehold_crds::{GovernancePolicy, HealthProbe, InferenceNodeStatus, ModelDeployment, ObjectKey};
use jiff::Timestamp;
use kube::ResourceExt;

use crate::validate::key_of;
use fleet::Fleet;

pub(crate) use placement::withheld_text;
pub use revision::revision_name;

/// Everything that a plan is made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FleetInput {
    /// The deployments, whole.
    pub deployments: Vec<ModelDeployment>,
    /// The policies.
    pub policies: Vec<GovernancePolicy>,
    /// The probes.
    pub probes: Vec<HealthProbe>,
    /// The machines.
    pub nodes: Vec<NodeInput>,
    /// Labels of the namespaces, by name.
    pub namespaces: BTreeMap<String, BTreeMap<String, String>>,
}

/// One machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeInput {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether it is heard from.
    pub liveness: Liveness,
    /// Generation of its spec.
    pub generation: i64,
    /// Its spec as it is now.
    pub spec: InferenceNodeSpec,
    /// What its agent says.
    pub status: InferenceNodeStatus,
    /// Its object is on the way out.
    pub deleting: bool,
    /// It shall get nothing new, and be rid of what it has as soon as other machines serve that.
    pub cordoned: bool,
}

/// Whether a machine is heard from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Liveness {
    /// Its heartbeat advances.
    #[default]
    Alive,
    /// Its heartbeat stopped a short while ago: no requests go there, and nothing moves yet.
    Silent,
    /// Its heartbeat stopped so long ago that its models are placed elsewhere.
    Lost,
}

/// What every machine shall hold, and why.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// The specs of the machines.
    pub nodes: BTreeMap<String, InferenceNodeSpec>,
    /// What became of each deployment.
    pub deployments: BTreeMap<ObjectKey, DeploymentPlan>,
    /// When the plan must be made again even if nothing changes (the next rollout deadline).
    pub replan_at: Option<Timestamp>,
}

/// Why a deployment is not placed as its spec asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// Machine-readable, one of `conditions::reason`.
    pub reason: &'static str,
    /// For a person.
    pub message: String,
    /// True when only a person can change it.
    pub stalled: bool,
}

/// What became of one deployment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeploymentPlan {
    /// The revision that the spec asks for.
    pub revision: Option<String>,
    /// What that revision is made of, to be kept once it is ready.
    pub template: Option<StableRevision>,
    /// The variant that was chosen.
    pub variant: Option<String>,
    /// Replicas that the spec asks for.
    pub wanted: u32,
    /// The replicas: machine, revision and name of the assignment.
    pub placements: Vec<Placed>,
    /// Memory of one replica, where the model's size is known.
    pub memory: Option<MemoryEstimate>,
    /// What the model turned out to be, where a machine has it.
    pub facts: Option<ModelFacts>,
    /// Why each machine was or was not chosen.
    pub reasons: Vec<PlanReason>,
    /// Rules that are broken.
    pub violations: Vec<Violation>,
    /// Names on the bus.
    pub names: Vec<String>,
    /// Names that it asks for and that an older deployment holds.
    pub withheld: Vec<Withheld>,
    /// What is carried out otherwise than the spec says, in words.
    pub notes: Vec<String>,
    /// Why it is not placed as asked.
    pub obstacle: Option<Obstacle>,
    /// Set when the last good revision serves in place of the one that the spec asks for: why.
    pub rolled_back: Option<String>,
}

/// A name that a deployment asks for and does not get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Withheld {
    /// The name.
    pub name: String,
    /// The older deployment that holds it.
    pub holder: ObjectKey,
}

/// One replica in the plan.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Placed {
    /// The machine.
    pub node: String,
    /// The revision.
    pub revision: String,
    /// Name of the assignment.
    pub assignment: String,
}

/// Makes the plan.
#[must_use]
pub fn plan(input: &FleetInput, now: Timestamp) -> Plan {
    let mut fleet = Fleet::new(input);
    let mut plan = Plan::default();
    let mut deployments: Vec<&ModelDeployment> = input.deployments.iter().collect();
    deployments.sort_by_key(|deployment| seniority(deployment));
    let mut taken: BTreeMap<String, ObjectKey> = BTreeMap::new();
    for deployment in &deployments {
        if deployment.metadata.deletion_timestamp.is_some() {
            fleet.settle(&key_of(*deployment));
            continue;
        }
        let planned = placement::place(
            deployment,
            input,
            &mut fleet,
            &mut taken,
            now,
            &mut plan.replan_at,
        );
        fleet.settle(&key_of(*deployment));
        plan.deployments.insert(key_of(*deployment), planned);
    }
    let live: BTreeSet<ObjectKey> = plan.deployments.keys().cloned().collect();
    compile::compile(input, &deployments, &live, fleet, &mut plan);
    plan
}

/// Oldest first; then by name, so that the order never depends on the input's.
fn seniority(deployment: &ModelDeployment) -> (Option<Timestamp>, String, String) {
    let created = deployment.metadata.creation_timestamp.as_ref().map(|time| time.0);
    (
        created,
        deployment.namespace().unwrap_or_default(),
        deployment.name_any(),
    )
}
