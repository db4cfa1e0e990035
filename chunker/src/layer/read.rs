//! Reading any range of a component through a layer.
//!
//! [`LayerContent`] decodes the frames that a range touches, checks each against its hash, and reads copies and inherited
//! ranges from the layer's sources, which may be layers' content themselves. Every length is checked against a bound of
//! the format before it is allocated, and all that one read leads to, in however many layers, is paid from one [`Budget`].
//! Reading all of a component in order is `restore`'s.

use std::ops::Range;
use std::sync::Arc;
use std::thread;

use capsule_proto::index::{Frame, IndexHeader, Reference, ReferenceTo, RunFrom};

pub use super::cache::LayerCache;
use super::cache::Shared;
use super::codec::FrameFault;
pub use super::error::LayerError;
use super::pages::{FrameEntry, Pages, Part, PartFrom, Parts, Storage};
use crate::content::{Budget, Content, Origin, ReadError, check_range, follow, read_through};

/// Frames decoded one for another on one stack: each takes some kilobytes, of the 2 MiB that a thread has.
const FRAMES_PER_STACK: u32 = 64;

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
}

impl LayerContent {
    /// Reads the directory of an index. `sources` are those that its header names, in that order; they should have the same
    /// cache.
    ///
    /// Index and pack may be partly there: what is missing fails with their error when it is wanted.
    pub fn open(
        index: Storage,
        pack: Storage,
        sources: Vec<Arc<dyn Content>>,
        cache: &LayerCache,
    ) -> Result<Self, LayerError> {
        let cache = cache.0.clone();
        let number = cache.number();
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
        })
    }

    /// What the layer leads from and to.
    pub fn header(&self) -> &IndexHeader {
        self.pages.directory().header()
    }

    /// What the component consists of, in order.
    pub(super) fn parts(&self, range: Range<u64>) -> Parts<'_> {
        self.pages.parts(range)
    }

    /// Reads a range; what it lies in need not be decoded beyond it, except frames.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), LayerError> {
        self.read_paying(offset, buf, &mut Budget::new(buf.len() as u64))
    }

    /// As [`LayerContent::read`], from the budget of a read that this is part of.
    pub(super) fn read_paying(
        &self,
        offset: u64,
        buf: &mut [u8],
        budget: &mut Budget<'_>,
    ) -> Result<(), LayerError> {
        let mut rest = buf;
        let mut parts = self.parts(offset..offset + rest.len() as u64);
        while let Some(part) = parts.next(budget)? {
            budget.step()?;
            let (now, later) = rest.split_at_mut(part.len() as usize);
            self.read_part(&part, now, budget)?;
            rest = later;
        }
        Ok(())
    }

    /// Fills a buffer as long as the part.
    fn read_part(
        &self,
        part: &Part,
        buf: &mut [u8],
        budget: &mut Budget<'_>,
    ) -> Result<(), LayerError> {
        match part.from {
            PartFrom::Inherited => self.read_source(0, part.range.start, buf, budget),
            PartFrom::Mentioned(RunFrom::Zero) => {
                buf.fill(0);
                Ok(())
            }
            PartFrom::Mentioned(RunFrom::Copy { source, offset }) => {
                self.read_source(source.into(), offset, buf, budget)
            }
            PartFrom::Mentioned(RunFrom::Frame { id, offset }) => {
                let frame = self.frame_for(part, id, offset, budget)?;
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
        budget: &mut Budget<'_>,
    ) -> Result<Arc<Vec<u8>>, LayerError> {
        let entry = self.pages.frame(id, budget)?;
        if u64::from(offset) + part.len() > entry.len.into() {
            return Err(LayerError::BeyondFrame {
                start: part.range.start,
                frame: id,
            });
        }
        self.frame(id, entry, budget)
    }

    /// Bytes of a source. Copies and references were checked against its size when they were parsed.
    fn read_source(
        &self,
        source_id: usize,
        offset: u64,
        buf: &mut [u8],
        budget: &mut Budget<'_>,
    ) -> Result<(), LayerError> {
        let failed = |error| match error {
            ReadError::Spent(spent) => spent.into(),
            error => LayerError::Source {
                source_id,
                source: Box::new(error),
            },
        };
        read_through(&*self.sources[source_id], offset, buf, budget).map_err(failed)
    }

    /// A decoded frame, kept or made. Waits only for frames with smaller ids, and for those of layers that were opened before
    /// this one, so readers never wait in a circle.
    fn frame(
        &self,
        id: u32,
        entry: FrameEntry,
        budget: &mut Budget<'_>,
    ) -> Result<Arc<Vec<u8>>, LayerError> {
        let key = (self.number, id.into());
        self.cache.frames.get(key, budget, |budget| {
            // Pages are not kept in memory for as long as this takes.
            let frame = entry.without_spans();
            drop(entry);
            let copied = references_len(&frame) as u64;
            budget.frame(u64::from(frame.len) + u64::from(frame.pack_len), copied)?;
            let depth = budget.descend()?;
            let made = if depth.is_multiple_of(FRAMES_PER_STACK) {
                on_another_stack(|| self.make(id, &frame, budget))
            } else {
                self.make(id, &frame, budget)
            };
            budget.ascend();
            made.map(|content| (content, frame.len as usize))
        })
    }

    fn make(&self, id: u32, frame: &Frame, budget: &mut Budget<'_>) -> Result<Vec<u8>, LayerError> {
        let mut held = 0;
        let references = self.references(id, frame, &mut held, budget);
        budget.release(held);
        self.decode(id, frame, &references?)
    }

    /// The content of a frame's references, one after another: 16 MiB at most, as the index was checked. Memory is taken as
    /// they come, and counted, as many frames may wait for each other in the middle of theirs.
    fn references(
        &self,
        id: u32,
        frame: &Frame,
        held: &mut u64,
        budget: &mut Budget<'_>,
    ) -> Result<Vec<u8>, LayerError> {
        let mut content = Vec::new();
        for reference in &frame.references {
            let start = content.len();
            content.resize(start + reference.len as usize, 0);
            let now = &mut content[start..];
            match reference.to {
                ReferenceTo::Source(source) => {
                    self.read_source(source.into(), reference.offset, now, budget)?
                }
                ReferenceTo::Frame(to) => {
                    self.read_reference(id, frame, to, reference, now, budget)?
                }
            }
            budget.hold(reference.len.into())?;
            *held += u64::from(reference.len);
        }
        Ok(content)
    }

    fn read_reference(
        &self,
        id: u32,
        frame: &Frame,
        to: u32,
        reference: &Reference,
        buf: &mut [u8],
        budget: &mut Budget<'_>,
    ) -> Result<(), LayerError> {
        budget.step()?;
        let earlier = self.pages.frame(to, budget)?;
        let wrong = |why| Err(LayerError::Reference { frame: id, to, why });
        // Depths fall from 8 to 0, which bounds the recursion within a layer.
        if earlier.depth >= frame.depth {
            return wrong("whose depth is not below its own");
        }
        if reference.offset + u64::from(reference.len) > earlier.len.into() {
            return wrong("beyond its end");
        }
        let content = self.frame(to, earlier, budget)?;
        let offset = reference.offset as usize;
        buf.copy_from_slice(&content[offset..offset + buf.len()]);
        Ok(())
    }

    fn decode(&self, id: u32, frame: &Frame, references: &[u8]) -> Result<Vec<u8>, LayerError> {
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

fn references_len(frame: &Frame) -> usize {
    let lens = frame
        .references
        .iter()
        .map(|reference| reference.len as usize);
    lens.sum()
}

/// Goes on where there is room for more calls.
fn on_another_stack<T: Send>(
    work: impl FnOnce() -> Result<T, LayerError> + Send,
) -> Result<T, LayerError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().stack_size(2 << 20);
        let thread = thread
            .spawn_scoped(scope, work)
            .map_err(LayerError::Stack)?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
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
        let mut budget = Budget::question();
        let Range { mut start, end } = range;
        while start < end {
            match follow(self, start..end, &mut budget) {
                Ok(found) if found.zero => start += found.len(),
                // Whoever reads what cannot be told will be told why.
                _ => return false,
            }
        }
        true
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        self.read_within(offset, buf, &mut Budget::new(buf.len() as u64))
    }

    fn read_within(
        &self,
        offset: u64,
        buf: &mut [u8],
        budget: &mut Budget<'_>,
    ) -> Result<(), ReadError> {
        check_range(self.len(), offset, buf.len())?;
        self.read_paying(offset, buf, budget)
            .map_err(|error| error.of_content(offset))
    }

    fn origin(&self, range: Range<u64>, budget: &mut Budget<'_>) -> Result<Origin<'_>, ReadError> {
        let start = range.start;
        let part = self.parts(range.clone()).next(budget);
        let Some(part) = part.map_err(|error| error.of_content(start))? else {
            return Ok(Origin::Own(range.end - range.start));
        };
        let len = part.len();
        Ok(match part.from {
            PartFrom::Mentioned(RunFrom::Zero) => Origin::Zeros(len),
            PartFrom::Mentioned(RunFrom::Frame { .. }) => Origin::Own(len),
            PartFrom::Mentioned(RunFrom::Copy { source, offset }) => {
                Origin::Of(&*self.sources[usize::from(source)], offset..offset + len)
            }
            PartFrom::Inherited => Origin::Of(&*self.sources[0], part.range),
        })
    }
}
