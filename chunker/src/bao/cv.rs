//! Chaining values: the hashes of groups and of the subtrees above them.
//!
//! BLAKE3 hashes 16 chunks at once where the CPU has AVX-512, and a group is 16 chunks: hashing group by
//! group costs 12 % more than hashing everything in one call (0.150 against 0.134 ns/B), the price of the
//! four narrow levels inside each group. Hashing many groups in one call would hide their chaining values,
//! which the outboard needs.

use blake3::Hasher;
use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};
use capsule_proto::{GROUP_LEN, RootHash};
use rayon::prelude::*;

use super::PAIR_LEN;
use super::geometry::Node;

/// Hash of a node: a chaining value, or for the root of a tree the root hash.
pub(super) type Cv = ChainingValue;

/// Bytes of a chaining value.
pub(super) const CV_LEN: usize = 32;

/// Least number of groups worth handing to another core: 128 KiB, about 20 us.
const PARALLEL_GROUPS: usize = 8;

/// Hash of a group of a tree.
pub(super) fn hash_leaf(node: &Node, data: &[u8]) -> Cv {
    debug_assert!(node.is_leaf() && data.len() as u64 <= GROUP_LEN);
    if node.is_root {
        blake3::hash(data).into()
    } else {
        hash_group(node.first, data)
    }
}

/// Hash of an inner node from its pair.
pub(super) fn hash_pair(node: &Node, pair: &[u8; PAIR_LEN]) -> Cv {
    let (left, right) = halves(pair);
    merge(&left, &right, node.is_root)
}

/// Hash of the node above two.
pub(super) fn merge(left: &Cv, right: &Cv, is_root: bool) -> Cv {
    if is_root {
        merge_subtrees_root(left, right, Mode::Hash).into()
    } else {
        merge_subtrees_non_root(left, right, Mode::Hash)
    }
}

/// The two chaining values of a pair.
pub(super) fn halves(pair: &[u8; PAIR_LEN]) -> (Cv, Cv) {
    let (mut left, mut right) = ([0; CV_LEN], [0; CV_LEN]);
    left.copy_from_slice(&pair[..CV_LEN]);
    right.copy_from_slice(&pair[CV_LEN..]);
    (left, right)
}

/// The pair of two chaining values.
pub(super) fn join(left: &Cv, right: &Cv) -> [u8; PAIR_LEN] {
    let mut pair = [0; PAIR_LEN];
    pair[..CV_LEN].copy_from_slice(left);
    pair[CV_LEN..].copy_from_slice(right);
    pair
}

/// Chaining value of a group that is not the whole content.
fn hash_group(group: u64, data: &[u8]) -> Cv {
    Hasher::new()
        .set_input_offset(group * GROUP_LEN)
        .update(data)
        .finalize_non_root()
}

/// Chaining values of consecutive groups, on all cores where there is enough of them; the last group may be short.
pub(super) fn hash_groups(first: u64, data: &[u8]) -> Vec<Cv> {
    let hash = |(i, group): (usize, &[u8])| hash_group(first + i as u64, group);
    if data.len() < 2 * PARALLEL_GROUPS * GROUP_LEN as usize {
        return data
            .chunks(GROUP_LEN as usize)
            .enumerate()
            .map(hash)
            .collect();
    }
    data.par_chunks(GROUP_LEN as usize)
        .enumerate()
        .with_min_len(PARALLEL_GROUPS)
        .map(hash)
        .collect()
}

/// Chaining value of a perfect subtree of zeros, in one go; `zeros` is any aligned power of two of groups long.
pub(super) fn hash_repeated(first: u64, count: u64, zeros: &[u8]) -> Cv {
    let mut hasher = Hasher::new();
    hasher.set_input_offset(first * GROUP_LEN);
    let mut left = count * GROUP_LEN;
    while left > 0 {
        let part = left.min(zeros.len() as u64);
        hasher.update(&zeros[..part as usize]);
        left -= part;
    }
    hasher.finalize_non_root()
}

/// Builds the pairs of a subtree from the chaining values of its groups, and returns its hash.
///
/// `pairs` takes the subtree's slice of the outboard, [`Node::pairs_len`] bytes.
pub(super) fn build_pairs(node: &Node, groups: &[Cv], pairs: &mut [u8]) -> Cv {
    debug_assert_eq!(
        (groups.len() as u64, pairs.len() as u64),
        (node.count, node.pairs_len())
    );
    if let [group] = groups {
        return *group;
    }
    let (left, right) = node.split();
    let (left_groups, right_groups) = groups.split_at(left.count as usize);
    let (own, below) = pairs.split_at_mut(PAIR_LEN);
    let (left_pairs, right_pairs) = below.split_at_mut(left.pairs_len() as usize);
    let left = build_pairs(&left, left_groups, left_pairs);
    let right = build_pairs(&right, right_groups, right_pairs);
    let pair = join(&left, &right);
    own.copy_from_slice(&pair);
    hash_pair(node, &pair)
}

/// The root hash as the hash of a root node.
pub(super) fn of_root(root: &RootHash) -> Cv {
    *root.as_bytes()
}
