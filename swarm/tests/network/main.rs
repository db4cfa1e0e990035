//! Whole nodes over loopback, in one process: what the network promises to the node above it.

mod faults;
mod many;
mod membership;
mod node;
mod rates;
mod sites;
mod spreading;
