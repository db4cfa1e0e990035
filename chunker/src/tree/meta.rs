//! Metadata of one entry: read from the file system, written back.
//!
//! Owners, modes, times and extended attributes only; what an entry is, and its content, are handled by `scan` and
//! `writer`. Attributes of entries that cannot be opened (links, devices, pipes) are reached through `/proc/self/fd`.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use capsule_proto::listing::{MAX_XATTR_LEN, Metadata};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

/// Longest list of attribute names: Linux's XATTR_LIST_MAX.
const MAX_XATTR_LIST: usize = 64 << 10;
/// Set-user-id and set-group-id: rights of the owner, so never given to another.
const SET_ID: u16 = 0o6000;

type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// An entry whose metadata is at hand: by name in an open directory, or itself open.
#[derive(Clone, Copy)]
pub(super) enum Handle<'a> {
    /// A name in a directory; a symbolic link means the link.
    Name(BorrowedFd<'a>, &'a [u8]),
    /// An open file or directory.
    Open(BorrowedFd<'a>),
}

/// What could not be restored of an entry's metadata, for lack of rights or support.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Skipped {
    /// The owner or group.
    pub owner: bool,
    /// How many attributes.
    pub xattrs: u64,
}

/// Whether an attribute is part of the content. Others in `system.` are views that file systems compute.
fn is_content(name: &[u8]) -> bool {
    !name.starts_with(b"system.") || name.starts_with(b"system.posix_acl_")
}

/// Whether attributes can be reached at all; without `/proc` they would silently be missed.
pub(super) fn proc_is_mounted() -> bool {
    rustix::fs::access("/proc/self/fd", rustix::fs::Access::EXISTS).is_ok()
}

/// A path to an entry that resolves through an open directory: it stays right whatever is renamed above.
fn proc_path(dir: BorrowedFd<'_>, name: &[u8]) -> Result<CString, Errno> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    CString::new(path).map_err(|_| Errno::INVAL)
}

impl Handle<'_> {
    /// Reads the attributes that are part of the content, sorted by name.
    pub fn xattrs(self) -> Result<Xattrs, Errno> {
        let path = self.path()?;
        let mut found = Xattrs::new();
        for name in self.xattr_names(&path)? {
            let value = self.xattr(&path, &name)?;
            found.push((name.into_bytes(), value));
        }
        found.sort();
        Ok(found)
    }

    /// For names: the path through `/proc`, made once.
    fn path(self) -> Result<CString, Errno> {
        match self {
            Self::Name(dir, name) => proc_path(dir, name),
            Self::Open(_) => Ok(CString::default()),
        }
    }

    fn xattr_names(self, path: &CStr) -> Result<Vec<CString>, Errno> {
        // Most entries have none: ask with a small buffer first.
        let mut buf = vec![0; 256];
        let len = loop {
            let result = match self {
                Self::Name(..) => rustix::fs::llistxattr(path, &mut buf[..]),
                Self::Open(fd) => rustix::fs::flistxattr(fd, &mut buf[..]),
            };
            match result {
                Ok(len) => break len,
                Err(Errno::RANGE) if buf.len() < MAX_XATTR_LIST => buf.resize(MAX_XATTR_LIST, 0),
                // EOPNOTSUPP: the file system has no attributes.
                Err(Errno::OPNOTSUPP) => break 0,
                Err(e) => return Err(e),
            }
        };
        let names = buf[..len].split(|&b| b == 0).filter(|name| !name.is_empty() && is_content(name));
        Ok(names.map(|name| CString::new(name).expect("split at NUL")).collect())
    }

    fn xattr(self, path: &CStr, name: &CStr) -> Result<Vec<u8>, Errno> {
        let mut buf = vec![0; 256];
        loop {
            let result = match self {
                Self::Name(..) => rustix::fs::lgetxattr(path, name, &mut buf[..]),
                Self::Open(fd) => rustix::fs::fgetxattr(fd, name, &mut buf[..]),
            };
            match result {
                Ok(len) => {
                    buf.truncate(len);
                    return Ok(buf);
                }
                Err(Errno::RANGE) if buf.len() < MAX_XATTR_LEN => buf.resize(MAX_XATTR_LEN, 0),
                Err(e) => return Err(e),
            }
        }
    }

    /// Gives an entry its metadata: owner first, as changing it clears rights; the time last.
    pub fn apply(self, meta: &Metadata, privileged: bool) -> Result<Skipped, Errno> {
        let owner = self.set_owner(meta, privileged)?;
        let xattrs = self.set_xattrs(&meta.xattrs)?;
        self.set_mode(if owner { meta.mode } else { meta.mode & !SET_ID })?;
        self.set_mtime(meta.mtime)?;
        Ok(Skipped { owner: !owner, xattrs })
    }

    fn stat(self) -> Result<Stat, Errno> {
        match self {
            Self::Name(dir, name) => rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW),
            Self::Open(fd) => rustix::fs::fstat(fd),
        }
    }

    /// Returns whether owner and group are now right.
    fn set_owner(self, meta: &Metadata, privileged: bool) -> Result<bool, Errno> {
        if !privileged {
            let stat = self.stat()?;
            if (stat.st_uid, stat.st_gid) == (meta.uid, meta.gid) {
                return Ok(true);
            }
        }
        // The kernel reads -1 as "leave it": no file can belong to that id.
        if meta.uid == u32::MAX || meta.gid == u32::MAX {
            return Ok(false);
        }
        let (uid, gid) = (Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)));
        let result = match self {
            Self::Name(dir, name) => rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW),
            Self::Open(fd) => rustix::fs::fchown(fd, uid, gid),
        };
        match result {
            Ok(()) => Ok(true),
            // EINVAL: an id that the user namespace does not map. File systems without owners say EPERM or EOPNOTSUPP.
            Err(Errno::PERM | Errno::INVAL | Errno::OPNOTSUPP) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn set_mode(self, mode: u16) -> Result<(), Errno> {
        let mode = Mode::from_raw_mode(mode.into());
        match self {
            Self::Open(fd) => rustix::fs::fchmod(fd, mode),
            Self::Name(dir, name) => {
                // A handle that is certainly no link; then the file behind the handle.
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(dir, name, flags, Mode::empty())?;
                if rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode).is_symlink() {
                    return Ok(());
                }
                chmod_behind(&fd, mode)
            }
        }
    }

    fn set_mtime(self, (seconds, nanos): (i64, u32)) -> Result<(), Errno> {
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
            last_modification: Timespec { tv_sec: seconds, tv_nsec: nanos.into() },
        };
        match self {
            Self::Name(dir, name) => rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW),
            Self::Open(fd) => rustix::fs::futimens(fd, &times),
        }
    }

    /// Makes the attributes exactly these; returns how many could not be set or removed.
    fn set_xattrs(self, wanted: &Xattrs) -> Result<u64, Errno> {
        let path = self.path()?;
        let mut skipped = 0;
        let mut done = |result: Result<(), Errno>| match result {
            Ok(()) => Ok(()),
            // Not supported, not allowed (labels, `trusted.`), or more than the file system holds for one file.
            Err(Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS | Errno::INVAL | Errno::TOOBIG | Errno::RANGE | Errno::NOSPC) => {
                skipped += 1;
                Ok(())
            }
            Err(e) => Err(e),
        };
        for name in self.xattr_names(&path)? {
            if wanted.binary_search_by(|(n, _)| n.as_slice().cmp(name.to_bytes())).is_ok() {
                continue;
            }
            done(match self {
                Self::Name(..) => rustix::fs::lremovexattr(&path, &name),
                Self::Open(fd) => rustix::fs::fremovexattr(fd, &name),
            })?;
        }
        for (name, value) in wanted {
            done(match self {
                Self::Name(..) => rustix::fs::lsetxattr(&path, &name[..], value, XattrFlags::empty()),
                Self::Open(fd) => rustix::fs::fsetxattr(fd, &name[..], value, XattrFlags::empty()),
            })?;
        }
        Ok(skipped)
    }
}

/// Changes the mode of what an `O_PATH` handle stands for.
fn chmod_behind(fd: &OwnedFd, mode: Mode) -> Result<(), Errno> {
    rustix::fs::chmod(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()), mode)
}

/// Lets us work in a directory that denies it, where we own it.
pub(super) fn make_accessible(dir: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    let mode = Mode::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
    if mode.contains(Mode::RWXU) { Ok(()) } else { chmod_behind(&fd, (mode | Mode::RWXU) & Mode::from_raw_mode(0o7777)) }
}

/// Takes owner, mode and time from what `stat` says.
pub(super) fn metadata(stat: &Stat, xattrs: Xattrs) -> Metadata {
    Metadata {
        mode: (stat.st_mode & 0o7777) as u16,
        uid: stat.st_uid,
        gid: stat.st_gid,
        // File systems keep less than 10^9 here; the bound is the format's.
        mtime: (stat.st_mtime, (stat.st_mtime_nsec as u32).min(999_999_999)),
        xattrs,
    }
}
