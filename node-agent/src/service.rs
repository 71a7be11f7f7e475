//! What the agent tells the service manager that started it. Where none listens (launchd, a container) nothing
//! is said.
//!
//! systemd restarts a unit with `WatchdogSec` that is silent for so long. A beat is sent only after the
//! supervisor answered: a process whose threads live while its supervisor hangs is one to restart.

use std::sync::mpsc;
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::{error, warn};

use crate::agent::Agent;

/// Beats within the time after which silence is taken for death: one may be lost.
const BEATS: u32 = 3;

/// The agent serves what its last accepted spec says.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// It ends because it was asked to.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Beats as often as the service manager asks; never returns. Without one that watches, the agent does so itself if
/// it is told a limit, and aborts after that silence.
pub async fn beat(agent: &Agent, own_limit: Option<Duration>) {
    let mut limit_us = 0;
    let watched = sd_notify::watchdog_enabled(false, &mut limit_us) && limit_us > 0;
    let (limit, own) = match own_limit {
        _ if watched => (Duration::from_micros(limit_us), None),
        Some(limit) => (limit, Some(watch(limit, || std::process::abort()))),
        None => return std::future::pending().await,
    };
    let every = limit / BEATS;
    loop {
        if agent.is_alive(every).await {
            match &own {
                Some(beats) => drop(beats.send(())),
                None => tell(&[NotifyState::Watchdog]),
            }
        } else {
            error!(
                patience_ms = every.as_millis(),
                "The supervisor does not answer; the service manager restarts this agent if that stays so"
            );
        }
        tokio::time::sleep(every).await;
    }
}

/// Calls `on_silence` on a thread of its own when no beat came for `limit`. Ends when the sender is dropped.
fn watch(limit: Duration, on_silence: impl FnOnce() + Send + 'static) -> mpsc::Sender<()> {
    let (beats, heard) = mpsc::channel();
    std::thread::spawn(move || {
        loop {
            match heard.recv_timeout(limit) {
                Ok(()) => {}
                Err(mpsc::RecvTimeoutError::Timeout) => return on_silence(),
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
        }
    });
    beats
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        warn!(%error, "Failed to speak to the service manager");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_noticed_and_an_ordered_end_is_none() {
        let limit = Duration::from_millis(200);
        let (tell, told) = mpsc::channel();
        let beats = watch(limit, move || assert!(tell.send("silent").is_ok()));
        for _ in 0..4 {
            std::thread::sleep(limit / 4);
            beats.send(()).expect("it listens");
        }
        assert!(told.try_recv().is_err(), "it beat");
        assert_eq!(told.recv_timeout(limit * 20), Ok("silent"));

        let (tell, told) = mpsc::channel();
        drop(watch(limit, move || assert!(tell.send("silent").is_ok())));
        assert_eq!(
            told.recv_timeout(limit * 20),
            Err(mpsc::RecvTimeoutError::Disconnected)
        );
    }
}
