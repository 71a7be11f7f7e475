//! The agent of one machine: it makes the machine do what its InferenceNode object says, and says how
//! that goes.
//!
//! ```text
//!            ┌ watch ─▶ spec (also on disk) ─▶ supervisor ─▶ worker processes ◀─ Unix socket ─┐
//!  API ◀────▶┤                                     │  ▲                                       │
//!            ├ status ◀──────────── snapshot ──────┘  └─ fetches, exits, beats, probes        │
//!            └ heartbeat (Lease)                   └─ routes, rules ─▶ gateway ───────────────┘
//! ```
//! Each box is one task. The supervisor alone decides; everything slow runs beside it and reports to it
//! by events, so it never waits for what it supervises. With the API gone all but `status` and
//! `heartbeat` go on. Start reading at [`agent`], then [`supervisor`].

pub mod agent;
pub mod args;
mod cgroup;
mod config;
pub mod credential;
mod energy;
mod error;
pub mod gpu;
mod heartbeat;
pub mod inventory;
mod metrics;
pub mod service;
mod spec_file;
mod status;
pub mod store;
mod supervisor;
mod watch;
pub mod worker;

pub use agent::Agent;
pub use config::AgentConfig;
pub use credential::Credential;
pub use energy::EnergyPrice;
pub use error::StartAgent;
