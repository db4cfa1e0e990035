//! The operating system's accounts of processes.

use std::fs;
use std::time::Instant;

/// CPU seconds that a process and its finished children have used; of one that has ended, until it is reaped.
pub fn cpu_of(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Fields after the command's name, which may hold anything: utime, stime, cutime, cstime are the 12th to 15th.
    let fields = stat.rsplit(')').next().unwrap_or("").split_whitespace();
    seconds(fields.skip(11).take(4))
}

/// CPU seconds that all of the machine has spent on anything but idling.
pub fn cpu_of_machine() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields: Vec<&str> = stat
        .lines()
        .next()
        .unwrap_or("")
        .split_whitespace()
        .collect();
    // cpu user nice system idle iowait irq softirq
    let busy = [1, 2, 3, 6, 7];
    seconds(busy.iter().filter_map(|&field| fields.get(field).copied()))
}

/// The machine's CPUs, watched for a while.
#[derive(Debug)]
pub struct Machine {
    since: Instant,
    cpu_before: f64,
}

impl Machine {
    /// Begins to watch.
    pub fn watch() -> Self {
        Self {
            since: Instant::now(),
            cpu_before: cpu_of_machine(),
        }
    }

    /// What part of the time that all its CPUs had since then was used, by whomever.
    pub fn busy(&self) -> f64 {
        let cores = std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64);
        (cpu_of_machine() - self.cpu_before) / (cores * self.since.elapsed().as_secs_f64())
    }
}

/// Seconds of fields that count clock ticks.
fn seconds<'a>(ticks: impl Iterator<Item = &'a str>) -> f64 {
    let ticks: u64 = ticks.filter_map(|field| field.parse::<u64>().ok()).sum();
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

/// Makes the resident set of now the largest so far. Where the kernel refuses, the older peak counts.
pub fn forget_peak(pid: u32) {
    let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

fn memory(pid: u32, name: &str) -> u64 {
    field(&format!("/proc/{pid}/status"), name)
}

/// A field in KiB, in bytes.
fn field(file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Bytes of memory that programs could get without anything being swapped out.
pub fn available_memory() -> u64 {
    field("/proc/meminfo", "MemAvailable:")
}

/// A process and all its descendants.
pub fn members(root: u32) -> Vec<u32> {
    let mut members = vec![root];
    let mut next = 0;
    while let Some(&pid) = members.get(next) {
        next += 1;
        for thread in fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            members.extend(
                children
                    .split_whitespace()
                    .filter_map(|pid| pid.parse::<u32>().ok()),
            );
        }
    }
    members
}
