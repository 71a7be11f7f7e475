//! Which machines are heard: judged by the change of their Leases, on this process's monotonic clock.
//!
//! What a sender writes as its time is never read as a time, so clocks that disagree do no harm.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use freehold_rules::plan::Liveness;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use tokio::time::Instant;

/// Four heartbeats of 10 s missed: requests are routed away, which is undone at once on return.
pub(crate) const SILENT_AFTER: Duration = Duration::from_secs(40);
/// Only then replicas are placed elsewhere: fetching and loading a model costs minutes.
pub(crate) const LOST_AFTER: Duration = Duration::from_secs(90);
/// A machine without a Lease and without work is forgotten after this time, unless settings say otherwise.
pub const FORGET_AFTER: Duration = Duration::from_secs(600);

/// What the heartbeats say.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Judgement {
    /// Each machine.
    pub(crate) by_node: BTreeMap<String, Liveness>,
    /// When the next verdict changes if no heartbeat comes.
    pub(crate) next_change_in: Option<Duration>,
    /// More than half of the fleet is silent: a broken network is likelier than broken machines, so
    /// nothing is moved.
    pub(crate) storm: bool,
}

/// Judges machines by how long each has been silent.
pub(crate) fn judge(silences: &BTreeMap<String, Duration>, forget_after: Duration) -> Judgement {
    let silent = silences
        .values()
        .filter(|silence| **silence >= SILENT_AFTER)
        .count();
    let storm = silent * 2 > silences.len();
    let verdict = |silence: &Duration| match *silence {
        silence if silence < SILENT_AFTER => Liveness::Alive,
        silence if silence < LOST_AFTER || storm => Liveness::Silent,
        _ => Liveness::Lost,
    };
    let next_change_in = silences
        .values()
        .filter_map(|silence| {
            [SILENT_AFTER, LOST_AFTER, forget_after]
                .into_iter()
                .filter(|deadline| silence < deadline)
                .map(|deadline| deadline - *silence)
                .min()
        })
        .min();
    Judgement {
        by_node: silences
            .iter()
            .map(|(node, silence)| (node.clone(), verdict(silence)))
            .collect(),
        next_change_in,
        storm,
    }
}

#[derive(Debug)]
struct Beat {
    renewed: Option<MicroTime>,
    changed: Instant,
    /// Silence before this operator began to listen.
    before: Duration,
    /// Whether `before` is settled.
    judged: bool,
}

/// What was heard.
#[derive(Debug, Default)]
struct Heard {
    beats: BTreeMap<String, Beat>,
    /// The operator knows that it hears nobody.
    deaf: bool,
}

impl Heard {
    /// When the operator last heard anybody.
    fn latest(&self) -> Option<Instant> {
        self.beats.values().map(|beat| beat.changed).max()
    }
}

/// The heartbeats seen so far.
#[derive(Debug, Default)]
pub(crate) struct Heartbeats {
    heard: Mutex<Heard>,
}

impl Heartbeats {
    fn with<T>(&self, act: impl FnOnce(&mut Heard) -> T) -> T {
        act(&mut self.heard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes note of a Lease. True when this changes a verdict: the machine is new or was silent.
    pub(crate) fn beat(&self, node: &str, renewed: Option<&MicroTime>, now: Instant) -> bool {
        self.with(|heard| match heard.beats.get_mut(node) {
            Some(beat) if beat.renewed.as_ref() == renewed => false,
            Some(beat) => {
                let was_silent = silence(beat, now) >= SILENT_AFTER;
                *beat = Beat {
                    renewed: renewed.cloned(),
                    changed: now,
                    before: Duration::ZERO,
                    judged: true,
                };
                was_silent
            }
            None => {
                heard.beats.insert(node.to_owned(), first(renewed, now));
                true
            }
        })
    }

    /// How long each machine has been silent, those of `nodes` included that never sent a heartbeat.
    /// `was_silent` tells of a machine that was so before this operator began to listen: the first
    /// sight of its Lease proves that the Lease is there, not that its owner lives.
    pub(crate) fn silences<'a>(
        &self,
        now: Instant,
        nodes: impl Iterator<Item = &'a str>,
        was_silent: impl Fn(&str) -> bool,
    ) -> BTreeMap<String, Duration> {
        self.with(|heard| {
            // While nobody is heard, time stands still.
            let now = heard.latest().filter(|_| heard.deaf).unwrap_or(now);
            let beats = &mut heard.beats;
            for node in nodes {
                if !beats.contains_key(node) {
                    beats.insert(node.to_owned(), first(None, now));
                }
            }
            for (node, beat) in beats.iter_mut().filter(|(_, beat)| !beat.judged) {
                beat.judged = true;
                beat.before = if was_silent(node) {
                    SILENT_AFTER
                } else {
                    Duration::ZERO
                };
            }
            beats
                .iter()
                .map(|(node, beat)| (node.clone(), silence(beat, now)))
                .collect()
        })
    }

    /// The operator hears nobody, by its own fault or the network's: nobody's silence counts.
    pub(crate) fn turned_deaf(&self) {
        self.with(|heard| heard.deaf = true);
    }

    /// The operator hears again. Who was heard until it turned deaf starts anew; that may have been
    /// long before it was noticed, so what counts is when it last heard anybody.
    pub(crate) fn hears_again(&self, now: Instant) {
        self.with(|heard| {
            heard.deaf = false;
            let Some(latest) = heard.latest() else { return };
            let alive = heard
                .beats
                .values_mut()
                .filter(|beat| silence(beat, latest) < SILENT_AFTER);
            for beat in alive {
                beat.changed = now;
            }
        });
    }

    /// Forgets a machine that is gone.
    pub(crate) fn forget(&self, node: &str) {
        self.with(|heard| heard.beats.remove(node));
    }
}

fn first(renewed: Option<&MicroTime>, now: Instant) -> Beat {
    Beat {
        renewed: renewed.cloned(),
        changed: now,
        before: Duration::ZERO,
        judged: false,
    }
}

fn silence(beat: &Beat, now: Instant) -> Duration {
    now.saturating_duration_since(beat.changed) + beat.before
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silences(seconds: &[u64]) -> BTreeMap<String, Duration> {
        seconds
            .iter()
            .enumerate()
            .map(|(i, s)| (format!("n{i}"), Duration::from_secs(*s)))
            .collect()
    }

    fn verdicts(seconds: &[u64]) -> Vec<Liveness> {
        judge(&silences(seconds), FORGET_AFTER)
            .by_node
            .into_values()
            .collect()
    }

    #[test]
    fn machines_turn_silent_then_lost_exactly_at_the_deadlines() {
        assert_eq!(verdicts(&[39, 0, 0]), [Liveness::Alive; 3]);
        assert_eq!(verdicts(&[40, 0, 0])[0], Liveness::Silent);
        assert_eq!(verdicts(&[89, 0, 0])[0], Liveness::Silent);
        assert_eq!(verdicts(&[90, 0, 0])[0], Liveness::Lost);
    }

    #[test]
    fn nobody_is_lost_while_more_than_half_of_the_fleet_is_silent() {
        assert_eq!(verdicts(&[500, 500, 0])[..2], [Liveness::Silent; 2]);
        assert!(judge(&silences(&[500, 500, 0]), FORGET_AFTER).storm);
        assert_eq!(verdicts(&[500, 0])[0], Liveness::Lost);
        assert_eq!(
            verdicts(&[500])[0],
            Liveness::Silent,
            "a lone machine's models have nowhere to go"
        );
    }

    #[test]
    fn next_change_is_the_nearest_deadline() {
        assert_eq!(
            judge(&silences(&[10, 45, 700]), FORGET_AFTER).next_change_in,
            Some(Duration::from_secs(30))
        );
        assert_eq!(judge(&silences(&[700]), FORGET_AFTER).next_change_in, None);
        let soon = judge(&silences(&[10]), Duration::from_secs(15));
        assert_eq!(
            soon.next_change_in,
            Some(Duration::from_secs(5)),
            "whatever the settings, no deadline is slept through"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn heartbeats_count_by_change_alone() {
        let heartbeats = Heartbeats::default();
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let renewed = |second: i64| {
            Some(MicroTime(
                k8s_openapi::jiff::Timestamp::from_second(second).unwrap(),
            ))
        };
        let silence =
            |seconds: u64| heartbeats.silences(at(seconds), ["a"].into_iter(), |_| false)["a"].as_secs();
        assert!(
            heartbeats.beat("a", renewed(5).as_ref(), at(0)),
            "a new machine is news"
        );
        assert!(
            !heartbeats.beat("a", renewed(5).as_ref(), at(30)),
            "the same heartbeat again is none"
        );
        assert_eq!(silence(30), 30);
        assert!(!heartbeats.beat("a", renewed(1).as_ref(), at(39)));
        assert_eq!(
            silence(39),
            0,
            "a heartbeat counts though its clock went backwards"
        );
        assert!(
            heartbeats.beat("a", renewed(2).as_ref(), at(200)),
            "a return is news"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn silence_before_the_start_is_remembered_and_an_own_outage_forgiven() {
        let heartbeats = Heartbeats::default();
        let now = Instant::now();
        let renewed = Some(MicroTime(k8s_openapi::jiff::Timestamp::UNIX_EPOCH));
        heartbeats.beat("old", renewed.as_ref(), now);
        heartbeats.beat("new", renewed.as_ref(), now);
        let nodes = || ["old", "new"].into_iter();
        let silences = heartbeats.silences(now, nodes(), |node| node == "old");
        assert_eq!((silences["old"], silences["new"]), (SILENT_AFTER, Duration::ZERO));
        let noticed = now + Duration::from_secs(35);
        heartbeats.turned_deaf();
        let later = now + Duration::from_secs(3600);
        assert_eq!(
            heartbeats.silences(later, nodes(), |_| true)["new"],
            Duration::ZERO
        );
        heartbeats.hears_again(noticed);
        let silences = heartbeats.silences(noticed, nodes(), |_| true);
        assert_eq!(silences["new"], Duration::ZERO);
        assert_eq!(silences["old"], Duration::from_secs(75));
    }
}
