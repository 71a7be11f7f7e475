//! A network of this machine's own: a bridge, and behind it namespaces that are as far apart as machines on a switch.
//!
//! ```text
//!  this machine ── bridge 10.98.X.1 ─┬─ veth ─ namespace 10.98.X.2
//!                                    └─ veth ─ namespace 10.98.X.3
//! ```
//! Names hold the process id of the test, so that what a killed test left is found and removed by the next.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, Result, ensure};

/// What begins the names of everything made here.
const PREFIX: &str = "fh";
/// Bridges of one test process.
static MADE: AtomicU8 = AtomicU8::new(0);

/// A bridge with namespaces behind it. Dropping it removes both.
#[derive(Debug)]
pub struct Network {
    bridge: String,
    subnet: u8,
    spaces: Vec<Space>,
}

/// A network namespace with one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    /// Its name, for `ip netns`.
    pub name: String,
    /// Its address on the bridge.
    pub address: Ipv4Addr,
}

impl Network {
    /// Makes a bridge.
    ///
    /// # Errors
    /// When this is not root, or the kernel has no bridges.
    pub fn new() -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "a network of its own needs root"
        );
        sweep();
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        let bridge = format!("{PREFIX}{process}b{number}");
        run(&["link", "add", &bridge, "type", "bridge"])?;
        // From here on a drop removes it.
        let mut network = Self {
            bridge,
            subnet: 0,
            spaces: Vec::new(),
        };
        let taken = run(&["-4", "-o", "address"])?;
        let free = (1..=250).find(|subnet| !taken.contains(&format!(" 10.98.{subnet}.")));
        network.subnet = free.context("every subnet of 10.98.0.0/16 is taken")?;
        let address = format!("{}/24", network.address());
        run(&["address", "add", &address, "dev", &network.bridge])?;
        run(&["link", "set", &network.bridge, "up"])?;
        Ok(network)
    }

    /// This machine's address on the bridge.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 98, self.subnet, 1)
    }

    /// The bridge's name.
    #[must_use]
    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    /// Makes a namespace behind the bridge.
    ///
    /// # Errors
    /// When the kernel does not let it.
    pub fn space(&mut self) -> Result<Space> {
        let number = u8::try_from(self.spaces.len() + 2)?;
        let name = format!("{}n{number}", self.bridge);
        let space = Space {
            name: name.clone(),
            address: Ipv4Addr::new(10, 98, self.subnet, number),
        };
        run(&["netns", "add", &name])?;
        self.spaces.push(space.clone());
        // A name of an interface has at most 15 letters.
        let outside = self.plug(&space);
        run(&[
            "link", "add", &outside, "type", "veth", "peer", "name", "eth0", "netns", &name,
        ])?;
        run(&["link", "set", &outside, "master", &self.bridge, "up"])?;
        let (address, gateway) = (format!("{}/24", space.address), self.address().to_string());
        run(&["-n", &name, "link", "set", "lo", "up"])?;
        run(&["-n", &name, "address", "add", &address, "dev", "eth0"])?;
        run(&["-n", &name, "link", "set", "eth0", "up"])?;
        run(&["-n", &name, "route", "add", "default", "via", &gateway])?;
        Ok(space)
    }

    /// The bridge's end of a namespace's cable.
    fn plug(&self, space: &Space) -> String {
        format!("{}v{}", self.bridge, space.address.octets()[3])
    }

    /// Lets this machine reach a subnet through a namespace. The route goes with the bridge.
    ///
    /// # Errors
    /// When there is one.
    pub fn route(&self, subnet: &str, via: &str) -> Result<()> {
        run(&["route", "replace", subnet, "via", via, "dev", &self.bridge]).map(drop)
    }

    /// Pulls a namespace's cable, or puts it back.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn connect(&self, space: &Space, connected: bool) -> Result<()> {
        let state = if connected { "up" } else { "down" };
        run(&["link", "set", &self.plug(space), state]).map(drop)
    }
}

impl Space {
    /// What stands before a command that shall run inside. Unlike `ip netns exec` this leaves the mounts as they are,
    /// control groups included.
    #[must_use]
    pub fn enter(&self) -> [String; 3] {
        [
            "nsenter".to_owned(),
            format!("--net=/run/netns/{}", self.name),
            "--".to_owned(),
        ]
    }

    /// Sets one of the kernel's settings inside, such as `net/ipv4/ip_forward`. Whether there is such a one.
    ///
    /// # Errors
    /// When nsenter is missing.
    pub fn set(&self, setting: &str, value: &str) -> Result<bool> {
        let [nsenter, space, _] = self.enter();
        let script = format!("echo {value} > /proc/sys/{setting}");
        let output = Command::new(nsenter)
            .args([&space, "sh", "-c", &script])
            .output()?;
        Ok(output.status.success())
    }

    /// One of `ip`'s own commands inside, such as `route add`.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn ip(&self, arguments: &[&str]) -> Result<String> {
        let mut all = vec!["-n", &self.name];
        all.extend(arguments);
        run(&all)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for space in &self.spaces {
            remove_space(&space.name);
        }
        let _ = run(&["link", "delete", &self.bridge]);
    }
}

/// Ends what runs in a namespace, then removes it.
fn remove_space(name: &str) {
    let inside = run(&["netns", "pids", name]).unwrap_or_default();
    for process in inside.lines() {
        let _ = Command::new("kill").args(["-KILL", process]).output();
    }
    let _ = run(&["netns", "delete", name]);
}

/// Whether a test that is no more gave this name.
pub(crate) fn is_left(name: &str) -> bool {
    let process = || -> Option<u32> {
        let digits = name.strip_prefix(PREFIX)?;
        let end = digits.find(|letter: char| !letter.is_ascii_digit())?;
        digits.get(end..)?.starts_with('b').then_some(())?;
        digits.get(..end)?.parse().ok()
    };
    process().is_some_and(|process| !Path::new("/proc").join(process.to_string()).exists())
}

/// Removes what tests left that were killed: programs, namespaces, bridges, control groups, folders.
fn sweep() {
    for name in run(&["netns", "list"]).unwrap_or_default().lines() {
        let name = name.split(' ').next().unwrap_or_default();
        if is_left(name) {
            remove_space(name);
        }
    }
    for line in run(&["-o", "link", "show", "type", "bridge"])
        .unwrap_or_default()
        .lines()
    {
        let name = line.split([':', ' ']).find(|word| word.starts_with(PREFIX));
        if let Some(name) = name.filter(|name| is_left(name)) {
            let _ = run(&["link", "delete", name]);
        }
    }
    crate::node::sweep_groups();
    for entry in std::fs::read_dir(std::env::temp_dir())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name
            .strip_prefix("freehold-test-")
            .and_then(|rest| rest.split('-').next());
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// How the name of a test's folder begins, which is removed by the next test if this one is killed.
pub(crate) fn folder_prefix() -> String {
    format!("freehold-test-{}-", std::process::id())
}

fn run(arguments: &[&str]) -> Result<String> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("failed to start ip (Debian: iproute2)")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "ip {}: {}",
        arguments.join(" "),
        errors.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
