//! Recomputing a tree where its content changed.
//!
//! Subtrees without a changed group keep their hash, which stands in the old outboard, and their pairs, which
//! are copied slice by slice; only the paths from changed groups to the root are hashed again. Old pairs that
//! count are verified against the old root first, so damage in the old outboard cannot get into a new root.

use std::io;

use capsule_proto::ranges::{MAX_CONTENT_LEN, group_bytes, group_count};
use capsule_proto::{GROUP_LEN, GroupRanges, RootHash};
use positioned_io::{ReadAt, WriteAt};
use thiserror::Error;

use super::cv::{self, Cv};
use super::geometry::{Node, outboard_len};
use super::known::{Known, KnownTree};
use super::pairs::PairFault;
use super::zeros::{self, ZERO_SPAN};
use super::{PAIR_LEN, Tree, is_zero, read_or_zeros, read_some};

/// Most groups read and hashed at a time, on all cores: 16 MiB, the largest buffer of an update.
const READ_GROUPS: u64 = ZERO_SPAN;
/// Bytes of outboard copied at a time.
const COPY_LEN: u64 = 64 * 1024;

/// How new content differs from the old.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// Bytes of the new content.
    pub size: u64,
    /// Groups of the new content that may differ from the old. What growth or truncation changes counts without being listed.
    pub dirty: &'a GroupRanges,
    /// Groups known to be all zero in the new content: those of them that are dirty are hashed without being read.
    pub zero: &'a GroupRanges,
    /// Whether the new outboard's storage already holds the old one (a reflinked copy, or the very same file): then only
    /// pairs that change are written, if the number of groups is still the same. Otherwise it must be empty.
    pub in_place: bool,
}

/// Why a tree could not be recomputed.
#[derive(Debug, Error)]
pub enum UpdateError {
    /// More content than any blob or component may have.
    #[error("content of {size} bytes exceeds the largest size of {MAX_CONTENT_LEN} bytes")]
    TooLarge {
        /// Bytes of the new content.
        size: u64,
    },
    /// An outboard can be changed in its place only if the number of groups stays.
    #[error(
        "an outboard of {old} groups cannot become one of {new} groups in place: write it to a new file"
    )]
    NotInPlace {
        /// Groups of the old content.
        old: u64,
        /// Groups of the new content.
        new: u64,
    },
    /// The new content could not be read, or ends early.
    #[error("cannot read the new data from group {group} on")]
    Data {
        /// First group of the read.
        group: u64,
        /// Why.
        source: io::Error,
    },
    /// The old outboard does not have the right pair.
    #[error(
        "the old outboard's pair at byte {offset}, above group {group}, is damaged or missing: hash the content anew"
    )]
    Pair {
        /// Offset in the old outboard.
        offset: u64,
        /// First group below the pair.
        group: u64,
    },
    /// The old outboard could not be read.
    #[error("cannot read the old outboard at byte {offset}")]
    OldOutboard {
        /// Offset in the old outboard.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The new outboard could not be written.
    #[error("cannot write the new outboard at byte {offset}")]
    NewOutboard {
        /// Offset in the new outboard.
        offset: u64,
        /// Why.
        source: io::Error,
    },
}

impl From<PairFault> for UpdateError {
    fn from(fault: PairFault) -> Self {
        match fault {
            PairFault::Io { offset, source } => Self::OldOutboard { offset, source },
            PairFault::Wrong { offset, group } => Self::Pair { offset, group },
        }
    }
}

/// Computes root and outboard of new content from those of the old and from what changed.
///
/// Reads of `content` only what is dirty and not zero, of `old_outboard` only what is needed. Zero spans are left
/// out of the new outboard as [`TreeHasher`](super::TreeHasher) does.
pub fn update(
    old: &Tree,
    old_outboard: &(impl ReadAt + ?Sized),
    change: &Change<'_>,
    content: &(impl ReadAt + ?Sized),
    new_outboard: &mut (impl WriteAt + ?Sized),
) -> Result<Tree, UpdateError> {
    let size = change.size;
    let (old_count, root) = (group_count(old.size), Node::root(size));
    if size > MAX_CONTENT_LEN {
        return Err(UpdateError::TooLarge { size });
    }
    if change.in_place && old_count != root.count {
        return Err(UpdateError::NotInPlace {
            old: old_count,
            new: root.count,
        });
    }
    let mut update = Update {
        size,
        dirty: all_dirty(old.size, change),
        zero: change.zero,
        in_place: change.in_place,
        content,
        old: KnownTree::new(old, old_outboard),
        old_outboard,
        new_outboard,
        buffer: Vec::new(),
    };
    if !change.in_place && !root.is_leaf() {
        // The outboard is to have its full length even if it ends with a hole.
        update.write(outboard_len(size) - PAIR_LEN as u64, &[0; PAIR_LEN])?;
    }
    let hash = update.rebuild(&root, None)?;
    Ok(Tree {
        root: RootHash::from_bytes(hash),
        size,
    })
}

/// The dirty groups, with those that the change of size makes so: what is beyond the common part, and the group in
/// which that ends, unless it ends with the group.
fn all_dirty(old_size: u64, change: &Change<'_>) -> GroupRanges {
    let mut dirty = change.dirty.clone();
    if old_size != change.size {
        dirty.insert(old_size.min(change.size) / GROUP_LEN..group_count(change.size));
    }
    dirty
}

struct Update<'a, O: ?Sized, C: ?Sized, N: ?Sized> {
    size: u64,
    dirty: GroupRanges,
    zero: &'a GroupRanges,
    in_place: bool,
    content: &'a C,
    old: KnownTree<'a, O>,
    old_outboard: &'a O,
    new_outboard: &'a mut N,
    buffer: Vec<u8>,
}

impl<O: ReadAt + ?Sized, C: ReadAt + ?Sized, N: WriteAt + ?Sized> Update<'_, O, C, N> {
    /// Writes a node's slice of the new outboard and returns the node's hash. `above` is an old node whose groups include
    /// this node's, if one is known that is lower than the old root.
    fn rebuild(&mut self, node: &Node, above: Option<Known>) -> Result<Cv, UpdateError> {
        if self.dirty.contains_run(&node.groups()) {
            if node.count <= READ_GROUPS {
                return self.hash_anew(node);
            }
            return self.rebuild_children(node, None);
        }
        let old = self.old.descend(node, above)?;
        if let Some(old) = old
            && !self.dirty.intersects(&node.groups())
            && let Some(hash) = self.keep(node, &old)?
        {
            return Ok(hash);
        }
        if node.is_leaf() {
            return self.hash_anew(node);
        }
        self.rebuild_children(node, old)
    }

    fn rebuild_children(&mut self, node: &Node, above: Option<Known>) -> Result<Cv, UpdateError> {
        let (left, right) = node.split();
        let left = self.rebuild(&left, above)?;
        let right = self.rebuild(&right, above)?;
        let pair = cv::join(&left, &right);
        self.write(node.pair_offset(), &pair)?;
        Ok(cv::hash_pair(node, &pair))
    }

    /// Takes over an unchanged subtree. `None` if the old tree has no such node, or not the hash that is needed (that
    /// of a single group which was, or becomes, the whole content).
    fn keep(&mut self, node: &Node, old: &Known) -> Result<Option<Cv>, UpdateError> {
        if old.node.groups() != node.groups() {
            return Ok(None);
        }
        let same_kind = old.node.is_root == node.is_root;
        if node.is_leaf() {
            return Ok(same_kind.then_some(old.hash));
        }
        let hash = if same_kind {
            old.hash
        } else {
            cv::hash_pair(node, &self.old.pair(old)?)
        };
        if !self.in_place {
            self.copy_pairs(&old.node, node)?;
        }
        Ok(Some(hash))
    }

    /// Copies a subtree's slice of the outboard, except for its holes.
    fn copy_pairs(&mut self, from: &Node, to: &Node) -> Result<(), UpdateError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut done = 0;
        while done < from.pairs_len() {
            buffer.resize((from.pairs_len() - done).min(COPY_LEN) as usize, 0);
            let offset = from.pair_offset() + done;
            read_or_zeros(self.old_outboard, offset, &mut buffer)
                .map_err(|source| UpdateError::OldOutboard { offset, source })?;
            if !is_zero(&buffer) {
                self.write(to.pair_offset() + done, &buffer)?;
            }
            done += buffer.len() as u64;
        }
        self.buffer = buffer;
        Ok(())
    }

    /// Hashes a node's content, of at most [`READ_GROUPS`] groups.
    fn hash_anew(&mut self, node: &Node) -> Result<Cv, UpdateError> {
        if zeros::is_span(node, self.size) && self.zero.contains_run(&node.groups()) {
            if self.in_place {
                self.write(node.pair_offset(), &vec![0; node.pairs_len() as usize])?;
            }
            return Ok(zeros::hash_span(node));
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        self.read_content(node, &mut buffer)?;
        let hash = if node.is_leaf() {
            cv::hash_leaf(node, &buffer)
        } else {
            let groups = cv::hash_groups(node.first, &buffer);
            let mut pairs = vec![0; node.pairs_len() as usize];
            let hash = cv::build_pairs(node, &groups, &mut pairs);
            self.write(node.pair_offset(), &pairs)?;
            hash
        };
        self.buffer = buffer;
        Ok(hash)
    }

    /// Reads a node's content, except for zeros.
    fn read_content(&self, node: &Node, buffer: &mut Vec<u8>) -> Result<(), UpdateError> {
        let all = group_bytes(&node.groups(), self.size);
        buffer.clear();
        buffer.resize((all.end - all.start) as usize, 0);
        for run in GroupRanges::from(node.groups())
            .difference(self.zero)
            .runs()
        {
            let bytes = group_bytes(run, self.size);
            let target =
                &mut buffer[(bytes.start - all.start) as usize..(bytes.end - all.start) as usize];
            let fault = |source| UpdateError::Data {
                group: run.start,
                source,
            };
            if read_some(self.content, bytes.start, target).map_err(fault)? < target.len() {
                return Err(fault(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), UpdateError> {
        self.new_outboard
            .write_all_at(offset, bytes)
            .map_err(|source| UpdateError::NewOutboard { offset, source })
    }
}
