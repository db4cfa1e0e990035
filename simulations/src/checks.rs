//! What must hold at every step of a run. A check that fails ends the run, and says how to see it again.
//!
//! Always on: windows are within their bounds at each request; what is served and what counts as complete has come unspoilt;
//! with each response as many groups count as held as came unspoilt, which never shrink, not even by a restart.
//! Every [`AUDIT_EVERY`] events, of the node that the event was for: each piece is in exactly one state, all tables of
//! the scheduler agree ([`Downloads::audit`](capsule_swarm_core::Downloads::audit)), queues are within their bounds, and
//! the scheduler counts as held the very groups that came unspoilt. With each sample of
//! the curves, and at the end: nobody waits beside a connected honest provider of what it lacks.

use std::time::Duration;

use capsule_swarm_core::{PeerKey, Time};
use thiserror::Error;

use crate::node::Node;
use crate::plan::Manner;
use crate::world::World;

/// How many events lie between two audits.
pub const AUDIT_EVERY: u64 = 1009;
/// Longest time without a byte beside a provider: twice the scheduler's longest patience with a silent peer, in which it
/// must have turned to another.
pub const MOST_PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that may be asked of one peer at once: the largest window, and one request on top.
const MAX_OUTSTANDING: u64 = (32 << 20) + (1 << 20);
/// Requests that may wait at a provider, by peer.
const MAX_QUEUED: usize = 128;
/// Bytes that a provider may have handed to its link: in all, and one response by peer.
const MAX_IN_FLIGHT: (u64, u64) = (16 << 20, 1 << 20);

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum Fault {
    /// Content that never came unspoilt is taken for held.
    #[error("it takes for held what never came unspoilt: {0}")]
    Unverified(String),
    /// Content that was committed is no longer counted.
    #[error("it no longer counts what it had committed: {0}")]
    Lost(String),
    /// The tables of the scheduler contradict each other.
    #[error("its tables contradict each other: {0}")]
    Inconsistent(String),
    /// A window or queue is beyond its bound.
    #[error("beyond its bound: {0}")]
    Unbounded(String),
    /// The scheduler did what it must not.
    #[error("out of order: {0}")]
    Scheduler(String),
    /// Nothing comes, although somebody has it.
    #[error(
        "it waits since {since:.3} s for blob {blob}, of which node {provider} has what it lacks"
    )]
    Stuck {
        /// Seconds at which something last came.
        since: f64,
        /// The blob.
        blob: String,
        /// Who could have been asked.
        provider: usize,
    },
}

/// A check that failed, and how to see it again.
#[derive(Clone, Debug, PartialEq, Error)]
#[error(
    "plan {plan}, seed {seed}, at {at:.6} s, node {node}: {fault}; the plan with --seed {seed} replays it"
)]
pub struct Violation {
    /// Name of the plan.
    pub plan: String,
    /// Seed of the run.
    pub seed: u64,
    /// Seconds of virtual time.
    pub at: f64,
    /// Number of the node.
    pub node: usize,
    /// What is wrong.
    pub fault: Fault,
}

impl Node {
    /// A request was output to this peer.
    pub(crate) fn check_window(&mut self, peer: PeerKey) {
        let outstanding = self.downloads.peer_stats(peer).map(|s| s.outstanding);
        if outstanding.is_none_or(|bytes| bytes > MAX_OUTSTANDING) {
            self.fault = Some(Fault::Unbounded(format!(
                "{outstanding:?} bytes asked of one peer"
            )));
        }
    }

    /// A response was taken in.
    pub(crate) fn check_held(&mut self) {
        let held = self.downloads.held(self.root()).map(|held| held.count());
        let stored = self.stored.count();
        match held {
            Some(held) if held > stored => {
                let what = format!("{} groups of {held}", held - stored);
                self.fault = Some(Fault::Unverified(what));
            }
            Some(held) if held < stored => {
                let what = format!("{} groups of {stored}", stored - held);
                self.fault = Some(Fault::Lost(what));
            }
            _ => {}
        }
    }

    /// Looks at all that a node knows.
    pub(crate) fn audit(&self) -> Result<(), Fault> {
        self.downloads
            .audit()
            .map_err(|error| Fault::Inconsistent(error.to_string()))?;
        if let Some(held) = self.downloads.held(self.root()) {
            let unverified = held.difference(&self.stored);
            if !unverified.is_empty() {
                return Err(Fault::Unverified(format!("{unverified:?}")));
            }
            let lost = self.stored.difference(held);
            if !lost.is_empty() {
                return Err(Fault::Lost(format!("{lost:?}")));
            }
        }
        let (stats, peers) = (self.uploads.stats(), self.neighbours.len());
        if stats.queued > MAX_QUEUED * peers {
            return Err(Fault::Unbounded(format!("{} requests wait", stats.queued)));
        }
        if stats.in_flight > MAX_IN_FLIGHT.0 + MAX_IN_FLIGHT.1 * peers as u64 {
            return Err(Fault::Unbounded(format!(
                "{} bytes in flight",
                stats.in_flight
            )));
        }
        Ok(())
    }
}

impl World {
    /// A node was given an event.
    pub(crate) fn check_node(&mut self, at: usize) {
        if let Some(fault) = self.nodes[at].fault.take() {
            self.fail(at, fault);
        }
        if self.carried_out.is_multiple_of(AUDIT_EVERY)
            && self.nodes[at].alive
            && let Err(fault) = self.nodes[at].audit()
        {
            self.fail(at, fault);
        }
    }

    /// Looks at everybody that waits.
    pub(crate) fn check_progress(&mut self) {
        for at in 0..self.nodes.len() {
            let node = &self.nodes[at];
            let waits = node.alive && node.member.pulls() && node.finished.is_none();
            if !waits || self.now - node.heard <= MOST_PATIENCE / 2 {
                continue;
            }
            let Some(provider) = self.provider_of(node) else {
                self.nodes[at].offered = None;
                continue;
            };
            let offered = *self.nodes[at].offered.get_or_insert(self.now);
            if self.now - offered > MOST_PATIENCE {
                let node = &self.nodes[at];
                let fault = Fault::Stuck {
                    since: node.heard.since_start().as_secs_f64(),
                    blob: node.root().to_string(),
                    provider,
                };
                self.fail(at, fault);
            }
        }
    }

    /// A connected honest node that has something that this one lacks.
    fn provider_of(&self, node: &Node) -> Option<usize> {
        let useful = |other: &Node| {
            let honest = other.alive && other.member.manner == Manner::Honest;
            honest && !other.stored.difference(&node.stored).is_empty()
        };
        node.neighbours
            .iter()
            .map(|n| n.node)
            .find(|&other| useful(&self.nodes[other]))
    }

    fn fail(&mut self, node: usize, fault: Fault) {
        let at = self.now.since_start().as_secs_f64();
        self.violation.get_or_insert_with(|| Violation {
            plan: self.plan.name.clone(),
            seed: self.plan.seed,
            at,
            node,
            fault,
        });
    }

    /// Virtual time.
    pub fn now(&self) -> Time {
        self.now
    }
}
