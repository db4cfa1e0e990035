//! Encoding a run of groups for whoever asks, from content and a sparse outboard.
//!
//! Everything is verified on the way out: a provider whose disk rots finds out by itself, and is not banned for it.

use std::io;
use std::ops::Range;

use capsule_proto::ranges::{Height, group_bytes};
use positioned_io::ReadAt;
use thiserror::Error;

use super::cv::{self, Cv};
use super::geometry::{Node, encoded_len, is_run_of};
use super::pairs::{PairFault, PairReader};
use super::{Tree, read_some};

/// Why a run could not be encoded.
#[derive(Debug, Error)]
pub enum EncodeError {
    /// The run is empty, reaches beyond the content, or does not lie below one node of the height.
    #[error("groups {groups:?} are not a run of groups of content of {size} bytes")]
    OutOfRange {
        /// The run asked for.
        groups: Range<u64>,
        /// Bytes of content.
        size: u64,
    },
    /// The content does not have the hash that its tree says: it must be fetched anew.
    #[error("the data of group {group} is damaged, or was never written: fetch it anew")]
    Damaged {
        /// The group.
        group: u64,
    },
    /// The outboard does not have the right pair: the groups below it must be fetched anew.
    #[error(
        "the outboard's pair at byte {offset}, above group {group}, is damaged or missing: fetch that group anew"
    )]
    Pair {
        /// Offset in the outboard.
        offset: u64,
        /// First group below the pair.
        group: u64,
    },
    /// The content could not be read.
    #[error("cannot read the data of group {group}")]
    Data {
        /// First group of the read.
        group: u64,
        /// Why.
        source: io::Error,
    },
    /// The outboard could not be read.
    #[error("cannot read the outboard at byte {offset}")]
    Outboard {
        /// Offset in the outboard.
        offset: u64,
        /// Why.
        source: io::Error,
    },
}

impl From<PairFault> for EncodeError {
    fn from(fault: PairFault) -> Self {
        match fault {
            PairFault::Io { offset, source } => Self::Outboard { offset, source },
            PairFault::Wrong { offset, group } => Self::Pair { offset, group },
        }
    }
}

/// Appends the encoding of a run of groups of a tree's content to `out`: [`encoded_len`] bytes. It goes up to the node of that
/// height above the run, whose hash the receiver has.
///
/// Of the outboard only the pairs above the run need to be there, of the content only the run. All of it is
/// verified; on error `out` is as it was.
pub fn encode_range(
    tree: &Tree,
    groups: Range<u64>,
    height: Height,
    data: &(impl ReadAt + ?Sized),
    outboard: &(impl ReadAt + ?Sized),
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let size = tree.size;
    if !is_run_of(&groups, size) || !height.spans(&groups) {
        return Err(EncodeError::OutOfRange { groups, size });
    }
    let start = out.len();
    let len = encoded_len(size, &groups, height) as usize;
    out.reserve_exact(len);
    let mut encoder = Encoder {
        size,
        groups,
        height,
        data,
        pairs: PairReader::new(outboard, size),
        out: &mut *out,
    };
    let result = encoder.node(&Node::root(size), &cv::of_root(&tree.root));
    debug_assert!(result.is_err() || out.len() == start + len);
    if result.is_err() {
        out.truncate(start);
    }
    result
}

struct Encoder<'a, D: ?Sized, O: ?Sized> {
    size: u64,
    groups: Range<u64>,
    height: Height,
    data: &'a D,
    pairs: PairReader<'a, O>,
    /// Grows piecemeal: what it grows by is then in the cache for the read and the hash that follow.
    out: &'a mut Vec<u8>,
}

impl<D: ReadAt + ?Sized, O: ReadAt + ?Sized> Encoder<'_, D, O> {
    fn node(&mut self, node: &Node, expected: &Cv) -> Result<(), EncodeError> {
        if !node.touches(&self.groups) {
            return Ok(());
        }
        if node.is_leaf() {
            let data = self.read(node)?;
            return check(node, data, expected);
        }
        let pair = self.pairs.load(node, expected)?;
        if node.count <= self.height.groups() {
            self.out.extend_from_slice(&pair);
        }
        let ((left, right), (left_hash, right_hash)) = (node.split(), cv::halves(&pair));
        if node.count == 2
            && self.groups.contains(&left.first)
            && self.groups.contains(&right.first)
        {
            // The data of two sisters lies together here as in the content: one read instead of two.
            let (left_data, right_data) =
                self.read(node)?.split_at(capsule_proto::GROUP_LEN as usize);
            check(&left, left_data, &left_hash)?;
            return check(&right, right_data, &right_hash);
        }
        self.node(&left, &left_hash)?;
        self.node(&right, &right_hash)
    }

    /// Reads the node's content straight into the output.
    fn read(&mut self, node: &Node) -> Result<&[u8], EncodeError> {
        let bytes = group_bytes(&node.groups(), self.size);
        let start = self.out.len();
        self.out
            .resize(start + (bytes.end - bytes.start) as usize, 0);
        let target = &mut self.out[start..];
        let fault = |source| EncodeError::Data {
            group: node.first,
            source,
        };
        let read = read_some(self.data, bytes.start, target).map_err(fault)?;
        if read < target.len() {
            return Err(fault(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(target)
    }
}

fn check(node: &Node, data: &[u8], expected: &Cv) -> Result<(), EncodeError> {
    if cv::hash_leaf(node, data) == *expected {
        Ok(())
    } else {
        Err(EncodeError::Damaged { group: node.first })
    }
}
