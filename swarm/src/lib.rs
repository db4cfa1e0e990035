//! Capsule's network: finds the machines of a fleet, lets in only its members, spreads records, and
//! moves verified content between many peers at once.
//!
//! Deliberately absent: which piece to ask of whom (`capsule-swarm-core`, without sockets or clock); what
//! a blob means and where it lies (the node, behind [`BlobStore`] and [`RecordStore`]).

// The network tests' nodes are used by tests inside, too.
#[cfg(test)]
extern crate self as capsule_swarm;

mod address;
mod api;
mod discovery;
mod engine;
#[cfg(test)]
mod hostile;
mod protocol;
mod transport;

pub use api::{
    BlobStore, BlobTotals, Event, Fetch, FetchError, FetchProgress, FetchSpec, Limits, Multiaddr,
    NetworkClosed, NetworkConfig, NetworkHandle, Offer, PeerId, PeerInfo, Priority, Provider,
    RecordId, RecordStore, ServeError, StartError, StoreError, Totals,
};
pub use capsule_swarm_core::{Caps, DAY, Rate, RateError, Schedule, ScheduleError};
pub use engine::Network;
