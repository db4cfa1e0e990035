//! What is there before a restore: directories are made or taken over, files that are already right are found.
//!
//! A file counts as right only if its content hashes to the listing's root, and if none of its names lies outside the
//! tree: setting its metadata must not reach another's file. Everything else is replaced, never written into.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use capsule_proto::RootHash;
use capsule_proto::listing::{Entry, EntryKind, MAX_DEPTH};
use rayon::prelude::*;
use rustix::fs::{AtFlags, FileType, Mode, Stat};
use rustix::io::Errno;

use super::meta::{self, Handle};
use super::place::{Target, count};
use super::restore::RestoreError;
use super::root::Parents;
use super::writer::FileAt;
use crate::content::Progress;

/// Bytes read at a time to compare; a thread has one such buffer.
const READ_LEN: usize = 1 << 20;

/// Makes all directories of the listing, private until they get their metadata at the end.
pub(super) fn make_directories(target: &Target) -> Result<(), RestoreError> {
    let mut parents = Parents::new(&target.root);
    for entry in &target.listing.entries()[1..] {
        if entry.kind == EntryKind::Directory {
            let dir = parents
                .of(&entry.path)
                .map_err(target.failed(entry, "making"))?;
            make_directory(target, &dir, entry)?;
        }
    }
    Ok(())
}

fn make_directory(target: &Target, dir: &OwnedFd, entry: &Entry) -> Result<(), RestoreError> {
    let name = entry.path.name();
    let make = || rustix::fs::mkdirat(dir, name, Mode::RWXU);
    let failed = |errno| target.failed(entry, "making")(errno);
    match make() {
        Err(Errno::EXIST) if target.force => {}
        result => return result.map_err(failed),
    }
    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    if !FileType::from_raw_mode(stat.st_mode).is_dir() {
        target.remove(dir, name, target.root.display(&entry.path), MAX_DEPTH)?;
        return make().map_err(failed);
    }
    // Root needs no permission.
    if target.privileged {
        Ok(())
    } else {
        meta::make_accessible(dir.as_fd(), name).map_err(failed)
    }
}

/// Marks the files that are already right, and gives them their metadata.
pub(super) fn find_kept(
    target: &Target,
    files: &mut [FileAt],
    progress: &dyn Progress,
) -> Result<(), RestoreError> {
    let mut links: HashMap<u32, Vec<u32>> = HashMap::new();
    for (at, entry) in target.listing.entries().iter().enumerate() {
        if let EntryKind::HardLink { to } = entry.kind {
            links.entry(to).or_default().push(at as u32);
        }
    }
    files.par_iter_mut().try_for_each_init(
        || vec![0; READ_LEN],
        |buf, file| {
            if progress.cancelled() {
                return Err(RestoreError::Cancelled);
            }
            let entry = &target.listing.entries()[file.entry as usize];
            let others = links.get(&file.entry).map_or(&[][..], Vec::as_slice);
            let Some(open) = candidate(target, entry, others) else {
                return Ok(());
            };
            if !has_content(&open, entry, buf, progress) {
                return Ok(());
            }
            target.apply(entry, Handle::Open(open.as_fd()))?;
            count(&target.tally.kept);
            file.keep = true;
            Ok(())
        },
    )
}

/// Opens a regular file of the right length all of whose names lie in the tree, where the listing has them.
///
/// Whatever goes wrong here only means that the file is written anew.
fn candidate(target: &Target, entry: &Entry, others: &[u32]) -> Option<File> {
    let EntryKind::File { size, .. } = entry.kind else {
        return None;
    };
    let stat = stat(target, entry)?;
    let fits = |stat: &Stat| {
        FileType::from_raw_mode(stat.st_mode).is_file()
            && stat.st_size as u64 == size
            && stat.st_nlink as usize == 1 + others.len()
    };
    let same = |a: &Stat, b: &Stat| (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino);
    if !fits(&stat) {
        return None;
    }
    for &other in others {
        let other = self::stat(target, &target.listing.entries()[other as usize])?;
        if !same(&stat, &other) {
            return None;
        }
    }
    let open = target.root.file(&entry.path).ok()?;
    let now = rustix::fs::fstat(&open).ok()?;
    (fits(&now) && same(&stat, &now)).then_some(open)
}

fn stat(target: &Target, entry: &Entry) -> Option<Stat> {
    let dir = Parents::new(&target.root).of(&entry.path).ok()?;
    rustix::fs::statat(&*dir, entry.path.name(), AtFlags::SYMLINK_NOFOLLOW).ok()
}

fn has_content(file: &File, entry: &Entry, buf: &mut [u8], progress: &dyn Progress) -> bool {
    let EntryKind::File { size, root } = entry.kind else {
        return false;
    };
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < size {
        let part = &mut buf[..(READ_LEN as u64).min(size - at) as usize];
        if progress.cancelled() || file.read_exact_at(part, at).is_err() {
            return false;
        }
        hasher.update(part);
        progress.read(part.len() as u64);
        at += part.len() as u64;
    }
    RootHash::from_bytes(*hasher.finalize().as_bytes()) == root
}
