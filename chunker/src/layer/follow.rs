//! Following a range through the layers that it is inherited or copied through, down to what has its bytes.
//!
//! A loop, not a recursion, as chains of layers are long: what it costs grows with their length, whatever else they refer to.

use std::ops::Range;

use capsule_proto::index::RunFrom;

use super::budget::Budget;
use super::error::LayerError;
use super::pages::{FrameEntry, PartFrom};
use super::read::LayerContent;
use crate::content::Content;

/// The first bytes of a range, and what has them.
pub(super) struct Piece<'a> {
    pub len: u64,
    pub place: Place<'a>,
}

/// What has bytes of a component.
pub(super) enum Place<'a> {
    Zeros,
    Frame(FramePlace<'a>),
    /// A source that is not read through a layer.
    Source {
        layer: &'a LayerContent,
        source_id: usize,
        offset: u64,
    },
}

/// Part of a frame.
#[derive(Clone, Copy)]
pub(super) struct FramePlace<'a> {
    pub layer: &'a LayerContent,
    pub id: u32,
    /// First byte in the frame.
    pub offset: u32,
    /// First byte in that layer's component.
    pub start: u64,
}

impl<'a> FramePlace<'a> {
    /// The frame's entry, if it has so many bytes there.
    pub fn entry(&self, len: u64, budget: &mut Budget<'_>) -> Result<FrameEntry, LayerError> {
        let entry = self.layer.pages().frame(self.id, budget)?;
        if u64::from(self.offset) + len > entry.len.into() {
            return Err(LayerError::BeyondFrame {
                start: self.start,
                frame: self.id,
            });
        }
        Ok(entry)
    }
}

impl Place<'_> {
    /// Fills a buffer from what is not in a frame. Copies and references were checked against their source's size when they
    /// were parsed.
    pub fn read(self, buf: &mut [u8]) -> Result<(), LayerError> {
        match self {
            Self::Zeros => {
                buf.fill(0);
                Ok(())
            }
            Self::Source {
                layer,
                source_id,
                offset,
            } => {
                let read = layer.source(source_id).read_at(offset, buf);
                read.map_err(|source| LayerError::Source {
                    source_id,
                    source: Box::new(source),
                })
            }
            Self::Frame(_) => unreachable!("frames are decoded"),
        }
    }
}

/// Follows the first bytes of a range of a layer's component, which is not empty.
pub(super) fn follow<'a>(
    top: &'a LayerContent,
    mut range: Range<u64>,
    budget: &mut Budget<'_>,
) -> Result<Piece<'a>, LayerError> {
    let mut layer = top;
    loop {
        budget.step()?;
        let part = layer.parts(range.clone()).next(budget);
        let part = part.map_err(|error| top.of_below(layer, error))?;
        let part = part.expect("a range that is not empty begins with a part");
        let (len, start) = (part.len(), part.range.start);
        let (source_id, offset) = match part.from {
            PartFrom::Mentioned(RunFrom::Zero) => {
                let place = Place::Zeros;
                return Ok(Piece { len, place });
            }
            PartFrom::Mentioned(RunFrom::Frame { id, offset }) => {
                let place = Place::Frame(FramePlace {
                    layer,
                    id,
                    offset,
                    start,
                });
                return Ok(Piece { len, place });
            }
            PartFrom::Mentioned(RunFrom::Copy { source, offset }) => (source.into(), offset),
            PartFrom::Inherited => (0, start),
        };
        range = offset..offset + len;
        match enter(layer, source_id, range.clone()) {
            Ok(below) => layer = below,
            Err(place) => return Ok(Piece { len, place }),
        }
    }
}

/// Follows the first bytes of a range of one of a layer's sources.
pub(super) fn follow_source<'a>(
    layer: &'a LayerContent,
    source_id: usize,
    range: Range<u64>,
    budget: &mut Budget<'_>,
) -> Result<Piece<'a>, LayerError> {
    let len = range.end - range.start;
    match enter(layer, source_id, range.clone()) {
        Ok(below) => {
            let piece = follow(below, range, budget);
            piece.map_err(|error| layer.of_below(below, error))
        }
        Err(place) => Ok(Piece { len, place }),
    }
}

/// The layer that a source is read through, or else what has the range.
fn enter<'a>(
    layer: &'a LayerContent,
    source_id: usize,
    range: Range<u64>,
) -> Result<&'a LayerContent, Place<'a>> {
    let content: &dyn Content = layer.source(source_id);
    match content.as_layer() {
        Some(below) => Ok(below),
        None if content.is_zero(range.clone()) => Err(Place::Zeros),
        None => Err(Place::Source {
            layer,
            source_id,
            offset: range.start,
        }),
    }
}
