//! A rollout: one node publishes, and all others pull at the same time, whatever happens meanwhile.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use capsule_node::control::{CapsuleRef, Client, Export, Ls, Publish};

use super::event::{Deed, Step, Target};
use super::fleet::{Figures, Fleet, PORT, until};
use super::foes::{Foe, Orders};
use super::goodput::{self, Measured};
use super::network::{Counters, Network};
use super::outcome::{NodeOutcome, Outcome};
use super::pulling::{Puller, Went};
use super::scenario::Scenario;
use super::watch;
use crate::accounts::Machine;
use crate::data;

/// What is published, as people would name it.
const NAME: &str = "lab:1";
/// In which spans caps are to hold.
const WINDOW: Duration = Duration::from_secs(10);
/// Nodes whose copies are looked at, at a time.
const CHECKING: usize = 4;

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

    /// Nodes that are real, by number: all but the hostile.
    pub fn real(&self) -> Vec<usize> {
        let groups = self.scenario.groups().into_iter().enumerate();
        let real = groups.filter(|(_, group)| group.hostile.is_none());
        real.map(|(number, _)| number).collect()
    }

    fn roll_out_in(&self, dir: &Path, run: u64) -> Result<Outcome> {
        let mut fleet = Fleet::start(self, dir)?;
        let content = dir.join("content");
        data::noise_file(&content, run, self.scenario.bytes());
        let request = Publish::of(&content, NAME.parse().context("the name is a good one")?);
        let published = Client::connect(fleet.nodes[0].home())?.call(request)?;
        until("all nodes know the name", || {
            let know = self.real().into_iter();
            let know = know.map(|number| knows(fleet.nodes[number].home()));
            let know = know.collect::<Result<Vec<_>>>()?;
            Ok(know.into_iter().all(|knows| knows))
        })?;
        let foes = self.foes(dir, &fleet, run)?;
        let members = fleet.statuses()?.into_iter();
        let mut members: BTreeMap<String, usize> = members
            .map(|(number, status)| (status.peer, number))
            .collect();
        let foes_peers = foes
            .iter()
            .filter_map(|foe| Some((foe.peer.clone()?, foe.number)));
        members.extend(foes_peers);
        let before = fleet.all_figures()?;
        let carried = self.network.counters()?;
        let (start, machine) = (Instant::now(), Machine::watch());
        let (went, carried_after, windows) = self.pull(&mut fleet, start)?;
        let machine_busy = machine.busy();
        drop(foes);
        let after = fleet.all_figures()?;
        let banned = fleet.statuses()?;
        let right = self.right(dir, &content, &fleet, &went)?;
        let groups = self.scenario.groups();
        let outcome = |(number, went): (usize, Went)| {
            let moved =
                |figure: fn(&Figures) -> u64| figure(&after[number]) - figure(&before[number]);
            let bans = banned
                .get(&number)
                .into_iter()
                .flat_map(|status| &status.bans);
            anyhow::Ok(NodeOutcome {
                site: self.network.hosts[number].site,
                hostile: groups[number].hostile,
                is_short: groups[number].disk_mib.is_some(),
                is_right: right.get(&number).copied(),
                went,
                sent_bytes: moved(|figures| figures.sent),
                received_bytes: moved(|figures| figures.received),
                carried: carried_after.hosts[number].since(carried.hosts[number]),
                peak_bytes: after[number].peak_bytes,
                cpu_seconds: after[number].cpu_seconds,
                returns: fleet.returns(number)?,
                banned: bans
                    .filter_map(|ban| members.get(&ban.peer).copied())
                    .collect(),
            })
        };
        let nodes = went.into_iter().enumerate().map(outcome);
        Ok(Outcome {
            bytes: published.pack_bytes + published.index_bytes,
            nodes: nodes.collect::<Result<_>>()?,
            sites: (carried_after.sites.iter().zip(&carried.sites))
                .map(|(after, before)| after.since(*before))
                .collect(),
            machine_busy,
            windows,
        })
    }

    /// Starts the hostile members, which claim to have what was published, and waits until they are in.
    fn foes(&self, dir: &Path, fleet: &Fleet, run: u64) -> Result<Vec<Foe>> {
        let at = self.addresses(&self.real());
        let blobs = files_of(&fleet.nodes[0].home().join("store/blobs"))?;
        let orders = Orders {
            dir,
            token: fleet.token.trim(),
            at: &at,
            blobs: &blobs,
            seed: self.scenario.seed ^ (run << 32),
            seconds: self.scenario.give_up,
            port: PORT,
        };
        let groups = self.scenario.groups().into_iter().enumerate();
        let mut foes = groups
            .filter(|(_, group)| group.hostile.is_some())
            .map(|(number, group)| Foe::start(number, group, &self.network.hosts[number], &orders))
            .collect::<Result<Vec<_>>>()?;
        foes.iter_mut().try_for_each(Foe::is_ready)?;
        Ok(foes)
    }

    fn addresses(&self, numbers: &[usize]) -> Vec<String> {
        let address = |number: &usize| format!("{}:{PORT}", self.network.hosts[*number].address);
        numbers.iter().map(address).collect()
    }

    /// All pull, and what is to happen happens. Returns also what came in each window, where there is a cap.
    fn pull(&self, fleet: &mut Fleet, start: Instant) -> Result<(Vec<Went>, Counters, Vec<f64>)> {
        let deadline = start + self.scenario.patience();
        let steps = self.scenario.steps()?;
        let puller = |number: usize| Puller {
            home: PathBuf::from(fleet.nodes[number].home()),
            name: NAME.into(),
            start,
            deadline,
            may_be_down: is_killed(&steps, number),
        };
        let numbers: Vec<usize> = self.real().split_off(1);
        let pullers: Vec<Puller> = numbers.iter().map(|number| puller(*number)).collect();
        thread::scope(|scope| {
            let pulling: Vec<_> = pullers
                .iter()
                .map(|puller| scope.spawn(|| puller.run()))
                .collect();
            let (over, is_over) = mpsc::channel::<()>();
            let watching = scope.spawn(move || match self.scenario.cap() {
                Some(_) => self.windows(&is_over),
                None => Ok(vec![]),
            });
            for step in &steps {
                let at = start + step.after();
                thread::sleep(at.saturating_duration_since(Instant::now()));
                self.happen(step, fleet, deadline)?;
            }
            let mut went = vec![Went::default(); fleet.nodes.len()];
            for (number, pulling) in numbers.iter().zip(pulling) {
                went[*number] = pulling.join().map_err(|_| anyhow!("a puller panicked"))?;
            }
            let carried = self.network.counters()?;
            drop(over);
            let windows = watching
                .join()
                .map_err(|_| anyhow!("a watcher panicked"))??;
            Ok((went, carried, windows))
        })
    }

    /// What comes to the last node in each window until it is over, in bytes a second; of the last window, which is cut short, nothing.
    fn windows(&self, is_over: &mpsc::Receiver<()>) -> Result<Vec<f64>> {
        let came = || -> Result<(Instant, u64)> {
            let carried = self.network.counters()?;
            Ok((
                Instant::now(),
                carried.hosts.last().map_or(0, |host| host.down),
            ))
        };
        let (mut windows, mut before) = (vec![], came()?);
        while is_over.recv_timeout(WINDOW) == Err(mpsc::RecvTimeoutError::Timeout) {
            let now = came()?;
            windows.push((now.1 - before.1) as f64 / (now.0 - before.0).as_secs_f64());
            before = now;
        }
        Ok(windows)
    }

    fn happen(&self, step: &Step, fleet: &mut Fleet, deadline: Instant) -> Result<()> {
        let nodes = match &step.target {
            Target::Site(site) => {
                return self.network.join_site(*site, step.deed == Deed::Join);
            }
            Target::Nodes(nodes) => nodes,
        };
        let plug = |there| {
            let mut nodes = nodes.iter();
            nodes.try_for_each(|node| self.network.plug(*node, there))
        };
        match step.deed {
            Deed::Kill => fleet.kill(nodes),
            Deed::Restart => fleet.restart(nodes),
            Deed::Crash => unreachable!("it is two steps"),
            Deed::Cut => plug(false),
            Deed::Join => plug(true),
            Deed::Partition => self.network.part(nodes, true),
            Deed::Heal => self.network.part(nodes, false),
            Deed::PublisherLeaves => {
                let others = self.addresses(&self.scenario.honest_pullers());
                let blobs = fleet.blobs(0)?;
                let namespace = &self.network.hosts[0].namespace;
                let patience = deadline.saturating_duration_since(Instant::now());
                watch::all_is_out(namespace, fleet.token.trim(), &others, &blobs, patience)?;
                fleet.kill(&[0])
            }
        }
    }

    /// Whether the copies of those that are done are what was published, by node.
    fn right(
        &self,
        dir: &Path,
        content: &Path,
        fleet: &Fleet,
        went: &[Went],
    ) -> Result<BTreeMap<usize, bool>> {
        let published = hash(content)?;
        let done = self.scenario.honest_pullers().into_iter();
        let done: Vec<usize> = done
            .filter(|number| went[*number].seconds.is_some())
            .collect();
        let is_right = |number: usize| {
            let copy = dir.join(format!("copy{number}"));
            let export = Export {
                capsule: CapsuleRef(NAME.into()),
                to: copy.clone(),
                component: None,
                force: false,
            };
            let home = fleet.nodes[number].home();
            let exported = Client::connect(home)?.call(export);
            exported.with_context(|| format!("exporting from node {number}"))?;
            let is_right = hash(&copy)? == published;
            std::fs::remove_file(&copy)?;
            anyhow::Ok((number, is_right))
        };
        let (is_right, mut right) = (&is_right, BTreeMap::new());
        for batch in done.chunks(CHECKING) {
            thread::scope(|scope| {
                let threads: Vec<_> = (batch.iter())
                    .map(|number| scope.spawn(move || is_right(*number)))
                    .collect();
                for thread in threads {
                    right.extend([thread
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?]);
                }
                anyhow::Ok(())
            })?;
        }
        Ok(right)
    }
}

/// Whether a node is down for a while.
fn is_killed(steps: &[Step], number: usize) -> bool {
    let mut kills = steps.iter().filter(|step| step.deed == Deed::Kill);
    kills.any(|step| matches!(&step.target, Target::Nodes(nodes) if nodes.contains(&number)))
}

fn hash(path: &Path) -> Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    hasher.update_reader(file)?;
    Ok(hasher.finalize())
}

/// Content of blobs, in a store's directories.
fn files_of(blobs: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for dir in std::fs::read_dir(blobs).context("reading the publisher's store")? {
        for file in std::fs::read_dir(dir?.path())? {
            let path = file?.path();
            if path.extension().is_some_and(|end| end == "data") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

fn knows(home: &Path) -> Result<bool> {
    let listed = Client::connect(home)?.call(Ls::default())?;
    let mut names = listed.capsules.iter().flat_map(|capsule| &capsule.names);
    Ok(names.any(|name| name == NAME))
}
