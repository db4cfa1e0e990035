//! Telling what lies in a partition that holds no ext file system, for the message. Nothing is parsed beyond magic numbers.

use super::window::Window;
use crate::content::ReadError;

/// Where a magic number lies, the number, and what it means.
type Magic = (u64, &'static [u8], &'static str);

const MAGICS: [Magic; 22] = [
    (0, b"XFSB", "an XFS file system"),
    (0, b"LUKS\xba\xbe", "LUKS encryption"),
    (3, b"-FVE-FS-", "BitLocker encryption"),
    (3, b"NTFS    ", "an NTFS file system"),
    (3, b"EXFAT   ", "an exFAT file system"),
    (0x52, b"FAT32", "a FAT file system"),
    (0x36, b"FAT1", "a FAT file system"),
    (0, b"hsqs", "a squashfs file system"),
    (0, b"LABELONE", "an LVM volume"),
    (512, b"LABELONE", "an LVM volume"),
    (1024, b"LABELONE", "an LVM volume"),
    (1536, b"LABELONE", "an LVM volume"),
    (0, &RAID, "a member of a RAID"),
    (4096, &RAID, "a member of a RAID"),
    (0x1_0040, b"_BHRfS_M", "a btrfs file system"),
    (0x8001, b"CD001", "an ISO 9660 file system"),
    (0x400, &[0x10, 0x20, 0xf5, 0xf2], "an F2FS file system"),
    (4086, b"SWAPSPACE2", "swap space"),
    (65526, b"SWAPSPACE2", "swap space"),
    (1024, b"H+", "an HFS+ file system"),
    (32, b"NXSB", "an APFS container"),
    (0x438, &[0x53, 0xef], "the journal of another file system"),
];

/// Linux md, versions 1.1 and 1.2.
const RAID: [u8; 4] = 0xa92b_4efc_u32.to_le_bytes();
/// A superblock of ext begins here, and group descriptors or nothing lie at the 4 KiB where a RAID has its own: what is
/// found there does not belong to ext.
const EXT_SUPERBLOCK: u64 = 1024;

/// What a part of a disk holds.
pub(super) fn name(window: &Window<'_>) -> Result<&'static str, ReadError> {
    Ok(search(window, |_| true)?.unwrap_or("something unknown"))
}

/// What else claims a part of a disk that has a superblock of ext, by a magic number where ext has nothing.
pub(super) fn beside_ext(window: &Window<'_>) -> Result<Option<&'static str>, ReadError> {
    search(window, |(at, magic, _)| {
        at + magic.len() as u64 <= EXT_SUPERBLOCK || *magic == RAID
    })
}

fn search(
    window: &Window<'_>,
    which: impl Fn(&Magic) -> bool,
) -> Result<Option<&'static str>, ReadError> {
    for magic in MAGICS.iter().filter(|magic| which(magic)) {
        let (at, expected, what) = magic;
        let mut found = [0; 8];
        let found = &mut found[..expected.len().min(8)];
        if window.read_if_there(*at, found)? && *found == expected[..found.len()] {
            return Ok(Some(what));
        }
    }
    Ok(None)
}
