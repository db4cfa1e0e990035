//! The figures that were set as targets, each beside what is to be reached.

use capsule_chunker::layer::encode::Effort;

use super::ours::Way;
use super::peers::Peer;
use super::{Found, Legs};
use crate::process::Cost;
use crate::report::{Column, Table};
use crate::series::Series;

const COLUMNS: [Column; 3] = [
    Column::plain("found", "found", 3),
    Column::plain("to reach", "to_reach", 2),
    Column::plain("reached", "reached", 0),
];

/// Each figure as it becomes known.
#[derive(Debug)]
pub struct Figures {
    full: bool,
    rows: Vec<(String, Option<f64>, Bound)>,
    /// Bytes of one layer from the oldest image to the newest.
    pub direct: Option<f64>,
}

#[derive(Debug, Clone, Copy)]
enum Bound {
    AtMost(f64),
    LessThan(f64),
    AtLeast(f64),
}

impl Figures {
    /// None yet.
    pub fn new(full: bool) -> Self {
        Self {
            full,
            rows: vec![],
            direct: None,
        }
    }

    fn at_most(&mut self, name: impl Into<String>, found: Option<f64>, bound: f64) {
        self.rows.push((name.into(), found, Bound::AtMost(bound)));
    }

    /// An upgrade's.
    pub fn upgrade(&mut self, trimmed: bool, deb_bytes: u64, legs: &Legs) {
        let (default, max) = (legs.ours(Effort::Default), legs.ours(Effort::Max));
        let state = if trimmed { "trimmed" } else { "untrimmed" };
        if trimmed {
            let targets = if self.full {
                (0.62, 0.53)
            } else {
                (0.76, 0.64)
            };
            self.at_most(
                "upgrade: all bytes fetched / .deb bytes, default",
                ratio(bytes(default), Some(deb_bytes as f64)),
                targets.0,
            );
            self.at_most(
                "upgrade: all bytes fetched / .deb bytes, max",
                ratio(bytes(max), Some(deb_bytes as f64)),
                targets.1,
            );
            self.direct = bytes(default);
            self.speed(default);
        }
        for (peer, series) in &legs.peers {
            let found = ratio(bytes(default), bytes(series.runs.first()));
            let bound = if peer.must_be_far_behind() {
                Bound::AtMost(0.55)
            } else {
                Bound::LessThan(1.0)
            };
            self.rows.push((
                format!("upgrade, {state}, default / {}", peer.name()),
                found,
                bound,
            ));
        }
    }

    /// Encoding and applying, in MB a second and core.
    fn speed(&mut self, found: Option<&Found>) {
        let rate = |bytes: Option<u64>, cost: Option<Cost>| {
            Some(bytes? as f64 / 1e6 / cost?.used.cpu_seconds)
        };
        let ours = found.and_then(|found| found.ours.as_ref());
        let encode = rate(
            ours.map(|ours| ours.changed_bytes),
            found.and_then(|found| found.make),
        );
        self.rows.push((
            "encode at default: MB of changed content / CPU s, search included".into(),
            encode,
            Bound::AtLeast(40.0),
        ));
        let apply = rate(
            ours.map(|ours| ours.written_bytes),
            ours.and_then(|ours| ours.export),
        );
        self.rows.push((
            "apply: MB of written content / CPU s of an export".into(),
            apply,
            Bound::AtLeast(300.0),
        ));
    }

    /// An installation's.
    pub fn install(&mut self, deb_bytes: u64, legs: &Legs) {
        let max = bytes(legs.ours(Effort::Max));
        self.at_most(
            "install of new packages / .deb bytes, max",
            ratio(max, Some(deb_bytes as f64)),
            1.15,
        );
    }

    /// A directory's.
    pub fn directory(&mut self, legs: &Legs) {
        let ostree = legs.peers.iter().find(|(peer, _)| *peer == Peer::Ostree);
        let ostree = ostree.and_then(|(_, series)| bytes(series.runs.first()));
        self.at_most(
            "directory /usr, max / OSTree static delta with bsdiff",
            ratio(bytes(legs.ours(Effort::Max)), ostree),
            1.05,
        );
    }

    /// One layer over two versions, where the upgrade was not measured.
    pub fn direct(&mut self, direct: &Series<Found>) {
        self.direct = bytes(direct.runs.first());
    }

    /// Two layers against one.
    pub fn chain(&mut self, chain: &Series<Found>) {
        self.at_most(
            "two versions behind: chain / direct layer",
            ratio(bytes(chain.runs.first()), self.direct),
            1.2,
        );
    }

    /// Nothing changed.
    pub fn republish(&mut self, again: &Series<Found>, hashing: Option<f64>) {
        let found = again.runs.first();
        let fetched = found
            .and_then(|found| found.ours.as_ref())
            .map(|ours| ours.fetched_bytes as f64);
        self.at_most(
            "republish of an unchanged image: bytes fetched",
            fetched,
            2048.0,
        );
        let seconds = found
            .and_then(|found| found.make)
            .map(|make| make.wall_seconds);
        self.at_most(
            "republish: time / reading + hashing it once",
            ratio(seconds, hashing),
            1.1,
        );
    }

    /// Another image beside none.
    pub fn hashing(&mut self, hashed: Option<f64>, whole: Option<f64>) {
        self.at_most(
            "hashing: another image of nearly the same packages / a pull of everything",
            ratio(hashed, whole),
            0.6,
        );
    }

    /// Little changed in much.
    pub fn scattered(&mut self, series: &Series<Found>) {
        let metadata = series
            .runs
            .first()
            .and_then(|found| found.ours.as_ref())
            .map(|ours| ours.metadata_bytes as f64);
        self.at_most(
            "1,000 scattered edits in 64 GiB: metadata bytes fetched",
            metadata,
            f64::from(32 << 10),
        );
    }

    /// All of them.
    pub fn table(&self) -> Table {
        let mut table = Table::new("figures beside what is to be reached", &COLUMNS);
        for (name, found, bound) in &self.rows {
            let (sign, target) = match bound {
                Bound::AtMost(target) => ("at most", target),
                Bound::LessThan(target) => ("less than", target),
                Bound::AtLeast(target) => ("at least", target),
            };
            let reached = found.map(|found| f64::from(u8::from(bound.holds(found))));
            table.part(
                format!("{name} ({sign})"),
                vec![*found, Some(*target), reached],
            );
        }
        table.note("each leg is measured once, whatever --runs says: bytes do not vary");
        table.note("reached: 1 or 0; a dash where a leg that it needs failed or was left out");
        table
    }
}

impl Bound {
    fn holds(self, found: f64) -> bool {
        match self {
            Self::AtMost(bound) => found <= bound,
            Self::LessThan(bound) => found < bound,
            Self::AtLeast(bound) => found >= bound,
        }
    }
}

impl Legs {
    fn ours(&self, wanted: Effort) -> Option<&Found> {
        let leg = self.ours.iter().find(|(way, _)| *way == Way::of(wanted));
        leg.and_then(|(_, series)| series.runs.first())
    }
}

fn bytes(found: Option<&Found>) -> Option<f64> {
    found.map(|found| found.bytes as f64)
}

fn ratio(one: Option<f64>, other: Option<f64>) -> Option<f64> {
    Some(one? / other?)
}
