//! Comparing a directory with a listing, contents included.
//!
//! For tests, the demo and `verify`: nothing is changed. Differences come in the order of paths.

use std::path::Path;

use capsule_proto::RootHash;
use capsule_proto::listing::{Entry, EntryKind, EntryPath, Listing};
use rayon::prelude::*;

use super::scan::{ScanError, ScanOptions, scan};
use super::source::TreeSource;
use crate::content::{Content, ReadError};

/// Bytes read at a time.
const READ_LEN: u64 = 1 << 20;

/// A way in which a directory differs from a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where.
    pub path: EntryPath,
    /// What, in words.
    pub what: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = if self.path.is_root() {
            ".".to_owned()
        } else {
            self.path.to_string()
        };
        write!(f, "{path}: {}", self.what)
    }
}

/// Compares a directory with a listing: metadata of everything, contents of files of the right length.
pub fn verify_tree(listing: &Listing, dir: &Path) -> Result<Vec<Difference>, ScanError> {
    let found = scan(dir, &ScanOptions::default())?;
    let mut compare = Compare {
        listing,
        found: &found,
        differences: Vec::new(),
        to_hash: Vec::new(),
    };
    compare.entries();
    let Compare {
        mut differences,
        to_hash,
        ..
    } = compare;
    let hashed: Vec<Option<Difference>> = to_hash
        .par_iter()
        .map(|&(file, entry)| {
            let EntryKind::File { root, .. } = entry.kind else {
                return Ok(None);
            };
            let differs = || Difference {
                path: entry.path.clone(),
                what: "its content differs".to_owned(),
            };
            Ok::<_, ReadError>((hash(&found, file)? != root).then(differs))
        })
        .collect::<Result<_, _>>()?;
    differences.extend(hashed.into_iter().flatten());
    differences.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(differences)
}

fn hash(found: &TreeSource, file: usize) -> Result<RootHash, ReadError> {
    let range = found.file_range(file);
    let mut hasher = blake3::Hasher::new();
    let mut buf = vec![0; READ_LEN.min(range.end - range.start) as usize];
    let mut at = range.start;
    while at < range.end {
        let part = &mut buf[..READ_LEN.min(range.end - at) as usize];
        found.read_at(at, part)?;
        hasher.update(part);
        at += part.len() as u64;
    }
    Ok(RootHash::from_bytes(*hasher.finalize().as_bytes()))
}

struct Compare<'a> {
    listing: &'a Listing,
    found: &'a TreeSource,
    differences: Vec<Difference>,
    /// Files of the directory, by number, and the entries that they should equal.
    to_hash: Vec<(usize, &'a Entry)>,
}

impl<'a> Compare<'a> {
    /// Goes through both lists side by side.
    fn entries(&mut self) {
        let (mut wanted, mut found) = (
            self.listing.entries().iter().peekable(),
            self.found.entries().iter().peekable(),
        );
        let mut file = 0;
        loop {
            let order = match (wanted.peek(), found.peek()) {
                (None, None) => return,
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some(wanted), Some(found)) => wanted.path.cmp(&found.path),
            };
            let wanted = if order.is_le() { wanted.next() } else { None };
            let found = if order.is_ge() { found.next() } else { None };
            match (wanted, found) {
                (Some(wanted), Some(found)) => self.entry(wanted, found, file),
                (Some(wanted), None) => self.differs(wanted, "it is missing"),
                (None, Some(found)) => self.differs(found, "it is not in the listing"),
                (None, None) => return,
            }
            file += usize::from(
                found.is_some_and(|found| matches!(found.kind, EntryKind::File { .. })),
            );
        }
    }

    fn differs(&mut self, entry: &Entry, what: impl Into<String>) {
        self.differences.push(Difference {
            path: entry.path.clone(),
            what: what.into(),
        });
    }

    fn entry(&mut self, wanted: &'a Entry, found: &Entry, file: usize) {
        match (&wanted.kind, &found.kind) {
            (
                EntryKind::File { size, .. },
                EntryKind::File {
                    size: found_size, ..
                },
            ) => {
                if size == found_size {
                    self.to_hash.push((file, wanted));
                } else {
                    self.differs(
                        wanted,
                        format!("it has {found_size} bytes instead of {size}"),
                    );
                }
            }
            (EntryKind::HardLink { to }, EntryKind::HardLink { to: found_to }) => {
                let (to, found_to) = (
                    &self.listing.entries()[*to as usize].path,
                    &self.found.entries()[*found_to as usize].path,
                );
                if to != found_to {
                    self.differs(
                        wanted,
                        format!("it is a hard link to {found_to} instead of {to}"),
                    );
                }
            }
            (a, b) if a != b => self.differs(
                wanted,
                format!("it is {} instead of {}", describe(b), describe(a)),
            ),
            _ => {}
        }
        self.metadata(wanted, found);
    }

    fn metadata(&mut self, wanted: &Entry, found: &Entry) {
        let (a, b) = (&wanted.meta, &found.meta);
        // A symbolic link has no mode of its own.
        if a.mode != b.mode && !matches!(wanted.kind, EntryKind::Symlink { .. }) {
            self.differs(
                wanted,
                format!("its mode is {:04o} instead of {:04o}", b.mode, a.mode),
            );
        }
        if (a.uid, a.gid) != (b.uid, b.gid) {
            self.differs(
                wanted,
                format!(
                    "its owner is {}:{} instead of {}:{}",
                    b.uid, b.gid, a.uid, a.gid
                ),
            );
        }
        if a.mtime != b.mtime {
            let (a, b) = (a.mtime, b.mtime);
            self.differs(
                wanted,
                format!(
                    "its time is {}.{:09} instead of {}.{:09}",
                    b.0, b.1, a.0, a.1
                ),
            );
        }
        if a.xattrs != b.xattrs {
            self.differs(wanted, "its extended attributes differ");
        }
    }
}

fn describe(kind: &EntryKind) -> String {
    match kind {
        EntryKind::Directory => "a directory".to_owned(),
        EntryKind::File { .. } => "a regular file".to_owned(),
        EntryKind::Symlink { target } => format!("a symbolic link to {}", target.escape_ascii()),
        EntryKind::HardLink { .. } => "a hard link".to_owned(),
        EntryKind::CharDevice { major, minor } => format!("the character device {major}:{minor}"),
        EntryKind::BlockDevice { major, minor } => {
            format!("the device of kind block {major}:{minor}")
        }
        EntryKind::Fifo => "a named pipe".to_owned(),
        EntryKind::Socket => "a socket".to_owned(),
    }
}
