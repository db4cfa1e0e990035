//! Verifying what a provider sent.
//!
//! The whole of a transfer's content passes here: each byte is hashed once, in place, and never copied.

use std::ops::Range;

use capsule_proto::ranges::{Height, group_bytes};
use positioned_io::ReadAt;
use thiserror::Error;

use super::cv::{self, Cv};
use super::geometry::{Node, encoded_len, is_run_of};
use super::pairs::PairReader;
use super::{PAIR_LEN, Tree};

/// Why an encoding was not accepted.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DecodeError {
    /// The run is empty, reaches beyond the content, or does not lie below one node of the height, so that nothing can be its encoding.
    #[error("groups {groups:?} are not a run of groups of content of {size} bytes")]
    OutOfRange {
        /// The run asked for.
        groups: Range<u64>,
        /// Bytes of content.
        size: u64,
    },
    /// The encoding ends early. Nothing of it was accepted.
    #[error("the encoding of groups {groups:?} ends after {found} of {expected} bytes")]
    Truncated {
        /// The run asked for.
        groups: Range<u64>,
        /// Bytes that its encoding has.
        expected: u64,
        /// Bytes that came.
        found: u64,
    },
    /// Bytes follow the encoding. Nothing of it was accepted.
    #[error("{extra} bytes follow the encoding of groups {groups:?}")]
    TrailingBytes {
        /// The run asked for.
        groups: Range<u64>,
        /// Bytes too many.
        extra: u64,
    },
    /// The hash of the node that the encoding goes up to is not in the outboard, which is damaged or has lost it: an encoding that
    /// goes up to the root is needed.
    #[error("the hash above groups {groups:?} is not known: ask for an encoding up to the root")]
    Unknown {
        /// The run asked for.
        groups: Range<u64>,
    },
    /// A pair of hashes is wrong; what came before it was accepted.
    #[error("wrong hashes above groups {groups:?}: drop the provider and ask another")]
    Pair {
        /// The groups below the pair.
        groups: Range<u64>,
    },
    /// A group's data is wrong; what came before it was accepted.
    #[error("wrong data in group {group}: drop the provider and ask another")]
    Mismatch {
        /// The group.
        group: u64,
    },
}

/// Verifies the encoding of a run of groups of a tree's content up to a node of some height, and hands out what it holds. The hash of
/// that node is taken from the outboard, itself verified from the root on.
///
/// `parents` gets each verified pair with its offset in the outboard, `leaves` each verified group (the last one
/// of the content may be short; that of empty content is empty) with its offset in the content. Both are called in order
/// of the encoding, and with nothing unverified: after an error, what was handed out still is right. The slices
/// live as long as `encoded`, so that a caller can gather them for one vectored write.
pub fn decode_range<'a>(
    tree: &Tree,
    groups: Range<u64>,
    height: Height,
    outboard: &(impl ReadAt + ?Sized),
    encoded: &'a [u8],
    parents: impl FnMut(u64, &'a [u8; PAIR_LEN]),
    leaves: impl FnMut(u64, &'a [u8]),
) -> Result<(), DecodeError> {
    let size = tree.size;
    if !is_run_of(&groups, size) || !height.spans(&groups) {
        return Err(DecodeError::OutOfRange { groups, size });
    }
    let (expected, found) = (encoded_len(size, &groups, height), encoded.len() as u64);
    if found < expected {
        return Err(DecodeError::Truncated {
            groups,
            expected,
            found,
        });
    }
    if found > expected {
        return Err(DecodeError::TrailingBytes {
            groups,
            extra: found - expected,
        });
    }
    let (top, hash) = known(tree, &groups, height, outboard)?;
    Decoder {
        size,
        groups,
        rest: encoded,
        parents,
        leaves,
    }
    .node(&top, &hash)
}

/// The node of that height above a run, and its hash.
fn known(
    tree: &Tree,
    groups: &Range<u64>,
    height: Height,
    outboard: &(impl ReadAt + ?Sized),
) -> Result<(Node, Cv), DecodeError> {
    let (mut node, mut hash) = (Node::root(tree.size), cv::of_root(&tree.root));
    let mut pairs = PairReader::new(outboard, tree.size);
    while node.count > height.groups() {
        let unknown = |_| DecodeError::Unknown {
            groups: groups.clone(),
        };
        let (left, right) = cv::halves(&pairs.load(&node, &hash).map_err(unknown)?);
        let children = node.split();
        (node, hash) = if groups.start < children.1.first {
            (children.0, left)
        } else {
            (children.1, right)
        };
    }
    Ok((node, hash))
}

struct Decoder<'a, P, L> {
    size: u64,
    groups: Range<u64>,
    /// What is not decoded yet; its length was checked at the start.
    rest: &'a [u8],
    parents: P,
    leaves: L,
}

impl<'a, P, L> Decoder<'a, P, L>
where
    P: FnMut(u64, &'a [u8; PAIR_LEN]),
    L: FnMut(u64, &'a [u8]),
{
    fn node(&mut self, node: &Node, expected: &Cv) -> Result<(), DecodeError> {
        if !node.touches(&self.groups) {
            return Ok(());
        }
        if node.is_leaf() {
            return self.leaf(node, expected);
        }
        let wrong = || DecodeError::Pair {
            groups: node.groups(),
        };
        let (pair, rest) = self
            .rest
            .split_first_chunk::<PAIR_LEN>()
            .ok_or_else(wrong)?;
        if cv::hash_pair(node, pair) != *expected {
            return Err(wrong());
        }
        self.rest = rest;
        (self.parents)(node.pair_offset(), pair);
        let ((left, right), (left_hash, right_hash)) = (node.split(), cv::halves(pair));
        self.node(&left, &left_hash)?;
        self.node(&right, &right_hash)
    }

    fn leaf(&mut self, node: &Node, expected: &Cv) -> Result<(), DecodeError> {
        let bytes = group_bytes(&node.groups(), self.size);
        let wrong = || DecodeError::Mismatch { group: node.first };
        let len = (bytes.end - bytes.start) as usize;
        let (data, rest) = self.rest.split_at_checked(len).ok_or_else(wrong)?;
        if cv::hash_leaf(node, data) != *expected {
            return Err(wrong());
        }
        self.rest = rest;
        (self.leaves)(bytes.start, data);
        Ok(())
    }
}
