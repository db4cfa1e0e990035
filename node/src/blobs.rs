//! The store as the network sees it.
//!
//! The network asks by root hash and says no kinds; whoever starts a fetch has made the blob's entry before, except
//! where the size is not known: then the first range that verifies tells it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use capsule_chunker::bao::{DecodeError, Tree, decode_range};
use capsule_proto::ranges::group_count;
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
        // Under another size nothing of an honest peer's would verify: that is no reason to ban it.
        let known = self.store.present(root).map(|presence| presence.size);
        if let Some(known) = known.filter(|known| *known != size) {
            let message = format!("{root} is being fetched with {known} bytes, not {size}");
            return Err(StoreError::Io(std::io::Error::other(message)));
        }
        let first = groups.start;
        let written = match self.store.write_encoded(root, groups.clone(), encoded) {
            // A size that a peer claims is noted only when it is proved, which the last group does: its length and its
            // place in the tree are in the hash.
            Err(WriteError::Unknown(_)) => {
                let tree = Tree { root: *root, size };
                decode_range(&tree, groups.clone(), encoded, |_, _| {}, |_, _| {})
                    .map_err(|e| invalid(&e, first))?;
                if groups.end != group_count(size) {
                    let message = format!("the size of {root} is not proved");
                    return Err(StoreError::Io(std::io::Error::other(message)));
                }
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

#[cfg(test)]
mod tests {
    use capsule_chunker::bao::{encode_range, tree_of};

    use super::*;
    use crate::store::StoreOptions;

    #[test]
    fn a_size_that_does_not_verify_is_not_noted() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(temp.path(), StoreOptions::default()).unwrap();
        let blobs = Blobs::new(store.clone());
        let content = vec![7; 100_000];
        let (tree, outboard) = tree_of(&content);
        let mut encoded = Vec::new();
        encode_range(&tree, 5..7, &content, &outboard, &mut encoded).unwrap();
        blobs.expect(tree.root, BlobKind::Manifest);
        for wrong in [0, 99_999, 100_001, 1 << 40] {
            let result = blobs.write_encoded(&tree.root, wrong, 5..7, &encoded);
            assert!(matches!(result, Err(StoreError::Invalid { .. })), "{wrong}");
            assert_eq!(blobs.presence(&tree.root), None);
        }
        // A range that would verify with other sizes too proves none.
        let mut early = Vec::new();
        encode_range(&tree, 0..2, &content, &outboard, &mut early).unwrap();
        let unproved = blobs.write_encoded(&tree.root, tree.size - 1, 0..2, &early);
        assert!(matches!(unproved, Err(StoreError::Io(_))));
        assert_eq!(blobs.presence(&tree.root), None);
        blobs
            .write_encoded(&tree.root, tree.size, 5..7, &encoded)
            .unwrap();
        assert_eq!(
            blobs.presence(&tree.root),
            Some((tree.size, GroupRanges::from(5..7)))
        );
        assert_eq!(store.blobs()[0].kind, BlobKind::Manifest);
        let mut out = Vec::new();
        blobs.read_encoded(&tree.root, 5..7, &mut out).unwrap();
        assert!(out == encoded);
        let absent = blobs.read_encoded(&tree.root, 0..1, &mut out);
        assert!(matches!(absent, Err(ServeError::Missing { .. })));
    }

    #[test]
    fn an_entry_of_another_size_is_not_the_senders_fault_and_gives_way() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(temp.path(), StoreOptions::default()).unwrap();
        let blobs = Blobs::new(store.clone());
        let content = vec![7; 100_000];
        let (tree, outboard) = tree_of(&content);
        let mut encoded = Vec::new();
        encode_range(&tree, 0..7, &content, &outboard, &mut encoded).unwrap();
        let create = |size| store.create_partial(&tree.root, size, BlobKind::Other);
        let write = || blobs.write_encoded(&tree.root, tree.size, 0..7, &encoded);
        create(tree.size + 1).unwrap();
        assert!(matches!(write(), Err(StoreError::Io(_))));
        let guard = store.guard([tree.root]);
        assert!(create(tree.size).is_err(), "a fetch uses it");
        drop(guard);
        create(tree.size).unwrap();
        write().unwrap();
        assert!(create(tree.size + 1).is_err(), "the size is proved");
    }
}
