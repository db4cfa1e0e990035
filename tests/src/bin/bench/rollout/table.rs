//! What the legs of a rollout found, for people.

use capsule_tests::lab::Scenario;

use super::found::Found;
use super::legs::{Legs, Tool};
use super::targets;
use crate::report::{Column, Table};
use crate::series::Series;

const COLUMNS: [Column; 14] = [
    Column::plain("last s", "last_seconds", 2),
    Column::plain("x ours", "last_ratio", 2),
    Column::plain("p50 s", "p50_seconds", 2),
    Column::plain("x ours", "p50_ratio", 2),
    Column::plain("p99/p50", "p99_by_p50", 3),
    Column::plain("bound s", "bound_seconds", 2),
    Column::percent("% of bound", "part_of_bound", 1),
    Column::plain("copies", "publisher_copies", 2),
    Column::percent("twice %", "duplicates", 2),
    Column::percent("beyond TCP %", "beyond_tcp", 2),
    Column::mib("peak MiB", "peak_bytes"),
    Column::plain("CPU s", "cpu_seconds", 1),
    Column::percent("busy %", "machine_busy", 0),
    Column::plain("runs", "runs", 0),
];
/// Where there are sites.
const SITES: [Column; 3] = [
    Column::percent("% of set rate", "part_of_nominal_bound", 1),
    Column::plain("into a site", "content_copies_into_site", 3),
    Column::plain("at interface", "interface_copies_into_site", 3),
];
/// From which part of its CPU time on the machine may be what holds a rollout up.
const BUSY: f64 = 0.9;

/// Ours with something of a scenario left out, where it has that.
pub struct Without {
    /// Its slower nodes.
    pub slower: Option<Series<Found>>,
    /// Its caps, which should cost nothing.
    pub caps: Option<Series<Found>>,
}

/// All legs of a scenario, and ours with some of it left out.
pub fn scenario(name: &str, scenario: &Scenario, legs: &Legs, without: &Without) -> Table {
    let sites = scenario.sites.len() > 1;
    let columns = if sites {
        [&COLUMNS[..], &SITES].concat()
    } else {
        COLUMNS.to_vec()
    };
    let mut table = Table::new(&scenario.title, &columns);
    rows(&mut table, legs, sites);
    let mut targets = targets::of(name, legs);
    if let Some(without) = &without.slower {
        row(&mut table, without, None, sites);
        targets.extend(targets::beside_slower(legs, without));
    }
    if let Some(without) = &without.caps {
        row(&mut table, without, None, sites);
        targets.extend(targets::beside_cap(legs, without));
    }
    targets.into_iter().for_each(|target| table.target(target));
    notes(&mut table, legs.iter().map(|(_, series)| series));
    table.note(options(legs));
    if scenario.cap().is_some() {
        table.note(
            "windows: what the link carried in each ten seconds but the last, headers included",
        );
    }
    if sites {
        table.note(
            "into a site: into the one into which most came, in copies of what a node receives, by its link's packets without and with their headers",
        );
    }
    table
}

/// All numbers of nodes.
pub fn sweep(title: &str, numbers: &[Legs]) -> Table {
    let mut table = Table::new(title, &COLUMNS);
    for legs in numbers {
        rows(&mut table, legs, false);
    }
    let targets = targets::of_sweep(numbers);
    targets.into_iter().for_each(|target| table.target(target));
    let series = numbers.iter().flatten();
    notes(&mut table, series.map(|(_, series)| series));
    table
}

fn rows(table: &mut Table, legs: &Legs, sites: bool) {
    let ours = legs.iter().find(|(tool, _)| *tool == Tool::Capsule);
    let ours = ours.map(|(_, series)| series);
    for (_, leg) in legs {
        row(table, leg, ours, sites);
    }
}

fn row(table: &mut Table, leg: &Series<Found>, ours: Option<&Series<Found>>, sites: bool) {
    let ratio = |figure: fn(&Found) -> f64| Some(leg.median(figure)? / ours?.median(figure)?);
    let last = |found: &Found| found.times.last;
    let p50 = |found: &Found| found.times.p50;
    let told = leg.runs.iter().any(|found| found.duplicates.is_some());
    let duplicates = |found: &Found| found.duplicates.unwrap_or(f64::NAN);
    let mut figures = vec![
        leg.median(last),
        ratio(last),
        leg.median(p50),
        ratio(p50),
        leg.median(Found::spread),
        leg.median(|found| found.bound_seconds),
        leg.median(Found::part_of_bound),
        leg.median(|found| found.copies),
        leg.median(duplicates).filter(|_| told),
        leg.median(|found| found.beyond_tcp),
        leg.most(|found| found.peak_bytes as f64),
        leg.median(|found| found.cpu_seconds),
        leg.median(|found| found.machine_busy),
        Some(leg.runs.len() as f64).filter(|runs| *runs > 0.0),
    ];
    if sites {
        figures.extend([
            leg.median(Found::part_of_nominal),
            leg.median(Found::content_into_sites),
            leg.median(Found::interface_into_sites),
        ]);
    }
    table.row(leg, figures);
}

fn notes<'a>(table: &mut Table, legs: impl Iterator<Item = &'a Series<Found>>) {
    for leg in legs {
        let busy = leg.median(|found| found.machine_busy);
        if let Some(busy) = busy.filter(|busy| *busy > BUSY) {
            table.note(format!(
                "{}: the machine's CPUs were busy for {:.0} % of the time: they, and not the links, may be what held it up",
                leg.name,
                100.0 * busy
            ));
        }
    }
    table.note(
        "ours: from the moment that all nodes hold the name record, until a pull's packs and index are durable and checked; others: from the \
         start of their programs, until these have all of it; in memory, so that no disk is measured",
    );
    table.note(
        "bound: the least time by what plain TCP carried both ways just before, without a term for the pipeline; medians; of memory the largest of all \
         runs; CPU of all nodes, ours with what they spent before; busy: of the machine's CPUs, by whomever",
    );
    table.note(
        "copies: content that the publisher sent, of other tools without headers; beyond TCP: bytes that came in on interfaces, beyond those of \
         plain TCP with the same content (of other tools what came twice counts too)",
    );
}

/// What other tools were told, as whoever knows them would.
fn options(legs: &Legs) -> String {
    let of = |tool| match tool {
        Tool::Capsule => "capsule: as it is",
        Tool::Aria2 => {
            "aria2: no DHT, local discovery, peer exchange, no limit of peers, seeds until all are done"
        }
        Tool::Transmission => {
            "transmission: no DHT, no uTP, local discovery, peer exchange, no limits, seeds until all are done"
        }
        Tool::Udpcast => {
            "udpcast: full duplex, begins when all are there, at most 95 % of the slowest link"
        }
        Tool::Rsync => "rsync: a daemon, whole files, all at once",
    };
    let all: Vec<&str> = legs.iter().map(|(tool, _)| of(*tool)).collect();
    all.join("; ")
}
