//! Real files to measure on: those of this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Copies files of this machine until there is enough; goes over them again under other names where there is not.
pub fn real_files(to: &Path, bytes: u64) -> Result<u64> {
    let mut held = 0;
    let mut round = 0;
    while held < bytes {
        let before = held;
        let base = to.join(format!("round{round}"));
        let mut open: Vec<PathBuf> = vec!["/usr".into()];
        while let Some(dir) = open.pop().filter(|_| held < bytes) {
            let mut entries: Vec<_> = fs::read_dir(&dir)
                .with_context(|| format!("{}", dir.display()))?
                .flatten()
                .collect();
            entries.sort_by_key(fs::DirEntry::path);
            for entry in entries {
                let kind = entry.file_type()?;
                let path = entry.path();
                if kind.is_dir() {
                    open.push(path);
                } else if kind.is_file() && held < bytes {
                    let target = base.join(path.strip_prefix("/")?);
                    fs::create_dir_all(target.parent().context("a file lies in a directory")?)?;
                    // Files that only root may read, or that went away meanwhile, are left out.
                    held += fs::copy(&path, &target).unwrap_or(0);
                }
            }
        }
        ensure!(held > before, "/usr holds no files to measure on");
        round += 1;
    }
    Ok(held)
}

/// Packs a directory into one tar.
pub fn tar(dir: &Path, into: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    let status = tar
        .arg("-cf")
        .arg(into)
        .arg("-C")
        .arg(dir)
        .arg(".")
        .stdin(Stdio::null())
        .status();
    ensure!(status.context("starting tar")?.success(), "tar failed");
    Ok(())
}
