//! Frames on a substream: four bytes of length, one of kind, then a control message or data.

use super::{WireError, bounded};
use crate::ranges::GROUP_LEN;

/// Bytes before a frame's payload.
pub const FRAME_HEADER_LEN: usize = 5;
/// Longest control message, in bytes: a `Have` of the most runs, or a `Records` of a few.
pub const MAX_CONTROL_LEN: usize = 1 << 20;
/// Bytes of a data frame's own header.
pub const DATA_HEADER_LEN: usize = 13;
/// Most chunk groups that one data frame answers: 1 MiB, what a link of 10 Mbit/s carries in a second.
pub const MAX_DATA_GROUPS: u64 = 64;
/// Longest data frame, in bytes: 64 groups, at most 63 pairs inside and 40 above them on each side, and the header.
pub const MAX_DATA_LEN: usize =
    DATA_HEADER_LEN + (MAX_DATA_GROUPS * GROUP_LEN) as usize + 64 * (63 + 2 * 40);

/// What a frame's payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// A protobuf `Control`.
    Control,
    /// A [`DataHeader`] and an encoded range.
    Data,
}

/// The head of a frame, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What follows.
    pub kind: FrameKind,
    /// How many bytes of it.
    pub len: usize,
}

/// The head of a data frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataHeader {
    /// The request that it answers.
    pub request: u64,
    /// How many chunk groups it carries: as many as the request asked for.
    pub groups: u32,
    /// Whether the encoded range is one zstd frame; only where the request allowed it.
    pub compressed: bool,
}

impl FrameHeader {
    /// The five bytes.
    pub fn encode(&self) -> [u8; FRAME_HEADER_LEN] {
        let mut bytes = [0; FRAME_HEADER_LEN];
        bytes[..4].copy_from_slice(&(self.len as u32).to_be_bytes());
        bytes[4] = match self.kind {
            FrameKind::Control => 0,
            FrameKind::Data => 1,
        };
        bytes
    }

    /// Parses and bounds the five bytes.
    pub fn decode(bytes: &[u8; FRAME_HEADER_LEN]) -> Result<Self, WireError> {
        let len = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        let (kind, bound) = match bytes[4] {
            0 => (FrameKind::Control, MAX_CONTROL_LEN),
            1 => (FrameKind::Data, MAX_DATA_LEN),
            _ => {
                return Err(WireError::Invalid {
                    what: "frame",
                    why: "kinds are 0 and 1",
                });
            }
        };
        bounded("frame", len, bound)?;
        if kind == FrameKind::Data && len < DATA_HEADER_LEN {
            return Err(WireError::Invalid {
                what: "frame",
                why: "a data frame has a header",
            });
        }
        Ok(Self { kind, len })
    }
}

impl DataHeader {
    /// The thirteen bytes.
    pub fn encode(&self) -> [u8; DATA_HEADER_LEN] {
        let mut bytes = [0; DATA_HEADER_LEN];
        bytes[..8].copy_from_slice(&self.request.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.groups.to_be_bytes());
        bytes[12] = self.compressed.into();
        bytes
    }

    /// Parses and bounds the thirteen bytes.
    pub fn decode(bytes: &[u8; DATA_HEADER_LEN]) -> Result<Self, WireError> {
        let request = u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"));
        let groups = u32::from_be_bytes(bytes[8..12].try_into().expect("four bytes"));
        if groups == 0 || u64::from(groups) > MAX_DATA_GROUPS {
            return Err(WireError::Invalid {
                what: "data frame",
                why: "it carries 1 to 64 groups",
            });
        }
        match bytes[12] {
            0 | 1 => Ok(Self {
                request,
                groups,
                compressed: bytes[12] == 1,
            }),
            _ => Err(WireError::Invalid {
                what: "data frame",
                why: "flags are bit 0",
            }),
        }
    }
}
