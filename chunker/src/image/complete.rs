//! Whether a qcow2 file is all there: what its tables point to must lie within it.
//!
//! Readers of qcow2, QEMU's among them, take what lies beyond the end of the file for zeros; so half a copy would be
//! published as a disk with holes. Only tables are read here, and only the active disk's: snapshots and reference counts are
//! never read in publishing. Whether the data itself is good is not looked at; names and headers belong to `chain`.
//!
//! # The end of the file
//! The last cluster need not be whole: the format lets a writer leave out what lies behind the end of the disk, QEMU leaves out
//! subclusters that are not allocated, and compressed data is counted in sectors only. Thus exactly the bytes
//! that a reader of the disk can meet must be there. What writes single compressed clusters (as `qemu-io` can; `qemu-img convert`
//! fills the sector up) may end the file within the last sector. Tables do not tell that from a cut, and a cut there can read
//! as zeros; so it is refused as well, but the message tells the way out for an original that is so.
//!
//! Source: QEMU's `docs/interop/qcow2.txt`.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::content::ReadError;

/// Sizes of clusters that the format allows, as powers of two.
const CLUSTER_BITS: RangeInclusive<u32> = 9..=21;
/// Tables are read in pieces of this length: a table may be of 32 MiB.
const PIECE: usize = 64 << 10;
/// Unit of compressed data's length, and of a disk's.
const SECTOR: u64 = 512;
/// The way out for an original that ends within a sector.
const WITHIN_SECTOR: &str = "; if the original is no longer, convert that with qemu-img convert";
/// Subclusters of a cluster with extended L2 entries.
const SUBCLUSTERS: u64 = 32;

/// Bits 9-55 of an entry: the offset of a table or a cluster.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// In an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// In an entry: nothing else uses this cluster. In external data it tells offset 0 from nothing at all.
const COPIED: u64 = 1 << 63;
/// In a plain L2 entry: the cluster reads as zeros, whatever lies there.
const ZERO: u64 = 1;

/// Where the tables of an image are, as its header says.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tables {
    /// Size of the disk in bytes.
    pub disk: u64,
    /// Size of a cluster, as a power of two.
    pub cluster_bits: u32,
    /// Offset of the L1 table.
    pub l1_at: u64,
    /// Entries of the L1 table.
    pub l1_len: u64,
    /// Whether L2 entries have 16 bytes, the second half for subclusters.
    pub extended: bool,
}

/// A file, and how much of it there is.
struct Extant<'a> {
    path: &'a Path,
    file: &'a File,
    len: u64,
}

/// Checks that an image's tables are whole, and all its allocated clusters too, in the image or in its external data file.
///
/// Fails with [`ReadError::Format`] that names the file that is cut off.
pub(super) fn check(
    tables: &Tables,
    image: (&Path, &File),
    data: Option<(&Path, &File)>,
) -> Result<(), ReadError> {
    let image = Extant::new(image.0, image.1)?;
    let data = data
        .map(|(path, file)| Extant::new(path, file))
        .transpose()?;
    if !CLUSTER_BITS.contains(&tables.cluster_bits) {
        return Err(ReadError::Format {
            path: image.path.into(),
            offset: 20,
            why: format!(
                "clusters of 2^{} bytes are not of the format: copy it again",
                tables.cluster_bits
            ),
        });
    }
    tables.check(&image, data.as_ref())
}

impl Tables {
    fn check(&self, image: &Extant<'_>, data: Option<&Extant<'_>>) -> Result<(), ReadError> {
        let cluster = 1 << self.cluster_bits;
        let entry_len = if self.extended { 16 } else { 8 };
        // Bytes of the disk that one L2 table is for.
        let span = cluster / entry_len * cluster;
        let entries = self.l1_len.min(self.disk.div_ceil(span));
        image.each_entry(self.l1_at, entries, |index, [l1]| {
            let (l2_at, left) = (l1 & OFFSET, self.disk - index * span);
            if l2_at == 0 {
                return Ok(());
            }
            let entries = left.min(span).div_ceil(cluster);
            let check = |index, entry, bitmap| {
                self.check_cluster(entry, bitmap, left - index * cluster, image, data)
            };
            if self.extended {
                image.each_entry(l2_at, entries, |index, [entry, bitmap]| {
                    check(index, entry, Some(bitmap))
                })
            } else {
                image.each_entry(l2_at, entries, |index, [entry]| check(index, entry, None))
            }
        })
    }

    /// Checks the cluster of an L2 entry; `left` is how much of the disk there is from its beginning on.
    fn check_cluster(
        &self,
        entry: u64,
        bitmap: Option<u64>,
        left: u64,
        image: &Extant<'_>,
        data: Option<&Extant<'_>>,
    ) -> Result<(), ReadError> {
        if entry & COMPRESSED != 0 {
            return image.holds_sector(self.compressed_end(entry));
        }
        let offset = entry & OFFSET;
        let allocated = offset != 0 || data.is_some() && entry & COPIED != 0;
        if !allocated {
            return Ok(());
        }
        let read = self.bytes_read(entry, bitmap).min(left);
        if read == 0 {
            return Ok(());
        }
        data.unwrap_or(image).holds(offset + read)
    }

    /// How much of an allocated cluster a reader can meet.
    fn bytes_read(&self, entry: u64, bitmap: Option<u64>) -> u64 {
        let cluster = 1 << self.cluster_bits;
        match bitmap {
            // The lower half tells which subclusters are allocated.
            Some(bitmap) => {
                let last = 32 - u64::from((bitmap as u32).leading_zeros());
                last * (cluster / SUBCLUSTERS)
            }
            None if entry & ZERO != 0 => 0,
            None => cluster,
        }
    }

    /// The end of the last sector that holds a part of a compressed cluster.
    fn compressed_end(&self, entry: u64) -> u64 {
        let offset_bits = 62 - (self.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let more_sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
        (offset / SECTOR + 1 + more_sectors) * SECTOR
    }
}

impl<'a> Extant<'a> {
    fn new(path: &'a Path, mut file: &'a File) -> Result<Self, ReadError> {
        // Not from the metadata: those of a device tell no length.
        let len = file
            .seek(SeekFrom::End(0))
            .map_err(|e| ReadError::io(path, 0, e))?;
        Ok(Self { path, file, len })
    }

    /// Checks that the file reaches up to `end`.
    fn holds(&self, end: u64) -> Result<(), ReadError> {
        if end <= self.len {
            Ok(())
        } else {
            Err(self.cut_off(end, ""))
        }
    }

    /// Checks that the file reaches up to `end`, which is the end of a sector of compressed data.
    fn holds_sector(&self, end: u64) -> Result<(), ReadError> {
        match end.saturating_sub(self.len) {
            0 => Ok(()),
            1..SECTOR => Err(self.cut_off(end, WITHIN_SECTOR)),
            _ => Err(self.cut_off(end, "")),
        }
    }

    fn cut_off(&self, end: u64, more: &str) -> ReadError {
        let why = format!(
            "it is cut off: the image's tables point to bytes up to {end}, it has {}: copy it again{more}",
            self.len
        );
        ReadError::Format {
            path: self.path.into(),
            offset: self.len,
            why,
        }
    }

    /// Goes through a table of `count` entries of so many words, in pieces.
    fn each_entry<const WORDS: usize>(
        &self,
        at: u64,
        count: u64,
        mut visit: impl FnMut(u64, [u64; WORDS]) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        let entry_len = 8 * WORDS;
        // The lengths are bounded by 2^32 entries and 2^21 bytes, but an L1 table's offset is whatever the header says.
        let end = at.saturating_add(count * entry_len as u64);
        self.holds(end)?;
        let mut piece = vec![0; PIECE.min((end - at) as usize)];
        let mut index = 0;
        while index < count {
            let offset = at + index * entry_len as u64;
            let piece_len = piece.len().min((end - offset) as usize);
            let piece = &mut piece[..piece_len];
            self.file
                .read_exact_at(piece, offset)
                .map_err(|e| ReadError::io(self.path, offset, e))?;
            for entry in piece.chunks_exact(entry_len) {
                let mut words = [0; WORDS];
                for (word, bytes) in words.iter_mut().zip(entry.chunks_exact(8)) {
                    *word = u64::from_be_bytes(bytes.try_into().expect("8 bytes"));
                }
                visit(index, words)?;
                index += 1;
            }
        }
        Ok(())
    }
}
