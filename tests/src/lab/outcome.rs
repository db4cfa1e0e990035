//! What a rollout came to, beside what was possible.

use serde::Serialize;

use super::bound;
use super::fleet::Return;
use super::network::Carried;
use super::pulling::Went;
use super::rollout::Lab;
use super::times::Times;
use crate::hostile::Part;

/// What the error of a full disk says.
const NO_ROOM: &str = "no room for more content";
/// What may come again that was here already, by what was to come: some arrives twice at the end of a blob.
const TWICE: f64 = 0.05;

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
    /// Where there is a cap: what came to the only puller in each ten seconds, in bytes a second, headers included.
    pub windows: Vec<f64>,
}

/// A node's figures.
#[derive(Debug, Clone, Serialize)]
pub struct NodeOutcome {
    /// Position of its site.
    pub site: usize,
    /// How it misbehaved; then nothing is known of it but what its interface carried.
    pub hostile: Option<Part>,
    /// Whether its disk had no room for all.
    pub is_short: bool,
    /// Whether its copy is what was published, once it was done.
    pub is_right: Option<bool>,
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
    /// Where it was killed: how it came back, each time.
    pub returns: Vec<Return>,
    /// Whom it banned, by number.
    pub banned: Vec<usize>,
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
    /// Content that came twice or was lost with a node that was killed, by all that came.
    pub duplicates: f64,
    /// Bytes on interfaces beyond those of plain TCP with the same content.
    pub beyond_tcp: f64,
    /// Largest resident set of any node.
    pub peak_bytes: u64,
    /// CPU time of all nodes.
    pub cpu_seconds: f64,
}

impl Outcome {
    /// What did not come as it had to.
    pub fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        for (number, node) in self.nodes.iter().enumerate() {
            if node.hostile.is_none() {
                let what = self.faults_of(number, node).into_iter();
                failures.extend(what.map(|what| format!("node {number}: {what}")));
            }
        }
        failures
    }

    fn faults_of(&self, number: usize, node: &NodeOutcome) -> Vec<String> {
        let mut faults = Vec::new();
        let said = node.went.failed.as_deref();
        if node.is_short {
            if !said.is_some_and(|said| said.contains(NO_ROOM)) {
                let said = said.unwrap_or("nothing");
                faults.push(format!("its disk is full, and it said {said}"));
            }
        } else if number > 0 && node.went.seconds.is_none() {
            faults.push(said.unwrap_or("it did not end").to_owned());
        }
        if node.is_right == Some(false) {
            faults.push("its copy is not what was published".to_owned());
        }
        for banned in &node.banned {
            if self.nodes[*banned].hostile.is_none() {
                faults.push(format!("it banned node {banned}, which is honest"));
            }
        }
        for back in &node.returns {
            let lacking = self.bytes.saturating_sub(back.committed_bytes);
            let most = lacking as f64 + TWICE * self.bytes as f64;
            if back.received_bytes as f64 > most {
                faults.push(format!(
                    "it came back with {} bytes of {}, and fetched {}",
                    back.committed_bytes, self.bytes, back.received_bytes
                ));
            }
        }
        faults
    }

    /// Who banned each of the hostile members, by the number of these.
    pub fn bans(&self) -> Vec<(usize, Vec<usize>)> {
        let nodes = || self.nodes.iter().enumerate();
        let hostile = nodes().filter(|(_, node)| node.hostile.is_some());
        let who = |banned: usize| {
            let who = nodes().filter(|(_, node)| node.banned.contains(&banned));
            who.map(|(number, _)| number).collect()
        };
        hostile.map(|(number, _)| (number, who(number))).collect()
    }

    /// The figures of all honest nodes that pull and have room.
    pub fn summary(&self, lab: &Lab) -> Summary {
        self.summary_of(lab, &lab.scenario.honest_pullers())
    }

    /// The figures, with times and bound of some nodes only.
    pub fn summary_of(&self, lab: &Lab, counts: &[usize]) -> Summary {
        let seconds = counts.iter().map(|node| self.nodes[*node].went.seconds);
        let seconds = seconds.map(|at| at.unwrap_or(f64::INFINITY)).collect();
        let sum = |figure: fn(&NodeOutcome) -> u64| {
            // What came to a full disk was neither kept nor twice there.
            let whole = self.nodes.iter();
            let whole = whole.filter(|node| node.hostile.is_none() && !node.is_short);
            whole.map(figure).sum::<u64>() as f64
        };
        let received = sum(|node| node.received_bytes);
        let kept = sum(|node| node.went.fetched_bytes + node.went.had_bytes);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A publisher, two honest nodes that are done, one whose disk is full, and one that serves wrong bytes.
    fn fine() -> Outcome {
        let node = |went: Went| NodeOutcome {
            site: 0,
            hostile: None,
            is_short: false,
            is_right: went.seconds.map(|_| true),
            went,
            sent_bytes: 0,
            received_bytes: 100_000,
            carried: Carried::default(),
            peak_bytes: 0,
            cpu_seconds: 0.0,
            returns: vec![],
            banned: vec![],
        };
        let done = Went {
            seconds: Some(1.0),
            ..Went::default()
        };
        let full = Went {
            failed: Some(format!("{NO_ROOM}: free space")),
            ..Went::default()
        };
        let mut nodes = vec![
            node(Went::default()),
            node(done.clone()),
            node(done),
            node(full),
            node(Went::default()),
        ];
        nodes[3].is_short = true;
        nodes[4].hostile = Some(Part::Corrupt);
        nodes[1].banned = vec![4];
        nodes[2].returns = vec![Return {
            committed_bytes: 60_000,
            lost_bytes: 10_000,
            received_bytes: 42_000,
        }];
        Outcome {
            bytes: 100_000,
            nodes,
            sites: vec![],
            machine_busy: 0.0,
            windows: vec![],
        }
    }

    #[test]
    fn what_must_not_be_is_a_failure() {
        assert_eq!(fine().failures(), Vec::<String>::new());
        assert_eq!(fine().bans(), [(4, vec![1])]);
        type Spoil = fn(&mut Outcome);
        let wrong: [(Spoil, &str); 6] = [
            (
                |run| run.nodes[1].went.seconds = None,
                "node 1: it did not end",
            ),
            (
                |run| run.nodes[1].is_right = Some(false),
                "node 1: its copy",
            ),
            (
                |run| run.nodes[1].banned = vec![2],
                "node 1: it banned node 2",
            ),
            (
                |run| run.nodes[3].went.failed = None,
                "node 3: its disk is full",
            ),
            (
                |run| run.nodes[3].went.failed = Some("something else".to_owned()),
                "it said something else",
            ),
            (
                |run| run.nodes[2].returns[0].received_bytes = 46_000,
                "node 2: it came back with 60000 bytes of 100000, and fetched 46000",
            ),
        ];
        for (change, told) in wrong {
            let mut run = fine();
            change(&mut run);
            let failures = run.failures();
            assert!(
                failures.len() == 1 && failures[0].contains(told),
                "{failures:?}"
            );
        }
    }
}
