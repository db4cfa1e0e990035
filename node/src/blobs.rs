//! The store as the network sees it.
//!
//! The network asks by root hash and says no kinds; whoever starts a fetch has made the blob's entry before, except
//! where the size is not known: then the first range that verifies tells it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use capsule_chunker::bao::{DecodeError, Tree, decode_range};
use capsule_proto::ranges::{Height, group_count};
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

    /// Whether a blob of unknown size is expected.
    #[cfg(test)]
    pub fn is_expected(&self, root: &RootHash) -> bool {
        self.expected().contains_key(root)
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
        height: Height,
        out: &mut Vec<u8>,
    ) -> Result<(), ServeError> {
        self.store
            .read_encoded(root, groups, height, out)
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
        height: Height,
        encoded: &[u8],
    ) -> Result<(), StoreError> {
        // Under another size nothing of an honest peer's would verify: that is no reason to ban it.
        let known = self.store.present(root).map(|presence| presence.size);
        if let Some(known) = known.filter(|known| *known != size) {
            let message = format!("{root} is being fetched with {known} bytes, not {size}");
            return Err(StoreError::Io(std::io::Error::other(message)));
        }
        let first = groups.start;
        let write = || {
            self.store
                .write_encoded(root, groups.clone(), height, encoded)
        };
        let written = match write() {
            // A size that a peer claims is noted only when it is proved, which the last group does: its length and its
            // place in the tree are in the hash.
            Err(WriteError::Unknown(_)) => {
                let tree = Tree { root: *root, size };
                let run = groups.clone();
                decode_range(
                    &tree,
                    run,
                    height,
                    &Vec::new(),
                    encoded,
                    |_, _| {},
                    |_, _| {},
                )
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
                made.and_then(|()| write())
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
    if matches!(error, DecodeError::Unknown { .. }) {
        return StoreError::Unknown;
    }
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

    /// An empty store as the network sees it, and content that comes to it.
    struct Set {
        _temp: tempfile::TempDir,
        store: Store,
        blobs: Blobs,
        content: Vec<u8>,
        outboard: Vec<u8>,
        tree: Tree,
    }

    fn set() -> Set {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(temp.path(), StoreOptions::default()).unwrap();
        let content = vec![7; 100_000];
        let (tree, outboard) = tree_of(&content);
        Set {
            _temp: temp,
            blobs: Blobs::new(store.clone()),
            store,
            content,
            outboard,
            tree,
        }
    }

    impl Set {
        fn encoded(&self, groups: Range<u64>) -> Vec<u8> {
            let mut encoded = Vec::new();
            encode_range(
                &self.tree,
                groups,
                Height::ROOT,
                &self.content,
                &self.outboard,
                &mut encoded,
            )
            .unwrap();
            encoded
        }

        /// A peer sends a range, as of content of `size` bytes.
        fn write(&self, size: u64, groups: Range<u64>) -> Result<(), StoreError> {
            let encoded = self.encoded(groups.clone());
            self.blobs
                .write_encoded(&self.tree.root, size, groups, Height::ROOT, &encoded)
        }
    }

    #[test]
    fn a_size_that_does_not_verify_is_not_noted() {
        let set = set();
        let (root, size) = (set.tree.root, set.tree.size);
        set.blobs.expect(root, BlobKind::Manifest);
        for wrong in [0, 99_999, 100_001, 1 << 40] {
            let result = set.write(wrong, 5..7);
            assert!(matches!(result, Err(StoreError::Invalid { .. })), "{wrong}");
            assert_eq!(set.blobs.presence(&root), None);
        }
        // A range that would verify with other sizes too proves none.
        assert!(matches!(set.write(size - 1, 0..2), Err(StoreError::Io(_))));
        assert_eq!(set.blobs.presence(&root), None);
        set.write(size, 5..7).unwrap();
        assert_eq!(
            set.blobs.presence(&root),
            Some((size, GroupRanges::from(5..7)))
        );
        assert_eq!(set.store.blobs()[0].kind, BlobKind::Manifest);
        let mut out = Vec::new();
        set.blobs
            .read_encoded(&root, 5..7, Height::ROOT, &mut out)
            .unwrap();
        assert!(out == set.encoded(5..7));
        let absent = set.blobs.read_encoded(&root, 0..1, Height::ROOT, &mut out);
        assert!(matches!(absent, Err(ServeError::Missing { .. })));
    }

    #[test]
    fn an_entry_of_another_size_is_not_the_senders_fault_and_gives_way() {
        let set = set();
        let (root, size) = (set.tree.root, set.tree.size);
        let create = |size| set.store.create_partial(&root, size, BlobKind::Other);
        create(size + 1).unwrap();
        assert!(matches!(set.write(size, 0..7), Err(StoreError::Io(_))));
        let guard = set.store.guard([root]);
        assert!(create(size).is_err(), "a fetch uses it");
        drop(guard);
        create(size).unwrap();
        set.write(size, 0..7).unwrap();
        assert!(create(size + 1).is_err(), "the size is proved");
    }
}
