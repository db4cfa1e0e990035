//! `bench delta`: updates of real systems, made of Debian packages, beside the tools that people would use for them.
//!
//! The images are built once, with the machine's own mirrors, in namespaces for mounts and processes; then everything is measured in one
//! where loopback is all the network there is.

pub mod apt;
mod build;
mod figures;
pub mod image;
mod options;
mod ours;
mod peers;
mod special;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use capsule_chunker::layer::encode::Effort;
use serde::Serialize;

use crate::Setting;
use crate::process::{Cost, Deadline};
use crate::report::{Column, MIB, Report, Table};
use crate::series::Series;
use crate::tools::{empty_dir, install};

pub use options::Options;

use build::{Set, Version};
use figures::Figures;
use image::Mount;
use options::Part;
use ours::{Ours, Way};
use peers::{Job, Peer};

/// How long a leg may take in the small run; ours at the highest effort is what it is about, and may take longer.
const SMALL_LEG: Duration = Duration::from_secs(600);
const SMALL_MAX: Duration = Duration::from_secs(1800);

/// How we publish what is compared at both efforts, and what free blocks are taken out of.
const BOTH: [Way; 2] = [Way::of(Effort::Default), Way::of(Effort::Max)];
const TRIMMING: Way = Way {
    effort: Effort::Default,
    trim: true,
};

const COLUMNS: [Column; 9] = [
    Column::plain("bytes", "bytes", 0),
    Column::plain("x .deb", "deb_ratio", 3),
    Column::plain("x ours", "ours_ratio", 2),
    Column::plain("make s", "make_seconds", 1),
    Column::plain("apply s", "apply_seconds", 1),
    Column::plain("CPU s", "cpu_seconds", 1),
    Column::mib("peak MiB", "peak_bytes"),
    Column::plain("metadata", "metadata_bytes", 0),
    Column::mib("changed MiB", "changed_bytes"),
];

/// What a leg found.
#[derive(Debug, Clone, Serialize)]
pub struct Found {
    /// All bytes that a machine with the older content fetches.
    pub bytes: u64,
    /// Making them.
    pub make: Option<Cost>,
    /// Fetching and applying them.
    pub apply: Option<Cost>,
    /// Of our own legs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ours: Option<Ours>,
}

impl Found {
    fn of_peer(bytes: u64, make: Cost, apply: Option<Cost>) -> Self {
        Self {
            bytes,
            make: Some(make),
            apply,
            ours: None,
        }
    }

    fn costs(&self) -> impl Iterator<Item = Cost> {
        [self.make, self.apply].into_iter().flatten()
    }

    fn cpu_seconds(&self) -> f64 {
        self.costs().map(|cost| cost.used.cpu_seconds).sum()
    }

    fn peak_bytes(&self) -> f64 {
        self.costs()
            .map(|cost| cost.used.peak_bytes as f64)
            .fold(0.0, f64::max)
    }
}

/// Installs the other tools, as far as it can: those that are there are measured, the others' legs fail.
pub fn install_tools() {
    if let Err(error) = install(&peers::NEEDS) {
        eprintln!("{error:#}");
    }
}

/// Measures.
pub fn run(setting: &Setting, options: &Options) -> Result<Report> {
    let set = options.set()?;
    // Two stores and an export, or what the hungriest of the other tools lays down.
    setting.need_room(set.allocated()? * 4)?;
    let bench = Bench {
        setting,
        options,
        set,
    };
    let mut figures = Figures::new(options.full);
    let mut report = Report::new();
    for part in &options.only {
        let table = match part {
            Part::Upgrade => bench.upgrade(true, &mut figures)?,
            Part::Untrimmed => bench.upgrade(false, &mut figures)?,
            Part::Install => bench.install(&mut figures)?,
            Part::Directory => bench.directory(&mut figures)?,
            Part::TwoSteps => bench.two_steps(&mut figures),
            Part::Republish => bench.republish(&mut figures),
            Part::Scattered => bench.scattered(&mut figures),
            Part::Hashing => bench.hashing(&mut figures),
        };
        report.tables.push(table);
    }
    report.tables.push(figures.table());
    Ok(report)
}

struct Bench<'a> {
    setting: &'a Setting,
    options: &'a Options,
    set: Set,
}

/// A pair of contents, and how we publish its newer content.
struct Pair<'a> {
    title: String,
    old: &'a Path,
    new: &'a Path,
    deb_bytes: u64,
    ways: &'a [Way],
    part: Part,
}

/// The legs of a pair.
struct Legs {
    ours: Vec<(Way, Series<Found>)>,
    peers: Vec<(Peer, Series<Found>)>,
}

impl Bench<'_> {
    /// When a leg has to be done, if it begins now.
    fn deadline(&self, bytes: u64) -> Deadline {
        if self.options.full {
            self.setting.deadline(bytes)
        } else {
            self.setting.deadline_within(bytes, SMALL_LEG)
        }
    }

    /// The same for one of ours.
    fn our_deadline(&self, bytes: u64, effort: Effort) -> Deadline {
        match (effort, self.options.full) {
            (Effort::Max, false) => self.setting.deadline_within(bytes * 2, SMALL_MAX),
            (Effort::Max, true) => self.setting.deadline(bytes * 4),
            (Effort::Fast | Effort::Default, _) => self.deadline(bytes),
        }
    }

    fn upgrade(&self, trimmed: bool, figures: &mut Figures) -> Result<Table> {
        let facts = &self.set.facts;
        let (old, new) = (
            self.set.image(Version::Old, trimmed),
            self.set.image(Version::New, trimmed),
        );
        let state = if trimmed { "trimmed" } else { "as apt left it" };
        let pair = Pair {
            title: format!("upgrade of {} packages, {state}", facts.upgrade_packages),
            old: &old,
            new: &new,
            deb_bytes: facts.upgrade_deb_bytes,
            ways: if trimmed {
                &BOTH
            } else {
                &[Way::of(Effort::Default), TRIMMING]
            },
            part: if trimmed {
                Part::Upgrade
            } else {
                Part::Untrimmed
            },
        };
        let legs = self.legs(&pair)?;
        figures.upgrade(trimmed, pair.deb_bytes, &legs);
        let mut table = self.table(&pair, &legs);
        table.note(format!(
            "initial RAM disks, made anew by an upgrade and in no package: {:.1} MiB in the newer image",
            facts.initrd_bytes as f64 / MIB
        ));
        Ok(table)
    }

    fn install(&self, figures: &mut Figures) -> Result<Table> {
        let facts = &self.set.facts;
        let pair = Pair {
            title: format!(
                "install of large applications, {} packages, trimmed",
                facts.install_packages
            ),
            old: &self.set.image(Version::New, true),
            new: &self.set.image(Version::Large, true),
            deb_bytes: facts.install_deb_bytes,
            ways: &BOTH,
            part: Part::Install,
        };
        let legs = self.legs(&pair)?;
        figures.install(pair.deb_bytes, &legs);
        Ok(self.table(&pair, &legs))
    }

    fn directory(&self, figures: &mut Figures) -> Result<Table> {
        let mount = |version| {
            Mount::read_only(
                &self.set.image(version, true),
                &self.set.mount_point(&format!("{version:?}")),
            )
        };
        let (old, new) = (mount(Version::Old)?, mount(Version::New)?);
        let pair = Pair {
            title: "upgrade, /usr as a directory".into(),
            old: &old.path().join("usr"),
            new: &new.path().join("usr"),
            deb_bytes: self.set.facts.upgrade_deb_bytes,
            ways: &BOTH,
            part: Part::Directory,
        };
        let legs = self.legs(&pair)?;
        figures.directory(&legs);
        Ok(self.table(&pair, &legs))
    }

    /// Each leg once: bytes do not vary, and there are many legs.
    fn legs(&self, pair: &Pair<'_>) -> Result<Legs> {
        let bytes = self.options.recipe().bytes;
        let dir = self.setting.scratch.join("leg");
        let mut legs = Legs {
            ours: vec![],
            peers: vec![],
        };
        for &way in pair.ways {
            let mut series = Series::new(way.name());
            let versions = [pair.old.to_owned(), pair.new.to_owned()];
            series.measure(&pair.title, || {
                ours::update(&versions, way, &self.our_deadline(bytes, way.effort))
            });
            legs.ours.push((way, series));
        }
        for peer in self.options.tools(pair.part) {
            let mut series = Series::new(peer.name());
            empty_dir(&dir)?;
            let job = Job {
                old: pair.old,
                new: pair.new,
                dir: &dir,
                deadline: self.deadline(bytes),
            };
            series.measure(&pair.title, || peer.measure(&job));
            legs.peers.push((peer, series));
            std::fs::remove_dir_all(&dir)?;
        }
        Ok(legs)
    }

    fn table(&self, pair: &Pair<'_>, legs: &Legs) -> Table {
        let mut table = Table::new(&pair.title, &COLUMNS);
        let ours = legs
            .ours
            .first()
            .and_then(|(_, series)| series.runs.first())
            .map(|found| found.bytes as f64);
        let all = legs
            .ours
            .iter()
            .map(|(_, series)| series)
            .chain(legs.peers.iter().map(|(_, series)| series));
        for series in all {
            row(&mut table, series, Some(pair.deb_bytes as f64), ours);
        }
        let debs = pair.deb_bytes as f64;
        table.part(
            ".deb files",
            vec![Some(debs), Some(1.0), ours.map(|ours| debs / ours)],
        );
        let tools = self.options.tools(pair.part);
        let left_out = Peer::ALL
            .into_iter()
            .filter(|peer| peer.takes(pair.part == Part::Directory) && !tools.contains(peer));
        let left_out: Vec<&str> = left_out.map(Peer::name).collect();
        if !left_out.is_empty() {
            table.note(format!(
                "left out of this run for their time: {} (--tools names them)",
                left_out.join(", ")
            ));
        }
        table.note("bytes: ours and rsync's are all that crossed the network, both ways; the others' are those of files, indexes included");
        table.note("x ours: of the first row; CPU: of both ends, making and applying; peak: of the process that took most");
        table.note("make: publishing the newer content; apply: a pull to its end, or writing the newer content by whoever has the older");
        table
    }

    fn two_steps(&self, figures: &mut Figures) -> Table {
        let title = "a machine two versions behind, trimmed";
        let bytes = self.options.recipe().bytes;
        let leg = |name: &str, versions: &[Version]| {
            let mut series = Series::new(name);
            let images: Vec<PathBuf> = versions
                .iter()
                .map(|version| self.set.image(*version, true))
                .collect();
            let deadline = self.deadline(bytes * 2);
            series.measure(title, || {
                ours::update(&images, Way::of(Effort::Default), &deadline)
            });
            series
        };
        let mut table = Table::new(title, &COLUMNS);
        let debs = Some(self.set.facts.upgrade_deb_bytes as f64);
        // Measured already where the upgrade was.
        if figures.direct.is_none() {
            let direct = leg("capsule, default, directly", &[Version::Old, Version::New]);
            figures.direct(&direct);
            row(&mut table, &direct, debs, None);
        }
        let chain = leg(
            "capsule, default, through two layers",
            &[Version::Old, Version::Half, Version::New],
        );
        row(&mut table, &chain, debs, figures.direct);
        table.note("x ours: of one layer between the same two images");
        figures.chain(&chain);
        table
    }

    fn republish(&self, figures: &mut Figures) -> Table {
        let bytes = self.options.recipe().bytes;
        let title = format!(
            "an unchanged image of {:.0} MiB published again",
            bytes as f64 / MIB
        );
        let (mut again, mut hashing) = (Series::new("capsule"), None);
        let deadline = self.deadline(bytes);
        again.measure(&title, || {
            let (found, seconds) =
                special::republish(&self.set.image(Version::New, true), &deadline)?;
            hashing = Some(seconds);
            Ok(found)
        });
        let mut table = Table::new(&title, &COLUMNS);
        row(&mut table, &again, None, None);
        if let Some(seconds) = hashing {
            table.note(format!(
                "reading and hashing it once, holes too, on all cores: {seconds:.2} s"
            ));
        }
        table.note("bytes hold what nodes say to each other meanwhile; what the pull fetched is told below");
        figures.republish(&again, hashing);
        table
    }

    fn hashing(&self, figures: &mut Figures) -> Table {
        let title = "a machine that has another image of nearly the same packages, installed in another order";
        let (image, bytes) = (
            self.set.image(Version::New, true),
            self.options.recipe().bytes,
        );
        let mut table = Table::new(title, &COLUMNS);
        let other = self.set.other();
        let mut leg = |name: &str, like: Option<&Path>, whole: Option<f64>| {
            let mut series = Series::new(name);
            let deadline = self.deadline(bytes * 2);
            series.measure(title, || ours::newcomer(&image, like, &deadline));
            row(&mut table, &series, None, whole);
            series.runs.first().map(|found| found.bytes as f64)
        };
        let whole = leg("capsule, from nothing", None, None);
        let hashed = leg("capsule, --like that image", other.as_deref(), whole);
        figures.hashing(hashed, whole);
        table.note("x ours: of a pull of everything");
        table
    }

    fn scattered(&self, figures: &mut Figures) -> Table {
        let title = format!(
            "{} edits of 4 KiB in a sparse image of {} GiB",
            special::EDITS,
            special::VAST >> 30
        );
        let mut series = Series::new("capsule");
        let deadline = self.deadline(special::VAST);
        series.measure(&title, || {
            special::scattered(&self.setting.scratch, &deadline)
        });
        let mut table = Table::new(&title, &COLUMNS);
        row(&mut table, &series, None, None);
        figures.scattered(&series);
        table
    }
}

fn row(table: &mut Table, series: &Series<Found>, debs: Option<f64>, ours: Option<f64>) {
    let found = series.runs.first();
    let bytes = found.map(|found| found.bytes as f64);
    let ratio = |of: Option<f64>| Some(bytes? / of?);
    let seconds = |cost: Option<Cost>| cost.map(|cost| cost.wall_seconds);
    let own = |figure: fn(&Ours) -> u64| Some(figure(found?.ours.as_ref()?) as f64);
    let figures = vec![
        bytes,
        ratio(debs),
        ratio(ours),
        seconds(found.and_then(|found| found.make)),
        seconds(found.and_then(|found| found.apply)),
        found.map(Found::cpu_seconds),
        found.map(Found::peak_bytes),
        own(|ours| ours.metadata_bytes),
        own(|ours| ours.changed_bytes),
    ];
    table.row(series, figures);
}
