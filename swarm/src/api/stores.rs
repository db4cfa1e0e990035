//! The two stores that the node brings: of blobs, and of records.

use std::io;
use std::ops::Range;

use capsule_proto::credential::Revoked;
use capsule_proto::ranges::Height;
pub use capsule_proto::record::RecordId;
use capsule_proto::{GroupRanges, RootHash};
use thiserror::Error;

/// Why content could not be read for a peer.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The store does not hold that range (any more).
    #[error("the store does not hold this range of {root}")]
    Missing {
        /// The blob asked for.
        root: RootHash,
    },
    /// What lies on the disk no longer matches the hash.
    #[error("chunk group {group} of {root} is damaged on the disk: run `capsule verify`")]
    Damaged {
        /// The blob asked for.
        root: RootHash,
        /// The first group that does not match.
        group: u64,
    },
    /// Reading failed.
    #[error("reading {root}: {source}")]
    Io {
        /// The blob asked for.
        root: RootHash,
        /// What the system said.
        source: io::Error,
    },
}

/// Why received content was not stored.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The bytes do not match the hash, or are no encoding of the range: the sender's fault.
    #[error("chunk group {group} does not match the hash: the sender is at fault")]
    Invalid {
        /// The first group that does not match.
        group: u64,
    },
    /// The hash that the encoding goes up to is not here: nobody's fault, it is asked for again up to the root.
    #[error("the hashes above what came are not in the store")]
    Unknown,
    /// No room: the disk or the quota is full. Our fault; the fetch ends.
    #[error("no room for more content: free space, raise the quota or run `capsule gc`")]
    Full,
    /// Writing failed. Our fault; the fetch ends.
    #[error("writing content: {0}")]
    Io(#[from] io::Error),
}

/// Blobs of the node, as the network reads and writes them. All calls block; they come from the
/// network's own few threads, several at once.
pub trait BlobStore: Send + Sync + 'static {
    /// Size and held groups of a blob; `None` if nothing of it is known.
    fn presence(&self, root: &RootHash) -> Option<(u64, GroupRanges)>;

    /// Appends the bao encoding of a run of groups, up to that height, to `out` (see `capsule_chunker::bao::encode_range`).
    fn read_encoded(
        &self,
        root: &RootHash,
        groups: Range<u64>,
        height: Height,
        out: &mut Vec<u8>,
    ) -> Result<(), ServeError>;

    /// Verifies the bao encoding of a run of groups, up to that height, and stores it. The blob may be new to the store:
    /// nothing is kept of it before something verified.
    fn write_encoded(
        &self,
        root: &RootHash,
        size: u64,
        groups: Range<u64>,
        height: Height,
        encoded: &[u8],
    ) -> Result<(), StoreError>;
}

/// What became of a record that a peer sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offer {
    /// Valid and not seen before: it is stored, and spreads on.
    New,
    /// Already held, superseded by what is held, or of a newer format: no fault of the sender's.
    Known,
    /// Could not be judged or kept now (no room, a clock that is behind): no fault of the sender's. It is not
    /// passed on, and asked for again after a while.
    Later(String),
    /// Malformed, or not signed by a member who may: counts against the sender.
    Rejected(String),
}

/// Records of the node, as the network compares and exchanges them. Calls block for at most a short
/// while (a database lookup); they come from the network's own threads.
pub trait RecordStore: Send + Sync + 'static {
    /// Every record that should spread.
    fn ids(&self) -> Vec<RecordId>;
    /// The bytes of one record.
    fn get(&self, id: &RecordId) -> Option<Vec<u8>>;
    /// Checks and stores a record that a peer sent.
    fn offer(&self, bytes: &[u8]) -> Offer;
    /// The newest revocation record, sent to peers before they are let in.
    fn revocation_head(&self) -> Option<Vec<u8>>;
    /// Tokens and machines revoked, by the revocation record that counts.
    fn revoked(&self) -> Revoked;
}
