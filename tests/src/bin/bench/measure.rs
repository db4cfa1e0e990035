//! CPU time and peak memory of processes, from the operating system's own accounts.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use capsule_tests::accounts::{cpu_of, forget_peak, members, peak_of};
use serde::Serialize;

/// What a process and its descendants used.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Used {
    /// CPU seconds, those that the kernel spent on their behalf included.
    pub cpu_seconds: f64,
    /// The largest resident set of each, summed.
    pub peak_bytes: u64,
}

/// A process and its descendants, watched from now on. Accounts of processes that end are lost between two looks, except
/// for the CPU time of children, which goes over to their parents.
#[derive(Debug)]
pub struct Family {
    root: u32,
    before: f64,
    cpu: f64,
    peaks: BTreeMap<u32, u64>,
}

impl Family {
    /// Begins to watch; what they used before does not count.
    pub fn watch(root: u32) -> Self {
        let members = members(root);
        members.iter().for_each(|&pid| forget_peak(pid));
        let cpu = members.iter().map(|&pid| cpu_of(pid)).sum();
        Self {
            before: cpu,
            cpu,
            ..Self::new(root)
        }
    }

    /// Watches a process that was just started: all that it used counts.
    pub fn new(root: u32) -> Self {
        Self {
            root,
            before: 0.0,
            cpu: 0.0,
            peaks: BTreeMap::new(),
        }
    }

    /// Looks at their accounts.
    pub fn look(&mut self) {
        let mut cpu = 0.0;
        for pid in members(self.root) {
            cpu += cpu_of(pid);
            let peak = self.peaks.entry(pid).or_default();
            *peak = (*peak).max(peak_of(pid));
        }
        // A child that is reaped between two readings is missing in one look.
        self.cpu = self.cpu.max(cpu);
    }

    /// What they used, as last seen.
    pub fn used(&self) -> Used {
        Used {
            cpu_seconds: self.cpu - self.before,
            peak_bytes: self.peaks.values().sum(),
        }
    }
}

/// Bytes that the loopback interface of this network namespace has carried.
pub fn loopback_bytes() -> u64 {
    let devices = fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    let line = devices
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("lo:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// Waits until everything written to the file system of the path is on its disk.
pub fn sync_file_system(path: &Path) -> Result<()> {
    rustix::fs::syncfs(fs::File::open(path)?).with_context(|| format!("syncing {}", path.display()))
}

/// Waits until a file, or a directory's files, and their names are on the disk.
pub fn sync_result(path: &Path) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            sync_result(&entry?.path())?;
        }
    }
    let parent = path.parent().filter(|_| path.is_file());
    for path in [Some(path), parent].into_iter().flatten() {
        let file = fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
        file.sync_all()
            .with_context(|| format!("syncing {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_childs_work_counts_for_its_family() {
        let mut shell = Command::new("sh");
        shell.args([
            "-c",
            "i=0; (while [ $i -lt 200000 ]; do i=$((i+1)); done); echo; read line; true",
        ]);
        let mut shell = shell
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut family = Family::watch(shell.id());
        let mut byte = [0];
        std::io::Read::read_exact(shell.stdout.as_mut().unwrap(), &mut byte).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        family.look();
        assert!(family.used().cpu_seconds >= 0.02, "{:?}", family.used());
        assert!(family.used().peak_bytes > 100_000, "{:?}", family.used());
        drop(shell.stdin.take());
        shell.wait().unwrap();
    }
}
