//! What a layer consists of, by its index alone: for plans, so that people see why so much is to be fetched.

use std::ops::AddAssign;

use capsule_proto::index::RunFrom;

use super::budget::Budget;
use super::cache::LayerCache;
use super::error::LayerError;
use super::pages::{Pages, PartFrom, Storage};
use super::read::ReadOptions;

/// Bytes of a layer by where they come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Content that is zero.
    pub zero: u64,
    /// Content that the parent has in the same place.
    pub inherited: u64,
    /// Content that a source has in another place.
    pub copied: u64,
    /// Content that frames hold.
    pub framed: u64,
    /// Bytes of the pack that refer to older content, or to other frames.
    pub referring: u64,
    /// Bytes of the pack that refer to nothing.
    pub new: u64,
}

impl Tally {
    /// Goes through an index, a page at a time.
    pub fn of(index: Storage) -> Result<Self, LayerError> {
        let LayerCache(cache) = LayerCache::new(&ReadOptions { cache_len: 0 });
        let pages = Pages::open(index, cache, 0)?;
        let mut tally = Self::default();
        let mut parts = pages.parts(0..pages.directory().header().target_size);
        // Each part may pay as a read of its own: the index's length bounds them all.
        while let Some(part) = parts.next(&mut Budget::new(0))? {
            *match part.from {
                PartFrom::Inherited => &mut tally.inherited,
                PartFrom::Mentioned(RunFrom::Zero) => &mut tally.zero,
                PartFrom::Mentioned(RunFrom::Copy { .. }) => &mut tally.copied,
                PartFrom::Mentioned(RunFrom::Frame { .. }) => &mut tally.framed,
            } += part.len();
        }
        pages.each_frame(|_, frame| {
            *match frame.references.is_empty() {
                true => &mut tally.new,
                false => &mut tally.referring,
            } += u64::from(frame.pack_len);
            Ok(())
        })?;
        Ok(tally)
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.zero += other.zero;
        self.inherited += other.inherited;
        self.copied += other.copied;
        self.framed += other.framed;
        self.referring += other.referring;
        self.new += other.new;
    }
}
