//! kstatus, the library that Flux judges objects by, over statuses that this code wrote: see `tests/chart/kstatus`.

use std::path::{Path, PathBuf};
use std::process::Command;

use freehold_tests::parts::part;

/// The machine's Go, or the one that `tests/cluster/parts.py` fetched.
fn go() -> PathBuf {
    let runs = |go: &Path| Command::new(go).arg("version").output().is_ok();
    let known = [PathBuf::from("go"), PathBuf::from("/usr/local/go/bin/go")];
    let found = known.into_iter().find(|go| runs(go));
    found.unwrap_or_else(|| {
        part("go/bin/go").expect("Go is there: tests/cluster/parts.py CACHE api fetches one")
    })
}

#[test]
fn kstatus_judges_every_phase_as_it_is() {
    let module = freehold_tests::folder().join("chart/kstatus");
    let output = Command::new(go())
        .args(["test", "-count=1", "./..."])
        .current_dir(module)
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
