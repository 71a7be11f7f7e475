//! Objects for tests: each builder sets what nearly every test needs, and a test sets the rest.

use freehold_crds::governance_policy::SupplyChainRules;
use freehold_crds::inference_node::{Assignment, Instance, Phase};
use freehold_crds::model_deployment::ModelSource;
use freehold_crds::{GovernancePolicy, GovernancePolicySpec, ModelDeployment, ModelDeploymentSpec};
use freehold_rules::check::check;
use freehold_rules::plan::{FleetInput, NodeInput, Plan, plan};
use freehold_rules::status::deployment_status;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

pub const MIB: u64 = 1 << 20;

pub fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

pub fn deployment(name: &str, age: i64, model: ModelSource) -> ModelDeployment {
    let spec = ModelDeploymentSpec {
        model: Some(model),
        ..ModelDeploymentSpec::default()
    };
    let mut deployment = ModelDeployment::new(name, spec);
    deployment.metadata.namespace = Some("default".into());
    deployment.metadata.creation_timestamp = Some(Time(Timestamp::from_second(1_700_000_000 - age).unwrap()));
    deployment
}

pub fn path(path: &str, size_mib: Option<u64>) -> ModelSource {
    ModelSource {
        path: Some(path.into()),
        size: size_mib.map(|size| format!("{size}Mi").as_str().into()),
        ..ModelSource::default()
    }
}

pub fn node(name: &str, mib: u64, gpu: bool) -> NodeInput {
    let mut node = NodeInput {
        name: name.into(),
        ..NodeInput::default()
    };
    node.labels
        .insert("pool".into(), if gpu { "gpu" } else { "cpu" }.into());
    node.status.inventory.allocatable_bytes = mib * MIB;
    node
}

pub fn policy(name: &str, rules: SupplyChainRules) -> GovernancePolicy {
    let mut spec = GovernancePolicySpec::default();
    spec.rules.supply_chain = Some(rules);
    GovernancePolicy::new(name, spec)
}

/// What an agent says of an assignment.
pub type Behaviour = Box<dyn Fn(&Assignment) -> Instance>;

/// A fleet over time: plans are carried out, agents answer, statuses are written.
pub struct World {
    pub input: FleetInput,
    pub second: i64,
    pub agents: Behaviour,
}

impl World {
    pub fn new(deployments: Vec<ModelDeployment>, nodes: Vec<NodeInput>) -> Self {
        Self {
            input: FleetInput {
                deployments,
                nodes,
                ..FleetInput::default()
            },
            second: 1_800_000_000,
            agents: Box::new(|assignment| instance(assignment, Phase::Ready)),
        }
    }

    pub fn now(&self) -> Timestamp {
        Timestamp::from_second(self.second).unwrap()
    }

    pub fn plan(&self) -> Plan {
        plan(&self.input, self.now())
    }

    /// One plan, carried out and answered.
    pub fn round(&mut self) -> Plan {
        let made = self.plan();
        assert_eq!(check(&made, &self.input), []);
        let now = self.now();
        let statuses: Vec<_> = self
            .input
            .deployments
            .iter()
            .map(|d| deployment_status(d, &made, &self.input, now))
            .collect();
        for (deployment, status) in self.input.deployments.iter_mut().zip(statuses) {
            deployment.status = Some(status);
        }
        for node in &mut self.input.nodes {
            let spec = made.nodes[&node.name].clone();
            node.generation += i64::from(node.spec != spec);
            node.spec = spec;
        }
        self.answer();
        made
    }

    /// The agents take up their specs and tell how it went.
    pub fn answer(&mut self) {
        for node in &mut self.input.nodes {
            node.status.observed_generation = Some(node.generation);
            node.status.instances = node.spec.assignments.iter().map(&self.agents).collect();
        }
    }

    /// Rounds until nothing changes.
    pub fn settle(&mut self) {
        for _ in 0..10 {
            let before = self.input.clone();
            self.round();
            if self.input == before {
                return;
            }
        }
        panic!("still changing after ten rounds: {:#?}", self.input);
    }

    /// A person edits the spec.
    pub fn edit(&mut self, name: &str, change: impl FnOnce(&mut ModelDeploymentSpec)) {
        let deployment = self.find(name);
        change(&mut deployment.spec);
        *deployment.metadata.generation.get_or_insert(1) += 1;
    }

    pub fn find(&mut self, name: &str) -> &mut ModelDeployment {
        let mut deployments = self.input.deployments.iter_mut();
        deployments
            .find(|d| d.metadata.name.as_deref() == Some(name))
            .unwrap()
    }

    pub fn status(&mut self, name: &str) -> freehold_crds::ModelDeploymentStatus {
        self.find(name).status.clone().unwrap()
    }

    /// A condition of a deployment as `Ready=True AsExpected`, with its message.
    pub fn condition(&mut self, name: &str, kind: &str) -> Option<(String, String)> {
        let status = self.status(name);
        let condition = status.conditions.into_iter().find(|c| c.type_ == kind)?;
        Some((
            format!("{} {}", condition.status, condition.reason),
            condition.message,
        ))
    }

    /// Names of the assignments' models on a machine.
    pub fn models(&self, node: &str) -> Vec<String> {
        let node = self.input.nodes.iter().find(|n| n.name == node).unwrap();
        let assignments = node.spec.assignments.iter();
        assignments.filter_map(|a| a.model.path.clone()).collect()
    }
}

/// An assignment as its agent tells of it.
pub fn instance(assignment: &Assignment, phase: Phase) -> Instance {
    Instance {
        name: assignment.name.clone(),
        phase,
        ..Instance::default()
    }
}
