//! The agent with real worker processes, a real model, and the embedded control plane or none at all.
#![allow(clippy::panic, reason = "a failed wait ends its test with what it saw last")]

mod harness;

mod bad_input;
mod on_demand;
mod probes;
mod status;
mod survival;
mod swap;
