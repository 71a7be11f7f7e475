//! Energy and what it costs: who is charged with what the counters measured, and the figures for a status.
//!
//! Counters measure a whole processor or GPU. What one draws in an interval is charged to the models that
//! read or wrote tokens on it meanwhile, in proportion to those tokens; an interval without tokens is charged
//! to nobody. So a machine that is busy with other programs too makes its models look dearer than they are.

mod report;

use std::collections::BTreeMap;

use freehold_crds::Device;

pub use report::{cost_per_million_tokens, deployment_energy, joules_per_million_tokens};

/// Joules in a kilowatt hour.
pub const JOULES_PER_KILOWATT_HOUR: f64 = 3_600_000.0;

/// What one model did in an interval.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// Its assignment.
    pub assignment: String,
    /// The device it runs on.
    pub device: Device,
    /// Tokens read and written in the interval.
    pub tokens: u64,
}

/// Charges the joules of one interval, by device, to the models at work. The processor's share of a machine
/// where only models on a GPU were at work is theirs: it serves the GPU.
#[must_use]
pub fn charge(joules: &BTreeMap<Device, f64>, work: &[Work]) -> BTreeMap<String, f64> {
    let mut charged: BTreeMap<String, f64> = BTreeMap::new();
    for (&device, &joules) in joules {
        let there = |work: &&Work| work.device == device;
        let own: u64 = work.iter().filter(there).map(|work| work.tokens).sum();
        let everyone = own == 0 && device == Device::Cpu;
        let counted: Vec<&Work> = work.iter().filter(|work| everyone || there(work)).collect();
        let tokens: u64 = counted.iter().map(|work| work.tokens).sum();
        for work in counted.into_iter().filter(|work| work.tokens > 0) {
            *charged.entry(work.assignment.clone()).or_default() +=
                joules * work.tokens as f64 / tokens as f64;
        }
    }
    charged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(assignment: &str, device: Device, tokens: u64) -> Work {
        Work {
            assignment: assignment.to_owned(),
            device,
            tokens,
        }
    }

    #[test]
    fn energy_goes_to_the_models_at_work_by_tokens() {
        let joules = BTreeMap::from([(Device::Cpu, 100.0)]);
        let charged = charge(
            &joules,
            &[
                work("a", Device::Cpu, 30),
                work("b", Device::Cpu, 10),
                work("c", Device::Cpu, 0),
            ],
        );
        assert_eq!(charged, BTreeMap::from([("a".into(), 75.0), ("b".into(), 25.0)]));
        assert!(
            charge(&joules, &[work("a", Device::Cpu, 0)]).is_empty(),
            "rest is nobody's"
        );
    }

    #[test]
    fn a_gpu_is_charged_to_its_models_and_the_processor_to_them_only_when_they_are_alone() {
        let joules = BTreeMap::from([(Device::Cpu, 40.0), (Device::Cuda, 200.0)]);
        let both = charge(
            &joules,
            &[work("gpu", Device::Cuda, 900), work("cpu", Device::Cpu, 10)],
        );
        assert_eq!(
            both,
            BTreeMap::from([("gpu".into(), 200.0), ("cpu".into(), 40.0)])
        );
        let alone = charge(&joules, &[work("gpu", Device::Cuda, 900)]);
        assert_eq!(alone, BTreeMap::from([("gpu".into(), 240.0)]));
    }
}
