//! What a rollout came to, beside what was possible.

use serde::Serialize;

use super::bound;
use super::network::Carried;
use super::pulling::Went;
use super::rollout::Lab;
use super::times::Times;

/// A rollout's figures.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// What each node has to fetch: index and pack.
    pub bytes: u64,
    /// By number.
    pub nodes: Vec<NodeOutcome>,
    /// What the sites' links carried.
    pub sites: Vec<Carried>,
    /// What part of the machine's CPU time all that runs on it used meanwhile.
    pub machine_busy: f64,
}

/// A node's figures.
#[derive(Debug, Clone, Serialize)]
pub struct NodeOutcome {
    /// Position of its site.
    pub site: usize,
    /// Its pull; of the publisher nothing.
    #[serde(flatten)]
    pub went: Went,
    /// Content that it sent.
    pub sent_bytes: u64,
    /// Content that it received and checked, some perhaps twice.
    pub received_bytes: u64,
    /// What its interface carried.
    pub carried: Carried,
    /// Largest resident set.
    pub peak_bytes: u64,
    /// CPU time.
    pub cpu_seconds: f64,
}

/// What is compared with what was to be reached.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Summary {
    /// When the nodes were done.
    #[serde(flatten)]
    pub times: Times,
    /// The least possible.
    pub bound: f64,
    /// Content that the publisher sent, by what one node fetches.
    pub copies: f64,
    /// Content that came twice, by all that came.
    pub duplicates: f64,
    /// Bytes on interfaces beyond those of plain TCP with the same content.
    pub beyond_tcp: f64,
    /// Largest resident set of any node.
    pub peak_bytes: u64,
    /// CPU time of all nodes.
    pub cpu_seconds: f64,
}

impl Outcome {
    /// Those that did not end with all of it, and why.
    pub fn failures(&self) -> Vec<String> {
        let pulls = self.nodes.iter().enumerate().skip(1);
        pulls
            .filter(|(_, node)| node.went.seconds.is_none())
            .map(|(number, node)| {
                let why = node.went.failed.as_deref().unwrap_or("it did not end");
                format!("node {number}: {why}")
            })
            .collect()
    }

    /// The figures of all nodes that pull.
    pub fn summary(&self, lab: &Lab) -> Summary {
        let all: Vec<usize> = (1..self.nodes.len()).collect();
        self.summary_of(lab, &all)
    }

    /// The figures, with times and bound of some nodes only.
    pub fn summary_of(&self, lab: &Lab, counts: &[usize]) -> Summary {
        let seconds = counts.iter().map(|node| self.nodes[*node].went.seconds);
        let seconds = seconds.map(|at| at.unwrap_or(f64::INFINITY)).collect();
        let sum =
            |figure: fn(&NodeOutcome) -> u64| self.nodes.iter().map(figure).sum::<u64>() as f64;
        let received = sum(|node| node.received_bytes);
        let kept = sum(|node| node.went.fetched_bytes);
        let on_links = sum(|node| node.carried.down);
        Summary {
            times: Times::of(seconds),
            bound: bound::of(self.bytes, &lab.measured, self.nodes[0].site, counts),
            copies: self.nodes[0].sent_bytes as f64 / self.bytes as f64,
            duplicates: (received - kept).max(0.0) / received,
            beyond_tcp: on_links / (received * lab.measured.overhead) - 1.0,
            peak_bytes: self
                .nodes
                .iter()
                .map(|node| node.peak_bytes)
                .max()
                .unwrap_or(0),
            cpu_seconds: self.nodes.iter().map(|node| node.cpu_seconds).sum(),
        }
    }
}

impl Summary {
    /// What part of the best possible speed the last node saw.
    pub fn efficiency(&self) -> f64 {
        self.bound / self.times.last
    }
}
