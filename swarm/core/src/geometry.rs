//! Piece geometry: how a blob of a given size is cut into pieces.
//!
//! Pieces only schedule. Which of them are held or wanted is the business of the piece map.

use std::ops::Range;

use capsule_proto::ranges::{GROUP_LEN, group_bytes, group_count};

/// Most groups in one request: 1 MiB.
///
/// A response is verified and announced as a whole, so this bounds both what a requester buffers
/// and how long a piece is in one machine's hands only.
pub const MAX_REQUEST_GROUPS: u64 = (1 << 20) / GROUP_LEN;

/// Pieces aimed at: the piece length is the smallest power of two that gives no more than these.
///
/// More pieces spread sooner, up to a point; but each costs a have to every peer (about 6 bytes), a request and a response.
const TARGET_PIECES: u64 = 2048;
/// Longest piece: 16 MiB, unless the blob would have more than [`MAX_PIECES`] of them.
const MAX_PIECE_GROUPS: u64 = (16 << 20) / GROUP_LEN;
/// Bound of the piece table (reached at 1 TiB); beyond, pieces grow.
const MAX_PIECES: u64 = 1 << 16;

/// How a blob is cut into pieces: runs of `1 << shift` groups, the last one possibly shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PieceGeometry {
    size: u64,
    groups: u64,
    shift: u32,
}

impl PieceGeometry {
    /// The geometry of a blob of `size` bytes: 1,000 to 2,048 pieces from 16 MiB to 32 GiB; below that one group each.
    pub fn of(size: u64) -> Self {
        let groups = group_count(size);
        let least = |pieces: u64| groups.div_ceil(pieces).next_power_of_two();
        let len = least(TARGET_PIECES)
            .min(MAX_PIECE_GROUPS)
            .max(least(MAX_PIECES));
        Self {
            size,
            groups,
            shift: len.trailing_zeros(),
        }
    }

    /// Bytes in the blob.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Groups in the blob.
    pub const fn groups(&self) -> u64 {
        self.groups
    }

    /// Groups in a piece (the last piece may have fewer).
    pub const fn piece_groups(&self) -> u64 {
        1 << self.shift
    }

    /// How many pieces there are.
    pub const fn pieces(&self) -> u32 {
        // At most MAX_PIECES by construction.
        self.groups.div_ceil(1 << self.shift) as u32
    }

    /// The piece that a group lies in.
    pub const fn piece_of(&self, group: u64) -> u32 {
        (group >> self.shift) as u32
    }

    /// The groups of a piece.
    pub fn groups_of(&self, piece: u32) -> Range<u64> {
        let start = u64::from(piece) << self.shift;
        start..(start + self.piece_groups()).min(self.groups)
    }

    /// The pieces that a run of groups touches.
    pub fn pieces_touching(&self, groups: &Range<u64>) -> Range<u32> {
        if groups.is_empty() {
            return 0..0;
        }
        self.piece_of(groups.start)..self.piece_of(groups.end - 1) + 1
    }

    /// Bytes in a run of groups.
    pub fn bytes(&self, groups: &Range<u64>) -> u64 {
        let bytes = group_bytes(groups, self.size);
        bytes.end - bytes.start
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_partition_the_blob(size in 0u64..1 << 50) {
            let geometry = PieceGeometry::of(size);
            let last = geometry.pieces() - 1;
            prop_assert!(u64::from(geometry.pieces()) <= MAX_PIECES);
            prop_assert_eq!(geometry.groups_of(last).end, geometry.groups());
            prop_assert!(!geometry.groups_of(last).is_empty());
            for piece in [0, last / 2, last] {
                let groups = geometry.groups_of(piece);
                prop_assert_eq!(geometry.pieces_touching(&groups), piece..piece + 1);
            }
        }
    }

    #[test]
    fn pieces_of_common_sizes() {
        let of = |size| {
            (
                PieceGeometry::of(size).pieces(),
                PieceGeometry::of(size).piece_groups(),
            )
        };
        assert_eq!(of(0), (1, 1));
        assert_eq!(of(5_000_000), (306, 1));
        assert_eq!(of(96 << 20), (1536, 4));
        assert_eq!(of(50 << 30), (3200, 1024));
        assert_eq!(of(1 << 50), (1 << 16, 1 << 20));
    }
}
