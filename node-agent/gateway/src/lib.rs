//! The bus: an OpenAI-compatible HTTP API in front of the workers of a machine.
//!
//! Clients speak to names. The agent tells the gateway with [`Gateway::apply`] which names there are,
//! which worker or which other machine answers to them, and which rules hold; everything that a request
//! needs is decided from that snapshot in memory.
//!
//! ```text
//! client -> serve -> openai (parse) -> exchange (rules, audit, counts) -> route -> worker  Unix socket
//!                                                                              -> peer    other gateway
//! ```
//! A request passes: request id, key, strict parse, rules, audit record, worker; a client that leaves
//! drops all of it, which frees its slot. Start reading at [`gateway`], then `openai/mod.rs`.

mod audit;
mod bus;
mod error;
mod exchange;
mod gateway;
mod metrics;
mod openai;
mod peer;
mod route;
mod serve;
pub mod worker;

pub use bus::{ActivateModel, Activator, Activity, BusState, NoActivation, WorkerEndpoint};
pub use gateway::{Gateway, GatewayOptions, OpenGateway};
#[doc(hidden)]
pub use openai::read_as_any_request;
