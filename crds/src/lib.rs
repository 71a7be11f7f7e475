//! Wire types of Freehold's resources
