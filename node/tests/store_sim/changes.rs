//! What was written and is not durable yet: changes of contents and names, and what a crash leaves of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rand::RngExt;
use rand::rngs::SmallRng;

/// What a sector write is atomic in.
const SECTOR: usize = 512;

/// A file's bytes: as a running program sees them, and as they are durable.
#[derive(Debug, Clone, Default)]
pub struct Content {
    pub live: Vec<u8>,
    pub durable: Vec<u8>,
    pub pending: Vec<Change>,
}

/// A change of a file.
#[derive(Debug, Clone)]
pub enum Change {
    Write(usize, Vec<u8>),
    Len(usize),
    Punch(usize, usize),
}

/// A change of names; those of files come with the file's number.
#[derive(Debug, Clone)]
pub enum NameChange {
    Make(PathBuf, Option<usize>),
    Unlink(PathBuf),
    Rename(PathBuf, PathBuf, usize),
}

impl NameChange {
    pub fn touches(&self, dir: &Path) -> bool {
        match self {
            Self::Make(path, _) | Self::Unlink(path) => path.parent() == Some(dir),
            Self::Rename(from, to, _) => from.parent() == Some(dir) || to.parent() == Some(dir),
        }
    }

    pub fn apply(&self, names: &mut BTreeMap<PathBuf, Option<usize>>) {
        match self {
            Self::Make(path, id) => drop(names.insert(path.clone(), *id)),
            Self::Unlink(path) => drop(names.remove(path)),
            Self::Rename(from, to, id) => {
                names.remove(from);
                names.insert(to.clone(), Some(*id));
            }
        }
    }
}

impl Change {
    pub fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(offset, data) => {
                let end = offset + data.len();
                bytes.resize(bytes.len().max(end), 0);
                bytes[*offset..end].copy_from_slice(data);
            }
            Self::Len(len) => bytes.resize(*len, 0),
            Self::Punch(offset, len) => {
                let end = bytes.len().min(offset + len);
                bytes[end.min(*offset)..end].fill(0);
            }
        }
    }

    /// Applies a part of the change, sector by sector as the seed says.
    fn apply_torn(&self, bytes: &mut Vec<u8>, rng: &mut SmallRng, odds: f64) {
        match self {
            Self::Len(_) => {
                if rng.random_bool(odds) {
                    self.apply(bytes);
                }
            }
            Self::Write(offset, data) => {
                for range in sectors(*offset, data.len()) {
                    if rng.random_bool(odds) {
                        Self::Write(
                            range.start,
                            data[range.start - offset..range.end - offset].to_vec(),
                        )
                        .apply(bytes);
                    }
                }
            }
            Self::Punch(offset, len) => {
                for range in sectors(*offset, *len) {
                    if rng.random_bool(odds) {
                        Self::Punch(range.start, range.len()).apply(bytes);
                    }
                }
            }
        }
    }
}

fn sectors(offset: usize, len: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let end = offset + len;
    (offset / SECTOR..end.div_ceil(SECTOR))
        .map(move |i| (i * SECTOR).max(offset)..((i + 1) * SECTOR).min(end))
}

impl Content {
    pub fn surviving(&self, rng: &mut SmallRng, odds: f64) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        self.pending
            .iter()
            .for_each(|change| change.apply_torn(&mut bytes, rng, odds));
        bytes
    }

    pub fn sync(&mut self) {
        let durable = &mut self.durable;
        self.pending
            .drain(..)
            .for_each(|change| change.apply(durable));
    }
}
