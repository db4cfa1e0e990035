//! `bench publish`: real files as a tree and as one tar, beside `zstd -T0` at the same level plus `b3sum`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use capsule_tests::Fleet;
use serde::Serialize;

use crate::Setting;
use crate::capsule::{self, pid};
use crate::files::{real_files, tar};
use crate::measure::{Family, sync_file_system, sync_result};
use crate::process::{self, Cost, Deadline};
use crate::report::{Column, MIB, Report, Table};
use crate::series::{Series, median};
use crate::tools::install;

/// The level of zstd that publishing uses by default.
const LEVEL: &str = "-3";

const COLUMNS: [Column; 5] = [
    Column::plain("wall s", "wall_seconds", 2),
    Column::plain("CPU s", "cpu_seconds", 2),
    Column::mib("peak MiB", "peak_bytes"),
    Column::mib("out MiB", "out_bytes"),
    Column::plain("runs", "runs", 0),
];

/// Publishes both data sets in turn with the other tools.
pub fn run(setting: &Setting, bytes: u64) -> Result<Report> {
    if let Err(error) = install(&[("zstd", "zstd"), ("b3sum", "b3sum"), ("tar", "tar")]) {
        // Tools that are there are measured; the others say that they are not.
        eprintln!("{error:#}");
    }
    // The tree, its tar, and what is made of one of them.
    setting.need_room(bytes * 4)?;
    let tree = setting.scratch.join("tree");
    let one = setting.scratch.join("tree.tar");
    let held = real_files(&tree, bytes)?;
    tar(&tree, &one)?;
    let out = setting.scratch.join("out.zst");
    let (shown_tree, shown_one, shown_out) = (tree.display(), one.display(), out.display());
    let mut report = Report::new();
    let job = |what, source, compress: String, hash: String| Job {
        what,
        source,
        compress,
        hash,
        out: &out,
        held,
    };
    let as_tar = job(
        "one tar",
        &one,
        format!("exec zstd -q -f -T0 {LEVEL} '{shown_one}' -o '{shown_out}'"),
        format!("exec b3sum '{shown_one}'"),
    );
    report.tables.push(as_tar.compare(setting)?);
    fs::remove_file(&one)?;
    let as_tree = job(
        "a tree",
        &tree,
        format!("tar -cf - -C '{shown_tree}' . | zstd -q -f -T0 {LEVEL} -o '{shown_out}'"),
        format!("find '{shown_tree}' -type f -print0 | xargs -0 b3sum"),
    );
    report.tables.push(as_tree.compare(setting)?);
    Ok(report)
}

/// One data set, and what the other tools do with it.
struct Job<'a> {
    what: &'static str,
    source: &'a Path,
    compress: String,
    hash: String,
    out: &'a Path,
    held: u64,
}

/// What a leg found.
#[derive(Debug, Serialize)]
struct Found {
    #[serde(flatten)]
    cost: Cost,
    out_bytes: Option<u64>,
}

impl Job<'_> {
    fn compare(&self, setting: &Setting) -> Result<Table> {
        let mut ours = Series::new("capsule publish");
        let mut zstd = Series::new(format!("zstd -T0 {LEVEL}"));
        let mut b3sum = Series::new("b3sum");
        for run in 1..=setting.runs {
            let label = format!("publish {}, run {run} of {}", self.what, setting.runs);
            let deadline = || setting.deadline(self.held);
            sync_file_system(&setting.scratch)?;
            zstd.measure(&label, || {
                let synced = || sync_result(self.out);
                let cost = shell(&self.compress, setting, &deadline(), synced)?;
                let out_bytes = Some(fs::metadata(self.out)?.len());
                Ok(Found { cost, out_bytes })
            });
            if self.out.exists() {
                fs::remove_file(self.out)?;
            }
            sync_file_system(&setting.scratch)?;
            b3sum.measure(&label, || {
                let cost = shell(&self.hash, setting, &deadline(), || Ok(()))?;
                Ok(Found {
                    cost,
                    out_bytes: None,
                })
            });
            // A fresh fleet each time: what was published before must not help.
            ours.measure(&label, || publish(self.source, &deadline()));
        }
        Ok(self.table(&ours, &zstd, &b3sum))
    }

    fn table(&self, ours: &Series<Found>, zstd: &Series<Found>, b3sum: &Series<Found>) -> Table {
        let held = self.held as f64 / MIB;
        let title = format!("publish {}: {held:.0} MiB of real files", self.what);
        let mut table = Table::new(title, &COLUMNS);
        for series in [ours, zstd, b3sum] {
            let out = series.runs.iter().filter_map(|run| run.out_bytes);
            let figures = vec![
                series.median(|run| run.cost.wall_seconds),
                series.median(|run| run.cost.used.cpu_seconds),
                series.most(|run| run.cost.used.peak_bytes as f64),
                median(out.map(|bytes| bytes as f64).collect()),
                Some(series.runs.len() as f64).filter(|&runs| runs > 0.0),
            ];
            table.row(series, figures);
        }
        let ratios = ours.runs.iter().zip(zstd.runs.iter().zip(&b3sum.runs));
        let ratios = ratios.map(|(ours, (zstd, b3sum))| {
            ours.cost.wall_seconds / (zstd.cost.wall_seconds + b3sum.cost.wall_seconds)
        });
        if let Some(ratio) = median(ratios.collect()) {
            table.note(format!(
                "wall against the sum of both, run by run: median {ratio:.2} (to reach: 1.35)"
            ));
        }
        table.note(
            "the sync of zstd's output is counted in; capsule's packs are durable when it ends",
        );
        table.note("peak memory to reach: under 512 MiB; of a pipeline the peaks of its processes are added");
        table
    }
}

fn shell(
    script: &str,
    setting: &Setting,
    deadline: &Deadline,
    then: impl FnOnce() -> Result<()>,
) -> Result<Cost> {
    let mut command = Command::new("bash");
    command.args(["-o", "pipefail", "-c", script]);
    process::run(&mut command, &setting.scratch.join("log"), deadline, then)
}

fn publish(source: &Path, deadline: &Deadline) -> Result<Found> {
    let fleet = Fleet::new();
    sync_file_system(fleet.dir())?;
    let mut family = Family::watch(pid(&fleet[0]));
    let started = Instant::now();
    let published = capsule::publish(&fleet[0], source, deadline).context("capsule")?;
    let wall_seconds = started.elapsed().as_secs_f64();
    family.look();
    let cost = Cost {
        wall_seconds,
        used: family.used(),
    };
    Ok(Found {
        cost,
        out_bytes: Some(published.pack_bytes + published.index_bytes),
    })
}
