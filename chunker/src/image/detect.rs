//! Telling by content what a file holds.
//!
//! Two questions: is it an image in a container format, and do raw bytes look like a disk? Neither looks at the file's name, as the
//! answer is part of the capsule's id. Nothing is parsed here beyond magic numbers.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes at the beginning that hold every magic number we look for; the farthest is btrfs' at 64 KiB.
const HEAD_LEN: usize = 68 << 10;
/// A disk's sector, and the length of a VHD's footer.
const SECTOR: u64 = 512;

/// Container formats of disks, told apart by their magic numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The bytes as they are: a file, sparse or not.
    Raw,
    /// A device of kind "block".
    Device,
    /// QEMU's qcow2, versions 2 and 3.
    Qcow2,
    /// QEMU's first qcow.
    Qcow,
    /// VMware's VMDK.
    Vmdk,
    /// VirtualBox's VDI.
    Vdi,
    /// Hyper-V's VHDX.
    Vhdx,
    /// Virtual PC's VHD.
    Vpc,
    /// QEMU's QED.
    Qed,
    /// Parallels' HDD.
    Parallels,
}

impl Format {
    /// The name that QEMU's tools know the format by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Device => "host_device",
            Self::Qcow2 => "qcow2",
            Self::Qcow => "qcow",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhdx => "vhdx",
            Self::Vpc => "vpc",
            Self::Qed => "qed",
            Self::Parallels => "parallels",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The parts of a file that tell what it is.
pub(super) struct Probe {
    head: Vec<u8>,
    /// The last sector, of files that are at least one long.
    tail: Vec<u8>,
    len: u64,
}

impl Probe {
    /// Reads what is needed of a file of known length.
    pub fn read(file: &File, len: u64) -> io::Result<Self> {
        let mut head = vec![0; HEAD_LEN.min(len as usize)];
        file.read_exact_at(&mut head, 0)?;
        let tail_len = if len >= SECTOR { SECTOR } else { 0 };
        let mut tail = vec![0; tail_len as usize];
        file.read_exact_at(&mut tail, len - tail_len)?;
        Ok(Self { head, tail, len })
    }

    fn has(&self, offset: usize, magic: &[u8]) -> bool {
        self.head.get(offset..offset + magic.len()) == Some(magic)
    }

    /// The container format; [`Format::Raw`] if none is known.
    pub fn format(&self) -> Format {
        let version = self
            .head
            .get(4..8)
            .map_or(0, |b| u32::from_be_bytes(b.try_into().expect("4 bytes")));
        if self.has(0, b"QFI\xfb") && version >= 1 {
            // Versions that do not exist yet are refused by the reader, not taken for raw bytes.
            return if version == 1 {
                Format::Qcow
            } else {
                Format::Qcow2
            };
        }
        let magics: [(usize, &[u8], Format); 10] = [
            (0, b"KDMV", Format::Vmdk),
            (0, b"COWD", Format::Vmdk),
            (0, b"# Disk DescriptorFile", Format::Vmdk),
            (64, &0xbeda_107f_u32.to_le_bytes(), Format::Vdi),
            (0, b"vhdxfile", Format::Vhdx),
            (0, b"conectix", Format::Vpc),
            (0, b"QED\0", Format::Qed),
            (0, b"WithoutFreeSpace", Format::Parallels),
            (0, b"WithouFreSpacExt", Format::Parallels),
            // A VHD of fixed size is the raw disk and a footer, of type 2.
            (usize::MAX, b"conectix", Format::Vpc),
        ];
        let is = |offset: usize, magic: &[u8]| match offset {
            usize::MAX => self.tail.starts_with(magic) && self.tail[60..64] == [0, 0, 0, 2],
            offset => self.has(offset, magic),
        };
        magics
            .iter()
            .find(|(offset, magic, _)| is(*offset, magic))
            .map_or(Format::Raw, |(_, _, format)| *format)
    }

    /// Whether raw bytes are a disk's: whole sectors that begin with a partition table, a boot sector, or a file system.
    pub fn looks_like_disk(&self) -> bool {
        const SIGNATURES: [(usize, &[u8]); 11] = [
            (510, &[0x55, 0xaa]), // MBR, the MBR that protects a GPT, FAT, NTFS, bootable ISO
            (512, b"EFI PART"),   // GPT
            (4096, b"EFI PART"),  // GPT on sectors of 4 KiB
            (0x438, &[0x53, 0xef]), // ext2, ext3, ext4
            (0, b"XFSB"),         // XFS
            (0x1_0040, b"_BHRfS_M"), // btrfs
            (0x8001, b"CD001"),   // ISO 9660
            (0, b"LUKS\xba\xbe"), // LUKS
            (512, b"LABELONE"),   // LVM
            (0x400, &[0x10, 0x20, 0xf5, 0xf2]), // F2FS
            (4086, b"SWAPSPACE2"), // swap
        ];
        self.len > 0
            && self.len.is_multiple_of(SECTOR)
            && SIGNATURES
                .iter()
                .any(|(offset, magic)| self.has(*offset, magic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(content: &[u8]) -> Probe {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(content, 0).unwrap();
        Probe::read(&file, content.len() as u64).unwrap()
    }

    fn with(len: usize, offset: usize, magic: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[offset..offset + magic.len()].copy_from_slice(magic);
        bytes
    }

    #[test]
    fn disks_are_whole_sectors_with_a_signature() {
        assert!(probe(&with(1024, 510, &[0x55, 0xaa])).looks_like_disk());
        assert!(!probe(&with(1025, 510, &[0x55, 0xaa])).looks_like_disk());
        assert!(probe(&with(128 << 10, 0x1_0040, b"_BHRfS_M")).looks_like_disk());
        for content in [&b""[..], b"text", &[0; 4096]] {
            assert!(!probe(content).looks_like_disk());
            assert_eq!(probe(content).format(), Format::Raw);
        }
    }

    #[test]
    fn containers_are_known_by_their_magic() {
        assert_eq!(
            probe(&with(512, 0, b"QFI\xfb\0\0\0\x03")).format(),
            Format::Qcow2
        );
        assert_eq!(
            probe(&with(512, 0, b"QFI\xfb\0\0\0\x01")).format(),
            Format::Qcow
        );
        assert_eq!(probe(&with(9, 0, b"vhdxfile")).format(), Format::Vhdx);
        assert_eq!(
            probe(&with(512, 64, &[0x7f, 0x10, 0xda, 0xbe])).format(),
            Format::Vdi
        );
        let mut fixed = with(1536, 1024, b"conectix");
        assert_eq!(probe(&fixed).format(), Format::Raw);
        fixed[1024 + 63] = 2;
        assert_eq!(probe(&fixed).format(), Format::Vpc);
    }
}
