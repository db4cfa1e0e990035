//! The store as the network sees it.
//!
//! The network asks by root hash and says no kinds; whoever starts a fetch has made the blob's entry before, except
//! where the size is not known: then the first range that verifies tells it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use capsule_chunker::bao::{DecodeError, Tree, decode_range};
use capsule_proto::{GroupRanges, RootHash};
use capsule_swarm::{BlobStore, ServeError, StoreError};

use crate::store::{BlobKind, ReadError, Store, WriteError};

/// Blobs of the store, served to peers and written from them.
#[derive(Debug)]
pub struct Blobs {
    store: Store,
    /// Kinds of blobs that are fetched without knowing their size. Few: one a pull that is planned.
    expected: Mutex<HashMap<RootHash, BlobKind>>,
}

impl Blobs {
    /// Nothing expected.
    pub fn new(store: Store) -> Self {
        Self {
            store,
            expected: Mutex::default(),
        }
    }

    /// Says of which kind a blob of unknown size will be.
    pub fn expect(&self, root: RootHash, kind: BlobKind) {
        self.expected().insert(root, kind);
    }

    /// Ends that.
    pub fn forget(&self, root: &RootHash) {
        self.expected().remove(root);
    }

    fn expected(&self) -> MutexGuard<'_, HashMap<RootHash, BlobKind>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlobStore for Blobs {
    fn presence(&self, root: &RootHash) -> Option<(u64, GroupRanges)> {
        self.store
            .present(root)
            .map(|presence| (presence.size, presence.ranges))
    }

    fn read_encoded(
        &self,
        root: &RootHash,
        groups: Range<u64>,
        out: &mut Vec<u8>,
    ) -> Result<(), ServeError> {
        self.store
            .read_encoded(root, groups, out)
            .map_err(|error| match error {
                ReadError::Damaged { root, groups } => ServeError::Damaged {
                    root,
                    group: groups.runs().first().map_or(0, |run| run.start),
                },
                ReadError::Io(fault) => ServeError::Io {
                    root: *root,
                    source: std::io::Error::other(fault),
                },
                ReadError::Component { .. } | ReadError::Database(_) => ServeError::Io {
                    root: *root,
                    source: std::io::Error::other(error),
                },
                ReadError::Unknown(_) | ReadError::Absent { .. } | ReadError::TooLong { .. } => {
                    ServeError::Missing { root: *root }
                }
            })
    }

    fn write_encoded(
        &self,
        root: &RootHash,
        size: u64,
        groups: Range<u64>,
        encoded: &[u8],
    ) -> Result<(), StoreError> {
        let first = groups.start;
        let written = match self.store.write_encoded(root, groups.clone(), encoded) {
            // A size that a peer claims is not noted before something verified with it.
            Err(WriteError::Unknown(_)) => {
                let tree = Tree { root: *root, size };
                decode_range(&tree, groups.clone(), encoded, |_, _| {}, |_, _| {})
                    .map_err(|e| invalid(&e, first))?;
                let kind = self
                    .expected()
                    .get(root)
                    .copied()
                    .unwrap_or(BlobKind::Other);
                let made = self.store.create_partial(root, size, kind);
                made.and_then(|()| self.store.write_encoded(root, groups, encoded))
            }
            written => written,
        };
        written.map_err(|error| match error {
            WriteError::Invalid { source, .. } => invalid(&source, first),
            WriteError::Full(_) => StoreError::Full,
            other => StoreError::Io(std::io::Error::other(other)),
        })
    }
}

fn invalid(error: &DecodeError, first: u64) -> StoreError {
    let group = match error {
        DecodeError::Mismatch { group } => *group,
        _ => first,
    };
    StoreError::Invalid { group }
}
