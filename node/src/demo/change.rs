//! An update of the demo's tree: of every fifty files one is new, one changed, one renamed and one gone.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// One file of so many is taken for each kind of change.
const EVERY: usize = 50;
/// What is put into the middle of a changed file.
const LINE: &[u8] = b"\n# a line that came with the update\n";
/// zstd's own default, with which people would pack an archive.
const ARCHIVE_LEVEL: i32 = 3;

/// Files that are kept out of the first version.
pub struct Held(Vec<(PathBuf, PathBuf)>);

/// What an update changed.
pub struct Changed {
    /// Files with new content: changed ones and new ones.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of a `tar.zst` of them.
    pub archive_bytes: u64,
}

/// Takes out of the tree what is to be new in its update.
pub fn hold_back(tree: &Path, aside: &Path) -> Result<Held> {
    fs::create_dir(aside).with_context(|| format!("cannot make {}", aside.display()))?;
    let mut held = Vec::new();
    for (number, path) in taken(tree, 0)?.into_iter().enumerate() {
        let place = aside.join(number.to_string());
        rename(&path, &place)?;
        held.push((place, path));
    }
    Ok(Held(held))
}

/// Changes the tree.
pub fn update(tree: &Path, held: Held) -> Result<Changed> {
    let [changed, renamed, gone] = [10, 20, 30].map(|which| taken(tree, which));
    let mut fresh = changed?;
    for path in &fresh {
        change(path).with_context(|| format!("cannot change {}", path.display()))?;
    }
    for path in renamed? {
        let mut name = std::ffi::OsString::from("renamed-");
        name.push(path.file_name().unwrap_or_default());
        rename(&path, &path.with_file_name(name))?;
    }
    for path in gone? {
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    for (place, path) in held.0 {
        rename(&place, &path)?;
        fresh.push(path);
    }
    archive(&fresh)
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("cannot rename {}", from.display()))
}

fn change(path: &Path) -> io::Result<()> {
    let mut bytes = fs::read(path)?;
    let middle = bytes.len() / 2;
    bytes.splice(middle..middle, LINE.iter().copied());
    fs::write(path, bytes)
}

/// One in [`EVERY`] of the tree's plain files of one name, by path.
fn taken(tree: &Path, which: usize) -> Result<Vec<PathBuf>> {
    let (mut files, mut dirs) = (Vec::new(), vec![tree.to_owned()]);
    while let Some(dir) = dirs.pop() {
        let entries = fs::read_dir(&dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        for entry in entries.with_context(|| format!("cannot read {}", dir.display()))? {
            let meta = entry.metadata()?;
            if meta.is_dir() {
                dirs.push(entry.path());
            } else if meta.is_file() && meta.nlink() == 1 {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files.into_iter().skip(which).step_by(EVERY).collect())
}

/// Packs files as people would who send only those that changed; counts, and keeps nothing.
fn archive(files: &[PathBuf]) -> Result<Changed> {
    let mut bytes = 0;
    let mut packed = zstd::Encoder::new(Count(0), ARCHIVE_LEVEL)?;
    for path in files {
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        bytes += content.len() as u64;
        // A header of 512 bytes and padding to the next: what tar adds.
        let mut header = [0; 512];
        let name = path.as_os_str().as_encoded_bytes();
        let len = name.len().min(100);
        header[..len].copy_from_slice(&name[name.len() - len..]);
        packed.write_all(&header)?;
        packed.write_all(&content)?;
        packed.write_all(&vec![
            0;
            content.len().next_multiple_of(512) - content.len()
        ])?;
    }
    Ok(Changed {
        files: files.len() as u64,
        bytes,
        archive_bytes: packed.finish()?.0,
    })
}

/// Counts what is written.
struct Count(u64);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_changes_what_it_says() {
        let temp = tempfile::tempdir().unwrap();
        let (tree, aside) = (temp.path().join("tree"), temp.path().join("aside"));
        fs::create_dir(&tree).unwrap();
        for number in 0..150 {
            fs::write(
                tree.join(format!("{number:03}")),
                format!("file {number}").repeat(100),
            )
            .unwrap();
        }
        let held = hold_back(&tree, &aside).unwrap();
        let count = || fs::read_dir(&tree).unwrap().count();
        assert_eq!(count(), 147);
        let changed = update(&tree, held).unwrap();
        assert_eq!((changed.files, count()), (6, 147));
        assert!(tree.join("000").exists(), "what was held back is there");
        let bytes = |name: &str| fs::read(tree.join(name)).unwrap();
        assert!(
            bytes("011")
                .windows(LINE.len())
                .any(|window| window == LINE)
        );
        assert!(changed.bytes > 4_000 && changed.archive_bytes < changed.bytes);
    }
}
