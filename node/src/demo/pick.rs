//! Something real to publish: a copy of files of this machine, up to a size.
//!
//! The same machine gives the same files: directories are walked in the order of their names. Files are copied (a
//! reflink where the file system can), never hard-linked: a link would change the originals' inodes, and an upgrade
//! in the middle of the demo their content.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::OFlags;

/// Where files are taken from, with the share of the size that each may fill at first: programs, libraries, and the
/// small texts that are most of any system's files. What remains is then filled from all of them in turn.
const PLACES: [(&str, u64); 8] = [
    ("/usr/bin", 20),
    ("/usr/lib", 50),
    ("/usr/share", 30),
    ("/usr/include", 0),
    ("/usr/local", 0),
    ("/opt", 0),
    ("/run/current-system/sw", 0),
    ("/nix/store", 0),
];

/// The size counts as reached when less than this is missing: to search a whole system for one more small file would
/// take longer than the demo.
const CLOSE_ENOUGH: u64 = 1 << 20;

/// Entries looked at, at most, in each place: bounds the time on machines with millions of files.
const MAX_ENTRIES: usize = 200_000;

/// What was gathered.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Gathered {
    /// Regular files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Copies files of this machine below `tree`, which must not exist, at most `budget` bytes of them.
///
/// # Errors
/// The temporary directory cannot be written, or not one file of the machine can be read.
pub fn gather(tree: &Path, budget: u64) -> Result<Gathered> {
    let places: Vec<(PathBuf, u64)> = PLACES
        .iter()
        .map(|&(place, share)| (place.into(), budget / 100 * share))
        .collect();
    let mut copier = Copier::new(tree, budget)?;
    copier.fill(&places)?;
    if copier.gathered.files == 0 {
        // A container of one static binary: the demo still has itself.
        let exe = std::env::current_exe().context("cannot find this program's own file")?;
        copier.budget = u64::MAX;
        copier.take(&exe)?;
    }
    anyhow::ensure!(
        copier.gathered.files > 0,
        "found no file on this machine that may be read"
    );
    Ok(copier.gathered)
}

struct Copier<'a> {
    tree: &'a Path,
    budget: u64,
    gathered: Gathered,
    /// Directories made, so that each is made once.
    made: BTreeSet<PathBuf>,
}

impl<'a> Copier<'a> {
    fn new(tree: &'a Path, budget: u64) -> Result<Self> {
        fs::create_dir(tree).with_context(|| format!("cannot make {}", tree.display()))?;
        Ok(Self {
            tree,
            budget,
            gathered: Gathered::default(),
            made: BTreeSet::new(),
        })
    }

    /// Fills the places' shares, then what is missing from wherever there is more.
    fn fill(&mut self, places: &[(PathBuf, u64)]) -> Result<()> {
        let mut walks: Vec<(Walk, u64)> = places
            .iter()
            .map(|(place, share)| (Walk::new(place), *share))
            .collect();
        for (walk, share) in &mut walks {
            self.fill_from(walk, *share)?;
        }
        for (walk, _) in &mut walks {
            self.fill_from(walk, u64::MAX)?;
        }
        Ok(())
    }

    fn fill_from(&mut self, walk: &mut Walk, share: u64) -> Result<()> {
        let end = self.gathered.bytes.saturating_add(share).min(self.budget);
        while end.saturating_sub(self.gathered.bytes) > CLOSE_ENOUGH.min(share / 2) {
            let Some(path) = walk.next() else { break };
            let room = end - self.gathered.bytes;
            if fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_symlink() || meta.len() <= room)
            {
                self.take(&path)?;
            }
        }
        Ok(())
    }

    /// Copies one file or symbolic link; what may not be read, or is neither, is passed over.
    fn take(&mut self, path: &Path) -> Result<()> {
        let Ok(meta) = fs::symlink_metadata(path) else {
            return Ok(());
        };
        let to = self.tree.join(path.strip_prefix("/").unwrap_or(path));
        let failed = || format!("cannot copy {} to {}", path.display(), to.display());
        if meta.is_symlink() {
            let Ok(target) = fs::read_link(path) else {
                return Ok(());
            };
            self.make_parent(&to)?;
            std::os::unix::fs::symlink(target, &to).with_context(failed)?;
        } else if meta.is_file() {
            let Ok(mut from) = open_file(path) else {
                return Ok(());
            };
            self.make_parent(&to)?;
            let mut copy = fs::File::create_new(&to).with_context(failed)?;
            self.gathered.bytes += io::copy(&mut from, &mut copy).with_context(failed)?;
            self.gathered.files += 1;
            // Without set-user-id bits: the copy may belong to somebody else than the original.
            let mode = fs::Permissions::from_mode(meta.permissions().mode() & 0o777 | 0o400);
            copy.set_permissions(mode).with_context(failed)?;
            if let Ok(modified) = meta.modified() {
                copy.set_modified(modified).with_context(failed)?;
            }
        }
        Ok(())
    }

    fn make_parent(&mut self, path: &Path) -> Result<()> {
        let parent = path.parent().unwrap_or(self.tree);
        if self.made.insert(parent.to_owned()) {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot make {}", parent.display()))?;
        }
        Ok(())
    }
}

/// Opens a regular file that may since have been replaced by something that would block or lead elsewhere.
fn open_file(path: &Path) -> io::Result<fs::File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = fs::File::options()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::ErrorKind::InvalidInput.into())
    }
}

/// The files and symbolic links below a directory in the order of their names, read as they are asked for.
struct Walk {
    /// Entries still to come, last first.
    stack: Vec<PathBuf>,
    seen: usize,
}

impl Walk {
    fn new(dir: &Path) -> Self {
        let mut walk = Self {
            stack: Vec::new(),
            seen: 0,
        };
        walk.enter(dir);
        walk
    }

    /// Puts a directory's entries on the stack; one that may not be read has none.
    fn enter(&mut self, dir: &Path) {
        let Ok(entries) = fs::read_dir(dir) else {
            return;
        };
        let mut paths: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .take(MAX_ENTRIES)
            .collect();
        paths.sort_unstable_by(|a, b| b.cmp(a));
        self.stack.append(&mut paths);
    }
}

impl Iterator for Walk {
    type Item = PathBuf;

    fn next(&mut self) -> Option<PathBuf> {
        while let Some(path) = self.stack.pop() {
            self.seen += 1;
            if self.seen > MAX_ENTRIES {
                return None;
            }
            match fs::symlink_metadata(&path) {
                Ok(meta) if meta.is_dir() => self.enter(&path),
                Ok(meta) if meta.is_file() || meta.is_symlink() => return Some(path),
                _ => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(dir: &Path) -> Vec<(PathBuf, u64)> {
        for (path, len) in [
            ("a/one", 4000),
            ("a/two", 3000),
            ("a/deep/three", 2000),
            ("b/four", 5000),
        ] {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, vec![7; len]).unwrap();
        }
        std::os::unix::fs::symlink("/nowhere", dir.join("a/link")).unwrap();
        vec![(dir.join("a"), 5000), (dir.join("b"), 0)]
    }

    #[test]
    fn gathers_within_the_budget_and_twice_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let places = machine(&dir.path().join("usr"));
        let mut runs = Vec::new();
        for to in ["t1", "t2"] {
            let tree = dir.path().join(to);
            let mut copier = Copier::new(&tree, 8000).unwrap();
            copier.fill(&places).unwrap();
            assert!(copier.gathered.bytes <= 8000);
            let copied: Vec<PathBuf> = Walk::new(&tree)
                .map(|path| path.strip_prefix(&tree).unwrap().to_owned())
                .collect();
            runs.push((copier.gathered, copied));
        }
        assert_eq!(runs[0], runs[1]);
        assert!(runs[0].0.files >= 2, "{runs:?}");
    }

    #[test]
    fn a_walk_goes_in_the_order_of_names() {
        let dir = tempfile::tempdir().unwrap();
        machine(dir.path());
        let names: Vec<String> = Walk::new(dir.path())
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["three", "link", "one", "two", "four"]);
    }
}
