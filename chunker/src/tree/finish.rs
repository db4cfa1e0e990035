//! The end of a restore: what has no content, then removal of what is too much, then metadata of directories, then
//! durability.
//!
//! Links come after all files, so that none lies in a file's way; directories come last and from the bottom up, because
//! everything made in them touches their times, and their modes may lock us out.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use capsule_proto::listing::{Entry, EntryKind, MAX_DEPTH};
use rayon::prelude::*;
use rustix::fs::{AtFlags, FileType, Mode};
use rustix::io::Errno;

use super::meta::Handle;
use super::place::{self, Target, count};
use super::restore::RestoreError;
use super::root::Parents;
use super::scan::join;

/// Completes a tree whose regular files are in place.
pub(super) fn finish(target: &Target) -> Result<(), RestoreError> {
    let entries = target.listing.entries();
    entries
        .par_iter()
        .try_for_each(|entry| make_special(target, entry))?;
    entries.par_iter().try_for_each(|entry| match entry.kind {
        EntryKind::HardLink { to } => hard_link(target, entry, &entries[to as usize]),
        _ => Ok(()),
    })?;
    let directories = || {
        entries
            .par_iter()
            .filter(|entry| entry.kind == EntryKind::Directory)
    };
    if target.force {
        directories().try_for_each(|dir| remove_others(target, dir))?;
    }
    for dir in entries
        .iter()
        .rev()
        .filter(|entry| entry.kind == EntryKind::Directory)
    {
        let open = target
            .root
            .directory(&dir.path)
            .map_err(target.failed(dir, "opening"))?;
        target.apply(dir, Handle::Open(open.as_fd()))?;
    }
    // One call for the whole file system: far cheaper than one for each file.
    rustix::fs::syncfs(target.root.fd())
        .map_err(target.failed(&entries[0], "writing to disk all of"))
}

fn parent(target: &Target, entry: &Entry) -> Result<Arc<OwnedFd>, RestoreError> {
    Parents::new(&target.root)
        .of(&entry.path)
        .map_err(target.failed(entry, "opening the directory of"))
}

/// Makes links, devices, pipes and sockets; nothing for files and directories.
fn make_special(target: &Target, entry: &Entry) -> Result<(), RestoreError> {
    let node = |kind, device| {
        let dir = parent(target, entry)?;
        let made = target.partial(&dir, |dir, name| {
            rustix::fs::mknodat(dir, name, kind, Mode::RUSR | Mode::WUSR, device)
        });
        Ok::<_, RestoreError>(made.map(|(partial, ())| partial))
    };
    let made = match &entry.kind {
        EntryKind::Directory | EntryKind::File { .. } | EntryKind::HardLink { .. } => return Ok(()),
        EntryKind::Symlink { target: to } => {
            let dir = parent(target, entry)?;
            target
                .partial(&dir, |dir, name| rustix::fs::symlinkat(&to[..], dir, name))
                .map(|(partial, ())| partial)
        }
        EntryKind::CharDevice { major, minor } => node(
            FileType::CharacterDevice,
            rustix::fs::makedev(*major, *minor),
        )?,
        EntryKind::BlockDevice { major, minor } => {
            node(FileType::BlockDevice, rustix::fs::makedev(*major, *minor))?
        }
        EntryKind::Fifo => node(FileType::Fifo, 0)?,
        EntryKind::Socket => node(FileType::Socket, 0)?,
    };
    match made {
        Err(Errno::PERM) if is_device(entry) => {
            count(&target.tally.devices);
            Ok(())
        }
        made => target.complete_node(entry, made.map_err(target.failed(entry, "making"))?),
    }
}

fn is_device(entry: &Entry) -> bool {
    matches!(
        entry.kind,
        EntryKind::CharDevice { .. } | EntryKind::BlockDevice { .. }
    )
}

/// Gives an entry another name. Its metadata it has already.
fn hard_link(target: &Target, entry: &Entry, to: &Entry) -> Result<(), RestoreError> {
    let (dir, from) = (parent(target, entry)?, parent(target, to)?);
    let link = |dir: &OwnedFd, name: &str| {
        rustix::fs::linkat(&*from, to.path.name(), dir, name, AtFlags::empty())
    };
    match target.partial(&dir, link) {
        // The device was not made.
        Err(Errno::NOENT) if is_device(to) => {
            count(&target.tally.devices);
            Ok(())
        }
        made => target.place(entry, made.map_err(target.failed(entry, "linking"))?.0),
    }
}

/// Removes what is in a directory but not in the listing.
fn remove_others(target: &Target, dir: &Entry) -> Result<(), RestoreError> {
    let open = target
        .root
        .directory(&dir.path)
        .map_err(target.failed(dir, "opening"))?;
    for name in place::names(&open).map_err(target.failed(dir, "reading"))? {
        if !is_listed(target, dir, &name) {
            let path = target
                .root
                .display(&dir.path)
                .join(std::ffi::OsStr::new(&*name.to_string_lossy()));
            target.remove(&open, name.to_bytes(), path, MAX_DEPTH)?;
        }
    }
    Ok(())
}

fn is_listed(target: &Target, dir: &Entry, name: &CStr) -> bool {
    // What no listing can hold, this one does not.
    join(&dir.path, name.to_bytes()).is_ok_and(|path| {
        target
            .listing
            .entries()
            .binary_search_by(|entry| entry.path.cmp(&path))
            .is_ok()
    })
}
