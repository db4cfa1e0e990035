//! Layer indexes: how each byte of a component comes about, and what lies where in the layer's pack.
//!
//! An index is a directory and pages. Run pages tell, for sorted runs of the target, whether they are zero, copied, or
//! part of a frame; frame pages tell where each frame lies in the pack, how it is decoded, and the hash of what comes out. Pages
//! are compressed one by one, so that a reader of one range fetches the directory and two pages, not the index of a huge disk.
//! Decoding frames belongs to the chunker. Byte-level description: `proto/docs/index.md`.

mod build;
mod directory;
mod page;

pub use build::{BuildError, IndexBuilder};
pub use directory::{Directory, FramePageEntry, RunPageEntry};

use crate::codec::DecodeError;
use crate::hash::{FrameHash, RootHash};

/// Longest index, in bytes: that of a target of 16 TiB in 64 KiB frames, thrice over.
pub const MAX_INDEX_LEN: usize = 1 << 34;
/// Longest decoded frame, in bytes: what a reader of one byte may have to decode, and hold.
pub const MAX_FRAME_LEN: u64 = 16 << 20;
/// Longest frame in a pack: zstd's worst case for incompressible content, rounded up.
pub const MAX_FRAME_PACK_LEN: u64 = MAX_FRAME_LEN + (MAX_FRAME_LEN >> 7) + 1024;
/// Most references of a frame.
pub const MAX_REFERENCES: usize = 64;
/// Most bytes that a frame's references have together.
pub const MAX_REFERENCE_BYTES: u64 = 16 << 20;
/// Longest chain of frames of one layer that refer to each other.
pub const MAX_REFERENCE_DEPTH: u8 = 8;
/// Most spans listed in a frame.
pub const MAX_SPANS: usize = 4096;
/// Most sources of a layer.
pub const MAX_SOURCES: usize = 64;
/// Most frames of a layer: 2^32, so that an id fits in 32 bits.
pub const MAX_FRAMES: u64 = 1 << 32;

/// What a layer's offsets count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// The bytes whose hash is the root: a stream, or a tree's listing.
    Stream,
    /// The regular files' bytes, in listing order, of the tree whose listing has the root.
    Contents,
}

/// What a layer leads from and to, and what it may read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexHeader {
    /// What offsets count, in the parent and the target.
    pub space: Space,
    /// The component that unmentioned ranges are inherited from; none: every byte is mentioned.
    pub parent: Option<RootHash>,
    /// The component that the layer makes.
    pub target: RootHash,
    /// Length of the target in its space, in bytes.
    pub target_size: u64,
    /// What copies and references may read. Where there is a parent, it is the first.
    pub sources: Vec<Source>,
}

/// A content that copies and references may read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Where the receiver has it from.
    pub kind: SourceKind,
    /// What it is.
    pub root: RootHash,
    /// What offsets into it count.
    pub space: Space,
    /// Its length in that space, in bytes.
    pub size: u64,
}

/// Where a receiver has a source from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceKind {
    /// The parent component.
    Parent,
    /// Another component of the parent's capsule.
    ParentCapsule,
    /// An earlier component of the same capsule.
    SameCapsule,
}

/// How a run of the target comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First byte of the target.
    pub start: u64,
    /// Length in bytes, at least 1.
    pub len: u64,
    /// What the bytes are.
    pub from: RunFrom,
}

/// What the bytes of a run are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunFrom {
    /// Zeros.
    Zero,
    /// Bytes of a source from an offset on.
    Copy {
        /// Position in the header's list of sources.
        source: u16,
        /// First byte there.
        offset: u64,
    },
    /// Bytes of a decoded frame from an offset on.
    Frame {
        /// The frame's id: its position in the layer.
        id: u32,
        /// First byte in the decoded frame.
        offset: u32,
    },
}

/// Where a frame lies in the pack, and what it decodes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// First byte in the pack; frames lie back to back in the order of their ids.
    pub pack_offset: u64,
    /// Length in the pack, in bytes.
    pub pack_len: u32,
    /// Length of the decoded content, in bytes.
    pub len: u32,
    /// How it is decoded.
    pub codec: Codec,
    /// Hash of the decoded content.
    pub hash: FrameHash,
    /// How many frames deep its references go: 0 without references to frames; else above that of each of them.
    pub depth: u8,
    /// Content that the codec reads beside the frame, in this order.
    pub references: Vec<Reference>,
    /// Pieces of the content with hashes of their own, one after another to the end of the frame; or none.
    pub spans: Vec<Span>,
}

/// How a frame is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// The content as it is.
    Stored,
    /// One zstd frame.
    Zstd,
    /// One zstd frame whose prefix is the references' content, one after another.
    ZstdReferences,
    /// One zstd frame of a bytewise difference against the references' content (`proto/docs/index.md`, "Difference").
    Difference,
}

/// A range of content that a frame is compressed against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reference {
    /// Where the content is.
    pub to: ReferenceTo,
    /// First byte.
    pub offset: u64,
    /// Length in bytes, at least 1.
    pub len: u32,
}

/// Where referenced content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReferenceTo {
    /// In a source: position in the header's list.
    Source(u16),
    /// In the decoded content of an earlier frame.
    Frame(u32),
}

/// A piece of a frame's content with a hash of its own, for receivers that have it elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Length in bytes, at least 1.
    pub len: u32,
    /// Hash of the bytes.
    pub hash: FrameHash,
}

/// A whole index, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// Header and pages.
    pub directory: Directory,
    /// All runs, sorted.
    pub runs: Vec<Run>,
    /// All frames, by id.
    pub frames: Vec<Frame>,
}

impl Run {
    /// First byte after the run.
    pub const fn end(&self) -> u64 {
        self.start + self.len
    }
}

impl Index {
    /// Decodes all pages and checks what only the whole can tell: that runs fit their frames, that every byte is
    /// mentioned where nothing can be inherited, and that references only go back.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let directory = Directory::decode(bytes)?;
        if directory.index_len() != bytes.len() as u64 {
            return Err(DecodeError::Invalid {
                what: "index",
                at: bytes.len(),
                why: "the length is not that of the directory and its pages",
            });
        }
        let page = |at: u64, len: u32| &bytes[at as usize..at as usize + len as usize];
        let mut runs = Vec::new();
        for (i, entry) in directory.run_pages().iter().enumerate() {
            runs.extend(directory.decode_runs(i, page(entry.at, entry.len))?);
        }
        let mut frames = Vec::new();
        for (i, entry) in directory.frame_pages().iter().enumerate() {
            frames.extend(directory.decode_frames(i, page(entry.at, entry.len))?);
        }
        let index = Self { directory, runs, frames };
        index.check()?;
        Ok(index)
    }

    fn check(&self) -> Result<(), DecodeError> {
        let invalid = |what, at, why| Err(DecodeError::Invalid { what, at, why });
        for (at, run) in self.runs.iter().enumerate() {
            if let RunFrom::Frame { id, offset } = run.from
                && u64::from(offset) + run.len > u64::from(self.frames[id as usize].len)
            {
                return invalid("run", at, "it reads beyond the end of its frame");
            }
        }
        for (at, frame) in self.frames.iter().enumerate() {
            for reference in &frame.references {
                let ReferenceTo::Frame(id) = reference.to else { continue };
                let earlier = &self.frames[id as usize];
                if earlier.depth >= frame.depth {
                    return invalid("frame", at, "its depth is not above that of the frames it refers to");
                }
                if reference.offset + u64::from(reference.len) > u64::from(earlier.len) {
                    return invalid("frame", at, "a reference reads beyond the end of its frame");
                }
            }
        }
        if self.directory.header().parent.is_none() {
            let mut next = 0;
            for (at, run) in self.runs.iter().enumerate() {
                if run.start != next {
                    return invalid("run", at, "bytes before it are not mentioned, and there is no parent to inherit from");
                }
                next = run.end();
            }
            if next != self.directory.header().target_size {
                return invalid("run", self.runs.len(), "the last bytes are not mentioned, and there is no parent to inherit from");
            }
        }
        Ok(())
    }
}
