//! BLAKE3 trees over chunk groups: root hashes, outboards, verified ranges.
//!
//! Content is a row of 16 KiB chunk groups; above them stands BLAKE3's binary tree, whose top is the
//! root hash. The *outboard* is that tree without its root and leaves: one 64-byte pair of chaining
//! values an inner node, in pre-order. A *range encoding* is what a provider sends: the pairs and the
//! groups that a run of groups needs to be checked against the root, in the same order; or against a node below it, whose hash
//! the receiver has. Both are byte for byte those of bao-tree 0.17 with `BlockSize::from_chunk_log(4)`; `docs/tree.md` specifies them.
//!
//! The code is our own, over [`blake3::hazmat`], because the callers want slices instead of streams,
//! sparse outboards, and recomputation of what changed; bao-tree is the oracle of the tests.
//!
//! Not here: which groups a node holds (the store), what is sent to whom (the swarm).
//!
//! | module | what |
//! |---|---|
//! | `geometry` | nodes, their groups, the places of their pairs |
//! | `cv` | chaining values of groups and subtrees; the only user of `hazmat` |
//! | `zeros` | chaining values of zero ranges, and why they need no storage |
//! | `pairs`, `known` | reading verified pairs from an outboard that may have holes; walking down by them |
//! | `pushed` | content as it comes to a hasher: cut into groups |
//! | `hasher`, `root`, `encode`, `decode`, `verify`, `update`, `diff` | one operation each |

mod cv;
mod decode;
mod diff;
mod encode;
mod geometry;
mod hasher;
mod known;
mod pairs;
mod pushed;
mod root;
mod update;
mod verify;
mod zeros;

use std::io;

use capsule_proto::RootHash;
use positioned_io::ReadAt;

pub use decode::{DecodeError, decode_range};
pub use diff::{DiffError, changed_groups};
pub use encode::{EncodeError, encode_range};
pub use geometry::{PAIR_LEN, encoded_len, outboard_len};
pub use hasher::{ContentHasher, HashError, TreeHasher, tree_of};
pub use root::RootHasher;
pub use update::{Change, UpdateError, update};
pub use verify::{VerifyError, verify};
pub use zeros::ZERO_SPAN;

/// A tree by name: the root hash of some content, and the content's size, without which the root cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tree {
    /// BLAKE3 hash of the content.
    pub root: RootHash,
    /// Bytes of content.
    pub size: u64,
}

/// Reads until the buffer is full or the storage ends, and returns how much was read.
fn read_some(from: &(impl ReadAt + ?Sized), mut offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match from.read_at(offset, &mut buf[done..]) {
            Ok(0) => break,
            Ok(n) => {
                done += n;
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Reads a region of an outboard; what lies beyond its end is a hole, and holes are zeros.
fn read_or_zeros(from: &(impl ReadAt + ?Sized), offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let done = read_some(from, offset, buf)?;
    buf[done..].fill(0);
    Ok(())
}

/// Whether all bytes are zero.
fn is_zero(bytes: &[u8]) -> bool {
    // In words, without an early exit inside a line: the compiler makes vector code of it.
    bytes
        .chunks(256)
        .all(|line| line.iter().fold(0, |acc, byte| acc | byte) == 0)
}
