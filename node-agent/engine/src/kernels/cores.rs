//! How many threads compute: one for each performance core that this process may use.
//!
//! A step ends when its last thread ends, and all read the same memory: a second thread on a core, or one on
//! an efficiency core, adds little and can hold up the rest.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::Path;

/// A core is an efficiency core below this share of the fastest core's capacity.
const EFFICIENCY_SHARE: f64 = 0.6;

/// Threads that this process should keep busy: its performance cores, less what a cgroup's quota or an
/// affinity leaves out.
pub(crate) fn available_threads() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    performance_cores(Path::new("/")).map_or(allowed, |cores| cores.clamp(1, allowed))
}

/// The performance cores that the processes of this machine may use; None where the system does not tell.
#[cfg(not(target_os = "macos"))]
fn performance_cores(root: &Path) -> Option<usize> {
    linux_cores(root)
}

/// As above: macOS counts them itself.
#[cfg(target_os = "macos")]
fn performance_cores(_root: &Path) -> Option<usize> {
    let asked = std::process::Command::new("/usr/sbin/sysctl")
        .args(["-n", "hw.perflevel0.physicalcpu"])
        .output();
    String::from_utf8(asked.ok()?.stdout).ok()?.trim().parse().ok()
}

/// Counts the cores of a Linux machine by what its kernel tells below `root`.
///
/// Source: Linux, Documentation/ABI/testing/sysfs-devices-system-cpu.
#[cfg_attr(target_os = "macos", allow(dead_code))]
fn linux_cores(root: &Path) -> Option<usize> {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    let folder = "sys/devices/system/cpu";
    let mut usable = list(&read(&format!("{folder}/online"))?)?;
    let allowed = read("proc/self/status").and_then(|status| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        list(line)
    });
    if let Some(allowed) = allowed {
        usable.retain(|cpu| allowed.contains(cpu));
    }
    // Intel names its two kinds; ARM gives each core a capacity, and others at least a highest frequency.
    let cores = read("sys/devices/cpu_core/cpus").and_then(|text| list(&text));
    let fast: BTreeSet<usize> = match cores {
        Some(cores) if !cores.is_empty() => usable.intersection(&cores).copied().collect(),
        _ => {
            let number = |cpu: usize, file: &str| {
                read(&format!("{folder}/cpu{cpu}/{file}"))?
                    .trim()
                    .parse::<f64>()
                    .ok()
            };
            let capacity = |cpu: usize| {
                number(cpu, "cpu_capacity")
                    .or_else(|| number(cpu, "cpufreq/cpuinfo_max_freq"))
                    .unwrap_or(1.0)
            };
            let most = usable.iter().map(|&cpu| capacity(cpu)).fold(0.0, f64::max);
            let fast = usable.iter().copied();
            fast.filter(|&cpu| capacity(cpu) >= most * EFFICIENCY_SHARE)
                .collect()
        }
    };
    // Who was given efficiency cores alone computes on those.
    let chosen = if fast.is_empty() { usable } else { fast };
    let cores: BTreeSet<String> = chosen
        .into_iter()
        .map(|cpu| {
            read(&format!("{folder}/cpu{cpu}/topology/thread_siblings_list"))
                .unwrap_or_else(|| cpu.to_string())
        })
        .map(|siblings| siblings.trim().to_owned())
        .collect();
    (!cores.is_empty()).then_some(cores.len())
}

/// Numbers as the kernel lists them: `0-3,8,10-11`.
fn list(text: &str) -> Option<BTreeSet<usize>> {
    let mut numbers = BTreeSet::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        // More than any machine has: somebody's mistake.
        if last >= 1 << 16 {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine as its kernel tells of it: files and their contents.
    fn cores(files: &[(&str, &str)]) -> Option<usize> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        linux_cores(root.path())
    }

    fn siblings(pairs: &[(usize, &str)]) -> Vec<(String, String)> {
        let file = |cpu| format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        pairs
            .iter()
            .map(|(cpu, list)| (file(*cpu), format!("{list}\n")))
            .collect()
    }

    fn together<'a>(more: &'a [(String, String)], files: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        let more = more.iter().map(|(path, text)| (path.as_str(), text.as_str()));
        files.iter().copied().chain(more).collect()
    }

    #[test]
    fn a_plain_machine_has_all_its_cores() {
        assert_eq!(cores(&[("sys/devices/system/cpu/online", "0-3\n")]), Some(4));
        assert_eq!(cores(&[]), None);
        assert_eq!(cores(&[("sys/devices/system/cpu/online", "0-x\n")]), None);
        assert_eq!(
            cores(&[("sys/devices/system/cpu/online", "0-999999999999\n")]),
            None
        );
    }

    #[test]
    fn two_threads_of_a_core_count_once() {
        let pairs = siblings(&[
            (0, "0,4"),
            (1, "1,5"),
            (2, "2,6"),
            (3, "3,7"),
            (4, "0,4"),
            (5, "1,5"),
            (6, "2,6"),
            (7, "3,7"),
        ]);
        let files = together(&pairs, &[("sys/devices/system/cpu/online", "0-7")]);
        assert_eq!(cores(&files), Some(4));
        let pinned = [("proc/self/status", "Name:\tx\nCpus_allowed_list:\t0,4,5\n")];
        assert_eq!(cores(&together(&pairs, &[files[0], pinned[0]])), Some(2));
    }

    /// Two performance cores with two threads each, four efficiency cores: a Core Ultra.
    #[test]
    fn the_two_kinds_of_intel_are_told_apart() {
        let pairs = siblings(&[
            (0, "0-1"),
            (1, "0-1"),
            (2, "2-3"),
            (3, "2-3"),
            (4, "4"),
            (5, "5"),
            (6, "6"),
            (7, "7"),
        ]);
        let files = together(
            &pairs,
            &[
                ("sys/devices/system/cpu/online", "0-7"),
                ("sys/devices/cpu_core/cpus", "0-3\n"),
                ("sys/devices/cpu_atom/cpus", "4-7\n"),
            ],
        );
        assert_eq!(cores(&files), Some(2));
        let mut pinned = files.clone();
        pinned.push(("proc/self/status", "Cpus_allowed_list:\t4-6"));
        assert_eq!(cores(&pinned), Some(3), "efficiency cores are better than none");
    }

    /// Four large cores and four small: an RK3588.
    #[test]
    fn the_two_kinds_of_arm_are_told_apart() {
        let files: Vec<(String, String)> = (0..8)
            .map(|cpu| {
                let capacity = if cpu < 4 { "414" } else { "1024" };
                (
                    format!("sys/devices/system/cpu/cpu{cpu}/cpu_capacity"),
                    capacity.to_owned(),
                )
            })
            .collect();
        assert_eq!(
            cores(&together(&files, &[("sys/devices/system/cpu/online", "0-7")])),
            Some(4)
        );
    }

    #[test]
    #[ignore = "its neighbour runs it in a group of its own"]
    fn threads_of_this_process() {
        println!("threads: {}", available_threads());
    }

    /// A control group whose quota is one core's time, which goes with the value; None where none may be made.
    #[cfg(target_os = "linux")]
    struct OneCore(std::path::PathBuf);

    #[cfg(target_os = "linux")]
    impl OneCore {
        fn make() -> Option<Self> {
            let name = format!("freehold-test-{}", std::process::id());
            // Version 1 has a tree for processor time; version 2 one for everything.
            let trees = [
                ("cpu", "cpu.cfs_quota_us", "100000"),
                ("", "cpu.max", "100000 100000"),
            ];
            trees.into_iter().find_map(|(tree, file, quota)| {
                let folder = Path::new("/sys/fs/cgroup").join(tree).join(&name);
                std::fs::create_dir(&folder).ok()?;
                let group = Self(folder);
                std::fs::OpenOptions::new()
                    .write(true)
                    .open(group.0.join(file))
                    .and_then(|mut file| std::io::Write::write_all(&mut file, quota.as_bytes()))
                    .ok()?;
                Some(group)
            })
        }
    }

    #[cfg(target_os = "linux")]
    impl Drop for OneCore {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir(&self.0);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_quota_of_the_control_group_counts() {
        let Some(group) = OneCore::make() else {
            println!("skipped: no control group with a quota may be made here, which takes root");
            return;
        };
        let this = std::env::current_exe().unwrap();
        let run = std::process::Command::new("sh")
            .args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec \"$@\""])
            .arg(&group.0)
            .arg(this)
            .args(["--ignored", "--exact", "--nocapture"])
            .arg("kernels::cores::tests::threads_of_this_process")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&run.stdout);
        assert!(
            said.contains("threads: 1\n"),
            "{said}{}",
            String::from_utf8_lossy(&run.stderr)
        );
    }

    #[test]
    fn this_machine_has_a_core() {
        assert!(available_threads() >= 1);
    }
}
