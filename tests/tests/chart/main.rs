//! The Helm chart on a real API server: what it renders, what it grants, and its life from install to uninstall.
//!
//! No node runs here: objects, rules and refusals are real, pods do not start. `end_to_end` has those.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, its helpers too"
)]

mod agents;
mod life;
mod operator;
mod policies;
mod rendered;
