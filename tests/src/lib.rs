//! What the integration tests and benchmarks share: real `capsule` processes on loopback or in a lab's network, and generated data.
//!
//! A [`Node`] is one home with its daemon; a [`Fleet`] is several that joined one another. Everything lies in a temporary
//! directory; processes end, by their ids, when their `Node` goes away. No fault switches live in the shipped program: whoever
//! misbehaves in tests is a program of this crate.

pub mod accounts;
pub mod binary;
pub mod data;
pub mod fleet;
pub mod guest;
pub mod hostile;
pub mod inside;
pub mod lab;
pub mod machines;
pub mod member;
pub mod network;
pub mod node;
pub mod rogue;
pub mod serving;
pub mod shelf;
pub mod short;
pub mod small_disk;
pub mod stop;

pub use fleet::Fleet;
pub use node::Node;
