//! Comparing frames with their hashes, where a layer's pack is its component as it lies.
//!
//! Whoever has verified the pack then knows the component; but the frames' hashes are their publisher's word, which later versions rest
//! on. Each of these frames lies alone, so that they can be compared while the pack comes.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use capsule_proto::index::{Codec, RunFrom};
use capsule_proto::ranges::groups_touching;
use capsule_proto::{FrameHash, GroupRanges};

use super::budget::{Budget, Spent};
use super::codec::FrameFault;
use super::error::LayerError;
use super::pages::PartFrom;
use super::read::LayerContent;
use crate::content::Progress;

/// Most frames of which it is kept whether they were compared, in 16 MiB: at the default length, those of 256 GiB.
const MAX_FRAMES: usize = 1 << 20;

/// Frames of a pack that were not compared with their hashes yet.
#[derive(Clone, Debug)]
pub struct Unproved {
    frames: Vec<Lying>,
}

/// A frame that lies in its pack as it is.
#[derive(Clone, Copy, Debug)]
struct Lying {
    at: u64,
    len: u32,
    id: u32,
}

impl Lying {
    fn bytes(&self) -> Range<u64> {
        self.at..self.at + u64::from(self.len)
    }
}

impl LayerContent {
    /// All of its frames, if by the index alone reading through this layer gives its pack as it lies. None also where there are too
    /// many of them.
    pub fn unproved(&self) -> Result<Option<Unproved>, LayerError> {
        let mut parts = self.parts(0..self.header().target_size);
        let mut frames: Vec<Lying> = Vec::new();
        // Each part may pay as a read of its own: the index's length bounds them all.
        while let Some(part) = parts.next(&mut Budget::new(0))? {
            let PartFrom::Mentioned(RunFrom::Frame { id, offset }) = part.from else {
                return Ok(None);
            };
            let frame = self.pages().frame(id, &mut Budget::new(0))?;
            let (at, end) = (u64::from(offset), u64::from(offset) + part.len());
            let lies_there = frame.codec == Codec::Stored
                && end <= frame.len.into()
                && frame.pack_offset.checked_add(at) == Some(part.range.start);
            if !lies_there || frames.len() == MAX_FRAMES {
                return Ok(None);
            }
            // Runs may split one.
            if frames.last().is_none_or(|last| last.id != id) {
                frames.push(Lying {
                    at: frame.pack_offset,
                    len: frame.len,
                    id,
                });
            }
        }
        Ok(Some(Unproved { frames }))
    }

    fn prove(&self, frame: &Lying, bytes: &mut Vec<u8>) -> Result<(), LayerError> {
        let Lying { at, len, id } = *frame;
        bytes.resize(len as usize, 0);
        let read = self.pack().read_exact_at(at, bytes);
        read.map_err(|source| LayerError::Pack {
            frame: id,
            at,
            len,
            source,
        })?;
        let expected = self.pages().frame(id, &mut Budget::new(0))?.hash;
        let found = FrameHash::of(bytes);
        if found == expected {
            return Ok(());
        }
        Err(LayerError::Frame {
            frame: id,
            at,
            fault: FrameFault::Hash { expected, found },
        })
    }
}

impl Unproved {
    /// Whether all frames were compared.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Compares frames that lie in these groups of the pack, on so many threads, until it is as many bytes; says how many it was.
    /// Where it fails, none of them counts as compared.
    pub fn prove(
        &mut self,
        content: &LayerContent,
        groups: &GroupRanges,
        most: u64,
        threads: NonZeroUsize,
        progress: &dyn Progress,
    ) -> Result<u64, LayerError> {
        let mut len = 0;
        let (now, later): (Vec<Lying>, Vec<Lying>) = self.frames.iter().partition(|frame| {
            let taken = len < most && groups.contains_run(&groups_touching(&frame.bytes()));
            len += if taken { frame.len.into() } else { 0 };
            taken
        });
        let next = AtomicUsize::new(0);
        let work = || {
            let mut bytes = Vec::new();
            while let Some(frame) = now.get(next.fetch_add(1, Ordering::Relaxed)) {
                if progress.cancelled() {
                    return Err(LayerError::from(Spent::Cancelled));
                }
                content.prove(frame, &mut bytes)?;
                progress.written(frame.len.into());
            }
            Ok(())
        };
        thread::scope(|scope| {
            let others = threads.get().min(now.len()).saturating_sub(1);
            let others: Vec<_> = (0..others).map(|_| scope.spawn(work)).collect();
            let here = work();
            let joined = others.into_iter().map(|other| {
                other
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            // All of them, whichever failed.
            joined.fold(here, Result::and)
        })?;
        self.frames = later;
        Ok(len)
    }
}
