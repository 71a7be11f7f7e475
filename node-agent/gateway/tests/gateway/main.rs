//! The gateway as its clients and its workers see it: real HTTP on both sides, a scripted worker behind
//! a real Unix socket. `bus` is the machinery; each other module is a part of the behaviour.

mod access;
mod audit;
mod bad_input;
mod bus;
mod chat;
mod clients;
mod completions;
mod embeddings;
mod metrics;
mod routing;
mod worker;
