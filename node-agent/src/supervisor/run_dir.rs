//! The folder of the workers' sockets, and what an earlier agent may have left there.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tracing::warn;

/// Addresses of Unix sockets hold 104 bytes (macOS) or 108 (Linux), and names here take 30.
const LONGEST_FOLDER: usize = 70;

/// Makes the folder, readable by this user alone: `run` in the agent's folder, or one under the
/// temporary folder where that path is too long for a socket.
pub(crate) fn prepare(data_dir: &Path) -> std::io::Result<PathBuf> {
    let near = data_dir.join("run");
    let folder = if near.as_os_str().len() <= LONGEST_FOLDER {
        near
    } else {
        std::env::temp_dir().join(format!("freehold-{}", digest(&near.to_string_lossy())))
    };
    match DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let metadata = fs::symlink_metadata(&folder)?;
            if !metadata.is_dir() || metadata.uid() != rustix::process::getuid().as_raw() {
                let problem = format!("{} belongs to someone else", folder.display());
                return Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, problem));
            }
            fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))?;
        }
        made => made?,
    }
    Ok(folder)
}

/// The socket of one run of a worker.
pub(super) fn socket(folder: &Path, assignment: &str, epoch: u64) -> PathBuf {
    folder.join(format!("{}-{epoch}.sock", digest(assignment)))
}

fn digest(text: &str) -> String {
    hex::encode(Sha256::digest(text.as_bytes()))
        .chars()
        .take(12)
        .collect()
}

/// Takes the agent's folder for this process alone; the lock goes with the file.
pub(crate) fn lock(data_dir: &Path) -> std::io::Result<Option<File>> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(data_dir.join("agent.lock"))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Ends workers of an agent that died and removes their sockets. A worker ends by itself when its agent
/// does; this is for one that is stuck. It is known by its `--socket` in this folder.
pub(crate) fn clear(folder: &Path) {
    for pid in orphans(folder) {
        warn!(
            pid = pid.as_raw_nonzero().get(),
            "Ending a worker that an earlier agent left"
        );
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry
            .path()
            .extension()
            .is_some_and(|extension| extension == "sock")
        {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Empty where there is no /proc.
fn orphans(folder: &Path) -> Vec<rustix::process::Pid> {
    let is_orphan = |cmdline: &[u8]| {
        let arguments: Vec<_> = cmdline.split(|&byte| byte == 0).collect();
        arguments.windows(2).any(|pair| match pair {
            [flag, value] => {
                *flag == b"--socket" && Path::new(&*String::from_utf8_lossy(value)).parent() == Some(folder)
            }
            _ => false,
        })
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse::<i32>().ok()?;
            let cmdline = fs::read(entry.path().join("cmdline")).ok()?;
            is_orphan(&cmdline)
                .then(|| rustix::process::Pid::from_raw(pid))
                .flatten()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_fit_in_an_address_and_are_private() {
        let folder = tempfile::tempdir().expect("a folder");
        let deep = folder.path().join("a-folder-with-quite-a-long-name/".repeat(4));
        fs::create_dir_all(&deep).expect("made");
        for data_dir in [folder.path(), deep.as_path()] {
            let run = prepare(data_dir).expect("a folder for sockets");
            assert_eq!(prepare(data_dir).expect("again"), run);
            let socket = socket(&run, &"a".repeat(500), u64::from(u32::MAX));
            assert!(socket.as_os_str().len() < 104, "{socket:?}");
            assert_eq!(
                fs::metadata(&run).expect("there").permissions().mode() & 0o777,
                0o700
            );
            fs::remove_dir(&run).expect("empty");
        }
    }

    #[test]
    fn a_folder_has_one_agent() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = lock(folder.path()).expect("lockable");
        assert!(first.is_some());
        assert!(lock(folder.path()).expect("lockable").is_none());
        drop(first);
        assert!(lock(folder.path()).expect("lockable").is_some());
    }
}
