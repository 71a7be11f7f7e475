//! Tests in Go, where the library that judges is one in Go.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::parts::part;

/// The machine's Go, or the one that `tests/cluster/parts.py` fetched.
fn go() -> PathBuf {
    let runs = |go: &Path| Command::new(go).arg("version").output().is_ok();
    let known = [PathBuf::from("go"), PathBuf::from("/usr/local/go/bin/go")];
    let found = known.into_iter().find(|go| runs(go));
    found.unwrap_or_else(|| {
        part("go/bin/go").expect("Go is there: tests/cluster/parts.py CACHE api fetches one")
    })
}

/// Runs the tests of a Go module of this crate's folder.
///
/// # Panics
/// With what they said, where one fails.
pub fn test(module: &str) {
    let output = Command::new(go())
        .args(["test", "-count=1", "./..."])
        .current_dir(crate::folder().join(module))
        .env("GOFLAGS", "-mod=readonly")
        .env("GOWORK", "off")
        .output()
        .expect("Go runs");
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
