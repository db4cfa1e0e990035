//! `bench pair`: one node pulls from one peer, beside a plain TCP copy, rsync, aria2 and transmission.
//!
//! All run in a network namespace of their own, on an address that BitTorrent clients do not take for themselves (they
//! refuse 127.0.0.0/8).

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use capsule_node::control::{Client, Phase, Pull};
use capsule_tests::{Fleet, data};

use crate::measure::{Cost, cpu_of, median, median_cost, mib, peak_of, sync_file_system};
use crate::publish::real_files;
use crate::report::{Report, Table};
use crate::tools;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Tells the program that it is in its namespace already.
const INSIDE: &str = "CAPSULE_BENCH_NAMESPACE";

/// Measures both data sets.
pub fn run(scratch: &Path, bytes: u64, runs: usize) -> Result<Report> {
    tools::install(&["rsync", "aria2", "transmission-cli", "tar"])?;
    if std::env::var_os(INSIDE).is_none() {
        return enter_namespace();
    }
    let mut report = Report::new();
    let noise = scratch.join("noise");
    data::noise_file(&noise, 2, bytes);
    report
        .tables
        .push(compare("incompressible data", scratch, &noise, runs)?);
    fs::remove_file(&noise)?;
    let (tree, tar) = (scratch.join("tree"), scratch.join("real.tar"));
    real_files(&tree, bytes)?;
    ensure!(
        Command::new("tar")
            .arg("-cf")
            .arg(&tar)
            .arg("-C")
            .arg(&tree)
            .arg(".")
            .status()?
            .success(),
        "tar failed"
    );
    fs::remove_dir_all(&tree)?;
    report
        .tables
        .push(compare("a tar of real files", scratch, &tar, runs)?);
    Ok(report)
}

/// Runs this program again in a network namespace that has only loopback, and ends with its exit code.
fn enter_namespace() -> Result<Report> {
    let me = std::env::current_exe()?;
    let script =
        format!("ip link set lo up && ip address add {ADDRESS}/32 dev lo && exec \"$0\" \"$@\"");
    let mut inner = Command::new("unshare");
    inner
        .args(["--net", "sh", "-c", &script])
        .arg(me)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1");
    let status = inner
        .status()
        .context("unshare (util-linux) and ip (iproute2) are needed, and root")?;
    std::process::exit(status.code().unwrap_or(1));
}

/// What our transfer cost, beside what every tool reports.
struct Ours {
    fetch: Cost,
    check_seconds: f64,
    pack: u64,
}

fn compare(what: &str, scratch: &Path, source: &Path, runs: usize) -> Result<Table> {
    let size = fs::metadata(source)?.len();
    let torrent = tools::torrent(ADDRESS, scratch, source)?;
    let target = scratch.join("target");
    let mut ours = vec![];
    let mut others: Vec<(&str, Vec<Cost>)> = ["TCP copy", "rsync", "aria2", "transmission"]
        .map(|name| (name, vec![]))
        .into();
    for _ in 0..runs {
        eprintln!("{what}: capsule");
        ours.push(pull(source)?);
        for (name, costs) in &mut others {
            sync_file_system(scratch)?;
            eprintln!("{what}: {name}");
            costs.push(match *name {
                "TCP copy" => tools::tcp_copy(ADDRESS, source, &target)?,
                "rsync" => tools::rsync(ADDRESS, scratch, source, &target)?,
                "aria2" => tools::aria2(ADDRESS, &torrent, source, &target)?,
                "transmission" => tools::transmission(ADDRESS, scratch, &torrent, source, &target)?,
                other => bail!("no tool {other}"),
            });
            if target.is_dir() {
                fs::remove_dir_all(&target)?
            } else {
                fs::remove_file(&target)?
            }
        }
    }
    let mut table = Table::new(
        format!("pull {what}: {} MiB", mib(size)),
        &["wall s", "x ours", "CPU s", "CPU ns/B", "peak MiB"],
    );
    let fetch = median_cost(&ours.iter().map(|ours| ours.fetch).collect::<Vec<_>>());
    let pack = ours.first().map_or(1, |ours| ours.pack);
    let row = |cost: Cost, bytes: u64| {
        vec![
            format!("{:.2}", cost.wall),
            format!("{:.2}", cost.wall / fetch.wall),
            format!("{:.2}", cost.cpu),
            format!("{:.2}", cost.cpu * 1e9 / bytes as f64),
            mib(cost.peak),
        ]
    };
    table.row("capsule, packs durable", row(fetch, pack));
    let check = median(ours.iter().map(|ours| ours.check_seconds).collect());
    table.row(
        "capsule, then checking",
        vec![
            format!("{check:.2}"),
            String::new(),
            String::new(),
            String::new(),
            String::new(),
        ],
    );
    others
        .iter()
        .for_each(|(name, costs)| table.row(*name, row(median_cost(costs), size)));
    table.note(format!(
        "the pack has {} MiB; ns/B are per pack byte for capsule, per content byte for the others",
        mib(pack)
    ));
    table.note("to reach: ahead of aria2 and transmission in wall; at most 3 ns of CPU a pack byte, both ends");
    Ok(table)
}

/// One pull, measured from its request until the packs are durable.
fn pull(source: &Path) -> Result<Ours> {
    let fleet = Fleet::of(2);
    let published = fleet[0].publish(source, "lab:1");
    fleet[1].wait_for_peers(1);
    sync_file_system(fleet.dir())?;
    let pids: Vec<u32> = fleet
        .nodes()
        .iter()
        .map(|node| node.pid().as_raw_nonzero().get() as u32)
        .collect();
    let cpu = || pids.iter().map(|&pid| cpu_of(pid)).sum::<f64>();
    let before = cpu();
    let started = Instant::now();
    let mut at_check: Option<Cost> = None;
    let request = Pull {
        capsule: serde_json::from_value("lab:1".into())?,
        wait: None,
    };
    let pulled = Client::connect(fleet[1].home())?.run(
        request,
        |progress| {
            if progress.phase == Phase::Checking && at_check.is_none() {
                at_check = Some(Cost {
                    wall: started.elapsed().as_secs_f64(),
                    cpu: cpu() - before,
                    peak: 0,
                });
            }
        },
        drop,
    )?;
    // The daemon's own clock is exact about the wall; our view of its phases dates the CPU.
    let seen = at_check.context("the pull told when it began to check")?;
    let peak = pids.iter().map(|&pid| peak_of(pid)).max().unwrap_or(0);
    let wall = pulled.planning_seconds + pulled.fetch_seconds;
    Ok(Ours {
        fetch: Cost {
            wall,
            cpu: seen.cpu,
            peak,
        },
        check_seconds: pulled.check_seconds,
        pack: published["pack_bytes"]
            .as_u64()
            .context("publish tells the pack's bytes")?,
    })
}
