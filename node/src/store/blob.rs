//! One blob in memory: what is present of it, what of that is durable, and its open files.
//!
//! States of a group, disjoint: *absent*; *present* (verified and written, not yet committed: served by
//! this process, forgotten by a crash); *durable* (present, and the database says so). Transitions:
//! absent -> present by a verified write; present -> durable by a flush; present -> absent by a failed
//! sync; both -> absent by damage, punching and removal. The code of the transitions is in `partial`,
//! `import`, `damage` and `gc`; here are the state and its locks.
//!
//! Locks, in the order in which they are taken:
//! 1. `turn`: the right to change the blob's row. Whoever commits presence, or takes it away, holds it.
//! 2. `gate`: writers hold it shared from before they write until what they wrote counts as present;
//!    who must not overlap with a write (punch, removal, replacing the files) holds it exclusively.
//! 3. `state`: held for moments, never across I/O.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};
use std::time::Instant;

use capsule_chunker::bao::Tree;
use capsule_proto::ranges::group_count;
use capsule_proto::{GROUP_LEN, GroupRanges, RootHash};
use positioned_io::ReadAt;

use super::disk::{Disk, DiskFile, OpenMode};
use super::error::IoFault;
use super::rows::{BlobKind, BlobRow};

/// Directory of the blobs' files; below it one directory for each first byte of a hash.
pub(super) const BLOBS_DIR: &str = "blobs";

/// A blob, whole or in part.
#[derive(Debug)]
pub(super) struct Blob {
    pub root: RootHash,
    pub size: u64,
    pub kind: BlobKind,
    turn: Mutex<()>,
    gate: RwLock<()>,
    state: Mutex<BlobState>,
}

/// What is known of a blob's groups. `durable` is a subset of `present`.
#[derive(Debug, Default)]
pub(super) struct BlobState {
    pub present: GroupRanges,
    pub durable: GroupRanges,
    /// Bytes written since the last flush began.
    pub dirty: u64,
    /// When the first of them were.
    pub dirty_since: Option<Instant>,
    /// Whether the database has a row for it.
    pub row: bool,
    /// Removed, or being removed: whoever still has this must look it up again.
    pub gone: bool,
    /// The open files while there is something to flush: a sync through the same description sees
    /// every error of the writes before it.
    pub files: Option<Arc<BlobFiles>>,
    /// Whether all that is absent was punched since this process began: a crash between commit and punching leaves space taken.
    pub swept: bool,
    /// Bytes of a small blob until they are in the database.
    pub small: Option<Arc<Vec<u8>>>,
}

/// A blob's two open files.
#[derive(Debug)]
pub(super) struct BlobFiles {
    pub data: FileReader,
    pub tree: FileReader,
    nodes: OnceLock<Box<[AtomicU64]>>,
}

/// A file as the chunker reads it.
#[derive(Debug, Clone)]
pub(super) struct FileReader(pub Arc<dyn DiskFile>);

/// Which of a hash's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Part {
    /// The blob's bytes.
    Data,
    /// The blob's outboard.
    Tree,
    /// The outboard of a component that is served by decoding.
    Component,
}

/// Remembered hash pairs a blob: enough for the paths above the pieces in flight, 32 KiB.
const KNOWN_NODES: usize = 4096;
/// Blobs whose files are kept open: two descriptors each, far below the usual limit of 1,024.
const OPEN_BLOBS: usize = 128;

impl Blob {
    pub(super) fn new(root: RootHash, size: u64, kind: BlobKind) -> Self {
        Self {
            root,
            size,
            kind,
            turn: Mutex::default(),
            gate: RwLock::default(),
            state: Mutex::default(),
        }
    }

    pub(super) fn from_row(root: RootHash, row: BlobRow) -> Self {
        let blob = Self::new(root, row.size, row.kind);
        let state = BlobState {
            present: row.ranges.clone(),
            durable: row.ranges,
            row: true,
            ..BlobState::default()
        };
        *blob.state() = state;
        blob
    }

    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.turn)
    }

    pub(super) fn gate_shared(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn gate_exclusive(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, BlobState> {
        lock(&self.state)
    }

    pub(super) fn tree(&self) -> Tree {
        Tree {
            root: self.root,
            size: self.size,
        }
    }

    pub(super) fn row(&self, ranges: GroupRanges) -> BlobRow {
        BlobRow {
            kind: self.kind,
            size: self.size,
            ranges,
        }
    }

    pub(super) fn all(&self) -> GroupRanges {
        GroupRanges::all(self.size)
    }

    /// Whether all groups are in the set.
    pub(super) fn completes(&self, ranges: &GroupRanges) -> bool {
        ranges.contains_run(&(0..group_count(self.size)))
    }

    /// Whether it lives in the database instead of files: one group has no outboard, and is not worth two files.
    pub(super) fn is_small(&self) -> bool {
        is_small(self.size)
    }

    /// What groups of it cost in space: their bytes, and a hash pair each.
    pub(super) fn cost(&self, ranges: &GroupRanges) -> u64 {
        cost(self.size, ranges)
    }

    /// What of a run is not present.
    pub(super) fn missing(&self, groups: &Range<u64>) -> GroupRanges {
        GroupRanges::from(groups.clone()).difference(&self.state().present)
    }
}

/// Whether a blob of this size lives in the database.
pub(super) const fn is_small(size: u64) -> bool {
    size <= GROUP_LEN
}

/// What groups of a blob of `size` bytes cost in space.
pub(super) fn cost(size: u64, ranges: &GroupRanges) -> u64 {
    ranges.bytes(size) + 64 * ranges.count()
}

/// Locks; a panic elsewhere while it was held does not spread.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The directory of a hash's files.
pub(super) fn dir_of(root: &RootHash) -> PathBuf {
    Path::new(BLOBS_DIR).join(&root.to_string()[..2])
}

/// One of a hash's files.
pub(super) fn path_of(root: &RootHash, part: Part) -> PathBuf {
    dir_of(root).join(format!("{root}.{}", part.extension()))
}

impl Part {
    pub(super) const fn extension(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Tree => "tree",
            Self::Component => "component",
        }
    }

    /// The hash and the part of a file by its name, if it is one of ours.
    pub(super) fn of_name(name: &str) -> Option<(RootHash, Self)> {
        let (hash, extension) = name.split_once('.')?;
        let part = [Self::Data, Self::Tree, Self::Component]
            .into_iter()
            .find(|p| p.extension() == extension)?;
        Some((hash.parse().ok()?, part))
    }
}

impl BlobFiles {
    pub(super) fn open(disk: &dyn Disk, root: &RootHash, mode: OpenMode) -> Result<Self, IoFault> {
        let open = |part| {
            let path = path_of(root, part);
            disk.open(&path, mode)
                .map(FileReader)
                .map_err(|e| IoFault::new("open", path, e))
        };
        Ok(Self {
            data: open(Part::Data)?,
            tree: open(Part::Tree)?,
            nodes: OnceLock::new(),
        })
    }

    /// Writes hash pairs, neighbours together, and skips those known to be written.
    ///
    /// The paths above a piece are the same in response after response: without this, half of the
    /// writes would be of 64 bytes that lie there already.
    pub(super) fn write_nodes(&self, nodes: &[(u64, &[u8; 64])]) -> io::Result<()> {
        let known = self
            .nodes
            .get_or_init(|| (0..KNOWN_NODES).map(|_| AtomicU64::new(u64::MAX)).collect());
        let slot = |offset: u64| &known[(offset / 64) as usize % KNOWN_NODES];
        let mut run = Vec::new();
        let mut start = 0;
        let wanted = nodes
            .iter()
            .filter(|(offset, _)| slot(*offset).load(Ordering::Acquire) != *offset);
        for (offset, pair) in wanted {
            if start + run.len() as u64 != *offset {
                self.write_run(start, &run)?;
                run.clear();
                start = *offset;
            }
            run.extend_from_slice(&pair[..]);
        }
        self.write_run(start, &run)?;
        // Only now: another writer that skips a pair must find it written.
        nodes
            .iter()
            .for_each(|(offset, _)| slot(*offset).store(*offset, Ordering::Release));
        Ok(())
    }

    fn write_run(&self, offset: u64, run: &[u8]) -> io::Result<()> {
        if run.is_empty() {
            Ok(())
        } else {
            self.tree.0.write_at(offset, &[run])
        }
    }
}

impl ReadAt for FileReader {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(offset, buf)
    }
}

/// Open files of the blobs used last.
#[derive(Debug, Default)]
pub(super) struct Handles {
    open: Mutex<HashMap<RootHash, (Arc<BlobFiles>, u64)>>,
    clock: AtomicU64,
}

impl Handles {
    /// The blob's files, opened if they are not.
    pub(super) fn get(
        &self,
        disk: &dyn Disk,
        root: &RootHash,
        mode: OpenMode,
    ) -> Result<Arc<BlobFiles>, IoFault> {
        let now = self.clock.fetch_add(1, Ordering::Relaxed);
        let mut open = lock(&self.open);
        if let Some((files, used)) = open.get_mut(root) {
            *used = now;
            return Ok(Arc::clone(files));
        }
        let files = Arc::new(BlobFiles::open(disk, root, mode)?);
        if open.len() >= OPEN_BLOBS {
            close_one(&mut open);
        }
        open.insert(*root, (Arc::clone(&files), now));
        Ok(files)
    }

    /// Closes a blob's files; what still uses them goes on.
    pub(super) fn forget(&self, root: &RootHash) {
        lock(&self.open).remove(root);
    }
}

/// Closes the files that were not used for longest, among those that nobody uses now.
fn close_one(open: &mut HashMap<RootHash, (Arc<BlobFiles>, u64)>) {
    let idle = open
        .iter()
        .filter(|(_, (files, _))| Arc::strong_count(files) == 1);
    if let Some(root) = idle
        .min_by_key(|(_, (_, used))| *used)
        .map(|(root, _)| *root)
    {
        open.remove(&root);
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk::RealDisk;
    use super::*;

    fn disk() -> (tempfile::TempDir, RealDisk) {
        let dir = tempfile::tempdir().unwrap();
        let disk = RealDisk::new(dir.path());
        disk.create_dir(Path::new(BLOBS_DIR)).unwrap();
        for byte in 0..=255u8 {
            disk.create_dir(&Path::new(BLOBS_DIR).join(format!("{byte:02x}")))
                .unwrap();
        }
        (dir, disk)
    }

    #[test]
    fn names_of_files_are_recognised() {
        let root = RootHash::of(b"x");
        for part in [Part::Data, Part::Tree, Part::Component] {
            let path = path_of(&root, part);
            let name = path.file_name().unwrap().to_str().unwrap();
            assert_eq!(Part::of_name(name), Some((root, part)));
            assert_eq!(path.parent().unwrap(), dir_of(&root));
        }
        assert_eq!(Part::of_name("notes.txt"), None);
        assert_eq!(Part::of_name(&format!("{root}.data.bak")), None);
    }

    #[test]
    fn open_files_are_bounded_and_those_in_use_stay() {
        let (_dir, disk) = disk();
        let handles = Handles::default();
        let root = |i: usize| RootHash::of(&i.to_le_bytes());
        let used = handles.get(&disk, &root(0), OpenMode::Create).unwrap();
        for i in 1..3 * OPEN_BLOBS {
            handles.get(&disk, &root(i), OpenMode::Create).unwrap();
            assert!(lock(&handles.open).len() <= OPEN_BLOBS);
        }
        assert!(Arc::ptr_eq(
            &used,
            &handles.get(&disk, &root(0), OpenMode::Existing).unwrap()
        ));
        handles.forget(&root(0));
        assert!(!Arc::ptr_eq(
            &used,
            &handles.get(&disk, &root(0), OpenMode::Existing).unwrap()
        ));
    }

    #[test]
    fn pairs_are_written_once() {
        let (_dir, disk) = disk();
        let files = BlobFiles::open(&disk, &RootHash::of(b"y"), OpenMode::Create).unwrap();
        let pairs: Vec<[u8; 64]> = (0..6).map(|i| [i; 64]).collect();
        files
            .write_nodes(&[(0, &pairs[0]), (64, &pairs[1]), (640, &pairs[2])])
            .unwrap();
        // The first is known and skipped, whatever it is said to be now.
        files
            .write_nodes(&[(0, &pairs[5]), (128, &pairs[3]), (192, &pairs[4])])
            .unwrap();
        let mut back = [0; 704];
        super::super::disk::read_exact(&*files.tree.0, 0, &mut back).unwrap();
        let at = |offset: usize| back[offset];
        assert_eq!([0, 64, 128, 192, 256, 640].map(at), [0, 1, 3, 4, 0, 2]);
    }
}
