//! What the agent tells the service manager that started it. Where none listens (launchd, a container) nothing
//! is said.
//!
//! systemd restarts a unit with `WatchdogSec` that is silent for so long. A beat is sent only after the
//! supervisor answered: a process whose threads live while its supervisor hangs is one to restart.

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

/// Beats as often as the service manager asks; never returns.
pub async fn beat(agent: &Agent) {
    let mut limit_us = 0;
    if !sd_notify::watchdog_enabled(false, &mut limit_us) || limit_us == 0 {
        return std::future::pending().await;
    }
    let every = Duration::from_micros(limit_us) / BEATS;
    loop {
        if agent.is_alive(every).await {
            tell(&[NotifyState::Watchdog]);
        } else {
            error!(
                patience_ms = every.as_millis(),
                "The supervisor does not answer; the service manager restarts this agent if that stays so"
            );
        }
        tokio::time::sleep(every).await;
    }
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        warn!(%error, "Failed to speak to the service manager");
    }
}
