//! A component that is read through layers, as a source: to be encoded anew, in one layer from nothing.

use std::sync::Arc;

use super::budget::Budget;
use super::follow::{Place, follow};
use super::read::LayerContent;
use crate::content::{Content, Extent, Extents, Parts, ReadError, Source};

/// Stretches that were asked for one after another are handed on as one up to this length.
const EXTENT_LEN: u64 = 16 << 20;

/// Content through layers, and for a tree's contents the lengths of its files.
pub struct LayerSource {
    content: Arc<LayerContent>,
    parts: Option<Vec<u64>>,
}

impl LayerSource {
    /// Of a stream, or of a tree whose files have these lengths.
    pub fn new(content: Arc<LayerContent>, parts: Option<Vec<u64>>) -> Self {
        Self { content, parts }
    }

    /// The longest extent from a byte on, within bounds.
    fn extent(&self, start: u64) -> Result<Extent, ReadError> {
        let (end, mut at, mut kind) = (self.content.len(), start, None);
        while at < end && at - start < EXTENT_LEN {
            // Each pays for itself: there may be many in a long history.
            let budget = &mut Budget::question(&|| false);
            let piece = follow(&self.content, at..end, budget);
            let piece = piece.map_err(|error| ReadError::Decode {
                offset: at,
                source: Box::new(error),
            })?;
            let zero = matches!(piece.place, Place::Zeros);
            if *kind.get_or_insert(zero) != zero {
                break;
            }
            at += piece.len;
        }
        Ok(Extent {
            range: start..at,
            zero: kind == Some(true),
        })
    }
}

impl Content for LayerSource {
    fn len(&self) -> u64 {
        self.content.len()
    }

    fn is_zero(&self, range: std::ops::Range<u64>) -> bool {
        self.content.is_zero(range)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        self.content.read_at(offset, buf)
    }

    fn as_layer(&self) -> Option<&LayerContent> {
        Some(&self.content)
    }
}

impl Source for LayerSource {
    fn extents(&self) -> Extents<'_> {
        let mut at = 0;
        Box::new(std::iter::from_fn(move || {
            if at == self.len() {
                return None;
            }
            let extent = self.extent(at);
            at = extent
                .as_ref()
                .map_or(self.len(), |extent| extent.range.end);
            Some(extent)
        }))
    }

    fn parts(&self) -> Option<Parts<'_>> {
        let parts = self.parts.as_ref()?;
        Some(Box::new(parts.iter().copied()))
    }

    /// What is named by hash does not change.
    fn check_unchanged(&self) -> Result<(), ReadError> {
        Ok(())
    }
}
