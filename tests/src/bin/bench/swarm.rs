//! `bench swarm`: one publisher, several that pull at once, all on loopback.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use capsule_tests::{Fleet, data};

use crate::measure::{cpu_of, median, mib, peak_of};
use crate::report::{Report, Table};

/// Seconds until the last has all, and copies that the publisher sent.
pub fn run(scratch: &Path, bytes: u64, pullers: usize, runs: usize) -> Result<Report> {
    let source = scratch.join("source");
    data::noise_file(&source, 5, bytes);
    let mut report = Report::new();
    let columns = [
        "last s",
        "median s",
        "MiB/s each",
        "copies sent",
        "CPU s",
        "peak MiB",
    ];
    let mut table = Table::new(
        format!(
            "1 publisher, {pullers} pullers, {} MiB of noise",
            mib(bytes)
        ),
        &columns,
    );
    let mut copies = vec![];
    for run in 1..=runs {
        let fleet = Fleet::of(pullers + 1);
        let published = fleet[0].publish(&source, "lab:1");
        fleet
            .nodes()
            .iter()
            .for_each(|node| node.wait_for_peers(pullers.min(7)));
        let pids: Vec<u32> = fleet
            .nodes()
            .iter()
            .map(|node| node.pid().as_raw_nonzero().get() as u32)
            .collect();
        let before: f64 = pids.iter().map(|&pid| cpu_of(pid)).sum();
        let started = Instant::now();
        let mut seconds: Vec<f64> = std::thread::scope(|scope| {
            let pulls: Vec<_> = fleet.nodes()[1..]
                .iter()
                .map(|node| {
                    scope.spawn(move || {
                        node.json(&["pull", "lab:1"]);
                        started.elapsed().as_secs_f64()
                    })
                })
                .collect();
            pulls
                .into_iter()
                .map(|pull| pull.join().expect("the pull succeeds"))
                .collect()
        });
        seconds.sort_by(f64::total_cmp);
        let cpu = pids.iter().map(|&pid| cpu_of(pid)).sum::<f64>() - before;
        let sent = fleet[0].json(&["status"])["sent_bytes"]
            .as_u64()
            .unwrap_or(0);
        let sent = sent as f64 / published["pack_bytes"].as_u64().unwrap_or(1) as f64;
        copies.push(sent);
        let last = seconds.last().copied().unwrap_or(f64::NAN);
        table.row(
            format!("run {run}"),
            vec![
                format!("{last:.2}"),
                format!("{:.2}", median(seconds)),
                format!("{:.0}", bytes as f64 / last / f64::from(1 << 20)),
                format!("{sent:.2}"),
                format!("{cpu:.1}"),
                mib(pids.iter().map(|&pid| peak_of(pid)).max().unwrap_or(0)),
            ],
        );
    }
    table.note(format!(
        "to reach: at most 1.5 copies; median {:.2}",
        median(copies)
    ));
    report.tables.push(table);
    Ok(report)
}
