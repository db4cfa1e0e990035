//! The lab: real daemons in network namespaces, on links that are shaped, driven by scenarios that are data.
//!
//! | module | what |
//! |---|---|
//! | `scenario`, `event` | what is to be done: sites, nodes, links; what happens, and when |
//! | `namespace`, `network` | namespaces, bridges, the router, shaped links |
//! | `goodput`, `bound` | what TCP carries over these links; the least time that follows from it |
//! | `rollout`, `fleet`, `pulling` | a fleet that pulls what one of it published, whatever happens |
//! | `foes`, `watch` | hostile members; a member that only listens |
//! | `outcome`, `times` | what came of it |
//!
//! It takes root and iproute2, and a program that has a network, mounts and processes of its own ([`inside`](crate::inside)): all
//! ends with these. One lab after the other can be set up in such a program.

pub mod bound;
pub mod event;
pub mod fleet;
mod foes;
pub mod goodput;
pub mod namespace;
pub mod network;
pub mod outcome;
pub mod pulling;
pub mod rollout;
pub mod scenario;
pub mod times;
mod watch;

pub use outcome::{Outcome, Summary};
pub use rollout::Lab;
pub use scenario::Scenario;
pub use times::Times;
