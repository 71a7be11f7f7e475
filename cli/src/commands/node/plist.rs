//! The launchd property list. launchd has no watchdog: the agent watches itself there, and aborts.

use std::collections::BTreeMap;

use super::layout::Layout;
use super::unit::{STOP_SECONDS, WATCHDOG_SECONDS};

/// The service's name.
pub(super) const LABEL: &str = "dev.freehold.node-agent";
const LOG: &str = "/Library/Logs/freehold-node-agent.log";

/// The property list of the agent, run as this user.
pub(super) fn plist(layout: &Layout, settings: &BTreeMap<&str, String>, user: Option<&str>) -> String {
    let mut variables = String::new();
    let watchdog = WATCHDOG_SECONDS.to_string();
    let own = [("FREEHOLD_WATCHDOG_SECONDS", &watchdog)];
    for (name, value) in settings.iter().map(|(name, value)| (*name, value)).chain(own) {
        variables.push_str(&format!(
            "\n    <key>{}</key><string>{}</string>",
            escape(name),
            escape(value)
        ));
    }
    let user = user.map_or(String::new(), |user| {
        format!("\n  <key>UserName</key><string>{}</string>", escape(user))
    });
    let (program, data) = (
        escape(&layout.program.display().to_string()),
        escape(&layout.data.display().to_string()),
    );
    format!(
        r#"<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<!-- Written by `freehold node join`; `freehold node leave` removes it. -->
<plist version="1.0">
<dict>
  <key>Label</key><string>{LABEL}</string>
  <key>ProgramArguments</key>
  <array><string>{program}</string></array>
  <key>EnvironmentVariables</key>
  <dict>{variables}
  </dict>{user}
  <key>WorkingDirectory</key><string>{data}</string>
  <key>RunAtLoad</key><true/>
  <!-- Started again unless it ended of its own accord. -->
  <key>KeepAlive</key>
  <dict><key>SuccessfulExit</key><false/></dict>
  <key>ThrottleInterval</key><integer>5</integer>
  <key>ExitTimeOut</key><integer>{STOP_SECONDS}</integer>
  <!-- Models answer people: no less of the processor than a program on the screen gets. -->
  <key>ProcessType</key><string>Interactive</string>
  <!-- 0077 -->
  <key>Umask</key><integer>63</integer>
  <key>SoftResourceLimits</key>
  <dict><key>NumberOfFiles</key><integer>8192</integer></dict>
  <key>StandardOutPath</key><string>{LOG}</string>
  <key>StandardErrorPath</key><string>{LOG}</string>
</dict>
</plist>
"#
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
