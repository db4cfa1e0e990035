//! The file system as the store uses it: one small trait, and its implementation over the real one.
//!
//! Everything that the store does to files goes through here, the database's file included, so that
//! tests can put a disk underneath that crashes at any operation (`node/tests/store_sim`). Policy,
//! names and order of operations do not live here.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::FallocateFlags;

/// A directory tree. Paths are relative to its root.
///
/// What was written is durable only after [`DiskFile::sync`]; that a name exists (or no longer does)
/// only after [`Disk::sync_dir`] of its directory. A rename is atomic. Nothing else is promised about
/// what a crash leaves, and the store relies on nothing else.
pub trait Disk: Send + Sync + 'static {
    /// Opens a file for reading and writing.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>>;
    /// Makes a directory; that it exists already is no error.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Lists the files of a directory, subdirectories left out.
    fn list(&self, dir: &Path) -> io::Result<Vec<FileEntry>>;
    /// Gives a file another name, in place of a file of that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// An open file, usable from many threads at once.
pub trait DiskFile: fmt::Debug + Send + Sync {
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether it has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Reads at an offset, as much as the system gives at once; 0 at the end.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;
    /// Writes all of the slices, one after the other, from an offset on.
    fn write_at(&self, offset: u64, slices: &[&[u8]]) -> io::Result<()>;
    /// Cuts the file, or extends it with zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes content and length durable.
    fn sync(&self) -> io::Result<()>;
    /// Frees the space of a range, which then reads as zeros; `false` where the file system cannot.
    fn punch(&self, offset: u64, len: u64) -> io::Result<bool>;
}

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// It must exist.
    Existing,
    /// It is made where it does not exist.
    Create,
    /// It is made, or emptied.
    Truncate,
}

/// A file in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEntry {
    /// Its name; a name that is not UTF-8 is none of ours, and is left out.
    pub name: String,
    /// Its length in bytes.
    pub len: u64,
}

/// A directory of the real file system.
#[derive(Debug)]
pub struct RealDisk {
    root: PathBuf,
}

#[derive(Debug)]
struct RealFile {
    file: File,
    /// Held while writing: the system writes a file one call at a time, and has the others spin on a processor meanwhile.
    writing: Mutex<()>,
}

/// Most slices in one `pwritev`: Linux's `UIO_MAXIOV`.
const MAX_SLICES: usize = 1024;

impl RealDisk {
    /// Uses a directory that exists.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }
}

impl Disk for RealDisk {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(mode != OpenMode::Existing)
            .truncate(mode == OpenMode::Truncate)
            // Capsules may hold anybody's disk: for the owner's eyes only.
            .mode(0o600)
            .open(self.root.join(path))?;
        Ok(Arc::new(RealFile {
            file,
            writing: Mutex::default(),
        }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        match fs::create_dir(self.root.join(path)) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<FileEntry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(self.root.join(dir))? {
            let entry = entry?;
            let meta = entry.metadata()?;
            if let (true, Ok(name)) = (meta.is_file(), entry.file_name().into_string()) {
                entries.push(FileEntry {
                    name,
                    len: meta.len(),
                });
            }
        }
        Ok(entries)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(self.root.join(from), self.root.join(to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(self.root.join(path))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(self.root.join(dir))?.sync_all()
    }
}

impl DiskFile for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        FileExt::read_at(&self.file, buf, offset)
    }

    fn write_at(&self, offset: u64, slices: &[&[u8]]) -> io::Result<()> {
        let _turn = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if let [one] = slices {
            return self.file.write_all_at(one, offset);
        }
        let mut at = offset;
        for batch in slices.chunks(MAX_SLICES) {
            let mut slices: Vec<_> = batch.iter().map(|s| IoSlice::new(s)).collect();
            let mut left = &mut slices[..];
            while !left.is_empty() {
                match rustix::io::pwritev(&self.file, left, at) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(written) => {
                        at += written as u64;
                        IoSlice::advance_slices(&mut left, written);
                    }
                    Err(rustix::io::Errno::INTR) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        // fdatasync makes the length durable too, where reading the data needs it (POSIX).
        self.file.sync_data()
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, flags, offset, len) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

/// Reads exactly as much as `buf` holds.
pub(super) fn read_exact(
    file: &dyn DiskFile,
    mut offset: u64,
    mut buf: &mut [u8],
) -> io::Result<()> {
    while !buf.is_empty() {
        match file.read_at(offset, buf) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                offset += read as u64;
                buf = &mut buf[read..];
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_slices_are_written_as_one_run() {
        let dir = tempfile::tempdir().unwrap();
        let disk = RealDisk::new(dir.path());
        let file = disk.open(Path::new("file"), OpenMode::Create).unwrap();
        // More slices than one system call takes.
        let bytes: Vec<u8> = (0..3 * MAX_SLICES + 7).map(|i| (i % 251) as u8).collect();
        let slices: Vec<_> = bytes.chunks(1).collect();
        file.write_at(5, &slices).unwrap();
        let mut back = vec![0; bytes.len()];
        read_exact(&*file, 5, &mut back).unwrap();
        assert_eq!(back, bytes);
        assert_eq!(file.len().unwrap(), 5 + bytes.len() as u64);
        assert!(read_exact(&*file, 6, &mut back).is_err());
    }

    #[test]
    fn listing_names_files_only() {
        let dir = tempfile::tempdir().unwrap();
        let disk = RealDisk::new(dir.path());
        disk.create_dir(Path::new("sub")).unwrap();
        disk.create_dir(Path::new("sub")).unwrap();
        disk.open(Path::new("file"), OpenMode::Create)
            .unwrap()
            .write_at(0, &[b"abc"])
            .unwrap();
        let expected = vec![FileEntry {
            name: "file".into(),
            len: 3,
        }];
        assert_eq!(disk.list(Path::new("")).unwrap(), expected);
    }
}
