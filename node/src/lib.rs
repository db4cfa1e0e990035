//! The `capsule` program's parts, so that tests can reach them.

pub mod blobs;
pub mod clock;
pub mod control;
mod failure;
pub mod graph;
pub mod held;
pub mod home;
pub mod layers;
pub mod records;
pub mod store;
pub mod work;
