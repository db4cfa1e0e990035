//! `bench machine`: a machine's moves between two network namespaces over a link of 384 kbit/s, beside what the paper reached whose system this
//! re-creates (Sapuntzakis et al., *Optimizing the Migration of Virtual Computers*, OSDI 2002).
//!
//! | module | what |
//! |---|---|
//! | `system`, `work` | the guest's disk, built once; what happens in the guest |
//! | `place`, `guest` | nodes on shaped links; machines and their consoles |
//! | `moves`, `local` | what is measured over the thin link; on the LAN, and on one computer |
//! | `ablation` | what each technique saves |
//! | `found`, `figures`, `plot` | what was found; beside what is to be reached and what the paper claims; drawn |

mod ablation;
mod figures;
mod found;
mod guest;
mod local;
mod moves;
mod nbd;
mod place;
mod plot;
mod system;
mod work;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use capsule_node::control::{CapsuleRef, Client, Describe, Layers, ReadFirst};
use capsule_tests::inside;

use self::found::Found;
use self::guest::Guest;
use self::place::{HOME, OTHER, Place};
use self::system::System;
use crate::Setting;
use crate::process::Deadline;
use crate::report::Report;
use crate::series::Series;
use crate::tools::install;

/// Longest that anything may take that does not go over the thin link, and a move over that.
const STEP: Duration = Duration::from_secs(900);
const MOVE: Duration = Duration::from_secs(3600);
/// How long a guest that has booted is left alone before it counts as idle.
const SETTLES: Duration = Duration::from_secs(30);
/// Longest that who resumes a machine first uses it: until what it read is published.
const READS: Duration = Duration::from_secs(90);
/// How long what it read takes to be put in front, and to be told of; a copy of some packs.
const REORDERS: Duration = Duration::from_secs(20);
/// Room for the homes: packs and memories of half a dozen machines.
const ROOM: u64 = 12 << 30;

/// The machine as it is first captured.
const IDLE: &str = "me:idle";
/// What is typed first: a program of its own, and a little of the disk.
const FIRST_COMMAND: &str = "ls /";

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Row {
    /// 384 kbit/s, nothing at the receiver: to the first command's answer, and to that of a larger application.
    First,
    /// The same with the capture at the receiver that was made before packages were upgraded.
    Update,
    /// From home to work and back, each time after work.
    Commute,
    /// How long a second capture stands still.
    Pause,
    /// The captured memory.
    Memory,
    /// The LAN beside local files.
    Lan,
    /// A network block device beside qemu-nbd.
    Nbd,
    /// What each technique saves.
    Ablation,
}

impl Row {
    const ALL: [Self; 8] = [
        Self::First,
        Self::Update,
        Self::Commute,
        Self::Pause,
        Self::Memory,
        Self::Lan,
        Self::Nbd,
        Self::Ablation,
    ];
}

/// What `bench machine` is asked for.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only these rows.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Row::ALL)]
    only: Vec<Row>,
    /// Where the guest's disk and package files are kept for later runs; `bench-machine` in the target directory by default.
    #[arg(long)]
    cache: Option<PathBuf>,
    /// The thin link, in kbit/s: to see quickly whether all works, faster than what the figures are set for.
    #[arg(long, default_value_t = 384, value_parser = clap::value_parser!(u32).range(64..=1_000_000))]
    kbit: u32,
    /// Only build the guest's disk.
    #[arg(long)]
    build_only: bool,
    /// Where the report in Markdown goes, its plot beside it; `bench-machine.md` in the working directory by default.
    #[arg(long)]
    markdown: Option<PathBuf>,
}

impl Options {
    fn cache(&self) -> Result<PathBuf> {
        let cache = match &self.cache {
            Some(cache) => cache.clone(),
            None => {
                let me = std::env::current_exe()?;
                let target = me.ancestors().nth(2);
                let target = target.context("this program lies in a target directory")?;
                target.join("bench-machine")
            }
        };
        std::fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;
        Ok(cache.canonicalize()?)
    }

    /// Whether the guest's disk has to be built, which takes the network.
    pub fn must_build(&self) -> Result<bool> {
        Ok(System::open(&self.cache()?).is_err())
    }

    /// Builds it.
    pub fn build(&self) -> Result<()> {
        system::build(&self.cache()?)
    }

    /// Whether that is all.
    pub fn is_build_only(&self) -> bool {
        self.build_only
    }

    fn has(&self, row: Row) -> bool {
        self.only.contains(&row)
    }
}

/// Installs what the guest and the disks beside ours take, as far as it can.
pub fn install_tools() {
    if let Err(error) = install(&system::NEEDS) {
        eprintln!("{error:#}");
    }
}

/// Measures all that was asked for.
pub fn run(setting: &Setting, options: &Options) -> Result<Report> {
    setting.need_room(ROOM)?;
    // Machines go on when those end who started them: they are ended with this program, by their ids.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    inside::mount_itself(&setting.scratch)?;
    let report = measure(setting, options);
    inside::unmount(&setting.scratch);
    report
}

fn measure(setting: &Setting, options: &Options) -> Result<Report> {
    let system = System::open(&options.cache()?)?;
    let mut bench = Bench {
        setting,
        place: Place::set_up(
            &setting.scratch.join("nodes"),
            f64::from(options.kbit) / 1000.0,
        )?,
        found: Found::new(&system, options.kbit),
        system,
    };
    let mut home = bench.idle_machine()?;
    for row in Row::ALL.into_iter().filter(|row| options.has(*row)) {
        let mut series = Series::<f64>::new(format!("{row:?}"));
        series.measure("machine", || {
            let began = Instant::now();
            bench.measure(row, &mut home)?;
            Ok(began.elapsed().as_secs_f64())
        });
        if let Some(reason) = series.failed {
            bench.found.failed.push((row, reason));
        }
        // It takes long until all of it is told.
        eprintln!("{}", serde_json::to_string(&bench.found)?);
    }
    home.remove(&Deadline::after(STEP))?;
    let found = bench.found;
    let markdown = options.markdown.clone();
    let markdown = markdown.unwrap_or_else(|| "bench-machine.md".into());
    figures::write_markdown(&found, &options.only, &markdown)?;
    Ok(figures::report(&found, &options.only))
}

/// What rows share.
struct Bench<'a> {
    setting: &'a Setting,
    system: System,
    place: Place,
    found: Found,
}

impl Bench<'_> {
    fn measure(&mut self, row: Row, home: &mut Guest) -> Result<()> {
        match row {
            Row::First => self.first(),
            Row::Update => self.update(home),
            Row::Commute => self.commute(home),
            Row::Pause => self.pause(),
            Row::Memory => self.memory(),
            Row::Lan => self.lan(),
            Row::Nbd => self.nbd(),
            Row::Ablation => self.ablation(),
        }
    }

    /// A machine that has booted at home, and was captured when it had nothing to do. It runs on.
    fn idle_machine(&mut self) -> Result<Guest> {
        eprintln!("booting the guest ...");
        let deadline = Deadline::after(STEP);
        let image = self.system.image();
        let image = image.to_str().context("the cache's path is UTF-8")?;
        let node = self.place.node(HOME);
        let began = Instant::now();
        let mut guest = Guest::create(
            node,
            "me",
            &["--disk", image, "--memory", "512M"],
            &deadline,
        )?;
        guest.boot(&deadline)?;
        self.found.boot_seconds = began.elapsed().as_secs_f64();
        std::thread::sleep(SETTLES);
        eprintln!("capturing it ...");
        self.found.idle = Some(guest.capture(IDLE, &[], &deadline)?);
        self.found.idle_layers = self.layers(HOME, IDLE)?;
        Ok(guest)
    }

    /// Somebody resumes a capsule on the LAN, types a command and goes on for half a minute: what he reads is published.
    fn recorded(&mut self, capsule: &str) -> Result<f64> {
        self.place.has(OTHER, true)?;
        let layers = self.layers(HOME, capsule)?.len();
        let before = prefetch(self.place.node(HOME).home(), capsule)?;
        let deadline = Deadline::after(STEP);
        let began = Instant::now();
        let (mut guest, info) =
            Guest::run(self.place.node(OTHER), "other", Some(capsule), &deadline)?;
        guest.ask(FIRST_COMMAND, &deadline)?;
        let first = guest::since(began);
        eprintln!(
            "{capsule} without a record, on the LAN: runs after {:.1} s, answers after {first:.1}",
            info.started_seconds.unwrap_or_default()
        );
        self.told(capsule, &before)?;
        // Home puts that in front, where it is worth it, and tells.
        std::thread::sleep(REORDERS);
        let orders = self.layers(HOME, capsule)?.len() - layers;
        eprintln!("what it reads first was put in front of {orders} layers");
        guest.remove(&deadline)?;
        // Only home is left to fetch from.
        self.place.has(OTHER, false)?;
        Ok(first)
    }

    /// Waits until who runs a capsule has told what it read first: anything, or where that was known before of one like it, something else.
    fn told(&self, capsule: &str, before: &Reads) -> Result<()> {
        let home = self.place.node(HOME).home();
        let began = Instant::now();
        let mut told = prefetch(home, capsule)?;
        while (told == *before || !told.contains_key("ram")) && began.elapsed() < READS {
            std::thread::sleep(Duration::from_millis(500));
            told = prefetch(home, capsule)?;
        }
        ensure!(
            told.contains_key("ram"),
            "nobody told what {capsule} reads first"
        );
        for (component, ranges) in &told {
            let bytes: u64 = ranges.iter().map(|(_, length)| length).sum();
            let count = ranges.len();
            eprintln!("of {component} {bytes} bytes are told in {count} ranges");
        }
        let news = if told == *before { "no news" } else { "told" };
        eprintln!("{news} after {:.1} s", guest::since(began));
        Ok(())
    }

    /// Bytes of a capsule's layers, as a node knows them.
    fn layers(&self, number: usize, capsule: &str) -> Result<Vec<found::Layer>> {
        let client = Client::connect(self.place.node(number).home())?;
        let list = client.call(Layers {
            capsule: CapsuleRef(capsule.to_owned()),
        })?;
        ensure!(!list.layers.is_empty(), "{capsule} has no layers");
        Ok(list.layers.iter().map(found::Layer::of).collect())
    }
}

/// What resuming a capsule reads first: by component, start and length of each range.
type Reads = BTreeMap<String, Vec<(u64, u64)>>;

/// What a node knows of that.
fn prefetch(home: &Path, capsule: &str) -> Result<Reads> {
    let described = Client::connect(home)?.call(Describe {
        capsule: CapsuleRef(capsule.to_owned()),
        wait: None,
    })?;
    let ranges = |first: ReadFirst| {
        let ranges = first.ranges.iter();
        let ranges = ranges.map(|range| (range.start, range.length));
        (first.component, ranges.collect())
    };
    Ok(described.prefetch.into_iter().map(ranges).collect())
}
