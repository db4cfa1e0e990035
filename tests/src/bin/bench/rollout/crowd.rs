//! Another tool's processes in the lab: one on each node, started at the same time, watched from outside, ended by their ids.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use capsule_tests::accounts::Machine;
use capsule_tests::lab::Lab;
use capsule_tests::lab::network::Counters;

use super::found::{Found, Used};
use crate::measure::Family;
use crate::process::{Deadline, Process};
use crate::transfer::same_content;

/// How often is looked whether nodes are done.
const STEP: Duration = Duration::from_millis(20);
/// How often accounts are looked at: dozens of processes, whose peaks last.
const LOOK: Duration = Duration::from_millis(500);

/// What a tool is to do.
#[derive(Debug)]
pub struct Job<'a> {
    /// Where.
    pub lab: &'a Lab,
    /// What node 0 has, and all others are to get.
    pub source: &'a Path,
    /// An empty directory, for all nodes.
    pub dir: &'a Path,
    /// When it has to be done.
    pub deadline: Deadline,
}

/// How it is known that a node has everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// Its process ends.
    Ends,
    /// Its process makes the file [`Job::told`], and stays to serve others.
    Tells,
}

impl Job<'_> {
    /// Where a node keeps what it needs and makes.
    pub fn place(&self, node: usize) -> PathBuf {
        self.dir.join(format!("node{node}"))
    }

    /// What a node makes when it has everything.
    pub fn told(&self, node: usize) -> PathBuf {
        self.place(node).join("told")
    }

    /// Where a node puts what it gets.
    pub fn target(&self, node: usize) -> Result<PathBuf> {
        let name = self.source.file_name().context("the source has a name")?;
        Ok(self.place(node).join("into").join(name))
    }

    /// How many are to get it.
    pub fn pullers(&self) -> usize {
        self.lab.network.hosts.len() - 1
    }

    /// Makes all places.
    pub fn make_places(&self) -> Result<()> {
        for node in 0..=self.pullers() {
            let into = self.place(node).join("into");
            fs::create_dir_all(&into).with_context(|| format!("making {}", into.display()))?;
        }
        Ok(())
    }

    /// Starts a process on a node.
    pub fn start(&self, node: usize, command: &mut Command) -> Result<Process> {
        let log = self.place(node).join("log");
        let namespace = &self.lab.network.hosts[node].namespace;
        namespace.run(|| Process::start(command, &log))
    }

    /// Starts a process on each node that pulls, and measures until all are done. `server` runs on node 0 already; where it does not, it
    /// is started last.
    pub fn roll_out(
        &self,
        server: Option<Process>,
        mut command: impl FnMut(usize) -> Result<Command>,
        done: Done,
    ) -> Result<Found> {
        let mut commands = (1..=self.pullers())
            .map(&mut command)
            .collect::<Result<Vec<_>>>()?;
        let mut serving = server.map(|server| Watched {
            family: Family::watch(server.pid()),
            process: server,
        });
        let carried = self.lab.network.counters()?;
        let (clock, started, machine) = (SystemTime::now(), Instant::now(), Machine::watch());
        let mut pulling = Vec::with_capacity(commands.len());
        for (number, command) in commands.iter_mut().enumerate() {
            pulling.push(Watched::new(self.start(1 + number, command)?));
        }
        if serving.is_none() {
            serving = Some(Watched::new(self.start(0, &mut command(0)?)?));
        }
        let mut seconds = vec![None; pulling.len()];
        let mut looked = Instant::now();
        while seconds.contains(&None) {
            self.deadline.check("the rollout")?;
            for (number, (puller, seconds)) in pulling.iter_mut().zip(&mut seconds).enumerate() {
                if seconds.is_some() {
                    continue;
                }
                *seconds = match done {
                    Done::Ends => puller.ended(started)?,
                    Done::Tells => puller.told(&self.told(1 + number), clock)?,
                };
            }
            if looked.elapsed() > LOOK {
                pulling.iter_mut().for_each(Watched::look);
                serving.iter_mut().for_each(Watched::look);
                looked = Instant::now();
            }
            std::thread::sleep(STEP);
        }
        let machine_busy = machine.busy();
        let carried = since(&self.lab.network.counters()?, &carried);
        let all = pulling.iter_mut().chain(&mut serving);
        let used: Vec<_> = all
            .map(|watched| {
                watched.look();
                watched.family.used()
            })
            .collect();
        drop((pulling, serving));
        for node in 1..=self.pullers() {
            same_content(self.source, &self.target(node)?)
                .with_context(|| format!("node {node}"))?;
        }
        let used = Used {
            cpu_seconds: used.iter().map(|used| used.cpu_seconds).sum(),
            peak_bytes: used.iter().map(|used| used.peak_bytes).max().unwrap_or(0),
            machine_busy,
        };
        let seconds = seconds.into_iter().flatten().collect();
        let bytes = fs::metadata(self.source)?.len();
        Ok(Found::others(self.lab, bytes, seconds, &carried, used))
    }
}

fn since(after: &Counters, before: &Counters) -> Counters {
    let hosts = after.hosts.iter().zip(&before.hosts);
    let sites = after.sites.iter().zip(&before.sites);
    Counters {
        hosts: hosts.map(|(after, before)| after.since(*before)).collect(),
        sites: sites.map(|(after, before)| after.since(*before)).collect(),
    }
}

/// A process, and what it used so far.
struct Watched {
    process: Process,
    family: Family,
}

impl Watched {
    fn new(process: Process) -> Self {
        Self {
            family: Family::new(process.pid()),
            process,
        }
    }

    fn look(&mut self) {
        self.family.look();
    }

    /// Seconds until it ended well, if it has.
    fn ended(&mut self, started: Instant) -> Result<Option<f64>> {
        let Some(at) = self.process.ended(Duration::ZERO) else {
            return Ok(None);
        };
        // Its accounts go with it.
        self.look();
        self.process.succeeded()?;
        Ok(Some(at.duration_since(started).as_secs_f64()))
    }

    /// Seconds until it told that it has everything, if it has.
    fn told(&mut self, told: &Path, clock: SystemTime) -> Result<Option<f64>> {
        let Ok(found) = fs::metadata(told) else {
            self.process.check_runs()?;
            return Ok(None);
        };
        let after = found.modified()?.duration_since(clock);
        Ok(Some(after.unwrap_or_default().as_secs_f64()))
    }
}
