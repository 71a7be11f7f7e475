//! The plan as a whole: what holds for all of them, and what single ones must do.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, its helpers too"
)]

mod build;
mod cordon;
mod devices;
mod energy;
mod names;
mod policies;
mod probes;
mod properties;
mod recorded;
mod rollouts;
