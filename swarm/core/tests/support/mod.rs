//! A small discrete-event network that drives the real scheduler: nodes with shaped links, virtual time.
//!
//! Nodes (what a daemon would do around the scheduler) are in `node`, events and links in `world`.
//! Everything follows from the plan and its seed.

mod node;
mod world;

use std::fmt;
use std::time::Duration;

pub use world::World;

/// What a node does with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    pub up: f64,
    pub down: f64,
    pub delay: Duration,
}

impl Link {
    /// Equal both ways, in Mbit/s and milliseconds.
    pub fn symmetric(mbit: f64, delay_ms: f64) -> Self {
        let rate = mbit * 1e6 / 8.0;
        Self {
            up: rate,
            down: rate,
            delay: Duration::from_secs_f64(delay_ms / 1000.0),
        }
    }
}

/// One node of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    pub link: Link,
    pub manner: Manner,
    /// Whether it holds all of the blob at the start.
    pub seeds: bool,
}

/// A scenario.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    /// Bytes in the blob.
    pub size: u64,
    /// Node 0 is the publisher.
    pub members: Vec<Member>,
    /// Connections that each node opens to others at random; all to all if that is as many.
    pub degree: usize,
    /// If set, all nodes share processors that move so many bytes a second in all.
    pub processors: Option<f64>,
    /// The publisher leaves as soon as the others hold one full copy between them.
    pub publisher_dies: bool,
    /// Virtual time after which the run is a failure.
    pub give_up: Duration,
}

impl Plan {
    /// One publisher and `pullers` on equal links, everyone connected to everyone.
    pub fn equal(seed: u64, size: u64, pullers: usize, link: Link) -> Self {
        let member = |seeds| Member {
            link,
            manner: Manner::Honest,
            seeds,
        };
        let members = std::iter::once(member(true))
            .chain((0..pullers).map(|_| member(false)))
            .collect();
        Self {
            seed,
            size,
            members,
            degree: usize::MAX,
            processors: None,
            publisher_dies: false,
            give_up: Duration::from_secs(120),
        }
    }

    /// The least time from one publisher to all honest pullers: max(F/us, F/d, N F / (us + N u)) (Kumar and Ross 2006).
    pub fn bound(&self) -> f64 {
        let size = self.size as f64;
        let pullers: Vec<_> = self.members[1..]
            .iter()
            .filter(|m| m.manner == Manner::Honest && !m.seeds)
            .collect();
        let up: f64 = pullers.iter().map(|m| m.link.up).sum();
        let us: f64 = self
            .members
            .iter()
            .filter(|m| m.seeds && m.manner == Manner::Honest)
            .map(|m| m.link.up)
            .sum();
        let slowest = pullers
            .iter()
            .map(|m| m.link.down)
            .fold(f64::INFINITY, f64::min);
        let shared = self
            .processors
            .map_or(0.0, |rate| pullers.len() as f64 * size / rate);
        (size / us)
            .max(size / slowest)
            .max(pullers.len() as f64 * size / (us + up))
            .max(shared)
    }

    /// Runs it to the end.
    pub fn run(self) -> Report {
        World::new(self).run()
    }
}

/// How a run went.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub seed: u64,
    /// Seconds until the honest puller in question was complete, sorted.
    pub finished: Vec<f64>,
    /// Honest pullers that did not complete.
    pub unfinished: usize,
    pub bound: f64,
    /// Content bytes sent by the publisher / size.
    pub publisher_copies: f64,
    /// Verified bytes received more than once / all received.
    pub duplicates: f64,
    /// Bytes of requests, haves etc. / content bytes moved.
    pub control: f64,
    /// Bans, by (by whom, whom).
    pub bans: Vec<(usize, usize)>,
    /// Seconds until the publisher had sent one full copy.
    pub copy_out: f64,
    pub requests: u64,
    pub events: u64,
}

impl Report {
    pub fn last(&self) -> f64 {
        self.finished.last().copied().unwrap_or(f64::INFINITY)
    }

    /// What part of the best possible speed the last node saw.
    pub fn efficiency(&self) -> f64 {
        self.bound / self.last()
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
            self.finished
                .get(self.finished.len() / 2)
                .copied()
                .unwrap_or_default(),
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
