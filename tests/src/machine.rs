//! A machine of its own: a real systemd as the first process, this machine's files under a layer that goes with it,
//! and a network namespace. Nothing that it writes touches this machine.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::api_server::ApiServer;
use crate::child::Program;
use crate::network::Space;
use crate::node::remove_groups;

/// A machine that is not up by then will not be.
const START: Duration = Duration::from_secs(60);
const SYSTEMD: &str = "/lib/systemd/systemd";

/// Runs as the first process of new namespaces, with the folder of the machine as its argument. Its files are this
/// machine's; what it writes goes to memory.
const BOOT: &str = r#"
set -e
base=$1 programs=$2
mount --make-rprivate /
mount -t tmpfs tmpfs "$base"
mkdir "$base/upper" "$base/work" "$base/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" "$base/root"
root=$base/root
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/dev"
for device in null zero full random urandom tty; do
  touch "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/shm" "$root/dev/pts"
ln -s /proc/self/fd "$root/dev/fd"
mount -t sysfs sysfs "$root/sys"
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
  mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
else
  mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
  mkdir "$root/sys/fs/cgroup/unified" "$root/sys/fs/cgroup/systemd"
  mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup/unified"
  mount -t cgroup -o none,name=systemd systemd "$root/sys/fs/cgroup/systemd"
fi
mkdir -p "$root/opt/freehold"
mount --bind "$programs" "$root/opt/freehold"
rm -rf "$root/etc/systemd/system" "$root/var/lib/freehold" "$root/var/lib/private/freehold" "$root/etc/freehold"
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
# Only what the machine is for: no logins, no timers.
cat > "$root/etc/systemd/system/multi-user.target" <<EOF
[Unit]
Description=A machine of the tests
Requires=dbus.socket
After=dbus.socket
AllowIsolate=yes
EOF
exec chroot "$root" env -i container=freehold PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  "$0" --system --unit=multi-user.target --log-target=console
"#;

/// A running machine. Dropping it is pulling its plug.
#[derive(Debug)]
pub struct Machine {
    /// In the order in which they are dropped: the control groups can go when nothing runs in them.
    _outer: Program,
    _groups: ControlGroups,
    first: u32,
    _folder: TempDir,
}

/// Folders of control groups, removed when nothing is in them any more.
#[derive(Debug)]
struct ControlGroups {
    paths: Vec<PathBuf>,
}

impl Machine {
    /// Starts one in a namespace. `programs` is seen there as `/opt/freehold`.
    ///
    /// # Errors
    /// When this is not root, there is no systemd, or it does not come up.
    pub fn start(space: &Space, programs: &Path) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "a machine of its own needs root"
        );
        ensure!(
            Path::new(SYSTEMD).is_file(),
            "no {SYSTEMD} here: install systemd (and dbus), which need not run"
        );
        let folder = tempfile::Builder::new()
            .prefix(&crate::network::folder_prefix())
            .tempdir()?;
        let base = folder.path().join("layers");
        std::fs::create_dir(&base)?;
        let groups = ControlGroups::new(&space.name)?;
        let join: Vec<String> = groups
            .paths
            .iter()
            .map(|path| format!("echo $$ > {}/cgroup.procs", path.display()))
            .collect();
        // The namespace of control groups begins at the group that one is in.
        let script = format!(
            "{} && exec {} unshare --mount --pid --fork --kill-child --cgroup --uts --ipc bash -c \"$1\" {SYSTEMD} \"$2\" \"$3\"",
            join.join(" && "),
            space.enter().join(" "),
        );
        let arguments = [
            "-c".to_owned(),
            script,
            "machine".to_owned(),
            BOOT.to_owned(),
            base.display().to_string(),
            programs.display().to_string(),
        ];
        let mut outer = Program::start("machine", Path::new("/bin/bash"), &arguments, folder.path())?;
        let begun = Instant::now();
        let first = loop {
            if let Some(why) = outer.ended() {
                bail!("{why}");
            }
            if let Some(first) = first_process(outer.id()) {
                break first;
            }
            ensure!(
                begun.elapsed() < START,
                "the machine did not start:\n{}",
                outer.last_words()
            );
            std::thread::sleep(Duration::from_millis(50));
        };
        let machine = Self {
            _outer: outer,
            _groups: groups,
            first,
            _folder: folder,
        };
        loop {
            let state = machine.run(&["systemctl", "is-system-running"], "")?;
            let state = String::from_utf8_lossy(&state.stdout).trim().to_owned();
            // Degraded: something of this machine's that has no place there failed, such as a module to load.
            if matches!(state.as_str(), "running" | "degraded") {
                return Ok(machine);
            }
            ensure!(
                begun.elapsed() < START,
                "the machine is {state:?} after {START:?}:\n{}",
                machine._outer.last_words()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Runs a command there, with this on its standard input.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run(&self, command: &[&str], input: &str) -> Result<Output> {
        let mut child = Command::new("nsenter")
            .args([
                "--target",
                &self.first.to_string(),
                "--all",
                "--root",
                "--wd",
                "--",
            ])
            .args(command)
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("HOME", "/root")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("failed to start nsenter")?;
        // A program that does not read its input may end before it is written.
        let _ = child
            .stdin
            .take()
            .map(|mut stdin| stdin.write_all(input.as_bytes()));
        Ok(child.wait_with_output()?)
    }

    /// A file of the machine as this machine sees it. Links on the way lead astray.
    #[must_use]
    pub fn path(&self, path: &str) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.first));
        root.join(path.trim_start_matches('/'))
    }
}

impl Machine {
    /// Copies a file there, for everybody to read.
    ///
    /// # Errors
    /// When it cannot be read, or the machine's memory is full.
    pub fn put(&self, file: &Path, path: &str) -> Result<()> {
        let target = self.path(path);
        if let Some(folder) = target.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::copy(file, &target)
            .with_context(|| format!("failed to copy {} to {path}", file.display()))?;
        Ok(std::fs::set_permissions(
            &target,
            std::os::unix::fs::PermissionsExt::from_mode(0o644),
        )?)
    }

    /// Gives the machine's root an administrator's kubeconfig. It sees no folder of this machine's that is younger
    /// than itself, so the authority comes along.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn administers(&self, server: &ApiServer) -> Result<&'static str> {
        let authority = server.folder().join("certificates/apiserver.crt");
        let kubeconfig = std::fs::read_to_string(server.kubeconfig())?;
        let kubeconfig = kubeconfig.replace(&authority.display().to_string(), "/root/authority.crt");
        std::fs::write(self.path("/root/kubeconfig"), kubeconfig)?;
        std::fs::copy(authority, self.path("/root/authority.crt"))?;
        Ok("/root/kubeconfig")
    }
}

impl ControlGroups {
    fn new(name: &str) -> Result<Self> {
        let roots = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            vec!["/sys/fs/cgroup"]
        } else {
            vec!["/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"]
        };
        let mut groups = Self { paths: Vec::new() };
        for root in roots {
            let path = Path::new(root).join(name);
            std::fs::create_dir_all(&path).with_context(|| format!("failed to make {}", path.display()))?;
            groups.paths.push(path);
        }
        Ok(groups)
    }
}

impl Drop for ControlGroups {
    fn drop(&mut self) {
        for path in &self.paths {
            // What was killed leaves its group a moment later.
            for _ in 0..100 {
                remove_groups(path);
                if !path.exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

/// The systemd that a chain of programs which replaced each other has started.
fn first_process(outer: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).ok()?;
    let child: u32 = children.split_whitespace().next()?.parse().ok()?;
    let name = std::fs::read_to_string(format!("/proc/{child}/comm")).ok()?;
    (name.trim() == "systemd").then_some(child)
}
