//! Energy: reads the machine's counters, charges models with what they drew, and keeps the books for status
//! and metrics.
//!
//! One task. It reads every few seconds, takes the tokens that each model read and wrote meanwhile from the
//! supervisor's snapshot, and lets [`freehold_rules::energy::charge`] decide. A machine without counters is
//! told of once; nothing runs there.

mod counters;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use freehold_crds::Device;
use freehold_crds::energy::{EnergyMeter, EnergyUse};
use freehold_crds::inference_node::{InferenceNodeStatus, Instance};
use freehold_rules::energy::{Work, charge};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

use crate::metrics::{Metrics, ModelLabels};
use crate::status::Snapshot;
use counters::Meter;

/// Between two readings: a RAPL counter runs for minutes before it begins again, and a model that worked in
/// an interval is charged for all of it.
pub(crate) const READ_EVERY: Duration = Duration::from_secs(5);

/// What a kilowatt hour costs here.
#[derive(Clone, Debug, PartialEq)]
pub struct EnergyPrice {
    /// Money for a kilowatt hour.
    pub per_kilowatt_hour: f64,
    /// Its currency, such as `EUR`.
    pub currency: String,
}

/// What was counted since the agent started.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Books {
    counters: Vec<String>,
    devices: Vec<Device>,
    reason: Option<String>,
    joules: f64,
    price: Option<EnergyPrice>,
    models: BTreeMap<String, Account>,
}

/// One model's account.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Account {
    joules: f64,
    /// Tokens that were charged for.
    tokens: u64,
    /// The counter of tokens at the latest reading.
    seen: u64,
}

impl Books {
    /// Writes what is known into a status.
    pub(crate) fn fill(&self, status: &mut InferenceNodeStatus) {
        status.energy = Some(EnergyMeter {
            counters: self.counters.clone(),
            reason: self.reason.clone(),
            joules: (!self.counters.is_empty()).then_some(self.joules.round() as u64),
            price_per_kilowatt_hour: self
                .price
                .as_ref()
                .map(|price| price.per_kilowatt_hour.to_string()),
            currency: self.price.as_ref().map(|price| price.currency.clone()),
        });
        for instance in &mut status.instances {
            let counted = instance
                .device
                .is_some_and(|device| self.devices.contains(&device));
            instance.energy = counted.then(|| self.used(&instance.name));
        }
    }

    fn used(&self, assignment: &str) -> EnergyUse {
        let account = self.models.get(assignment).copied().unwrap_or_default();
        EnergyUse {
            joules: account.joules.round() as u64,
            tokens: account.tokens,
        }
    }

    /// Takes up one interval: what was drawn, and what the models did.
    fn take_up(&mut self, joules: &BTreeMap<Device, f64>, instances: &[Instance]) -> Vec<Charged> {
        self.joules += joules.values().sum::<f64>();
        self.models
            .retain(|name, _| instances.iter().any(|instance| instance.name == *name));
        let mut work = Vec::new();
        for instance in instances {
            let tokens = instance.tokens_generated + instance.prompt_tokens;
            let account = self.models.entry(instance.name.clone()).or_default();
            // A worker that was replaced while nobody looked counts from nothing again.
            let done = tokens.checked_sub(account.seen).unwrap_or(tokens);
            account.seen = tokens;
            if let Some(device) = instance.device {
                work.push(Work {
                    assignment: instance.name.clone(),
                    device,
                    tokens: done,
                });
            }
        }
        let mut charged = charge(joules, &work);
        let mut told = Vec::new();
        for work in work {
            let Some(joules) = charged.remove(&work.assignment) else {
                continue;
            };
            if let Some(account) = self.models.get_mut(&work.assignment) {
                account.joules += joules;
                account.tokens += work.tokens;
            }
            told.push(Charged {
                assignment: work.assignment,
                joules,
                tokens: work.tokens,
            });
        }
        told
    }
}

/// What one interval cost a model.
#[derive(Debug, PartialEq)]
struct Charged {
    assignment: String,
    joules: f64,
    tokens: u64,
}

/// Reads until the task is dropped, or for good where there is nothing to read.
pub(crate) async fn run(
    powercap: PathBuf,
    every: Duration,
    price: Option<EnergyPrice>,
    snapshot: watch::Receiver<Snapshot>,
    books: watch::Sender<Books>,
    metrics: Arc<Metrics>,
) {
    // NVML answers within milliseconds, or not at all while a driver hangs: never on the runtime's threads.
    let Ok(mut meter) = tokio::task::spawn_blocking(move || Meter::open(&powercap)).await else {
        return;
    };
    let counters = meter.names();
    match &meter.reason {
        Some(reason) if counters.is_empty() => info!(reason, "Energy is not measured"),
        Some(reason) => warn!(reason, "Energy is measured in part"),
        None => info!(?counters, "Measures energy"),
    }
    books.send_replace(Books {
        counters,
        devices: meter.devices(),
        reason: meter.reason.clone(),
        price: price.clone(),
        ..Books::default()
    });
    if meter.devices().is_empty() {
        return;
    }
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let read = tokio::task::spawn_blocking(move || {
            let joules = meter.read();
            (meter, joules)
        });
        let Ok((returned, joules)) = read.await else {
            return;
        };
        meter = returned;
        let instances = snapshot.borrow().instances.clone();
        books.send_modify(|books| account(books, &joules, &instances, &metrics, price.as_ref()));
    }
}

/// Takes one interval into the books and the metrics.
fn account(
    books: &mut Books,
    joules: &BTreeMap<Device, f64>,
    instances: &[Instance],
    metrics: &Metrics,
    price: Option<&EnergyPrice>,
) {
    metrics.energy.inc_by(joules.values().sum());
    for charged in books.take_up(joules, instances) {
        tell(metrics, &charged, price);
    }
}

/// The counters of a model outlive its assignments, as those of Prometheus do.
fn tell(metrics: &Metrics, charged: &Charged, price: Option<&EnergyPrice>) {
    let model = ModelLabels::of_assignment(&charged.assignment);
    let joules = metrics.model_energy.get_or_create(&model).inc_by(charged.joules) + charged.joules;
    let tokens = metrics
        .model_energy_tokens
        .get_or_create(&model)
        .inc_by(charged.tokens)
        + charged.tokens;
    if tokens == 0 {
        return;
    }
    let per_million = joules * 1e6 / tokens as f64;
    metrics
        .model_joules_per_million
        .get_or_create(&model)
        .set(per_million);
    if let Some(price) = price {
        let cost = per_million / freehold_rules::energy::JOULES_PER_KILOWATT_HOUR * price.per_kilowatt_hour;
        metrics.model_cost_per_million.get_or_create(&model).set(cost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(name: &str, prompt_tokens: u64, tokens_generated: u64) -> Instance {
        Instance {
            name: name.to_owned(),
            device: Some(Device::Cpu),
            prompt_tokens,
            tokens_generated,
            ..Instance::default()
        }
    }

    fn cpu(joules: f64) -> BTreeMap<Device, f64> {
        BTreeMap::from([(Device::Cpu, joules)])
    }

    #[test]
    fn accounts_follow_what_models_did_since_the_last_reading() {
        let mut books = Books {
            counters: vec!["package-0".to_owned()],
            devices: vec![Device::Cpu],
            ..Books::default()
        };
        books.take_up(&BTreeMap::new(), &[instance("a", 100, 100)]);
        books.take_up(&cpu(50.0), &[instance("a", 100, 150), instance("b", 0, 0)]);
        // At rest nobody is charged, and the machine draws all the same.
        books.take_up(&cpu(9.0), &[instance("a", 100, 150), instance("b", 0, 0)]);
        // The worker was replaced: its counters began again.
        books.take_up(&cpu(10.0), &[instance("a", 0, 10), instance("b", 5, 5)]);
        let mut status = InferenceNodeStatus {
            instances: vec![instance("a", 0, 10), instance("b", 5, 5)],
            ..InferenceNodeStatus::default()
        };
        books.fill(&mut status);
        let used = |index: usize| status.instances[index].energy.expect("counted");
        assert_eq!((used(0).joules, used(0).tokens), (55, 60));
        assert_eq!((used(1).joules, used(1).tokens), (5, 10));
        assert_eq!(status.energy.expect("a meter").joules, Some(69));
    }

    #[test]
    fn without_counters_there_is_a_reason_and_no_figure() {
        let books = Books {
            reason: Some("no counter".to_owned()),
            ..Books::default()
        };
        let mut status = InferenceNodeStatus {
            instances: vec![instance("a", 1, 1)],
            ..InferenceNodeStatus::default()
        };
        books.fill(&mut status);
        let meter = status.energy.expect("a meter");
        assert_eq!(
            (meter.joules, meter.reason.as_deref()),
            (None, Some("no counter"))
        );
        assert_eq!(status.instances[0].energy, None);
    }

    #[test]
    fn from_the_counters_to_the_metrics() {
        let folder = counters::tests::powercap([0, 0]);
        let mut meter = Meter::open(folder.path());
        let metrics = Metrics::new();
        let price = EnergyPrice {
            per_kilowatt_hour: 0.36,
            currency: "EUR".to_owned(),
        };
        let mut books = Books::default();
        let mut interval = |instance: Instance| {
            let joules = meter.read();
            account(&mut books, &joules, &[instance], &metrics, Some(&price));
        };
        interval(instance("home.chat.1", 0, 0));
        counters::tests::set(&folder, [400_000_000, 100_000_000]);
        interval(instance("home.chat.1", 500, 500));
        let text = metrics.text();
        let shows = |line: &str| assert!(text.contains(line), "{line} is not in {text}");
        shows("freehold_energy_joules_total{namespace=\"home\",model=\"chat\"} 500.0");
        shows("freehold_energy_tokens_total{namespace=\"home\",model=\"chat\"} 1000");
        shows("freehold_joules_per_million_tokens{namespace=\"home\",model=\"chat\"} 500000.0");
        shows("freehold_cost_per_million_tokens{namespace=\"home\",model=\"chat\"} 0.05");
        shows("freehold_agent_energy_joules_total 500.0");
    }
}
