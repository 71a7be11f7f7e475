//! How long to wait before the next try: exponential, with jitter, one count an object.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rand::Rng;

/// The first pause is about this long.
const FIRST: Duration = Duration::from_secs(1);
/// No pause is longer: by then the cause is an outage, and its end should not go unnoticed for long.
const LONGEST: Duration = Duration::from_secs(60);

/// Failures in a row, by object.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    counts: Mutex<HashMap<String, u32>>,
}

impl Failures {
    /// Counts a failure and tells how long to wait.
    pub(crate) fn failed(&self, object: &str) -> Duration {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(object.to_owned()).or_default();
        let pause = pause(*count, rand::rng().random_range(0.5..=1.0));
        *count = count.saturating_add(1);
        pause
    }

    /// Forgets the failures of an object that succeeded.
    pub(crate) fn succeeded(&self, object: &str) {
        self.counts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(object);
    }
}

/// Jitter spreads the retries of many objects that failed together.
fn pause(failures: u32, jitter: f64) -> Duration {
    FIRST
        .saturating_mul(1 << failures.min(16))
        .min(LONGEST)
        .mul_f64(jitter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_minute() {
        let seconds: Vec<u64> = (0..8).map(|n| pause(n, 1.0).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(pause(u32::MAX, 0.5), Duration::from_secs(30));
    }

    #[test]
    fn success_starts_the_count_anew() {
        let failures = Failures::default();
        for _ in 0..10 {
            failures.failed("a");
        }
        assert!(failures.failed("a") >= Duration::from_secs(30));
        failures.succeeded("a");
        assert!(failures.failed("a") <= Duration::from_secs(1));
    }
}
