//! A file system of a few megabytes, to be filled.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A tmpfs, mounted until dropped. Needs root.
pub struct SmallDisk {
    /// Where it is mounted.
    pub path: PathBuf,
}

impl SmallDisk {
    /// Mounts one of that size on a new directory.
    pub fn mount(path: &Path, megabytes: u64) -> Self {
        fs::create_dir(path).expect("the directory can be made");
        let disk = Self {
            path: path.to_owned(),
        };
        let size = format!("mode=700,size={megabytes}m");
        disk.run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs"]);
        disk
    }

    /// Makes it larger, or smaller.
    pub fn resize(&self, megabytes: u64) {
        self.run("mount", &["-o", &format!("remount,size={megabytes}m")]);
    }

    /// Bytes that are free on it.
    pub fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.path).expect("it is mounted");
        stat.f_bavail * stat.f_frsize
    }

    fn run(&self, program: &str, args: &[&str]) {
        let status = Command::new(program).args(args).arg(&self.path).status();
        assert!(
            status.is_ok_and(|status| status.success()),
            "this test mounts a tmpfs: run it as root"
        );
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a daemon on it may still be ending.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}
