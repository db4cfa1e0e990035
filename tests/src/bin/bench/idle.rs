//! `bench idle`: daemons in a fleet of three, each with a capsule, that have nothing to do.

use std::time::Duration;

use anyhow::{Result, ensure};
use capsule_tests::accounts::{cpu_of, resident_of};
use capsule_tests::{Fleet, data};
use serde::Serialize;

use crate::Setting;
use crate::capsule::{self, pid};
use crate::report::{Column, MIB, Report, Table};
use crate::series::Series;

/// How much each of them holds.
const BYTES: u64 = 256 << 20;
/// How long after its work a daemon counts as idle: it hands free memory back within half a minute.
const SETTLING: Duration = Duration::from_secs(35);

const COLUMNS: [Column; 2] = [
    Column::mib("resident MiB", "resident_bytes"),
    Column::plain("CPU %", "cpu_percent", 3),
];

/// What a daemon used.
#[derive(Debug, Clone, Copy, Serialize)]
struct Found {
    resident_bytes: u64,
    cpu_percent: f64,
}

/// Watches for a while after settling.
pub fn run(setting: &Setting, seconds: u64) -> Result<Report> {
    // The source and three stores.
    setting.need_room(BYTES * 5)?;
    let title = format!(
        "idle daemons, {:.0} MiB held, watched for {seconds} s after settling",
        BYTES as f64 / MIB
    );
    let mut series = Series::new("daemons");
    series.measure(&title, || watch(setting, seconds));
    let mut table = Table::new(title, &COLUMNS);
    let names = ["publisher", "puller 1", "puller 2"];
    for (name, found) in names.iter().zip(series.runs.iter().flatten()) {
        let figures = [found.resident_bytes as f64, found.cpu_percent];
        table.part(*name, figures.map(Some).to_vec());
    }
    if series.failed.is_some() {
        table.row(&series, vec![]);
    }
    table.note("to reach: under 40 MiB resident and under 0.1 % CPU");
    table.note(format!(
        "CPU accounts advance in steps of a clock tick: {:.3} % of that time",
        100.0 / (rustix::param::clock_ticks_per_second() * seconds) as f64
    ));
    let mut report = Report::new();
    report.tables.push(table);
    Ok(report)
}

fn watch(setting: &Setting, seconds: u64) -> Result<Vec<Found>> {
    let source = setting.scratch.join("source");
    data::noise_file(&source, 1, BYTES);
    let fleet = Fleet::of(3);
    let deadline = setting.deadline(BYTES);
    capsule::publish(&fleet[0], &source, &deadline)?;
    for node in &fleet.nodes()[1..] {
        capsule::pull(node, &deadline, drop)?;
    }
    std::thread::sleep(SETTLING);
    let pids: Vec<u32> = fleet.nodes().iter().map(pid).collect();
    let before: Vec<f64> = pids.iter().map(|&pid| cpu_of(pid)).collect();
    std::thread::sleep(Duration::from_secs(seconds));
    let found = pids.iter().zip(before).map(|(&pid, before)| Found {
        resident_bytes: resident_of(pid),
        cpu_percent: (cpu_of(pid) - before) / seconds as f64 * 100.0,
    });
    let found: Vec<Found> = found.collect();
    // A daemon that ended would seem to use nothing.
    ensure!(
        found.iter().all(|found| found.resident_bytes > 0),
        "a daemon ended while it was watched"
    );
    Ok(found)
}
