//! `bench idle`: a daemon in a fleet of three, with a capsule, that has nothing to do.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use capsule_tests::{Fleet, data};

use crate::measure::{cpu_of, mib, resident_of};
use crate::report::{Report, Table};

/// Watches for a while after settling.
pub fn run(scratch: &Path, seconds: u64) -> Result<Report> {
    let fleet = Fleet::of(3);
    let source = scratch.join("source");
    data::noise_file(&source, 1, 256 << 20);
    fleet[0].publish(&source, "lab:1");
    fleet.nodes()[1..]
        .iter()
        .for_each(|node| drop(node.json(&["pull", "lab:1"])));
    std::thread::sleep(Duration::from_secs(15));
    let pids: Vec<u32> = fleet
        .nodes()
        .iter()
        .map(|node| node.pid().as_raw_nonzero().get() as u32)
        .collect();
    let before: Vec<f64> = pids.iter().map(|&pid| cpu_of(pid)).collect();
    std::thread::sleep(Duration::from_secs(seconds));
    let mut report = Report::new();
    let mut table = Table::new(
        format!("idle daemons, {seconds} s after settling"),
        &["resident MiB", "CPU %"],
    );
    for (name, (pid, before)) in ["publisher", "puller", "puller"]
        .iter()
        .zip(pids.iter().zip(before))
    {
        let cpu = (cpu_of(*pid) - before) / seconds as f64 * 100.0;
        table.row(*name, vec![mib(resident_of(*pid)), format!("{cpu:.3}")]);
    }
    table.note("to reach: under 40 MiB resident and under 0.1 % CPU");
    report.tables.push(table);
    Ok(report)
}
