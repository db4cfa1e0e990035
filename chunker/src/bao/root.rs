//! The root of content that is pushed in order, without its outboard: for whoever only checks.
//!
//! Keeps one chaining value for each perfect subtree that is not part of a larger one yet, at most one a level. Two of
//! equal size are joined only when more content comes: the last join of all is the root's, which BLAKE3 hashes differently.

use capsule_proto::RootHash;

use super::cv::{self, Cv};
use super::geometry::Node;
use super::hasher::{ContentHasher, HashError};
use super::pushed::{Pushed, Values};
use super::zeros::{self, ZERO_SPAN};

/// Computes the root of content that is pushed in order; its size need not be known.
///
/// Large pushes (1 MiB and more) use all cores. Zeros cost no more than in a [`TreeHasher`](super::TreeHasher), and
/// nothing is written anywhere.
#[derive(Default)]
pub struct RootHasher {
    pushed: Pushed,
    path: Path,
}

/// Perfect subtrees from the left, largest first.
#[derive(Default)]
struct Path {
    subtrees: Vec<Cv>,
    groups: u64,
}

impl RootHasher {
    /// Nothing pushed yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The root of all that was pushed.
    pub fn finish(mut self) -> Result<RootHash, HashError> {
        let root = match self.pushed.end(&mut self.path)? {
            Some(root) => root,
            None => self.path.root(),
        };
        Ok(RootHash::from_bytes(root))
    }
}

impl ContentHasher for RootHasher {
    fn push(&mut self, data: &[u8]) -> Result<(), HashError> {
        self.pushed.push(data, &mut self.path)
    }

    fn push_zeros(&mut self, len: u64) -> Result<(), HashError> {
        self.pushed.push_zeros(len, &mut self.path)
    }
}

impl Values for Path {
    fn take(&mut self, _: u64, values: &[Cv]) -> Result<(), HashError> {
        for value in values {
            self.add(*value, 1);
        }
        Ok(())
    }

    fn take_zero_spans(&mut self, first: u64, spans: u64) -> Result<(), HashError> {
        for span in 0..spans {
            let node = Node {
                first: first + span * ZERO_SPAN,
                count: ZERO_SPAN,
                pair: 0,
                is_root: false,
            };
            if node.first == 0 {
                // It may be all there is: then its last join is the root's.
                self.take(0, &zeros::hash_zero_groups(0, ZERO_SPAN))?;
            } else {
                self.add(zeros::hash_span(&node), ZERO_SPAN);
            }
        }
        Ok(())
    }
}

impl Path {
    /// Adds a perfect subtree of `count` groups, which begins where those before it end and is aligned to its size.
    fn add(&mut self, subtree: Cv, count: u64) {
        // One subtree for each bit that is set in the number of groups.
        while self.subtrees.len() > self.groups.count_ones() as usize {
            self.join_last(false);
        }
        self.subtrees.push(subtree);
        self.groups += count;
    }

    /// The root; there is more than one group, hence more than one subtree.
    fn root(mut self) -> Cv {
        while self.subtrees.len() > 2 {
            self.join_last(false);
        }
        self.join_last(true);
        self.subtrees[0]
    }

    fn join_last(&mut self, is_root: bool) {
        if let Some(right) = self.subtrees.pop()
            && let Some(left) = self.subtrees.last_mut()
        {
            *left = cv::merge(left, &right, is_root);
        }
    }
}
