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
pub const MAX_INDEX_LEN: u64 = 1 << 34;
/// Most memory that the runs and frames of [`Index::decode`] fill, in bytes: pages compress well, so a small index may hold any number of runs.
/// What is larger is read page by page.
pub const MAX_DECODED_LEN: u64 = 1 << 30;
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
/// Most frames of a layer: those of the most pages, 2^30; an id fits in 32 bits.
pub const MAX_FRAMES: u64 = (directory::MAX_PAGES as u64) * (page::MAX_FRAMES_PER_PAGE as u64);

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
    /// The component that unmentioned ranges are inherited from, as far as it reaches; none: every byte is mentioned.
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
    /// One zstd frame of a bytewise difference against the references' content, which is at least as long as the frame's
    /// (`proto/docs/index.md`, "Difference").
    Difference,
    /// One raw LZMA stream behind its properties byte.
    Lzma,
    /// The same, whose dictionary is the references' content, one after another.
    LzmaReferences,
    /// Steps, and a difference against what of the references' content they lead over (`proto/docs/index.md`, "Patch").
    Patch,
    /// The same, where distances of x86 code are foretold (`proto/docs/index.md`, "Patch of code").
    CodePatch,
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

impl IndexHeader {
    /// How far the parent reaches: only bytes below can be inherited, so only they may be left unmentioned.
    pub fn inherited_len(&self) -> u64 {
        let parent = self.sources.first().filter(|_| self.parent.is_some());
        parent.map_or(0, |parent| parent.size)
    }
}

impl Run {
    /// First byte after the run.
    pub const fn end(&self) -> u64 {
        self.start + self.len
    }
}

impl Index {
    /// Decodes all pages and checks what only the whole can tell: that runs and references fit their frames, and that
    /// depths rise. Refuses what would take more than [`MAX_DECODED_LEN`] in memory.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let directory = Directory::decode(bytes)?;
        if directory.index_len() != bytes.len() as u64 {
            return Err(DecodeError::Invalid {
                what: "index",
                at: bytes.len(),
                why: "the length is not that of the directory and its pages",
            });
        }
        let counted = |pages: &mut dyn Iterator<Item = u32>, each: usize| {
            pages.map(u64::from).sum::<u64>() * each as u64
        };
        let mut decoded = counted(
            &mut directory.run_pages().iter().map(|page| page.count),
            size_of::<Run>(),
        ) + counted(
            &mut directory.frame_pages().iter().map(|page| page.count),
            size_of::<Frame>(),
        );
        check_decoded(decoded)?;
        let page = |at: u64, len: u32| &bytes[at as usize..at as usize + len as usize];
        let mut runs = Vec::new();
        for (i, entry) in directory.run_pages().iter().enumerate() {
            runs.extend(directory.decode_runs(i, page(entry.at, entry.len))?);
        }
        let mut frames = Vec::new();
        for (i, entry) in directory.frame_pages().iter().enumerate() {
            let page = directory.decode_frames(i, page(entry.at, entry.len))?;
            decoded += page.iter().map(Frame::details_len).sum::<u64>();
            check_decoded(decoded)?;
            frames.extend(page);
        }
        let index = Self {
            directory,
            runs,
            frames,
        };
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
                let ReferenceTo::Frame(id) = reference.to else {
                    continue;
                };
                let earlier = &self.frames[id as usize];
                if earlier.depth >= frame.depth {
                    return invalid(
                        "frame",
                        at,
                        "its depth is not above that of the frames it refers to",
                    );
                }
                if reference.offset + u64::from(reference.len) > u64::from(earlier.len) {
                    return invalid("frame", at, "a reference reads beyond the end of its frame");
                }
            }
        }
        Ok(())
    }
}

fn check_decoded(value: u64) -> Result<(), DecodeError> {
    let (what, bound) = ("index, decoded whole,", MAX_DECODED_LEN);
    if value > bound {
        Err(DecodeError::OutOfBounds {
            what,
            at: 0,
            value,
            bound,
        })
    } else {
        Ok(())
    }
}

impl Frame {
    /// Memory that references and spans take, in bytes.
    fn details_len(&self) -> u64 {
        (size_of_val(&self.references[..]) + size_of_val(&self.spans[..])) as u64
    }

    /// The rules within a frame with the given id; reader and builder keep the same.
    fn check(&self, id: u32) -> Result<(), &'static str> {
        let Self {
            len,
            pack_len,
            codec,
            depth,
            references,
            spans,
            ..
        } = self;
        let referenced = references
            .iter()
            .map(|reference| u64::from(reference.len))
            .sum::<u64>();
        let refers_to_frames = references
            .iter()
            .any(|reference| matches!(reference.to, ReferenceTo::Frame(_)));
        let goes_back = |reference: &Reference| !matches!(reference.to, ReferenceTo::Frame(earlier) if earlier >= id);
        let spanned = spans.iter().map(|span| u64::from(span.len)).sum::<u64>();
        let rules = [
            (*len > 0 && *pack_len > 0, "a frame is not empty"),
            (
                u64::from(*len) <= MAX_FRAME_LEN,
                "a frame decodes to at most 16 MiB",
            ),
            (
                u64::from(*pack_len) <= MAX_FRAME_PACK_LEN,
                "a frame is no longer in the pack than zstd ever makes it",
            ),
            (
                *codec != Codec::Stored || pack_len == len,
                "a stored frame is as long in the pack as its content",
            ),
            (
                matches!(codec, Codec::Stored | Codec::Zstd | Codec::Lzma) == references.is_empty(),
                "the codecs with references, and only they, have them",
            ),
            (
                references.len() <= MAX_REFERENCES,
                "a frame has at most 64 references",
            ),
            (
                referenced <= MAX_REFERENCE_BYTES,
                "references have at most 16 MiB together",
            ),
            (
                references.iter().all(|reference| reference.len > 0),
                "a reference is not empty",
            ),
            (
                references.iter().all(goes_back),
                "references to frames go back",
            ),
            (
                *codec != Codec::Difference || referenced >= u64::from(*len),
                "a difference has references at least as long as its content",
            ),
            (
                *depth <= MAX_REFERENCE_DEPTH && (*depth > 0) == refers_to_frames,
                "the depth is 1 to 8 with references to frames, 0 without",
            ),
            (spans.len() <= MAX_SPANS, "a frame has at most 4,096 spans"),
            (spans.iter().all(|span| span.len > 0), "a span is not empty"),
            (
                spans.is_empty() || spanned == u64::from(*len),
                "spans end with the frame",
            ),
        ];
        rules
            .into_iter()
            .find(|(holds, _)| !holds)
            .map_or(Ok(()), |(_, why)| Err(why))
    }
}
