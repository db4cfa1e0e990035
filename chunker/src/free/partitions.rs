//! Partition tables: MBR with logical partitions, and GPT.
//!
//! Of a GPT everything is checked against its checksums, and the copy at the disk's end is taken where the first is
//! damaged. A GPT counts only with the MBR that protects it, as the kernel has it: where that is gone, the disk was
//! partitioned anew.
//!
//! Sources: UEFI specification 2.10, chapter 5; the kernel's `block/partitions`.

use std::ops::Range;

use super::FreeError;
use super::checksum::crc32;
use super::window::{Window, u32_at, u64_at};
use crate::content::{Content, ReadError};

/// Sectors that partition tables count in; GPT is also looked for on sectors of 4 KiB.
const SECTOR: u64 = 512;
const LARGE_SECTOR: u64 = 4096;
/// Most logical partitions; the kernel takes no more than 252.
const MAX_LOGICAL: u32 = 256;
/// Most entries of a GPT, and the longest; the usual are 128 of 128 bytes.
const MAX_ENTRIES: u32 = 4096;
const MIN_ENTRY: u32 = 128;
const MAX_ENTRY: u32 = 4096;
/// Type of the MBR's entry that protects a GPT.
const PROTECTIVE: u8 = 0xee;

/// A partition of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Partition {
    /// As the kernel counts; none for the whole disk.
    pub number: Option<u32>,
    /// Its bytes; they may reach beyond a disk that was cut off.
    pub range: Range<u64>,
}

/// The partitions of a disk; none where it has no table.
pub(super) fn read(disk: &dyn Content) -> Result<Vec<Partition>, FreeError> {
    let window = Window::new(disk, 0..disk.len());
    let Some(entries) = sector(&window, 0)?.and_then(|sector| table(&sector)) else {
        return Ok(Vec::new());
    };
    if entries.iter().any(|entry| entry.kind == PROTECTIVE) {
        return gpt(&window);
    }
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(&entries) {
        if entry.is_extended() {
            logical(&window, entry, &mut found)?;
        } else if !entry.is_empty() {
            found.push(entry.partition(number, 0));
        }
    }
    Ok(found)
}

/// An entry of an MBR, in sectors.
#[derive(Clone, Copy, Debug)]
struct Entry {
    kind: u8,
    start: u64,
    count: u64,
}

impl Entry {
    fn is_empty(self) -> bool {
        self.kind == 0 || self.count == 0
    }

    fn is_extended(self) -> bool {
        !self.is_empty() && matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    /// The partition, where sectors are counted from a base.
    fn partition(self, number: u32, base: u64) -> Partition {
        let start = (base + self.start) * SECTOR;
        Partition {
            number: Some(number),
            range: start..start + self.count * SECTOR,
        }
    }
}

fn sector(window: &Window<'_>, number: u64) -> Result<Option<[u8; SECTOR as usize]>, ReadError> {
    let mut bytes = [0; SECTOR as usize];
    let there = window.read_if_there(number * SECTOR, &mut bytes)?;
    Ok(there.then_some(bytes))
}

/// The four entries of a table; none where a sector holds anything else, such as a boot sector of FAT.
fn table(sector: &[u8; SECTOR as usize]) -> Option<[Entry; 4]> {
    let raw = |index: usize| &sector[446 + 16 * index..][..16];
    let entries = [0, 1, 2, 3].map(|index| Entry {
        kind: raw(index)[4],
        start: u32_at(raw(index), 8).into(),
        count: u32_at(raw(index), 12).into(),
    });
    let is_table = sector[510..] == [0x55, 0xaa]
        && (0..4).all(|index| matches!(raw(index)[0], 0 | 0x80))
        && entries.iter().any(|entry| !entry.is_empty());
    is_table.then_some(entries)
}

/// The partitions of an extended one: a chain of tables, each with a partition and the next table.
fn logical(
    window: &Window<'_>,
    extended: &Entry,
    found: &mut Vec<Partition>,
) -> Result<(), FreeError> {
    let mut at = extended.start;
    for number in 5..5 + MAX_LOGICAL {
        let Some(entries) = sector(window, at)?.and_then(|sector| table(&sector)) else {
            // The first may be empty; a later one was referred to.
            return match number {
                5 => Ok(()),
                _ => Err(broken("a table of logical partitions is missing")),
            };
        };
        if let Some(entry) = entries
            .iter()
            .find(|entry| !entry.is_empty() && !entry.is_extended())
        {
            found.push(entry.partition(number, at));
        }
        let Some(next) = entries.iter().find(|entry| entry.is_extended()) else {
            return Ok(());
        };
        at = extended.start + next.start;
    }
    Err(broken("its logical partitions have no end"))
}

fn broken(why: &str) -> FreeError {
    FreeError::Table {
        why: why.to_owned(),
    }
}

/// The partitions of a GPT: of the first table that is whole.
fn gpt(window: &Window<'_>) -> Result<Vec<Partition>, FreeError> {
    for size in [SECTOR, LARGE_SECTOR] {
        let last = (window.len() / size).saturating_sub(1);
        for place in [1, last] {
            if let Some(found) = gpt_at(window, size, place)? {
                return Ok(found);
            }
        }
    }
    Err(broken("neither of the two tables of its GPT is whole"))
}

fn gpt_at(window: &Window<'_>, size: u64, place: u64) -> Result<Option<Vec<Partition>>, FreeError> {
    let mut header = vec![0; size as usize];
    if !window.read_if_there(place * size, &mut header)? || !header.starts_with(b"EFI PART") {
        return Ok(None);
    }
    let len = u32_at(&header, 12) as usize;
    let (count, entry_len) = (u32_at(&header, 80), u32_at(&header, 84));
    if !(92..=header.len()).contains(&len)
        || u64_at(&header, 24) != place
        || count > MAX_ENTRIES
        || !(MIN_ENTRY..=MAX_ENTRY).contains(&entry_len)
    {
        return Ok(None);
    }
    let expected = u32_at(&header, 16);
    header[16..20].fill(0);
    if crc32(&header[..len]) != expected {
        return Ok(None);
    }
    let mut entries = vec![0; (count * entry_len) as usize];
    let entries_at = u64_at(&header, 72).saturating_mul(size);
    if !window.read_if_there(entries_at, &mut entries)? || crc32(&entries) != u32_at(&header, 88) {
        return Ok(None);
    }
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(entries.chunks_exact(entry_len as usize)) {
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        if entry[..16] == [0; 16] {
            continue;
        }
        let end = last.checked_add(1).and_then(|end| end.checked_mul(size));
        let Some(end) = end.filter(|_| first <= last) else {
            return Err(broken(&format!("partition {number} has no length")));
        };
        found.push(Partition {
            number: Some(number),
            range: first * size..end,
        });
    }
    Ok(Some(found))
}
