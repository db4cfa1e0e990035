//! Reading any range of a component through a layer.
//!
//! [`LayerContent`] decodes the frames that a range touches, checks each against its hash, and reads copies and inherited
//! ranges from the layer's sources, which may be layers' content themselves. Every length is checked against a bound of
//! the format before it is allocated. Reading all of a component in order is `restore`'s.

use std::sync::{Arc, Mutex, PoisonError};

use capsule_proto::index::{Frame, IndexHeader, Reference, ReferenceTo, RunFrom};
use thiserror::Error;

use super::cache::Cache;
use super::codec::{Decoder, FrameFault};
use super::pages::{FrameEntry, IndexFault, Pages, Part, PartFrom, Parts, Storage};
use crate::content::{Content, ReadError, check_range};

/// Most frames decoded for one: a frame may have 64 references to frames that have 64 each, 8 deep; what an honest
/// publisher makes stays far below.
const MAX_FRAMES_FOR_ONE: u32 = 512;
/// Most decoders kept for the next reader: as many readers as disks and mounts have at a time.
const DECODERS_KEPT: usize = 64;

/// How to read a layer.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// Bytes of decoded frames that are kept; the frame read last always is.
    pub cache_len: usize,
}

impl Default for ReadOptions {
    /// Some tens of the largest default frames, so that neighbours read in any order decode each frame once.
    fn default() -> Self {
        Self {
            cache_len: 32 << 20,
        }
    }
}

/// Why a range could not be read through a layer.
#[derive(Debug, Error)]
pub enum LayerError {
    /// The index is damaged, not there, or contradicts itself.
    #[error("the layer's index: {0}")]
    Index(#[from] IndexFault),
    /// The reader gave other sources than the index names.
    #[error("the layer reads {expected} sources, but {found} were given")]
    Sources {
        /// By the index.
        expected: usize,
        /// By the caller.
        found: usize,
    },
    /// A source has another size than the index says.
    #[error(
        "source {source_id} of the layer has {found} bytes, not {expected}: it is not the content that the layer was made for"
    )]
    SourceSize {
        /// Position among the sources.
        source_id: usize,
        /// By the index.
        expected: u64,
        /// By the caller.
        found: u64,
    },
    /// A source could not be read.
    #[error("source {source_id} of the layer: {source}")]
    Source {
        /// Position among the sources.
        source_id: usize,
        /// What failed there.
        source: Box<ReadError>,
    },
    /// The pack could not be read.
    #[error("reading frame {frame}, {len} bytes at {at} of the pack: {source}")]
    Pack {
        /// The frame's id.
        frame: u32,
        /// First byte in the pack.
        at: u64,
        /// How many bytes.
        len: u32,
        /// What the storage said.
        source: std::io::Error,
    },
    /// A frame could not be decoded.
    #[error("frame {frame}, at byte {at} of the pack: {fault}")]
    Frame {
        /// The frame's id.
        frame: u32,
        /// First byte in the pack.
        at: u64,
        /// What is wrong with it.
        fault: FrameFault,
    },
    /// A run reads beyond the end of its frame.
    #[error(
        "the layer's index: bytes at {start} of the component lie beyond the end of frame {frame}"
    )]
    BeyondFrame {
        /// First byte in the component.
        start: u64,
        /// The frame's id.
        frame: u32,
    },
    /// A frame refers to what it must not.
    #[error("the layer's index: frame {frame} refers to frame {to}, {why}")]
    Reference {
        /// The frame's id.
        frame: u32,
        /// What it refers to.
        to: u32,
        /// Which rule it breaks.
        why: &'static str,
    },
    /// A frame that needs too many others.
    #[error(
        "frame {frame} takes more than {MAX_FRAMES_FOR_ONE} others to decode: the layer is refused"
    )]
    TooDear {
        /// The frame's id.
        frame: u32,
    },
}

/// A component, read through one layer.
pub struct LayerContent {
    pages: Pages,
    pack: Storage,
    sources: Vec<Arc<dyn Content>>,
    frames: Cache<Vec<u8>>,
    decoders: Mutex<Vec<Decoder>>,
}

impl LayerContent {
    /// Reads the directory of an index. `sources` are those that its header names, in that order.
    ///
    /// Index and pack may be partly there: what is missing fails with their error when it is wanted.
    pub fn open(
        index: Storage,
        pack: Storage,
        sources: Vec<Arc<dyn Content>>,
        options: &ReadOptions,
    ) -> Result<Self, LayerError> {
        let pages = Pages::open(index)?;
        let named = &pages.directory().header().sources;
        if named.len() != sources.len() {
            return Err(LayerError::Sources {
                expected: named.len(),
                found: sources.len(),
            });
        }
        for (source_id, (named, given)) in named.iter().zip(&sources).enumerate() {
            if named.size != given.len() {
                return Err(LayerError::SourceSize {
                    source_id,
                    expected: named.size,
                    found: given.len(),
                });
            }
        }
        let frames = Cache::new(options.cache_len);
        Ok(Self {
            pages,
            pack,
            sources,
            frames,
            decoders: Mutex::default(),
        })
    }

    /// What the layer leads from and to.
    pub fn header(&self) -> &IndexHeader {
        self.pages.directory().header()
    }

    /// What the component consists of, in order.
    pub(super) fn parts(&self, range: std::ops::Range<u64>) -> Parts<'_> {
        self.pages.parts(range)
    }

    /// Reads a range; what it lies in need not be decoded beyond it, except frames.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), LayerError> {
        let mut rest = buf;
        for part in self.parts(offset..offset + rest.len() as u64) {
            let part = part?;
            let (now, later) = rest.split_at_mut(part.len() as usize);
            self.read_part(&part, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Fills a buffer as long as the part.
    pub(super) fn read_part(&self, part: &Part, buf: &mut [u8]) -> Result<(), LayerError> {
        match part.from {
            PartFrom::Inherited => self.read_source(0, part.range.start, buf),
            PartFrom::Mentioned(RunFrom::Zero) => {
                buf.fill(0);
                Ok(())
            }
            PartFrom::Mentioned(RunFrom::Copy { source, offset }) => {
                self.read_source(source.into(), offset, buf)
            }
            PartFrom::Mentioned(RunFrom::Frame { id, offset }) => {
                let frame = self.frame_for(part, id, offset)?;
                let offset = offset as usize;
                buf.copy_from_slice(&frame[offset..offset + buf.len()]);
                Ok(())
            }
        }
    }

    /// The decoded frame that a part lies in.
    pub(super) fn frame_for(
        &self,
        part: &Part,
        id: u32,
        offset: u32,
    ) -> Result<Arc<Vec<u8>>, LayerError> {
        let entry = self.pages.frame(id)?;
        if u64::from(offset) + part.len() > entry.len.into() {
            return Err(LayerError::BeyondFrame {
                start: part.range.start,
                frame: id,
            });
        }
        let mut left = MAX_FRAMES_FOR_ONE;
        self.frame(id, &entry, &mut left)
    }

    /// Bytes of a source. Copies and references were checked against its size when they were parsed.
    fn read_source(&self, source_id: usize, offset: u64, buf: &mut [u8]) -> Result<(), LayerError> {
        let failed = |source| LayerError::Source {
            source_id,
            source: Box::new(source),
        };
        self.sources[source_id].read_at(offset, buf).map_err(failed)
    }

    /// A decoded frame, kept or made. Waits only for frames with smaller ids, so readers never wait in a circle.
    fn frame(
        &self,
        id: u32,
        entry: &FrameEntry,
        left: &mut u32,
    ) -> Result<Arc<Vec<u8>>, LayerError> {
        self.frames.get(id.into(), entry.len as usize, || {
            *left = left
                .checked_sub(1)
                .ok_or(LayerError::TooDear { frame: id })?;
            let references = self.references(id, entry, left)?;
            self.decode(id, entry, &references)
        })
    }

    /// The content of a frame's references, one after another: 16 MiB at most, as the index was checked.
    fn references(&self, id: u32, entry: &Frame, left: &mut u32) -> Result<Vec<u8>, LayerError> {
        let mut content = vec![
            0;
            entry
                .references
                .iter()
                .map(|reference| reference.len as usize)
                .sum()
        ];
        let mut rest = content.as_mut_slice();
        for reference in &entry.references {
            let (now, later) = rest.split_at_mut(reference.len as usize);
            match reference.to {
                ReferenceTo::Source(source) => {
                    self.read_source(source.into(), reference.offset, now)?
                }
                ReferenceTo::Frame(to) => {
                    self.read_reference(id, entry, to, reference, now, left)?
                }
            }
            rest = later;
        }
        Ok(content)
    }

    fn read_reference(
        &self,
        id: u32,
        entry: &Frame,
        to: u32,
        reference: &Reference,
        buf: &mut [u8],
        left: &mut u32,
    ) -> Result<(), LayerError> {
        let earlier = self.pages.frame(to)?;
        let wrong = |why| Err(LayerError::Reference { frame: id, to, why });
        // Depths fall from 8 to 0, which bounds the recursion.
        if earlier.depth >= entry.depth {
            return wrong("whose depth is not below its own");
        }
        if reference.offset + u64::from(reference.len) > earlier.len.into() {
            return wrong("beyond its end");
        }
        let content = self.frame(to, &earlier, left)?;
        let offset = reference.offset as usize;
        buf.copy_from_slice(&content[offset..offset + buf.len()]);
        Ok(())
    }

    fn decode(&self, id: u32, entry: &Frame, references: &[u8]) -> Result<Vec<u8>, LayerError> {
        let at = entry.pack_offset;
        let read_packed = |buf: &mut [u8]| {
            self.pack
                .read_exact_at(at, buf)
                .map_err(DecodeFailure::Pack)
        };
        let mut decoder = self.decoders().pop().unwrap_or_default();
        let content = decoder.decode(entry, read_packed, references);
        let mut kept = self.decoders();
        if kept.len() < DECODERS_KEPT {
            kept.push(decoder);
        }
        content.map_err(|failure| match failure {
            DecodeFailure::Pack(source) => LayerError::Pack {
                frame: id,
                at,
                len: entry.pack_len,
                source,
            },
            DecodeFailure::Frame(fault) => LayerError::Frame {
                frame: id,
                at,
                fault,
            },
        })
    }

    fn decoders(&self) -> std::sync::MutexGuard<'_, Vec<Decoder>> {
        self.decoders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum DecodeFailure {
    Pack(std::io::Error),
    Frame(FrameFault),
}

impl From<FrameFault> for DecodeFailure {
    fn from(fault: FrameFault) -> Self {
        Self::Frame(fault)
    }
}

impl Content for LayerContent {
    fn len(&self) -> u64 {
        self.header().target_size
    }

    fn is_zero(&self, range: std::ops::Range<u64>) -> bool {
        self.parts(range).all(|part| match part {
            Ok(part) => match part.from {
                PartFrom::Mentioned(RunFrom::Zero) => true,
                PartFrom::Mentioned(RunFrom::Frame { .. }) => false,
                PartFrom::Mentioned(RunFrom::Copy { source, offset }) => {
                    let len = part.len();
                    self.sources[usize::from(source)].is_zero(offset..offset + len)
                }
                PartFrom::Inherited => self.sources[0].is_zero(part.range),
            },
            // Whoever reads it will be told.
            Err(_) => false,
        })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(self.len(), offset, buf.len())?;
        self.read(offset, buf).map_err(|error| ReadError::Decode {
            offset,
            source: Box::new(error),
        })
    }
}
