//! Finding out which stored groups are still what they should be.
//!
//! For fsck-like passes over whole blobs, and for deploy targets whose content may have been changed by others.

use std::io;
use std::ops::Range;

use capsule_proto::ranges::{group_bytes, group_count};
use capsule_proto::{GROUP_LEN, GroupRanges};
use positioned_io::ReadAt;
use rayon::prelude::*;
use thiserror::Error;

use super::cv::{self, Cv};
use super::geometry::Node;
use super::pairs::{PairFault, PairReader};
use super::{Tree, read_some};

/// Groups that one task verifies, so that the path from the root is nothing beside them: 16 MiB.
const TASK_GROUPS: u64 = 1024;
/// Tasks that are laid out at a time; bounds the memory of a pass over huge content.
const TASKS: usize = 256;
/// Groups read at a time, a power of two: 256 KiB.
const READ_GROUPS: u64 = 16;

/// Why verification could not go on. What merely does not verify is no error.
#[derive(Debug, Error)]
pub enum VerifyError {
    /// The content could not be read (its end coming early is no error: what is missing does not verify).
    #[error("cannot read the data from group {group} on")]
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

/// The subset of `groups` that verify: data is there and right, and so are all pairs above it.
///
/// Runs on all cores. Groups beyond the content never verify.
pub fn verify(
    tree: &Tree,
    groups: &GroupRanges,
    data: &(impl ReadAt + Sync + ?Sized),
    outboard: &(impl ReadAt + Sync + ?Sized),
) -> Result<GroupRanges, VerifyError> {
    let size = tree.size;
    let end = group_count(size);
    let mut tasks = groups
        .runs()
        .iter()
        .flat_map(|run| tasks_of(run.start..run.end.min(end)))
        .peekable();
    let mut verified = GroupRanges::new();
    while tasks.peek().is_some() {
        let batch: Vec<_> = tasks.by_ref().take(TASKS).collect();
        let found: Vec<GroupRanges> = batch
            .into_par_iter()
            .map(|wanted| {
                let pairs = PairReader::new(outboard, size);
                let (buffer, verified) = (Vec::new(), GroupRanges::new());
                let mut task = Task {
                    size,
                    wanted,
                    data,
                    pairs,
                    buffer,
                    buffer_first: 0,
                    verified,
                };
                task.node(&Node::root(size), &cv::of_root(&tree.root))?;
                Ok(task.verified)
            })
            .collect::<Result<_, VerifyError>>()?;
        found.iter().for_each(|part| verified.union_with(part));
    }
    Ok(verified)
}

/// Cuts a run at multiples of a task's length.
fn tasks_of(run: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut next = run.start;
    std::iter::from_fn(move || {
        let task = next..run.end.min((next / TASK_GROUPS + 1) * TASK_GROUPS);
        next = next.max(task.end);
        (!task.is_empty()).then_some(task)
    })
}

struct Task<'a, D: ?Sized, O: ?Sized> {
    size: u64,
    wanted: Range<u64>,
    data: &'a D,
    pairs: PairReader<'a, O>,
    /// Data read last, from the group `buffer_first` on.
    buffer: Vec<u8>,
    buffer_first: u64,
    verified: GroupRanges,
}

impl<D: ReadAt + ?Sized, O: ReadAt + ?Sized> Task<'_, D, O> {
    /// Descends to subtrees that are read at once.
    fn node(&mut self, node: &Node, expected: &Cv) -> Result<(), VerifyError> {
        if !node.touches(&self.wanted) {
            return Ok(());
        }
        if node.count > READ_GROUPS {
            return self.children(node, expected, Self::node);
        }
        let wanted = self.wanted.start.max(node.first)..self.wanted.end.min(node.end());
        let bytes = group_bytes(&wanted, self.size);
        self.buffer.resize((bytes.end - bytes.start) as usize, 0);
        let read = read_some(self.data, bytes.start, &mut self.buffer).map_err(|source| {
            VerifyError::Data {
                group: wanted.start,
                source,
            }
        })?;
        self.buffer.truncate(read);
        self.buffer_first = wanted.start;
        self.node_read(node, expected)
    }

    /// The same below, with the data in the buffer.
    fn node_read(&mut self, node: &Node, expected: &Cv) -> Result<(), VerifyError> {
        if !node.touches(&self.wanted) {
            return Ok(());
        }
        if !node.is_leaf() {
            return self.children(node, expected, Self::node_read);
        }
        let start = ((node.first - self.buffer_first) * GROUP_LEN) as usize;
        let bytes = group_bytes(&node.groups(), self.size);
        let group = self
            .buffer
            .get(start..start + (bytes.end - bytes.start) as usize);
        if group.is_some_and(|data| cv::hash_leaf(node, data) == *expected) {
            self.verified.insert(node.groups());
        }
        Ok(())
    }

    fn children(
        &mut self,
        node: &Node,
        expected: &Cv,
        descend: fn(&mut Self, &Node, &Cv) -> Result<(), VerifyError>,
    ) -> Result<(), VerifyError> {
        let pair = match self.pairs.load(node, expected) {
            Ok(pair) => pair,
            // Nothing below it can be verified, the rest can.
            Err(PairFault::Wrong { .. }) => return Ok(()),
            Err(PairFault::Io { offset, source }) => {
                return Err(VerifyError::Outboard { offset, source });
            }
        };
        let ((left, right), (left_hash, right_hash)) = (node.split(), cv::halves(&pair));
        descend(self, &left, &left_hash)?;
        descend(self, &right, &right_hash)
    }
}
