//! Zero ranges: their chaining values, and outboards without them.
//!
//! A chaining value depends on the position of its chunk, so each zero group has its own, and there is no
//! way but to hash the zeros once (0.13 ns/B a core; all cores are used). What is saved is the
//! reading, and the storage: the pairs inside an aligned span of [`ZERO_SPAN`] groups that are all zero
//! are left out of the outboard, as a hole in the file. A hole reads as a pair of zeros, which no two
//! chaining values are (that would be a preimage of zero, twice); so whoever meets one knows that the pair
//! is either not known, or that of a zero span, and the hash above it, verified before, tells which.
//!
//! Spans are 16 MiB: a tebibyte of zeros then takes 256 MiB of outboard instead of 4 GiB (a span leaves a hole
//! of 65,472 bytes, of which file systems free 15 blocks of 4 KiB in 16), and a read inside one costs
//! 2.5 ms of hashing. Only the storage of outboards depends on this; what is sent always has its pairs.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use capsule_proto::GROUP_LEN;
use rayon::prelude::*;

use super::cv::{self, Cv};
use super::geometry::Node;

/// Groups in a span of zeros whose pairs are not stored.
pub const ZERO_SPAN: u64 = 1024;

/// Groups of a span that are hashed as one task: 1 MiB.
const TASK_GROUPS: u64 = 64;

/// Spans whose chaining values are remembered: 1 TiB of zeros, in at most 6 MiB of memory.
const REMEMBERED_SPANS: usize = 1 << 16;

/// Zeros to hash: four groups, so that the levels inside a group are hashed side by side too.
static ZEROS: [u8; 4 * GROUP_LEN as usize] = [0; 4 * GROUP_LEN as usize];

/// Chaining values of zero spans by their first group. A value depends on nothing but the position, so one
/// memory serves everything that the process hashes: publishing and then verifying a sparse disk hashes its zeros once.
static SPANS: Mutex<Option<HashMap<u64, Cv>>> = Mutex::new(None);

/// Whether the pairs at and below the node may be left out where its content is zero. It need not be a whole
/// span: inside one, reading starts at any node.
pub(super) const fn may_be_left_out(node: &Node, size: u64) -> bool {
    node.count.is_power_of_two() && node.count <= ZERO_SPAN && node.end() * GROUP_LEN <= size
}

/// Whether the node is a whole span, the unit that writers leave out.
pub(super) const fn is_span(node: &Node, size: u64) -> bool {
    node.count == ZERO_SPAN && may_be_left_out(node, size)
}

/// A group of zeros.
pub(super) fn zero_group() -> &'static [u8] {
    &ZEROS[..GROUP_LEN as usize]
}

/// Chaining values of a run of zero groups, at most those of a span or so: they are kept in memory.
pub(super) fn hash_zero_groups(first: u64, count: u64) -> Vec<Cv> {
    (0..count as usize)
        .into_par_iter()
        .with_min_len(8)
        .map(|i| cv::hash_repeated(first + i as u64, 1, zero_group()))
        .collect()
}

/// The pairs of a zero subtree (its slice of the outboard), and its hash.
pub(super) fn zero_pairs(node: &Node) -> (Vec<u8>, Cv) {
    let groups = hash_zero_groups(node.first, node.count);
    let mut pairs = vec![0; node.pairs_len() as usize];
    let hash = cv::build_pairs(node, &groups, &mut pairs);
    (pairs, hash)
}

/// Hash of a zero span, remembered.
pub(super) fn hash_span(node: &Node) -> Cv {
    debug_assert_eq!(node.count, ZERO_SPAN);
    if node.is_root {
        return zero_pairs(node).1;
    }
    let remembered = |spans: &mut Option<HashMap<u64, Cv>>| {
        spans.get_or_insert_default().get(&node.first).copied()
    };
    if let Some(hash) = remembered(&mut SPANS.lock().unwrap_or_else(PoisonError::into_inner)) {
        return hash;
    }
    let tasks: Vec<Cv> = (0..ZERO_SPAN / TASK_GROUPS)
        .into_par_iter()
        .map(|task| cv::hash_repeated(node.first + task * TASK_GROUPS, TASK_GROUPS, &ZEROS))
        .collect();
    // A tree over tasks has the shape of a tree over groups.
    let above = Node {
        first: 0,
        count: tasks.len() as u64,
        pair: 0,
        is_root: false,
    };
    let hash = cv::build_pairs(&above, &tasks, &mut vec![0; above.pairs_len() as usize]);
    let mut spans = SPANS.lock().unwrap_or_else(PoisonError::into_inner);
    let spans = spans.get_or_insert_default();
    if spans.len() < REMEMBERED_SPANS {
        spans.insert(node.first, hash);
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_hashes_as_its_groups_do_and_is_remembered() {
        for first in [0, ZERO_SPAN, 5 * ZERO_SPAN] {
            let node = Node {
                first,
                count: ZERO_SPAN,
                pair: 0,
                is_root: false,
            };
            let (_, hash) = zero_pairs(&node);
            assert_eq!([hash_span(&node), hash_span(&node)], [hash, hash]);
        }
    }

    #[test]
    fn a_root_span_is_the_hash_of_its_zeros() {
        let size = ZERO_SPAN * GROUP_LEN;
        assert_eq!(
            hash_span(&Node::root(size)),
            *blake3::hash(&vec![0; size as usize]).as_bytes()
        );
    }
}
