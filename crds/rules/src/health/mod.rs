//! What the results of checks mean: thresholds, and whether the watchdog may restart a worker for them.
//!
//! [`CheckState::observe`] turns single results into a state; [`remedy`] decides what follows. Slowness
//! never leads to a restart: the outcome of such a check says so itself.

use std::time::Duration;

use freehold_crds::health_probe::{Remediation, RemediationAction};
use freehold_crds::inference_node::ProbeState;

/// One result of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Within bounds.
    Pass(String),
    /// Out of bounds.
    Fail {
        /// What was found, what is allowed.
        message: String,
        /// Whether a restart could mend it.
        may_restart: bool,
    },
    /// Nothing could be measured, such as the temperature of a machine without a sensor.
    Unknown(String),
}

/// Results in a row that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thresholds {
    /// Failures after which a check counts as failing.
    pub failure: u32,
    /// Successes after which it counts as healthy.
    pub success: u32,
}

/// A check over time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckState {
    state: ProbeState,
    in_a_row: u32,
    passing: bool,
    message: Option<String>,
    may_restart: bool,
}

impl CheckState {
    /// Takes one more result in.
    pub fn observe(&mut self, outcome: Outcome, thresholds: Thresholds) {
        let (passing, message, may_restart) = match outcome {
            Outcome::Pass(message) => (true, message, false),
            Outcome::Fail { message, may_restart } => (false, message, may_restart),
            Outcome::Unknown(message) => {
                // Neither good nor bad: the counts stay, and a state that is known does too.
                if self.state == ProbeState::Unknown {
                    self.message = Some(message);
                }
                return;
            }
        };
        self.in_a_row = if passing == self.passing {
            self.in_a_row.saturating_add(1)
        } else {
            1
        };
        self.passing = passing;
        self.may_restart = may_restart;
        let (threshold, state) = if passing {
            (thresholds.success, ProbeState::Healthy)
        } else {
            (thresholds.failure, ProbeState::Failing)
        };
        // A first success is enough when nothing is known yet; a message is news only with its state.
        let counts = self.in_a_row >= threshold.max(1) || (passing && self.state == ProbeState::Unknown);
        if counts && self.state != state {
            self.state = state;
            self.message = Some(message);
        }
    }

    /// Where the check stands.
    #[must_use]
    pub fn state(&self) -> ProbeState {
        self.state
    }

    /// What was seen when it came to stand there.
    #[must_use]
    pub fn message(&self) -> Option<&str> {
        self.message.as_deref()
    }

    /// Whether it fails in a way that a restart could mend.
    #[must_use]
    pub fn asks_for_restart(&self) -> bool {
        self.state == ProbeState::Failing && !self.passing && self.may_restart
    }

    /// Starts counting anew, as after a restart; what is known stays until there is news.
    pub fn forget_count(&mut self) {
        self.in_a_row = 0;
        self.may_restart = false;
    }
}

/// Restarts that probes caused on one instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RestartBook {
    at: Vec<Duration>,
}

impl RestartBook {
    /// Notes one.
    pub fn note(&mut self, now: Duration) {
        self.at.push(now);
        // More than any budget allows within any window.
        if self.at.len() > 1024 {
            self.at.remove(0);
        }
    }

    /// Restarts within the last `window`.
    #[must_use]
    pub fn within(&self, now: Duration, window: Duration) -> u32 {
        let count = self
            .at
            .iter()
            .filter(|at| now.saturating_sub(**at) < window)
            .count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    fn last(&self) -> Option<Duration> {
        self.at.last().copied()
    }
}

/// What one instance's circumstances are when a check asks for a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Circumstances {
    /// Now.
    pub now: Duration,
    /// Since when the worker has been ready.
    pub ready_since: Duration,
    /// Most restarts an hour that a policy allows.
    pub most_an_hour: Option<u32>,
    /// Replicas in the fleet that the probe selects and finds healthy, as far as this machine knows.
    pub healthy: u32,
    /// Replicas in the fleet that the probe selects, as far as this machine knows.
    pub replicas: u32,
}

/// What follows from a failing check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Nothing but reporting.
    Report,
    /// The worker is restarted.
    Restart,
    /// Not yet: the worker has just started, or was restarted a short while ago.
    Wait,
    /// No more restarts: the budget is spent, or too much is unwell at once for restarts to be the answer.
    Suspend(String),
}

/// Whether a failing check that a restart could mend leads to one.
#[must_use]
pub fn remedy(remediation: &Remediation, book: &RestartBook, here: Circumstances) -> Remedy {
    if remediation.action != RemediationAction::Restart {
        return Remedy::Report;
    }
    let window = Duration::from_secs(remediation.window_seconds.into());
    let restarts = book.within(here.now, window);
    if restarts >= remediation.budget {
        return Remedy::Suspend(format!(
            "{restarts} of {} restarts within {} s are spent",
            remediation.budget, remediation.window_seconds
        ));
    }
    if let Some(most) = here.most_an_hour
        && book.within(here.now, Duration::from_secs(3600)) >= most
    {
        return Remedy::Suspend(format!("a policy allows {most} restarts an hour"));
    }
    let needed = u64::from(remediation.min_healthy_percent) * u64::from(here.replicas);
    if u64::from(here.healthy) * 100 < needed {
        return Remedy::Suspend(format!(
            "{} of {} replicas are healthy and {} % must be",
            here.healthy, here.replicas, remediation.min_healthy_percent
        ));
    }
    let minimum_run = Duration::from_secs(remediation.minimum_run_seconds.into());
    // Doubled with each restart within the window; ten doublings of any cooldown outlast the window.
    let cooldown = Duration::from_secs(remediation.cooldown_seconds.into())
        .saturating_mul(1 << restarts.saturating_sub(1).min(10));
    let young = here.now.saturating_sub(here.ready_since) < minimum_run;
    let cooling = book
        .last()
        .is_some_and(|last| here.now.saturating_sub(last) < cooldown);
    if young || cooling {
        Remedy::Wait
    } else {
        Remedy::Restart
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THREE_TIMES: Thresholds = Thresholds {
        failure: 3,
        success: 2,
    };

    fn fail() -> Outcome {
        Outcome::Fail {
            message: "no answer".to_owned(),
            may_restart: true,
        }
    }

    fn pass() -> Outcome {
        Outcome::Pass("answered".to_owned())
    }

    #[test]
    fn a_check_fails_and_recovers_at_its_thresholds() {
        let mut check = CheckState::default();
        assert_eq!(check.state(), ProbeState::Unknown);
        let mut seen = Vec::new();
        for outcome in [
            pass(),
            fail(),
            fail(),
            pass(),
            fail(),
            fail(),
            fail(),
            pass(),
            pass(),
        ] {
            check.observe(outcome, THREE_TIMES);
            seen.push(check.state());
        }
        use ProbeState::{Failing, Healthy};
        assert_eq!(
            seen,
            [
                Healthy, Healthy, Healthy, Healthy, Healthy, Healthy, Failing, Failing, Healthy
            ]
        );
    }

    #[test]
    fn what_cannot_be_measured_counts_neither_way() {
        let mut check = CheckState::default();
        check.observe(Outcome::Unknown("no sensor".to_owned()), THREE_TIMES);
        assert_eq!(
            (check.state(), check.message()),
            (ProbeState::Unknown, Some("no sensor"))
        );
        for _ in 0..3 {
            check.observe(fail(), THREE_TIMES);
            check.observe(Outcome::Unknown("busy".to_owned()), THREE_TIMES);
        }
        assert_eq!(
            (check.state(), check.message()),
            (ProbeState::Failing, Some("no answer"))
        );
    }

    #[test]
    fn slowness_asks_for_no_restart() {
        let mut check = CheckState::default();
        for _ in 0..9 {
            check.observe(
                Outcome::Fail {
                    message: "slow".to_owned(),
                    may_restart: false,
                },
                THREE_TIMES,
            );
        }
        assert_eq!(check.state(), ProbeState::Failing);
        assert!(!check.asks_for_restart());
    }

    fn remediation() -> Remediation {
        Remediation {
            action: RemediationAction::Restart,
            budget: 2,
            window_seconds: 1000,
            minimum_run_seconds: 60,
            cooldown_seconds: 100,
            min_healthy_percent: 0,
        }
    }

    fn at(now: u64) -> Circumstances {
        Circumstances {
            now: Duration::from_secs(now),
            ready_since: Duration::ZERO,
            most_an_hour: None,
            healthy: 0,
            replicas: 1,
        }
    }

    #[test]
    fn restarts_keep_to_minimum_run_cooldown_and_budget() {
        let mut book = RestartBook::default();
        assert_eq!(remedy(&remediation(), &book, at(59)), Remedy::Wait);
        assert_eq!(remedy(&remediation(), &book, at(60)), Remedy::Restart);
        book.note(Duration::from_secs(60));
        assert_eq!(remedy(&remediation(), &book, at(159)), Remedy::Wait);
        assert_eq!(remedy(&remediation(), &book, at(160)), Remedy::Restart);
        book.note(Duration::from_secs(160));
        assert!(matches!(
            remedy(&remediation(), &book, at(500)),
            Remedy::Suspend(_)
        ));
        // The window has moved on: one is forgotten, and the cooldown is over.
        assert_eq!(remedy(&remediation(), &book, at(1060)), Remedy::Restart);
    }

    #[test]
    fn a_policy_can_be_stricter_than_the_probe() {
        let mut book = RestartBook::default();
        let strict = Circumstances {
            most_an_hour: Some(1),
            ..at(400)
        };
        assert_eq!(remedy(&remediation(), &book, strict), Remedy::Restart);
        book.note(Duration::from_secs(100));
        assert!(matches!(
            remedy(&remediation(), &book, strict),
            Remedy::Suspend(_)
        ));
    }

    #[test]
    fn a_storm_is_not_answered_with_restarts() {
        let remediation = Remediation {
            min_healthy_percent: 50,
            ..remediation()
        };
        let book = RestartBook::default();
        let storm = Circumstances {
            healthy: 1,
            replicas: 4,
            ..at(400)
        };
        assert!(matches!(remedy(&remediation, &book, storm), Remedy::Suspend(_)));
        let one = Circumstances { healthy: 3, ..storm };
        assert_eq!(remedy(&remediation, &book, one), Remedy::Restart);
    }

    #[test]
    fn nothing_is_restarted_unless_asked_for() {
        let none = Remediation::default();
        assert_eq!(remedy(&none, &RestartBook::default(), at(9999)), Remedy::Report);
    }
}
