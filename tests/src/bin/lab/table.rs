//! What the lab prints.

use capsule_tests::lab::fleet::Return;
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
    groups(lab, outcome);
    adversity(outcome);
    for failure in outcome.failures() {
        println!("  FAILED: {failure}");
    }
}

/// The nodes of each group that pull, where there are several groups: whether the slow hold up the fast.
fn groups(lab: &Lab, outcome: &Outcome) {
    let honest = lab.scenario.honest_pullers();
    let mut first = 0;
    for (site, group) in (lab.scenario.sites.iter())
        .flat_map(|site| site.nodes.iter().map(move |group| (site, group)))
    {
        let numbers = first..first + group.count;
        first = numbers.end;
        let counts: Vec<usize> = numbers.filter(|number| honest.contains(number)).collect();
        if !counts.is_empty() && counts.len() < honest.len() {
            let summary = outcome.summary_of(lab, &counts);
            println!(
                "  {} of {} at {} Mbit/s: p50 {:.2} s, last {:.2} s",
                counts.len(),
                site.label,
                group.rate().down,
                summary.times.p50,
                summary.times.last
            );
        }
    }
}

/// What killed and hostile nodes came to.
fn adversity(outcome: &Outcome) {
    let returns: Vec<_> = (outcome.nodes.iter())
        .flat_map(|node| &node.returns)
        .collect();
    if !returns.is_empty() {
        let most = |figure: fn(&Return) -> u64| {
            let most = returns.iter().map(|back| figure(back)).max();
            most.unwrap_or(0) as f64 / MIB
        };
        println!(
            "  {} returns: committed up to {:.1} MiB, lost up to {:.1} MiB, fetched up to {:.1} MiB more",
            returns.len(),
            most(|back| back.committed_bytes),
            most(|back| back.lost_bytes),
            most(|back| back.received_bytes)
        );
    }
    let real = outcome.nodes.iter().filter(|node| node.hostile.is_none());
    let real = real.count();
    for (number, by) in outcome.bans() {
        let node = &outcome.nodes[number];
        if let Some(part) = node.hostile {
            println!(
                "  node {number} ({part:?}) sent {:.2} copies, banned by {} of {real}",
                node.carried.up as f64 / outcome.bytes as f64,
                by.len()
            );
        }
    }
    for (number, node) in outcome.nodes.iter().enumerate() {
        if let (true, Some(said)) = (node.is_short, &node.went.failed) {
            println!("  node {number} has no room: {said}");
        }
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
