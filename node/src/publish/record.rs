//! What an image itself tells of change, so that publishing it costs what changed: an overlay tells which clusters are not those of
//! the image behind it, and a dirty bitmap what was written since it began. The hash tree is then made from that of the older content, and
//! only what changed is read.
//!
//! An image behind counts as known if its files are what they were when it was published or exported here. A bitmap is used if the parent is what
//! was last published of that image; when it began only the user knows, so a sample of what it does not mark is compared with the parent.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use capsule_chunker::bao::{Tree, verify};
use capsule_chunker::content::{Content, Source};
use capsule_chunker::free::{self, Trimmed};
use capsule_chunker::image::{ImageRecord, OpenedImage, Stamp};
use capsule_proto::ranges::{groups_touching, whole_groups};
use capsule_proto::{GROUP_LEN, GroupRanges, RootHash};
use rand::RngExt;

use super::make::Making;
use super::parent::Old;
use crate::control::{Failure, FailureCode};
use crate::rehash::{Differing, RehashError, Watched, rehash, tree_of};
use crate::store::{Scratch, Store};
use crate::work::Work;

/// Groups of what a bitmap does not mark that are compared with the parent: 4 MiB. If one group in fifty is wrong, one time in 170 none
/// of them is found.
const SAMPLE: usize = 256;

/// Older content that is here, and where the new may differ from it.
pub(super) struct Recorded {
    base: Tree,
    changed: GroupRanges,
    /// The dirty bitmap that says so, if it is one.
    pub bitmap: Option<String>,
}

/// Under which an image is remembered: by its files, and by whether its free space was taken out.
pub fn image_key(stamp: &Stamp, trimmed: bool) -> RootHash {
    RootHash::of(&[&stamp.hash[..], &[trimmed.into()]].concat())
}

/// Under which a file or directory is remembered as what was last published of it, whatever is written to it since: by device and inode.
fn place_key((device, inode): (u64, u64)) -> RootHash {
    let place = [device.to_le_bytes(), inode.to_le_bytes()].concat();
    RootHash::of(&[&b"last published"[..], &place].concat())
}

/// The same of a directory.
pub(super) fn directory_key(path: &Path) -> Option<RootHash> {
    let metadata = std::fs::metadata(path).ok()?;
    Some(place_key((metadata.dev(), metadata.ino())))
}

/// What an image is to be remembered as, once it is published: as what its files hold now, if they cannot change without that being seen;
/// and as what was last published of it. What a bitmap says is not proven, and must not become so.
pub(super) fn keys_to_note(
    image: &OpenedImage,
    trimmed: bool,
    by_bitmap: bool,
    began: SystemTime,
) -> Vec<RootHash> {
    let Some(record) = &image.record else {
        return Vec::new();
    };
    let stamps = record.stamps().unwrap_or_default();
    let stamp = stamps.first().filter(|stamp| stamp.settled(began));
    let content = stamp.filter(|_| !by_bitmap);
    let content = content.map(|stamp| image_key(stamp, trimmed));
    content
        .into_iter()
        .chain([place_key(record.file())])
        .collect()
}

/// Remembers it. A hint that is missing only costs time.
pub fn note(store: &Store, keys: &[RootHash], content: RootHash) {
    if let Err(error) = store.note_images(keys, content) {
        tracing::debug!(%error, "an image is not remembered");
    }
}

impl Making<'_> {
    /// What the image's own record tells, where it tells anything.
    pub(super) fn recorded(
        &self,
        image: &OpenedImage,
        trimmed: Option<&Trimmed<'_>>,
        old: &Old,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Recorded>, Failure> {
        let Some(record) = image.record.as_ref().filter(|_| !self.request.checksum) else {
            return Ok(None);
        };
        let free = trimmed.map_or(&[][..], Trimmed::zeros);
        if let Some(bitmap) = &self.request.bitmap {
            return self.marked(record, bitmap, free, old, warnings);
        }
        for (depth, stamp) in record.stamps()?.iter().enumerate().skip(1) {
            for was_trimmed in [trimmed.is_some(), trimmed.is_none()] {
                let known = self.store.image(&image_key(stamp, was_trimmed))?;
                let Some(base) = known.and_then(|root| tree_of(self.store, root)) else {
                    continue;
                };
                let Some(mut changed) = record.changed_above(depth)? else {
                    return Ok(None);
                };
                if was_trimmed {
                    let Some(was_free) = self.free_behind(record, depth)? else {
                        continue;
                    };
                    let (now, then) = (groups_of(free), groups_of(&was_free));
                    changed.union_with(&now.difference(&then));
                    changed.union_with(&then.difference(&now));
                    // At the edges of both a group may be free in part.
                    changed.union_with(&edges(free));
                    changed.union_with(&edges(&was_free));
                } else {
                    changed.union_with(&groups_of(free));
                }
                return Ok(Some(Recorded {
                    base,
                    changed,
                    bitmap: None,
                }));
            }
        }
        Ok(None)
    }

    /// What was free in the image behind when that was published: found in the same way, as it is the same.
    fn free_behind(
        &self,
        record: &ImageRecord,
        depth: usize,
    ) -> Result<Option<Vec<Range<u64>>>, Failure> {
        let Some(behind) = record.behind(depth)? else {
            return Ok(None);
        };
        let content: &dyn Content = &*behind;
        Ok(free::find(content, self.work).ok().map(|free| free.ranges))
    }

    /// What a dirty bitmap marks since the parent.
    fn marked(
        &self,
        record: &ImageRecord,
        bitmap: &str,
        free: &[Range<u64>],
        old: &Old,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Recorded>, Failure> {
        let mut unused = |why: &str| {
            warnings.push(format!(
                "the dirty bitmap {bitmap} was not used, and everything was read: {why}"
            ));
            Ok(None)
        };
        let Some(mut changed) = record.marked(bitmap)? else {
            return unused("it marks too many places");
        };
        // It can only have begun with what was last published of this file.
        let last = self.store.image(&place_key(record.file()))?;
        if last != Some(old.component.root) {
            return unused(if old.is_earlier() {
                "the parent is read through too many layers"
            } else {
                "the parent is not what was last published of this image here"
            });
        }
        let Some(base) = tree_of(self.store, old.component.root) else {
            return unused("the parent's hash tree is not here");
        };
        changed.union_with(&groups_of(free));
        // Whether the parent was trimmed is not known; if so, its free space may be other than what lies there.
        if let Ok(then) = free::find(&*old.content, self.work) {
            changed.union_with(&groups_of(&then.ranges));
        }
        Ok(Some(Recorded {
            base,
            changed,
            bitmap: Some(bitmap.to_owned()),
        }))
    }
}

impl Recorded {
    /// What whoever wrote it tells.
    pub fn known(base: Tree, changed: GroupRanges) -> Self {
        Self {
            base,
            changed,
            bitmap: None,
        }
    }

    /// How much of new content of a size need not be read.
    pub fn unread(&self, size: u64) -> u64 {
        let common = GroupRanges::all(size.min(self.base.size));
        common.difference(&self.changed).bytes(size)
    }

    /// The hash tree of the new content, and its outboard; none if the older one's tree is damaged.
    pub fn hash(
        &self,
        source: &dyn Source,
        store: &Store,
        work: &Work,
    ) -> Result<Option<(Tree, Scratch)>, Failure> {
        if let Some(bitmap) = &self.bitmap {
            self.compare_sample(source, store, bitmap, work)?;
        }
        let mut zero = GroupRanges::new();
        for extent in source.extents() {
            let extent = extent?;
            if extent.zero {
                zero.insert(whole_groups(&extent.range, source.len()));
            }
        }
        let differing = Differing {
            base: self.base,
            changed: self.changed.clone(),
            zero,
        };
        match rehash(store, source, &differing, work) {
            Ok(hashed) => Ok(Some(hashed)),
            Err(RehashError::Base) => Ok(None),
            Err(RehashError::Read(error)) => Err(error.into()),
            Err(RehashError::Failed(failure)) => Err(failure),
        }
    }

    /// Compares some of what a bitmap does not mark with the older content.
    fn compare_sample(
        &self,
        source: &dyn Source,
        store: &Store,
        bitmap: &str,
        work: &Work,
    ) -> Result<(), Failure> {
        let common = self.base.size.min(source.len());
        let common = if self.base.size == source.len() {
            GroupRanges::all(common)
        } else {
            // The last group of the shorter one is another in the longer one.
            GroupRanges::from(0..common / GROUP_LEN)
        };
        let same = common.difference(&self.changed);
        let count = same.count();
        let mut rng = rand::rng();
        let mut sample = GroupRanges::new();
        for _ in 0..SAMPLE.min(count as usize) {
            sample.insert(nth(&same, rng.random_range(0..count)));
        }
        let outboard = store.open_outboard(&self.base.root)?;
        let content = Watched::new(source, work);
        let right = verify(&self.base, &sample, &content, &*outboard);
        if let Some(error) = content.into_error() {
            return Err(error.into());
        }
        let right = right.map_err(|error| Failure::new(FailureCode::Io, error.to_string()))?;
        if right == sample {
            return Ok(());
        }
        let message = format!(
            "the dirty bitmap {bitmap} does not mark all that changed since the parent: it began later, or with another version"
        );
        Err(Failure::new(FailureCode::Refused, message).hint(
            "leave out --bitmap, so that everything is read; and clear it when this version is published: `qemu-img bitmap --clear IMAGE NAME`",
        ))
    }
}

/// The groups that have bytes of ranges.
fn groups_of(ranges: &[Range<u64>]) -> GroupRanges {
    ranges.iter().map(groups_touching).collect()
}

/// The groups in which ranges begin and end.
fn edges(ranges: &[Range<u64>]) -> GroupRanges {
    let edge = |at: u64| groups_touching(&(at..at + 1));
    ranges
        .iter()
        .flat_map(|range| [edge(range.start), edge(range.end.saturating_sub(1))])
        .collect()
}

/// One of the groups of a set, by its number among them.
fn nth(set: &GroupRanges, mut number: u64) -> Range<u64> {
    for run in set.runs() {
        let len = run.end - run.start;
        if number < len {
            return run.start + number..run.start + number + 1;
        }
        number -= len;
    }
    0..0
}
