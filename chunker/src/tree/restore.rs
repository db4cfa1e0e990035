//! Restoring a tree: options, outcome, errors, and the way from readable contents to the writer.
//!
//! How entries are written lives in `writer` (regular files, in order), `place` (one entry, atomically) and `finish`
//! (everything without content, metadata of directories, removal of what is too much).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use capsule_proto::listing::Listing;
use rustix::io::Errno;
use thiserror::Error;

use super::writer::TreeWriter;
use crate::content::{Content, Progress, ReadError};

/// Bytes read at a time: long enough for the disk, short enough for the cache.
const READ_LEN: u64 = 1 << 20;

/// How to restore a tree.
#[derive(Clone, Copy, Debug, Default)]
pub struct RestoreOptions {
    /// The directory may have content: it ends as exactly the tree. What differs is replaced, what is not in the listing
    /// removed, files that are already right are not written again.
    pub force: bool,
}

/// What restoring did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Regular files written.
    pub files_written: u64,
    /// Regular files that were already right (with `force`).
    pub files_kept: u64,
    /// Entries removed that are not in the listing (with `force`).
    pub removed: u64,
    /// Entries whose owner could not be set, for lack of rights; they lost their set-id bits.
    pub owners_skipped: u64,
    /// Extended attributes that the file system or our rights do not allow.
    pub xattrs_skipped: u64,
    /// Device nodes, and hard links to them, that were not made, for lack of rights.
    pub devices_skipped: u64,
}

impl Restored {
    /// What is missing, in words; empty if nothing is.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let mut warn = |count: u64, what: &str| {
            if count > 0 {
                warnings.push(format!("{count} {what}"));
            }
        };
        warn(
            self.owners_skipped,
            "entries kept the owner who exports, and no set-id bits: export as root to set owners",
        );
        warn(
            self.xattrs_skipped,
            "extended attributes were not allowed, or are not supported there",
        );
        warn(
            self.devices_skipped,
            "device nodes were not made: export as root to make them",
        );
        warnings
    }
}

/// Why a tree could not be restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The directory has content.
    #[error("{} is not empty: choose another directory, or make it exactly the tree with --force", .path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// What should become the tree is no directory.
    #[error("{} is not a directory: choose another place", .path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// Without `/proc`, extended attributes could not be written.
    #[error("/proc is not mounted; it is needed to read and write extended attributes: mount it")]
    NoProc,
    /// The operating system refused something.
    #[error("{doing} {}: {source}{}", .path.display(), hint(.source))]
    Io {
        /// The entry.
        path: PathBuf,
        /// What was tried, as in "writing".
        doing: &'static str,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Contents whose hash is not the listing's. The file was not put in place.
    #[error("the contents for {} are not those in the listing: it was not put in place; verify the capsule and pull it again", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// A directory in the way lies on another file system, or is too deep to be removed safely.
    #[error("{} is in the way and is not removed ({why}): remove it first", .path.display())]
    NotRemoved {
        /// The directory.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// Contents handed over other than from 0 to the end.
    #[error("the tree's contents must come in order: at byte {expected} came byte {found}")]
    OutOfOrder {
        /// Where the writer is.
        expected: u64,
        /// What was handed over, or where it ended.
        found: u64,
    },
    /// The contents could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Stopped by the caller.
    #[error("stopped")]
    Cancelled,
    /// The writer was used after it had failed.
    #[error("the tree could not be written; the error was reported before")]
    Failed,
}

impl RestoreError {
    pub(super) fn io(
        path: impl Into<PathBuf>,
        doing: &'static str,
        source: impl Into<std::io::Error>,
    ) -> Self {
        Self::Io {
            path: path.into(),
            doing,
            source: source.into(),
        }
    }
}

/// The way out, where there is a usual one.
fn hint(error: &std::io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOSPC | Errno::DQUOT) => "; make room, and export again with --force to go on",
        Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => {
            "; choose another directory, or export as root"
        }
        _ => "",
    }
}

/// Restores a tree from readable contents.
pub fn restore(
    dest: &Path,
    listing: Arc<Listing>,
    contents: &dyn Content,
    options: &RestoreOptions,
    progress: &dyn Progress,
) -> Result<Restored, RestoreError> {
    let mut writer = TreeWriter::new(dest, listing, options, progress)?;
    let mut buf = vec![0; READ_LEN as usize];
    for range in writer.wanted() {
        let mut at = range.start;
        while at < range.end {
            if progress.cancelled() {
                return Err(RestoreError::Cancelled);
            }
            let part = &mut buf[..READ_LEN.min(range.end - at) as usize];
            contents.read_at(at, part)?;
            writer.data(at, part)?;
            progress.written(part.len() as u64);
            at += part.len() as u64;
        }
    }
    writer.finish()
}
