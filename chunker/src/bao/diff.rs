//! Which groups of new content differ from those of the old: two trees, compared from the top.
//!
//! Equal hashes end the descent, so the cost follows the change. Neither outboard is believed: every pair is verified
//! against the root above it.

use std::io;

use capsule_proto::GroupRanges;
use positioned_io::ReadAt;
use thiserror::Error;

use super::Tree;
use super::cv;
use super::known::{Known, KnownTree};
use super::pairs::PairFault;

/// Why trees could not be compared.
#[derive(Debug, Error)]
pub enum DiffError {
    /// An outboard does not have the right pair.
    #[error(
        "an outboard's pair at byte {offset}, above group {group}, is damaged or missing: hash the content anew"
    )]
    Pair {
        /// Offset in the outboard.
        offset: u64,
        /// First group below the pair.
        group: u64,
    },
    /// An outboard could not be read.
    #[error("cannot read an outboard at byte {offset}")]
    Outboard {
        /// Offset in the outboard.
        offset: u64,
        /// Why.
        source: io::Error,
    },
}

impl From<PairFault> for DiffError {
    fn from(fault: PairFault) -> Self {
        match fault {
            PairFault::Io { offset, source } => Self::Outboard { offset, source },
            PairFault::Wrong { offset, group } => Self::Pair { offset, group },
        }
    }
}

/// The groups of the new content that are not those of the old at the same place.
///
/// A group that is all of the content, now or then, has no hash to compare with one that is not: it counts as changed.
pub fn changed_groups(
    (old, old_outboard): (&Tree, &(impl ReadAt + ?Sized)),
    (new, new_outboard): (&Tree, &(impl ReadAt + ?Sized)),
) -> Result<GroupRanges, DiffError> {
    let mut walk = Walk {
        old: KnownTree::new(old, old_outboard),
        new: KnownTree::new(new, new_outboard),
        changed: GroupRanges::new(),
    };
    let top = walk.new.top();
    walk.compare(&top, None)?;
    Ok(walk.changed)
}

struct Walk<'a, O: ?Sized, N: ?Sized> {
    old: KnownTree<'a, O>,
    new: KnownTree<'a, N>,
    changed: GroupRanges,
}

impl<O: ReadAt + ?Sized, N: ReadAt + ?Sized> Walk<'_, O, N> {
    /// Compares what is below a node; `above` is an old node that includes it.
    fn compare(&mut self, new: &Known, above: Option<Known>) -> Result<(), DiffError> {
        let node = &new.node;
        let old = self.old.descend(node, above)?;
        let same = old
            .filter(|old| old.node.groups() == node.groups() && old.node.is_root == node.is_root);
        if same.is_some_and(|old| old.hash == new.hash) {
            return Ok(());
        }
        if node.is_leaf() {
            self.changed.insert(node.groups());
            return Ok(());
        }
        let (left, right) = node.split();
        let (left_hash, right_hash) = cv::halves(&self.new.pair(new)?);
        for (node, hash) in [(left, left_hash), (right, right_hash)] {
            self.compare(&Known { node, hash }, old)?;
        }
        Ok(())
    }
}
