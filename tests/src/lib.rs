//! Suites that cross crates live in `tests/`; see `tests/run` for what they need and how they start.
//!
//! This library is their harness: a real kube-apiserver over etcd or kine, the embedded control plane beside
//! it, and one way to speak to both. Start reading at [`api_server::ApiServer`]; [`exchange`] is a request and
//! its answer, [`likeness`] says whether two answers are the same.

pub mod api_server;
pub mod audit;
pub mod child;
pub mod cluster;
pub mod exchange;
pub mod go;
pub mod likeness;
pub mod machine;
pub mod named;
pub mod network;
pub mod node;
pub mod parts;
pub mod person;

use std::path::PathBuf;

/// The folder of this crate in the checkout that is tested. Asked for when a test runs: what a compiler was told
/// may be another checkout's folder, where two share a cache of builds.
///
/// # Panics
/// Where no cargo started the test.
#[must_use]
pub fn folder() -> PathBuf {
    PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo test says which crate it tests"))
}
