//! `bench publish`: real files as a tree and as one tar, beside `zstd -T0` at the same level plus `b3sum`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use capsule_tests::Fleet;

use crate::measure::{self, Cost, median, median_cost, mib, peak_of, sync_file_system};
use crate::report::{Report, Table};
use crate::tools;

/// The level of zstd that publishing uses by default.
const LEVEL: &str = "-3";

/// Publishes both data sets `runs` times in turn with the other tools.
pub fn run(scratch: &Path, bytes: u64, runs: usize) -> Result<Report> {
    tools::install(&["zstd", "b3sum", "tar"])?;
    let tree = scratch.join("tree");
    let held = real_files(&tree, bytes)?;
    let tar = scratch.join("tree.tar");
    let status = Command::new("tar")
        .arg("-cf")
        .arg(&tar)
        .arg("-C")
        .arg(&tree)
        .arg(".")
        .status()?;
    ensure!(status.success(), "tar failed");
    let mut report = Report::new();
    let compress_tar = format!(
        "exec zstd -q -f -T0 {LEVEL} '{}' -o '{}/out.zst'",
        tar.display(),
        scratch.display()
    );
    let hash_tar = format!("exec b3sum '{}'", tar.display());
    report.tables.push(compare(
        "one tar",
        &tar,
        [&compress_tar, &hash_tar],
        scratch,
        held,
        runs,
    )?);
    let compress_tree = format!(
        "tar -cf - -C '{}' . | zstd -q -f -T0 {LEVEL} -o '{}/out.zst'",
        tree.display(),
        scratch.display()
    );
    let hash_tree = format!("find '{}' -type f -print0 | xargs -0 b3sum", tree.display());
    report.tables.push(compare(
        "a tree",
        &tree,
        [&compress_tree, &hash_tree],
        scratch,
        held,
        runs,
    )?);
    Ok(report)
}

fn compare(
    what: &str,
    source: &Path,
    others: [&str; 2],
    scratch: &Path,
    held: u64,
    runs: usize,
) -> Result<Table> {
    let mut ours: Vec<Cost> = vec![];
    let (mut zstd, mut b3sum) = (vec![], vec![]);
    let mut pack = 0;
    for _ in 0..runs {
        let shell = |script: &str| {
            let mut command = Command::new("bash");
            command.arg("-c").arg(script);
            measure::command(&mut command, Some(scratch))
        };
        zstd.push(shell(others[0])?);
        b3sum.push(shell(others[1])?);
        // A fresh fleet: what was published before must not help.
        let fleet = Fleet::new();
        sync_file_system(scratch)?;
        let pid = fleet[0].pid().as_raw_nonzero().get() as u32;
        let before = measure::cpu_of(pid);
        let started = std::time::Instant::now();
        let published = fleet[0].publish(source, "lab:1");
        let wall = started.elapsed().as_secs_f64();
        ours.push(Cost {
            wall,
            cpu: measure::cpu_of(pid) - before,
            peak: peak_of(pid),
        });
        pack = published["pack_bytes"].as_u64().unwrap_or(0);
    }
    let mut table = Table::new(
        format!("publish {what}: {} MiB of real files", mib(held)),
        &["wall s", "CPU s", "peak MiB", "out MiB"],
    );
    let out = fs::metadata(scratch.join("out.zst"))?.len();
    let row = |cost: Cost, out: String| {
        vec![
            format!("{:.2}", cost.wall),
            format!("{:.2}", cost.cpu),
            mib(cost.peak),
            out,
        ]
    };
    table.row("capsule publish", row(median_cost(&ours), mib(pack)));
    table.row(
        format!("zstd -T0 {LEVEL}"),
        row(median_cost(&zstd), mib(out)),
    );
    table.row("b3sum", row(median_cost(&b3sum), "-".into()));
    let ratios = ours
        .iter()
        .zip(zstd.iter().zip(&b3sum))
        .map(|(ours, (zstd, b3sum))| ours.wall / (zstd.wall + b3sum.wall));
    table.note(format!(
        "wall against the sum of both, run by run: median {:.2} (to reach: 1.35)",
        median(ratios.collect())
    ));
    table.note("peak memory to reach: under 512 MiB; the CPU of a pipeline of tools counts its shell's children");
    Ok(table)
}

/// Copies files of this machine until there is enough; goes over them again under other names where there is not.
pub fn real_files(to: &Path, bytes: u64) -> Result<u64> {
    let mut held = 0;
    let mut round = 0;
    while held < bytes {
        let before = held;
        let base = to.join(format!("round{round}"));
        let mut open: Vec<PathBuf> = vec!["/usr".into()];
        while let Some(dir) = open.pop().filter(|_| held < bytes) {
            let mut entries: Vec<_> = fs::read_dir(&dir)
                .with_context(|| format!("{}", dir.display()))?
                .flatten()
                .collect();
            entries.sort_by_key(fs::DirEntry::path);
            for entry in entries {
                let kind = entry.file_type()?;
                let path = entry.path();
                if kind.is_dir() {
                    open.push(path);
                } else if kind.is_file() && held < bytes {
                    let target = base.join(path.strip_prefix("/")?);
                    fs::create_dir_all(target.parent().context("a file lies in a directory")?)?;
                    // Files that only root may read, or that went away meanwhile, are left out.
                    held += fs::copy(&path, &target).unwrap_or(0);
                }
            }
        }
        ensure!(held > before, "/usr holds no files to measure on");
        round += 1;
    }
    Ok(held)
}
