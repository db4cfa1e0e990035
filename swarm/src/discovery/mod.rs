//! Finding the fleet on the LAN. Bootstrap addresses and peer exchange are the engine's, as they need connections.

pub mod dns;
pub mod lan;
mod schedule;
