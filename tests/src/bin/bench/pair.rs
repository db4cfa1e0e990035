//! `bench pair`: one node pulls from one peer, beside a plain TCP copy, rsync and BitTorrent clients.

use std::fs;
use std::path::Path;

use anyhow::{Result, anyhow, ensure};
use capsule_node::control::Phase;
use capsule_tests::inside::ADDRESS;
use capsule_tests::{Fleet, data};
use serde::Serialize;

use crate::Setting;
use crate::capsule::{self, pid};
use crate::files::{real_files, tar};
use crate::measure::sync_file_system;
use crate::process::Deadline;
use crate::report::{Column, MIB, Report, Table};
use crate::series::Series;
use crate::tools::bittorrent::{self, Client};
use crate::tools::tracker::Tracker;
use crate::tools::{Job, empty_dir, install, rsync, tcp};
use crate::transfer::{Meter, Transfer, same_content};

/// Programs that are measured beside ours, and their Debian packages.
const NEEDS: [(&str, &str); 5] = [
    ("rsync", "rsync"),
    ("aria2c", "aria2"),
    ("transmission-cli", "transmission-cli"),
    ("qbittorrent-nox", "qbittorrent-nox"),
    ("tar", "tar"),
];

const COLUMNS: [Column; 13] = [
    Column::plain("wall s", WALL, 2),
    Column::plain("x ours", "wall_ratio", 2),
    Column::plain("wait s", "wait_seconds", 2),
    Column::plain("data s", "data_seconds", 2),
    Column::plain("end s", "end_seconds", 2),
    Column::plain("data x ours", "data_ratio", 2),
    Column::mib("MiB/s", "data_bytes_per_second"),
    Column::plain("CPU s", CPU, 2),
    Column::plain("ns/B", "cpu_nanoseconds_per_byte", 2),
    Column::plain("machine s", "machine_cpu_seconds", 2),
    Column::mib("sender MiB", "sender_peak_bytes"),
    Column::mib("receiver MiB", RECEIVER_PEAK),
    Column::plain("runs", "runs", 0),
];
/// Keys of figures that checking has too.
const WALL: &str = "wall_seconds";
const CPU: &str = "cpu_seconds";
const RECEIVER_PEAK: &str = "receiver_peak_bytes";

/// Who brings the data over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Tool {
    /// Ours.
    Capsule,
    /// A plain TCP copy.
    Tcp,
    /// rsync from a daemon.
    Rsync,
    /// aria2 from an aria2 seeder.
    Aria2,
    /// qBittorrent from a qBittorrent seeder.
    Qbittorrent,
    /// transmission from a transmission seeder.
    Transmission,
}

/// What is brought over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Data {
    /// Incompressible bytes.
    Noise,
    /// A tar of files of this machine.
    Real,
}

/// What `bench pair` is asked for.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Size of each data set, in MiB.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(4..))]
    mib: u64,
    /// Only these tools.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Tool::Capsule, Tool::Tcp, Tool::Rsync, Tool::Aria2, Tool::Qbittorrent, Tool::Transmission])]
    only: Vec<Tool>,
    /// Only these data sets.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Data::Noise, Data::Real])]
    data: Vec<Data>,
}

/// Installs the other tools, as far as it can: those that are there are measured, the others' legs fail.
pub fn install_tools() {
    if let Err(error) = install(&NEEDS) {
        eprintln!("{error:#}");
    }
}

/// Measures the data sets.
pub fn run(setting: &Setting, options: &Options) -> Result<Report> {
    let bytes = options.mib << 20;
    // The source, a publisher's and a puller's store; or a tree and its tar.
    setting.need_room(bytes * 4)?;
    let mut report = Report::new();
    for data in &options.data {
        let source = setting.scratch.join("source");
        let what = match data {
            Data::Noise => {
                data::noise_file(&source, 2, bytes);
                "incompressible data"
            }
            Data::Real => {
                let tree = setting.scratch.join("tree");
                real_files(&tree, bytes)?;
                tar(&tree, &source)?;
                fs::remove_dir_all(&tree)?;
                "a tar of real files"
            }
        };
        let table = compare(what, setting, &source, &options.only)?;
        report.tables.push(table);
        fs::remove_file(&source)?;
    }
    Ok(report)
}

/// A leg of ours: its figures up to durable packs, and what came after.
#[derive(Debug, Serialize)]
struct Ours {
    #[serde(flatten)]
    transfer: Transfer,
    pack_bytes: u64,
    /// The puller's own account, to compare: planning, fetching until durable, and the CPU that it spent on fetching.
    own_planning_seconds: f64,
    own_fetch_seconds: f64,
    own_fetch_cpu_seconds: f64,
    check_seconds: f64,
    check_cpu_seconds: f64,
    check_peak_bytes: u64,
}

/// What a leg found.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Found {
    Ours(Box<Ours>),
    Other(Transfer),
}

impl Found {
    fn transfer(&self) -> &Transfer {
        match self {
            Self::Ours(ours) => &ours.transfer,
            Self::Other(transfer) => transfer,
        }
    }

    fn ours(&self) -> Option<&Ours> {
        match self {
            Self::Ours(ours) => Some(ours),
            Self::Other(_) => None,
        }
    }
}

fn compare(what: &str, setting: &Setting, source: &Path, only: &[Tool]) -> Result<Table> {
    let size = fs::metadata(source)?.len();
    let torrent = setting.scratch.join("source.torrent");
    let tracker = Tracker::start(ADDRESS)?;
    // Without it the BitTorrent legs fail, and say so.
    let made = bittorrent::torrent(&tracker, source, &torrent);
    let mut legs: Vec<(Tool, Series<Found>)> = only
        .iter()
        .map(|&tool| (tool, Series::new(tool.name())))
        .collect();
    let dir = setting.scratch.join("leg");
    for run in 1..=setting.runs {
        for (tool, series) in &mut legs {
            if series.is_over() {
                continue;
            }
            empty_dir(&dir)?;
            sync_file_system(&dir)?;
            let job = Job {
                address: ADDRESS,
                source,
                dir: &dir,
                deadline: setting.deadline(size),
            };
            let label = format!("{what}, run {run} of {}", setting.runs);
            series.measure(&label, || {
                let torrented = |client| {
                    made.as_ref().map_err(|error| anyhow!("{error:#}"))?;
                    bittorrent::measure(client, &job, &tracker, &torrent)
                };
                let (transfer, target) = match tool {
                    Tool::Capsule => {
                        return Ok(Found::Ours(Box::new(ours(source, &job.deadline)?)));
                    }
                    Tool::Tcp => (tcp::measure(&job)?, job.path(job.name()?)),
                    Tool::Rsync => (rsync::measure(&job)?, job.path(job.name()?)),
                    Tool::Aria2 => (torrented(Client::Aria2)?, job.path("into/source")),
                    Tool::Qbittorrent => (torrented(Client::QBittorrent)?, job.path("into/source")),
                    Tool::Transmission => {
                        (torrented(Client::Transmission)?, job.path("into/source"))
                    }
                };
                same_content(source, &target)?;
                Ok(Found::Other(transfer))
            });
        }
    }
    fs::remove_dir_all(&dir)?;
    let legs: Vec<Series<Found>> = legs.into_iter().map(|(_, series)| series).collect();
    Ok(table(what, size, &legs))
}

impl Tool {
    fn name(self) -> &'static str {
        match self {
            Self::Capsule => "capsule, packs durable",
            Self::Tcp => "TCP copy",
            Self::Rsync => "rsync daemon",
            Self::Aria2 => "aria2",
            Self::Qbittorrent => "qBittorrent",
            Self::Transmission => "transmission",
        }
    }
}

/// One pull, measured from its request until the packs are durable.
fn ours(source: &Path, deadline: &Deadline) -> Result<Ours> {
    let fleet = Fleet::of(2);
    let published = capsule::publish(&fleet[0], source, deadline)?;
    fleet[1].wait_for_peers(1);
    sync_file_system(fleet.dir())?;
    let mut meter = Meter::start(published.pack_bytes, pid(&fleet[0]), pid(&fleet[1]))?;
    // The puller tells that it checks within milliseconds of its packs being durable.
    let mut at_check = None;
    let pulled = capsule::pull(&fleet[1], deadline, |progress| {
        if progress.phase == Phase::Checking && at_check.is_none() {
            at_check = Some(meter.now());
        }
    })?;
    let whole = meter.now();
    // The checking of a small capsule may be over before it is told of.
    let transfer = at_check.unwrap_or_else(|| whole.clone());
    ensure!(
        pulled.fetched_bytes >= published.pack_bytes,
        "only {} bytes were fetched of a pack of {}",
        pulled.fetched_bytes,
        published.pack_bytes
    );
    Ok(Ours {
        pack_bytes: published.pack_bytes,
        own_planning_seconds: pulled.planning_seconds,
        own_fetch_seconds: pulled.fetch_seconds,
        own_fetch_cpu_seconds: pulled.fetch_cpu_seconds,
        check_seconds: pulled.check_seconds,
        check_cpu_seconds: whole.cpu_seconds() - transfer.cpu_seconds(),
        check_peak_bytes: whole.receiver.peak_bytes,
        transfer,
    })
}

fn table(what: &str, size: u64, legs: &[Series<Found>]) -> Table {
    let mut table = Table::new(
        format!("pull {what}: {:.0} MiB", size as f64 / MIB),
        &COLUMNS,
    );
    let ours = legs
        .iter()
        .find(|leg| leg.runs.iter().any(|run| run.ours().is_some()));
    let of_ours = |figure: &dyn Fn(&Transfer) -> f64| ours?.median(|run| figure(run.transfer()));
    let (our_wall, our_data) = (
        of_ours(&|transfer| transfer.wall_seconds),
        of_ours(&|transfer| transfer.data_seconds),
    );
    for leg in legs {
        let median = |figure: &dyn Fn(&Transfer) -> f64| leg.median(|run| figure(run.transfer()));
        let most =
            |figure: &dyn Fn(&Transfer) -> u64| leg.most(|run| figure(run.transfer()) as f64);
        let bytes = |run: &Found| run.ours().map_or(size, |ours| ours.pack_bytes) as f64;
        let ratio = |theirs: Option<f64>, ours: Option<f64>| Some(theirs? / ours?);
        let wall = median(&|transfer| transfer.wall_seconds);
        let data = median(&|transfer| transfer.data_seconds);
        let figures = vec![
            wall,
            ratio(wall, our_wall),
            median(&|transfer| transfer.wait_seconds),
            data,
            median(&|transfer| transfer.end_seconds),
            ratio(data, our_data),
            leg.median(|run| bytes(run) / run.transfer().data_seconds),
            median(&Transfer::cpu_seconds),
            leg.median(|run| run.transfer().cpu_seconds() * 1e9 / bytes(run)),
            median(&|transfer| transfer.machine_cpu_seconds),
            most(&|transfer| transfer.sender.peak_bytes),
            most(&|transfer| transfer.receiver.peak_bytes),
            Some(leg.runs.len() as f64).filter(|&runs| runs > 0.0),
        ];
        table.row(leg, figures);
        if ours.is_some_and(|ours| ours.name == leg.name) {
            let check = |figure: &dyn Fn(&Ours) -> f64| {
                leg.median(|run| run.ours().map_or(f64::NAN, figure))
            };
            let most = leg.most(|run| run.ours().map_or(0.0, |ours| ours.check_peak_bytes as f64));
            let figures = COLUMNS.map(|column| match column.key {
                WALL => check(&|ours| ours.check_seconds),
                CPU => check(&|ours| ours.check_cpu_seconds),
                RECEIVER_PEAK => most,
                _ => None,
            });
            table.part("capsule, then checking", figures.to_vec());
        }
    }
    notes(&mut table, legs);
    table
}

fn notes(table: &mut Table, legs: &[Series<Found>]) {
    if let Some(ours) = legs.iter().flat_map(|leg| &leg.runs).find_map(Found::ours) {
        table.note(format!(
            "the pack has {:.0} MiB; ns/B and MiB/s are of pack bytes for capsule, of content bytes for the others",
            ours.pack_bytes as f64 / MIB
        ));
    }
    table.note(
        "wall: from the order (a pull; the start of the receiving program with its URL or torrent) until the program says that it \
         is done and the result is on the disk (fsync included)",
    );
    table.note(
        "wait, data, end: until 256 KiB have crossed loopback; until all but 256 KiB have; the rest: disk, last blocks, reporting",
    );
    table.note(
        "CPU: both ends, kernel time included; machine: all of the machine meanwhile, so also whoever disturbed",
    );
    table.note(
        "medians; of memory the largest of all runs; it counts mapped files, and qBittorrent maps what it moves",
    );
    table.note(
        "capsule's daemons are connected beforehand; seeders have checked their data and announced themselves; all sources lie in the page cache",
    );
    table.note(
        "transmission 3.00 decides every 10 s what it wants and whom it serves, and asks a peer for no more than 512 blocks of 16 KiB \
         at a time, which take two or three rounds of 0.5 s: 5.6 to 8.4 MB/s, whatever its settings",
    );
    table.note(
        "each transfer finds as much memory as it is going to fill freed by who touched it just before: a virtual machine's host takes long to give \
         back what it took, and did so for some legs and not for others",
    );
    table.note("a leg that takes over a minute is measured once");
    table.note("to reach: ahead of every BitTorrent client in wall; at most 3 ns of CPU a pack byte, both ends");
}
