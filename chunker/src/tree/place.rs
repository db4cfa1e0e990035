//! Putting one entry in place: made under a name of its own, completed, then renamed.
//!
//! So a name in the tree stands for what it stood for before, or for the whole new entry, whenever one looks. What belongs
//! where and in which order is decided by `writer` and `finish`.

use std::ffi::CString;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use capsule_proto::listing::{Entry, Listing, MAX_DEPTH};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::meta::{self, Handle};
use super::restore::{RestoreError, Restored};
use super::root::{DIRECTORY, Root};

/// Aligned zeros of this length become holes; shorter ones are cheaper written than kept as holes.
const HOLE_LEN: usize = 16 << 10;
/// Names tried for a temporary entry: those that are taken are leftovers of an interrupted run.
const TRIES: usize = 10_000;

/// The directory that becomes the tree; shared by the threads that write it.
pub(super) struct Target {
    pub root: Root,
    pub listing: Arc<Listing>,
    /// Whether to replace and remove what is there.
    pub force: bool,
    /// Whether owners and devices can be expected to work.
    pub privileged: bool,
    pub tally: Tally,
    /// How temporary names begin.
    partial_prefix: String,
    next_partial: AtomicU64,
    failure: Mutex<Option<RestoreError>>,
}

/// Counts of [`Restored`], from many threads.
#[derive(Default)]
pub(super) struct Tally {
    pub written: AtomicU64,
    pub kept: AtomicU64,
    pub removed: AtomicU64,
    pub owners: AtomicU64,
    pub xattrs: AtomicU64,
    pub devices: AtomicU64,
}

/// Adds one to a count.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// An entry under a temporary name; removed again unless it is put in place.
pub(super) struct Partial {
    dir: Arc<OwnedFd>,
    name: String,
    placed: bool,
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.placed {
            // Best effort: `--force` removes what is left.
            let _ = rustix::fs::unlinkat(&*self.dir, &self.name, AtFlags::empty());
        }
    }
}

/// A beginning that no entry's name has: the tree may hold what an interrupted run left, or names that somebody thought up.
fn prefix_of_partials(listing: &Listing) -> String {
    loop {
        let random = RandomState::new().hash_one(std::process::id());
        let prefix = format!(".capsule-{random:016x}-");
        let is_taken = |entry: &Entry| {
            !entry.path.is_root() && entry.path.name().starts_with(prefix.as_bytes())
        };
        if !listing.entries().iter().any(is_taken) {
            return prefix;
        }
    }
}

impl Target {
    pub fn new(root: Root, listing: Arc<Listing>, force: bool) -> Self {
        let partial_prefix = prefix_of_partials(&listing);
        Self {
            root,
            listing,
            force,
            privileged: rustix::process::geteuid().is_root(),
            tally: Tally::default(),
            partial_prefix,
            next_partial: AtomicU64::new(0),
            failure: Mutex::new(None),
        }
    }

    /// The error of the operating system about an entry.
    pub fn failed(&self, entry: &Entry, doing: &'static str) -> impl FnOnce(Errno) -> RestoreError {
        move |errno| RestoreError::io(self.root.display(&entry.path), doing, errno)
    }

    /// Remembers the first failure of any thread.
    pub fn fail(&self, error: RestoreError) {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(error);
    }

    /// Reports a failure of another thread: in full once, then as [`RestoreError::Failed`].
    pub fn check(&self) -> Result<(), RestoreError> {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        match failure.replace(RestoreError::Failed) {
            None => {
                *failure = None;
                Ok(())
            }
            Some(error) => Err(error),
        }
    }

    /// Whether some thread has failed.
    pub fn has_failed(&self) -> bool {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    /// Makes an entry under a temporary name, by a call that fails with EEXIST if the name is taken.
    pub fn partial<T>(
        &self,
        dir: &Arc<OwnedFd>,
        make: impl Fn(&OwnedFd, &str) -> Result<T, Errno>,
    ) -> Result<(Partial, T), Errno> {
        for _ in 0..TRIES {
            let number = self.next_partial.fetch_add(1, Ordering::Relaxed);
            let name = format!("{}{number}.partial", self.partial_prefix);
            match make(dir, &name) {
                Err(Errno::EXIST) => {}
                Err(e) => return Err(e),
                Ok(made) => {
                    return Ok((
                        Partial {
                            dir: dir.clone(),
                            name,
                            placed: false,
                        },
                        made,
                    ));
                }
            }
        }
        Err(Errno::EXIST)
    }

    /// Makes an empty regular file under a temporary name.
    pub fn partial_file(&self, dir: &Arc<OwnedFd>) -> Result<(Partial, File), Errno> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.partial(dir, |dir, name| {
            rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR).map(File::from)
        })
    }

    /// Gives an entry its metadata, and counts what had to be left out.
    pub fn apply(&self, entry: &Entry, handle: Handle<'_>) -> Result<(), RestoreError> {
        let skipped = handle
            .apply(&entry.meta, self.privileged)
            .map_err(self.failed(entry, "setting metadata of"))?;
        if skipped.owner {
            count(&self.tally.owners);
        }
        self.tally
            .xattrs
            .fetch_add(skipped.xattrs, Ordering::Relaxed);
        Ok(())
    }

    /// Gives a temporary entry that is not open (a link, device, pipe or socket) its metadata and its name.
    pub fn complete_node(&self, entry: &Entry, partial: Partial) -> Result<(), RestoreError> {
        let failed = |errno| self.failed(entry, "setting metadata of")(errno);
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let node = rustix::fs::openat(&*partial.dir, &partial.name, flags, Mode::empty())
            .map_err(failed)?;
        // Whoever may write here may have put a name of another file in place of what we made: it would have two.
        let stat = rustix::fs::fstat(&node).map_err(failed)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if stat.st_nlink != 1 || kind.is_file() || kind.is_dir() {
            return Err(failed(Errno::BUSY));
        }
        self.apply(entry, Handle::Node(node.as_fd()))?;
        self.place(entry, partial)
    }

    /// Renames a temporary entry to its name; a directory that is in the way is removed.
    pub fn place(&self, entry: &Entry, mut partial: Partial) -> Result<(), RestoreError> {
        let (dir, name) = (partial.dir.clone(), entry.path.name());
        let rename = || rustix::fs::renameat(&*dir, &partial.name, &*dir, name);
        let mut result = rename();
        if self.force && matches!(result, Err(Errno::ISDIR | Errno::EXIST | Errno::NOTEMPTY)) {
            self.remove(&dir, name, self.root.display(&entry.path), MAX_DEPTH)?;
            result = rename();
        }
        result.map_err(self.failed(entry, "putting in place"))?;
        // Renaming one name of a file to another of the same file leaves both: then the temporary one goes.
        partial.placed = !matches!(
            entry.kind,
            capsule_proto::listing::EntryKind::HardLink { .. }
        );
        Ok(())
    }

    /// Removes an entry and all below it, without following links or leaving the file system; `depth` bounds the recursion.
    pub fn remove(
        &self,
        dir: &OwnedFd,
        name: &[u8],
        path: PathBuf,
        depth: usize,
    ) -> Result<(), RestoreError> {
        let refused = |why| RestoreError::NotRemoved {
            path: path.clone(),
            why,
        };
        let failed = |errno: Errno| RestoreError::io(path.clone(), "removing", errno);
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        let is_dir = FileType::from_raw_mode(stat.st_mode).is_dir();
        if is_dir {
            if rustix::fs::fstat(dir).map_err(failed)?.st_dev != stat.st_dev {
                return Err(refused("another file system is mounted there"));
            }
            if depth == 0 {
                return Err(refused("it is more than 1,024 directories deep"));
            }
            if !self.privileged {
                meta::make_accessible(dir.as_fd(), name).map_err(failed)?;
            }
            let flags = DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let below = rustix::fs::openat(dir, name, flags, Mode::empty()).map_err(failed)?;
            for inner in names(&below).map_err(failed)? {
                let inner_path = path.join(std::ffi::OsStr::new(&*inner.to_string_lossy()));
                self.remove(&below, inner.to_bytes(), inner_path, depth - 1)?;
            }
        }
        let flags = if is_dir {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        rustix::fs::unlinkat(dir, name, flags).map_err(failed)?;
        count(&self.tally.removed);
        Ok(())
    }

    /// The counts so far.
    pub fn restored(&self) -> Restored {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Restored {
            files_written: get(&self.tally.written),
            files_kept: get(&self.tally.kept),
            removed: get(&self.tally.removed),
            owners_skipped: get(&self.tally.owners),
            xattrs_skipped: get(&self.tally.xattrs),
            devices_skipped: get(&self.tally.devices),
        }
    }
}

/// The names in a directory.
pub(super) fn names(dir: &OwnedFd) -> Result<Vec<CString>, Errno> {
    let mut names = Vec::new();
    let mut reader = Dir::read_from(dir)?;
    while let Some(entry) = reader.read() {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

/// Writes data into a new file, leaving aligned zeros out as holes; returns whether the last byte was written.
pub(super) fn write_sparse(file: &File, offset: u64, data: &[u8]) -> io::Result<bool> {
    let (mut written, mut at) = (0, 0);
    while at < data.len() {
        let end = data
            .len()
            .min(at + HOLE_LEN - ((offset + at as u64) % HOLE_LEN as u64) as usize);
        if end - at == HOLE_LEN && is_zero(&data[at..end]) {
            file.write_all_at(&data[written..at], offset + written as u64)?;
            written = end;
        }
        at = end;
    }
    file.write_all_at(&data[written..], offset + written as u64)?;
    Ok(written < data.len())
}

/// Whether all bytes are zero: the first is, and each equals the one before it, which is one `memcmp`.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.first() == Some(&0) && bytes[1..] == bytes[..bytes.len() - 1]
}
