//! Harness and the suites that cross crates
