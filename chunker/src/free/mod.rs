//! Space on disks that no file has: what `publish --trim` takes for zeros.
//!
//! A file system does not erase what is deleted, and a journal keeps what it wrote long after it is needed. Both cost
//! as much to publish as files do. [`find`] reads the tables of ext2, ext3 and ext4 on a disk, whole or in partitions
//! (`partitions`), and says where such old content may lie (`ext4`); [`Trimmed`] is the disk without it. Other file
//! systems are named (`other`) and left as they are.
//!
//! Whatever is not beyond doubt is refused: a file system that was not unmounted, tables that contradict one another or
//! their checksums. Nothing here writes to a disk. The rules and their sources are in `chunker/docs/free.md`.

mod checksum;
mod estimate;
mod ext4;
mod other;
mod partitions;
mod ranges;
mod trimmed;
mod window;

use std::fmt;
use std::ops::Range;

use thiserror::Error;

pub use self::estimate::{data_in, old_data_in};
pub use self::trimmed::Trimmed;

use self::partitions::Partition;
use self::ranges::Gatherer;
use self::window::{Fault, Window};
use crate::content::{Content, Progress, ReadError};

/// Where on a disk a file system lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The partition's number, as the kernel counts; none where it has the whole disk.
    pub partition: Option<u32>,
    /// Its first byte on the disk.
    pub offset: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.partition {
            Some(number) => write!(f, "in partition {number} (at byte {})", self.offset),
            None => write!(f, "of the whole disk"),
        }
    }
}

/// A file system whose free space is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Where it is.
    pub place: Place,
    /// `ext2`, `ext3` or `ext4`.
    pub kind: &'static str,
    /// Bytes that are free by its own count.
    pub free: u64,
    /// Bytes of old content in its journal.
    pub journal: u64,
}

/// What else lies on a disk, and is left as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Other {
    /// Where it is.
    pub place: Place,
    /// What it seems to be, such as `a FAT file system`.
    pub what: &'static str,
}

/// What of a disk no file has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FreeSpace {
    /// Bytes of the disk, in order and apart from each other. They begin and end at multiples of 4 KiB: what is
    /// smaller is not worth it.
    pub ranges: Vec<Range<u64>>,
    /// The file systems that these are of.
    pub systems: Vec<FileSystem>,
    /// What else is on the disk.
    pub others: Vec<Other>,
}

/// Why the free space of a disk cannot be told. Each names the place; the way out is to repair that, or not to trim.
#[derive(Debug, Error)]
pub enum FreeError {
    /// The disk could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// No file system that is understood.
    #[error("no ext2, ext3 or ext4 file system was found on this disk{}, so nothing is known to be free", found(.others))]
    NoFileSystem {
        /// What was found.
        others: Vec<Other>,
    },
    /// A file system that is in use, or whose last user did not end well.
    #[error("the {kind} file system {place} {why}")]
    Dirty {
        /// `ext2`, `ext3` or `ext4`.
        kind: &'static str,
        /// Where it is.
        place: Place,
        /// What shows it: `was not unmounted cleanly`.
        why: &'static str,
    },
    /// Tables that contradict themselves or their checksums, or are cut off.
    #[error("the {kind} file system {place} is damaged: {why}")]
    Damaged {
        /// `ext2`, `ext3` or `ext4`.
        kind: &'static str,
        /// Where it is.
        place: Place,
        /// What is wrong.
        why: String,
    },
    /// Features that this version does not know, or sizes beyond its bounds.
    #[error("the {kind} file system {place} cannot be trimmed: {why}")]
    Unsupported {
        /// `ext2`, `ext3` or `ext4`.
        kind: &'static str,
        /// Where it is.
        place: Place,
        /// What is not known.
        why: String,
    },
    /// Two things claim the same bytes, so that what is free in one may be the other's.
    #[error(
        "the {kind} file system {place} shares its bytes with {with}: one of them is a remnant"
    )]
    Ambiguous {
        /// `ext2`, `ext3` or `ext4`.
        kind: &'static str,
        /// Where it is.
        place: Place,
        /// What else is there.
        with: String,
    },
    /// A partition table that cannot be right.
    #[error("the partition table of this disk is damaged: {why}")]
    Table {
        /// What is wrong.
        why: String,
    },
    /// The work was told to stop.
    #[error("stopped")]
    Cancelled,
}

fn found(others: &[Other]) -> String {
    const TOLD: usize = 5;
    let names: Vec<String> = others.iter().take(TOLD).map(Other::to_string).collect();
    let more = if others.len() > TOLD { ", ..." } else { "" };
    match names.is_empty() {
        true => String::new(),
        false => format!(" (there is {}{more})", names.join(", ")),
    }
}

impl fmt::Display for Other {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.what, self.place)
    }
}

/// Finds what of a disk no file has.
///
/// Reads tables only: of a file system one block for every group of (mostly) 128 MiB. Memory is bounded by about 200 MiB
/// whatever the disk says, and is a few MiB for disks of usual sizes.
///
/// # Errors
/// [`FreeError`] if any file system on the disk is one that should be understood and is not beyond doubt, or if there is
/// none. Progress is only asked whether to stop.
pub fn find(disk: &dyn Content, progress: &dyn Progress) -> Result<FreeSpace, FreeError> {
    let partitions = partitions::read(disk)?;
    let mut space = FreeSpace::default();
    let mut gatherer = Gatherer::default();
    let whole = Partition {
        number: None,
        range: 0..disk.len(),
    };
    let places = match &partitions[..] {
        [] => std::slice::from_ref(&whole),
        partitions => {
            refuse_remnant(disk, partitions.len())?;
            partitions
        }
    };
    for part in places {
        let window = Window::new(disk, part.range.clone());
        let place = Place {
            partition: part.number,
            offset: part.range.start,
        };
        match ext4::probe(&window)? {
            Some(raw) => {
                let kind = raw.kind();
                refuse_sharing(&window, part, places, kind, &place)?;
                let (free, journal) = raw
                    .free_space(&window, &mut gatherer, progress)
                    .map_err(|fault| fault.at(kind, &place))?;
                space.systems.push(FileSystem {
                    place,
                    kind,
                    free,
                    journal,
                });
            }
            None => space.others.push(Other {
                place,
                what: other::name(&window)?,
            }),
        }
    }
    if space.systems.is_empty() {
        let others = space.others;
        return Err(FreeError::NoFileSystem { others });
    }
    space.ranges = gatherer.finish();
    Ok(space)
}

/// A disk that was one file system before it was partitioned may still show its superblock; it is of no use, but which
/// of the two counts is not ours to decide.
fn refuse_remnant(disk: &dyn Content, partitions: usize) -> Result<(), FreeError> {
    let window = Window::new(disk, 0..disk.len());
    match ext4::probe(&window)? {
        Some(raw) if raw.is_plausible(disk.len()) => Err(FreeError::Ambiguous {
            kind: raw.kind(),
            place: Place {
                partition: None,
                offset: 0,
            },
            with: format!("{partitions} partitions"),
        }),
        _ => Ok(()),
    }
}

/// The same within a partition, and where partitions overlap.
fn refuse_sharing(
    window: &Window<'_>,
    part: &Partition,
    all: &[Partition],
    kind: &'static str,
    place: &Place,
) -> Result<(), FreeError> {
    let overlapping = all.iter().find(|other| {
        other.number != part.number
            && other.range.start < part.range.end
            && part.range.start < other.range.end
    });
    let with = match (overlapping, other::beside_ext(window)?) {
        (Some(other), _) => format!("partition {}", other.number.unwrap_or(0)),
        (None, Some(what)) => what.to_owned(),
        (None, None) => return Ok(()),
    };
    Err(FreeError::Ambiguous {
        kind,
        place: place.clone(),
        with,
    })
}

impl Fault {
    fn at(self, kind: &'static str, place: &Place) -> FreeError {
        let place = place.clone();
        match self {
            Self::Read(error) => FreeError::Read(error),
            Self::Dirty(why) => FreeError::Dirty { kind, place, why },
            Self::Damaged(why) => FreeError::Damaged { kind, place, why },
            Self::Unsupported(why) => FreeError::Unsupported { kind, place, why },
            Self::Cancelled => FreeError::Cancelled,
        }
    }
}
