//! Metadata of one entry: read from the file system, written back.
//!
//! Owners, modes, times and extended attributes only; what an entry is, and its content, are handled by `scan` and
//! `writer`. Entries that are not opened (links, devices, pipes) are reached through `/proc/self/fd`.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use capsule_proto::listing::{MAX_XATTR_LEN, Metadata};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

/// Longest list of attribute names: Linux's XATTR_LIST_MAX.
const MAX_XATTR_LIST: usize = 64 << 10;
/// Set-user-id and set-group-id: rights of the owner, so never given to another.
const SET_ID: u16 = 0o6000;

type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// An entry whose metadata can be set: by a handle, so that it is certainly the entry that was made or checked.
#[derive(Clone, Copy)]
pub(super) enum Handle<'a> {
    /// An open file or directory.
    Open(BorrowedFd<'a>),
    /// What an `O_PATH` handle stands for: links, devices, pipes and sockets, which are not opened.
    Node(BorrowedFd<'a>),
}

/// How to reach an entry's attributes.
enum Reach<'a> {
    Fd(BorrowedFd<'a>),
    /// A path through `/proc/self/fd`; whether its last name is to be followed.
    Path(CString, bool),
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

/// Reads an entry's attributes that are part of the content, sorted by name; the entry is a name in a directory.
///
/// The path leads through the open directory, so it stays right whatever is renamed above; a link means the link.
pub(super) fn xattrs_of(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Xattrs, Errno> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    Reach::Path(CString::new(path).map_err(|_| Errno::INVAL)?, false).all()
}

/// The path of what a handle stands for.
fn proc_path(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).expect("no NUL in a number")
}

impl Reach<'_> {
    fn all(&self) -> Result<Xattrs, Errno> {
        let mut found = Xattrs::new();
        for name in self.names()? {
            let value = self.get(&name)?;
            found.push((name.into_bytes(), value));
        }
        found.sort();
        Ok(found)
    }

    fn names(&self) -> Result<Vec<CString>, Errno> {
        // Most entries have none: ask with a small buffer first.
        let mut buf = vec![0; 256];
        let len = loop {
            let result = match self {
                Self::Fd(fd) => rustix::fs::flistxattr(fd, &mut buf[..]),
                Self::Path(path, true) => rustix::fs::listxattr(path, &mut buf[..]),
                Self::Path(path, false) => rustix::fs::llistxattr(path, &mut buf[..]),
            };
            match result {
                Ok(len) => break len,
                Err(Errno::RANGE) if buf.len() < MAX_XATTR_LIST => buf.resize(MAX_XATTR_LIST, 0),
                // The file system has no attributes.
                Err(Errno::OPNOTSUPP) => break 0,
                Err(e) => return Err(e),
            }
        };
        let names = buf[..len]
            .split(|&b| b == 0)
            .filter(|name| !name.is_empty() && is_content(name));
        Ok(names
            .map(|name| CString::new(name).expect("split at NUL"))
            .collect())
    }

    fn get(&self, name: &CStr) -> Result<Vec<u8>, Errno> {
        let mut buf = vec![0; 256];
        loop {
            let result = match self {
                Self::Fd(fd) => rustix::fs::fgetxattr(fd, name, &mut buf[..]),
                Self::Path(path, true) => rustix::fs::getxattr(path, name, &mut buf[..]),
                Self::Path(path, false) => rustix::fs::lgetxattr(path, name, &mut buf[..]),
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

    fn set(&self, name: &[u8], value: &[u8]) -> Result<(), Errno> {
        match self {
            Self::Fd(fd) => rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty()),
            Self::Path(path, true) => rustix::fs::setxattr(path, name, value, XattrFlags::empty()),
            Self::Path(path, false) => {
                rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
            }
        }
    }

    fn remove(&self, name: &CStr) -> Result<(), Errno> {
        match self {
            Self::Fd(fd) => rustix::fs::fremovexattr(fd, name),
            Self::Path(path, true) => rustix::fs::removexattr(path, name),
            Self::Path(path, false) => rustix::fs::lremovexattr(path, name),
        }
    }
}

impl Handle<'_> {
    /// Reads the attributes that are part of the content, sorted by name.
    pub fn xattrs(self) -> Result<Xattrs, Errno> {
        self.reach().all()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Open(fd) | Self::Node(fd) => *fd,
        }
    }

    fn reach(&self) -> Reach<'_> {
        match self {
            Self::Open(fd) => Reach::Fd(*fd),
            Self::Node(fd) => Reach::Path(proc_path(*fd), true),
        }
    }

    /// Gives an entry its metadata: owner first, as changing it clears rights; the time last.
    pub fn apply(self, meta: &Metadata, privileged: bool) -> Result<Skipped, Errno> {
        let owner = self.set_owner(meta, privileged)?;
        let xattrs = self.set_xattrs(&meta.xattrs)?;
        self.set_mode(if owner {
            meta.mode
        } else {
            meta.mode & !SET_ID
        })?;
        self.set_mtime(meta.mtime)?;
        Ok(Skipped {
            owner: !owner,
            xattrs,
        })
    }

    /// Returns whether owner and group are now right.
    fn set_owner(self, meta: &Metadata, privileged: bool) -> Result<bool, Errno> {
        if !privileged {
            let stat = rustix::fs::fstat(self.fd())?;
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
            Self::Open(fd) => rustix::fs::fchown(fd, uid, gid),
            Self::Node(fd) => rustix::fs::chownat(fd, "", uid, gid, AtFlags::EMPTY_PATH),
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
            // A link has no mode of its own.
            Self::Node(fd)
                if FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode).is_symlink() =>
            {
                Ok(())
            }
            Self::Node(fd) => rustix::fs::chmod(proc_path(fd), mode),
        }
    }

    fn set_mtime(self, (seconds, nanos): (i64, u32)) -> Result<(), Errno> {
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: rustix::fs::UTIME_OMIT,
            },
            last_modification: Timespec {
                tv_sec: seconds,
                tv_nsec: nanos.into(),
            },
        };
        match self {
            Self::Open(fd) => rustix::fs::futimens(fd, &times),
            Self::Node(fd) => rustix::fs::utimensat(fd, "", &times, AtFlags::EMPTY_PATH),
        }
    }

    /// Makes the attributes exactly these; returns how many could not be set or removed.
    fn set_xattrs(self, wanted: &Xattrs) -> Result<u64, Errno> {
        let reach = self.reach();
        let mut skipped = 0;
        let mut done = |result: Result<(), Errno>| match result {
            Ok(()) => Ok(()),
            // Not supported, not allowed (labels, `trusted.`), or more than the file system holds for one file.
            Err(
                Errno::OPNOTSUPP
                | Errno::PERM
                | Errno::ACCESS
                | Errno::INVAL
                | Errno::TOOBIG
                | Errno::RANGE
                | Errno::NOSPC,
            ) => {
                skipped += 1;
                Ok(())
            }
            Err(e) => Err(e),
        };
        for name in reach.names()? {
            if wanted
                .binary_search_by(|(n, _)| n.as_slice().cmp(name.to_bytes()))
                .is_err()
            {
                done(reach.remove(&name))?;
            }
        }
        for (name, value) in wanted {
            done(reach.set(name, value))?;
        }
        Ok(skipped)
    }
}

/// Lets us work in a directory that denies it, where we own it.
pub(super) fn make_accessible(dir: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    let mode = Mode::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode & 0o7777);
    if mode.contains(Mode::RWXU) {
        Ok(())
    } else {
        rustix::fs::chmod(proc_path(fd.as_fd()), mode | Mode::RWXU)
    }
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
