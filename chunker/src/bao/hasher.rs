//! Hashing new content, pushed in order.
//!
//! The place of a pair in pre-order depends on the final size, which a writer of packs does not know, and
//! memory must stay bounded for any size. So the outboard is built in its own storage, in two steps: while
//! content comes, the chaining values of the groups are written there as a plain row (32 bytes each, half of
//! what the outboard takes); `finish` turns the row into pairs from its far end to its start. A pair never lies
//! before 64 bytes times its first group, and the values still needed then lie before 32 bytes times that group:
//! nothing is overwritten that is still to be read. The second step costs 60 ns a group (0.004 ns/B).

use std::io;

use capsule_proto::RootHash;
use capsule_proto::ranges::MAX_CONTENT_LEN;
use positioned_io::{ReadAt, WriteAt};
use thiserror::Error;

use super::cv::{self, CV_LEN, Cv};
use super::geometry::{Node, outboard_len};
use super::pushed::{Pushed, Values};
use super::zeros::{self, ZERO_SPAN};
use super::{PAIR_LEN, Tree, is_zero, read_or_zeros};

/// Chaining values gathered before they are written: 64 KiB, for 32 MiB of content.
const ROW_BUFFER: usize = 64 * 1024;

/// Why content could not be hashed.
#[derive(Debug, Error)]
pub enum HashError {
    /// More content than any blob or component may have.
    #[error("content exceeds the largest size of {MAX_CONTENT_LEN} bytes")]
    TooLarge,
    /// The outboard could not be written or read back.
    #[error("cannot access the outboard at byte {offset}")]
    Outboard {
        /// Offset in the outboard's storage.
        offset: u64,
        /// Why.
        source: io::Error,
    },
}

/// Root and outboard of content in memory.
pub fn tree_of(content: &[u8]) -> (Tree, Vec<u8>) {
    let size = content.len() as u64;
    let root = Node::root(size);
    if root.is_leaf() {
        return (
            Tree {
                root: RootHash::of(content),
                size,
            },
            Vec::new(),
        );
    }
    let mut outboard = vec![0; outboard_len(size) as usize];
    let hash = cv::build_pairs(&root, &cv::hash_groups(0, content), &mut outboard);
    (
        Tree {
            root: RootHash::from_bytes(hash),
            size,
        },
        outboard,
    )
}

/// Takes content in order, to hash it.
pub trait ContentHasher: Send {
    /// Adds content.
    fn push(&mut self, data: &[u8]) -> Result<(), HashError>;

    /// Adds zeros that nobody needs to read.
    fn push_zeros(&mut self, len: u64) -> Result<(), HashError>;
}

/// Computes root and outboard of content that is pushed in order; its size need not be known.
///
/// Large pushes (1 MiB and more) use all cores. Memory is some 100 KiB beside the storage, whatever the size.
pub struct TreeHasher<S = Vec<u8>> {
    pushed: Pushed,
    row: Row<S>,
}

/// The first step: chaining values of groups, as a plain row in the storage.
struct Row<S> {
    storage: S,
    /// Values not written yet, those of the groups just before `end`.
    buffer: Vec<u8>,
    /// The group after the last whose value came.
    end: u64,
}

impl TreeHasher<Vec<u8>> {
    /// A hasher that keeps the outboard (0.39 % of the content) in memory.
    pub fn new() -> Self {
        Self::with_storage(Vec::new())
    }
}

impl Default for TreeHasher<Vec<u8>> {
    fn default() -> Self {
        Self::new()
    }
}

impl<S: ReadAt + WriteAt> TreeHasher<S> {
    /// A hasher that builds the outboard in `storage`, for instance a file; it must be empty.
    pub fn with_storage(storage: S) -> Self {
        let row = Row {
            storage,
            buffer: Vec::new(),
            end: 0,
        };
        Self {
            pushed: Pushed::default(),
            row,
        }
    }

    /// Bytes pushed so far.
    pub fn size(&self) -> u64 {
        self.pushed.size()
    }

    /// Adds content.
    pub fn push(&mut self, data: &[u8]) -> Result<(), HashError> {
        self.pushed.push(data, &mut self.row)
    }

    /// Adds zeros that nobody needs to read. Aligned spans of [`ZERO_SPAN`] groups are only noted here (their hashing
    /// waits for `finish`) and leave holes in the outboard.
    pub fn push_zeros(&mut self, len: u64) -> Result<(), HashError> {
        self.pushed.push_zeros(len, &mut self.row)
    }

    /// Builds the outboard, and returns it as the storage it was built in.
    pub fn finish(mut self) -> Result<(Tree, S), HashError> {
        let size = self.size();
        let root = match self.pushed.end(&mut self.row)? {
            Some(root) => root,
            None => {
                self.row.flush()?;
                let storage = &mut self.row.storage;
                Builder { storage, size }.build(&Node::root(size))?
            }
        };
        let root = RootHash::from_bytes(root);
        Ok((Tree { root, size }, self.row.storage))
    }
}

impl<S: ReadAt + WriteAt + Send> ContentHasher for TreeHasher<S> {
    fn push(&mut self, data: &[u8]) -> Result<(), HashError> {
        Self::push(self, data)
    }

    fn push_zeros(&mut self, len: u64) -> Result<(), HashError> {
        Self::push_zeros(self, len)
    }
}

impl<S: ReadAt + WriteAt> Values for Row<S> {
    fn take(&mut self, first: u64, values: &[Cv]) -> Result<(), HashError> {
        self.buffer.extend_from_slice(values.as_flattened());
        self.end = first + values.len() as u64;
        if self.buffer.len() >= ROW_BUFFER {
            self.flush()
        } else {
            Ok(())
        }
    }

    /// Leaves holes in the row.
    fn take_zero_spans(&mut self, first: u64, spans: u64) -> Result<(), HashError> {
        self.flush()?;
        self.end = first + spans * ZERO_SPAN;
        Ok(())
    }
}

impl<S: ReadAt + WriteAt> Row<S> {
    fn flush(&mut self) -> Result<(), HashError> {
        let offset = self.end * CV_LEN as u64 - self.buffer.len() as u64;
        write(&mut self.storage, offset, &self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

/// The second step: from a row of chaining values to pairs, in place.
struct Builder<'a, S> {
    storage: &'a mut S,
    size: u64,
}

impl<S: ReadAt + WriteAt> Builder<'_, S> {
    /// Builds a node's slice of the outboard. All that is to the right of it is built already.
    fn build(&mut self, node: &Node) -> Result<Cv, HashError> {
        if node.count <= ZERO_SPAN {
            return self.build_from_row(node);
        }
        let (left, right) = node.split();
        let right = self.build(&right)?;
        let left = self.build(&left)?;
        let pair = cv::join(&left, &right);
        write(self.storage, node.pair_offset(), &pair)?;
        Ok(cv::hash_pair(node, &pair))
    }

    fn build_from_row(&mut self, node: &Node) -> Result<Cv, HashError> {
        let mut row = vec![0; node.count as usize * CV_LEN];
        read(self.storage, node.first * CV_LEN as u64, &mut row)?;
        if zeros::is_span(node, self.size) && is_zero(&row) {
            self.clear(node)?;
            return Ok(zeros::hash_span(node));
        }
        let (groups, _) = row.as_chunks::<CV_LEN>();
        let mut pairs = vec![0; node.pairs_len() as usize];
        let hash = cv::build_pairs(node, groups, &mut pairs);
        write(self.storage, node.pair_offset(), &pairs)?;
        Ok(hash)
    }

    /// Makes sure of the hole of a zero span: the row may have left values in it.
    fn clear(&mut self, node: &Node) -> Result<(), HashError> {
        let mut pairs = vec![0; node.pairs_len() as usize];
        read(self.storage, node.pair_offset(), &mut pairs)?;
        if !is_zero(&pairs) {
            pairs.fill(0);
            write(self.storage, node.pair_offset(), &pairs)?;
        }
        let end = node.pair_offset() + node.pairs_len();
        if end == outboard_len(self.size) {
            // The outboard is to have its full length even if it ends with a hole.
            write(self.storage, end - PAIR_LEN as u64, &[0; PAIR_LEN])?;
        }
        Ok(())
    }
}

fn read(storage: &impl ReadAt, offset: u64, buf: &mut [u8]) -> Result<(), HashError> {
    read_or_zeros(storage, offset, buf).map_err(|source| HashError::Outboard { offset, source })
}

fn write(storage: &mut impl WriteAt, offset: u64, buf: &[u8]) -> Result<(), HashError> {
    storage
        .write_all_at(offset, buf)
        .map_err(|source| HashError::Outboard { offset, source })
}
