//! The values that go into and come out of [`Downloads`](super::Downloads).

use std::ops::Range;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::GroupRanges;
use thiserror::Error;

use crate::{NodeId, PeerKey, RequestId};

/// Tunables of [`Downloads`](super::Downloads).
#[derive(Clone, Debug)]
pub struct DownloadConfig {
    /// Most blobs fetched at once.
    pub max_blobs: usize,
    /// Most peers known at once.
    pub max_peers: usize,
    /// What this node is called in its site.
    pub me: NodeId,
}

impl Default for DownloadConfig {
    fn default() -> Self {
        Self {
            max_blobs: 1024,
            max_peers: 256,
            me: NodeId::default(),
        }
    }
}

/// A blob to fetch.
#[derive(Clone, Debug)]
pub struct BlobSpec {
    /// Its name.
    pub root: RootHash,
    /// Its size in bytes.
    pub size: u64,
    /// What is already held, verified and stored.
    pub have: GroupRanges,
    /// What is wanted; what is held need not be left out.
    pub want: GroupRanges,
    /// Blobs of higher priority are asked for first.
    pub priority: u8,
}

/// Why a blob cannot be fetched.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AddBlobError {
    /// It is being fetched already; use `want` for more of it.
    #[error("blob {0} is being fetched already: ask for more of it with `want`")]
    Known(RootHash),
    /// Too many are.
    #[error("{0} blobs are being fetched already: wait for one to end, or remove one")]
    TooMany(usize),
    /// Larger than content may be.
    #[error("blob {root} of {size} bytes is larger than content may be")]
    TooLarge {
        /// The blob.
        root: RootHash,
        /// Its alleged size.
        size: u64,
    },
}

/// The blob is not being fetched.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("blob {0} is not being fetched: add it first")]
pub struct UnknownBlob(pub RootHash);

/// Why a request ended without its response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The peer says that it does not hold the groups after all. Its haves for them are taken back.
    NotHeld,
    /// The peer has too many of our requests queued.
    Busy,
    /// The peer took the request back at our wish (the answer to a cancel).
    Cancelled,
    /// The response did not verify: the peer is banned.
    Corrupt,
    /// The response broke the protocol (too long, wrong frame): the peer is banned.
    Malformed,
    /// The transport gave up on this request (stream reset, its own timeout).
    Lost,
    /// The content verified but could not be stored; nothing of it counts as held. Not the peer's fault.
    NotStored,
}

/// Why a blob is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PauseReason {
    /// By the user.
    Asked,
    /// The disk or quota is full.
    DiskFull,
    /// The store failed otherwise.
    StoreFailed,
}

/// Why a peer is to be cut off and banned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BanReason {
    /// It sent content that does not verify.
    Corrupt,
    /// It broke the protocol.
    Malformed,
}

/// What a gateway of a site says: that it is one, and what it fetches from beyond.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayNotice {
    /// The blob.
    pub root: RootHash,
    /// The gateway.
    pub node: NodeId,
    /// Grows with each notice of this gateway.
    pub sequence: u64,
    /// What it is fetching, all of it.
    pub groups: GroupRanges,
}

/// An instruction to the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Ask a peer for a run of groups.
    Request {
        /// Whom.
        peer: PeerKey,
        /// Under which number.
        id: RequestId,
        /// Of which blob.
        root: RootHash,
        /// Of which size.
        size: u64,
        /// Which groups: 1 to [`MAX_REQUEST_GROUPS`](crate::MAX_REQUEST_GROUPS).
        groups: Range<u64>,
        /// Whether somebody waits for it.
        demand: bool,
    },
    /// Take a request back; it still ends by one of the usual ways.
    Cancel {
        /// Of whom it was asked.
        peer: PeerKey,
        /// Its number.
        id: RequestId,
    },
    /// All that is wanted of a blob is held. Comes again if more is wanted later.
    Complete {
        /// The blob.
        root: RootHash,
    },
    /// Tell peers of the site what one of its gateways fetches.
    TellGateway {
        /// Whom.
        peers: Vec<PeerKey>,
        /// What.
        notice: GatewayNotice,
    },
    /// Cut a peer off, and do not let it back.
    Ban {
        /// Whom.
        peer: PeerKey,
        /// What it did.
        reason: BanReason,
    },
}

/// Where a blob's transfer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobStatus {
    /// Something wanted is missing, and somebody has it.
    Active,
    /// Something wanted is missing, and no usable peer has it.
    Starved,
    /// All that is wanted is held.
    Complete,
    /// Not being requested.
    Paused(PauseReason),
}

/// Figures of a blob's transfer.
#[derive(Clone, Debug, PartialEq)]
pub struct BlobStats {
    /// Where it stands.
    pub status: BlobStatus,
    /// Bytes wanted in all, held or not.
    pub wanted: u64,
    /// Bytes of those that are held.
    pub held: u64,
    /// Bytes in flight.
    pub in_flight: u64,
    /// Bytes verified that were held already when they came.
    pub duplicate: u64,
    /// Bytes verified that came, by peer, duplicates included. Peers that have left are summed under `None`.
    pub received: Vec<(Option<PeerKey>, u64)>,
    /// How many pieces not held have 0, 1, 2 ... providers; the last entry counts those with more.
    pub availability: Vec<u32>,
    /// Connected peers that hold something of it.
    pub providers: Vec<ProviderStats>,
    /// Rate of verified new bytes, bytes a second (for the ETA).
    pub rate: f64,
}

/// One provider of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProviderStats {
    /// Who.
    pub peer: PeerKey,
    /// How many bytes of the blob it holds.
    pub holds: u64,
    /// Whether that is all of it.
    pub seeder: bool,
}

/// Figures of a peer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PeerStats {
    /// Measured rate, bytes a second; `None` before the first response.
    pub rate: Option<f64>,
    /// Least time from a request to its first bytes lately; `None` before the first response.
    pub delay: Option<Duration>,
    /// Bytes that may be asked of it at once.
    pub window: u64,
    /// Bytes asked and not yet come.
    pub outstanding: u64,
    /// Whether it is left alone for a while, after timeouts.
    pub backing_off: bool,
}
