//! The embedded control plane held to a real kube-apiserver: the same operations on both, and a comparison of
//! codes, warnings and bodies.
//!
//! `cases/*.yaml` hold the scripted operations (see [`script`] for their form), `random.rs` makes up sequences
//! and shrinks those that differ, `commands.rs` lets kubectl and helm do the asking, `history.rs` asks for what is
//! long gone. What differs and stays so
//! names a heading of `docs/conformance.md`; a difference that is gone must go from there too.
//!
//! `FREEHOLD_TEST_KUBECONFIG` (see `tests/on-cluster`) puts another cluster in the place of the one that is started here.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, its helpers too"
)]

mod both;
mod commands;
mod history;
mod random;
mod script;
mod scripted;
