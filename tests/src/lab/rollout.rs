//! A rollout: one node publishes, and all others pull at the same time, whatever happens meanwhile.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use capsule_node::control::{Client, Ls, NodeStatus, Publish, Status};
use rand::seq::SliceRandom;
use rand::{SeedableRng, rngs::SmallRng};

use super::goodput::{self, Measured};
use super::network::{Counters, Network};
use super::outcome::{NodeOutcome, Outcome};
use super::pulling::{Puller, Went};
use super::scenario::{Deed, Event, Scenario};
use crate::accounts::Machine;
use crate::{Node, data};

/// What is published, as people would name it.
const NAME: &str = "lab:1";
/// Nodes that are started at a time.
const STARTING: usize = 8;
/// Connections that a node is waited for to have before it all begins, if there are so many others.
const PEERS: usize = 6;
/// How long the fleet may take to come together, and to hear of what was published.
const COMING_TOGETHER: Duration = Duration::from_secs(120);
const PORT: u16 = 4277;

/// A lab that was set up.
#[derive(Debug)]
pub struct Lab {
    /// What it is for.
    pub scenario: Scenario,
    /// Its network.
    pub network: Network,
    /// What that carries.
    pub measured: Measured,
}

impl Lab {
    /// Sets the network up and measures it. One at a time in a program, which has namespaces of its own.
    pub fn set_up(scenario: Scenario) -> Result<Self> {
        let mut lab = Self::unmeasured(scenario)?;
        lab.measure()?;
        Ok(lab)
    }

    /// The same, not measured: for what does not hang on what links carry.
    pub fn unmeasured(scenario: Scenario) -> Result<Self> {
        let network = Network::set_up(&scenario).context("setting up the network")?;
        Ok(Self {
            scenario,
            network,
            measured: Measured::default(),
        })
    }

    /// Measures the network, perhaps anew: machines are not equally fast at all times.
    pub fn measure(&mut self) -> Result<()> {
        self.measured = goodput::measure(&self.network).context("measuring the network")?;
        Ok(())
    }

    /// Rolls out once, with homes in a directory of that run, which is removed.
    pub fn roll_out(&self, dir: &Path, run: u64) -> Result<Outcome> {
        let dir = dir.join(format!("run{run}"));
        std::fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        let outcome = self.roll_out_in(&dir, run);
        std::fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
        outcome
    }

    fn roll_out_in(&self, dir: &Path, run: u64) -> Result<Outcome> {
        let mut nodes = self.fleet(dir)?;
        let content = dir.join("content");
        data::noise_file(&content, run, self.scenario.bytes());
        let request = Publish::of(&content, NAME.parse().context("the name is a good one")?);
        let published = Client::connect(nodes[0].home())?.call(request)?;
        until("all nodes know the name", || {
            let know = nodes.iter().map(|node| knows(node.home()));
            Ok(know
                .collect::<Result<Vec<_>>>()?
                .into_iter()
                .all(|knows| knows))
        })?;
        let before = statuses(&nodes)?;
        let carried = self.network.counters()?;
        let (start, machine) = (Instant::now(), Machine::watch());
        let (went, carried_after) = self.pull(&mut nodes, start)?;
        let machine_busy = machine.busy();
        let after = statuses(&nodes)?;
        let nodes = nodes
            .iter()
            .zip(went)
            .enumerate()
            .map(|(number, (node, went))| {
                let host = &self.network.hosts[number];
                NodeOutcome {
                    site: host.site,
                    went,
                    // A node that was started again counts from then on.
                    sent_bytes: after[number]
                        .sent_bytes
                        .saturating_sub(before[number].sent_bytes),
                    received_bytes: after[number]
                        .received_bytes
                        .saturating_sub(before[number].received_bytes),
                    carried: carried_after.hosts[number].since(carried.hosts[number]),
                    peak_bytes: node.peak_bytes(),
                    cpu_seconds: node.cpu_seconds(),
                }
            });
        Ok(Outcome {
            bytes: published.pack_bytes + published.index_bytes,
            nodes: nodes.collect(),
            sites: (carried_after.sites.iter().zip(&carried.sites))
                .map(|(after, before)| after.since(*before))
                .collect(),
            machine_busy,
        })
    }

    /// Starts all nodes and waits until they have found each other.
    pub fn fleet(&self, dir: &Path) -> Result<Vec<Node>> {
        let node = |number: usize| {
            let namespace = self.network.hosts[number].namespace.clone();
            Node::new(dir.join(format!("node{number}"))).in_namespace(namespace)
        };
        let mut first = node(0);
        first.init();
        self.start(&mut first, 0)?;
        let token = first.ok(&["fleet", "invite", "--addr", first.address()]);
        let mut nodes: Vec<Node> = (1..self.network.hosts.len()).map(node).collect();
        for (batch, nodes) in nodes.chunks_mut(STARTING).enumerate() {
            thread::scope(|scope| {
                let starting: Vec<_> = (nodes.iter_mut().enumerate())
                    .map(|(i, node)| {
                        let token = token.trim();
                        scope.spawn(move || {
                            node.ok(&["join", token]);
                            self.start(node, 1 + batch * STARTING + i)
                        })
                    })
                    .collect();
                starting.into_iter().try_for_each(|starting| {
                    starting
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
            })?;
        }
        nodes.insert(0, first);
        let peers = PEERS.min(nodes.len() - 1);
        until("all nodes have found others", || {
            let found = statuses(&nodes)?;
            Ok(found.iter().all(|status| status.peers >= peers))
        })?;
        Ok(nodes)
    }

    fn start(&self, node: &mut Node, number: usize) -> Result<()> {
        let host = &self.network.hosts[number];
        let settings = node.home().join("home.json");
        let text = std::fs::read_to_string(&settings).context("reading a node's settings")?;
        let mut value: serde_json::Value = serde_json::from_str(&text)?;
        value["site"] = self.scenario.sites[host.site].label.clone().into();
        std::fs::write(&settings, value.to_string())?;
        node.start_on(&format!("{}:{PORT}", host.address));
        Ok(())
    }

    /// All pull, and what is to happen happens.
    fn pull(&self, nodes: &mut [Node], start: Instant) -> Result<(Vec<Went>, Counters)> {
        let deadline = start + self.scenario.patience();
        let downs = self.downs();
        let pullers: Vec<Puller> = (1..nodes.len())
            .map(|number| Puller {
                home: PathBuf::from(nodes[number].home()),
                name: NAME.into(),
                start,
                deadline,
                may_be_down: downs.contains(&number),
            })
            .collect();
        thread::scope(|scope| {
            let pulling: Vec<_> = pullers
                .iter()
                .map(|puller| scope.spawn(|| puller.run()))
                .collect();
            let mut events: Vec<&Event> = self.scenario.events.iter().collect();
            events.sort_by(|a, b| a.at.total_cmp(&b.at));
            for event in events {
                let at = start + Duration::from_secs_f64(event.at);
                thread::sleep(at.saturating_duration_since(Instant::now()));
                self.happen(event, nodes)?;
            }
            let mut went = vec![Went::default()];
            for pulling in pulling {
                went.push(pulling.join().map_err(|_| anyhow!("a puller panicked"))?);
            }
            Ok((went, self.network.counters()?))
        })
    }

    /// Nodes that an event falls on.
    fn targets(&self, event: &Event) -> Vec<usize> {
        let Some(share) = event.share else {
            return event.nodes.clone();
        };
        let mut pullers: Vec<usize> = (1..self.network.hosts.len()).collect();
        pullers.shuffle(&mut SmallRng::seed_from_u64(self.scenario.seed));
        pullers.truncate((share * pullers.len() as f64).round() as usize);
        pullers
    }

    /// Nodes that are down for a while.
    fn downs(&self) -> Vec<usize> {
        let kills = self.scenario.events.iter();
        let kills = kills.filter(|event| event.deed == Deed::Kill);
        kills.flat_map(|event| self.targets(event)).collect()
    }

    fn happen(&self, event: &Event, nodes: &mut [Node]) -> Result<()> {
        if let Some(label) = &event.site {
            let site = self.scenario.site(label)?;
            return self.network.join_site(site, event.deed == Deed::Join);
        }
        for number in self.targets(event) {
            match event.deed {
                Deed::Kill => nodes[number].kill(),
                Deed::Restart => self.start(&mut nodes[number], number)?,
                Deed::Cut => self.network.plug(number, false)?,
                Deed::Join => self.network.plug(number, true)?,
            }
        }
        Ok(())
    }
}

fn knows(home: &Path) -> Result<bool> {
    let listed = Client::connect(home)?.call(Ls::default())?;
    let mut names = listed.capsules.iter().flat_map(|capsule| &capsule.names);
    Ok(names.any(|name| name == NAME))
}

fn statuses(nodes: &[Node]) -> Result<Vec<NodeStatus>> {
    let ask = |node: &Node| Ok(Client::connect(node.home())?.call(Status::default())?);
    nodes.iter().map(ask).collect()
}

fn until(what: &str, mut question: impl FnMut() -> Result<bool>) -> Result<()> {
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
