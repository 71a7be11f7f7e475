//! The agent with real worker processes, a real model, and the embedded control plane or none at all.

mod harness;

mod bad_input;
mod on_demand;
mod probes;
mod status;
mod survival;
mod swap;
