//! The systemd unit, and the file of settings beside it.

use std::collections::BTreeMap;

use super::layout::Layout;

/// systemd restarts an agent that is silent for so long. It beats three times within it.
pub(super) const WATCHDOG_SECONDS: u32 = 60;
/// A request under way gets 10 s, then the workers end.
pub(super) const STOP_SECONDS: u32 = 45;

/// The unit. `groups` are those of this machine that own its GPUs.
pub(super) fn unit(layout: &Layout, groups: &[String]) -> String {
    let program = layout.program.display();
    let environment = layout
        .environment()
        .map(|path| path.display().to_string())
        .unwrap_or_default();
    let groups = if groups.is_empty() {
        String::new()
    } else {
        format!("SupplementaryGroups={}\n", groups.join(" "))
    };
    format!(
        "# Written by `freehold node join`; `freehold node leave` removes it.
# Settings are in {environment}; changes of your own belong into `systemctl edit freehold-node-agent`.
[Unit]
Description=Freehold node agent
Documentation=https://freehold.dev
Wants=network-online.target
After=network-online.target
# It is started again however often it failed: nobody may be there to do so.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={program}
EnvironmentFile={environment}
WatchdogSec={WATCHDOG_SECONDS}
Restart=on-failure
RestartSec=5
TimeoutStartSec=90
TimeoutStopSec={STOP_SECONDS}
# The agent ends its workers itself, after their last answers.
KillMode=mixed
# One worker that took too much memory is not the end of the others.
OOMPolicy=continue

DynamicUser=yes
StateDirectory=freehold
StateDirectoryMode=0700
{groups}UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
"
    )
}

/// The settings as systemd reads them.
pub(super) fn environment(settings: &BTreeMap<&str, String>) -> String {
    let mut text = "# Settings of freehold-node-agent: `freehold-node-agent --help` tells all of them.\n# After a change: systemctl restart freehold-node-agent\n".to_owned();
    for (name, value) in settings {
        let value = value
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace('$', "\\$")
            .replace('`', "\\`");
        text.push_str(&format!("{name}=\"{value}\"\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::node::layout::Platform;

    #[test]
    fn the_unit_restarts_watches_and_confines() {
        let unit = unit(&Layout::of(Platform::Systemd), &["render".to_owned()]);
        for line in [
            "Type=notify",
            "WatchdogSec=60",
            "Restart=on-failure",
            "ProtectSystem=strict",
            "NoNewPrivileges=yes",
            "SupplementaryGroups=render",
            "ExecStart=/usr/local/bin/freehold-node-agent",
        ] {
            assert!(unit.lines().any(|found| found == line), "{line} in {unit}");
        }
    }

    #[test]
    fn settings_are_quoted() {
        let settings = BTreeMap::from([("A", "a \"b\" $c".to_owned())]);
        assert!(environment(&settings).ends_with("A=\"a \\\"b\\\" \\$c\"\n"));
    }
}
