//! Which files of a scanned directory an older listing knows, so that they need not be read.
//!
//! As rsync does: a file of the same path, length and time of modification is taken for unchanged. Time and length are what
//! every program changes that does not set out to deceive; who doubts it reads everything.

use std::collections::HashMap;

use capsule_proto::RootHash;
use capsule_proto::listing::{Entry, EntryKind, Listing};

use super::source::TreeSource;
use crate::content::{Content, Source};
use crate::delta::{Known, Outline};

/// What an older listing knows of a directory's contents.
#[derive(Debug)]
pub struct TreeOutline {
    /// The contents, as those of the older tree (source 0), or unknown.
    pub outline: Outline,
    /// Hash of each regular file, in listing order; none: to be read.
    roots: Vec<Option<RootHash>>,
}

impl TreeOutline {
    /// Compares a directory with an older listing, by metadata alone.
    pub fn of(source: &TreeSource, old: &Listing) -> Self {
        let mut known = HashMap::new();
        let mut start = 0;
        for (entry, size, root) in old.files() {
            let entry = &old.entries()[entry];
            known.insert(&entry.path, (entry.meta.mtime, size, root, start));
            start += size;
        }
        let mut outline = Outline::default();
        let mut roots = Vec::with_capacity(source.file_count());
        for (size, entry) in files(source.entries()) {
            let same = known
                .get(&entry.path)
                .filter(|(mtime, len, ..)| (*mtime, *len) == (entry.meta.mtime, size));
            let place = same.map(|(.., offset)| match *offset {
                offset if offset == outline.len() => Known::Inherited,
                offset => Known::Copy { source: 0, offset },
            });
            outline.push(size, place);
            roots.push(same.map(|(_, _, root, _)| *root));
        }
        Self { outline, roots }
    }

    /// Of a directory of which everything is to be read.
    pub fn unknown(source: &TreeSource) -> Self {
        Self {
            outline: Outline::unknown(source.len()),
            roots: vec![None; source.file_count()],
        }
    }

    /// The hashes of all files, given those of the parts that were read: of the unknown files and all empty ones.
    ///
    /// # Panics
    /// Where there are fewer.
    pub fn roots(&self, source: &TreeSource, read: &[RootHash]) -> Vec<RootHash> {
        let mut read = read.iter();
        let parts = source.parts().into_iter().flatten();
        self.roots
            .iter()
            .zip(parts)
            .map(|(known, len)| match known {
                Some(root) if len > 0 => *root,
                _ => *read.next().expect("a hash of every part that was read"),
            })
            .collect()
    }
}

fn files(entries: &[Entry]) -> impl Iterator<Item = (u64, &Entry)> {
    entries.iter().filter_map(|entry| match entry.kind {
        EntryKind::File { size, .. } => Some((size, entry)),
        _ => None,
    })
}
