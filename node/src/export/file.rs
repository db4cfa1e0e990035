//! Writing a file beside its place: sparse, synced, and renamed when it is whole. Whether it is right is the caller's question.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use capsule_chunker::content::Progress;
use capsule_chunker::image::Stamp;
use capsule_chunker::layer::restore::Sink;
use capsule_proto::RootHash;
use capsule_proto::index::RunFrom;
use capsule_proto::manifest::Component;
use positioned_io::ReadAt;
use rustix::fs::{CWD, RenameFlags};

use super::damage::unreadable;
use crate::control::{Failure, FailureCode};
use crate::failure::{NO_ROOM_THERE, io_code};
use crate::layers::read_directory;
use crate::store::{LayerBlobs, Store};
use crate::work::Work;

/// Bytes written at a time, and the smallest run of zeros that becomes a hole: file systems keep blocks of 4 KiB.
const PAGE: usize = 4096;
/// Bytes copied at a time: enough to hash them on all cores.
const COPY_LEN: usize = 1 << 20;
/// So long is waited until a file can be recognised later; where times are coarse it is not.
const LONGEST_WAIT: Duration = Duration::from_millis(50);
/// Longest file name: Linux's NAME_MAX.
const MAX_NAME: usize = 255;
/// Tells this process's exports apart.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A file in the making; removed when dropped before it is finished.
pub struct Target {
    file: File,
    beside: PathBuf,
    to: PathBuf,
    force: bool,
    placed: bool,
}

impl Target {
    /// Begins a file beside `to`.
    pub fn create(to: &Path, force: bool) -> Result<Self, Failure> {
        check_place(to, force)?;
        let (dir, name) = (parent(to), to.file_name().unwrap_or_default());
        let suffix = format!(
            ".capsule-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let mut long = std::ffi::OsString::from(".");
        long.push(name);
        long.push(&suffix);
        // Long names leave no room for a suffix.
        let beside = if long.len() > MAX_NAME {
            dir.join(&suffix)
        } else {
            dir.join(long)
        };
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o666)
            .open(&beside);
        let file = file.map_err(|e| failed("making a file in", &dir, &e))?;
        Ok(Self {
            file,
            beside,
            to: to.into(),
            force,
            placed: false,
        })
    }

    /// The directory that it lies in.
    pub fn dir(&self) -> &Path {
        self.beside.parent().unwrap_or(Path::new("/"))
    }

    /// Copies a component that lies in the store as it is; the hash of what was copied, which the store did not look at.
    pub fn copy(
        &mut self,
        from: &dyn ReadAt,
        component: &Component,
        work: &Work,
    ) -> Result<RootHash, Failure> {
        let mut buffer = vec![0; COPY_LEN];
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < component.size {
            work.check()?;
            let part = &mut buffer[..COPY_LEN.min((component.size - at) as usize)];
            from.read_exact_at(at, part)
                .map_err(|e| unreadable(component, &e.to_string()))?;
            hasher.update_rayon(part);
            self.write(at, part).map_err(|e| self.failed(&e))?;
            work.written(part.len() as u64);
            at += part.len() as u64;
        }
        Ok(RootHash::from_bytes(hasher.finalize().into()))
    }

    /// Gives it its length and name, durably. What it can be recognised by, if anything written to it from then on changes that.
    pub fn finish(mut self, size: u64) -> Result<Option<Stamp>, Failure> {
        self.file
            .set_len(size)
            .and_then(|()| self.file.sync_all())
            .map_err(|e| self.failed(&e))?;
        let stamp = |file: &File| Stamp::of_raw(&self.to, file).ok();
        let unsettled = stamp(&self.file).filter(|stamp| !stamp.settled(SystemTime::now()));
        if let Some(tick) = unsettled.map(|stamp| stamp.tick())
            && tick <= LONGEST_WAIT
        {
            std::thread::sleep(tick);
        }
        let named = SystemTime::now();
        let flags = if self.force {
            RenameFlags::empty()
        } else {
            RenameFlags::NOREPLACE
        };
        match rustix::fs::renameat_with(CWD, &self.beside, CWD, &self.to, flags) {
            // File systems that cannot refuse to replace (and old kernels): a link can.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if !self.force => {
                std::fs::hard_link(&self.beside, &self.to)
                    .map_err(|e| failed("naming", &self.to, &e))?;
            }
            Err(rustix::io::Errno::EXIST) => return Err(exists(&self.to)),
            renamed => {
                renamed.map_err(|e| failed("naming", &self.to, &e.into()))?;
                self.placed = true;
            }
        }
        let stamp = stamp(&self.file).filter(|stamp| stamp.settled(named));
        let dir = parent(&self.to);
        File::open(&dir)
            .and_then(|dir| dir.sync_all())
            .map_err(|e| failed("syncing", &dir, &e))?;
        Ok(stamp)
    }

    fn failed(&self, error: &io::Error) -> Failure {
        failed("writing", &self.to, error)
    }

    /// Writes what is not zero; pages of zeros become holes.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut start = 0;
        while start < bytes.len() {
            let page_end = |at: usize| (at + PAGE - (offset as usize + at) % PAGE).min(bytes.len());
            let mut end = page_end(start);
            if is_zero(&bytes[start..end]) {
                start = end;
                continue;
            }
            while end < bytes.len() && !is_zero(&bytes[end..page_end(end)]) {
                end = page_end(end);
            }
            self.file
                .write_all_at(&bytes[start..end], offset + start as u64)?;
            start = end;
        }
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.placed {
            // What cannot be removed is told by its name.
            let _ = std::fs::remove_file(&self.beside);
        }
    }
}

impl Sink for Target {
    /// Errors carry the failure that they mean.
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write(offset, bytes)
            .map_err(|e| io::Error::new(e.kind(), self.failed(&e)))
    }

    fn zeros(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(64)
        .all(|line| line.iter().fold(0, |acc, byte| acc | byte) == 0)
}

fn parent(path: &Path) -> PathBuf {
    path.parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("/"))
        .into()
}

/// Whether a file may come to lie there.
fn check_place(to: &Path, force: bool) -> Result<(), Failure> {
    match to.symlink_metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(failed("looking at", to, &e)),
        Ok(meta) if meta.is_dir() => {
            let message = format!(
                "{} is a directory, and this component is a file",
                to.display()
            );
            Err(Failure::new(FailureCode::Exists, message).hint("give the path of a file"))
        }
        Ok(meta) if !meta.is_file() && !meta.is_symlink() => {
            let message = format!(
                "{} is not a regular file: an export does not write to devices",
                to.display()
            );
            Err(Failure::new(FailureCode::Refused, message)
                .hint("export to a file, and copy it from there"))
        }
        Ok(_) if !force => Err(exists(to)),
        Ok(_) => Ok(()),
    }
}

fn exists(to: &Path) -> Failure {
    let message = format!("{} exists already", to.display());
    Failure::new(FailureCode::Exists, message)
        .hint("choose another path, or replace it with --force")
}

fn failed(doing: &str, path: &Path, error: &io::Error) -> Failure {
    let failure = Failure::new(
        io_code(error),
        format!("{doing} {}: {error}", path.display()),
    );
    match error.kind() {
        io::ErrorKind::PermissionDenied => failure
            .hint("the node writes it, not the command: choose a place where the node may write"),
        io::ErrorKind::StorageFull => failure.hint(NO_ROOM_THERE),
        io::ErrorKind::NotFound => failure.hint("make the directory first"),
        _ => failure,
    }
}

/// Fails if a file system has not that much room.
pub fn check_space(dir: &Path, bytes: u64) -> Result<(), Failure> {
    let Ok(stat) = rustix::fs::statvfs(dir) else {
        return Ok(());
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free >= bytes {
        return Ok(());
    }
    let message = format!(
        "{} has {free} bytes free, and the export takes {bytes}",
        dir.display()
    );
    Err(Failure::new(FailureCode::Full, message).hint(NO_ROOM_THERE))
}

/// Bytes of a component that are not known to be zero, by its uppermost layer; an upper bound for what a sparse file takes.
pub fn data_bytes(store: &Store, layers: &[LayerBlobs]) -> Result<u64, Failure> {
    let Some(top) = layers.last() else {
        return Ok(0);
    };
    let index = store.open_blob(&top.index)?;
    let directory = read_directory(&*index)?;
    let mut zero = 0;
    for (page, entry) in directory.run_pages().iter().enumerate() {
        let mut bytes = vec![0; entry.len as usize];
        index
            .read_exact_at(entry.at, &mut bytes)
            .map_err(|e| Failure::new(FailureCode::Io, format!("reading an index: {e}")))?;
        let runs = directory
            .decode_runs(page, &bytes)
            .map_err(|e| Failure::new(FailureCode::Damaged, format!("an index: {e}")))?;
        zero += runs
            .iter()
            .filter(|run| run.from == RunFrom::Zero)
            .map(|run| run.len)
            .sum::<u64>();
    }
    Ok(directory.header().target_size - zero)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_file_is_sparse_whole_and_never_replaces_silently() {
        let temp = tempfile::tempdir().unwrap();
        let to = temp.path().join("disk");
        let mut target = Target::create(&to, false).unwrap();
        let mut content = vec![0; 1 << 20];
        content[10..20].fill(1);
        content[900_000..].fill(2);
        for (i, part) in content.chunks(100_001).enumerate() {
            target.data(i as u64 * 100_001, part).unwrap();
        }
        target.zeros(1 << 20, 1 << 20).unwrap();
        assert!(!to.exists(), "not before it is whole");
        target.finish(2 << 20).unwrap();
        content.resize(2 << 20, 0);
        assert!(std::fs::read(&to).unwrap() == content);
        assert!(
            std::fs::metadata(&to).unwrap().blocks() * 512 < 512 << 10,
            "zeros are holes"
        );
        assert_eq!(
            Target::create(&to, false).err().unwrap().code,
            FailureCode::Exists
        );
        // Somebody else was first while we wrote.
        let other = temp.path().join("other");
        let target = Target::create(&other, false).unwrap();
        std::fs::write(&other, "theirs").unwrap();
        assert_eq!(target.finish(0).err().unwrap().code, FailureCode::Exists);
        assert_eq!(std::fs::read(&other).unwrap(), b"theirs");
        drop(Target::create(&other, true).unwrap());
        assert_eq!(
            std::fs::read_dir(temp.path()).unwrap().count(),
            2,
            "nothing is left beside"
        );
        assert_eq!(
            Target::create(Path::new("/dev/null"), true)
                .err()
                .unwrap()
                .code,
            FailureCode::Refused
        );
        assert_eq!(
            Target::create(temp.path(), true).err().unwrap().code,
            FailureCode::Exists
        );
    }
}
