//! Persistent dirty bitmaps of qcow2 images: what was written since the bitmap was added or cleared.
//!
//! Source: QEMU's `docs/interop/qcow2.txt`, "Bitmaps". Whether a bitmap began with the version that a caller compares with is
//! for the caller to find out.

use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;

use capsule_proto::GroupRanges;

use super::chain::Link;
use super::record::Places;
use super::tables::{Extant, OFFSET};
use crate::content::ReadError;

/// Most bitmaps of an image, and longest directory and table of them: QEMU's own limits.
const MAX_BITMAPS: u32 = 65_535;
const MAX_DIRECTORY: u64 = 64 << 20;
const MAX_TABLE: u64 = 0x800_0000;
/// Fixed part of a directory's entry.
const ENTRY: usize = 24;
/// Granularities that the format allows, as powers of two.
const GRANULARITY: RangeInclusive<u8> = 9..=31;
/// Flag: QEMU did not close it, so that it may lack what was written.
const IN_USE: u32 = 1;
/// Flag: QEMU goes on writing to it whenever it writes to the image.
const AUTO: u32 = 2;
/// Flag: who does not know the extra data may still use the bitmap.
const EXTRA_DATA_COMPATIBLE: u32 = 4;
/// The only type: dirty tracking.
const DIRTY_TRACKING: u8 = 1;
/// In a table's entry without an offset: all bits are set.
const ALL_ONES: u64 = 1;

/// Where an image's bitmaps are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Directory {
    pub count: u32,
    pub at: u64,
    pub len: u64,
    /// Whether everybody who wrote to the image since knew of bitmaps.
    pub is_consistent: bool,
}

/// A bitmap's entry.
struct Bitmap {
    table_at: u64,
    table_len: u64,
    granularity_bits: u8,
}

/// The groups that a bitmap marks; none if they are in too many places.
pub(super) fn read(link: &Link, name: &str) -> Result<Option<GroupRanges>, ReadError> {
    let refused = |why: String| ReadError::Format {
        path: link.path.clone(),
        offset: 0,
        why,
    };
    let facts = link.facts.filter(|facts| facts.is_known).ok_or_else(|| {
        refused(
            "it is no qcow2 image, or has features that are not known: leave out --bitmap".into(),
        )
    })?;
    let directory = facts.bitmaps.ok_or_else(|| {
        refused(format!(
            "it has no dirty bitmaps: add one with `qemu-img bitmap --add IMAGE {name}` when a version is published, and leave out --bitmap until the next"
        ))
    })?;
    if !directory.is_consistent {
        return Err(refused(
            "something that knows nothing of its dirty bitmaps wrote to it, so they lack changes: leave out --bitmap, and add the bitmap anew".into(),
        ));
    }
    let image = Extant::new(&link.path, &link.file)?;
    let bitmap = find(link, &image, &directory, name)?;
    let (cluster, disk) = (1_u64 << facts.tables.cluster_bits, facts.tables.disk);
    // Bytes of the disk that a cluster of the bitmap is for.
    let span = (cluster * 8) << bitmap.granularity_bits;
    if bitmap.table_len < disk.div_ceil(span) {
        return Err(refused(format!(
            "its bitmap {name} is too short for its disk: leave out --bitmap"
        )));
    }
    let mut marked = Places::default();
    let mut bits = vec![0; cluster as usize];
    image.each_entry(bitmap.table_at, disk.div_ceil(span), |index, [entry]| {
        let first = index * span;
        match entry & OFFSET {
            0 if entry & ALL_ONES == 0 => {}
            0 => marked.add(first..disk.min(first + span)),
            at => {
                image.holds(at + cluster)?;
                link.file
                    .read_exact_at(&mut bits, at)
                    .map_err(|e| ReadError::io(&link.path, at, e))?;
                mark(&bits, first, bitmap.granularity_bits, disk, &mut marked);
            }
        }
        Ok(())
    })?;
    Ok(marked.finish())
}

/// Adds what set bits mark; the first bit is for what is at `first` on the disk.
fn mark(bits: &[u8], first: u64, granularity_bits: u8, disk: u64, marked: &mut Places) {
    for (at, byte) in bits.iter().enumerate().filter(|(_, byte)| **byte != 0) {
        for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
            let start = first + ((at as u64 * 8 + bit) << granularity_bits);
            let end = (start + (1 << granularity_bits)).min(disk);
            if start < end {
                marked.add(start..end);
            }
        }
    }
}

/// Looks for a bitmap by name.
fn find(
    link: &Link,
    image: &Extant<'_>,
    directory: &Directory,
    name: &str,
) -> Result<Bitmap, ReadError> {
    let invalid = |at: usize, why: &str| ReadError::Format {
        path: link.path.clone(),
        offset: directory.at + at as u64,
        why: format!("its list of dirty bitmaps {why}: leave out --bitmap"),
    };
    if directory.count > MAX_BITMAPS || directory.len > MAX_DIRECTORY {
        return Err(invalid(0, "is longer than the format allows"));
    }
    image.holds(directory.at.saturating_add(directory.len))?;
    let mut bytes = vec![0; directory.len as usize];
    link.file
        .read_exact_at(&mut bytes, directory.at)
        .map_err(|e| ReadError::io(&link.path, directory.at, e))?;
    let mut at = 0;
    let mut names = Vec::new();
    for _ in 0..directory.count {
        let entry = bytes.get(at..).unwrap_or_default();
        let Some((head, rest)) = entry.split_at_checked(ENTRY) else {
            return Err(invalid(at, "is cut off"));
        };
        let u32_at = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("4 bytes"));
        let (name_len, extra) = (
            usize::from(u16::from_be_bytes([head[18], head[19]])),
            u32_at(20) as usize,
        );
        let found = rest.get(extra..extra + name_len);
        let found = found.ok_or_else(|| invalid(at, "is cut off"))?;
        if found == name.as_bytes() {
            let (flags, kind, granularity_bits) = (u32_at(12), head[16], head[17]);
            if flags & IN_USE != 0 {
                return Err(invalid(
                    at,
                    "says that this bitmap was not closed and may lack changes",
                ));
            }
            if flags & AUTO == 0 {
                return Err(invalid(
                    at,
                    "has this bitmap as disabled, so it may lack changes",
                ));
            }
            let is_plain = extra == 0 || flags & EXTRA_DATA_COMPATIBLE != 0;
            if kind != DIRTY_TRACKING || !is_plain || !GRANULARITY.contains(&granularity_bits) {
                return Err(invalid(at, "has this bitmap in a form that is not known"));
            }
            let table_len = u64::from(u32_at(8));
            if table_len > MAX_TABLE {
                return Err(invalid(
                    at,
                    "has a table that is longer than the format allows",
                ));
            }
            return Ok(Bitmap {
                table_at: u64::from_be_bytes(head[..8].try_into().expect("8 bytes")),
                table_len,
                granularity_bits,
            });
        }
        names.push(String::from_utf8_lossy(found).into_owned());
        at += (ENTRY + extra + name_len).next_multiple_of(8);
    }
    names.truncate(8);
    Err(ReadError::Format {
        path: link.path.clone(),
        offset: directory.at,
        why: format!(
            "it has no dirty bitmap {name}; it has: {}",
            names.join(", ")
        ),
    })
}
