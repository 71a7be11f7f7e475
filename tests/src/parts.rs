//! Where the programs lie that `tests/cluster/parts.py` and `tests/fetch.py` put into the cache.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// This project's cache in the user's home.
#[must_use]
pub fn cache() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    let base = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from);
    base.join("freehold")
}

/// A program of this workspace, from the folder of the tests' own programs.
///
/// # Errors
/// When it was not built.
pub fn own(program: &str) -> Result<PathBuf> {
    // Tests lie in a folder beside the programs.
    let test = std::env::current_exe()?;
    let folder = test.parent().and_then(Path::parent);
    let path = folder.map(|folder| folder.join(program));
    path.filter(|path| path.is_file()).with_context(|| {
        format!(
            "no {program} lies near {}: tests/e2e builds what this needs",
            test.display()
        )
    })
}

/// A part of a real Kubernetes, such as `kube-apiserver`.
///
/// # Errors
/// When it was not built yet.
pub fn part(name: &str) -> Result<PathBuf> {
    let path = cache().join("cluster").join(name);
    ensure!(
        path.is_file(),
        "no {name} at {}: run ./tests/run, which builds it once, or run tests/on-cluster with KUBECONFIG naming a cluster of your own",
        path.display()
    );
    Ok(path)
}

/// The real kubectl.
///
/// # Errors
/// When it was not fetched yet.
pub fn kubectl() -> Result<PathBuf> {
    let named = std::env::var_os("FREEHOLD_TEST_KUBECTL").map(PathBuf::from);
    let path = named.unwrap_or_else(|| cache().join("bin/kubectl"));
    ensure!(
        path.is_file(),
        "no kubectl at {}: run ./tests/run, which fetches it, or set FREEHOLD_TEST_KUBECTL",
        path.display()
    );
    Ok(path)
}
