//! Pauses between tries: doubling, bounded, and not in step with those of other instances.

use std::time::Duration;

/// After the first failure: a crash by bad luck costs little.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Between tries of what has failed often: a machine that tries on for days is not worn out by it.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// Counts failures in a row and says how long to wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backoff {
    failures: u32,
    random: u64,
}

impl Backoff {
    /// No failure yet. Equal seeds give equal pauses.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            failures: 0,
            random: seed,
        }
    }

    /// Failures in a row.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Forgets them.
    pub fn forgive(&mut self) {
        self.failures = 0;
    }

    /// Counts one more failure; the pause after it is within a quarter of the doubled one before.
    pub fn next_pause(&mut self) -> Duration {
        let doublings = self.failures.min(16);
        self.failures = self.failures.saturating_add(1);
        let pause = FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE);
        pause.mul_f64(0.75 + self.next_unit() / 2.0)
    }

    /// splitmix64, as a number in `[0, 1)`.
    fn next_unit(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        // The upper 53 bits fill a double exactly.
        (mixed >> 11) as f64 / (1_u64 << 53) as f64
    }
}
