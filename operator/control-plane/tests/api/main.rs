//! The API from outside: by real kubectl over TLS, by `kube::Client` in this process, and by force.
//!
//! The kind under test is the Widget of `widget.yaml`, which has a little of everything that a CRD may ask
//! of its server. Start reading at `support.rs`.

#![allow(clippy::unwrap_used, clippy::panic)]

mod bad_input;
mod client;
mod durability;
mod kubectl;
mod kubectl_writes;
mod serving;
mod support;
mod watches;
