//! The commands, one a module.

pub mod apply;
pub mod bench;
pub mod chat;
pub mod delete;
pub mod demo;
pub mod doctor;
pub mod get;
pub mod inspect;
pub mod key;
pub mod node;
pub mod plan;
pub mod up;
