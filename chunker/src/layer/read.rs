//! Reading any range of a component through a layer.
//!
//! [`LayerContent`] decodes the frames that a range touches, checks each against its hash, and reads copies and inherited
//! ranges from the layer's sources, which may be layers' content themselves. Every length is checked against a bound of
//! the format before it is allocated, and all that one read leads to, in however many layers, is paid from one budget.
//! Reading all of a component in order is `restore`'s.

use std::ops::Range;
use std::sync::Arc;

use capsule_proto::FrameHash;
use capsule_proto::index::{Frame, IndexHeader, Reference};
use positioned_io::ReadAt;

pub use super::budget::Spent;
use super::budget::{Budget, UNIT};
pub use super::cache::LayerCache;
use super::cache::{Key, Shared, next_number};
use super::codec::FrameFault;
pub use super::error::LayerError;
use super::follow::{FramePlace, Place, follow};
use super::pages::{FrameEntry, Pages, Parts, Storage};
use super::plan::Plan;
use crate::content::{Content, ReadError, check_range};
use crate::like::Local;

/// How to read a stack of layers.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// Bytes of decoded frames that are kept, of all layers together; the frame read last always is.
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

/// A component, read through one layer.
pub struct LayerContent {
    pages: Pages,
    pack: Storage,
    sources: Vec<Arc<dyn Content>>,
    cache: Arc<Shared>,
    /// The layer's number in the cache.
    number: u64,
    /// Frames that are not read from the pack.
    local: Option<Local>,
}

impl LayerContent {
    /// Reads the directory of an index. `sources` are those that its header names, in that order; those that
    /// are layers should have the same cache.
    ///
    /// Index and pack may be partly there: what is missing fails with their error when it is wanted.
    pub fn open(
        index: Storage,
        pack: Storage,
        sources: Vec<Arc<dyn Content>>,
        cache: &LayerCache,
    ) -> Result<Self, LayerError> {
        let cache = cache.0.clone();
        let number = next_number();
        let pages = Pages::open(index, cache.clone(), number)?;
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
        Ok(Self {
            pages,
            pack,
            sources,
            cache,
            number,
            local: None,
        })
    }

    /// Makes some frames of local data: neither their bytes in the pack nor what they refer to need be there. One that local data
    /// no longer has fails with [`LayerError::Drifted`].
    pub fn with_local(self, local: Local) -> Self {
        Self {
            local: Some(local),
            ..self
        }
    }

    /// Goes through the frame table.
    pub(crate) fn each_frame(
        &self,
        each: impl FnMut(u32, &Frame) -> Result<(), LayerError>,
    ) -> Result<(), LayerError> {
        self.pages.each_frame(each)
    }

    /// Reads part of a frame.
    pub(crate) fn read_frame(
        &self,
        id: u32,
        offset: u32,
        buf: &mut [u8],
    ) -> Result<(), LayerError> {
        let budget = &mut Budget::new(buf.len() as u64);
        let place = FramePlace {
            layer: self,
            id,
            offset,
            start: 0,
        };
        let mut plan = Plan::new(self);
        plan.want(0, place, buf.len() as u64, budget)?;
        let offset = offset as usize;
        plan.run(budget, |_, frame| {
            buf.copy_from_slice(&frame[offset..offset + buf.len()]);
        })
    }

    /// A frame as decoding it needs it: one of local data refers to nothing.
    pub(super) fn planned(&self, id: u32, entry: &FrameEntry) -> Frame {
        let mut frame = entry.without_spans();
        if self.local.as_ref().is_some_and(|local| local.has(id)) {
            frame.references = Vec::new();
        }
        frame
    }

    /// What the layer leads from and to.
    pub fn header(&self) -> &IndexHeader {
        self.pages.directory().header()
    }

    /// Length of its index, in bytes.
    pub fn index_len(&self) -> u64 {
        self.pages.directory().index_len()
    }

    /// What the component consists of, in order.
    pub(super) fn parts(&self, range: Range<u64>) -> Parts<'_> {
        self.pages.parts(range)
    }

    pub(super) fn source(&self, source_id: usize) -> &dyn Content {
        &*self.sources[source_id]
    }

    pub(super) const fn pages(&self) -> &Pages {
        &self.pages
    }

    pub(super) fn pack(&self) -> &dyn ReadAt {
        &*self.pack
    }

    pub(super) fn cache(&self) -> &Shared {
        &self.cache
    }

    /// By what a frame is found in the cache.
    pub(super) fn key(&self, id: u32) -> Key {
        (self.number, id.into())
    }

    /// Reads a range; what it lies in need not be decoded beyond it, except frames.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), LayerError> {
        let pieces = (offset..).step_by(UNIT as usize);
        pieces
            .zip(buf.chunks_mut(UNIT as usize))
            .try_for_each(|(at, piece)| self.read_piece(at, piece))
    }

    fn read_piece(&self, mut offset: u64, buf: &mut [u8]) -> Result<(), LayerError> {
        let budget = &mut Budget::new(buf.len() as u64);
        let mut plan = Plan::new(self);
        let mut wanted = Vec::new();
        let mut at = 0;
        while at < buf.len() {
            let piece = follow(self, offset..offset + (buf.len() - at) as u64, budget)?;
            let to = at..at + piece.len as usize;
            match piece.place {
                Place::Frame(place) => {
                    wanted.push((to.clone(), place.offset as usize));
                    plan.want(wanted.len() - 1, place, piece.len, budget)?;
                }
                other => other.read(&mut buf[to.clone()])?,
            }
            offset += piece.len;
            at = to.end;
        }
        plan.run(budget, |position, frame| {
            let (to, from) = wanted[position].clone();
            let len = to.len();
            buf[to].copy_from_slice(&frame[from..from + len]);
        })
    }

    /// The entry of a frame that another refers to.
    pub(super) fn referred(
        &self,
        id: u32,
        depth: u8,
        to: u32,
        reference: &Reference,
        budget: &mut Budget<'_>,
    ) -> Result<FrameEntry, LayerError> {
        let earlier = self.pages.frame(to, budget)?;
        let wrong = |why| Err(LayerError::Reference { frame: id, to, why });
        if earlier.depth >= depth {
            return wrong("whose depth is not below its own");
        }
        if reference.offset + u64::from(reference.len) > earlier.len.into() {
            return wrong("beyond its end");
        }
        Ok(earlier)
    }

    /// Says which layer failed, where it is another.
    pub(super) fn of_below(&self, layer: &Self, error: LayerError) -> LayerError {
        match error {
            error @ (LayerError::Spent(_) | LayerError::Below { .. }) => error,
            error if layer.number == self.number => error,
            error => LayerError::Below {
                target: layer.header().target,
                source: Box::new(error),
            },
        }
    }

    /// Decodes a frame, and checks its hash.
    pub(super) fn decode(
        &self,
        id: u32,
        frame: &Frame,
        references: &[u8],
    ) -> Result<Vec<u8>, LayerError> {
        if let Some(local) = self.local.as_ref().filter(|local| local.has(id)) {
            return drifted_or(local.read(id), id, frame);
        }
        let at = frame.pack_offset;
        let read_packed = |buf: &mut [u8]| {
            self.pack
                .read_exact_at(at, buf)
                .map_err(DecodeFailure::Pack)
        };
        let content = self
            .cache
            .with_decoder(|decoder| decoder.decode(frame, read_packed, references));
        content.map_err(|failure| match failure {
            DecodeFailure::Pack(source) => LayerError::Pack {
                frame: id,
                at,
                len: frame.pack_len,
                source,
            },
            DecodeFailure::Frame(fault) => LayerError::Frame {
                frame: id,
                at,
                fault,
            },
        })
    }
}

/// What local data has, if it is still the frame.
fn drifted_or(
    read: Result<Vec<u8>, ReadError>,
    id: u32,
    frame: &Frame,
) -> Result<Vec<u8>, LayerError> {
    match read {
        Ok(bytes) if FrameHash::of(&bytes) == frame.hash => Ok(bytes),
        Ok(_) => Err(LayerError::Drifted {
            frame: id,
            source: None,
        }),
        Err(error) => Err(LayerError::Drifted {
            frame: id,
            source: Some(Box::new(error)),
        }),
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

    fn is_zero(&self, range: Range<u64>) -> bool {
        let mut budget = Budget::question(&|| false);
        let Range { mut start, end } = range;
        while start < end {
            match follow(self, start..end, &mut budget) {
                Ok(piece) if matches!(piece.place, Place::Zeros) => start += piece.len,
                // Whoever reads what cannot be told will be told why.
                _ => return false,
            }
        }
        true
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(self.len(), offset, buf.len())?;
        self.read(offset, buf).map_err(|error| ReadError::Decode {
            offset,
            source: Box::new(error),
        })
    }

    fn as_layer(&self) -> Option<&LayerContent> {
        Some(self)
    }
}
