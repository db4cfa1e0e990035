//! Disk images: made, mounted, copied, trimmed.
//!
//! All mounts lie in the benchmark's own mount namespace, and `mount` frees a loop device with its last mount: however the
//! benchmark ends, none of either stays behind.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Something mounted; unmounted with all that lies below when it goes away.
#[derive(Debug)]
pub struct Mount {
    at: PathBuf,
    closed: bool,
}

impl Mount {
    /// Mounts with `mount`'s options; makes the directory.
    pub fn new(options: &[&str], what: &Path, at: &Path) -> Result<Self> {
        std::fs::create_dir_all(at).with_context(|| format!("making {}", at.display()))?;
        tell(Command::new("mount").args(options).arg(what).arg(at))?;
        Ok(Self {
            at: at.to_owned(),
            closed: false,
        })
    }

    /// An image to be written to. Nobody waits for its disk: an image that a crash spoils is built anew.
    pub fn writable(image: &Path, at: &Path) -> Result<Self> {
        Self::new(&["-o", "loop,nobarrier,noauto_da_alloc"], image, at)
    }

    /// An image only to be read; not even its journal is touched.
    pub fn read_only(image: &Path, at: &Path) -> Result<Self> {
        Self::new(&["-o", "loop,ro,noload"], image, at)
    }

    /// Where.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// Unmounts it; fails where somebody still uses it, so that no image is taken for finished that is not.
    pub fn close(mut self) -> Result<()> {
        tell(Command::new("umount").arg("--recursive").arg(&self.at))?;
        self.closed = true;
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.closed {
            let _ = tell(
                Command::new("umount")
                    .args(["--recursive", "--lazy"])
                    .arg(&self.at),
            );
        }
    }
}

/// A sparse image with an empty ext4.
pub fn make(image: &Path, bytes: u64) -> Result<()> {
    std::fs::File::create(image)?.set_len(bytes)?;
    // What is initialised later, while it is mounted, would count as changed.
    let lazy = "lazy_itable_init=0,lazy_journal_init=0";
    tell(
        Command::new("mkfs.ext4")
            .args(["-q", "-F", "-E", lazy])
            .arg(image),
    )
}

/// Copies an image, holes as holes.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    tell(
        Command::new("cp")
            .args(["--sparse=always", "--reflink=auto"])
            .args([from, to]),
    )
}

/// Makes holes of all blocks that the file system does not use.
pub fn trim(image: &Path) -> Result<()> {
    let mut check = Command::new("e2fsck");
    check.args(["-f", "-p", "-E", "discard"]).arg(image);
    let output = check
        .stdin(Stdio::null())
        .output()
        .context("starting e2fsck")?;
    // 1 tells that it put something right.
    ensure!(
        matches!(output.status.code(), Some(0 | 1)),
        "{check:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stdout).trim()
    );
    Ok(())
}

/// Runs a command to its end; what it said is told where it fails.
pub fn tell(command: &mut Command) -> Result<()> {
    said(command).map(drop)
}

/// The same; returns its output.
pub fn said(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {program}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
