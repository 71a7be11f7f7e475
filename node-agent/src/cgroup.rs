//! The memory that Linux lets this process's control group have: a container's limit, or systemd's `MemoryMax`.

use std::fs;
use std::path::{Component, Path, PathBuf};

/// Where control groups lie: version 2 (also beside version 1), and version 1 of memory.
const UNIFIED: [&str; 2] = ["sys/fs/cgroup", "sys/fs/cgroup/unified"];
const MEMORY_V1: &str = "sys/fs/cgroup/memory";

/// The lowest limit in bytes on the way from this process's group to the root, if any is set.
///
/// `root` is `/`, or a recorded tree in tests. Source: kernel.org, admin-guide/cgroup-v2 and cgroups(7).
pub(crate) fn memory_limit_bytes(root: &Path) -> Option<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mut lowest = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        // Processes outside the namespace of a container show as `/..`: then only its root is to be seen.
        let path: PathBuf = Path::new(path)
            .components()
            .filter(|part| matches!(part, Component::Normal(_)))
            .collect();
        let limits: Vec<u64> = if controllers.is_empty() {
            let files = ["memory.max", "memory.high"];
            let mounts = UNIFIED.iter().map(|mount| root.join(mount));
            mounts.flat_map(|mount| up(&mount, &path, &files)).collect()
        } else if controllers.split(',').any(|name| name == "memory") {
            up(&root.join(MEMORY_V1), &path, &["memory.limit_in_bytes"])
        } else {
            continue;
        };
        lowest = lowest.into_iter().chain(limits).min();
    }
    lowest
}

/// The limits of a group and of all above it. The word `max` is none.
fn up(mount: &Path, group: &Path, files: &[&str]) -> Vec<u64> {
    let folders = group.ancestors().map(|group| mount.join(group));
    let read = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    folders
        .flat_map(|folder| files.iter().map(move |file| folder.join(file)))
        .filter_map(read)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
            fs::write(path, text).expect("a file");
        }
        root
    }

    #[track_caller]
    fn limit(files: &[(&str, &str)], expected: Option<u64>) {
        assert_eq!(memory_limit_bytes(tree(files).path()), expected);
    }

    #[test]
    fn a_units_own_limit_counts_and_those_above_it() {
        let unit = "0::/system.slice/freehold-node-agent.service\n";
        let slice = "sys/fs/cgroup/system.slice";
        let service = "sys/fs/cgroup/system.slice/freehold-node-agent.service";
        let (of_slice, of_service) = (format!("{slice}/memory.max"), format!("{service}/memory.max"));
        let high = format!("{service}/memory.high");
        let own = ("proc/self/cgroup", unit);
        limit(
            &[own, (&of_slice, "max\n"), (&of_service, "4294967296\n")],
            Some(4 << 30),
        );
        limit(
            &[own, (&of_slice, "1073741824\n"), (&of_service, "4294967296\n")],
            Some(1 << 30),
        );
        limit(
            &[own, (&of_service, "max\n"), (&high, "2147483648\n")],
            Some(2 << 30),
        );
        limit(&[own, (&of_service, "max\n")], None);
        // Another unit's limit is not ours.
        limit(
            &[
                own,
                ("sys/fs/cgroup/system.slice/other.service/memory.max", "1\n"),
            ],
            None,
        );
    }

    #[test]
    fn a_container_sees_its_own_group_as_the_root() {
        for group in ["0::/\n", "0::/../../..\n"] {
            let files = [
                ("proc/self/cgroup", group),
                ("sys/fs/cgroup/memory.max", "419430400\n"),
            ];
            limit(&files, Some(400 << 20));
        }
    }

    #[test]
    fn version_one_has_a_tree_for_memory_alone() {
        let groups = "5:cpu,cpuacct:/a\n3:memory:/docker/x\n0::/system.slice\n";
        let files = [
            ("proc/self/cgroup", groups),
            ("sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes", "1048576\n"),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
        ];
        limit(&files, Some(1 << 20));
    }

    #[test]
    fn what_does_not_read_is_no_limit() {
        limit(&[], None);
        limit(&[("proc/self/cgroup", "nonsense\n0::\n")], None);
    }
}
