//! The `capsule` program.
fn main() {}
