//! What the operator counts.

use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// A kind.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct Kind {
    pub(crate) kind: &'static str,
}

/// How a reconcile of a kind ended.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct Outcome {
    pub(crate) kind: &'static str,
    pub(crate) outcome: &'static str,
}

/// How alive a machine is.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct NodeState {
    pub(crate) state: &'static str,
}

/// The counters. Clones share them.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: Arc<Registry>,
    pub(crate) reconciles: Family<Outcome, Counter>,
    pub(crate) reconcile_seconds: Family<Kind, Histogram>,
    pub(crate) writes: Family<Kind, Counter>,
    pub(crate) objects: Family<Kind, Gauge>,
    pub(crate) malformed: Family<Kind, Gauge>,
    pub(crate) nodes: Family<NodeState, Gauge>,
    pub(crate) plans: Counter,
    pub(crate) plan_seconds: Histogram,
    pub(crate) plan_breaches: Gauge,
    pub(crate) storm: Gauge,
    pub(crate) events_dropped: Counter,
    pub(crate) leader: Gauge,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let seconds = || Histogram::new(exponential_buckets(0.0005, 4.0, 8));
        let mut registry = Registry::with_prefix("freehold_operator");
        let reconciles = Family::default();
        let reconcile_seconds = Family::new_with_constructor(seconds as fn() -> Histogram);
        let (writes, objects, malformed, nodes) =
            <(Family<_, Counter>, Family<_, _>, Family<_, _>, Family<_, Gauge>)>::default();
        let (plans, plan_seconds) = (Counter::default(), seconds());
        let (plan_breaches, storm, events_dropped, leader) = <(Gauge, Gauge, Counter, Gauge)>::default();
        registry.register(
            "reconciles",
            "Reconciles by kind and outcome",
            Family::clone(&reconciles),
        );
        registry.register(
            "reconcile_seconds",
            "Duration of reconciles",
            Family::clone(&reconcile_seconds),
        );
        registry.register("writes", "Objects written, events aside", Family::clone(&writes));
        registry.register("objects", "Objects that are known", Family::clone(&objects));
        registry.register(
            "malformed_objects",
            "Objects that do not read as their kind",
            Family::clone(&malformed),
        );
        registry.register(
            "nodes",
            "Machines by what their heartbeats say",
            Family::clone(&nodes),
        );
        registry.register("plans", "Plans made", plans.clone());
        registry.register("plan_seconds", "Duration of planning", plan_seconds.clone());
        registry.register(
            "plan_breaches",
            "Invariants that the latest plan breaks; it is not applied unless 0",
            plan_breaches.clone(),
        );
        registry.register(
            "storm",
            "1 while so much of the fleet is silent that nothing is moved",
            storm.clone(),
        );
        registry.register(
            "events_dropped",
            "Events that were not told",
            events_dropped.clone(),
        );
        registry.register("leader", "1 while this process leads", leader.clone());
        Self {
            registry: Arc::new(registry),
            reconciles,
            reconcile_seconds,
            writes,
            objects,
            malformed,
            nodes,
            plans,
            plan_seconds,
            plan_breaches,
            storm,
            events_dropped,
            leader,
        }
    }

    /// All of it in the OpenMetrics text format.
    pub(crate) fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = encode(&mut text, &self.registry);
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
            reconciles,
            reconcile_seconds,
            writes,
            objects,
            malformed,
            nodes,
            plans: _,
            plan_seconds: _,
            plan_breaches: _,
            storm: _,
            events_dropped: _,
            leader: _,
        } = &metrics;
        // What has labels is told once it has a value.
        let kind = Kind { kind: "a" };
        let _ = reconciles.get_or_create(&Outcome {
            kind: "a",
            outcome: "ok",
        });
        let _ = reconcile_seconds.get_or_create(&kind);
        let _ = writes.get_or_create(&kind);
        let _ = objects.get_or_create(&kind);
        let _ = malformed.get_or_create(&kind);
        let _ = nodes.get_or_create(&NodeState { state: "Alive" });
        let text = metrics.encode();
        let samples = samples(&text);
        let mut names = named();
        names.retain(|name| name.starts_with("freehold_operator_"));
        assert!(names.len() > 4, "{names:?}");
        let unknown: Vec<_> = names
            .iter()
            .filter(|name| !samples.contains(name.as_str()))
            .collect();
        assert!(unknown.is_empty(), "{unknown:?} are none of {samples:?}");
    }
}
