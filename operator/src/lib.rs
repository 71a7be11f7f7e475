//! The controllers: they turn what people write into what each machine shall do, and say how it went.
//!
//! ```text
//!  watches ─▶ shelves ──news──▶ planner ──plan──▶ one controller a kind
//!  (one a kind)  ▲              (20 ms,          ├─ inference_node: spec, Reachable   ─┐
//!                │               pure rules)     ├─ model_deployment: status           ├─▶ API
//!  Leases ─▶ liveness ─deadline────┘             ├─ governance_policy, health_probe    │
//!                └───────── own writes ──────────┴─────────────────────────────────────┘
//! ```
//! The plan is one for the whole fleet: any news makes the planner compute it anew from what the
//! shelves hold, and each controller then brings its objects to what the plan says. All of it is
//! level-triggered, so a missed event costs nothing and a second pass writes nothing.
//!
//! No object gets a finalizer. Deleting a deployment takes its assignments out of the next plan, and
//! the agents stop what is not assigned; nothing outside the API needs cleaning up by the operator.
//!
//! Start reading at [`Operator`], then `planner.rs`, then `model_deployment/`.

mod backoff;
mod check;
mod compare;
mod controller;
mod events;
mod fleet;
mod governance_policy;
mod health_probe;
mod inference_node;
mod leader;
mod liveness;
mod malformed;
mod metrics;
mod model_deployment;
mod operator;
mod planner;
mod server;
mod shelf;
mod story;
mod writes;

pub use crate::check::{Address, Ask, ParseAddress, check};
pub use crate::leader::LeaderElection;
pub use crate::liveness::FORGET_AFTER;
pub use crate::operator::{Operator, OperatorConfig, RunOperator, run};

/// Field manager of everything that the operator applies.
pub const FIELD_MANAGER: &str = "freehold-operator";
