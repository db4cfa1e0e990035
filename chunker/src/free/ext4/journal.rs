//! What an empty journal still holds.
//!
//! A journal within the file system is a file of its own. Where it has nothing to be replayed, only its superblock counts;
//! the blocks after it, those for fast commits too, hold what was written long ago. Where anything about it is not as
//! it should be, it is left alone: that it is not understood does no harm.
//!
//! Sources: the kernel's `Documentation/filesystems/ext4`, `journal.rst`, `inodes.rst` and `ifork.rst`.

use std::ops::Range;

use super::super::checksum::crc32c;
use super::super::ranges::joined;
use super::super::window::{Fault, Window, u16_at, u32_at};
use super::groups::Groups;
use super::superblock::{Checksums, Superblock};

const JOURNAL_MAGIC: u32 = 0xc03b_3998;
const EXTENTS_FLAG: u32 = 0x8_0000;
const EXTENT_MAGIC: u16 = 0xf30a;
/// The deepest that extents go.
const MAX_DEPTH: u16 = 5;
/// Most blocks of a journal (64 GiB of 4 KiB), and of its maps; journals have at most about 10,000,000.
const MAX_BLOCKS: u64 = 1 << 24;
const MAX_MAPS: u32 = 1 << 16;
/// Within an inode: its map of blocks, and the two halves of its checksum.
const MAP_AT: usize = 0x28;
const CHECKSUM_LOW: usize = 0x7c;
const CHECKSUM_HIGH: usize = 0x82;

/// The blocks of the journal that hold nothing of use, in order.
pub(super) fn old_content(
    window: &Window<'_>,
    superblock: &Superblock,
    groups: &Groups,
) -> Result<Vec<Range<u64>>, Fault> {
    let Some(number) = superblock.journal else {
        return Ok(Vec::new());
    };
    let Some(runs) = Inode::read(window, superblock, groups, number)?
        .map(|inode| inode.blocks(window, superblock))
        .transpose()?
        .flatten()
    else {
        return Ok(Vec::new());
    };
    let right = |run: &Range<u64>| {
        run.start >= superblock.first_block
            && run.end <= superblock.blocks
            && !groups.are_tables(run)
    };
    let total: u64 = runs.iter().map(|run| run.end - run.start).sum();
    let Some(first) = runs.first().filter(|_| runs.iter().all(right)) else {
        return Ok(Vec::new());
    };
    let mut head = [0; 1024];
    window.read(first.start * superblock.block_size, &mut head)?;
    let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("4 bytes"));
    let (magic, kind, block_size) = (word(0), word(4), u64::from(word(0xc)));
    if magic != JOURNAL_MAGIC || !matches!(kind, 3 | 4) || block_size != superblock.block_size {
        return Ok(Vec::new());
    }
    let (length, start, begin, error) = (
        u64::from(word(0x10)),
        word(0x1c),
        u64::from(word(0x14)),
        word(0x20),
    );
    if start != 0 {
        return Err(Fault::Dirty("has a journal that is not empty"));
    }
    if error != 0 {
        return Err(Fault::Dirty("has a journal that notes an error"));
    }
    if length > total || begin == 0 {
        return Ok(Vec::new());
    }
    let old = joined(cut(&runs, begin, length));
    // Blocks that it has twice.
    let distinct: u64 = old.iter().map(|run| run.end - run.start).sum();
    Ok(if distinct == length.saturating_sub(begin) {
        old
    } else {
        Vec::new()
    })
}

/// Runs from one block of a file up to another.
fn cut(runs: &[Range<u64>], begin: u64, end: u64) -> Vec<Range<u64>> {
    let mut at = 0;
    let mut found = Vec::new();
    for run in runs {
        let next = at + (run.end - run.start);
        let (from, to) = (begin.max(at), end.min(next));
        if from < to {
            found.push(run.start + (from - at)..run.start + (to - at));
        }
        at = next;
    }
    found
}

/// The journal's inode.
struct Inode {
    raw: Vec<u8>,
    /// Seed of the checksums of its extents, where they have any.
    seed: Option<u32>,
}

impl Inode {
    /// Reads an inode; none where it is not as its checksum says, or not that of a journal.
    fn read(
        window: &Window<'_>,
        superblock: &Superblock,
        groups: &Groups,
        number: u32,
    ) -> Result<Option<Self>, Fault> {
        let Some(at) = groups.inode_at(superblock, number) else {
            return Ok(None);
        };
        let mut raw = vec![0; superblock.inode_size as usize];
        window.read(at, &mut raw)?;
        let seed = match superblock.checksums {
            Checksums::Crc32c(seed) => {
                let seed = crc32c(seed, &number.to_le_bytes());
                Some(crc32c(seed, &raw[0x64..0x68]))
            }
            _ => None,
        };
        if seed.is_some_and(|seed| !has_right_checksum(&raw, seed)) {
            return Ok(None);
        }
        if let Some(backup) = superblock.journal_backup {
            let same = backup[..60] == raw[MAP_AT..MAP_AT + 60]
                && backup[60..64] == raw[0x6c..0x70]
                && backup[64..] == raw[0x4..0x8];
            if !same {
                return Ok(None);
            }
        }
        Ok(Some(Self { raw, seed }))
    }

    /// Its runs of blocks, from its begin without a hole; none where there is one, or they are too many.
    fn blocks(
        &self,
        window: &Window<'_>,
        superblock: &Superblock,
    ) -> Result<Option<Vec<Range<u64>>>, Fault> {
        let size = u64::from(u32_at(&self.raw, 0x4)) | u64::from(u32_at(&self.raw, 0x6c)) << 32;
        let blocks = size / superblock.block_size;
        if !(2..=MAX_BLOCKS).contains(&blocks) {
            return Ok(None);
        }
        let mut map = Map {
            window,
            superblock,
            seed: self.seed,
            wanted: blocks,
            found: 0,
            runs: Vec::new(),
            maps: 0,
        };
        let root = &self.raw[MAP_AT..MAP_AT + 60];
        let whole = if u32_at(&self.raw, 0x20) & EXTENTS_FLAG != 0 {
            map.extents(root, None)?
        } else {
            map.pointers(root)?
        };
        Ok((whole && map.found == blocks).then_some(map.runs))
    }
}

fn has_right_checksum(raw: &[u8], seed: u32) -> bool {
    let mut bare = raw.to_vec();
    bare[CHECKSUM_LOW..CHECKSUM_LOW + 2].fill(0);
    let mut expected = u32::from(u16_at(raw, CHECKSUM_LOW));
    let has_high = raw.len() > 128 && u16_at(raw, 0x80) >= 4;
    if has_high {
        bare[CHECKSUM_HIGH..CHECKSUM_HIGH + 2].fill(0);
        expected |= u32::from(u16_at(raw, CHECKSUM_HIGH)) << 16;
    }
    let found = crc32c(seed, &bare);
    if has_high {
        found == expected
    } else {
        found & 0xffff == expected
    }
}

/// A file's map of blocks, as it is read. Each step says whether it is as it should be.
struct Map<'a> {
    window: &'a Window<'a>,
    superblock: &'a Superblock,
    seed: Option<u32>,
    wanted: u64,
    /// Blocks found so far; the next must be of this number.
    found: u64,
    runs: Vec<Range<u64>>,
    /// Blocks of the map that were read.
    maps: u32,
}

impl Map<'_> {
    fn add(&mut self, start: u64, len: u64) -> bool {
        let len = len.min(self.wanted - self.found);
        let Some(end) = start.checked_add(len).filter(|_| start != 0) else {
            return false;
        };
        self.found += len;
        match self.runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ if len > 0 => self.runs.push(start..end),
            _ => {}
        }
        true
    }

    /// A block of the map; none where the file system has no such block, or it is one too many.
    fn read(&mut self, block: u64) -> Result<Option<Vec<u8>>, Fault> {
        self.maps += 1;
        if self.maps > MAX_MAPS || block == 0 || block >= self.superblock.blocks {
            return Ok(None);
        }
        let mut bytes = vec![0; self.superblock.block_size as usize];
        self.window
            .read(block * self.superblock.block_size, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// A node of a tree of extents, of a depth where it is not the root.
    fn extents(&mut self, node: &[u8], expected: Option<u16>) -> Result<bool, Fault> {
        let (count, max, depth) = (u16_at(node, 2), u16_at(node, 4), u16_at(node, 6));
        let end = 12 + 12 * usize::from(count);
        let right = u16_at(node, 0) == EXTENT_MAGIC
            && depth <= MAX_DEPTH
            && expected.is_none_or(|expected| expected == depth)
            && count <= max
            && end <= node.len();
        if !right || !self.is_as_written(node, expected.is_some(), max) {
            return Ok(false);
        }
        for entry in node[12..end].chunks_exact(12) {
            if u64::from(u32_at(entry, 0)) != self.found {
                return Ok(false);
            }
            let whole = if depth == 0 {
                let start = u64::from(u32_at(entry, 8)) | u64::from(u16_at(entry, 6)) << 32;
                let len = u16_at(entry, 4);
                // Longer ones are not written yet.
                (1..=1 << 15).contains(&len) && self.add(start, len.into())
            } else {
                let block = u64::from(u32_at(entry, 4)) | u64::from(u16_at(entry, 8)) << 32;
                match self.read(block)? {
                    Some(child) => self.extents(&child, Some(depth - 1))?,
                    None => false,
                }
            };
            if !whole {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether a node in a block of its own has the right checksum; the root is protected with its inode.
    fn is_as_written(&self, node: &[u8], is_block: bool, max: u16) -> bool {
        let Some(seed) = self.seed.filter(|_| is_block) else {
            return true;
        };
        let at = 12 + 12 * usize::from(max);
        node.len() >= at + 4 && crc32c(seed, &node[..at]) == u32_at(node, at)
    }

    /// The map of ext2 and ext3: twelve blocks, then maps of one, two and three levels.
    fn pointers(&mut self, root: &[u8]) -> Result<bool, Fault> {
        for (index, pointer) in root.chunks_exact(4).enumerate() {
            if self.found == self.wanted {
                return Ok(true);
            }
            let level = index.saturating_sub(11);
            if !self.pointer(u32_at(pointer, 0).into(), level)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn pointer(&mut self, block: u64, level: usize) -> Result<bool, Fault> {
        if level == 0 {
            return Ok(self.add(block, 1));
        }
        let Some(map) = self.read(block)? else {
            return Ok(false);
        };
        for pointer in map.chunks_exact(4) {
            if self.found == self.wanted {
                return Ok(true);
            }
            if !self.pointer(u32_at(pointer, 0).into(), level - 1)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
