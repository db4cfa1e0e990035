//! The superblock: geometry within its bounds, features that are known, and whether the file system was left in order.
//!
//! Source: the kernel's `Documentation/filesystems/ext4/super.rst`, and what `ext4_fill_super` refuses.

use super::super::checksum::crc32c;
use super::super::window::{Fault, Window, u16_at, u32_at};
use crate::content::ReadError;

const SUPERBLOCK_AT: u64 = 1024;
const MAGIC: u16 = 0xef53;
/// Block sizes: 1 KiB to 64 KiB.
const MAX_LOG_BLOCK: u32 = 6;
/// Clusters of at most 512 MiB.
const MAX_LOG_CLUSTER: u32 = 19;
/// Most block groups: 128 TiB with the usual 128 MiB. Bounds the memory for their tables to about 100 MiB.
const MAX_GROUPS: u64 = 1 << 20;

const COMPAT_HAS_JOURNAL: u32 = 0x4;
const COMPAT_RESIZE_INODE: u32 = 0x10;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;

const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_JOURNAL_DEV: u32 = 0x8;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;
/// Those, and: file types, extents, multiple mount protection, flex_bg, inodes of attributes, data in directories, large
/// directories, inline data, encryption, case folding. None of the others changes what is free.
const INCOMPAT_KNOWN: u32 = INCOMPAT_RECOVER
    | INCOMPAT_META_BG
    | INCOMPAT_64BIT
    | INCOMPAT_CSUM_SEED
    | 0x2
    | 0x40
    | 0x100
    | 0x200
    | 0x400
    | 0x1000
    | 0x4000
    | 0x8000
    | 0x1_0000
    | 0x2_0000;
/// What no ext3 has: extents, 64bit, flex_bg.
const INCOMPAT_EXT4: u32 = 0x40 | INCOMPAT_64BIT | 0x200;

const RO_SPARSE_SUPER: u32 = 0x1;
const RO_GDT_CSUM: u32 = 0x10;
const RO_BIGALLOC: u32 = 0x200;
const RO_METADATA_CSUM: u32 = 0x400;
const RO_ORPHAN_PRESENT: u32 = 0x1_0000;
/// Those, and: large files, sorted directories, huge files, many links, large inodes, quotas, read-only, project quotas,
/// shared blocks, verity. Not snapshots (0x80) and replicas (0x800), of which no kernel knows.
const RO_KNOWN: u32 = RO_SPARSE_SUPER
    | RO_GDT_CSUM
    | RO_BIGALLOC
    | RO_METADATA_CSUM
    | RO_ORPHAN_PRESENT
    | 0x2
    | 0x4
    | 0x8
    | 0x20
    | 0x40
    | 0x100
    | 0x1000
    | 0x2000
    | 0x4000
    | 0x8000;
/// What no ext3 has.
const RO_EXT4: u32 = RO_GDT_CSUM | RO_BIGALLOC | RO_METADATA_CSUM | 0x8 | 0x20 | 0x40;

const STATE_CLEAN: u16 = 1;
const STATE_ERRORS: u16 = 2;
const STATE_ORPHANS: u16 = 4;

/// The bytes of a superblock.
pub(in super::super) struct Raw([u8; 1024]);

/// How descriptors and bitmaps are protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checksums {
    None,
    /// CRC-16 of descriptors, from the file system's id.
    Crc16([u8; 16]),
    /// CRC-32C of everything, from this seed.
    Crc32c(u32),
}

/// What is needed of a superblock, within its bounds.
#[derive(Debug)]
pub(super) struct Superblock {
    pub block_size: u64,
    /// Blocks in a cluster, the unit of allocation: one, without bigalloc.
    pub cluster: u64,
    /// Block where the first group begins.
    pub first_block: u64,
    /// Blocks in all, those before the first group too.
    pub blocks: u64,
    pub free_blocks: u64,
    pub blocks_per_group: u64,
    pub inodes_per_group: u64,
    pub inode_size: u64,
    pub groups: u64,
    pub descriptor_size: u64,
    pub checksums: Checksums,
    /// Number of the journal's inode, where it is within.
    pub journal: Option<u32>,
    /// Copy of that inode's block map and length, where there is one.
    pub journal_backup: Option<[u8; 68]>,
    /// With meta_bg: the first meta group whose descriptors lie within itself.
    first_meta_bg: Option<u64>,
    reserved_descriptor_blocks: u64,
    backups: Backups,
    flags: Flags,
}

/// Which groups have a copy of superblock and descriptors.
#[derive(Debug)]
enum Backups {
    All,
    Sparse,
    Two([u64; 2]),
}

/// What is said of how it was left.
#[derive(Debug)]
struct Flags {
    state: u16,
    needs_recovery: bool,
    has_orphans: bool,
}

impl Raw {
    /// Reads the superblock, if there is one of a file system; the device of a journal has one too.
    pub fn read(window: &Window<'_>) -> Result<Option<Self>, ReadError> {
        let mut raw = Self([0; 1024]);
        let is_one = window.read_if_there(SUPERBLOCK_AT, &mut raw.0)?
            && raw.u16(0x38) == MAGIC
            && raw.incompat() & INCOMPAT_JOURNAL_DEV == 0;
        Ok(is_one.then_some(raw))
    }

    /// By which name it is known.
    pub fn kind(&self) -> &'static str {
        if self.incompat() & INCOMPAT_EXT4 != 0 || self.ro_compat() & RO_EXT4 != 0 {
            "ext4"
        } else if self.compat() & COMPAT_HAS_JOURNAL != 0 {
            "ext3"
        } else {
            "ext2"
        }
    }

    fn u16(&self, at: usize) -> u16 {
        u16_at(&self.0, at)
    }

    fn u32(&self, at: usize) -> u32 {
        u32_at(&self.0, at)
    }

    /// A feature word; the first revision had none.
    fn features(&self, at: usize) -> u32 {
        if self.is_original() { 0 } else { self.u32(at) }
    }

    fn is_original(&self) -> bool {
        self.u32(0x4c) == 0
    }

    fn compat(&self) -> u32 {
        self.features(0x5c)
    }

    fn incompat(&self) -> u32 {
        self.features(0x60)
    }

    fn ro_compat(&self) -> u32 {
        self.features(0x64)
    }

    /// A number of blocks in two words, the upper with 64bit only.
    fn blocks(&self, low: usize, high: usize) -> u64 {
        let high = match self.incompat() & INCOMPAT_64BIT {
            0 => 0,
            _ => self.u32(high),
        };
        u64::from(self.u32(low)) | u64::from(high) << 32
    }

    /// What is not known of it.
    fn check_features(&self) -> Result<(), Fault> {
        let (incompat, ro) = (
            self.incompat() & !INCOMPAT_KNOWN,
            self.ro_compat() & !RO_KNOWN,
        );
        match (incompat, ro, self.u32(0x4c)) {
            (0, 0, 0..=1) => Ok(()),
            (0, 0, revision) => Err(Fault::Unsupported(format!(
                "its revision {revision} is not known"
            ))),
            _ => Err(Fault::Unsupported(format!(
                "it has features that are not known (incompat {incompat:#x}, ro_compat {ro:#x})"
            ))),
        }
    }

    fn checksums(&self) -> Result<Checksums, Fault> {
        let uuid: [u8; 16] = self.0[0x68..0x78].try_into().expect("16 bytes");
        if self.ro_compat() & RO_METADATA_CSUM == 0 {
            return Ok(match self.ro_compat() & RO_GDT_CSUM {
                0 => Checksums::None,
                _ => Checksums::Crc16(uuid),
            });
        }
        if self.0[0x175] != 1 {
            return Err(Fault::Unsupported(
                "its kind of checksum is not known".into(),
            ));
        }
        if crc32c(!0, &self.0[..0x3fc]) != self.u32(0x3fc) {
            return Err(Fault::damaged("its superblock's checksum is wrong"));
        }
        Ok(Checksums::Crc32c(
            match self.incompat() & INCOMPAT_CSUM_SEED {
                0 => crc32c(!0, &uuid),
                _ => self.u32(0x270),
            },
        ))
    }
}

impl Superblock {
    /// Takes what a superblock says, for a part of a disk of a length.
    pub fn parse(raw: &Raw, len: u64) -> Result<Self, Fault> {
        raw.check_features()?;
        let checksums = raw.checksums()?;
        let (compat, incompat, ro) = (raw.compat(), raw.incompat(), raw.ro_compat());
        let wrong = |what: &str| Fault::Damaged(format!("its superblock has a wrong {what}"));
        let need = |right: bool, what: &str| if right { Ok(()) } else { Err(wrong(what)) };

        let (log_block, log_cluster) = (raw.u32(0x18), raw.u32(0x1c));
        need(log_block <= MAX_LOG_BLOCK, "block size")?;
        let block_size = 1024_u64 << log_block;
        let (cluster, units_per_group) = if ro & RO_BIGALLOC == 0 {
            (1, u64::from(raw.u32(0x20)))
        } else {
            let right = (log_block..=MAX_LOG_CLUSTER).contains(&log_cluster);
            need(right, "cluster size")?;
            (1 << (log_cluster - log_block), u64::from(raw.u32(0x24)))
        };
        let blocks_per_group = u64::from(raw.u32(0x20));
        // One block of bits is what says which are free.
        let right = (8..=8 * block_size).contains(&units_per_group)
            && units_per_group.is_multiple_of(8)
            && blocks_per_group == units_per_group * cluster;
        need(right, "number of blocks in a group")?;

        let first_block = u64::from(raw.u32(0x14));
        let right = first_block == u64::from(block_size == 1024 && cluster == 1);
        need(right, "first block")?;
        let blocks = raw.blocks(0x4, 0x150);
        need(blocks > first_block, "number of blocks")?;
        if blocks > len / block_size {
            return Err(Fault::Damaged(format!(
                "it has {blocks} blocks of {block_size} bytes, and only {len} bytes are there; was the disk cut off?"
            )));
        }
        let groups = (blocks - first_block).div_ceil(blocks_per_group);
        if groups > MAX_GROUPS {
            return Err(Fault::Unsupported(format!(
                "it has {groups} block groups, of which at most {MAX_GROUPS} can be read"
            )));
        }
        let inodes_per_group = u64::from(raw.u32(0x28));
        let right = (1..=8 * block_size).contains(&inodes_per_group);
        need(right, "number of inodes")?;
        let inode_size = match raw.is_original() {
            true => 128,
            false => u64::from(raw.u16(0x58)),
        };
        let right = (128..=block_size).contains(&inode_size) && inode_size.is_power_of_two();
        need(right, "inode size")?;
        let descriptor_size = match incompat & INCOMPAT_64BIT {
            0 => 32,
            _ => u64::from(raw.u16(0xfe)),
        };
        let right = (32..=1024).contains(&descriptor_size) && descriptor_size.is_power_of_two();
        need(right, "descriptor size")?;

        let first_meta_bg = (incompat & INCOMPAT_META_BG != 0).then(|| u64::from(raw.u32(0x104)));
        let reserved = match raw.is_original() {
            true => 0,
            false => u64::from(raw.u16(0xce)),
        };
        let right = reserved == 0
            || (compat & COMPAT_RESIZE_INODE != 0
                && first_meta_bg.is_none()
                && reserved <= block_size / 4);
        need(right, "number of reserved descriptor blocks")?;
        let backups = if compat & COMPAT_SPARSE_SUPER2 != 0 {
            Backups::Two([raw.u32(0x24c).into(), raw.u32(0x250).into()])
        } else if ro & RO_SPARSE_SUPER != 0 {
            Backups::Sparse
        } else {
            Backups::All
        };
        let has_journal = compat & COMPAT_HAS_JOURNAL != 0;
        let journal = Some(raw.u32(0xe0)).filter(|inode| has_journal && *inode != 0);
        let backup = raw.0[0x10c..0x150].try_into().expect("68 bytes");
        Ok(Self {
            block_size,
            cluster,
            first_block,
            blocks,
            free_blocks: raw.blocks(0xc, 0x158),
            blocks_per_group,
            inodes_per_group,
            inode_size,
            groups,
            descriptor_size,
            checksums,
            journal,
            journal_backup: (raw.0[0xfd] == 1).then_some(backup),
            first_meta_bg,
            reserved_descriptor_blocks: reserved,
            backups,
            flags: Flags {
                state: raw.u16(0x3a),
                needs_recovery: incompat & INCOMPAT_RECOVER != 0,
                has_orphans: raw.u32(0xe8) != 0 || ro & RO_ORPHAN_PRESENT != 0,
            },
        })
    }

    /// Fails where its tables may be out of date: it is mounted, or was when the machine stopped.
    pub fn check_clean(&self) -> Result<(), Fault> {
        let Flags {
            state,
            needs_recovery,
            has_orphans,
        } = self.flags;
        if state & STATE_ERRORS != 0 {
            return Err(Fault::Dirty("has errors that were noted and not repaired"));
        }
        if needs_recovery || state & STATE_CLEAN == 0 {
            return Err(Fault::Dirty("was not unmounted cleanly, or is mounted"));
        }
        if has_orphans || state & STATE_ORPHANS != 0 {
            return Err(Fault::Dirty(
                "has files that were deleted while they were open, or is mounted",
            ));
        }
        Ok(())
    }

    /// First block of a group.
    pub fn group_start(&self, group: u64) -> u64 {
        self.first_block + group * self.blocks_per_group
    }

    /// End of a group; the last may be short.
    pub fn group_end(&self, group: u64) -> u64 {
        self.blocks.min(self.group_start(group + 1))
    }

    /// Descriptors in a block; also groups in a meta group.
    pub fn descriptors_per_block(&self) -> u64 {
        self.block_size / self.descriptor_size
    }

    /// Block that holds the n-th block of descriptors.
    pub fn descriptor_block(&self, index: u64) -> u64 {
        // With blocks of 1 KiB the superblock is in block 1, also where groups are counted from block 0 (bigalloc).
        let superblock = SUPERBLOCK_AT / self.block_size;
        match self.first_meta_bg {
            Some(first) if index >= first => {
                let group = index * self.descriptors_per_block();
                if group == 0 {
                    superblock + 1
                } else {
                    self.group_start(group) + u64::from(self.has_backup(group))
                }
            }
            _ => superblock + 1 + index,
        }
    }

    /// Blocks at a group's begin that hold superblock and descriptors, or are reserved for such.
    pub fn base_blocks(&self, group: u64) -> u64 {
        let has_backup = self.has_backup(group);
        let descriptor_blocks = self.groups.div_ceil(self.descriptors_per_block());
        let meta_group = group / self.descriptors_per_block();
        // Block 0 before the superblock, where groups are counted from there.
        let before = match group {
            0 => SUPERBLOCK_AT / self.block_size - self.first_block.min(1),
            _ => 0,
        };
        match self.first_meta_bg {
            Some(first) if meta_group >= first => {
                let place = group % self.descriptors_per_block();
                let has_descriptors = place < 2 || place == self.descriptors_per_block() - 1;
                before + u64::from(has_backup) + u64::from(has_descriptors)
            }
            _ if !has_backup => 0,
            Some(first) => before + 1 + first.min(descriptor_blocks),
            None => before + 1 + descriptor_blocks + self.reserved_descriptor_blocks,
        }
    }

    fn has_backup(&self, group: u64) -> bool {
        let is_power = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        group == 0
            || match self.backups {
                Backups::All => true,
                Backups::Two(groups) => groups.contains(&group),
                Backups::Sparse => group == 1 || [3, 5, 7].into_iter().any(is_power),
            }
    }
}
