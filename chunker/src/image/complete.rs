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
use std::ops::RangeInclusive;
use std::path::Path;

use super::tables::{COMPRESSED, COPIED, Cluster, Extant, OFFSET, Tables, ZERO};
use crate::content::ReadError;

/// Sizes of clusters that the format allows, as powers of two.
const CLUSTER_BITS: RangeInclusive<u32> = 9..=21;
/// Unit of compressed data's length, and of a disk's.
const SECTOR: u64 = 512;
/// The way out for an original that ends within a sector.
const WITHIN_SECTOR: &str = "; if the original is no longer, convert that with qemu-img convert";
/// Subclusters of a cluster with extended L2 entries.
pub(super) const SUBCLUSTERS: u64 = 32;

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
    tables.each_cluster(&image, |cluster| {
        tables.check_cluster(cluster, &image, data.as_ref())
    })
}

impl Tables {
    /// Checks that what a reader of a cluster meets is there.
    fn check_cluster(
        &self,
        cluster: Cluster,
        image: &Extant<'_>,
        data: Option<&Extant<'_>>,
    ) -> Result<(), ReadError> {
        let Cluster {
            start,
            entry,
            bitmap,
        } = cluster;
        if entry & COMPRESSED != 0 {
            return holds_sector(image, self.compressed_end(entry));
        }
        let offset = entry & OFFSET;
        let allocated = offset != 0 || data.is_some() && entry & COPIED != 0;
        if !allocated {
            return Ok(());
        }
        let read = self.bytes_read(entry, bitmap).min(self.disk - start);
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

/// Checks that a file reaches up to `end`, which is the end of a sector of compressed data.
fn holds_sector(file: &Extant<'_>, end: u64) -> Result<(), ReadError> {
    match end.saturating_sub(file.len) {
        0 => Ok(()),
        1..SECTOR => Err(file.cut_off(end, WITHIN_SECTOR)),
        _ => Err(file.cut_off(end, "")),
    }
}
