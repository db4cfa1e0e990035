//! Finding in local content what the frames of a layer hold, so that it need not be fetched.
//!
//! The frame table of an index lists the hashes of what its frames hold, and of the spans inside them. Cuts follow the content, so
//! the same files on another disk, in another order, have mostly the same spans. [`Likeness`] notes which hashes are wanted, looks
//! for them in local data (by cutting and hashing it) and in layers that are held (by their own frame tables, without decoding
//! anything), and says for each layer which frames can be made of what was found ([`Local`]). The paper calls this hashing.
//!
//! Local data may change at any time: a frame that is made of it is checked against its hash like any other.

mod local;
mod scan;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use capsule_proto::index::Frame;
use capsule_proto::ranges::groups_touching;
use capsule_proto::{FrameHash, GroupRanges};

use crate::content::{Content, Progress, Source};
use crate::layer::Cuts;
use crate::layer::encode::EncodeError;
use crate::layer::read::{LayerContent, LayerError, Spent};
pub use local::Local;
pub(crate) use local::Piece;

/// Most hashes that are looked for: 2^22, about 300 MiB; 256 GiB of content. What lies beyond is fetched.
const MAX_WANTED: usize = 1 << 22;

/// Most layers in which something is found: each stays open until it is read.
const MAX_LAYERS: usize = 64;

/// Fails where nobody waits any more.
fn goes_on(progress: &dyn Progress) -> Result<(), LayerError> {
    match progress.cancelled() {
        true => Err(Spent::Cancelled.into()),
        false => Ok(()),
    }
}

/// The chunk groups that a frame lies in.
fn groups_of(frame: &Frame) -> Range<u64> {
    let end = frame.pack_offset + u64::from(frame.pack_len);
    groups_touching(&(frame.pack_offset..end))
}

fn lies_in(frame: &Frame, groups: &GroupRanges) -> bool {
    groups.contains_run(&groups_of(frame))
}

/// Where local data has something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a content.
    Content {
        /// Position among the local contents.
        source: u32,
        /// First byte.
        offset: u64,
    },
    /// In a frame of a layer that is held.
    Frame {
        /// Position among the layers.
        source: u32,
        id: u32,
        /// First byte in the decoded frame.
        offset: u32,
    },
}

/// What is wanted, and where it was found.
#[derive(Default)]
pub struct Likeness {
    wanted: HashMap<FrameHash, Option<Place>>,
    /// Longest frame of the layers, and their longest content: by these it was cut.
    frame_max: usize,
    size: u64,
    contents: Vec<Arc<dyn Content>>,
    layers: Vec<Arc<LayerContent>>,
}

impl Likeness {
    /// Nothing is wanted yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wants what a layer's frames hold. Its pack need not be there.
    pub fn want(
        &mut self,
        layer: &LayerContent,
        progress: &dyn Progress,
    ) -> Result<(), LayerError> {
        self.size = self.size.max(layer.header().target_size);
        layer.each_frame(|_, frame| {
            self.frame_max = self.frame_max.max(frame.len as usize);
            let spans = frame.spans.iter().map(|span| span.hash);
            for hash in spans.chain([frame.hash]) {
                if self.wanted.len() < MAX_WANTED {
                    self.wanted.entry(hash).or_default();
                }
            }
            goes_on(progress)
        })
    }

    /// Whether anything is wanted that was not found.
    pub fn is_open(&self) -> bool {
        self.wanted.values().any(Option::is_none)
    }

    /// Looks in a layer that is held, by its frame table. Where only some chunk groups of its pack are (`here`), in frames that
    /// lie in these and refer to nothing: what others refer to may be gone.
    pub fn look_in_layer(
        &mut self,
        held: &Arc<LayerContent>,
        here: Option<&GroupRanges>,
        progress: &dyn Progress,
    ) -> Result<(), LayerError> {
        if self.layers.len() >= MAX_LAYERS {
            return Ok(());
        }
        let source = self.layers.len() as u32;
        // Where a later page cannot be read, what was found before counts.
        self.layers.push(held.clone());
        let mut found = false;
        let looked = held.each_frame(|id, frame| {
            if here.is_some_and(|here| !frame.references.is_empty() || !lies_in(frame, here)) {
                return goes_on(progress);
            }
            let mut offset = 0;
            let spans = frame.spans.iter().map(|span| {
                let at = offset;
                offset += span.len;
                (span.hash, at)
            });
            for (hash, offset) in spans.chain([(frame.hash, 0)]) {
                found |= self.found(&hash, Place::Frame { source, id, offset });
            }
            goes_on(progress)
        });
        if !found {
            self.layers.pop();
        }
        looked
    }

    /// Looks in local content: reads all of it, on all cores.
    pub fn look_in(
        &mut self,
        content: Arc<dyn Source>,
        cuts: Cuts,
        progress: &dyn Progress,
    ) -> Result<(), EncodeError> {
        let source = self.contents.len() as u32;
        // Where a later part cannot be read, what was found before counts.
        self.contents.push(content.clone());
        let cutter = (cuts, self.size, self.frame_max);
        let mut found = false;
        let looked = scan::spans(&*content, cutter, progress, |hash, offset| {
            found |= self.found(hash, Place::Content { source, offset });
        });
        if !found {
            self.contents.pop();
        }
        looked
    }

    /// Notes a place, if it is the first.
    fn found(&mut self, hash: &FrameHash, place: Place) -> bool {
        match self.wanted.get_mut(hash) {
            Some(known @ None) => {
                *known = Some(place);
                true
            }
            _ => false,
        }
    }

    /// The frames of a layer that can be made of what was found, and the chunk groups of its pack that the others lie in.
    pub fn local(
        &self,
        layer: &LayerContent,
        progress: &dyn Progress,
    ) -> Result<(Local, GroupRanges), LayerError> {
        let mut local = Local::new(self.contents.clone(), self.layers.clone());
        let mut groups = GroupRanges::new();
        layer.each_frame(|id, frame| {
            let place = |hash: &FrameHash| self.wanted.get(hash).copied().flatten();
            let whole = place(&frame.hash).map(|place| {
                vec![Piece {
                    len: frame.len,
                    place,
                }]
            });
            let in_spans = || -> Option<Vec<Piece>> {
                let spans = frame.spans.iter().map(|span| {
                    let len = span.len;
                    place(&span.hash).map(|place| Piece { len, place })
                });
                spans.collect::<Option<_>>()
            };
            let pieces = whole.or_else(in_spans).filter(|pieces| !pieces.is_empty());
            match pieces {
                Some(pieces) if local.has_room(pieces.len()) => local.add(id, pieces),
                _ => {
                    groups.insert(groups_of(frame));
                }
            }
            goes_on(progress)
        })?;
        Ok((local, groups))
    }
}
