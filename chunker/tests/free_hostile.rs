//! Damaged disks: whatever is wrong with them, an answer comes, in bounded time and memory, and it is never free space that
//! the file system itself does not have.

mod free_util;

use std::ops::Range;
use std::sync::{LazyLock, Mutex};

use capsule_chunker::content::{BytesSource, Content, Progress, ReadError, check_range};
use capsule_chunker::free::{self, FreeError};
use free_util::Made;
use proptest::prelude::*;

/// A disk of zeros but for its begin, of any length.
struct Sparse {
    begin: Vec<u8>,
    len: u64,
}

impl Content for Sparse {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(self.len, offset, buf.len())?;
        buf.fill(0);
        let start = self.begin.len().min(offset as usize);
        let end = self.begin.len().min(offset as usize + buf.len());
        buf[..end - start].copy_from_slice(&self.begin[start..end]);
        Ok(())
    }
}

/// File systems of 24 MiB: without checksums, so that what is changed is also believed.
static PLAIN: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    [
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-O",
            "^metadata_csum,^uninit_bg",
        ][..],
        &[
            "-t",
            "ext4",
            "-b",
            "4096",
            "-O",
            "^metadata_csum,^uninit_bg,^64bit",
        ],
        &["-t", "ext3", "-b", "1024"],
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-O",
            "^metadata_csum,^uninit_bg,meta_bg,^resize_inode,bigalloc",
        ],
        &["-t", "ext4", "-b", "4096"],
    ]
    .iter()
    .map(|options| std::fs::read(Made::new(24, options).image).unwrap())
    .collect()
});

/// What is free in them.
static FREE: LazyLock<Vec<Vec<Range<u64>>>> = LazyLock::new(|| {
    let find = |disk| free::find(&BytesSource(disk), &()).unwrap().ranges;
    PLAIN.iter().map(find).collect()
});

/// A disk is changed in place and put back: copies would be most of the work.
static DISKS: LazyLock<Mutex<Vec<Vec<u8>>>> = LazyLock::new(|| Mutex::new(PLAIN.clone()));

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn bytes_that_are_wrong_are_no_harm(
        which in 0_usize..5,
        changes in prop::collection::vec((
            // The superblock, the descriptors, or what follows: bitmaps, inodes, the journal's maps.
            prop_oneof![1024_usize..1024 + 0x2a0, 2048_usize..6000, 6000_usize..(1 << 20)],
            prop_oneof![Just(0_u8), Just(0xff), any::<u8>()],
        ), 1..6),
    ) {
        let mut disks = DISKS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let disk = &mut disks[which];
        for (at, value) in &changes {
            disk[*at] = *value;
        }
        let found = free::find(&BytesSource(&*disk), &());
        for (at, _) in &changes {
            disk[*at] = PLAIN[which][*at];
        }
        if let Ok(space) = found {
            let mut end = 0;
            for range in &space.ranges {
                prop_assert!(range.start >= end && range.start < range.end);
                end = range.end;
                let is_free = FREE[which].iter().any(|free| free.start <= range.start && range.end <= free.end);
                prop_assert!(is_free, "{:?}", range);
            }
        }
    }

    #[test]
    fn any_bytes_after_a_magic_number_are_no_harm(
        mut superblock in prop::collection::vec(any::<u8>(), 1024),
        small in prop::collection::vec((0_usize..256, 0_u8..4), 0..200),
        len in prop_oneof![Just(1_u64 << 50), 0_u64..1 << 40],
    ) {
        for (at, value) in small {
            superblock[at * 4..at * 4 + 4].copy_from_slice(&[value, 0, 0, 0]);
        }
        superblock[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
        let begin = [vec![0; 1024], superblock].concat();
        let _ = free::find(&Sparse { begin, len }, &Stop);
    }
}

/// Stops at the first question.
struct Stop;

impl Progress for Stop {
    fn cancelled(&self) -> bool {
        true
    }
}

/// A superblock of a revision without features, for a disk of so many blocks of 4 KiB.
fn original(blocks: u32, per_group: u32) -> Vec<u8> {
    let mut begin = vec![0; 4096];
    for (at, value) in [
        (0x4, blocks),
        (0x18, 2),
        (0x1c, 2),
        (0x20, per_group),
        (0x24, per_group),
        (0x28, 8),
        (0x38, 0x1_ef53),
    ] {
        begin[1024 + at..1024 + at + 4].copy_from_slice(&u32::to_le_bytes(value));
    }
    begin
}

#[test]
fn a_superblock_that_promises_too_much_is_refused() {
    let len = 1 << 50;
    let begin = original(u32::MAX, 8);
    let found = free::find(&Sparse { begin, len }, &());
    assert!(
        matches!(found, Err(FreeError::Unsupported { .. })),
        "{found:?}"
    );
    let begin = original(u32::MAX, 32768);
    let found = free::find(
        &Sparse {
            begin: begin.clone(),
            len,
        },
        &(),
    );
    assert!(matches!(found, Err(FreeError::Damaged { .. })), "{found:?}");
    let found = free::find(&Sparse { begin, len }, &Stop);
    assert!(matches!(found, Err(FreeError::Cancelled)), "{found:?}");
}

#[test]
fn a_boot_sector_of_any_bytes_is_no_harm() {
    let mut sector = free_util::noise(1, 4096);
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    for kind in [0x05, 0x83, 0xee] {
        for number in 0..4 {
            sector[446 + 16 * number] = 0x80;
            sector[446 + 16 * number + 4] = kind;
        }
        let disk = Sparse {
            begin: sector.clone(),
            len: 1 << 40,
        };
        assert!(free::find(&disk, &()).is_err());
    }
}
