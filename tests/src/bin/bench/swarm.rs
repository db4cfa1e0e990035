//! `bench swarm`: one publisher, several that pull at once, all on loopback.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use capsule_node::control::Status;
use capsule_tests::{Fleet, data};
use serde::Serialize;

use crate::Setting;
use crate::capsule::{self, pid};
use crate::measure::{Family, sync_file_system};
use crate::process::Deadline;
use crate::report::{Column, MIB, Report, Table};
use crate::series::{Series, median};

const COLUMNS: [Column; 7] = [
    Column::plain("last s", "last_seconds", 2),
    Column::plain("median s", "median_seconds", 2),
    Column::mib("MiB/s each", "bytes_per_second_each"),
    Column::plain("copies sent", "copies_sent", 2),
    Column::plain("CPU s", "cpu_seconds", 1),
    Column::mib("publisher MiB", "publisher_peak_bytes"),
    Column::mib("puller MiB", "puller_peak_bytes"),
];

/// What a run found.
#[derive(Debug, Serialize)]
struct Found {
    /// Each puller's time, from the common start to its packs checked, ascending.
    seconds: Vec<f64>,
    pack_bytes: u64,
    sent_bytes: u64,
    cpu_seconds: f64,
    publisher_peak_bytes: u64,
    puller_peak_bytes: u64,
}

impl Found {
    fn last(&self) -> f64 {
        self.seconds.last().copied().unwrap_or(f64::NAN)
    }

    fn copies(&self) -> f64 {
        self.sent_bytes as f64 / self.pack_bytes as f64
    }
}

/// Seconds until the last has all, and copies that the publisher sent.
pub fn run(setting: &Setting, bytes: u64, pullers: usize) -> Result<Report> {
    // The source and a store each.
    setting.need_room(bytes * (pullers as u64 + 2) + (256 << 20))?;
    let source = setting.scratch.join("source");
    data::noise_file(&source, 5, bytes);
    let title = format!(
        "1 publisher, {pullers} pullers, {:.0} MiB of noise",
        bytes as f64 / MIB
    );
    let mut table = Table::new(&title, &COLUMNS);
    let mut copies = vec![];
    for run in 1..=setting.runs {
        let mut series = Series::new(format!("run {run}"));
        series.measure(&title, || {
            swarm(&source, pullers, &setting.deadline(bytes * pullers as u64))
        });
        copies.extend(series.median(Found::copies));
        let figures = vec![
            series.median(Found::last),
            series.median(|run| median(run.seconds.clone()).unwrap_or(f64::NAN)),
            series.median(|run| bytes as f64 / run.last()),
            series.median(Found::copies),
            series.median(|run| run.cpu_seconds),
            series.median(|run| run.publisher_peak_bytes as f64),
            series.median(|run| run.puller_peak_bytes as f64),
        ];
        table.row(&series, figures);
    }
    let copies = median(copies).map_or("none".into(), |copies| format!("{copies:.2}"));
    table.note(format!("to reach: at most 1.5 copies; median {copies}"));
    table.note("CPU of all daemons together; peaks of the publisher and of the largest puller, during the pulls");
    let mut report = Report::new();
    report.tables.push(table);
    Ok(report)
}

fn swarm(source: &Path, pullers: usize, deadline: &Deadline) -> Result<Found> {
    let fleet = Fleet::of(pullers + 1);
    let published = capsule::publish(&fleet[0], source, deadline)?;
    fleet
        .nodes()
        .iter()
        .for_each(|node| node.wait_for_peers(pullers.min(7)));
    sync_file_system(fleet.dir())?;
    let mut families: Vec<Family> = fleet
        .nodes()
        .iter()
        .map(|node| Family::watch(pid(node)))
        .collect();
    let started = Instant::now();
    let results: Vec<Result<f64>> = std::thread::scope(|scope| {
        let pulls: Vec<_> = fleet.nodes()[1..]
            .iter()
            .map(|node| {
                scope.spawn(move || {
                    capsule::pull(node, deadline, drop)?;
                    Ok(started.elapsed().as_secs_f64())
                })
            })
            .collect();
        let results = pulls.into_iter().map(|pull| pull.join());
        results
            .map(|result| result.unwrap_or_else(|_| Err(anyhow!("the pull panicked"))))
            .collect()
    });
    families.iter_mut().for_each(Family::look);
    let mut seconds = vec![];
    for (number, result) in results.into_iter().enumerate() {
        seconds.push(result.with_context(|| format!("puller {}", number + 1))?);
    }
    seconds.sort_by(f64::total_cmp);
    let status = capsule::ask(&fleet[0], "status", Status {}, deadline, drop)?;
    let used: Vec<_> = families.iter().map(Family::used).collect();
    Ok(Found {
        seconds,
        pack_bytes: published.pack_bytes,
        sent_bytes: status.sent_bytes,
        cpu_seconds: used.iter().map(|used| used.cpu_seconds).sum(),
        publisher_peak_bytes: used[0].peak_bytes,
        puller_peak_bytes: used[1..]
            .iter()
            .map(|used| used.peak_bytes)
            .max()
            .unwrap_or(0),
    })
}
