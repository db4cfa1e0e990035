//! Free space of ext2, ext3 and ext4: one on-disk format with many options.
//!
//! `superblock` says how it is laid out and whether it was left in order; `groups` where its tables lie, and what its bitmaps
//! say is free; `journal` what an empty journal still holds. All of it is checked against checksums where there are any,
//! and against itself: the same number of free blocks must be found thrice, and no table may lie in free space.

mod groups;
mod journal;
mod superblock;

use std::ops::Range;

pub(super) use self::superblock::Raw;

use self::groups::Groups;
use self::superblock::Superblock;
use super::ranges::Gatherer;
use super::window::{Fault, Window};
use crate::content::{Progress, ReadError};

/// The superblock of a part of a disk, if it has one of a file system that can be mounted.
pub(super) fn probe(window: &Window<'_>) -> Result<Option<Raw>, ReadError> {
    Raw::read(window)
}

impl Raw {
    /// Whether it may be more than a remnant of bytes that look so by chance.
    pub fn is_plausible(&self, len: u64) -> bool {
        Superblock::parse(self, len).is_ok()
    }

    /// Gathers free ranges, in bytes of the disk. Gives the bytes that are free, and those of old content in the journal.
    pub fn free_space(
        &self,
        window: &Window<'_>,
        gatherer: &mut Gatherer,
        progress: &dyn Progress,
    ) -> Result<(u64, u64), Fault> {
        let superblock = Superblock::parse(self, window.len())?;
        superblock.check_clean()?;
        let groups = Groups::read(window, &superblock, progress)?;
        let mut add = |blocks: Range<u64>| {
            let byte = |block: u64| window.start() + block * superblock.block_size;
            gatherer.add(byte(blocks.start)..byte(blocks.end));
        };
        // First, as an entry in it means that all else is out of date.
        let journal = journal::old_content(window, &superblock, &groups)?;
        let free = groups.free(window, &superblock, progress, &mut add)?;
        let old = journal.iter().map(|run| run.end - run.start).sum::<u64>();
        journal.into_iter().for_each(add);
        Ok((free * superblock.block_size, old * superblock.block_size))
    }
}
