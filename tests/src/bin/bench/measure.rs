//! Wall time, CPU time and peak memory of processes, from the operating system's own accounts.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// What something cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    /// Wall time, in seconds.
    pub wall: f64,
    /// CPU time of all processes that took part, in seconds.
    pub cpu: f64,
    /// Largest resident set of any process that took part, in bytes.
    pub peak: u64,
}

/// CPU seconds that a process and its finished children have used.
pub fn cpu_of(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Fields after the command's name, which may hold anything: utime, stime, cutime, cstime are the 12th to 15th.
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or("")
        .split_whitespace()
        .collect();
    let ticks: u64 = fields
        .iter()
        .skip(11)
        .take(4)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Largest resident set of a process so far, in bytes.
pub fn peak_of(pid: u32) -> u64 {
    memory(pid, "VmHWM:")
}

/// Resident set of a process, in bytes.
pub fn resident_of(pid: u32) -> u64 {
    memory(pid, "VmRSS:")
}

fn memory(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .unwrap_or("0");
    line.split_whitespace()
        .next()
        .and_then(|kib| kib.parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}

/// Runs a command to its end, with `sync` of the file system it wrote to counted in where given.
pub fn command(command: &mut Command, sync: Option<&Path>) -> Result<Cost> {
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {command:?}"))?;
    let pid = child.id();
    let mut cost = Cost::default();
    // The accounts go away with the process: the last look before its end is at most 2 ms old.
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        cost.peak = cost.peak.max(peak_of(pid));
        cost.cpu = cost.cpu.max(cpu_of(pid));
        std::thread::sleep(Duration::from_millis(2));
    };
    ensure!(status.success(), "{command:?} failed with {status}");
    if let Some(path) = sync {
        sync_file_system(path)?;
    }
    cost.wall = started.elapsed().as_secs_f64();
    Ok(cost)
}

/// Waits until everything written to the file system of the path is on its disk.
pub fn sync_file_system(path: &Path) -> Result<()> {
    rustix::fs::syncfs(std::fs::File::open(path)?).context("syncing")
}

/// The median.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Field by field, the median of several costs; of memory, the largest.
pub fn median_cost(costs: &[Cost]) -> Cost {
    Cost {
        wall: median(costs.iter().map(|cost| cost.wall).collect()),
        cpu: median(costs.iter().map(|cost| cost.cpu).collect()),
        peak: costs.iter().map(|cost| cost.peak).max().unwrap_or(0),
    }
}

/// Bytes as MiB.
pub fn mib(bytes: u64) -> String {
    format!("{:.0}", bytes as f64 / f64::from(1 << 20))
}
