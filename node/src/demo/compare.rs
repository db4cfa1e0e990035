//! Two directory trees, byte by byte: the demo's proof, which deliberately shares no code with what made the copy.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

/// Differences told, at most: enough to see what is wrong.
const MAX_DIFFERENCES: usize = 20;
const BUFFER: usize = 256 << 10;

/// What a comparison found.
#[derive(Debug, Default)]
pub struct Comparison {
    /// Regular files compared.
    pub files: u64,
    /// Bytes of content compared.
    pub bytes: u64,
    /// What differs, the first 20: a path and how.
    pub differences: Vec<String>,
}

/// Compares names, kinds, owners, modes, times of change of files, link targets and content of everything below two
/// directories.
///
/// # Errors
/// Something cannot be read.
pub fn compare(original: &Path, copy: &Path) -> Result<Comparison> {
    let mut walk = Walk {
        original,
        copy,
        found: Comparison::default(),
        buffers: [vec![0; BUFFER], vec![0; BUFFER]],
    };
    walk.entry(Path::new(""))?;
    Ok(walk.found)
}

struct Walk<'a> {
    original: &'a Path,
    copy: &'a Path,
    found: Comparison,
    buffers: [Vec<u8>; 2],
}

impl Walk<'_> {
    fn entry(&mut self, path: &Path) -> Result<()> {
        let (a, b) = (self.original.join(path), self.copy.join(path));
        let (meta_a, meta_b) = (metadata(&a)?, metadata(&b)?);
        if let Some(what) = metadata_difference(&meta_a, &meta_b) {
            self.differs(path, what);
        }
        if meta_a.file_type() != meta_b.file_type() {
            return Ok(());
        }
        if meta_a.is_dir() {
            self.directory(path, &a, &b)?;
        } else if meta_a.is_symlink() {
            if fs::read_link(&a)? != fs::read_link(&b)? {
                self.differs(path, "target");
            }
        } else if meta_a.is_file() {
            self.found.files += 1;
            if !self.contents(&a, &b)? {
                self.differs(path, "content");
            }
        }
        Ok(())
    }

    fn directory(&mut self, path: &Path, a: &Path, b: &Path) -> Result<()> {
        let (names_a, names_b) = (names(a)?, names(b)?);
        for name in names_a.symmetric_difference(&names_b) {
            let what = if names_a.contains(name) {
                "missing in the copy"
            } else {
                "only in the copy"
            };
            self.differs(&path.join(name), what);
        }
        for name in names_a.intersection(&names_b) {
            self.entry(&path.join(name))?;
        }
        Ok(())
    }

    fn contents(&mut self, a: &Path, b: &Path) -> Result<bool> {
        let mut files = [open(a)?, open(b)?];
        loop {
            let [left, right] = &mut self.buffers;
            let len = fill(&mut files[0], left).with_context(|| a.display().to_string())?;
            let other = fill(&mut files[1], right).with_context(|| b.display().to_string())?;
            self.found.bytes += len as u64;
            if left[..len] != right[..other] {
                return Ok(false);
            }
            if len < BUFFER {
                return Ok(true);
            }
        }
    }

    fn differs(&mut self, path: &Path, what: &str) {
        if self.found.differences.len() < MAX_DIFFERENCES {
            self.found
                .differences
                .push(format!("{}: {what}", Path::new(".").join(path).display()));
        }
    }
}

fn metadata_difference(a: &Metadata, b: &Metadata) -> Option<&'static str> {
    // Kind and permissions together; the times of directories and links say when the copy was made on some file
    // systems, and are no content.
    let checks = [
        (a.mode() == b.mode(), "kind or mode"),
        ((a.uid(), a.gid()) == (b.uid(), b.gid()), "owner"),
        (
            !a.is_file() || (a.mtime(), a.mtime_nsec()) == (b.mtime(), b.mtime_nsec()),
            "time of change",
        ),
        (!a.is_file() || a.len() == b.len(), "size"),
    ];
    checks.iter().find(|(same, _)| !same).map(|(_, what)| *what)
}

fn metadata(path: &Path) -> Result<Metadata> {
    fs::symlink_metadata(path).with_context(|| format!("cannot read {}", path.display()))
}

fn names(dir: &Path) -> Result<BTreeSet<OsString>> {
    let read = || {
        fs::read_dir(dir)?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<io::Result<_>>()
    };
    read().with_context(|| format!("cannot read {}", dir.display()))
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read(&mut buffer[len..]) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn tree(dir: &Path, content: &[u8]) -> PathBuf {
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("sub/file"), content).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        File::open(dir.join("sub/file"))
            .unwrap()
            .set_modified(time)
            .unwrap();
        std::os::unix::fs::symlink("sub/file", dir.join("link")).unwrap();
        dir.to_owned()
    }

    #[test]
    fn equal_trees_have_no_difference() {
        let dir = tempfile::tempdir().unwrap();
        let content = vec![9; BUFFER * 2 + 17];
        let (a, b) = (
            tree(&dir.path().join("a"), &content),
            tree(&dir.path().join("b"), &content),
        );
        let found = compare(&a, &b).unwrap();
        assert_eq!((found.files, found.bytes), (1, content.len() as u64));
        assert!(found.differences.is_empty(), "{:?}", found.differences);
    }

    #[test]
    fn one_changed_byte_one_missing_name_and_one_other_target_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let mut content = vec![9; BUFFER * 2];
        let a = tree(&dir.path().join("a"), &content);
        content[BUFFER] = 8;
        let b = tree(&dir.path().join("b"), &content);
        fs::write(a.join("more"), "x").unwrap();
        fs::remove_file(b.join("link")).unwrap();
        std::os::unix::fs::symlink("sub", b.join("link")).unwrap();
        let found = compare(&a, &b).unwrap().differences;
        assert_eq!(
            found,
            [
                "./more: missing in the copy",
                "./link: target",
                "./sub/file: content"
            ]
        );
    }
}
