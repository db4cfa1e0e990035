//! A scanned directory as a source: its regular files' bytes, one after another in listing order.
//!
//! Files are opened when they are read, small ones for one read each, and compared with what the scan saw of them. Walking the
//! directory is in `scan`.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use capsule_proto::RootHash;
use capsule_proto::listing::{Entry, EntryKind, EntryPath, Listing};
use rayon::prelude::*;
use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::root::Root;
use super::scan::{Found, ScanError};
use crate::content::{Content, Extent, Extents, Parts, ReadError, Source, check_range};
use crate::osfile::{self, Fingerprint};

/// Files kept open between reads of their parts: a few threads read a few large files at a time.
const OPEN_FILES: usize = 16;
/// Shorter files are not asked for their holes.
const MIN_SPARSE: u64 = 16 << 10;

/// A directory's contents: its regular files' bytes, one after another in listing order.
///
/// Made by [`scan`](super::scan()). Reading fails where a file is no longer what the scan saw.
#[derive(Debug)]
pub struct TreeSource {
    root: Root,
    entries: Vec<Entry>,
    stamps: Vec<Fingerprint>,
    files: Vec<FileAt>,
    len: u64,
    open: Mutex<VecDeque<(u32, Arc<File>)>>,
}

/// Where a regular file lies in the contents.
#[derive(Clone, Copy, Debug)]
struct FileAt {
    start: u64,
    entry: u32,
    sparse: bool,
}

impl TreeSource {
    /// Lays out the contents of what was found; sorted, the root first.
    pub(super) fn new(root: Root, found: Vec<Found>) -> Self {
        let (mut entries, mut stamps) = (
            Vec::with_capacity(found.len()),
            Vec::with_capacity(found.len()),
        );
        let (mut files, mut len) = (Vec::new(), 0);
        for found in found {
            if let EntryKind::File { size, .. } = found.entry.kind {
                let sparse = found.sparse && size >= MIN_SPARSE;
                files.push(FileAt {
                    start: len,
                    entry: entries.len() as u32,
                    sparse,
                });
                len += size;
            }
            entries.push(found.entry);
            stamps.push(found.stamp);
        }
        Self {
            root,
            entries,
            stamps,
            files,
            len,
            open: Mutex::default(),
        }
    }

    /// The entries in canonical order, the root directory first; files' hashes are not known yet.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Number of regular files: of parts, and of the hashes that [`Self::into_listing`] wants.
    pub fn file_count(&self) -> usize {
        self.files.len()
    }

    /// Where a regular file lies in the contents; files count from 0 in listing order.
    pub fn file_range(&self, file: usize) -> Range<u64> {
        self.files[file].start..self.files.get(file + 1).map_or(self.len, |next| next.start)
    }

    /// When a regular file's inode was changed last, in seconds since 1970.
    pub fn changed_at(&self, file: usize) -> u64 {
        self.stamp(file).changed_at()
    }

    /// Path of a regular file, for messages.
    pub fn file_path(&self, file: usize) -> PathBuf {
        self.root.display(self.entry_path(file))
    }

    /// The listing, given the files' hashes in order.
    pub fn into_listing(mut self, file_roots: &[RootHash]) -> Result<Listing, ScanError> {
        if file_roots.len() != self.files.len() {
            return Err(ScanError::HashCount {
                files: self.files.len(),
                hashes: file_roots.len(),
            });
        }
        for (file, hash) in self.files.iter().zip(file_roots) {
            if let EntryKind::File { root, .. } = &mut self.entries[file.entry as usize].kind {
                *root = *hash;
            }
        }
        let path = self.root.display(&EntryPath::root());
        // What was needed to read is not needed to list.
        drop((self.stamps, self.files));
        Listing::new(self.entries).map_err(|source| ScanError::Listing { path, source })
    }

    fn entry_path(&self, file: usize) -> &EntryPath {
        &self.entries[self.files[file].entry as usize].path
    }

    fn stamp(&self, file: usize) -> &Fingerprint {
        &self.stamps[self.files[file].entry as usize]
    }

    fn open(&self, file: usize) -> Result<File, ReadError> {
        self.root
            .file(self.entry_path(file))
            .map_err(|e| self.gone(self.files[file].entry as usize, e))
    }

    /// Reads part of one file.
    fn read_file(&self, file: usize, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let whole = buf.len() as u64 == self.stamp(file).size();
        let handle = if whole {
            Arc::new(self.open(file)?)
        } else {
            self.cached(file)?
        };
        let path = || self.file_path(file);
        if let Err(error) = osfile::read_exact(std::path::Path::new(""), &handle, offset, buf) {
            return Err(self.named(error, path()));
        }
        // Comparing after the read with what was before it covers the read itself. Reads of parts are checked at the last one.
        if offset + buf.len() as u64 == self.stamp(file).size() {
            let now =
                rustix::fs::fstat(&*handle).map_err(|e| ReadError::io(path(), offset, e.into()))?;
            if let Some(why) = self.stamp(file).difference(&Fingerprint::of(&now)) {
                return Err(ReadError::Changed { path: path(), why });
            }
        }
        Ok(())
    }

    /// Paths are put together for errors only.
    fn named(&self, error: ReadError, name: PathBuf) -> ReadError {
        match error {
            ReadError::Io { offset, source, .. } => ReadError::Io {
                path: name,
                offset,
                source,
            },
            ReadError::Changed { why, .. } => ReadError::Changed { path: name, why },
            error => error,
        }
    }

    /// A file of which parts are read, kept open for the next.
    fn cached(&self, file: usize) -> Result<Arc<File>, ReadError> {
        let key = file as u32;
        let cache = || self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, open)) = cache().iter().find(|(known, _)| *known == key) {
            return Ok(open.clone());
        }
        let opened = Arc::new(self.open(file)?);
        let mut cache = cache();
        if cache.len() == OPEN_FILES {
            cache.pop_front();
        }
        cache.push_back((key, opened.clone()));
        Ok(opened)
    }

    /// The error for an entry that can no longer be opened or examined.
    fn gone(&self, entry: usize, errno: Errno) -> ReadError {
        let path = self.root.display(&self.entries[entry].path);
        match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO => ReadError::Changed {
                path,
                why: "it was removed or replaced".to_owned(),
            },
            errno => ReadError::io(path, 0, errno.into()),
        }
    }

    fn check_entry(&self, at: usize) -> Result<(), ReadError> {
        let (entry, stamp) = (&self.entries[at], &self.stamps[at]);
        let name = if entry.path.is_root() {
            b"."
        } else {
            entry.path.as_bytes()
        };
        // Directories above may have been replaced by links since, but then the inode differs.
        let now = rustix::fs::statat(self.root.fd(), name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| self.gone(at, e))?;
        // Writing to a device or pipe touches its times, but nothing that is published.
        let special = matches!(
            entry.kind,
            EntryKind::CharDevice { .. } | EntryKind::BlockDevice { .. } | EntryKind::Fifo
        );
        match stamp.difference(&Fingerprint::of(&now)) {
            Some(why) if !special || !stamp.same_inode(&Fingerprint::of(&now)) => {
                Err(ReadError::Changed {
                    path: self.root.display(&entry.path),
                    why,
                })
            }
            _ => Ok(()),
        }
    }
}

impl Content for TreeSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(self.len, offset, buf.len())?;
        let (mut at, mut rest) = (offset, buf);
        // Of files that begin here all but the last are empty.
        let mut file = self
            .files
            .partition_point(|f| f.start <= at)
            .saturating_sub(1);
        while !rest.is_empty() {
            let range = self.file_range(file);
            let len = (range.end - at).min(rest.len() as u64) as usize;
            let (part, after) = rest.split_at_mut(len);
            if len > 0 {
                self.read_file(file, at - range.start, part)?;
            }
            (at, rest, file) = (at + len as u64, after, file + 1);
        }
        Ok(())
    }
}

impl Source for TreeSource {
    fn extents(&self) -> Extents<'_> {
        Box::new(ExtentWalk {
            tree: self,
            file: 0,
            at: 0,
            open: None,
        })
    }

    fn parts(&self) -> Option<Parts<'_>> {
        Some(Box::new((0..self.files.len()).map(|file| {
            let range = self.file_range(file);
            range.end - range.start
        })))
    }

    /// Examines every entry once more, in parallel: also directories, so that a name that came or went is noticed.
    fn check_unchanged(&self) -> Result<(), ReadError> {
        (0..self.entries.len())
            .into_par_iter()
            .try_for_each(|at| self.check_entry(at))
    }
}

/// Walks the files: runs of dense ones as one extent, sparse ones by their holes.
struct ExtentWalk<'a> {
    tree: &'a TreeSource,
    file: usize,
    at: u64,
    open: Option<File>,
}

impl ExtentWalk<'_> {
    fn sparse(&mut self) -> Result<Extent, ReadError> {
        let range = self.tree.file_range(self.file);
        let open = match self.open.take() {
            Some(open) => open,
            None => self.tree.open(self.file)?,
        };
        let found = osfile::extent_at(&open, self.at - range.start, range.end - range.start)
            .map_err(|e| ReadError::io(self.tree.file_path(self.file), self.at - range.start, e))?;
        let extent = Extent {
            range: self.at..range.start + found.range.end,
            ..found
        };
        if extent.range.end == range.end {
            self.file += 1;
        } else {
            self.open = Some(open);
        }
        Ok(extent)
    }
}

impl Iterator for ExtentWalk<'_> {
    type Item = Result<Extent, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let files = &self.tree.files;
        let start = self.at;
        while self.file < files.len() && !files[self.file].sparse {
            self.at = self.tree.file_range(self.file).end;
            self.file += 1;
        }
        if self.at > start {
            return Some(Ok(Extent {
                range: start..self.at,
                zero: false,
            }));
        }
        if self.file == files.len() {
            return None;
        }
        let extent = self.sparse();
        match &extent {
            Ok(extent) => self.at = extent.range.end,
            // The end: an error is not repeated.
            Err(_) => (self.file, self.at) = (files.len(), self.tree.len),
        }
        Some(extent)
    }
}
