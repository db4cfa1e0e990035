//! The `capsule` program's parts, so that tests can reach them.

pub mod store;
