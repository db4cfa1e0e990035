//! The values that go into and come out of [`Uploads`](super::Uploads).

use std::ops::Range;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use thiserror::Error;

use crate::{PeerKey, RequestId};

/// Tunables of [`Uploads`](super::Uploads).
#[derive(Clone, Debug)]
pub struct UploadConfig {
    /// Most requests queued for one peer: twice what a requester of ours asks at once.
    pub max_queue: usize,
    /// Most peers.
    pub max_peers: usize,
    /// How long at least a node that holds all of a blob keeps back a second copy of a piece, when it has nothing
    /// better to send: the first receiver is about to announce it, and to pass it on itself. Where receivers take
    /// longer to announce what they were sent, so does this; and it is twice as long while much is in flight.
    pub echo: Duration,
    /// How long at most. Zero, with `echo`, turns it off.
    pub echo_max: Duration,
}

impl Default for UploadConfig {
    fn default() -> Self {
        Self {
            max_queue: 128,
            max_peers: 256,
            echo: Duration::from_millis(150),
            echo_max: Duration::from_secs(1),
        }
    }
}

/// A request as it came from a peer, already checked against what this node holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IncomingRequest {
    /// The requester's number for it.
    pub id: RequestId,
    /// The blob.
    pub root: RootHash,
    /// Its size in bytes.
    pub size: u64,
    /// The run of groups asked for: at least one, at most [`MAX_REQUEST_GROUPS`](crate::MAX_REQUEST_GROUPS).
    pub groups: Range<u64>,
    /// Whether somebody waits for it: served before all that is not.
    pub demand: bool,
    /// Whether this node holds all of the blob.
    pub whole: bool,
    /// Groups of the blob that the peer has announced.
    pub holds: u64,
}

/// Why a request was not queued. The caller answers the peer with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The peer has too many requests queued: it should wait for some of them.
    #[error("the peer already has the most requests queued that one peer may")]
    Busy,
    /// The run is empty, longer than a request may be, or beyond the blob's end: the peer breaks the protocol.
    #[error("the run of groups is empty, too long or beyond the end")]
    Malformed,
    /// The peer used the number of a request that is still queued or being served: it breaks the protocol.
    #[error("a request of that number is still open")]
    Duplicate,
    /// The peer is not connected here (or more are than may be).
    #[error("the peer is not known")]
    UnknownPeer,
}

/// An instruction: read these groups and send them as the response to the peer's request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serve {
    /// Who asked.
    pub peer: PeerKey,
    /// The requester's number.
    pub id: RequestId,
    /// The blob.
    pub root: RootHash,
    /// Its size in bytes, as the request gave it.
    pub size: u64,
    /// The run of groups: the whole request.
    pub groups: Range<u64>,
    /// Whether somebody waits for it.
    pub demand: bool,
}

/// Figures of what was served.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UploadStats {
    /// Content bytes of responses finished, over all peers and blobs.
    pub bytes_sent: u64,
    /// Requests waiting.
    pub queued: usize,
    /// Content bytes handed to the transport and not yet sent.
    pub in_flight: u64,
    /// Measured rate of sending, bytes a second.
    pub rate: f64,
}
