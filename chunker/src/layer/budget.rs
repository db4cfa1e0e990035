//! What one read may cost, whatever it leads through.
//!
//! A layer's sources may be layers' contents, and so on: without a bound over all of them, each that refers to many places of
//! the one below multiplies what a read costs. Whoever makes bytes pays from the budget of the read that wants them.

use capsule_proto::index::{Codec, Frame};
use thiserror::Error;

/// A longer read is read in pieces of this length, each with a budget of its own. One as long as this has twice what the
/// shortest has.
pub(super) const UNIT: u64 = 1 << 20;
/// Frames decoded. An honest chain of 256 layers, in each of which the same 8 MiB changed, needs 32 frames of 256 KiB of each
/// layer: 8192. Twice as many small ones take half a second; what is known of them takes at most 1.6 KiB each.
const FRAMES: u64 = 16_384;
/// Bytes decoded. That chain needs 3.5 GiB, with references of 1 MiB a frame. A core makes them in some 5 seconds.
const BYTES: u64 = 4 << 30;
/// Bytes decoded to answer where content is zero: nothing is, but looking up costs too. Some 0.1 seconds.
const QUESTION_BYTES: u64 = 256 << 20;
/// Looking up what a range is, in one layer: about a microsecond.
const STEP: u64 = 1 << 10;
/// A page of an index that is decoded: at most 1 MiB, mostly far less.
const PAGE: u64 = 512 << 10;
/// References are copied, not decoded.
const COPIED_PART: u64 = 8;
/// LZMA decodes content at a tenth of zstd's speed, and slower the more bytes it takes in the pack: a core makes or takes so little
/// in the time of `BYTES` that the worst read takes some 40 seconds. That chain at the highest effort still has enough.
const LZMA_CONTENT: u64 = 2;
const LZMA_PACKED: u64 = 16;
/// A patch of code has tables of its own, whatever its length.
const TABLES: u64 = 64 << 10;
/// Decoded frames that are held until the last that refers to them is made: of that chain, those of a few layers; and the most
/// that one frame refers to, 64 of 4 MiB.
const HELD: u64 = 384 << 20;
/// Whether to stop is asked after so much work.
const ASK_EVERY: u64 = 1 << 20;

/// Why a read was not done to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Spent {
    /// It takes more than honest content needs.
    #[error("one read takes {0}, more than any may: the layer is refused")]
    TooDear(&'static str),
    /// It was told to stop.
    #[error("cancelled")]
    Cancelled,
}

/// What is left for one read.
pub(super) struct Budget<'a> {
    frames: u64,
    bytes: u64,
    held: u64,
    unasked: u64,
    cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl Budget<'static> {
    /// For a read of so many bytes that nobody stops.
    pub fn new(len: u64) -> Self {
        Budget::until(len, &|| false)
    }
}

impl<'a> Budget<'a> {
    /// For a read of so many bytes that ends once the closure says so.
    pub fn until(len: u64, cancelled: &'a (dyn Fn() -> bool + Sync)) -> Self {
        let len = len.min(UNIT);
        Self {
            frames: FRAMES + len / (UNIT / FRAMES),
            bytes: BYTES + len * (BYTES / UNIT),
            held: HELD,
            unasked: 0,
            cancelled,
        }
    }

    /// For telling where content is zero, until the closure ends it.
    pub fn question(cancelled: &'a (dyn Fn() -> bool + Sync)) -> Self {
        Self {
            bytes: QUESTION_BYTES,
            ..Self::until(0, cancelled)
        }
    }

    /// Fails where the reader no longer waits.
    pub fn check(&self) -> Result<(), Spent> {
        match (self.cancelled)() {
            true => Err(Spent::Cancelled),
            false => Ok(()),
        }
    }

    /// Pays for looking up what a range is.
    pub fn step(&mut self) -> Result<(), Spent> {
        self.spend(STEP)
    }

    /// Pays for decoding a page of an index.
    pub fn page(&mut self) -> Result<(), Spent> {
        self.spend(PAGE)
    }

    /// Pays for decoding a frame: for the bytes that are read and made, and those that are copied for it.
    pub fn frame(&mut self, frame: &Frame) -> Result<(), Spent> {
        self.frames = self
            .frames
            .checked_sub(1)
            .ok_or(Spent::TooDear("too many frames"))?;
        let (content, packed, tables) = match frame.codec {
            Codec::Stored | Codec::Zstd | Codec::ZstdReferences | Codec::Difference => (1, 1, 0),
            Codec::Lzma | Codec::LzmaReferences | Codec::Patch => (LZMA_CONTENT, LZMA_PACKED, 0),
            Codec::CodePatch => (LZMA_CONTENT, LZMA_PACKED, TABLES),
        };
        let decoded = content * u64::from(frame.len) + packed * u64::from(frame.pack_len);
        self.spend(tables + decoded + references_len(frame) / COPIED_PART)
    }

    fn spend(&mut self, bytes: u64) -> Result<(), Spent> {
        self.bytes = self
            .bytes
            .checked_sub(bytes)
            .ok_or(Spent::TooDear("too much decoding"))?;
        self.unasked += bytes;
        if self.unasked >= ASK_EVERY {
            self.unasked = 0;
            self.check()?;
        }
        Ok(())
    }

    /// Notes a frame that stays in memory while more is made.
    pub fn hold(&mut self, bytes: u64) -> Result<(), Spent> {
        self.held = self
            .held
            .checked_sub(bytes)
            .ok_or(Spent::TooDear("too much memory"))?;
        Ok(())
    }

    /// It no longer does.
    pub fn release(&mut self, bytes: u64) {
        self.held += bytes;
    }
}

/// Bytes of a frame's references together.
pub(super) fn references_len(frame: &Frame) -> u64 {
    let lens = frame.references.iter();
    lens.map(|reference| u64::from(reference.len)).sum()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use capsule_proto::FrameHash;
    use capsule_proto::index::Codec;

    use super::*;

    fn frame(len: u32) -> Frame {
        Frame {
            pack_offset: 0,
            pack_len: len,
            len,
            codec: Codec::Stored,
            hash: FrameHash([0; 16]),
            depth: 0,
            references: Vec::new(),
            spans: Vec::new(),
        }
    }

    #[test]
    fn what_is_asked_for_pays() {
        let frames = |asked, len| {
            let mut budget = Budget::new(asked);
            (0..)
                .take_while(|_| budget.frame(&frame(len)).is_ok())
                .count() as u64
        };
        assert_eq!(frames(0, 1), FRAMES);
        assert_eq!(frames(UNIT, 1), 2 * FRAMES);
        assert_eq!(frames(9 * UNIT, 1), 2 * FRAMES);
        assert_eq!(frames(0, 16 << 20), BYTES / (32 << 20));
        assert_eq!(frames(UNIT, 16 << 20), 2 * BYTES / (32 << 20));
        let mut budget = Budget::new(0);
        let slow = Frame {
            codec: Codec::Patch,
            ..frame(16 << 20)
        };
        let slow = (0..).take_while(|_| budget.frame(&slow).is_ok()).count() as u64;
        assert_eq!(slow, BYTES / (18 * (16 << 20)));
    }

    #[test]
    fn stopping_is_noticed_within_a_megabyte_of_work() {
        let stop = AtomicBool::new(false);
        let cancelled = || stop.load(Ordering::Relaxed);
        let mut budget = Budget::until(0, &cancelled);
        budget.frame(&frame(10 << 20)).unwrap();
        stop.store(true, Ordering::Relaxed);
        let steps = (0..).take_while(|_| budget.step().is_ok()).count() as u64;
        assert!(steps <= ASK_EVERY / STEP, "{steps}");
    }

    #[test]
    fn what_is_held_is_bounded() {
        let mut budget = Budget::new(0);
        budget.hold(HELD).unwrap();
        assert!(matches!(budget.hold(1), Err(Spent::TooDear(_))));
        budget.release(HELD);
        budget.hold(1).unwrap();
    }
}
