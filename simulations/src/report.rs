//! How a run went, in figures.

use std::fmt::{self, Write};

use crate::network::{Nanos, nanos};
use crate::node::Node;
use crate::plan::Plan;

/// Samples of a curve over the least time; twice as many where a run takes longer, then every other one goes.
const SAMPLES: f64 = 100.0;
/// Most samples of a curve.
const MAX_SAMPLES: usize = 400;

/// A moment of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Seconds.
    pub at: f64,
    /// Honest pullers that are complete.
    pub complete: usize,
    /// Part of what honest pullers want that they hold.
    pub held: f64,
    /// Content sent by the publisher / size.
    pub copies: f64,
    /// Part of what was received that was there already.
    pub duplicates: f64,
    /// Bytes that came into sites from others.
    pub crossed: u64,
}

/// Samples at equal intervals.
#[derive(Clone, Debug)]
pub struct Curves {
    period: Nanos,
    samples: Vec<Sample>,
}

impl Curves {
    /// For a run that takes so many seconds at least.
    pub fn new(bound: f64) -> Self {
        Self {
            period: nanos(bound / SAMPLES).max(1),
            samples: Vec::new(),
        }
    }

    /// Time until the next sample.
    pub fn period(&self) -> Nanos {
        self.period
    }

    /// Takes a sample.
    pub fn sample(&mut self, now: Nanos, nodes: &[Node], crossed: &[(u64, u64)], size: u64) {
        let total = Total::of(nodes);
        self.samples.push(Sample {
            at: now as f64 / 1e9,
            complete: total.complete,
            held: (total.received - total.duplicate) as f64
                / (size * total.pullers.max(1) as u64) as f64,
            copies: nodes[0].served as f64 / size as f64,
            duplicates: total.duplicates(),
            crossed: crossed.iter().map(|(_, into)| into).sum(),
        });
        if self.samples.len() >= MAX_SAMPLES {
            let mut index = 0;
            self.samples.retain(|_| {
                index += 1;
                index % 2 == 0
            });
            self.period *= 2;
        }
    }
}

/// Sums over honest pullers.
#[derive(Default)]
struct Total {
    pullers: usize,
    complete: usize,
    received: u64,
    duplicate: u64,
}

impl Total {
    fn of(nodes: &[Node]) -> Self {
        let mut total = Self::default();
        for node in nodes.iter().filter(|node| node.member.pulls()) {
            total.pullers += 1;
            total.complete += usize::from(node.finished.is_some());
            total.received += node.received;
            total.duplicate += node.duplicate;
        }
        total
    }

    fn duplicates(&self) -> f64 {
        self.duplicate as f64 / self.received.max(1) as f64
    }
}

/// The honest pullers of one group.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupReport {
    /// Its name.
    pub name: String,
    /// How many there are.
    pub count: usize,
    /// Seconds until each that became complete was so, sorted.
    pub finished: Vec<f64>,
}

/// How a run went. Follows from plan and seed alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Name of the plan.
    pub plan: String,
    /// Seed of the run.
    pub seed: u64,
    /// Nodes, of all kinds.
    pub nodes: usize,
    /// Pieces of the blob.
    pub pieces: u32,
    /// Seconds until each honest puller was complete, sorted.
    pub finished: Vec<f64>,
    /// Honest pullers that did not complete.
    pub unfinished: usize,
    /// By group.
    pub groups: Vec<GroupReport>,
    /// The least time, in seconds.
    pub bound: f64,
    /// Content bytes sent by the publisher / size.
    pub publisher_copies: f64,
    /// Verified bytes received that were there already / all received.
    pub duplicates: f64,
    /// Bytes of requests, haves and the like / content bytes moved.
    pub control: f64,
    /// Bans, by (by whom, whom).
    pub bans: Vec<(usize, usize)>,
    /// Seconds until the publisher had sent one full copy.
    pub copy_out: f64,
    /// Requests of honest pullers.
    pub requests: u64,
    /// Bytes out of and into each site, by name.
    pub sites: Vec<(String, u64, u64)>,
    /// Events carried out.
    pub events: u64,
    /// Curves over time.
    pub samples: Vec<Sample>,
}

impl Report {
    pub(crate) fn new(
        plan: &Plan,
        nodes: &[Node],
        copy_out: f64,
        crossed: &[(u64, u64)],
        events: u64,
        curves: Curves,
    ) -> Self {
        let pullers = || nodes.iter().filter(|node| node.member.pulls());
        let total = Total::of(nodes);
        let group = |(at, name): (usize, &String)| {
            let members = || pullers().filter(|node| node.member.group == at);
            GroupReport {
                name: name.clone(),
                count: members().count(),
                finished: times(members()),
            }
        };
        let control: u64 = nodes.iter().map(|node| node.control).sum();
        let bans = |node: &Node| {
            let by = node.me;
            node.bans.clone().into_iter().map(move |whom| (by, whom))
        };
        let sites = plan.sites.iter().zip(crossed);
        Self {
            plan: plan.name.clone(),
            seed: plan.seed,
            nodes: nodes.len(),
            pieces: nodes[0].geometry.pieces(),
            finished: times(pullers()),
            unfinished: total.pullers - total.complete,
            groups: plan
                .groups
                .iter()
                .enumerate()
                .map(group)
                .filter(|group| group.count > 0)
                .collect(),
            bound: plan.bound(),
            publisher_copies: nodes[0].served as f64 / plan.size as f64,
            duplicates: total.duplicates(),
            control: control as f64 / total.received.max(1) as f64,
            bans: nodes.iter().flat_map(bans).collect(),
            copy_out,
            requests: pullers().map(|node| node.requests).sum(),
            sites: sites
                .map(|(site, &(out, into))| (site.name.clone(), out, into))
                .collect(),
            events,
            samples: curves.samples,
        }
    }

    /// Seconds until the last honest puller was complete; infinite if one is not.
    pub fn last(&self) -> f64 {
        match self.finished.last() {
            Some(&last) if self.unfinished == 0 => last,
            _ => f64::INFINITY,
        }
    }

    /// What part of the best possible speed the last node saw.
    pub fn efficiency(&self) -> f64 {
        self.bound / self.last()
    }

    /// Seconds until this part of the honest pullers was complete.
    pub fn percentile(&self, part: f64) -> f64 {
        let all = self.finished.len() + self.unfinished;
        let rank = ((part * all as f64).ceil() as usize).max(1);
        self.finished
            .get(rank - 1)
            .copied()
            .unwrap_or(f64::INFINITY)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {}: {} done, {} not; first {:.3} s, p50 {:.3} s, last {:.3} s = {:.1} % of the bound; publisher {:.3} copies; duplicates {:.2} %; control {:.2} %; copy out {:.2} s; {} requests; {} bans; {} events",
            self.seed,
            self.finished.len(),
            self.unfinished,
            self.finished.first().copied().unwrap_or_default(),
            self.percentile(0.5),
            self.last(),
            100.0 * self.efficiency(),
            self.publisher_copies,
            100.0 * self.duplicates,
            100.0 * self.control,
            self.copy_out,
            self.requests,
            self.bans.len(),
            self.events,
        )
    }
}

fn times<'a>(nodes: impl Iterator<Item = &'a Node>) -> Vec<f64> {
    let mut finished: Vec<_> = nodes
        .filter_map(|node| Some(node.finished?.since_start().as_secs_f64()))
        .collect();
    finished.sort_unstable_by(f64::total_cmp);
    finished
}

/// What a run cost the machine that simulated it.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Seconds.
    pub wall: f64,
    /// Largest memory of the process so far, in bytes, where the system tells.
    pub memory: Option<u64>,
}

/// The figures of all runs of a plan, as Markdown.
pub fn markdown(name: &str, runs: &[(Report, Cost)]) -> String {
    let mut text = format!("# Simulation {name}\n\n");
    text += "| run | seed | nodes | pieces | bound s | last s | of bound | p50 s | p99/p50 | publisher copies | duplicates | control | unfinished | bans | events | wall s | peak MiB |\n";
    text += &format!("|---|{}\n", "---:|".repeat(16));
    for (r, cost) in runs {
        let memory = cost
            .memory
            .map_or("-".into(), |bytes| (bytes >> 20).to_string());
        let _infallible = writeln!(
            text,
            "| {} | {} | {} | {} | {:.2} | {:.2} | {:.1} % | {:.2} | {:.3} | {:.3} | {:.2} % | {:.2} % | {} | {} | {} | {:.1} | {memory} |",
            r.plan,
            r.seed,
            r.nodes,
            r.pieces,
            r.bound,
            r.last(),
            100.0 * r.efficiency(),
            r.percentile(0.5),
            r.percentile(0.99) / r.percentile(0.5),
            r.publisher_copies,
            100.0 * r.duplicates,
            100.0 * r.control,
            r.unfinished,
            r.bans.len(),
            r.events,
            cost.wall,
        );
    }
    text += "\n| run | seed | group | nodes | first s | p50 s | last s |\n|---|---:|---|---:|---:|---:|---:|\n";
    for (r, _) in runs {
        for group in &r.groups {
            let at = |index: usize| group.finished.get(index).copied().unwrap_or(f64::INFINITY);
            let _infallible = writeln!(
                text,
                "| {} | {} | {} | {} | {:.2} | {:.2} | {:.2} |",
                r.plan,
                r.seed,
                group.name,
                group.count,
                at(0),
                at(group.count.div_ceil(2) - 1),
                at(group.count - 1),
            );
        }
    }
    if runs.iter().any(|(r, _)| !r.sites.is_empty()) {
        text += "\n| run | seed | site | MiB out | MiB in |\n|---|---:|---|---:|---:|\n";
    }
    for (r, _) in runs {
        for (site, out, into) in &r.sites {
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            let _infallible = writeln!(
                text,
                "| {} | {} | {site} | {:.1} | {:.1} |",
                r.plan,
                r.seed,
                mib(*out),
                mib(*into)
            );
        }
    }
    text
}
