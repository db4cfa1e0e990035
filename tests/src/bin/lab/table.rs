//! What the lab prints.

use capsule_tests::lab::outcome::{Outcome, Summary};
use capsule_tests::lab::{Lab, goodput::Goodput};

const MBIT: f64 = 1e6 / 8.0;
const MIB: f64 = (1 << 20) as f64;

/// What plain TCP carries.
pub fn network(lab: &Lab) {
    let range = |links: &[Goodput], way: fn(&Goodput) -> f64| {
        let rates = links.iter().map(way);
        let (least, most) = rates.fold((f64::INFINITY, 0.0), |(least, most), rate| {
            (rate.min(least), rate.max(most))
        });
        format!("{:.2} to {:.2}", least / MBIT, most / MBIT)
    };
    for (what, links) in [
        ("nodes", &lab.measured.hosts),
        ("sites", &lab.measured.sites),
    ] {
        if !links.is_empty() {
            println!(
                "plain TCP, all links busy both ways, {what}: up {} Mbit/s, down {} Mbit/s",
                range(links, |link| link.up),
                range(links, |link| link.down)
            );
        }
    }
}

/// One run.
pub fn run(lab: &Lab, run: u32, outcome: &Outcome) {
    println!("run {}: {}", run + 1, line(&outcome.summary(lab)));
    for (site, carried) in lab.scenario.sites.iter().zip(&outcome.sites) {
        if site.rate().is_some() {
            println!(
                "  link of {}: {:.3} copies in, {:.3} out",
                site.label,
                carried.down as f64 / outcome.bytes as f64,
                carried.up as f64 / outcome.bytes as f64
            );
        }
    }
    for failure in outcome.failures() {
        println!("  FAILED: {failure}");
    }
}

/// All runs.
pub fn medians(lab: &Lab, outcomes: &[Outcome]) {
    let mut all: Vec<Summary> = outcomes
        .iter()
        .map(|outcome| outcome.summary(lab))
        .collect();
    all.sort_by(|a, b| a.efficiency().total_cmp(&b.efficiency()));
    println!("median of {}: {}", all.len(), line(&all[all.len() / 2]));
}

fn line(summary: &Summary) -> String {
    format!(
        "p50 {:.2} s, last {:.2} s = {:.1} % of the bound {:.2} s; p99/p50 {:.3}; publisher {:.3} copies; duplicates {:.2} %; {:.1} % beyond TCP; {:.0} MiB at most; {:.1} CPU s",
        summary.times.p50,
        summary.times.last,
        100.0 * summary.efficiency(),
        summary.bound,
        summary.times.p99 / summary.times.p50,
        summary.copies,
        100.0 * summary.duplicates,
        100.0 * summary.beyond_tcp,
        summary.peak_bytes as f64 / MIB,
        summary.cpu_seconds
    )
}
