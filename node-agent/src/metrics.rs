//! The agent's own metrics. The gateway's are its own affair; both are served together.

use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, AtomicU64};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct PhaseLabel {
    pub(crate) phase: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct AssignmentLabel {
    pub(crate) assignment: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ModelLabels {
    pub(crate) namespace: String,
    pub(crate) model: String,
}

impl ModelLabels {
    /// The deployment of an assignment `namespace.deployment.revision`; only the name between may have dots.
    pub(crate) fn of_assignment(assignment: &str) -> Self {
        let (namespace, rest) = assignment.split_once('.').unwrap_or_default();
        let model = rest.rsplit_once('.').map_or(rest, |(deployment, _)| deployment);
        Self {
            namespace: namespace.to_owned(),
            model: model.to_owned(),
        }
    }
}

/// A counter of what is no whole number.
type RealCounter = Counter<f64, AtomicU64>;
type RealGauge = Gauge<f64, AtomicU64>;

/// What the agent counts.
pub(crate) struct Metrics {
    registry: Mutex<Registry>,
    pub(crate) heartbeats: Counter,
    pub(crate) status_writes: Counter,
    pub(crate) instances: Family<PhaseLabel, Gauge>,
    pub(crate) restarts: Family<AssignmentLabel, Counter>,
    pub(crate) worker_memory: Family<AssignmentLabel, Gauge<i64, AtomicI64>>,
    pub(crate) memory_reserved: Gauge,
    pub(crate) energy: RealCounter,
    pub(crate) model_energy: Family<ModelLabels, RealCounter>,
    pub(crate) model_energy_tokens: Family<ModelLabels, Counter>,
    pub(crate) model_joules_per_million: Family<ModelLabels, RealGauge>,
    pub(crate) model_cost_per_million: Family<ModelLabels, RealGauge>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut whole = Registry::with_prefix("freehold");
        let metrics = Self {
            registry: Mutex::default(),
            heartbeats: Counter::default(),
            status_writes: Counter::default(),
            instances: Family::default(),
            restarts: Family::default(),
            worker_memory: Family::default(),
            memory_reserved: Gauge::default(),
            energy: RealCounter::default(),
            model_energy: Family::default(),
            model_energy_tokens: Family::default(),
            model_joules_per_million: Family::default(),
            model_cost_per_million: Family::default(),
        };
        metrics.register_energy(&mut whole);
        let registry = whole.sub_registry_with_prefix("agent");
        registry.register("heartbeats", "Renewals of the Lease", metrics.heartbeats.clone());
        registry.register(
            "status_writes",
            "Writes of the status",
            metrics.status_writes.clone(),
        );
        registry.register(
            "instances",
            "Models on this machine by phase",
            metrics.instances.clone(),
        );
        registry.register(
            "worker_restarts",
            "Workers that were started again",
            metrics.restarts.clone(),
        );
        registry.register_with_unit(
            "worker_resident",
            "Resident memory of a worker",
            Unit::Bytes,
            metrics.worker_memory.clone(),
        );
        registry.register_with_unit(
            "memory_reserved",
            "Memory set aside for models",
            Unit::Bytes,
            metrics.memory_reserved.clone(),
        );
        registry.register_with_unit(
            "energy",
            "What the machine's counters measured, whoever drew it",
            Unit::Joules,
            metrics.energy.clone(),
        );
        *metrics
            .registry
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = whole;
        metrics
    }

    fn register_energy(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "energy",
            "What a model was charged with",
            Unit::Joules,
            self.model_energy.clone(),
        );
        registry.register(
            "energy_tokens",
            "Tokens read and written that the joules were spent on",
            self.model_energy_tokens.clone(),
        );
        registry.register(
            "joules_per_million_tokens",
            "Joules for a million tokens read and written, since the agent started",
            self.model_joules_per_million.clone(),
        );
        registry.register(
            "cost_per_million_tokens",
            "Money for a million tokens at the agent's price of a kilowatt hour",
            self.model_cost_per_million.clone(),
        );
    }

    /// The metrics as Prometheus reads them.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let registry = self
            .registry
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        // Writing to a String does not fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    /// The metrics that the chart and the documents name, in the dashboard, the alerts and the text.
    fn named() -> BTreeSet<String> {
        // Asked when it runs: a cache of built tests may serve another checkout.
        let root = Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap()).join("..");
        let mut names = BTreeSet::new();
        for place in [
            "charts/freehold/files/dashboards",
            "charts/freehold/templates/monitoring",
            "docs",
        ] {
            for file in std::fs::read_dir(root.join(place)).unwrap() {
                let Ok(text) = std::fs::read_to_string(file.unwrap().path()) else {
                    continue;
                };
                let words = text.split(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '_'));
                names.extend(
                    words
                        .filter(|word| word.starts_with("freehold_"))
                        .map(str::to_owned),
                );
            }
        }
        names
    }

    fn samples(text: &str) -> BTreeSet<&str> {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.filter_map(|line| line.split(['{', ' ']).next()).collect()
    }

    #[test]
    fn every_metric_that_is_named_somewhere_is_told() {
        let metrics = Metrics::new();
        let Metrics {
            registry: _,
            heartbeats: _,
            status_writes: _,
            instances,
            restarts,
            worker_memory,
            memory_reserved: _,
            energy: _,
            model_energy,
            model_energy_tokens,
            model_joules_per_million,
            model_cost_per_million,
        } = &metrics;
        // What has labels is told once it has a value.
        let assignment = AssignmentLabel {
            assignment: "default.a.1".into(),
        };
        let model = ModelLabels::of_assignment("default.a.1");
        let _ = instances.get_or_create(&PhaseLabel {
            phase: "Ready".into(),
        });
        let _ = restarts.get_or_create(&assignment);
        let _ = worker_memory.get_or_create(&assignment);
        let _ = model_energy.get_or_create(&model);
        let _ = model_energy_tokens.get_or_create(&model);
        let _ = model_joules_per_million.get_or_create(&model);
        let _ = model_cost_per_million.get_or_create(&model);
        let text = metrics.text();
        let samples = samples(&text);
        let mut names = named();
        names.retain(|name| {
            !["freehold_operator_", "freehold_gateway_"]
                .iter()
                .any(|part| name.starts_with(part))
        });
        assert!(names.len() > 4, "{names:?}");
        let unknown: Vec<_> = names
            .iter()
            .filter(|name| !samples.contains(name.as_str()))
            .collect();
        assert!(unknown.is_empty(), "{unknown:?} are none of {samples:?}");
    }
}
