//! Block groups: where their tables lie, and what is free in them.
//!
//! Sources: the kernel's `Documentation/filesystems/ext4`, `group_descr.rst` and `bitmaps.rst`; `ext4_group_desc_csum`,
//! `ext4_num_base_meta_blocks` and `ext4_validate_block_bitmap` for what these leave open.

use std::ops::Range;

use super::super::checksum::{crc16, crc32c};
use super::super::ranges::{first_after, joined, overlaps};
use super::super::window::{Fault, Window, u16_at, u32_at};
use super::superblock::{Checksums, Superblock};
use crate::content::Progress;

/// The group's block bitmap was never written: all but tables is free.
const BLOCK_UNINIT: u16 = 2;
/// Place of a descriptor's own checksum.
const CHECKSUM_AT: usize = 0x1e;

/// What is needed of a group's descriptor.
#[derive(Debug)]
struct Group {
    block_bitmap: u64,
    inode_table: u64,
    /// Clusters.
    free: u32,
    bitmap_checksum: u32,
    uninit: bool,
}

/// All groups of a file system.
pub(super) struct Groups {
    list: Vec<Group>,
    /// Blocks that hold tables, in order.
    tables: Vec<Range<u64>>,
}

impl Groups {
    /// Reads all descriptors, and checks what they say.
    pub fn read(
        window: &Window<'_>,
        superblock: &Superblock,
        progress: &dyn Progress,
    ) -> Result<Self, Fault> {
        let mut list = Vec::with_capacity(superblock.groups as usize);
        let mut tables = Vec::new();
        let mut block = vec![0; superblock.block_size as usize];
        let per_block = superblock.descriptors_per_block();
        let inode_blocks =
            (superblock.inodes_per_group * superblock.inode_size).div_ceil(superblock.block_size);
        for number in 0..superblock.groups {
            if number % per_block == 0 {
                if progress.cancelled() {
                    return Err(Fault::Cancelled);
                }
                let at = superblock.descriptor_block(number / per_block);
                window.read(at * superblock.block_size, &mut block)?;
            }
            let at = (number % per_block * superblock.descriptor_size) as usize;
            let raw = &block[at..][..superblock.descriptor_size as usize];
            check_descriptor(superblock, number, raw)?;
            let (group, inode_bitmap) = Group::parse(superblock, raw);
            let start = superblock.group_start(number);
            let base = superblock.base_blocks(number);
            for (start, len) in [
                (start, base.min(superblock.group_end(number) - start)),
                (group.block_bitmap, 1),
                (inode_bitmap, 1),
                (group.inode_table, inode_blocks),
            ] {
                let end = start
                    .checked_add(len)
                    .filter(|end| *end <= superblock.blocks);
                let Some(end) = end.filter(|_| start >= superblock.first_block) else {
                    return Err(Fault::Damaged(format!(
                        "group {number} says that a table of it lies at block {start}"
                    )));
                };
                if len > 0 {
                    add_table(&mut tables, start..end);
                }
            }
            list.push(group);
        }
        Ok(Self {
            list,
            tables: joined(tables),
        })
    }

    /// Where an inode lies, in bytes of the file system.
    pub fn inode_at(&self, superblock: &Superblock, number: u32) -> Option<u64> {
        let index = u64::from(number).checked_sub(1)?;
        let group = self
            .list
            .get((index / superblock.inodes_per_group) as usize)?;
        let within = index % superblock.inodes_per_group * superblock.inode_size;
        Some(group.inode_table * superblock.block_size + within)
    }

    /// Whether blocks hold tables.
    pub fn are_tables(&self, blocks: &Range<u64>) -> bool {
        overlaps(&self.tables, blocks)
    }

    /// Tells all free blocks, in order. Gives their number.
    pub fn free(
        &self,
        window: &Window<'_>,
        superblock: &Superblock,
        progress: &dyn Progress,
        each: &mut dyn FnMut(Range<u64>),
    ) -> Result<u64, Fault> {
        let mut bitmap = vec![0; superblock.block_size as usize];
        let mut free = 0;
        for (number, group) in (0..).zip(&self.list) {
            if progress.cancelled() {
                return Err(Fault::Cancelled);
            }
            let start = superblock.group_start(number);
            let blocks = start..superblock.group_end(number);
            let clusters = (blocks.end - start).div_ceil(superblock.cluster);
            let mut count = 0;
            let mut tell = |run: Range<u64>| {
                count += run.end - run.start;
                let block = |cluster: u64| start + cluster * superblock.cluster;
                block(run.start)..block(run.end).min(blocks.end)
            };
            if group.uninit {
                for run in self.without_tables(superblock, &blocks, clusters) {
                    each(tell(run));
                }
            } else {
                window.read(group.block_bitmap * superblock.block_size, &mut bitmap)?;
                group.check_bitmap(superblock, number, &bitmap)?;
                for run in Zeros::of(&bitmap, clusters) {
                    let run = tell(run);
                    if self.are_tables(&run) {
                        return Err(Fault::Damaged(format!(
                            "group {number} says that blocks are free where tables lie"
                        )));
                    }
                    each(run);
                }
            }
            if count != u64::from(group.free) {
                return Err(Fault::Damaged(format!(
                    "group {number} has {count} free clusters, and its descriptor says {}",
                    group.free
                )));
            }
            free += count;
        }
        let free = free * superblock.cluster;
        if free != superblock.free_blocks {
            return Err(Fault::Damaged(format!(
                "{free} blocks are free, and its superblock says {}",
                superblock.free_blocks
            )));
        }
        Ok(free)
    }

    /// The clusters of a group in which no tables lie.
    fn without_tables(
        &self,
        superblock: &Superblock,
        blocks: &Range<u64>,
        clusters: u64,
    ) -> Vec<Range<u64>> {
        let mut free = Vec::new();
        let mut at = 0;
        for table in &self.tables[first_after(&self.tables, blocks.start)..] {
            if table.start >= blocks.end {
                break;
            }
            let first = table.start.saturating_sub(blocks.start) / superblock.cluster;
            if first > at {
                free.push(at..first);
            }
            at = at.max((table.end - blocks.start).div_ceil(superblock.cluster));
        }
        if at < clusters {
            free.push(at..clusters);
        }
        free
    }
}

/// Neighbours are joined at once: with flex_bg most are.
fn add_table(tables: &mut Vec<Range<u64>>, table: Range<u64>) {
    let recent = tables.len().saturating_sub(4);
    match tables[recent..]
        .iter_mut()
        .find(|last| last.end == table.start)
    {
        Some(last) => last.end = table.end,
        None => tables.push(table),
    }
}

impl Group {
    /// Takes a descriptor; also gives the block of its inode bitmap.
    fn parse(superblock: &Superblock, raw: &[u8]) -> (Self, u64) {
        let is_long = raw.len() >= 64;
        let high = |at: usize| if is_long { u32_at(raw, at) } else { 0 };
        let block = |low: usize, at: usize| u64::from(u32_at(raw, low)) | u64::from(high(at)) << 32;
        let high = |at: usize| if is_long { u16_at(raw, at) } else { 0 };
        let pair = |low: usize, at: usize| u32::from(u16_at(raw, low)) | u32::from(high(at)) << 16;
        // Only what has checksums has groups that are not initialised.
        let has_flags = superblock.checksums != Checksums::None;
        let group = Self {
            block_bitmap: block(0x0, 0x20),
            inode_table: block(0x8, 0x28),
            free: pair(0xc, 0x2c),
            bitmap_checksum: pair(0x18, 0x38),
            uninit: has_flags && u16_at(raw, 0x12) & BLOCK_UNINIT != 0,
        };
        (group, block(0x4, 0x24))
    }

    fn check_bitmap(
        &self,
        superblock: &Superblock,
        number: u64,
        bitmap: &[u8],
    ) -> Result<(), Fault> {
        let Checksums::Crc32c(seed) = superblock.checksums else {
            return Ok(());
        };
        let bits = superblock.blocks_per_group / superblock.cluster;
        let checksum = crc32c(seed, &bitmap[..(bits / 8) as usize]);
        let mask = if superblock.descriptor_size >= 64 {
            !0
        } else {
            0xffff
        };
        match checksum & mask == self.bitmap_checksum {
            true => Ok(()),
            false => Err(Fault::Damaged(format!(
                "the block bitmap of group {number} has a wrong checksum"
            ))),
        }
    }
}

fn check_descriptor(superblock: &Superblock, number: u64, raw: &[u8]) -> Result<(), Fault> {
    let number_bytes = (number as u32).to_le_bytes();
    let (before, after) = (&raw[..CHECKSUM_AT], &raw[CHECKSUM_AT + 2..]);
    let checksum = match &superblock.checksums {
        Checksums::None => return Ok(()),
        Checksums::Crc16(uuid) => [&uuid[..], &number_bytes, before, after]
            .iter()
            .fold(!0, |crc, bytes| crc16(crc, bytes)),
        Checksums::Crc32c(seed) => [&number_bytes[..], before, &[0, 0], after]
            .iter()
            .fold(*seed, |crc, bytes| crc32c(crc, bytes)) as u16,
    };
    match checksum == u16_at(raw, CHECKSUM_AT) {
        true => Ok(()),
        false => Err(Fault::Damaged(format!(
            "the descriptor of group {number} has a wrong checksum"
        ))),
    }
}

/// The runs of zero bits among the first bits of a bitmap.
struct Zeros<'a> {
    bitmap: &'a [u8],
    at: u64,
    end: u64,
}

impl<'a> Zeros<'a> {
    fn of(bitmap: &'a [u8], bits: u64) -> Self {
        let end = bits.min(8 * bitmap.len() as u64);
        Self { bitmap, at: 0, end }
    }

    /// The next place, from here, where bits are not all as they would be in `same`.
    fn beyond(&self, mut at: u64, same: u8) -> u64 {
        while at < self.end {
            let differ = (self.bitmap[(at / 8) as usize] ^ same) >> (at % 8);
            if differ != 0 {
                return self.end.min(at + u64::from(differ.trailing_zeros()));
            }
            at = (at / 8 + 1) * 8;
        }
        self.end
    }
}

impl Iterator for Zeros<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let start = self.beyond(self.at, 0xff);
        self.at = self.beyond(start, 0);
        (start < self.at).then_some(start..self.at)
    }
}

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges, some of one"
)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_zero_bits_are_found() {
        let runs = |bitmap: &[u8], bits| Zeros::of(bitmap, bits).collect::<Vec<_>>();
        assert_eq!(runs(&[0xff, 0xff], 16), []);
        assert_eq!(runs(&[0, 0], 16), [0..16]);
        assert_eq!(runs(&[0, 0], 13), [0..13]);
        assert_eq!(
            runs(&[0b1000_0111, 0b0000_0000, 0b11], 24),
            [3..7, 8..16, 18..24]
        );
        assert_eq!(runs(&[0b0111_1111, 0b1111_1110], 16), [7..9]);
        assert_eq!(runs(&[0b0101_0101], 5), [1..2, 3..4]);
    }
}
