//! How hard to compress, and what follows from it.

use capsule_proto::index::MAX_REFERENCES;

use crate::delta::Limits;

/// How hard to compress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Effort {
    /// zstd level 1.
    Fast,
    /// zstd level 3.
    #[default]
    Default,
    /// zstd level 19, and LZMA where it is worth it: a hundred times the work and more, for what many will fetch.
    Max,
}

impl Effort {
    /// The zstd level.
    pub const fn level(self) -> i32 {
        match self {
            Self::Fast => 1,
            Self::Default => 3,
            Self::Max => 19,
        }
    }

    /// The zstd level for content that old content resembles: there is little of it, so it may take longer.
    pub(super) const fn level_with_references(self) -> i32 {
        match self {
            Self::Fast => 3,
            Self::Default => 4,
            Self::Max => 19,
        }
    }

    /// Whether frames that old content resembles are tried as differences too. At [`Self::Max`] patches do better.
    pub(super) const fn differences(self) -> bool {
        matches!(self, Self::Default)
    }

    /// Whether frames are compressed with LZMA too, which is slower to decode, and those that old content resembles as patches.
    pub(super) const fn lzma(self) -> bool {
        matches!(self, Self::Max)
    }

    /// Whether frames may refer to earlier ones of their layer, which makes reading any one of them dearer.
    pub(super) const fn earlier(self) -> bool {
        matches!(self, Self::Max)
    }

    /// How much old content a frame may be compressed against.
    pub(super) const fn references(self) -> Limits {
        let (bytes, count) = match self {
            Self::Fast => (384 << 10, MAX_REFERENCES),
            Self::Default => (512 << 10, MAX_REFERENCES),
            // What is read through them may be long frames that refer to others, slow to decode.
            Self::Max => (2 << 20, MAX_REFERENCES * 3 / 4),
        };
        Limits {
            window_len: 128 << 10,
            bytes,
            count,
        }
    }
}
