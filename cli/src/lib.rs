//! The command that people use; also the all-in-one
