//! Paths below an open directory, resolved without following any symbolic link.
//!
//! Every operation of `tree` goes through here: whatever others do to the directory meanwhile, no path leads out of it.
//! The kernel's `openat2` resolves a whole path at once; where it is missing (before Linux 5.6, some sandboxes) each name is opened in
//! turn. Only the root stays open, so that open files do not grow with the tree's depth.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use capsule_proto::listing::EntryPath;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// How to open a directory in order to read it and to work in it.
pub(super) const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);
/// Always added: never a symbolic link, never a terminal, never waiting for a pipe's other end.
const ALWAYS: OFlags = OFlags::NOFOLLOW
    .union(OFlags::CLOEXEC)
    .union(OFlags::NOCTTY)
    .union(OFlags::NONBLOCK);
/// `openat2` asks for another try when a rename races with it; after so many the slow way is taken.
const TRIES: usize = 16;

/// A directory, as the root of a tree.
#[derive(Debug)]
pub(super) struct Root {
    fd: OwnedFd,
    path: PathBuf,
    /// Whether the kernel resolves paths for us.
    openat2: AtomicBool,
}

impl Root {
    /// Opens a directory; links in `path` itself are followed, as it is the user's word.
    pub fn open(path: &Path) -> Result<Self, Errno> {
        let fd = rustix::fs::open(path, DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self {
            fd,
            path: path.into(),
            openat2: AtomicBool::new(true),
        })
    }

    /// The open directory itself.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Where an entry lies, for messages.
    pub fn display(&self, path: &EntryPath) -> PathBuf {
        if path.is_root() {
            self.path.clone()
        } else {
            self.path.join(OsStr::from_bytes(path.as_bytes()))
        }
    }

    /// Opens an entry; a symbolic link anywhere in the path is an error.
    pub fn open_at(&self, path: &EntryPath, flags: OFlags) -> Result<OwnedFd, Errno> {
        let name = if path.is_root() {
            b"."
        } else {
            path.as_bytes()
        };
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let mut tries = 0;
        while self.openat2.load(Ordering::Relaxed) && tries < TRIES {
            match rustix::fs::openat2(&self.fd, name, flags | ALWAYS, Mode::empty(), resolve) {
                Err(Errno::AGAIN) => tries += 1,
                // Sandboxes answer EPERM for what they do not know; then the walk tells the truth.
                Err(Errno::NOSYS | Errno::PERM) => self.openat2.store(false, Ordering::Relaxed),
                result => return result,
            }
        }
        self.walk_to(path, flags)
    }

    /// Opens a directory to work in.
    pub fn directory(&self, path: &EntryPath) -> Result<OwnedFd, Errno> {
        self.open_at(path, DIRECTORY)
    }

    /// Opens a file to read; whether it is a regular one is the caller's to check.
    pub fn file(&self, path: &EntryPath) -> Result<File, Errno> {
        self.open_at(path, OFlags::RDONLY).map(File::from)
    }

    /// Opens one name after the other.
    fn walk_to(&self, path: &EntryPath, flags: OFlags) -> Result<OwnedFd, Errno> {
        let mut at = rustix::fs::openat(&self.fd, ".", DIRECTORY | ALWAYS, Mode::empty())?;
        let mut names = path.names().peekable();
        while let Some(name) = names.next() {
            let flags = if names.peek().is_some() {
                OFlags::PATH | OFlags::DIRECTORY
            } else {
                flags
            };
            at = rustix::fs::openat(&at, name, flags | ALWAYS, Mode::empty())?;
        }
        Ok(at)
    }
}

/// The directory last used, kept open: entries in listing order share it.
pub(super) struct Parents<'a> {
    root: &'a Root,
    last: Option<(EntryPath, Arc<OwnedFd>)>,
}

impl<'a> Parents<'a> {
    /// Begins with nothing open.
    pub fn new(root: &'a Root) -> Self {
        Self { root, last: None }
    }

    /// The directory that holds an entry. The root of the tree has none.
    pub fn of(&mut self, path: &EntryPath) -> Result<Arc<OwnedFd>, Errno> {
        let parent = path.parent().ok_or(Errno::INVAL)?;
        if let Some((last, fd)) = &self.last
            && *last == parent
        {
            return Ok(fd.clone());
        }
        let fd = Arc::new(self.root.directory(&parent)?);
        self.last = Some((parent, fd.clone()));
        Ok(fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_link_is_followed_in_either_way() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("root");
        std::fs::create_dir_all(dir.join("a/b")).unwrap();
        std::fs::write(dir.join("a/b/file"), "in").unwrap();
        std::fs::write(temp.path().join("secret"), "out").unwrap();
        std::os::unix::fs::symlink("..", dir.join("up")).unwrap();
        std::os::unix::fs::symlink("../secret", dir.join("link")).unwrap();
        std::os::unix::fs::symlink("a", dir.join("inner")).unwrap();
        for openat2 in [true, false] {
            let root = Root::open(&dir).unwrap();
            root.openat2.store(openat2, Ordering::Relaxed);
            let open = |path: &str| root.file(&EntryPath::new(path).unwrap());
            assert!(open("a/b/file").is_ok());
            assert!(open("").is_ok());
            for bad in ["up/secret", "link", "inner/b/file", "a/b/file/x", "missing"] {
                assert!(open(bad).is_err(), "{bad}");
            }
        }
    }
}
