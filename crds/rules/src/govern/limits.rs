//! How much may be asked: requests and tokens a minute, as token buckets.
//!
//! A bucket holds one minute's worth and refills steadily, so a burst up to the limit passes and the
//! pace over time never exceeds it. Tokens are not known before the answer is complete: a request
//! reserves an estimate and settles with the true count, which may leave a debt that the next request
//! waits for. Time is handed in, as a duration since any fixed start.

use std::collections::BTreeMap;
use std::time::Duration;

use freehold_crds::Enforcement;
use freehold_crds::inference_node::CompiledPolicy;

use super::request::{Refusal, RequestViolation, Unit};

/// Seconds over which a limit counts.
const WINDOW_SECONDS: f64 = 60.0;

/// Whose requests are counted together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// The holder of a key, by name.
    Key(String),
    /// Everyone who calls a deployment without a known key, as `namespace/name`.
    Deployment(String),
}

/// An amount that refills steadily up to one minute's worth.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenBucket {
    capacity: f64,
    level: f64,
    filled_at: Duration,
}

impl TokenBucket {
    /// A full bucket of `per_minute`.
    #[must_use]
    pub fn full(per_minute: u32, now: Duration) -> Self {
        let capacity = f64::from(per_minute.max(1));
        Self {
            capacity,
            level: capacity,
            filled_at: now,
        }
    }

    /// Takes up a new limit; what was used stays used.
    fn resize(&mut self, per_minute: u32) {
        let capacity = f64::from(per_minute.max(1));
        self.level += capacity - self.capacity;
        self.capacity = capacity;
    }

    fn refill(&mut self, now: Duration) {
        let seconds = now.saturating_sub(self.filled_at).as_secs_f64();
        self.level = (self.level + seconds * self.capacity / WINDOW_SECONDS).min(self.capacity);
        self.filled_at = self.filled_at.max(now);
    }

    /// What a request of `amount` needs to find: more than a whole bucket can never be there at once.
    fn need(&self, amount: u64) -> f64 {
        (amount as f64).min(self.capacity)
    }

    /// How long until `amount` is there; zero if it is now.
    #[must_use]
    pub fn wait(&mut self, amount: u64, now: Duration) -> Duration {
        self.refill(now);
        let missing = self.need(amount) - self.level;
        // A hair less than the amount is the amount: refilling sums fractions.
        if missing <= 1e-6 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64(missing * WINDOW_SECONDS / self.capacity)
    }

    fn take(&mut self, amount: f64) {
        self.level -= amount;
    }

    fn give_back(&mut self, amount: f64) {
        self.level = (self.level + amount).min(self.capacity);
    }
}

#[derive(Clone, Debug, Default)]
struct Buckets {
    requests: Option<TokenBucket>,
    tokens: Option<TokenBucket>,
}

/// What a request took out of the buckets, to be settled once its true size is known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reservation {
    tokens: Vec<(String, Subject, f64)>,
}

/// The buckets of one gateway.
///
/// They are as many as policies with limits times keys and deployments, so clients cannot make them
/// grow. They live in memory: a restart of the agent starts a fresh minute.
#[derive(Clone, Debug, Default)]
pub struct Limiter {
    buckets: BTreeMap<(String, Subject), Buckets>,
}

impl Limiter {
    /// Lets a request of about `tokens` through, or says when to come again. Every policy must agree;
    /// where one refuses, nothing is taken from any.
    ///
    /// # Errors
    /// The refusal with the longest wait among the policies that enforce.
    pub fn admit(
        &mut self,
        policies: &[&CompiledPolicy],
        subject: &Subject,
        tokens: u64,
        now: Duration,
    ) -> Result<(Reservation, Vec<RequestViolation>), Refusal> {
        let mut refused: Option<(Duration, Refusal)> = None;
        let mut violations = Vec::new();
        for policy in policies {
            let Some(limits) = &policy.rules.limits else {
                continue;
            };
            let buckets = self
                .buckets
                .entry((policy.name.clone(), subject.clone()))
                .or_default();
            fit(&mut buckets.requests, limits.requests_per_minute, now);
            fit(&mut buckets.tokens, limits.tokens_per_minute, now);
            let checks = [
                (
                    Unit::Requests,
                    buckets.requests.as_mut(),
                    1,
                    limits.requests_per_minute,
                ),
                (
                    Unit::Tokens,
                    buckets.tokens.as_mut(),
                    tokens,
                    limits.tokens_per_minute,
                ),
            ];
            for (unit, bucket, amount, limit) in checks {
                let (Some(bucket), Some(limit)) = (bucket, limit) else {
                    continue;
                };
                let wait = bucket.wait(amount, now);
                if wait.is_zero() {
                    continue;
                }
                let refusal = Refusal::TooMuch {
                    policy: policy.name.clone(),
                    unit,
                    limit,
                    retry_after: wait,
                };
                match policy.enforcement {
                    Enforcement::Audit => violations.push(refusal.as_violation()),
                    Enforcement::Enforce => {
                        if refused.as_ref().is_none_or(|(longest, _)| wait > *longest) {
                            refused = Some((wait, refusal));
                        }
                    }
                }
            }
        }
        if let Some((_, refusal)) = refused {
            return Err(refusal);
        }
        let mut reservation = Reservation::default();
        for policy in policies {
            let key = (policy.name.clone(), subject.clone());
            let Some(buckets) = self.buckets.get_mut(&key) else {
                continue;
            };
            if let Some(bucket) = &mut buckets.requests {
                bucket.take(1.0);
            }
            if let Some(bucket) = &mut buckets.tokens {
                let amount = bucket.need(tokens);
                bucket.take(amount);
                reservation.tokens.push((key.0, key.1, amount));
            }
        }
        Ok((reservation, violations))
    }

    /// Puts the true number of tokens in the place of the estimate.
    pub fn settle(&mut self, reservation: Reservation, tokens: u64, now: Duration) {
        for (policy, subject, reserved) in reservation.tokens {
            let bucket = self
                .buckets
                .get_mut(&(policy, subject))
                .and_then(|buckets| buckets.tokens.as_mut());
            if let Some(bucket) = bucket {
                bucket.refill(now);
                bucket.give_back(reserved - tokens as f64);
            }
        }
    }

    /// Forgets buckets whose policy, key or deployment is gone.
    pub fn retain(&mut self, policies: &[CompiledPolicy]) {
        let known_key = |name: &str| {
            policies
                .iter()
                .filter_map(|policy| policy.rules.access.as_ref())
                .any(|access| access.keys.iter().any(|key| key.name == name))
        };
        self.buckets.retain(|(policy, subject), _| {
            let Some(policy) = policies.iter().find(|candidate| candidate.name == *policy) else {
                return false;
            };
            policy.rules.limits.is_some()
                && match subject {
                    Subject::Key(name) => known_key(name),
                    Subject::Deployment(key) => policy.deployments.contains(key),
                }
        });
    }
}

/// Makes a bucket be what the limit says: there, of that size, or not there.
fn fit(bucket: &mut Option<TokenBucket>, limit: Option<u32>, now: Duration) {
    match (bucket.as_mut(), limit) {
        (_, None) => *bucket = None,
        (None, Some(limit)) => *bucket = Some(TokenBucket::full(limit, now)),
        (Some(bucket), Some(limit)) => bucket.resize(limit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use freehold_crds::governance_policy::{LimitRules, PolicyRules};
    use proptest::prelude::*;

    fn policy(name: &str, requests: Option<u32>, tokens: Option<u32>) -> CompiledPolicy {
        CompiledPolicy {
            name: name.to_owned(),
            deployments: vec!["team/chat".to_owned()],
            rules: PolicyRules {
                limits: Some(LimitRules {
                    requests_per_minute: requests,
                    tokens_per_minute: tokens,
                    ..LimitRules::default()
                }),
                ..PolicyRules::default()
            },
            ..CompiledPolicy::default()
        }
    }

    fn subject() -> Subject {
        Subject::Deployment("team/chat".to_owned())
    }

    const START: Duration = Duration::from_secs(1000);

    #[test]
    fn burst_passes_and_the_next_waits_for_its_refill() {
        let policy = policy("p", Some(3), None);
        let mut limiter = Limiter::default();
        for _ in 0..3 {
            limiter
                .admit(&[&policy], &subject(), 0, START)
                .expect("within the limit");
        }
        let refusal = limiter
            .admit(&[&policy], &subject(), 0, START)
            .expect_err("over the limit");
        let Refusal::TooMuch {
            retry_after, unit, ..
        } = &refusal
        else {
            panic!("{refusal}");
        };
        assert_eq!((*unit, retry_after.as_secs()), (Unit::Requests, 20));
        limiter
            .admit(&[&policy], &subject(), 0, START + *retry_after)
            .expect("passes at exactly the time it was told");
    }

    #[test]
    fn one_subject_does_not_use_up_anothers_limit() {
        let policy = policy("p", Some(1), None);
        let mut limiter = Limiter::default();
        for name in ["ann", "bob"] {
            let subject = Subject::Key(name.to_owned());
            limiter
                .admit(&[&policy], &subject, 0, START)
                .expect("its own bucket");
            assert!(limiter.admit(&[&policy], &subject, 0, START).is_err());
        }
    }

    #[test]
    fn strictest_policy_wins_and_a_refusal_takes_nothing() {
        let (wide, narrow) = (policy("wide", Some(2), None), policy("narrow", Some(1), None));
        let mut limiter = Limiter::default();
        limiter
            .admit(&[&wide, &narrow], &subject(), 0, START)
            .expect("both allow one");
        assert!(limiter.admit(&[&wide, &narrow], &subject(), 0, START).is_err());
        limiter
            .admit(&[&wide], &subject(), 0, START)
            .expect("the refused request took nothing from wide");
        assert!(limiter.admit(&[&wide], &subject(), 0, START).is_err());
    }

    #[test]
    fn unused_tokens_come_back_and_overuse_is_owed() {
        let policy = policy("p", None, Some(100));
        let mut limiter = Limiter::default();
        let (reservation, _) = limiter
            .admit(&[&policy], &subject(), 100, START)
            .expect("a full bucket");
        assert!(
            limiter.admit(&[&policy], &subject(), 10, START).is_err(),
            "all is reserved"
        );
        limiter.settle(reservation, 40, START);
        let (reservation, _) = limiter
            .admit(&[&policy], &subject(), 60, START)
            .expect("60 came back");
        limiter.settle(reservation, 110, START);
        let refusal = limiter
            .admit(&[&policy], &subject(), 10, START)
            .expect_err("50 are owed");
        let Refusal::TooMuch { retry_after, .. } = refusal else {
            panic!("{refusal}");
        };
        assert_eq!(retry_after.as_secs(), 36, "60 tokens at 100 a minute");
    }

    #[test]
    fn request_larger_than_the_limit_passes_with_a_full_bucket() {
        let policy = policy("p", None, Some(10));
        let mut limiter = Limiter::default();
        limiter
            .admit(&[&policy], &subject(), 5000, START)
            .expect("it would never pass otherwise");
        assert!(limiter.admit(&[&policy], &subject(), 1, START).is_err());
    }

    #[test]
    fn audit_lets_pass_and_records() {
        let mut audited = policy("p", Some(1), None);
        audited.enforcement = Enforcement::Audit;
        let mut limiter = Limiter::default();
        let (_, none) = limiter.admit(&[&audited], &subject(), 0, START).expect("passes");
        assert_eq!(none, []);
        let (_, violations) = limiter.admit(&[&audited], &subject(), 0, START).expect("passes");
        assert_eq!(violations.len(), 1);
        assert_eq!(violations[0].rule, "spec.limits.requestsPerMinute");
    }

    #[test]
    fn a_changed_limit_keeps_what_was_used() {
        let mut limiter = Limiter::default();
        for _ in 0..2 {
            limiter
                .admit(&[&policy("p", Some(2), None)], &subject(), 0, START)
                .expect("within");
        }
        let wider = policy("p", Some(3), None);
        limiter
            .admit(&[&wider], &subject(), 0, START)
            .expect("one more under the new limit");
        assert!(limiter.admit(&[&wider], &subject(), 0, START).is_err());
    }

    #[test]
    fn buckets_of_gone_policies_are_forgotten() {
        let mut limiter = Limiter::default();
        let kept = policy("kept", Some(1), None);
        limiter
            .admit(&[&kept, &policy("gone", Some(1), None)], &subject(), 0, START)
            .expect("within");
        limiter.retain(std::slice::from_ref(&kept));
        assert_eq!(limiter.buckets.len(), 1);
        assert!(
            limiter.admit(&[&kept], &subject(), 0, START).is_err(),
            "the kept one still counts"
        );
    }

    proptest! {
        #[test]
        fn no_minute_passes_more_than_two_buckets(
            limit in 1_u32..50,
            gaps in proptest::collection::vec(0_u64..10_000, 1..200),
        ) {
            let policy = policy("p", Some(limit), None);
            let mut limiter = Limiter::default();
            let mut now = START;
            let mut passed = Vec::new();
            for gap in gaps {
                now += Duration::from_millis(gap);
                if limiter.admit(&[&policy], &subject(), 0, now).is_ok() {
                    passed.push(now);
                }
            }
            for &start in &passed {
                let within = passed
                    .iter()
                    .filter(|&&at| at >= start && at < start + Duration::from_secs(60))
                    .count();
                // A full bucket at the start, and one refill in the course of the minute.
                prop_assert!(within <= 2 * limit as usize);
            }
        }
    }
}
