//! Reading pairs from an outboard that may be sparse, and believing none of them.
//!
//! A pair counts only if it hashes to what stands above it, which in turn was verified. So a reader starts
//! at the root and descends; whatever an outboard's file holds, nothing false comes out of here.

use std::io;

use positioned_io::ReadAt;

use super::cv::{self, Cv};
use super::geometry::Node;
use super::{PAIR_LEN, is_zero, read_or_zeros, zeros};

/// Pairs read at a time: 4 KiB, so that those of neighbouring groups, which lie together, take one read.
const WINDOW_PAIRS: u64 = 64;

/// Why there is no pair.
#[derive(Debug)]
pub(super) enum PairFault {
    /// The outboard cannot be read at this offset.
    Io { offset: u64, source: io::Error },
    /// The pair at this offset, above this first group, is missing or is not the right one.
    Wrong { offset: u64, group: u64 },
}

/// Verified reading of one outboard.
pub(super) struct PairReader<'a, R: ?Sized> {
    outboard: &'a R,
    /// Bytes of content.
    size: u64,
    /// Pairs read last, from the pair `window_at` on.
    window: Vec<u8>,
    window_at: u64,
    /// Pairs of the zero subtree met last, from the pair `zero_at` on.
    zero: Vec<u8>,
    zero_at: u64,
}

impl<'a, R: ReadAt + ?Sized> PairReader<'a, R> {
    /// A reader of the outboard of `size` bytes of content.
    pub(super) fn new(outboard: &'a R, size: u64) -> Self {
        Self {
            outboard,
            size,
            window: Vec::new(),
            window_at: 0,
            zero: Vec::new(),
            zero_at: 0,
        }
    }

    /// The pair of an inner node whose hash is known.
    pub(super) fn load(&mut self, node: &Node, expected: &Cv) -> Result<[u8; PAIR_LEN], PairFault> {
        let pair = self.stored(node)?;
        if !is_zero(&pair) {
            return if cv::hash_pair(node, &pair) == *expected {
                Ok(pair)
            } else {
                Err(wrong(node))
            };
        }
        self.of_zeros(node, expected)
    }

    /// What the outboard holds for the node.
    fn stored(&mut self, node: &Node) -> Result<[u8; PAIR_LEN], PairFault> {
        if let Some(pair) = pair_in(&self.window, self.window_at, node) {
            return Ok(pair);
        }
        // The pairs below the node follow its own: what the window takes in beyond it is likely to be asked for next.
        let pairs = (node.count - 1).min(WINDOW_PAIRS);
        self.window.resize(pairs as usize * PAIR_LEN, 0);
        self.window_at = node.pair;
        let offset = node.pair_offset();
        if let Err(source) = read_or_zeros(self.outboard, offset, &mut self.window) {
            self.window.clear();
            return Err(PairFault::Io { offset, source });
        }
        pair_in(&self.window, self.window_at, node).ok_or_else(|| wrong(node))
    }

    /// The pair of a hole: that of zeros, if zeros it is.
    fn of_zeros(&mut self, node: &Node, expected: &Cv) -> Result<[u8; PAIR_LEN], PairFault> {
        if !zeros::may_be_left_out(node, self.size) {
            return Err(wrong(node));
        }
        let known = pair_in(&self.zero, self.zero_at, node)
            .filter(|pair| cv::hash_pair(node, pair) == *expected);
        if let Some(pair) = known {
            return Ok(pair);
        }
        // Readers come from above, so this is the top of the hole, and its descendants will be found in memory.
        let (pairs, hash) = zeros::zero_pairs(node);
        if hash != *expected {
            return Err(wrong(node));
        }
        (self.zero, self.zero_at) = (pairs, node.pair);
        pair_in(&self.zero, self.zero_at, node).ok_or_else(|| wrong(node))
    }
}

/// The node's pair, if it is among `pairs`, the first of which has the number `at`.
fn pair_in(pairs: &[u8], at: u64, node: &Node) -> Option<[u8; PAIR_LEN]> {
    let start = usize::try_from(node.pair.checked_sub(at)?)
        .ok()?
        .checked_mul(PAIR_LEN)?;
    pairs
        .get(start..start.checked_add(PAIR_LEN)?)?
        .try_into()
        .ok()
}

fn wrong(node: &Node) -> PairFault {
    PairFault::Wrong {
        offset: node.pair_offset(),
        group: node.first,
    }
}
