//! Following a range through the layers that it is inherited or copied through, down to what has its bytes.
//!
//! A loop, not a recursion, as chains of layers are long: what it costs grows with their length, whatever else they refer to.

use std::ops::Range;

use capsule_proto::index::RunFrom;

use super::budget::Budget;
use super::error::LayerError;
use super::pages::PartFrom;
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
    Frame {
        layer: &'a LayerContent,
        id: u32,
        offset: u32,
        /// First byte in that layer's component.
        start: u64,
    },
    /// A source that is not read through a layer.
    Source {
        layer: &'a LayerContent,
        source_id: usize,
        offset: u64,
    },
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
                let place = Place::Frame {
                    layer,
                    id,
                    offset,
                    start,
                };
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
