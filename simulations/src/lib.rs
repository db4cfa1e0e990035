//! Simulated fleets that run the scheduler of the daemon: `capsule-swarm-core`, the same code, in virtual time.
//!
//! ```sh
//! cargo run --release -p capsule-simulations -- plans/equal-100.toml
//! ```
//!
//! A [`Plan`] (from a file: [`file`](mod@file)) says which nodes there are, how they are linked and what happens to them. A
//! [`World`] runs it, event by event, and looks after each step whether what must hold does ([`checks`]). Everything follows from
//! the plan and its seed: a run that fails is seen again with the same seed. The [`Report`] has the figures, beside the least
//! time in which it could be done ([`Plan::bound`]).
//!
//! # What is like the daemon
//! The scheduler, its windows, queues and announcements; whom a node connects to (16 connections wanted, 24 at most, at random); that content is
//! announced and served once it is verified, and not asked for any more once all is there; that haves tell both halves of the scheduler, and
//! that who holds all is told of no deltas; bytes of messages and hashes.
//!
//! # What is not
//! - Links carry cells of 25 ms, first come, first served. There is no loss; TCP is a window of twice the bandwidth-delay product, 64 KiB at
//!   least, from the start.
//! - Messages cost bytes of the sender's link, but do not wait behind content. In the daemon they share the connection with it.
//! - Reading, hashing and writing take no time, and neither queue nor fail; connecting takes no time.
//! - Memory for responses is not bounded but by the scheduler's own bounds; there is one blob, whose size is known.
//! - The daemon tells the scheduler of parts of responses every 200 ms, a simulated node with each cell.
//! - Connections do not give way to others; a node opens new ones a second after it lost some.
//! - What is verified is committed: a node that is killed loses nothing of that.

pub mod bound;
pub mod checks;
pub mod file;
pub mod network;
pub mod node;
pub mod plan;
pub mod plot;
pub mod queue;
pub mod report;
mod world;

pub use plan::Plan;
pub use report::Report;
pub use world::World;

impl Plan {
    /// Runs it to the end.
    pub fn run(self) -> Result<Report, checks::Violation> {
        World::new(self).run()
    }
}
