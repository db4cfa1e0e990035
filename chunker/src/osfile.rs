//! What the operating system tells of an open file: whether it changed, where its holes are.
//!
//! Shared by `image` and `tree`. Paths and directories are not handled here.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{SeekFrom, Stat};
use rustix::io::Errno;

use crate::content::{Extent, ReadError};

/// What changes when a file is written, replaced or cut: compared before and after reading.
///
/// The kernel sets `ctime` itself at every change, to its clock tick (1-4 ms); a change within the tick of the stat before
/// it, to the same length, is not seen. 32 bytes, as trees keep one for each entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    inode: u64,
    size: u64,
    /// Nanoseconds since 1970; wrapping, as they are only compared.
    modified: i64,
    /// Of the inode: data, owner, mode, links, names of attributes.
    changed: i64,
}

impl Fingerprint {
    /// Takes the fingerprint from what `stat` says.
    pub fn of(stat: &Stat) -> Self {
        let nanos =
            |seconds: i64, nanos: i64| seconds.wrapping_mul(1_000_000_000).wrapping_add(nanos);
        Self {
            inode: stat.st_ino,
            size: stat.st_size as u64,
            modified: nanos(stat.st_mtime, stat.st_mtime_nsec as i64),
            changed: nanos(stat.st_ctime, stat.st_ctime_nsec as i64),
        }
    }

    /// Its number in its file system.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// All of it, to be compared later.
    pub fn fields(&self) -> [u64; 4] {
        [
            self.inode,
            self.size,
            self.modified as u64,
            self.changed as u64,
        ]
    }

    /// Whether its times seem to be whole seconds.
    pub fn is_coarse(&self) -> bool {
        self.modified % 1_000_000_000 == 0 && self.changed % 1_000_000_000 == 0
    }

    /// When the data was changed last.
    pub fn modified(&self) -> SystemTime {
        let nanos = Duration::from_nanos(self.modified.unsigned_abs());
        if self.modified < 0 {
            UNIX_EPOCH
        } else {
            UNIX_EPOCH + nanos
        }
    }

    /// When the inode was changed last, in seconds since 1970.
    pub fn changed_at(&self) -> u64 {
        u64::try_from(self.changed / 1_000_000_000).unwrap_or(0)
    }

    /// Whether both are of one inode, whatever happened to it.
    pub fn same_inode(&self, other: &Self) -> bool {
        self.inode == other.inode
    }

    /// Says in words what differs; `None` if nothing does.
    pub fn difference(&self, now: &Self) -> Option<String> {
        if self.inode != now.inode {
            Some("it was replaced by another file".to_owned())
        } else if self.size != now.size {
            Some(format!(
                "its length went from {} to {} bytes",
                self.size, now.size
            ))
        } else if self.modified != now.modified {
            Some("it was written to".to_owned())
        } else if self.changed != now.changed {
            Some("its content, owner, mode or links were changed".to_owned())
        } else {
            None
        }
    }

    /// Fails if an open file is no longer what it was.
    pub fn check(&self, path: &Path, file: &File) -> Result<(), ReadError> {
        let stat = rustix::fs::fstat(file).map_err(|e| ReadError::io(path, 0, e.into()))?;
        match self.difference(&Self::of(&stat)) {
            None => Ok(()),
            Some(why) => Err(ReadError::Changed {
                path: path.into(),
                why,
            }),
        }
    }
}

/// Fills a buffer from a file that is known to be long enough.
pub(crate) fn read_exact(
    path: &Path,
    file: &File,
    offset: u64,
    buf: &mut [u8],
) -> Result<(), ReadError> {
    file.read_exact_at(buf, offset).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => ReadError::Changed {
            path: path.into(),
            why: "it became shorter".to_owned(),
        },
        _ => ReadError::io(path, offset, e),
    })
}

/// The extent that begins at `offset`, within `offset..end`: data, or a hole that need not be read.
///
/// Where the file system knows nothing of holes all is data.
pub(crate) fn extent_at(file: &File, offset: u64, end: u64) -> io::Result<Extent> {
    let seek = |from| match rustix::fs::seek(file, from) {
        Ok(found) => Ok(Some(found.clamp(offset, end))),
        // Beyond `offset` there is no data, or no such question.
        Err(Errno::NXIO) => Ok(None),
        Err(e) => Err(io::Error::from(e)),
    };
    let data = match seek(SeekFrom::Data(offset)) {
        Ok(found) => found.unwrap_or(end),
        Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => offset,
        Err(e) => return Err(e),
    };
    if data > offset {
        return Ok(Extent {
            range: offset..data,
            zero: true,
        });
    }
    let hole = match seek(SeekFrom::Hole(offset)) {
        // A file that shrank: reading it will say so.
        Ok(found) => found.filter(|&hole| hole > offset).unwrap_or(end),
        Err(_) => end,
    };
    Ok(Extent {
        range: offset..hole,
        zero: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_found_and_cover_the_file() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 4096], 1 << 20).unwrap();
        file.set_len(3 << 20).unwrap();
        let (mut at, mut zero) = (0, 0);
        while at < 3 << 20 {
            let extent = extent_at(&file, at, 3 << 20).unwrap();
            assert_eq!(extent.range.start, at);
            assert!(!extent.range.is_empty());
            assert!(!(extent.zero && extent.range.contains(&(1 << 20))));
            zero += if extent.zero {
                extent.range.end - at
            } else {
                0
            };
            at = extent.range.end;
        }
        assert_eq!(at, 3 << 20);
        assert!(zero > 2 << 20, "{zero}");
        assert!(extent_at(&file, 5 << 20, 6 << 20).unwrap().zero);
    }

    #[test]
    fn a_fingerprint_names_what_changed() {
        let file = tempfile::tempfile().unwrap();
        let stamp = |file: &File| Fingerprint::of(&rustix::fs::fstat(file).unwrap());
        let before = stamp(&file);
        assert_eq!(before.difference(&stamp(&file)), None);
        file.write_all_at(b"x", 0).unwrap();
        assert!(
            before
                .difference(&stamp(&file))
                .unwrap()
                .contains("from 0 to 1 bytes")
        );
        assert!(matches!(
            before.check(Path::new("f"), &file),
            Err(ReadError::Changed { .. })
        ));
        let mut buf = [0; 2];
        assert!(matches!(
            read_exact(Path::new("f"), &file, 0, &mut buf),
            Err(ReadError::Changed { .. })
        ));
    }
}
