//! Capsule's transfer scheduler: who asks whom for what, and who is served what, when.
//!
//! Sans-IO: state machines that know no sockets, files, clock or threads. Events go in through
//! `handle_*`, instructions come out of `poll_*`, time ([`Time`]) and the seed of all randomness are
//! arguments. The daemon and the simulations run the same code.
//!
//! - [`Downloads`]: what this node fetches: pieces, providers, request windows, stealing, endgame.
//! - [`Uploads`]: what this node serves: bounded queues, fair shares, the least-sent piece first.
//! - [`Announcements`]: which haves are told to whom and when, within a budget.
//!
//! What caps of rates are, and how bytes wait for them, is in [`Limiter`] and [`Schedule`].
//!
//! They know nothing of each other. The caller (crate `capsule-swarm`) carries what one says to the
//! others: content that was verified and stored goes to [`Downloads::handle_received`] and to
//! [`Announcements::handle_held`].

mod announcements;
mod downloads;
mod geometry;
mod meter;
mod rates;
mod spans;
mod time;
mod uploads;

pub use announcements::{Announce, AnnounceConfig, Announcements, Change};
pub use downloads::{
    AddBlobError, BanReason, BlobSpec, BlobStats, BlobStatus, DownloadConfig, Downloads, Failure,
    GatewayNotice, Inconsistency, Output, PauseReason, PeerStats, ProviderStats, UnknownBlob,
};
pub use geometry::{MAX_REQUEST_GROUPS, PieceGeometry};
pub use rates::{
    Caps, Class, DAY, Limiter, Rate, RateError, Schedule, ScheduleError, Ticket, wire_bytes,
};
pub use time::Time;
pub use uploads::{IncomingRequest, Refusal, Serve, UploadConfig, UploadStats, Uploads};

/// A connected peer, numbered by the caller; never reused for another connection while the old one is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerKey(pub u64);

/// A node as others know it: the same in the eyes of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub [u8; 32]);

/// A request, numbered by the requester; unique among all its requests to all peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);
