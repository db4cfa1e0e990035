//! Hashing new content, pushed in order.
//!
//! The place of a pair in pre-order depends on the final size, which a writer of packs does not know, and
//! memory must stay bounded for any size. So the outboard is built in its own storage, in two steps: while
//! content comes, the chaining values of the groups are written there as a plain row (32 bytes each, half of
//! what the outboard takes); `finish` turns the row into pairs from its far end to its start. A pair never lies
//! before 64 bytes times its first group, and the values still needed then lie before 32 bytes times that group:
//! nothing is overwritten that is still to be read. The second step costs 60 ns a group (0.004 ns/B).

use std::io;

use capsule_proto::ranges::{MAX_CONTENT_LEN, group_count};
use capsule_proto::{GROUP_LEN, RootHash};
use positioned_io::{ReadAt, WriteAt};
use thiserror::Error;

use super::cv::{self, CV_LEN, Cv};
use super::geometry::{Node, outboard_len};
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

/// Computes root and outboard of content that is pushed in order; its size need not be known.
///
/// Large pushes (1 MiB and more) use all cores. Memory is some 100 KiB beside the storage, whatever the size.
pub struct TreeHasher<S = Vec<u8>> {
    storage: S,
    /// Whole groups so far.
    groups: u64,
    /// The beginning of the next group; never a whole one.
    partial: Vec<u8>,
    /// Chaining values not written yet, those of the groups just before `groups`.
    row: Vec<u8>,
    /// The root hash, should the first group remain the only one.
    first_as_root: Cv,
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
        let (partial, row) = (Vec::new(), Vec::new());
        Self {
            storage,
            groups: 0,
            partial,
            row,
            first_as_root: [0; CV_LEN],
        }
    }

    /// Bytes pushed so far.
    pub fn size(&self) -> u64 {
        self.groups * GROUP_LEN + self.partial.len() as u64
    }

    /// Adds content.
    pub fn push(&mut self, data: &[u8]) -> Result<(), HashError> {
        self.check_room(data.len() as u64)?;
        let data = self.fill_partial(data)?;
        let whole = data.len() - data.len() % GROUP_LEN as usize;
        let (whole, rest) = data.split_at(whole);
        self.push_groups(whole)?;
        self.partial.extend_from_slice(rest);
        Ok(())
    }

    /// Adds zeros that nobody needs to read. Aligned spans of [`ZERO_SPAN`] groups are only noted here (their hashing
    /// waits for `finish`) and leave holes in the outboard.
    pub fn push_zeros(&mut self, len: u64) -> Result<(), HashError> {
        self.check_room(len)?;
        let end = self.size() + len;
        if !self.partial.is_empty() {
            let missing = (GROUP_LEN - self.partial.len() as u64).min(len);
            self.fill_partial(&zeros::zero_group()[..missing as usize])?;
        }
        let end_group = end / GROUP_LEN;
        if self.groups < end_group {
            let first_span = self.groups.next_multiple_of(ZERO_SPAN).min(end_group);
            self.push_zero_groups(first_span - self.groups)?;
            self.skip_spans((end_group - self.groups) / ZERO_SPAN)?;
            self.push_zero_groups(end_group - self.groups)?;
        }
        self.partial
            .resize((end - self.groups * GROUP_LEN) as usize, 0);
        Ok(())
    }

    /// Builds the outboard, and returns it as the storage it was built in.
    pub fn finish(mut self) -> Result<(Tree, S), HashError> {
        let size = self.size();
        if group_count(size) == 1 {
            let root = if self.groups == 1 {
                self.first_as_root
            } else {
                blake3::hash(&self.partial).into()
            };
            return Ok((
                Tree {
                    root: RootHash::from_bytes(root),
                    size,
                },
                self.storage,
            ));
        }
        if !self.partial.is_empty() {
            let hashes = cv::hash_groups(self.groups, &self.partial);
            self.append(&hashes)?;
        }
        self.flush_row()?;
        let root = Builder {
            storage: &mut self.storage,
            size,
        }
        .build(&Node::root(size))?;
        Ok((
            Tree {
                root: RootHash::from_bytes(root),
                size,
            },
            self.storage,
        ))
    }

    fn check_room(&self, len: u64) -> Result<(), HashError> {
        if len > MAX_CONTENT_LEN - self.size() {
            Err(HashError::TooLarge)
        } else {
            Ok(())
        }
    }

    /// Completes a group that was begun, and returns what is left of the data.
    fn fill_partial<'d>(&mut self, data: &'d [u8]) -> Result<&'d [u8], HashError> {
        if self.partial.is_empty() {
            return Ok(data);
        }
        let missing = GROUP_LEN as usize - self.partial.len();
        let (part, rest) = data.split_at(missing.min(data.len()));
        self.partial.extend_from_slice(part);
        if self.partial.len() as u64 == GROUP_LEN {
            let mut group = std::mem::take(&mut self.partial);
            self.push_groups(&group)?;
            group.clear();
            self.partial = group;
        }
        Ok(rest)
    }

    fn push_groups(&mut self, whole: &[u8]) -> Result<(), HashError> {
        if whole.is_empty() {
            return Ok(());
        }
        self.note_first(&whole[..GROUP_LEN as usize]);
        let hashes = cv::hash_groups(self.groups, whole);
        self.append(&hashes)
    }

    fn push_zero_groups(&mut self, mut count: u64) -> Result<(), HashError> {
        while count > 0 {
            self.note_first(zeros::zero_group());
            let part = count.min(ZERO_SPAN);
            let hashes = zeros::hash_zero_groups(self.groups, part);
            self.append(&hashes)?;
            count -= part;
        }
        Ok(())
    }

    /// Leaves holes in the row.
    fn skip_spans(&mut self, spans: u64) -> Result<(), HashError> {
        if spans > 0 {
            // Content with a whole span in it has more than one group: no need to note the first.
            self.flush_row()?;
            self.groups += spans * ZERO_SPAN;
        }
        Ok(())
    }

    fn note_first(&mut self, group: &[u8]) {
        if self.groups == 0 {
            self.first_as_root = blake3::hash(group).into();
        }
    }

    fn append(&mut self, hashes: &[Cv]) -> Result<(), HashError> {
        self.row.extend_from_slice(hashes.as_flattened());
        self.groups += hashes.len() as u64;
        if self.row.len() >= ROW_BUFFER {
            self.flush_row()
        } else {
            Ok(())
        }
    }

    fn flush_row(&mut self) -> Result<(), HashError> {
        let offset = self.groups * CV_LEN as u64 - self.row.len() as u64;
        write(&mut self.storage, offset, &self.row)?;
        self.row.clear();
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
