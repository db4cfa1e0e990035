//! Which files of a scanned directory an older listing knows, so that they need not be read.
//!
//! As rsync does: a file of the same path, length and time of modification is taken for unchanged; but only if its inode was not
//! changed either since the older listing was made. That time no program sets, so trees whose files all have one date are
//! not mistaken. Who doubts it still (another directory with the same names and times, say) reads everything.

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
    /// Compares a directory with an older listing, made before `since` (seconds since 1970), by metadata alone.
    pub fn of(source: &TreeSource, old: &Listing, since: u64) -> Self {
        let mut known = HashMap::new();
        let mut start = 0;
        for (entry, size, root) in old.files() {
            let entry = &old.entries()[entry];
            known.insert(&entry.path, (entry.meta.mtime, size, root, start));
            start += size;
        }
        let mut outline = Outline::default();
        let mut roots = Vec::with_capacity(source.file_count());
        for (file, (size, entry)) in files(source.entries()).enumerate() {
            let is_old = source.changed_at(file) < since;
            let same = known
                .get(&entry.path)
                .filter(|(mtime, len, ..)| is_old && (*mtime, *len) == (entry.meta.mtime, size));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::Content;
    use crate::tree::{ScanOptions, scan};

    #[test]
    fn only_what_was_not_touched_since_is_taken_for_unchanged() {
        let temp = tempfile::tempdir().unwrap();
        for (name, content) in [("a", "first"), ("b", "second"), ("empty", "")] {
            std::fs::write(temp.path().join(name), content).unwrap();
        }
        let read = || scan(temp.path(), &ScanOptions::default()).unwrap();
        let roots = ["first", "second", ""].map(|content| RootHash::of(content.as_bytes()));
        let old = read().into_listing(&roots).unwrap();
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let source = read();
        let all = TreeOutline::of(&source, &old, now + 10);
        assert_eq!(all.outline.unknown_len(), 0);
        assert_eq!(all.roots(&source, &roots[2..]), roots);
        assert_eq!(
            TreeOutline::of(&source, &old, now - 10)
                .outline
                .unknown_len(),
            source.len()
        );
        // A file that comes first moves the others, which then are copies.
        std::fs::write(temp.path().join("Z"), "new").unwrap();
        let source = read();
        let moved = TreeOutline::of(&source, &old, now + 10);
        assert_eq!(
            (moved.outline.unknown_len(), moved.outline.segments().len()),
            (3, 2)
        );
    }
}
