//! The file system through which a machine has its memory: one directory, one file.
//!
//! What is here is answered at once, on the threads that hear the kernel; what has to come is waited for on tasks, so that it keeps nothing else
//! waiting. The kernel keeps what it read and what the machine writes, and hands the latter on when the file is synced, or when it has too much.

use std::ffi::OsStr;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use capsule_chunker::content::ReadError;
use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request,
    TimeOrNow, WriteFlags,
};
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::pages::PAGE;
use super::read::Came;
use super::{FILE, Ram};

/// How long the kernel may keep what it was told of the file: it never becomes another.
const FOR_LONG: Duration = Duration::from_secs(24 * 60 * 60);
const GENERATION: Generation = Generation(0);
const ROOT: INodeNo = INodeNo::ROOT;
const RAM: INodeNo = INodeNo(2);
/// Threads that hear the kernel.
const MAX_THREADS: usize = 4;
/// Longest write.
const MAX_WRITE: u32 = 1 << 20;
/// Writes that the kernel may have open by itself, writing back.
const BEHIND: u16 = 64;

/// Memory that is shown as a file, until this goes. A program that waits for a page of the base cannot even be killed before it has it, or
/// before this goes: then all that wait hear of an error.
pub struct Mounted {
    session: Option<BackgroundSession>,
    showing: Option<watch::Sender<()>>,
    at: PathBuf,
}

impl Ram {
    /// Shows it as the file `ram` in a directory. Reads that have to wait do so on `runtime`. Blocks.
    ///
    /// # Errors
    /// What the operating system said; it takes `/dev/fuse` and, where this is not root, `fusermount3`.
    pub fn mount(self: &Arc<Self>, at: &Path, runtime: Handle) -> io::Result<Mounted> {
        let (showing, shown) = watch::channel(());
        let files = Files {
            ram: self.clone(),
            runtime,
            shown,
            since: SystemTime::now(),
            owner: (
                rustix::process::getuid().as_raw(),
                rustix::process::getgid().as_raw(),
            ),
        };
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::RW,
            MountOption::NoDev,
            MountOption::NoSuid,
            MountOption::NoExec,
            MountOption::NoAtime,
            MountOption::DefaultPermissions,
            MountOption::FSName(FILE.to_owned()),
            MountOption::Subtype("capsule".to_owned()),
        ];
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        config.n_threads = Some(threads.min(MAX_THREADS));
        config.clone_fd = true;
        let session = fuser::spawn_mount(files, at, &config)?;
        if let Err(error) = keep_more(at) {
            tracing::debug!(%error, "a machine that writes much to its memory will wait for that");
        }
        Ok(Mounted {
            session: Some(session),
            showing: Some(showing),
            at: at.to_owned(),
        })
    }
}

impl Mounted {
    /// The file.
    pub fn file(&self) -> PathBuf {
        self.at.join(FILE)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        drop(self.showing.take());
        if let Some(session) = self.session.take() {
            crate::mount::end(session, &self.at);
        }
    }
}

/// Lets the kernel keep as much of what the machine writes as it would of a disk's. Otherwise it keeps 1 % of that for a FUSE file system,
/// for fear of one that does not take it back, and has the machine wait: writing to 200 MiB in random order then takes twenty times as long.
/// Takes root, and Linux 6.2.
fn keep_more(at: &Path) -> io::Result<()> {
    let device = std::fs::metadata(at)?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let limits = PathBuf::from(format!("/sys/class/bdi/{major}:{minor}"));
    std::fs::write(limits.join("strict_limit"), "0")?;
    std::fs::write(limits.join("max_ratio"), "100")
}

/// What the kernel talks to.
struct Files {
    ram: Arc<Ram>,
    runtime: Handle,
    /// Ends when the memory is no longer shown: then nothing waits.
    shown: watch::Receiver<()>,
    since: SystemTime,
    owner: (u32, u32),
}

impl Files {
    fn attr(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, nlink, size) = match inode {
            ROOT => (FileType::Directory, 0o700, 2, 0),
            RAM => (FileType::RegularFile, 0o600, 1, self.ram.len()),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: self.since,
            mtime: self.since,
            ctime: self.since,
            crtime: self.since,
            kind,
            perm,
            nlink,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: PAGE as u32,
            flags: 0,
        })
    }

    /// Has something done by a task; `end` hears what came of it.
    fn later<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, ReadError>> + Send + 'static,
        end: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) {
        let mut shown = self.shown.clone();
        self.runtime.spawn(async move {
            tokio::select! {
                done = work => end(done.map_err(failed)),
                _ = shown.changed() => end(Err(Errno::EIO)),
            }
        });
    }
}

fn failed(error: ReadError) -> Errno {
    tracing::warn!(%error, "a machine's memory could not be read or written");
    match error {
        ReadError::Io { source, .. } => source.into(),
        _ => Errno::EIO,
    }
}

fn empty(reply: ReplyEmpty) -> impl FnOnce(Result<(), Errno>) + Send + 'static {
    move |done| match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

impl Filesystem for Files {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Older kernels have less, which is as good.
        let _less = config.set_max_background(BEHIND);
        let _less = config.set_max_write(MAX_WRITE);
        // Less than a page: a page fault asks for its page alone.
        let _least = config.set_max_readahead(1);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attr(RAM).filter(|_| parent == ROOT && name == FILE) {
            Some(attr) => reply.entry(&FOR_LONG, &attr, GENERATION),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(inode) {
            Some(attr) => reply.attr(&FOR_LONG, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        // Times are not kept, the rest does not change.
        let changes = mode.is_some() || uid.is_some() || gid.is_some();
        match self.attr(inode) {
            Some(attr) if !changes && size.is_none_or(|size| size == attr.size) => {
                reply.attr(&FOR_LONG, &attr);
            }
            _ => reply.error(Errno::EPERM),
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match inode {
            // Whatever changes it does so through the kernel: so what that keeps is right.
            RAM => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            _ => reply.error(Errno::EISDIR),
        }
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if inode != RAM {
            return reply.error(Errno::EISDIR);
        }
        let range = within(&self.ram, offset, size.into());
        let mut bytes = vec![0; (range.end - range.start) as usize];
        match self.ram.try_read(range.start, &mut bytes, &Came::new()) {
            Ok(missing) if missing.is_empty() => return reply.data(&bytes),
            Ok(_) => {}
            Err(error) => return reply.error(failed(error)),
        }
        let ram = self.ram.clone();
        let read = async move { ram.read(range).await };
        self.later(read, |read| match read {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(error),
        });
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if inode != RAM {
            return reply.error(Errno::EISDIR);
        }
        let range = within(&self.ram, offset, data.len() as u64);
        let data = &data[..(range.end - range.start) as usize];
        if data.is_empty() {
            return reply.error(Errno::ENOSPC);
        }
        let len = data.len() as u32;
        match self.ram.try_write(offset, data, &Came::new()) {
            Ok(missing) if missing.is_empty() => return reply.written(len),
            Ok(_) => {}
            Err(error) => return reply.error(failed(error)),
        }
        let (ram, data) = (self.ram.clone(), data.to_vec());
        let write = async move { ram.write(offset, &data).await };
        self.later(write, move |written| match written {
            Ok(()) => reply.written(len),
            Err(error) => reply.error(error),
        });
    }

    fn fallocate(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let end = offset.saturating_add(length);
        if inode != RAM {
            return reply.error(Errno::EISDIR);
        }
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            // There is room for all of it, as far as anybody knows.
            0 if end <= self.ram.len() => return reply.ok(),
            0 => return reply.error(Errno::ENOSPC),
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE => {}
            _ => return reply.error(Errno::EOPNOTSUPP),
        }
        let range = within(&self.ram, offset, length);
        if range.start.is_multiple_of(PAGE) && range.end.is_multiple_of(PAGE) {
            let zeroed = self.ram.zero_pages(range.start / PAGE..range.end / PAGE);
            return empty(reply)(zeroed.map_err(failed));
        }
        let ram = self.ram.clone();
        let zero = async move { ram.zero(range).await };
        self.later(zero, empty(reply));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    /// The kernel has handed on all that it kept, and there has to be room for it; whether that outlives the host does not matter.
    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(reply)(self.ram.settle().map_err(Errno::from));
    }

    fn readdir(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = [
            (ROOT, FileType::Directory, "."),
            (ROOT, FileType::Directory, ".."),
            (RAM, FileType::RegularFile, FILE),
        ];
        if inode != ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let listed = (1..).zip(entries).skip(offset.min(3) as usize);
        for (next, (inode, kind, name)) in listed {
            if reply.add(inode, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let blocks = self.ram.len() / PAGE;
        reply.statfs(blocks, 0, 0, 2, 0, PAGE as u32, 255, PAGE as u32);
    }
}

/// The part of a range that there is.
fn within(ram: &Ram, offset: u64, len: u64) -> Range<u64> {
    let start = offset.min(ram.len());
    start..offset.saturating_add(len).min(ram.len())
}
