//! The real nodes of a lab, and what each has done over all its lives.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use capsule_node::control::{Client, Hashes, NodeStatus, Status};
use capsule_proto::RootHash;
use serde::Serialize;

use super::rollout::Lab;
use crate::Node;
use crate::small_disk::SmallDisk;

/// Nodes that are started at a time.
const STARTING: usize = 8;
/// Connections that a node is waited for to have before it all begins, if there are so many others.
const PEERS: usize = 6;
/// How long the fleet may take to come together, and to hear of what was published.
const COMING_TOGETHER: Duration = Duration::from_secs(120);
/// Where nodes listen.
pub const PORT: u16 = 4277;

/// A lab's nodes.
pub struct Fleet<'a> {
    lab: &'a Lab,
    /// By number; at the places of hostile members are homes that are never made.
    pub nodes: Vec<Node>,
    /// What members come in with.
    pub token: String,
    lives: Vec<Life>,
    disks: Vec<SmallDisk>,
}

/// What a node did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    /// Content that it sent.
    pub sent: u64,
    /// Content that it received and checked, some perhaps twice.
    pub received: u64,
    /// Largest resident set.
    pub peak_bytes: u64,
    /// CPU time.
    pub cpu_seconds: f64,
}

/// A node that was killed came back.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Return {
    /// Bytes of the blobs that it had committed before.
    pub committed_bytes: u64,
    /// Bytes that it had received and lost.
    pub lost_bytes: u64,
    /// Bytes that it received from then on, until it was killed again or all was over.
    pub received_bytes: u64,
}

/// What is left of a node's earlier lives.
#[derive(Debug, Clone, Default)]
struct Life {
    past: Figures,
    returns: Vec<Return>,
}

impl<'a> Fleet<'a> {
    /// Starts all nodes, with homes in a directory, and waits until they have found each other.
    pub fn start(lab: &'a Lab, dir: &Path) -> Result<Self> {
        let node = |number: usize| {
            let namespace = lab.network.hosts[number].namespace.clone();
            Node::new(dir.join(format!("node{number}"))).in_namespace(namespace)
        };
        let groups = lab.scenario.groups();
        let mut fleet = Self {
            lab,
            nodes: (0..groups.len()).map(node).collect(),
            token: String::new(),
            lives: vec![Life::default(); groups.len()],
            disks: Vec::new(),
        };
        fleet.nodes[0].init();
        fleet.start_all(&[0], false)?;
        let first = &fleet.nodes[0];
        fleet.token = first.ok(&["fleet", "invite", "--addr", first.address()]);
        for (number, group) in groups.iter().enumerate() {
            if let Some(mib) = group.disk_mib {
                fleet
                    .disks
                    .push(SmallDisk::mount(fleet.nodes[number].home(), mib));
            }
        }
        let others = lab.real();
        fleet.start_all(&others[1..], true)?;
        for (node, group) in fleet.nodes.iter().zip(&groups) {
            let caps = [("--upload", group.cap_up), ("--download", group.cap_down)];
            for (option, cap) in caps {
                if let Some(mbit) = cap {
                    node.ok(&["rates", option, &format!("{mbit} Mbit/s")]);
                }
            }
        }
        // In their sites, that is: with other sites nodes have few connections.
        let site = |number: usize| lab.network.hosts[number].site;
        let enough = |number: usize| {
            let near = others.iter().filter(|other| site(**other) == site(number));
            (near.count() - 1).clamp(1, PEERS)
        };
        until("all nodes have found others", || {
            let mut found = fleet.statuses()?.into_iter();
            Ok(found.all(|(number, status)| status.peers >= enough(number)))
        })?;
        Ok(fleet)
    }

    /// Starts nodes, a few at a time; new ones join first.
    fn start_all(&mut self, numbers: &[usize], new: bool) -> Result<()> {
        let (lab, token) = (self.lab, self.token.trim());
        let nodes = self.nodes.iter_mut().enumerate();
        let mut starting: Vec<_> = nodes
            .filter(|(number, _)| numbers.contains(number))
            .collect();
        for batch in starting.chunks_mut(STARTING) {
            thread::scope(|scope| {
                let threads: Vec<_> = (batch.iter_mut())
                    .map(|(number, node)| {
                        scope.spawn(move || {
                            if new {
                                node.ok(&["join", token]);
                            }
                            start(lab, node, *number)
                        })
                    })
                    .collect();
                threads.into_iter().try_for_each(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
            })?;
        }
        Ok(())
    }

    /// Ends nodes without notice; what they did is noted.
    pub fn kill(&mut self, numbers: &[usize]) -> Result<()> {
        for number in numbers.iter().copied() {
            if !self.nodes[number].is_started() {
                continue;
            }
            let figures = self.figures(number)?;
            let life = &mut self.lives[number];
            if let Some(back) = life.returns.last_mut() {
                back.received_bytes = figures.received - life.past.received;
            }
            life.past = figures;
            self.nodes[number].kill();
        }
        Ok(())
    }

    /// Starts killed nodes again; what they still had is noted.
    pub fn restart(&mut self, numbers: &[usize]) -> Result<()> {
        let down = numbers.iter().copied();
        let down: Vec<usize> = down
            .filter(|number| !self.nodes[*number].is_started())
            .collect();
        self.start_all(&down, false)?;
        for number in down {
            // The pull may go on already: what came since is told after what is here, so that none of it counts as kept.
            let here = self.here(number)?;
            let since = self.status(number)?.received_bytes;
            let committed_bytes = here.saturating_sub(since);
            let life = &mut self.lives[number];
            life.returns.push(Return {
                committed_bytes,
                lost_bytes: life.past.received.saturating_sub(committed_bytes),
                received_bytes: 0,
            });
        }
        Ok(())
    }

    /// Returns of a node from its kills.
    pub fn returns(&self, number: usize) -> Result<Vec<Return>> {
        let mut returns = self.lives[number].returns.clone();
        if let Some(last) = returns.last_mut()
            && self.nodes[number].is_started()
        {
            last.received_bytes = self.status(number)?.received_bytes;
        }
        Ok(returns)
    }

    /// What a node did in all its lives.
    pub fn figures(&self, number: usize) -> Result<Figures> {
        let (node, past) = (&self.nodes[number], self.lives[number].past);
        if !node.is_started() {
            return Ok(past);
        }
        let status = self.status(number)?;
        Ok(Figures {
            sent: past.sent + status.sent_bytes,
            received: past.received + status.received_bytes,
            peak_bytes: past.peak_bytes.max(node.peak_bytes()),
            cpu_seconds: past.cpu_seconds + node.cpu_seconds(),
        })
    }

    /// The same of all.
    pub fn all_figures(&self) -> Result<Vec<Figures>> {
        (0..self.nodes.len())
            .map(|number| self.figures(number))
            .collect()
    }

    fn status(&self, number: usize) -> Result<NodeStatus> {
        let status = Client::connect(self.nodes[number].home())?.call(Status::default());
        status.with_context(|| format!("the status of node {number}"))
    }

    /// The statuses of those that run, by number.
    pub fn statuses(&self) -> Result<BTreeMap<usize, NodeStatus>> {
        let running = self.nodes.iter().enumerate();
        running
            .filter(|(_, node)| node.is_started())
            .map(|(number, _)| Ok((number, self.status(number)?)))
            .collect()
    }

    /// The blobs that a node has, and how many bytes of each.
    pub fn blobs(&self, number: usize) -> Result<Vec<(RootHash, u64)>> {
        let listed = Client::connect(self.nodes[number].home())?.call(Hashes::default())?;
        let blobs = listed.hashes.into_iter();
        // Components and listings are in these.
        let blobs = blobs.filter(|hash| ["manifest", "index", "pack"].contains(&&*hash.kind));
        Ok(blobs.map(|hash| (hash.root, hash.have)).collect())
    }

    fn here(&self, number: usize) -> Result<u64> {
        let blobs = self.blobs(number)?;
        Ok(blobs.into_iter().map(|(_, have)| have).sum())
    }
}

fn start(lab: &Lab, node: &mut Node, number: usize) -> Result<()> {
    let host = &lab.network.hosts[number];
    let settings = node.home().join("home.json");
    let text = std::fs::read_to_string(&settings).context("reading a node's settings")?;
    let mut value: serde_json::Value = serde_json::from_str(&text)?;
    value["site"] = lab.scenario.sites[host.site].label.clone().into();
    std::fs::write(&settings, value.to_string())?;
    node.start_on(&format!("{}:{PORT}", host.address));
    Ok(())
}

/// Asks until the answer is yes.
pub fn until(what: &str, mut question: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + COMING_TOGETHER;
    while !question()? {
        ensure!(
            Instant::now() < deadline,
            "waited {COMING_TOGETHER:?} in vain until {what}"
        );
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
