//! Pure decisions: validate, plan, govern, health, supervise, status.
//!
//! No tokio, no client, no clock, no file system: what is needed comes in as an argument, `now` too, and
//! what is decided goes out with a report of why. Start reading at [`plan`].

pub mod check;
pub mod energy;
pub mod govern;
pub mod health;
pub mod labels;
pub mod plan;
pub mod status;
pub mod supervise;
pub mod validate;
