//! The shape of a tree: which groups a node covers, and where its pair lies in the outboard.
//!
//! Pure arithmetic on sizes and group numbers; no hashing.

use std::ops::Range;

use capsule_proto::ranges::{Height, MAX_CONTENT_LEN, group_bytes, group_count};

/// Bytes of a pair: the chaining values of a node's left and right child.
pub const PAIR_LEN: usize = 64;

/// Bytes of the outboard of `size` bytes of content: a pair for each inner node above the groups.
///
/// 0.39 % of the content; 0 where all content is one group.
pub const fn outboard_len(size: u64) -> u64 {
    (group_count(size) - 1) * PAIR_LEN as u64
}

/// Bytes of the encoding of a run of groups: its content, and the pairs of all nodes above any of it, up to that height.
///
/// Groups beyond the content count for nothing. `size` is at most [`MAX_CONTENT_LEN`], and one node of that height spans the run.
pub fn encoded_len(size: u64, groups: &Range<u64>, height: Height) -> u64 {
    let bytes = group_bytes(groups, size);
    let mut node = Node::root(size);
    while node.count > height.groups() {
        node = match node.towards(groups) {
            Some(child) => child,
            None => break,
        };
    }
    (bytes.end - bytes.start) + node.pairs_above(groups) * PAIR_LEN as u64
}

/// Whether this is a run of at least one group, all of them in content of `size` bytes.
pub(super) fn is_run_of(groups: &Range<u64>, size: u64) -> bool {
    size <= MAX_CONTENT_LEN && groups.start < groups.end && groups.end <= group_count(size)
}

/// A node of a tree: a single group, or the inner node above several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Node {
    /// First group below it.
    pub(super) first: u64,
    /// How many groups are below it; a leaf has one.
    pub(super) count: u64,
    /// Place of its pair in pre-order; the pairs of all its descendants follow at once. Of no meaning for a leaf.
    pub(super) pair: u64,
    /// Whether it is the top of its tree, which BLAKE3 hashes differently.
    pub(super) is_root: bool,
}

impl Node {
    /// The top of the tree of `size` bytes of content.
    pub(super) const fn root(size: u64) -> Self {
        Self {
            first: 0,
            count: group_count(size),
            pair: 0,
            is_root: true,
        }
    }

    /// The group after the last below it.
    pub(super) const fn end(&self) -> u64 {
        self.first + self.count
    }

    /// The groups below it.
    pub(super) const fn groups(&self) -> Range<u64> {
        self.first..self.end()
    }

    /// Whether it is a single group.
    pub(super) const fn is_leaf(&self) -> bool {
        self.count == 1
    }

    /// Offset of its pair in the outboard, in bytes.
    pub(super) const fn pair_offset(&self) -> u64 {
        self.pair * PAIR_LEN as u64
    }

    /// Bytes that its pair and those of its descendants take in the outboard: one slice from [`Node::pair_offset`] on.
    pub(super) const fn pairs_len(&self) -> u64 {
        (self.count - 1) * PAIR_LEN as u64
    }

    /// Whether any of the groups is below it.
    pub(super) const fn touches(&self, groups: &Range<u64>) -> bool {
        self.first < groups.end && groups.start < self.end()
    }

    /// Its children. The left one is the largest perfect tree that leaves something for the right one (BLAKE3
    /// paper, 2.1); a split by groups is the split by chunks, since 16 is a power of two.
    pub(super) const fn split(&self) -> (Self, Self) {
        debug_assert!(self.count > 1);
        let left = 1 << (self.count - 1).ilog2();
        (
            Self {
                first: self.first,
                count: left,
                pair: self.pair + 1,
                is_root: false,
            },
            // The pair itself and the `left - 1` pairs of the left child come first.
            Self {
                first: self.first + left,
                count: self.count - left,
                pair: self.pair + left,
                is_root: false,
            },
        )
    }

    /// Its child above all of the groups; none where they lie below both.
    fn towards(&self, groups: &Range<u64>) -> Option<Self> {
        let (left, right) = self.split();
        if groups.end <= left.end() {
            Some(left)
        } else if groups.start >= right.first {
            Some(right)
        } else {
            None
        }
    }

    /// How many inner nodes of its subtree stand above any of the groups.
    fn pairs_above(&self, groups: &Range<u64>) -> u64 {
        if self.is_leaf() || !self.touches(groups) {
            0
        } else if groups.start <= self.first && self.end() <= groups.end {
            self.count - 1
        } else {
            let (left, right) = self.split();
            1 + left.pairs_above(groups) + right.pairs_above(groups)
        }
    }
}

#[cfg(test)]
mod tests {
    use bao_tree::{BaoTree, BlockSize, ChunkNum};
    use capsule_proto::GROUP_LEN;
    use proptest::prelude::*;

    use super::*;

    /// All inner nodes in the order of their pairs.
    fn inner_nodes(node: Node, out: &mut Vec<Node>) {
        if !node.is_leaf() {
            out.push(node);
            let (left, right) = node.split();
            inner_nodes(left, out);
            inner_nodes(right, out);
        }
    }

    #[test]
    fn pairs_lie_in_pre_order_without_gaps() {
        for count in 1..=130 {
            let mut nodes = Vec::new();
            inner_nodes(Node::root(count * GROUP_LEN), &mut nodes);
            assert_eq!(
                nodes.iter().map(|n| n.pair).collect::<Vec<_>>(),
                (0..count - 1).collect::<Vec<_>>()
            );
        }
    }

    /// The in-place building of outboards rests on this.
    #[test]
    fn a_pair_never_lies_before_its_first_group() {
        let mut nodes = Vec::new();
        inner_nodes(Node::root(1000 * GROUP_LEN), &mut nodes);
        assert!(nodes.iter().all(|n| n.pair >= n.first));
    }

    proptest! {
        #[test]
        fn nodes_agree_with_bao_tree(size in 0u64..200 * GROUP_LEN) {
            let tree = BaoTree::new(size, BlockSize::from_chunk_log(4));
            prop_assert_eq!(outboard_len(size), tree.outboard_size());
            let mut nodes = Vec::new();
            inner_nodes(Node::root(size), &mut nodes);
            let theirs: Vec<_> = tree
                .pre_order_nodes_iter()
                .filter_map(|n| Some((tree.pre_order_offset(n)?, n.mid())))
                .collect();
            let ours: Vec<_> =
                nodes.iter().map(|n| (n.pair, ChunkNum(n.split().1.first * 16))).collect();
            prop_assert_eq!(ours, theirs);
        }

        #[test]
        fn pairs_above_agree_with_counting(
            size in 1u64..200 * GROUP_LEN, start in 0u64..200, len in 1u64..200,
        ) {
            let groups = start..start + len;
            let mut nodes = Vec::new();
            inner_nodes(Node::root(size), &mut nodes);
            let counted = nodes.iter().filter(|n| n.touches(&groups)).count() as u64;
            prop_assert_eq!(Node::root(size).pairs_above(&groups), counted);
        }
    }
}
