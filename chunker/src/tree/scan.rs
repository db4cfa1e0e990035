//! Walking a directory: names and metadata, no contents.
//!
//! Breadth first, all directories of a depth in parallel, each opened from the root by its path: few files are open at a
//! time, and nothing recurses. Memory: about 300 bytes an entry of common path length. Reading contents is in `source`.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use capsule_proto::RootHash;
use capsule_proto::codec::DecodeError;
use capsule_proto::listing::{Entry, EntryKind, EntryPath};
use rayon::prelude::*;
use rustix::fs::{Access, AtFlags, Dir, FileType, Stat};
use rustix::io::Errno;
use thiserror::Error;

use super::meta::{self, Handle};
use super::root::Root;
use super::source::TreeSource;
use crate::content::ReadError;
use crate::osfile::Fingerprint;

/// Most entries of a tree: what a listing of at most 1 GiB holds, and 3 GB of memory while it is made.
pub const MAX_ENTRIES: usize = 10_000_000;
/// Stands in a listing until a file's content has been hashed.
pub(super) const NO_ROOT: RootHash = RootHash::from_bytes([0; 32]);

/// How to walk a directory.
#[derive(Clone, Debug, Default)]
pub struct ScanOptions {
    /// Leave out what other file systems hold; directories on which they are mounted come out empty.
    pub one_file_system: bool,
    /// Leave out what has this path in the tree, and all below it.
    pub without: Option<EntryPath>,
}

/// Why a directory could not be walked.
#[derive(Debug, Error)]
pub enum ScanError {
    /// A file, directory or attribute could not be examined, or changed meanwhile.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// We may not read something.
    #[error("cannot read {}: {source}; run as a user who may read it (root), or move it out of the tree", .path.display())]
    Unreadable {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// What was to be walked is no directory.
    #[error("{} is not a directory", .path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// A path that a listing cannot hold.
    #[error("{}: {why}", .path.display())]
    Path {
        /// The entry.
        path: PathBuf,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// More than [`MAX_ENTRIES`].
    #[error("{} has more than {MAX_ENTRIES} entries: publish its parts, or an image of the file system", .path.display())]
    TooManyEntries {
        /// The directory.
        path: PathBuf,
    },
    /// Without `/proc`, extended attributes would be missed.
    #[error("/proc is not mounted; it is needed to read and write extended attributes: mount it")]
    NoProc,
    /// As many hashes as regular files are needed.
    #[error("the tree has {files} regular files, not {hashes}")]
    HashCount {
        /// Regular files.
        files: usize,
        /// Hashes given.
        hashes: usize,
    },
    /// The entries break a rule of the listing format.
    #[error("{} cannot be listed: {source}", .path.display())]
    Listing {
        /// The directory.
        path: PathBuf,
        /// The rule.
        source: DecodeError,
    },
}

/// An entry as it was found.
pub(super) struct Found {
    pub entry: Entry,
    pub stamp: Fingerprint,
    /// Device and inode where the entry may have other names.
    link: Option<(u64, u64)>,
    /// Whether the file occupies less than its length.
    pub sparse: bool,
    /// Whether to walk into it.
    descend: bool,
}

/// Walks a directory: metadata of everything in it, in canonical order.
pub fn scan(dir: &Path, options: &ScanOptions) -> Result<TreeSource, ScanError> {
    if !meta::proc_is_mounted() {
        return Err(ScanError::NoProc);
    }
    let root = Root::open(dir).map_err(|e| match e {
        Errno::NOTDIR => ScanError::NotADirectory { path: dir.into() },
        e => failed(dir.into(), e),
    })?;
    let mut found = walk(&root, options)?;
    found.par_sort_unstable_by(|a, b| a.entry.path.cmp(&b.entry.path));
    link(&mut found);
    Ok(TreeSource::new(root, found))
}

/// The error for an entry that could not be examined.
fn failed(path: PathBuf, errno: Errno) -> ScanError {
    match errno {
        Errno::ACCESS | Errno::PERM => ScanError::Unreadable {
            path,
            source: errno.into(),
        },
        _ => ReadError::io(path, 0, errno.into()).into(),
    }
}

/// The error for an entry that was there a moment ago.
fn failed_below(path: PathBuf, errno: Errno) -> ScanError {
    match errno {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NODATA => ReadError::Changed {
            path,
            why: "it was removed or replaced".to_owned(),
        }
        .into(),
        errno => failed(path, errno),
    }
}

struct Walk<'a> {
    root: &'a Root,
    options: &'a ScanOptions,
    device: u64,
    count: AtomicUsize,
    /// Root reads everything: no need to ask.
    may_read_all: bool,
}

fn walk(root: &Root, options: &ScanOptions) -> Result<Vec<Found>, ScanError> {
    let top = EntryPath::root();
    let examine = || {
        let stat = rustix::fs::fstat(root.fd())?;
        Ok((stat, Handle::Open(root.fd().as_fd()).xattrs()?))
    };
    let (stat, xattrs) = examine().map_err(|e| failed(root.display(&top), e))?;
    let walk = Walk {
        root,
        options,
        device: stat.st_dev,
        count: AtomicUsize::new(1),
        may_read_all: rustix::process::geteuid().is_root(),
    };
    let entry = Entry {
        path: top,
        meta: meta::metadata(&stat, xattrs),
        kind: EntryKind::Directory,
    };
    let mut found = vec![Found {
        entry,
        stamp: Fingerprint::of(&stat),
        link: None,
        sparse: false,
        descend: true,
    }];
    let mut level = 0..1;
    while !level.is_empty() {
        let below: Vec<Vec<Found>> = found[level.clone()]
            .par_iter()
            .filter(|f| f.descend)
            .map(|f| walk.directory(&f.entry.path))
            .collect::<Result<_, _>>()?;
        level = level.end..level.end + below.iter().map(Vec::len).sum::<usize>();
        found.extend(below.into_iter().flatten());
    }
    Ok(found)
}

impl Walk<'_> {
    fn directory(&self, path: &EntryPath) -> Result<Vec<Found>, ScanError> {
        let failed_here = |e| failed_below(self.root.display(path), e);
        let fd = self.root.directory(path).map_err(failed_here)?;
        let mut names = Dir::read_from(&fd).map_err(failed_here)?;
        let mut found = Vec::new();
        while let Some(name) = names.read() {
            let name = name.map_err(failed_here)?;
            let name = name.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            if self.count.fetch_add(1, Ordering::Relaxed) >= MAX_ENTRIES {
                return Err(ScanError::TooManyEntries {
                    path: self.root.display(&EntryPath::root()),
                });
            }
            let path = join(path, name.to_bytes()).map_err(|why| ScanError::Path {
                path: self.root.display(path),
                why,
            })?;
            if self.options.without.as_ref() != Some(&path) {
                found.push(self.entry(&fd, name, path)?);
            }
        }
        Ok(found)
    }

    fn entry(&self, dir: &OwnedFd, name: &CStr, path: EntryPath) -> Result<Found, ScanError> {
        let failed_here = |e| failed_below(self.root.display(&path), e);
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed_here)?;
        let kind = kind(dir, name, &stat).map_err(failed_here)?;
        if matches!(kind, EntryKind::File { .. }) && !self.may_read_all {
            rustix::fs::accessat(dir, name, Access::READ_OK, AtFlags::empty())
                .map_err(failed_here)?;
        }
        let xattrs = meta::xattrs_of(dir.as_fd(), name.to_bytes()).map_err(failed_here)?;
        let directory = kind == EntryKind::Directory;
        let size = stat.st_size as u64;
        Ok(Found {
            stamp: Fingerprint::of(&stat),
            link: (!directory && stat.st_nlink > 1).then_some((stat.st_dev, stat.st_ino)),
            sparse: matches!(kind, EntryKind::File { .. }) && (stat.st_blocks as u64) * 512 < size,
            descend: directory && (!self.options.one_file_system || stat.st_dev == self.device),
            entry: Entry {
                path,
                meta: meta::metadata(&stat, xattrs),
                kind,
            },
        })
    }
}

/// The path of a name in a directory.
pub(super) fn join(dir: &EntryPath, name: &[u8]) -> Result<EntryPath, &'static str> {
    match dir.as_bytes() {
        b"" => EntryPath::new(name),
        dir => EntryPath::new([dir, b"/", name].concat()),
    }
}

fn kind(dir: &OwnedFd, name: &CStr, stat: &Stat) -> Result<EntryKind, Errno> {
    let (major, minor) = (
        rustix::fs::major(stat.st_rdev),
        rustix::fs::minor(stat.st_rdev),
    );
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => EntryKind::Directory,
        FileType::RegularFile => EntryKind::File {
            size: stat.st_size as u64,
            root: NO_ROOT,
        },
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(dir, name, Vec::new())?;
            EntryKind::Symlink {
                target: std::ffi::OsString::from_vec(target.into_bytes()).into_vec(),
            }
        }
        FileType::CharacterDevice => EntryKind::CharDevice { major, minor },
        FileType::BlockDevice => EntryKind::BlockDevice { major, minor },
        FileType::Fifo => EntryKind::Fifo,
        FileType::Socket => EntryKind::Socket,
        FileType::Unknown => return Err(Errno::NOTSUP),
    })
}

/// Turns every name of an inode but the first into a hard link to the first.
fn link(found: &mut [Found]) {
    let mut first: HashMap<(u64, u64), u32> = HashMap::new();
    for at in 0..found.len() {
        let Some(inode) = found[at].link else {
            continue;
        };
        match first.get(&inode) {
            None => {
                first.insert(inode, at as u32);
            }
            Some(&to) => {
                let original = &found[to as usize];
                // The same file, though another call looked at it: one word for both.
                let (meta, stamp) = (original.entry.meta.clone(), original.stamp);
                let this = &mut found[at];
                this.entry.kind = EntryKind::HardLink { to };
                this.entry.meta = meta;
                this.stamp = stamp;
                this.sparse = false;
            }
        }
    }
}
