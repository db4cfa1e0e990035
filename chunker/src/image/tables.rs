//! The tables of a qcow2 file: where they lie, and going through their entries. What an entry means for reading, for being
//! whole and for what changed is the business of others.
//!
//! Source: QEMU's `docs/interop/qcow2.txt`.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::content::ReadError;

/// Tables are read in pieces of this length: a table may be of 32 MiB.
const PIECE: usize = 64 << 10;

/// Bits 9-55 of an entry: the offset of a table or a cluster.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// In an L2 entry: the cluster is compressed.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// In an entry: nothing else uses this cluster. In external data it tells offset 0 from nothing at all.
pub(super) const COPIED: u64 = 1 << 63;
/// In a plain L2 entry: the cluster reads as zeros, whatever lies there.
pub(super) const ZERO: u64 = 1;

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

/// What an image says of a cluster of its disk that has an L2 table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cluster {
    /// Its first byte on the disk.
    pub start: u64,
    /// Its L2 entry.
    pub entry: u64,
    /// With extended entries: which subclusters are allocated (lower half) and zero (upper half).
    pub bitmap: Option<u64>,
}

/// A file, and how much of it there is.
pub(super) struct Extant<'a> {
    pub path: &'a Path,
    file: &'a File,
    pub len: u64,
}

impl Tables {
    /// Goes through the clusters of the disk, in order, as far as there are L2 tables for them.
    pub fn each_cluster(
        &self,
        image: &Extant<'_>,
        mut visit: impl FnMut(Cluster) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        let cluster = 1 << self.cluster_bits;
        let entry_len = if self.extended { 16 } else { 8 };
        // Bytes of the disk that one L2 table is for.
        let span = cluster / entry_len * cluster;
        let entries = self.l1_len.min(self.disk.div_ceil(span));
        image.each_entry(self.l1_at, entries, |index, [l1]| {
            let (l2_at, first) = (l1 & OFFSET, index * span);
            if l2_at == 0 {
                return Ok(());
            }
            let entries = (self.disk - first).min(span).div_ceil(cluster);
            let mut visit = |index, entry, bitmap| {
                visit(Cluster {
                    start: first + index * cluster,
                    entry,
                    bitmap,
                })
            };
            if self.extended {
                image.each_entry(l2_at, entries, |index, [entry, bitmap]| {
                    visit(index, entry, Some(bitmap))
                })
            } else {
                image.each_entry(l2_at, entries, |index, [entry]| visit(index, entry, None))
            }
        })
    }
}

impl<'a> Extant<'a> {
    pub fn new(path: &'a Path, mut file: &'a File) -> Result<Self, ReadError> {
        // Not from the metadata: those of a device tell no length.
        let len = file
            .seek(SeekFrom::End(0))
            .map_err(|e| ReadError::io(path, 0, e))?;
        Ok(Self { path, file, len })
    }

    /// Checks that the file reaches up to `end`.
    pub fn holds(&self, end: u64) -> Result<(), ReadError> {
        if end <= self.len {
            Ok(())
        } else {
            Err(self.cut_off(end, ""))
        }
    }

    pub fn cut_off(&self, end: u64, more: &str) -> ReadError {
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
    pub fn each_entry<const WORDS: usize>(
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
