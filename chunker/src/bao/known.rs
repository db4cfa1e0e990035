//! A tree whose outboard is there, walked from the top: by itself, or beside that of newer content.
//!
//! Content of two sizes has trees of two shapes, but below a power of two of groups they agree: a node of the one is a node of
//! the other too, or lies within one, or straddles several.

use positioned_io::ReadAt;

use super::cv::{self, Cv};
use super::geometry::Node;
use super::pairs::{PairFault, PairReader};
use super::{PAIR_LEN, Tree};

/// A node of such a tree, with its verified hash.
#[derive(Clone, Copy)]
pub(super) struct Known {
    pub node: Node,
    pub hash: Cv,
}

/// A tree and its outboard.
pub(super) struct KnownTree<'a, O: ?Sized> {
    top: Known,
    pairs: PairReader<'a, O>,
}

impl<'a, O: ReadAt + ?Sized> KnownTree<'a, O> {
    pub fn new(tree: &Tree, outboard: &'a O) -> Self {
        let top = Known {
            node: Node::root(tree.size),
            hash: cv::of_root(&tree.root),
        };
        Self {
            top,
            pairs: PairReader::new(outboard, tree.size),
        }
    }

    /// The root.
    pub const fn top(&self) -> Known {
        self.top
    }

    /// The lowest node that includes the node's groups; `above` is one that does, where one is known that is lower than
    /// the root.
    pub fn descend(
        &mut self,
        node: &Node,
        above: Option<Known>,
    ) -> Result<Option<Known>, PairFault> {
        let mut old = above.unwrap_or(self.top);
        if node.end() > old.node.end() {
            return Ok(None);
        }
        while old.node.count > node.count {
            let (left, right) = old.node.split();
            if node.first < right.first && right.first < node.end() {
                break;
            }
            let (left_hash, right_hash) = cv::halves(&self.pair(&old)?);
            let (node, hash) = if node.first < right.first {
                (left, left_hash)
            } else {
                (right, right_hash)
            };
            old = Known { node, hash };
        }
        Ok(Some(old))
    }

    /// The pair of an inner node.
    pub fn pair(&mut self, known: &Known) -> Result<[u8; PAIR_LEN], PairFault> {
        self.pairs.load(&known.node, &known.hash)
    }
}
