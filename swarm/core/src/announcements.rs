//! Which haves are told to whom, and when: batches within a budget.
//!
//! Only the timing and the audience. How an announcement is encoded, and that peers' own announcements
//! go to [`Downloads`](crate::Downloads), is the caller's business.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::{GroupRanges, group_count};

use crate::{Class, PeerKey, Time, spans};

/// Bytes that an announcement costs a peer: root hash, size, framing, TLS record.
const COST: f64 = 80.0;
/// Bytes that each run in it costs: two variable-length integers.
const RUN_COST: f64 = 5.0;
/// Least time between two deltas of one blob to other sites, from its gateway, at first and after a while, and from others: links between
/// sites are dear, and what could be fetched here is mostly to be had elsewhere.
const GATEWAY_FIRST: Duration = Duration::from_secs(2);
const GATEWAY_EVERY: Duration = Duration::from_secs(10);
const BEYOND_EVERY: Duration = Duration::from_secs(60);
/// Most roots in which one peer's lack of interest is remembered.
const MAX_UNINTERESTING: usize = 4096;

/// Tunables of [`Announcements`].
#[derive(Clone, Debug)]
pub struct AnnounceConfig {
    /// Least time between two deltas of one blob. Short: while a blob spreads, every hop waits for it.
    pub min_interval: Duration,
    /// Time between two deltas when the budget is used up: deltas then are larger, and cheaper by the group. On the way there it grows
    /// by and by, or those that are told much at the start would hear nothing for a while after.
    pub max_interval: Duration,
    /// What deltas may cost, as a part of the bytes received.
    pub budget: f64,
    /// What they may cost in advance, in bytes: the start, in which promptness is worth most, is free of the budget.
    pub advance: u64,
}

impl Default for AnnounceConfig {
    fn default() -> Self {
        Self {
            min_interval: Duration::from_millis(20),
            max_interval: Duration::from_millis(500),
            budget: 0.005,
            advance: 64 << 10,
        }
    }
}

impl AnnounceConfig {
    /// Time between two deltas when so much of the advance is left: the less, the longer.
    fn wait(&self, credit: f64) -> Duration {
        let used = 1.0 - (credit / self.advance as f64).clamp(0.0, 1.0);
        let longer = self.max_interval.saturating_sub(self.min_interval);
        self.min_interval + longer.mul_f64(used * used)
    }
}

/// What changed in what this node holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The ranges are held now.
    Have,
    /// The ranges are no longer held.
    Unhave,
}

/// An announcement to send: the same message to each of the peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announce {
    /// Who is told. Never empty, in order.
    pub peers: Vec<PeerKey>,
    /// The blob.
    pub root: RootHash,
    /// Its size in bytes.
    pub size: u64,
    /// Whether the ranges came or went.
    pub change: Change,
    /// The groups in question: all that is held (to a new peer, and on completion), or what is new.
    pub ranges: GroupRanges,
}

/// Decides which haves are announced to whom, and when.
///
/// A new peer is told all that is held. Then every peer is told of what comes, in batches: from 20 ms apart, at first, to 500 ms, such that
/// their cost stays within 0.5 % of the bytes received; except of blobs in which it has no interest
/// ([`set_interested`](Self::set_interested), for peers that hold all of it), of which it is told on completion only. What came from a publisher
/// ([`hurry`](Self::hurry)) does not wait for its batch. What goes is told
/// at once, so that nobody asks in vain. Other sites are told less, see [`peer_connected`](Self::peer_connected).
///
/// # Order of calls
/// 1. Any number of inputs, each with the current time.
/// 2. [`poll_announce`](Self::poll_announce) until it returns `None`, sending each.
/// 3. Wait until [`poll_timeout`](Self::poll_timeout) or the next event, then step 1 or 2 again.
///
/// # Bounds
/// What is held is given by the caller, who bounds it. By peer: 4,096 roots without interest.
#[derive(Debug)]
pub struct Announcements {
    config: AnnounceConfig,
    holdings: BTreeMap<RootHash, Holding>,
    peers: BTreeMap<PeerKey, Listener>,
    /// New peers, and how far they have been told.
    greetings: VecDeque<(PeerKey, Option<RootHash>)>,
    /// To be sent at once.
    urgent: VecDeque<Announce>,
    /// When the fresh groups of a blob are due.
    due: BTreeSet<(Time, RootHash)>,
    /// Bytes that deltas may still cost.
    credit: f64,
}

/// Who is told.
#[derive(Debug)]
struct Listener {
    class: Class,
    /// The roots in which it has no interest.
    uninteresting: BTreeSet<RootHash>,
}

/// What is held of a blob.
#[derive(Debug, Default)]
struct Holding {
    size: u64,
    held: GroupRanges,
    /// Held and not told yet.
    fresh: GroupRanges,
    /// Whether other sites are told before all of it is held; what they were not told yet, and when they last were.
    gateway: bool,
    fresh_beyond: GroupRanges,
    told_beyond: Option<Time>,
    gateway_wait: Duration,
    due: Option<Time>,
    told: Option<Time>,
}

impl Announcements {
    /// Nothing held, nobody connected.
    pub fn new(config: AnnounceConfig) -> Self {
        Self {
            credit: config.advance as f64,
            config,
            holdings: BTreeMap::new(),
            peers: BTreeMap::new(),
            greetings: VecDeque::new(),
            urgent: VecDeque::new(),
            due: BTreeSet::new(),
        }
    }

    /// Takes in that groups of a blob are now held (verified and stored).
    pub fn handle_held(&mut self, now: Time, root: RootHash, size: u64, ranges: &GroupRanges) {
        let holding = self.holdings.entry(root).or_default();
        holding.size = size;
        let fresh: GroupRanges = ranges
            .runs()
            .iter()
            .flat_map(|run| spans::gaps(&holding.held, run.clone()))
            .collect();
        if fresh.is_empty() {
            return;
        }
        self.credit = (self.credit + fresh.bytes(size) as f64 * self.config.budget)
            .min(self.config.advance as f64);
        holding.held.union_with(&fresh);
        holding.fresh.union_with(&fresh);
        let complete = holding.held.contains_run(&(0..group_count(size)));
        let wait = self.config.wait(self.credit);
        let due = match holding.told {
            Some(told) if !complete => (told + wait).max(now),
            // The first groups, and the last, are told at once.
            _ => now,
        };
        if holding.due.is_none_or(|other| due < other) {
            if let Some(other) = holding.due.replace(due) {
                self.due.remove(&(other, root));
            }
            self.due.insert((due, root));
        }
    }

    /// What is held of a blob and not told yet is to be told at once: others wait for it. For what came from a
    /// publisher, that is; what has spread already can wait for its batch.
    pub fn hurry(&mut self, now: Time, root: &RootHash) {
        let Some(holding) = self.holdings.get_mut(root) else {
            return;
        };
        if let Some(due) = &mut holding.due {
            self.due.remove(&(*due, *root));
            *due = now;
            self.due.insert((now, *root));
        }
    }

    /// Takes in that groups are no longer held. Told at once, so that nobody asks in vain.
    pub fn handle_dropped(&mut self, _now: Time, root: RootHash, ranges: &GroupRanges) {
        let Some(holding) = self.holdings.get_mut(&root) else {
            return;
        };
        let dropped = holding.held.intersection(ranges);
        holding.held = holding.held.difference(ranges);
        holding.fresh = holding.fresh.difference(ranges);
        holding.fresh_beyond = holding.fresh_beyond.difference(ranges);
        let size = holding.size;
        if holding.held.is_empty()
            && let Some(holding) = self.holdings.remove(&root)
            && let Some(due) = holding.due
        {
            self.due.remove(&(due, root));
        }
        let peers: Vec<_> = self.peers.keys().copied().collect();
        if !dropped.is_empty() && !peers.is_empty() {
            self.urgent.push_back(Announce {
                peers,
                root,
                size,
                change: Change::Unhave,
                ranges: dropped,
            });
        }
    }

    /// Takes in a new peer: it will be told all that is held. Then one of another site is told of what is complete, as links between
    /// sites are dear, and of the rest now and then: by a gateway of the blob after 2 s, then ever more seldom, down to every 10 s; by others
    /// every minute.
    pub fn peer_connected(&mut self, _now: Time, peer: PeerKey, class: Class) {
        let listener = Listener {
            class,
            uninteresting: BTreeSet::new(),
        };
        if self.peers.insert(peer, listener).is_none() && !self.holdings.is_empty() {
            self.greetings.push_back((peer, None));
        }
    }

    /// Says whether this node is a gateway of its site for a blob: then other sites are told more often what it holds of it, and at once
    /// what they were not told yet.
    pub fn set_gateway(&mut self, now: Time, root: &RootHash, gateway: bool) {
        let Some(holding) = self.holdings.get_mut(root) else {
            return;
        };
        let becomes = gateway && !holding.gateway;
        holding.gateway = gateway;
        if becomes {
            // Who becomes it again and again does not begin anew each time.
            let anew = holding
                .told_beyond
                .is_none_or(|told| now - told > GATEWAY_EVERY);
            self.tell_beyond(now, *root);
            if let Some(holding) = self.holdings.get_mut(root) {
                let wait = if anew {
                    GATEWAY_FIRST
                } else {
                    holding.gateway_wait
                };
                holding.gateway_wait = wait.max(GATEWAY_FIRST);
            }
        }
    }

    /// Forgets a peer.
    pub fn peer_disconnected(&mut self, _now: Time, peer: PeerKey) {
        self.peers.remove(&peer);
        self.greetings.retain(|(other, _)| *other != peer);
        for announce in &mut self.urgent {
            announce.peers.retain(|other| *other != peer);
        }
        self.urgent.retain(|announce| !announce.peers.is_empty());
    }

    /// Says whether a peer has interest in deltas of a blob. By default it has; one that holds all of it has none.
    /// When interest returns, the peer is told all that is held.
    pub fn set_interested(&mut self, _now: Time, peer: PeerKey, root: RootHash, interested: bool) {
        let Some(Listener { uninteresting, .. }) = self.peers.get_mut(&peer) else {
            return;
        };
        if !interested {
            if uninteresting.len() < MAX_UNINTERESTING {
                uninteresting.insert(root);
            }
        } else if uninteresting.remove(&root)
            && let Some(holding) = self.holdings.get(&root)
        {
            let (size, ranges) = (holding.size, holding.held.clone());
            self.urgent.push_back(Announce {
                peers: vec![peer],
                root,
                size,
                change: Change::Have,
                ranges,
            });
        }
    }

    /// The next announcement to send, if one is due.
    pub fn poll_announce(&mut self, now: Time) -> Option<Announce> {
        if let Some(announce) = self.urgent.pop_front() {
            return Some(announce);
        }
        if let Some(announce) = self.greet() {
            return Some(announce);
        }
        while let Some(&(due, root)) = self.due.first().filter(|(due, _)| *due <= now) {
            self.due.remove(&(due, root));
            if let Some(announce) = self.delta(now, root) {
                return Some(announce);
            }
        }
        None
    }

    /// When `poll_announce` will next have something, if nothing else happens.
    pub fn poll_timeout(&self) -> Option<Time> {
        if !self.urgent.is_empty() || !self.greetings.is_empty() {
            return Some(Time::ZERO);
        }
        self.due.first().map(|(due, _)| *due)
    }

    /// The next blob that a new peer is to be told of.
    fn greet(&mut self) -> Option<Announce> {
        while let Some((peer, after)) = self.greetings.pop_front() {
            let from = after.map_or(Bound::Unbounded, Bound::Excluded);
            if let Some((&root, holding)) = self.holdings.range((from, Bound::Unbounded)).next() {
                self.greetings.push_front((peer, Some(root)));
                let (size, ranges) = (holding.size, holding.held.clone());
                return Some(Announce {
                    peers: vec![peer],
                    root,
                    size,
                    change: Change::Have,
                    ranges,
                });
            }
        }
        None
    }

    /// Something is fresh of a blob of which not all is held: other sites are told of it when it is time.
    fn note_beyond(&mut self, now: Time, root: RootHash, fresh: &GroupRanges) {
        let Some(holding) = self.holdings.get_mut(&root) else {
            return;
        };
        holding.fresh_beyond.union_with(fresh);
        let every = if holding.gateway {
            holding.gateway_wait
        } else {
            BEYOND_EVERY
        };
        let due = *holding.told_beyond.get_or_insert(now) + every;
        if due <= now {
            self.tell_beyond(now, root);
        } else if !holding.fresh_beyond.is_empty()
            && self.peers.values().any(|peer| peer.class == Class::Beyond)
        {
            // If nothing else is told until then.
            let next = *holding.due.get_or_insert(due);
            self.due.insert((next, root));
        }
    }

    /// Other sites are told of what they were not told yet.
    fn tell_beyond(&mut self, now: Time, root: RootHash) {
        let peers = self.listening(&root, Class::Beyond);
        let Some(holding) = self.holdings.get_mut(&root) else {
            return;
        };
        if peers.is_empty() || holding.fresh_beyond.is_empty() {
            return;
        }
        holding.gateway_wait = (holding.gateway_wait * 3 / 2).min(GATEWAY_EVERY);
        holding.told_beyond = Some(now);
        self.urgent.push_back(Announce {
            peers,
            root,
            size: holding.size,
            change: Change::Have,
            ranges: std::mem::take(&mut holding.fresh_beyond),
        });
    }

    /// What is fresh of a blob.
    fn delta(&mut self, now: Time, root: RootHash) -> Option<Announce> {
        let holding = self.holdings.get_mut(&root)?;
        holding.due = None;
        holding.told = Some(now);
        let fresh = std::mem::take(&mut holding.fresh);
        let complete = holding.held.contains_run(&(0..group_count(holding.size)));
        // All that is held is one run then.
        let ranges = if complete {
            holding.held.clone()
        } else {
            fresh
        };
        let size = holding.size;
        let peers: Vec<_> = if complete {
            self.peers.keys().copied().collect()
        } else {
            self.note_beyond(now, root, &ranges);
            self.listening(&root, Class::Within)
        };
        if peers.is_empty() || ranges.is_empty() {
            return None;
        }
        self.credit -= peers.len() as f64 * (COST + RUN_COST * ranges.runs().len() as f64);
        Some(Announce {
            peers,
            root,
            size,
            change: Change::Have,
            ranges,
        })
    }

    /// The peers of a class that have interest in a blob.
    fn listening(&self, root: &RootHash, class: Class) -> Vec<PeerKey> {
        let listens =
            |listener: &Listener| listener.class == class && !listener.uninteresting.contains(root);
        let peers = self.peers.iter();
        peers
            .filter(|(_, listener)| listens(listener))
            .map(|(&peer, _)| peer)
            .collect()
    }
}
