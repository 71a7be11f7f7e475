//! The agent's own metrics. The gateway's are its own affair; both are served together.

use std::sync::Mutex;
use std::sync::atomic::AtomicI64;

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

/// What the agent counts.
pub(crate) struct Metrics {
    registry: Mutex<Registry>,
    pub(crate) heartbeats: Counter,
    pub(crate) status_writes: Counter,
    pub(crate) instances: Family<PhaseLabel, Gauge>,
    pub(crate) restarts: Family<AssignmentLabel, Counter>,
    pub(crate) worker_memory: Family<AssignmentLabel, Gauge<i64, AtomicI64>>,
    pub(crate) memory_reserved: Gauge,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("freehold_agent");
        let metrics = Self {
            registry: Mutex::default(),
            heartbeats: Counter::default(),
            status_writes: Counter::default(),
            instances: Family::default(),
            restarts: Family::default(),
            worker_memory: Family::default(),
            memory_reserved: Gauge::default(),
        };
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
        *metrics
            .registry
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = registry;
        metrics
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
