//! The lock that keeps a second daemon out of a store.
//!
//! An advisory lock of the whole file (`flock`), which the kernel drops with the process that holds
//! it, however that ends: so there is no stale lock to clean up, and the process id in the file is
//! only for the message.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

use rustix::fs::FlockOperation;

use super::error::{IoFault, OpenError};

/// Name of the lock file in the store's directory.
pub(super) const LOCK_FILE: &str = "lock";

/// Holds the lock while it lives.
#[derive(Debug)]
pub(super) struct HomeLock {
    _file: File,
}

impl HomeLock {
    /// Takes the lock of a store's directory, or says who holds it.
    pub(super) fn take(dir: &Path) -> Result<Self, OpenError> {
        let path = dir.join(LOCK_FILE);
        let fault = |doing, source| OpenError::Io(IoFault::new(doing, &path, source));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| fault("open", e))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(OpenError::InUse {
                    dir: dir.into(),
                    holder: holder(&mut file),
                });
            }
            Err(e) => return Err(fault("lock", e.into())),
        }
        write_holder(&mut file).map_err(|e| fault("write", e))?;
        Ok(Self { _file: file })
    }
}

fn write_holder(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

/// Names the process that wrote the file, by number and, where it still runs, by name.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.take(32).read_to_string(&mut text);
    let Some(pid) = read.ok().and_then(|_| text.trim().parse::<u32>().ok()) else {
        return "another process".into();
    };
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("process {pid} ({})", name.trim()),
        Err(_) => format!("process {pid}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_refused_and_told_who_the_first_is() {
        let dir = tempfile::tempdir().unwrap();
        let first = HomeLock::take(dir.path()).unwrap();
        let refused = HomeLock::take(dir.path()).unwrap_err().to_string();
        assert!(
            refused.contains(&format!("process {}", std::process::id())),
            "{refused}"
        );
        assert!(refused.contains("--home"), "{refused}");
        drop(first);
        HomeLock::take(dir.path()).unwrap();
    }
}
