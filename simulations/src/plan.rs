//! What is simulated: the nodes, their links, and what happens to them. From a file by way of `file`.

use std::time::Duration;

use crate::bound::{Rates, fluid};

/// What a node does with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Manner {
    /// Serves what it holds.
    Honest,
    /// Announces everything, answers nothing.
    Stalls,
    /// Announces everything, sends a byte a second.
    Drips,
    /// Announces everything, refuses every request.
    Refuses,
    /// Announces everything, sends wrong bytes.
    Corrupts,
}

/// A link: bytes a second up and down, delay one way.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Bytes a second that leave.
    pub up: f64,
    /// Bytes a second that come.
    pub down: f64,
    /// Delay one way, to the middle of the network.
    pub delay: Duration,
}

impl Link {
    /// In Mbit/s and milliseconds.
    pub fn new(up_mbit: f64, down_mbit: f64, delay_ms: f64) -> Self {
        Self {
            up: up_mbit * 1e6 / 8.0,
            down: down_mbit * 1e6 / 8.0,
            delay: Duration::from_secs_f64(delay_ms / 1000.0),
        }
    }

    /// Equal both ways, in Mbit/s and milliseconds.
    pub fn symmetric(mbit: f64, delay_ms: f64) -> Self {
        Self::new(mbit, mbit, delay_ms)
    }
}

/// One node of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Its own link.
    pub link: Link,
    /// What it does with requests.
    pub manner: Manner,
    /// Whether it holds all of the blob at the start.
    pub seeds: bool,
    /// When it comes.
    pub joins: Duration,
    /// Number of its site in [`Plan::sites`].
    pub site: Option<usize>,
    /// Number of its group in [`Plan::groups`].
    pub group: usize,
}

impl Member {
    /// Honest, without the blob, there from the start.
    pub fn puller(link: Link) -> Self {
        Self {
            link,
            manner: Manner::Honest,
            seeds: false,
            joins: Duration::ZERO,
            site: None,
            group: 0,
        }
    }

    /// Honest, with all of the blob, there from the start.
    pub fn publisher(link: Link) -> Self {
        Self {
            seeds: true,
            ..Self::puller(link)
        }
    }

    /// Whether it is among those that the plan is about: honest, and in want of the blob.
    pub fn pulls(&self) -> bool {
        self.manner == Manner::Honest && !self.seeds
    }
}

/// A site: its nodes reach those of other sites through one shaped link.
#[derive(Clone, Debug)]
pub struct Site {
    /// What reports call it.
    pub name: String,
    /// The link to the other sites, which its nodes share.
    pub link: Link,
}

/// Nodes that are killed and come back with what they had committed.
#[derive(Clone, Copy, Debug)]
pub struct Churn {
    /// Part of the honest pullers that is killed, each once.
    pub fraction: f64,
    /// When the first may be killed.
    pub from: Duration,
    /// When the last may be killed.
    pub until: Duration,
    /// How long each is away.
    pub away: Duration,
}

/// A scenario.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What reports and failures call it.
    pub name: String,
    /// Decides all that is random.
    pub seed: u64,
    /// Bytes in the blob.
    pub size: u64,
    /// Names of the groups of members.
    pub groups: Vec<String>,
    /// Node 0 is the publisher.
    pub members: Vec<Member>,
    /// Connections that each node wants, and opens to others at random until it has them.
    pub degree: usize,
    /// Connections beyond which a node accepts no more.
    pub degree_max: usize,
    /// If set, all nodes share processors that move so many bytes a second in all.
    pub processors: Option<f64>,
    /// The publisher leaves as soon as the others hold one full copy between them.
    pub publisher_dies: bool,
    /// Who is killed, and comes back.
    pub churn: Option<Churn>,
    /// The sites, if there are several.
    pub sites: Vec<Site>,
    /// Virtual time after which the run ends in any case.
    pub give_up: Duration,
}

impl Plan {
    /// One publisher and `pullers` on equal links, everyone connected to everyone.
    pub fn equal(seed: u64, size: u64, pullers: usize, link: Link) -> Self {
        let puller = Member {
            group: 1,
            ..Member::puller(link)
        };
        Self {
            name: format!("equal-{}", pullers + 1),
            seed,
            size,
            groups: vec!["publisher".into(), "pullers".into()],
            members: std::iter::once(Member::publisher(link))
                .chain(std::iter::repeat_n(puller, pullers))
                .collect(),
            degree: usize::MAX,
            degree_max: usize::MAX,
            processors: None,
            publisher_dies: false,
            churn: None,
            sites: Vec::new(),
            give_up: Duration::from_secs(120),
        }
    }

    /// The least time, in seconds, in which all honest pullers can have the blob if it flows like water: [`fluid`], and the
    /// blob's size over the rate of each link between sites that it must cross.
    pub fn bound(&self) -> f64 {
        let size = self.size as f64;
        let pullers: Vec<_> = self.members.iter().filter(|m| m.pulls()).collect();
        let seeds: Vec<_> = self.members.iter().filter(|m| m.seeds).collect();
        let us: f64 = seeds.iter().map(|m| m.link.up).sum();
        let rates = pullers.iter().map(|m| Rates {
            up: m.link.up,
            down: m.link.down,
        });
        let shared = self
            .processors
            .map_or(0.0, |rate| pullers.len() as f64 * size / rate);
        let wan = self.sites.iter().enumerate().map(|(at, site)| {
            let here = |m: &&Member| m.site == Some(at);
            let published_here = seeds.iter().copied().any(|m| here(&m));
            if published_here && !seeds.iter().copied().all(|m| here(&m)) {
                0.0
            } else if published_here {
                let needed_elsewhere = pullers.iter().copied().any(|m| !here(&m));
                f64::from(u8::from(needed_elsewhere)) * size / site.link.up
            } else {
                let needed_here = pullers.iter().copied().any(|m| here(&m));
                f64::from(u8::from(needed_here)) * size / site.link.down
            }
        });
        wan.fold(fluid(size, us, rates).max(shared), f64::max)
    }
}
