//! (filled in by its engineer)
