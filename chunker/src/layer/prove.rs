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
use capsule_proto::{FrameHash, GROUP_LEN, GroupRanges};

use super::budget::{Budget, Spent};
use super::codec::FrameFault;
use super::error::LayerError;
use super::pages::PartFrom;
use super::read::LayerContent;
use crate::content::Progress;

/// Most frames of which it is kept whether they were compared, in 4 MiB: at the default length, those of 64 GiB.
const MAX_FRAMES: usize = 1 << 18;

/// Frames of a pack, and which of them were not compared with their hashes yet.
#[derive(Clone, Debug)]
pub struct Unproved {
    /// All of them, as they lie.
    frames: Vec<Lying>,
    /// A bit for each.
    proved: Vec<u64>,
    /// Bytes of those that were not.
    left: u64,
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
    /// Whether reading through this layer gives its pack as it lies, by the index alone. Whoever has verified the pack then knows the
    /// content; whether the frames' hashes are right is another question.
    pub fn is_its_pack(&self) -> Result<bool, LayerError> {
        self.each_lying(|_| true)
    }

    /// The frames of a layer that gives its pack as it lies. None also where there are too many of them.
    pub fn unproved(&self) -> Result<Option<Unproved>, LayerError> {
        let mut frames: Vec<Lying> = Vec::new();
        let is_its_pack = self.each_lying(|frame| {
            // Runs may split one.
            if frames.last().is_none_or(|last| last.id != frame.id) {
                frames.push(frame);
            }
            frames.len() <= MAX_FRAMES
        });
        let left = frames.iter().map(|frame| u64::from(frame.len)).sum();
        Ok(is_its_pack?.then(|| Unproved {
            proved: vec![0; frames.len().div_ceil(64)],
            frames,
            left,
        }))
    }

    /// Goes through what lies in the pack as it is, in order; false where something does not, or `each` says so.
    fn each_lying(&self, mut each: impl FnMut(Lying) -> bool) -> Result<bool, LayerError> {
        let mut parts = self.parts(0..self.header().target_size);
        // Each part may pay as a read of its own: the index's length bounds them all.
        while let Some(part) = parts.next(&mut Budget::new(0))? {
            let PartFrom::Mentioned(RunFrom::Frame { id, offset }) = part.from else {
                return Ok(false);
            };
            let frame = self.pages().frame(id, &mut Budget::new(0))?;
            let (at, end) = (u64::from(offset), u64::from(offset) + part.len());
            let lies_there = frame.codec == Codec::Stored
                && end <= frame.len.into()
                && frame.pack_offset.checked_add(at) == Some(part.range.start);
            let lying = Lying {
                at: frame.pack_offset,
                len: frame.len,
                id,
            };
            if !lies_there || !each(lying) {
                return Ok(false);
            }
        }
        Ok(true)
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
    /// Bytes of frames that were not compared yet.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Compares frames all of which is `here`, a part of them `fresh`, in groups of the pack, on so many threads, until it is as many bytes; says how
    /// many it was. Where it fails, none of them counts as compared.
    pub fn prove(
        &mut self,
        content: &LayerContent,
        (here, fresh): (&GroupRanges, &GroupRanges),
        most: u64,
        threads: NonZeroUsize,
        progress: &dyn Progress,
    ) -> Result<u64, LayerError> {
        let now = self.choose(here, fresh, most);
        let next = AtomicUsize::new(0);
        let work = || {
            let mut bytes = Vec::new();
            while let Some(at) = now.get(next.fetch_add(1, Ordering::Relaxed)) {
                if progress.cancelled() {
                    return Err(LayerError::from(Spent::Cancelled));
                }
                let frame = &self.frames[*at];
                if let Err(error) = content.prove(frame, &mut bytes) {
                    // That is enough for all of them.
                    next.store(now.len(), Ordering::Relaxed);
                    return Err(error);
                }
                progress.written(frame.len.into());
            }
            Ok(())
        };
        thread::scope(|scope| {
            let others = threads.get().min(now.len()).saturating_sub(1);
            let others: Vec<_> = (0..others).map(|_| scope.spawn(work)).collect();
            let own = work();
            let joined = others.into_iter().map(|other| {
                other
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            // All of them, whichever failed.
            joined.fold(own, Result::and)
        })?;
        let mut bytes = 0;
        for at in now {
            self.proved[at / 64] |= 1 << (at % 64);
            bytes += u64::from(self.frames[at].len);
        }
        self.left -= bytes;
        Ok(bytes)
    }

    /// The places of frames to be compared next.
    fn choose(&self, here: &GroupRanges, fresh: &GroupRanges, most: u64) -> Vec<usize> {
        let (mut chosen, mut len) = (Vec::new(), 0);
        for run in fresh.runs() {
            let bytes = run.start.saturating_mul(GROUP_LEN)..run.end.saturating_mul(GROUP_LEN);
            let first = |frame: &Lying| frame.bytes().end <= bytes.start;
            let first = self.frames.partition_point(first);
            for (at, frame) in self.frames.iter().enumerate().skip(first) {
                if frame.at >= bytes.end || len >= most {
                    break;
                }
                let is_proved = self.proved[at / 64] & 1 << (at % 64) != 0;
                // It may reach into the next run, too.
                let is_chosen = chosen.last() == Some(&at);
                if !is_proved && !is_chosen && here.contains_run(&groups_touching(&frame.bytes())) {
                    chosen.push(at);
                    len += u64::from(frame.len);
                }
            }
        }
        chosen
    }
}
