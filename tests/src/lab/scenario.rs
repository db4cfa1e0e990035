//! What a lab is to do, as data: TOML files in `tests/scenarios`.
//!
//! ```toml
//! title = "32 equal nodes"
//! mib = 96
//!
//! [[sites]]
//! label = "room"
//! nodes = [{ count = 33, mbit = 20 }]
//!
//! [[events]]
//! at = 10.0
//! do = "kill"
//! share = 0.2
//! ```
//!
//! Nodes are numbered through all sites in order; number 0 publishes, and all others pull. Some of these may be `hostile` instead, or
//! lack the room for what they pull (`disk_mib`): the first are programs of their own, the others have to end with a clear error. Of two
//! nodes each may have caps (`cap_up`, `cap_down`), to which what its link carries is held.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::event::Event;
use crate::hostile::Part;

/// Most nodes: each is a process, and a namespace.
const MAX_NODES: usize = 300;
/// Most sites: each has a network.
const MAX_SITES: usize = 100;
/// Largest content.
const MAX_MIB: u64 = 4096;
/// Rates that shaping keeps to, in Mbit/s.
const RATES: Range<f64> = 0.05..10_000.0;
/// Caps, in Mbit/s; nodes refuse less than 0.064.
const CAPS: Range<f64> = 0.1..10_000.0;
/// Smallest disk of a node, in MiB: a home takes about one.
const LEAST_DISK: u64 = 4;
/// Longest run, in seconds.
const MAX_SECONDS: u64 = 3600;

/// A lab's work.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What people call it.
    pub title: String,
    /// Size of what is published, in MiB: it does not compress.
    pub mib: f64,
    /// Where the nodes are.
    pub sites: Vec<Site>,
    /// What happens meanwhile.
    #[serde(default)]
    pub events: Vec<Event>,
    /// When the run counts as failed, in seconds.
    #[serde(default = "default_give_up")]
    pub give_up: u64,
    /// Decides which nodes an event falls on.
    #[serde(default)]
    pub seed: u64,
}

/// Nodes in one network.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    /// Its name, which its nodes are told.
    pub label: String,
    /// The link to the router, in Mbit/s, both ways; needed where there are several sites.
    pub mbit: Option<f64>,
    /// The same where the ways differ.
    pub up: Option<f64>,
    /// From the router.
    pub down: Option<f64>,
    /// Its nodes.
    pub nodes: Vec<Group>,
}

/// Nodes on equal links.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// How many.
    pub count: usize,
    /// Their links in Mbit/s, both ways.
    pub mbit: Option<f64>,
    /// From the node, where the ways differ.
    pub up: Option<f64>,
    /// To the node.
    pub down: Option<f64>,
    /// How they misbehave, if they do.
    pub hostile: Option<Part>,
    /// How many of a hundred answers of theirs have wrong bytes, where they lie or corrupt.
    #[serde(default = "default_percent")]
    pub percent: u8,
    /// The size of their disks, in MiB, where that is too small for what they pull.
    pub disk_mib: Option<u64>,
    /// Caps that they are given, in Mbit/s: of what they send, and of what they receive.
    pub cap_up: Option<f64>,
    /// See `cap_up`.
    pub cap_down: Option<f64>,
}

/// A link's rates, in Mbit/s.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Away from whoever is behind it.
    pub up: f64,
    /// Towards them.
    pub down: f64,
}

fn default_give_up() -> u64 {
    600
}

fn default_percent() -> u8 {
    100
}

impl Scenario {
    /// Reads a file, and checks it.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("in {}", path.display()))
    }

    /// Parses a file's text, and checks it.
    pub fn parse(text: &str) -> Result<Self> {
        let scenario: Self = toml::from_str(text)?;
        scenario.check()?;
        Ok(scenario)
    }

    /// Bytes of what is published.
    pub fn bytes(&self) -> u64 {
        (self.mib * f64::from(1 << 20)) as u64
    }

    /// How many nodes there are.
    pub fn nodes(&self) -> usize {
        let groups = self.sites.iter().flat_map(|site| &site.nodes);
        groups.map(|group| group.count).sum()
    }

    /// How long it may take.
    pub const fn patience(&self) -> Duration {
        Duration::from_secs(self.give_up)
    }

    /// The same with another number of nodes in its only site.
    pub fn with_nodes(&self, pullers: usize) -> Result<Self> {
        let mut other = self.clone();
        let [Site { nodes, .. }] = &mut other.sites[..] else {
            anyhow::bail!("only a scenario of one site can have another number of nodes");
        };
        let [group] = &mut nodes[..] else {
            anyhow::bail!("only a scenario of equal nodes can have another number of them");
        };
        group.count = pullers + 1;
        other.title = format!("{} ({pullers} pull)", self.title);
        other.check()?;
        Ok(other)
    }

    /// Those that pull over links as fast as any.
    pub fn fastest(&self) -> Vec<usize> {
        let groups = self.sites.iter().flat_map(|site| &site.nodes);
        let rates = groups.flat_map(|group| std::iter::repeat_n(group.rate().down, group.count));
        let rates: Vec<f64> = rates.collect();
        let most = rates.iter().skip(1).copied().fold(0.0, f64::max);
        let pullers = 1..rates.len();
        pullers.filter(|node| rates[*node] >= most).collect()
    }

    /// The same as if slower nodes were not there; none where all are equal, or what happens names nodes by number.
    pub fn without_slower(&self) -> Result<Option<Self>> {
        let [site] = &self.sites[..] else {
            return Ok(None);
        };
        let down = |group: &Group| group.rate().down;
        let most = site.nodes.iter().map(down).fold(0.0, f64::max);
        let slower = |group: &Group| down(group) < most;
        // The first group has the publisher.
        if !self.goes_well() || slower(&site.nodes[0]) || !site.nodes.iter().any(slower) {
            return Ok(None);
        }
        let mut other = self.clone();
        other.sites[0].nodes.retain(|group| !slower(group));
        other.title = format!("{} (without the slower)", self.title);
        other.check()?;
        Ok(Some(other))
    }

    /// The least cap on what the only puller gets, if there is one; in bytes a second.
    pub fn cap(&self) -> Option<f64> {
        let groups = self.groups();
        let (first, last) = (groups.first()?, groups.last()?);
        let caps = first.cap_up.into_iter().chain(last.cap_down);
        caps.min_by(f64::total_cmp).map(|mbit| mbit * 1e6 / 8.0)
    }

    /// The same without caps, where these are above what the links carry, so that they should cost nothing.
    pub fn without_caps(&self) -> Option<Self> {
        let link = self
            .groups()
            .iter()
            .map(|group| group.rate().down)
            .fold(f64::INFINITY, f64::min);
        self.cap().filter(|cap| *cap > link * 1e6 / 8.0)?;
        let mut other = self.clone();
        for group in other.sites.iter_mut().flat_map(|site| &mut site.nodes) {
            (group.cap_up, group.cap_down) = (None, None);
        }
        other.title = format!("{} (without the cap)", self.title);
        Some(other)
    }

    /// The nodes of a site.
    pub fn nodes_of(&self, site: usize) -> Range<usize> {
        let count = |site: &Site| site.nodes.iter().map(|group| group.count).sum::<usize>();
        let first = self.sites[..site].iter().map(count).sum();
        first..first + count(&self.sites[site])
    }

    /// The groups that nodes belong to, by number.
    pub fn groups(&self) -> Vec<&Group> {
        let groups = self.sites.iter().flat_map(|site| &site.nodes);
        groups
            .flat_map(|group| std::iter::repeat_n(group, group.count))
            .collect()
    }

    /// Nodes that pull, and have to end with all of it.
    pub fn honest_pullers(&self) -> Vec<usize> {
        let groups = self.groups().into_iter().enumerate().skip(1);
        let honest =
            groups.filter(|(_, group)| group.hostile.is_none() && group.disk_mib.is_none());
        honest.map(|(number, _)| number).collect()
    }

    /// Whether nothing goes wrong: all nodes are honest, have room, and nothing happens to them.
    pub fn goes_well(&self) -> bool {
        self.events.is_empty() && self.honest_pullers().len() + 1 == self.nodes()
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.mib > 0.0 && self.mib <= MAX_MIB as f64,
            "`mib` is {}: give more than 0 and at most {MAX_MIB}",
            self.mib
        );
        ensure!(
            (1..=MAX_SECONDS).contains(&self.give_up),
            "`give_up` is {}: give 1 to {MAX_SECONDS} seconds",
            self.give_up
        );
        ensure!(
            (1..=MAX_SITES).contains(&self.sites.len()),
            "there are {} sites: give 1 to {MAX_SITES}",
            self.sites.len()
        );
        ensure!(
            (2..=MAX_NODES).contains(&self.nodes()),
            "there are {} nodes: give 2 to {MAX_NODES}, of which the first publishes",
            self.nodes()
        );
        for site in &self.sites {
            let label = &site.label;
            let needed = self.sites.len() > 1;
            check_rate(site.mbit, site.up, site.down, needed)
                .with_context(|| format!("the link of the site {label:?}"))?;
            for group in &site.nodes {
                let where_from = || format!("nodes of the site {label:?}");
                check_rate(group.mbit, group.up, group.down, true).with_context(where_from)?;
                group.check_part(self.mib).with_context(where_from)?;
            }
        }
        let publisher = self.groups()[0];
        ensure!(
            publisher.hostile.is_none() && publisher.disk_mib.is_none(),
            "the first node publishes: it is neither hostile nor short of room"
        );
        ensure!(
            !self.honest_pullers().is_empty(),
            "give nodes that are not hostile and have room"
        );
        ensure!(
            self.nodes() == 2 || !self.groups().iter().any(|group| group.is_capped()),
            "caps are for one that publishes and one that pulls"
        );
        self.check_events()
    }

    /// The position of a site.
    pub fn site(&self, label: &str) -> Result<usize> {
        let found = self.sites.iter().position(|site| site.label == label);
        found.with_context(|| format!("there is no site {label:?}"))
    }
}

fn check_rate(mbit: Option<f64>, up: Option<f64>, down: Option<f64>, needed: bool) -> Result<()> {
    let given = match (mbit, up, down) {
        (Some(both), None, None) => vec![both],
        (None, Some(up), Some(down)) => vec![up, down],
        (None, None, None) if !needed => vec![],
        _ => anyhow::bail!("give either `mbit`, or `up` and `down`"),
    };
    ensure!(
        given.iter().all(|rate| RATES.contains(rate)),
        "rates are {} to {} Mbit/s",
        RATES.start,
        RATES.end
    );
    Ok(())
}

fn rate(mbit: Option<f64>, up: Option<f64>, down: Option<f64>) -> Option<Rate> {
    let both = |rate| Rate {
        up: rate,
        down: rate,
    };
    mbit.map(both)
        .or_else(|| up.zip(down).map(|(up, down)| Rate { up, down }))
}

impl Group {
    fn check_part(&self, mib: f64) -> Result<()> {
        ensure!(
            self.percent <= 100,
            "`percent` is {}: give at most 100",
            self.percent
        );
        // A home takes some as it is.
        ensure!(
            (self.disk_mib).is_none_or(|disk| (LEAST_DISK..mib as u64).contains(&disk)),
            "`disk_mib` is for what has no room: give {LEAST_DISK} to less than `mib`"
        );
        ensure!(
            self.disk_mib.is_none() || self.hostile.is_none(),
            "give one of `hostile` and `disk_mib`"
        );
        let mut caps = self.cap_up.into_iter().chain(self.cap_down);
        ensure!(
            caps.all(|cap| CAPS.contains(&cap)),
            "caps are {} to {} Mbit/s",
            CAPS.start,
            CAPS.end
        );
        Ok(())
    }

    fn is_capped(&self) -> bool {
        self.cap_up.is_some() || self.cap_down.is_some()
    }

    /// The links' rates.
    ///
    /// # Panics
    /// Where the scenario was not checked.
    pub fn rate(&self) -> Rate {
        rate(self.mbit, self.up, self.down).expect("it was checked")
    }
}

impl Site {
    /// The rates of its link to the router; none where it has none.
    pub fn rate(&self) -> Option<Rate> {
        rate(self.mbit, self.up, self.down)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = r#"
        title = "two sites"
        mib = 4
        [[sites]]
        label = "a"
        mbit = 8
        nodes = [{ count = 1, mbit = 100 }, { count = 3, up = 10, down = 50.5 }]
        [[sites]]
        label = "b"
        up = 2
        down = 4
        nodes = [{ count = 2, mbit = 100 }]
        [[events]]
        at = 3
        do = "cut"
        site = "b"
    "#;

    #[test]
    fn nodes_are_numbered_through_the_sites() {
        let scenario = Scenario::parse(TWO).unwrap();
        assert_eq!((scenario.nodes(), scenario.bytes()), (6, 4 << 20));
        assert_eq!(scenario.nodes_of(1), 4..6);
        assert_eq!(scenario.sites[1].rate().map(|rate| rate.down), Some(4.0));
        assert_eq!(scenario.sites[0].nodes[1].rate().up, 10.0);
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (right, wrong, told) in [
            ("mib = 4", "mib = 0", "more than 0"),
            ("mib = 4", "mib = 4\nmibs = 5", "unknown field"),
            (
                "label = \"a\"\n        mbit = 8",
                "label = \"a\"",
                "either `mbit`",
            ),
            ("count = 3", "count = 400", "give 2 to 300"),
            ("up = 2", "up = 0.001", "Mbit/s"),
            ("site = \"b\"", "site = \"c\"", "no site \"c\""),
            ("site = \"b\"", "nodes = [6]", "only 6 nodes"),
            ("site = \"b\"", "nodes = [1]\nshare = 0.5", "one of"),
            ("at = 3", "at = 3000", "`give_up`"),
            ("\"cut\"", "\"burn\"", "unknown variant"),
            ("\"cut\"", "\"kill\"", "cut and joined"),
            ("count = 1", "hostile = \"lie\", count = 1", "publishes"),
            ("count = 1", "cap_up = 5, count = 1", "one that pulls"),
            ("count = 1", "cap_up = 0, count = 1", "caps are 0.1"),
            ("count = 3", "cap_up = 5, count = 3", "one that pulls"),
            ("count = 2", "disk_mib = 4, count = 2", "`disk_mib`"),
            (
                "count = 2",
                "hostile = \"nice\", count = 2",
                "unknown variant",
            ),
        ] {
            assert!(TWO.contains(right), "{right}");
            let error = Scenario::parse(&TWO.replacen(right, wrong, 1)).unwrap_err();
            let text = format!("{error:#}");
            assert!(text.contains(told), "{wrong}: {text}");
        }
    }

    #[test]
    fn the_number_of_equal_nodes_can_be_another() {
        let one = "title = \"one\"\nmib = 4\nsites = [{ label = \"a\", nodes = [{ count = 9, mbit = 20 }] }]";
        let scenario = Scenario::parse(one).unwrap();
        assert_eq!(scenario.with_nodes(1).unwrap().nodes(), 2);
        assert!(scenario.with_nodes(0).is_err());
        assert!(Scenario::parse(TWO).unwrap().with_nodes(3).is_err());
    }

    #[test]
    fn caps_above_the_links_can_be_left_out() {
        let two = |cap: &str| {
            let text = format!(
                "title = \"t\"\nmib = 4\n[[sites]]\nlabel = \"a\"\nnodes = [{{ count = 1, mbit = 20 }}, {{ count = 1, mbit = 20, {cap} }}]"
            );
            Scenario::parse(&text).unwrap()
        };
        assert_eq!(two("cap_down = 8").cap(), Some(1e6));
        assert_eq!(two("cap_up = 8").cap(), None, "it sends nothing");
        assert!(two("cap_down = 8").without_caps().is_none());
        let without = two("cap_down = 40").without_caps().unwrap();
        assert_eq!((without.cap(), without.nodes()), (None, 2));
    }

    #[test]
    fn slower_nodes_can_be_told_apart_and_left_out() {
        let text = "title = \"t\"\nmib = 4\n[[sites]]\nlabel = \"a\"\nnodes = [{ count = 3, mbit = 20 }, \
                    { count = 2, mbit = 5 }, { count = 1, up = 5, down = 20 }]";
        let scenario = Scenario::parse(text).unwrap();
        assert_eq!(scenario.fastest(), [1, 2, 5]);
        let without = scenario.without_slower().unwrap().unwrap();
        assert_eq!((without.nodes(), without.fastest().len()), (4, 3));
        assert!(without.without_slower().unwrap().is_none());
        assert!(
            Scenario::parse(TWO)
                .unwrap()
                .without_slower()
                .unwrap()
                .is_none()
        );
    }
}
