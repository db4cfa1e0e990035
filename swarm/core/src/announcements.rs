//! Which haves are told to whom, and when: batches within a budget.
//!
//! Only the timing and the audience. How an announcement is encoded, and that peers' own announcements
//! go to [`Downloads`](crate::Downloads), is the caller's business.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::{GroupRanges, group_count};

use crate::{PeerKey, Time, spans};

/// Bytes that an announcement costs a peer: root hash, size, framing, TLS record.
const COST: f64 = 80.0;
/// Bytes that each run in it costs: two variable-length integers.
const RUN_COST: f64 = 5.0;
/// Least time between two deltas of one blob to other sites, from its gateway, and from others: links between sites are dear, and what could
/// be fetched here is mostly to be had elsewhere.
const GATEWAY_EVERY: Duration = Duration::from_secs(2);
const BEYOND_EVERY: Duration = Duration::from_secs(60);
/// Most roots in which one peer's lack of interest is remembered.
const MAX_UNINTERESTING: usize = 4096;

/// Tunables of [`Announcements`].
#[derive(Clone, Debug)]
pub struct AnnounceConfig {
    /// Least time between two deltas of one blob. Short: while a blob spreads, every hop waits for it.
    pub min_interval: Duration,
    /// Time between two deltas when the budget is used up: deltas then are larger, and cheaper by the group.
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
/// A new peer is told all that is held. Then every peer is told of what comes, in batches: 20 ms apart while the
/// cost stays within 0.5 % of the bytes received, else 500 ms apart; except of blobs in which it has no interest
/// ([`set_interested`](Self::set_interested), for peers that hold all of it), of which it is told on completion only. What came from a publisher
/// ([`hurry`](Self::hurry)) does not wait for its batch. What goes is told
/// at once, so that nobody asks in vain. Other sites are told less, see [`peer_beyond_connected`](Self::peer_beyond_connected).
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
    /// Whether it is in another site.
    beyond: bool,
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
        let wait = if self.credit > 0.0 {
            self.config.min_interval
        } else {
            self.config.max_interval
        };
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

    /// Takes in a new peer: it will be told all that is held.
    pub fn peer_connected(&mut self, now: Time, peer: PeerKey) {
        self.connected(now, peer, false);
    }

    /// Takes in a new peer of another site: it is told all that is held too, but then, as links between sites are dear, only of what is
    /// complete, and of blobs for which this node is a gateway.
    pub fn peer_beyond_connected(&mut self, now: Time, peer: PeerKey) {
        self.connected(now, peer, true);
    }

    fn connected(&mut self, _now: Time, peer: PeerKey, beyond: bool) {
        let listener = Listener {
            beyond,
            uninteresting: BTreeSet::new(),
        };
        if self.peers.insert(peer, listener).is_none() && !self.holdings.is_empty() {
            self.greetings.push_back((peer, None));
        }
    }

    /// Says whether this node is a gateway of its site for a blob: then other sites are told all that it holds of it.
    pub fn set_gateway(&mut self, now: Time, root: &RootHash, gateway: bool) {
        let Some(holding) = self.holdings.get_mut(root) else {
            return;
        };
        let becomes = gateway && !holding.gateway;
        holding.gateway = gateway;
        let peers = listening_beyond(&self.peers, root);
        if becomes && !peers.is_empty() && !holding.fresh_beyond.is_empty() {
            holding.told_beyond = Some(now);
            self.urgent.push_back(Announce {
                peers,
                root: *root,
                size: holding.size,
                change: Change::Have,
                ranges: std::mem::take(&mut holding.fresh_beyond),
            });
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

    /// Other sites are told of what is fresh now and then: more often where this node is a gateway.
    fn tell_beyond(&mut self, now: Time, root: RootHash, fresh: &GroupRanges, complete: bool) {
        let Some(holding) = self.holdings.get_mut(&root) else {
            return;
        };
        holding.fresh_beyond.union_with(fresh);
        let told = *holding.told_beyond.get_or_insert(now);
        let peers = listening_beyond(&self.peers, &root);
        if complete || peers.is_empty() || holding.fresh_beyond.is_empty() {
            return;
        }
        let due = told
            + if holding.gateway {
                GATEWAY_EVERY
            } else {
                BEYOND_EVERY
            };
        if due > now {
            // If nothing else is told until then.
            let next = *holding.due.get_or_insert(due);
            self.due.insert((next, root));
            return;
        }
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
        let listens = |listener: &Listener| !listener.uninteresting.contains(&root);
        let told = |listener: &Listener| complete || listens(listener) && !listener.beyond;
        let peers: Vec<_> = self
            .peers
            .iter()
            .filter(|(_, listener)| told(listener))
            .map(|(&peer, _)| peer)
            .collect();
        self.tell_beyond(now, root, &fresh, complete);
        let holding = self.holdings.get(&root)?;
        // All that is held is one run then.
        let ranges = if complete {
            holding.held.clone()
        } else {
            fresh
        };
        if peers.is_empty() || ranges.is_empty() {
            return None;
        }
        self.credit -= peers.len() as f64 * (COST + RUN_COST * ranges.runs().len() as f64);
        Some(Announce {
            peers,
            root,
            size: holding.size,
            change: Change::Have,
            ranges,
        })
    }
}

/// The peers of other sites that are told of a blob before all of it is held.
fn listening_beyond(peers: &BTreeMap<PeerKey, Listener>, root: &RootHash) -> Vec<PeerKey> {
    let listens = |listener: &Listener| listener.beyond && !listener.uninteresting.contains(root);
    let beyond = peers.iter().filter(|(_, listener)| listens(listener));
    beyond.map(|(&peer, _)| peer).collect()
}

#[cfg(test)]
mod tests {
    use capsule_proto::ranges::GROUP_LEN;

    use super::*;

    const SIZE: u64 = 100 * GROUP_LEN;

    fn at(ms: u64) -> Time {
        Time::from_start(Duration::from_millis(ms))
    }

    fn root(i: u8) -> RootHash {
        RootHash::of(&[i])
    }

    fn all(announcements: &mut Announcements, ms: u64) -> Vec<(Vec<u64>, Vec<u64>)> {
        let poll = || announcements.poll_announce(at(ms));
        let brief = |a: Announce| {
            (
                a.peers.iter().map(|p| p.0).collect(),
                a.ranges.iter().collect(),
            )
        };
        std::iter::from_fn(poll).map(brief).collect()
    }

    #[test]
    fn new_peers_are_told_all_and_then_deltas_in_batches() {
        let mut announcements = Announcements::new(AnnounceConfig::default());
        announcements.handle_held(at(0), root(1), SIZE, &(0..2).into());
        assert_eq!(all(&mut announcements, 0), []);
        announcements.peer_connected(at(1), PeerKey(7));
        assert_eq!(all(&mut announcements, 1), [(vec![7], vec![0, 1])]);
        announcements.handle_held(at(5), root(1), SIZE, &(5..6).into());
        announcements.handle_held(at(6), root(1), SIZE, &(8..9).into());
        assert_eq!(announcements.poll_timeout(), Some(at(20)));
        assert_eq!(all(&mut announcements, 19), []);
        assert_eq!(all(&mut announcements, 20), [(vec![7], vec![5, 8])]);
        assert_eq!(announcements.poll_timeout(), None);
    }

    #[test]
    fn what_others_wait_for_is_told_at_once() {
        let mut announcements = Announcements::new(AnnounceConfig::default());
        announcements.peer_connected(at(0), PeerKey(1));
        announcements.handle_held(at(0), root(1), SIZE, &(0..1).into());
        assert_eq!(all(&mut announcements, 0).len(), 1);
        announcements.hurry(at(1), &root(1));
        assert_eq!(announcements.poll_timeout(), None);
        announcements.handle_held(at(2), root(1), SIZE, &(7..8).into());
        announcements.hurry(at(2), &root(1));
        assert_eq!(all(&mut announcements, 2), [(vec![1], vec![7])]);
    }

    #[test]
    fn who_has_no_interest_is_told_of_completion_only() {
        let mut announcements = Announcements::new(AnnounceConfig::default());
        [1, 2]
            .into_iter()
            .for_each(|peer| announcements.peer_connected(at(0), PeerKey(peer)));
        announcements.set_interested(at(0), PeerKey(2), root(1), false);
        announcements.handle_held(at(0), root(1), SIZE, &(0..1).into());
        assert_eq!(all(&mut announcements, 0), [(vec![1], vec![0])]);
        announcements.set_interested(at(1), PeerKey(2), root(1), true);
        assert_eq!(all(&mut announcements, 1), [(vec![2], vec![0])]);
        announcements.set_interested(at(1), PeerKey(2), root(1), false);
        announcements.handle_held(at(2), root(1), SIZE, &(1..100).into());
        assert_eq!(
            all(&mut announcements, 2),
            [(vec![1, 2], (0..100).collect())]
        );
    }

    #[test]
    fn other_sites_are_told_what_a_gateway_holds_now_and_then() {
        let mut announcements = Announcements::new(AnnounceConfig::default());
        announcements.peer_connected(at(0), PeerKey(1));
        announcements.peer_beyond_connected(at(0), PeerKey(2));
        announcements.handle_held(at(0), root(1), SIZE, &(0..1).into());
        assert_eq!(all(&mut announcements, 0), [(vec![1], vec![0])]);
        announcements.set_gateway(at(1), &root(1), true);
        announcements.set_gateway(at(2), &root(1), true);
        assert_eq!(all(&mut announcements, 2), [(vec![2], vec![0])]);
        announcements.handle_held(at(100), root(1), SIZE, &(1..2).into());
        assert_eq!(all(&mut announcements, 100), [(vec![1], vec![1])]);
        announcements.handle_dropped(at(200), root(1), &(1..2).into());
        assert_eq!(all(&mut announcements, 200), [(vec![1, 2], vec![1])]);
        announcements.handle_held(at(1_900), root(1), SIZE, &(5..7).into());
        assert_eq!(all(&mut announcements, 1_900), [(vec![1], vec![5, 6])]);
        announcements.handle_held(at(2_100), root(1), SIZE, &(7..8).into());
        let told = [(vec![1], vec![7]), (vec![2], vec![5, 6, 7])];
        assert_eq!(all(&mut announcements, 2_100), told);
        announcements.set_gateway(at(2_200), &root(1), false);
        announcements.handle_held(at(9_000), root(1), SIZE, &(8..9).into());
        assert_eq!(all(&mut announcements, 9_000), [(vec![1], vec![8])]);
        announcements.handle_held(at(9_100), root(1), SIZE, &(0..100).into());
        assert_eq!(
            all(&mut announcements, 9_100),
            [(vec![1, 2], (0..100).collect())]
        );
    }

    #[test]
    fn what_goes_is_told_at_once() {
        let mut announcements = Announcements::new(AnnounceConfig::default());
        announcements.peer_connected(at(0), PeerKey(1));
        announcements.handle_held(at(0), root(1), SIZE, &(0..4).into());
        assert_eq!(all(&mut announcements, 0).len(), 1);
        announcements.handle_dropped(at(1), root(1), &(2..50).into());
        let told = announcements.poll_announce(at(1)).expect("told at once");
        assert_eq!((told.change, told.ranges), (Change::Unhave, (2..4).into()));
        announcements.handle_dropped(at(1), root(1), &(0..4).into());
        announcements.peer_disconnected(at(1), PeerKey(1));
        assert_eq!(all(&mut announcements, 1), []);
    }

    #[test]
    fn beyond_the_budget_batches_grow() {
        let mut announcements = Announcements::new(AnnounceConfig {
            advance: 1000,
            ..Default::default()
        });
        (0..20).for_each(|peer| announcements.peer_connected(at(0), PeerKey(peer)));
        let mut told = 0;
        for ms in 0..1900 {
            let group = ms / 19;
            announcements.handle_held(at(ms), root(1), SIZE, &(group..group + 1).into());
            told += all(&mut announcements, ms).len();
        }
        assert!((4..8).contains(&told), "{told}");
    }
}
