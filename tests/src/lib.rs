//! Suites that cross crates live in `tests/`; see `tests/run` for what they need and how they start.
