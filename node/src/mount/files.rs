//! What the kernel asks of a mounted capsule.
//!
//! Names and metadata are in memory and answered at once; reads wait for their bytes on tasks of their own, so that one that has to be
//! fetched keeps no other waiting.

use std::ffi::OsStr;
use std::time::Duration;

use fuser::{
    Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig, LockOwner,
    OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEntry, ReplyOpen,
    ReplyStatfs, ReplyXattr, Request,
};
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::names::{Found, Kind, Names};

/// How long the kernel may keep what it was told: a capsule never changes.
const FOR_LONG: Duration = Duration::from_secs(24 * 60 * 60);
/// Reads that the kernel may have open by itself, reading ahead.
const AHEAD: u16 = 64;
/// Entries of a directory that are looked at for one answer, which has room for about as many.
const AT_ONCE: usize = 1024;
/// Inodes do not come to mean something else.
const GENERATION: Generation = Generation(0);

/// See the module.
pub struct Files {
    /// What there is.
    pub names: Names,
    /// Where reads wait.
    pub runtime: Handle,
    /// Ends when the capsule is no longer shown: then no read waits.
    pub shown: watch::Receiver<()>,
}

impl Files {
    fn find(&self, inode: INodeNo) -> Result<Found<'_>, Errno> {
        self.names.find(inode.0).ok_or(Errno::ENOENT)
    }

    fn file(&self, inode: INodeNo) -> Result<Found<'_>, Errno> {
        let found = self.find(inode)?;
        match found.kind {
            Kind::File(..) => Ok(found),
            Kind::Directory => Err(Errno::EISDIR),
            _ => Err(Errno::EINVAL),
        }
    }
}

impl Filesystem for Files {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Older kernels have less, which is as good.
        let _less = config.set_max_background(AHEAD);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let inode = self.names.lookup(parent.0, name);
        match inode.and_then(|inode| self.names.find(inode)) {
            Some(found) => reply.entry(&FOR_LONG, &found.attr, GENERATION),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.find(inode) {
            Ok(found) => reply.attr(&FOR_LONG, &found.attr),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _: &Request, inode: INodeNo, reply: ReplyData) {
        match self.find(inode).map(|found| found.kind) {
            Ok(Kind::Symlink(target)) => reply.data(target),
            Ok(_) => reply.error(Errno::EINVAL),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.file(inode) {
            Ok(_) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            Err(error) => reply.error(error),
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
        let found = match self.file(inode) {
            Ok(found) => found,
            Err(error) => return reply.error(error),
        };
        let len = found.attr.size;
        let (from, to) = (offset.min(len), offset.saturating_add(size.into()).min(len));
        let Kind::File(Some(disk), start) = found.kind else {
            return reply.data(&[]);
        };
        if from == to {
            return reply.data(&[]);
        }
        let (disk, mut shown) = (disk.clone(), self.shown.clone());
        self.runtime.spawn(async move {
            tokio::select! {
                read = disk.read(start + from..start + to, Vec::new()) => match read {
                    Ok(bytes) => reply.data(&bytes),
                    Err(error) => {
                        tracing::warn!(%error, "a read of a mounted capsule failed");
                        reply.error(Errno::EIO);
                    }
                },
                _ = shown.changed() => reply.error(Errno::EIO),
            }
        });
    }

    fn readdir(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let Some(listed) = self.names.list(inode.0, offset as usize, AT_ONCE) else {
            return reply.error(Errno::ENOTDIR);
        };
        for (at, (name, inode)) in (offset + 1..).zip(listed) {
            let Some(found) = self.names.find(inode) else {
                continue;
            };
            if reply.add(INodeNo(inode), at, found.attr.kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let Some(listed) = self.names.list(inode.0, offset as usize, AT_ONCE) else {
            return reply.error(Errno::ENOTDIR);
        };
        for (at, (name, inode)) in (offset + 1..).zip(listed) {
            let Some(found) = self.names.find(inode) else {
                continue;
            };
            if reply.add(INodeNo(inode), at, name, &FOR_LONG, &found.attr, GENERATION) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let (inodes, bytes) = self.names.totals();
        let blocks = bytes.div_ceil(4096);
        reply.statfs(blocks, 0, 0, inodes, 0, 4096, 255, 4096);
    }

    fn getxattr(&self, _: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let found = match self.find(inode) {
            Ok(found) => found,
            Err(error) => return reply.error(error),
        };
        let mut all = found.entry.into_iter().flat_map(|entry| &entry.meta.xattrs);
        match all.find(|(other, _)| other == name.as_encoded_bytes()) {
            Some((_, value)) => sized(reply, size, value),
            None => reply.error(Errno::NO_XATTR),
        }
    }

    fn listxattr(&self, _: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        let found = match self.find(inode) {
            Ok(found) => found,
            Err(error) => return reply.error(error),
        };
        let all = found.entry.into_iter().flat_map(|entry| &entry.meta.xattrs);
        let names: Vec<u8> = all
            .flat_map(|(name, _)| [name, &[0][..]].concat())
            .collect();
        sized(reply, size, &names);
    }
}

/// An answer of which the length is asked first.
fn sized(reply: ReplyXattr, size: u32, bytes: &[u8]) {
    match size as usize {
        0 => reply.size(bytes.len() as u32),
        room if room < bytes.len() => reply.error(Errno::ERANGE),
        _ => reply.data(bytes),
    }
}
