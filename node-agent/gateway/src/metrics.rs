//! What the gateway counts, for Prometheus. Labels are names that the plan knows, fixed addresses and
//! status codes, never anything that a client made up.

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Which part of the API a request speaks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Endpoint {
    #[allow(non_camel_case_types, reason = "the label's value")]
    chat_completions,
    #[allow(non_camel_case_types, reason = "the label's value")]
    completions,
    #[allow(non_camel_case_types, reason = "the label's value")]
    embeddings,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    model: String,
    endpoint: Endpoint,
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabel {
    model: String,
}

impl ModelLabel {
    fn of(model: &str) -> Self {
        Self {
            model: model.to_owned(),
        }
    }
}

/// The instruments.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    first_token: Family<ModelLabel, Histogram>,
    duration: Family<ModelLabel, Histogram>,
    pace: Family<ModelLabel, Histogram>,
    in_flight: Family<ModelLabel, Gauge>,
    waiting: Family<ModelLabel, Gauge>,
    prompt_tokens: Family<ModelLabel, Counter>,
    completion_tokens: Family<ModelLabel, Counter>,
    pub(crate) audit_failures: Counter,
    pub(crate) audit_dropped: Counter,
    pub(crate) connections: Gauge,
}

/// What a finished request adds.
pub(crate) struct Observation<'a> {
    /// The name on the bus; empty where the client asked for one that is not there.
    pub(crate) model: &'a str,
    pub(crate) endpoint: Endpoint,
    pub(crate) code: u16,
    pub(crate) duration_seconds: f64,
    pub(crate) first_token_seconds: Option<f64>,
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) tokens_per_second: Option<f64>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        // From 5 ms (a cached prompt on a small model) to 80 s (a long one on a slow machine).
        let seconds: fn() -> Histogram = || Histogram::new(exponential_buckets(0.005, 2.0, 15));
        // From 0.5 to 8192 tokens/s.
        let pace: fn() -> Histogram = || Histogram::new(exponential_buckets(0.5, 2.0, 15));
        let metrics = Self {
            registry: Registry::with_prefix("freehold_gateway"),
            requests: Family::default(),
            first_token: Family::new_with_constructor(seconds),
            duration: Family::new_with_constructor(seconds),
            pace: Family::new_with_constructor(pace),
            in_flight: Family::default(),
            waiting: Family::default(),
            prompt_tokens: Family::default(),
            completion_tokens: Family::default(),
            audit_failures: Counter::default(),
            audit_dropped: Counter::default(),
            connections: Gauge::default(),
        };
        metrics.registered()
    }

    fn registered(mut self) -> Self {
        let registry = &mut self.registry;
        registry.register(
            "requests",
            "Requests answered, by name and code",
            self.requests.clone(),
        );
        registry.register_with_unit(
            "time_to_first_token",
            "From the request to the first piece of its answer",
            Unit::Seconds,
            self.first_token.clone(),
        );
        registry.register_with_unit(
            "request_duration",
            "From the request to the end of its answer",
            Unit::Seconds,
            self.duration.clone(),
        );
        registry.register(
            "tokens_per_second",
            "Pace of one answer after its first token",
            self.pace.clone(),
        );
        registry.register(
            "requests_in_flight",
            "Requests being served",
            self.in_flight.clone(),
        );
        registry.register(
            "requests_waiting",
            "Requests in flight that have no token yet: queued, being loaded for, or in prefill",
            self.waiting.clone(),
        );
        registry.register("prompt_tokens", "Tokens of prompts", self.prompt_tokens.clone());
        registry.register(
            "completion_tokens",
            "Tokens of answers",
            self.completion_tokens.clone(),
        );
        registry.register(
            "audit_failures",
            "Requests whose audit record could not be opened",
            self.audit_failures.clone(),
        );
        registry.register(
            "audit_dropped",
            "Records of refused requests that were dropped because too many came at once",
            self.audit_dropped.clone(),
        );
        registry.register(
            "connections",
            "Open connections of clients",
            self.connections.clone(),
        );
        self
    }

    pub(crate) fn observe(&self, seen: &Observation<'_>) {
        let model = ModelLabel::of(seen.model);
        self.requests
            .get_or_create(&RequestLabels {
                model: seen.model.to_owned(),
                endpoint: seen.endpoint,
                code: seen.code,
            })
            .inc();
        if seen.model.is_empty() {
            return;
        }
        self.duration.get_or_create(&model).observe(seen.duration_seconds);
        if let Some(seconds) = seen.first_token_seconds {
            self.first_token.get_or_create(&model).observe(seconds);
        }
        if let Some(pace) = seen.tokens_per_second {
            self.pace.get_or_create(&model).observe(pace);
        }
        self.prompt_tokens
            .get_or_create(&model)
            .inc_by(seen.prompt_tokens);
        self.completion_tokens
            .get_or_create(&model)
            .inc_by(seen.completion_tokens);
    }

    /// Counts a request in flight until the guard goes.
    pub(crate) fn enter(&self, model: &str) -> InFlight {
        let label = ModelLabel::of(model);
        let guard = InFlight {
            in_flight: self.in_flight.get_or_create_owned(&label),
            waiting: Some(self.waiting.get_or_create_owned(&label)),
        };
        guard.in_flight.inc();
        if let Some(waiting) = &guard.waiting {
            waiting.inc();
        }
        guard
    }

    /// The text that Prometheus scrapes.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        match encode(&mut text, &self.registry) {
            Ok(()) => text,
            // Writing into a string does not fail.
            Err(_) => String::new(),
        }
    }
}

/// One request in flight.
#[derive(Debug)]
pub(crate) struct InFlight {
    in_flight: Gauge,
    waiting: Option<Gauge>,
}

impl InFlight {
    /// The first token came.
    pub(crate) fn begun(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            waiting.dec();
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.begun();
        self.in_flight.dec();
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
        let root = Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap()).join("../..");
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
        metrics.observe(&Observation {
            model: "a",
            endpoint: Endpoint::completions,
            code: 200,
            duration_seconds: 1.0,
            first_token_seconds: Some(0.5),
            prompt_tokens: 1,
            completion_tokens: 1,
            tokens_per_second: Some(2.0),
        });
        drop(metrics.enter("a"));
        let text = metrics.text();
        let samples = samples(&text);
        let mut names = named();
        names.retain(|name| name.starts_with("freehold_gateway_"));
        assert!(names.len() > 4, "{names:?}");
        let unknown: Vec<_> = names
            .iter()
            .filter(|name| !samples.contains(name.as_str()))
            .collect();
        assert!(unknown.is_empty(), "{unknown:?} are none of {samples:?}");
    }
}
