//! What an image itself tells of change: which of its clusters are its own and not those of the image behind it, and which a
//! dirty bitmap marks. Only tables are read for that, never data.
//!
//! Nothing here knows what content an older image had; whoever published or wrote it remembers its [`Stamp`].

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use capsule_proto::GroupRanges;
use capsule_proto::ranges::groups_touching;

use super::bitmap;
use super::chain::{Chain, Link};
use super::complete::SUBCLUSTERS;
use super::detect::Format;
use super::qcow2::Qcow2Source;
use super::raw::RawSource;
use super::tables::{COMPRESSED, COPIED, Cluster, Extant, OFFSET, Tables, ZERO};
use crate::content::{ReadError, Source};
use crate::osfile::Fingerprint;

/// Most runs of changed chunk groups: 64 MiB of them. What changed in more places is read as a whole.
const MAX_RUNS: usize = 1 << 22;
/// A file's times are those of the kernel's clock before, which ticks every 10 ms at most.
const TICK: Duration = Duration::from_millis(20);
/// File systems that keep whole seconds, or two, as FAT does.
const COARSE_TICK: Duration = Duration::from_secs(3);

/// Recognises an image whose files were not changed: their devices, inodes, lengths and times, those of the images behind it too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// A hash of all of it.
    pub hash: [u8; 32],
    /// When the data of one of its files was changed last.
    modified: SystemTime,
    /// Until when after that something may be written that changes none of the times.
    tick: Duration,
}

impl Stamp {
    /// Of a raw image.
    pub fn of_raw(path: &Path, file: &File) -> Result<Self, ReadError> {
        Ok(stamp(&Chain::raw(path, file)?.links))
    }

    /// Whether it could not be the same if something had been written at a moment or after it. Within the clock's tick it could.
    pub fn settled(&self, moment: SystemTime) -> bool {
        self.modified + self.tick <= moment
    }

    /// How long after the last change it is settled.
    pub fn tick(&self) -> Duration {
        self.tick
    }
}

/// The files of an image, and what they tell.
pub struct ImageRecord {
    links: Arc<[Arc<Link>]>,
    needs_qemu: bool,
}

impl ImageRecord {
    pub(super) fn new(chain: &Chain) -> Self {
        Self {
            links: chain.links.clone(),
            needs_qemu: chain.needs_qemu,
        }
    }

    /// Of the image itself, then of each image behind it; none where one of them is no regular file, raw or qcow2: each depends on
    /// all that is behind it.
    pub fn stamps(&self) -> Result<Vec<Stamp>, ReadError> {
        for link in self.links.iter() {
            if !matches!(link.format, Format::Raw | Format::Qcow2) || !link.is_regular()? {
                return Ok(Vec::new());
            }
        }
        let stamps = (0..self.links.len()).map(|depth| stamp(&self.links[depth..]));
        Ok(stamps.collect())
    }

    /// Device and inode of the image's own file: the same whatever is written to it.
    pub fn file(&self) -> (u64, u64) {
        (self.links[0].device, self.links[0].stamp.inode())
    }

    /// The groups of the disk that are not just what the image at a depth of the chain (1: the one behind it) has there.
    ///
    /// None if that is not known: in images with features that are new, or where more than some millions of places changed.
    pub fn changed_above(&self, depth: usize) -> Result<Option<GroupRanges>, ReadError> {
        let mut changed = GroupRanges::new();
        for link in &self.links[..depth] {
            let Some(facts) = link.facts.filter(|facts| facts.is_known) else {
                return Ok(None);
            };
            let Some(own) = allocated(link, &facts.tables)? else {
                return Ok(None);
            };
            changed.union_with(&own);
        }
        // What lies beyond the end of any of them reads as zeros, whatever the image behind has there.
        let lens = self.links[..=depth].iter().map(|link| link.disk_len());
        let (shared, len) = (lens.min().unwrap_or(0), self.links[0].disk_len());
        if shared < len {
            changed.insert(groups_touching(&(shared..len)));
        }
        Ok((changed.runs().len() <= MAX_RUNS).then_some(changed))
    }

    /// Fails if a file of the image is not what it was.
    pub(super) fn check_unchanged(&self) -> Result<(), ReadError> {
        self.links
            .iter()
            .try_for_each(|link| link.check_unchanged())
    }

    /// The image at a depth of the chain, as a source; none if it takes QEMU to read it.
    pub fn behind(&self, depth: usize) -> Result<Option<Box<dyn Source>>, ReadError> {
        let link = &self.links[depth];
        if self.needs_qemu {
            return Ok(None);
        }
        if link.format == Format::Raw {
            let file = link.try_clone()?;
            return Ok(Some(Box::new(RawSource::file(&link.path, file)?)));
        }
        Ok(Some(Box::new(Qcow2Source::new(
            self.links[depth..].into(),
        )?)))
    }

    /// The groups of the disk that a persistent dirty bitmap marks; none if they are in some millions of places.
    pub fn marked(&self, bitmap: &str) -> Result<Option<GroupRanges>, ReadError> {
        bitmap::read(&self.links[0], bitmap)
    }
}

fn stamp(links: &[Arc<Link>]) -> Stamp {
    let mut hasher = blake3::Hasher::new();
    let mut modified = SystemTime::UNIX_EPOCH;
    let mut tick = TICK;
    let mut add = |device: u64, stamp: &Fingerprint| {
        if stamp.is_coarse() {
            tick = COARSE_TICK;
        }
        hasher.update(&device.to_le_bytes());
        stamp.fields().iter().for_each(|field| {
            hasher.update(&field.to_le_bytes());
        });
        modified = modified.max(stamp.modified());
    };
    for link in links {
        // Which is not among the fields, but the same file may be read in two ways.
        add(u64::from(link.format == Format::Qcow2), &link.stamp);
        add(link.device, &link.stamp);
        if let Some(data) = &link.data {
            add(data.device, &data.stamp);
        }
    }
    Stamp {
        hash: *hasher.finalize().as_bytes(),
        modified,
        tick,
    }
}

/// The groups that an image has clusters of its own for, zeros among them; none if these are in too many places.
fn allocated(link: &Link, tables: &Tables) -> Result<Option<GroupRanges>, ReadError> {
    let image = Extant::new(&link.path, &link.file)?;
    let mut own = Places::default();
    tables.each_cluster(&image, |cluster| {
        for bytes in own_parts(&cluster, tables) {
            own.add(bytes.start..bytes.end.min(tables.disk));
        }
        Ok(())
    })?;
    Ok(own.finish())
}

/// The parts of a cluster that do not come from the image behind.
fn own_parts(cluster: &Cluster, tables: &Tables) -> impl Iterator<Item = Range<u64>> + use<> {
    let (start, len) = (cluster.start, 1_u64 << tables.cluster_bits);
    let part = len / SUBCLUSTERS;
    let parts = match cluster.bitmap {
        Some(bitmap) if cluster.entry & COMPRESSED == 0 => (bitmap | bitmap >> 32) as u32,
        _ if cluster.entry & (OFFSET | COMPRESSED | COPIED | ZERO) != 0 => u32::MAX,
        _ => 0,
    };
    let whole = parts == u32::MAX;
    let some = (0..SUBCLUSTERS).filter(move |bit| !whole && parts >> bit & 1 == 1);
    let some = some.map(move |bit| start + bit * part..start + (bit + 1) * part);
    whole.then(|| start..start + len).into_iter().chain(some)
}

/// Chunk groups in the making, of bytes in order; none in the end if they are in too many places.
#[derive(Default)]
pub(super) struct Places(GroupRanges);

impl Places {
    pub fn add(&mut self, bytes: Range<u64>) {
        if self.0.runs().len() <= MAX_RUNS {
            self.0.insert(groups_touching(&bytes));
        }
    }

    pub fn finish(self) -> Option<GroupRanges> {
        (self.0.runs().len() <= MAX_RUNS).then_some(self.0)
    }
}
