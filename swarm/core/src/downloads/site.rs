//! Fetching from beyond the site: who does, and what not.
//!
//! While peers of both kinds are connected, only a blob's gateways (see `gateways`) ask those beyond, and only for what nobody of the site
//! holds or is fetching, of few peers at a time (see `border`). The others wait for them; whoever gets nothing at all for a while helps
//! himself. Where the only peers are beyond, or none are, nothing of this applies.

use std::ops::Range;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::GroupRanges;
use rand::RngExt;

use super::api::{GatewayNotice, Output};
use super::blob::Blob;
use super::border::{Border, LEG};
use super::gateways::{Gateways, MAX_CLAIMED_RUNS};
use super::peer::Peer;
use super::picker::most_at_once;
use super::view::View;
use super::{Downloads, Flight};
use crate::time::earliest;
use crate::{NodeId, PeerKey, RequestId, Time, spans};

/// How long a node that would be a gateway waits for better ones to speak up.
const GRACE: Duration = Duration::from_millis(250);
/// How often a gateway says that it is there, if nothing changes.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// Least time between two notices.
const TELL_AFTER: Duration = Duration::from_millis(50);
/// Least time between two looks at all this, for one blob.
const LOOK_AFTER: Duration = Duration::from_millis(10);
/// A node to which nothing of a blob came for so long asks beyond whoever the gateways are: they may lie, or not be heard of.
const FORSAKEN_AFTER: Duration = Duration::from_secs(10);
/// Nodes that are forsaken help themselves one after the other, within this time.
const FORSAKEN_WITHIN: Duration = Duration::from_secs(5);
/// What came from beyond is claimed for so long, at least, until others of the site must have been told that it is held.
const CAME_LATELY: Duration = Duration::from_secs(1);
/// Peers to which a notice of another gateway is passed on, where not all of the site are connected to each other.
const PASS_ON: usize = 6;

/// What a node does about a blob's lying beyond.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// It leaves that to others.
    Waits,
    /// It said that it would do it, then.
    Offers(Time),
    /// It is one of the gateways.
    Gateway,
}

/// Whether a node tells its site what it fetches.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Told {
    /// All of it was.
    Already,
    /// It was not long ago, and it will be again.
    Soon,
    Now {
        sequence: u64,
        groups: GroupRanges,
    },
}

/// One blob's part in this.
#[derive(Clone, Debug)]
pub(super) struct Crossing {
    gateways: Gateways,
    role: Role,
    sequence: u64,
    /// What was last told, and when.
    told: GroupRanges,
    told_at: Option<Time>,
    border: Border,
    /// When something last came, or was first needed from beyond.
    moved: Time,
    needed: bool,
    looked: Option<Time>,
    /// What came from beyond in this second, and in the one before: others may not have been told of it as held yet.
    came: [GroupRanges; 2],
    second: Time,
}

impl Crossing {
    pub fn new(now: Time, root: RootHash, me: &NodeId) -> Self {
        Self {
            gateways: Gateways::new(root, me),
            role: Role::Waits,
            sequence: 0,
            told: GroupRanges::new(),
            told_at: None,
            border: Border::default(),
            moved: now,
            needed: false,
            looked: None,
            came: Default::default(),
            second: now,
        }
    }

    /// Whether this node is one of the gateways.
    pub fn is_gateway(&self) -> bool {
        self.role == Role::Gateway
    }

    /// Something came.
    pub fn received(&mut self, now: Time, groups: &Range<u64>, from_beyond: bool) {
        // What a node helps itself to does not mean that the others help it.
        if !from_beyond || self.is_gateway() {
            self.moved = now;
        }
        self.turn(now);
        if from_beyond {
            self.came[0].insert(groups.clone());
        }
    }

    fn turn(&mut self, now: Time) {
        if now - self.second >= CAME_LATELY {
            self.came.rotate_right(1);
            self.came[0] = GroupRanges::new();
            self.second = now;
        }
    }

    /// Takes in what this node now does, and asks beyond for; whether to tell the site of it.
    fn review(&mut self, now: Time, role: Role, needed: bool, asked: GroupRanges) -> Told {
        self.role = role;
        self.looked = Some(now);
        if needed && !self.needed {
            self.moved = now;
        }
        self.needed = needed;
        self.turn(now);
        let groups = self.claims(asked);
        let changed = groups != self.told;
        let due = self
            .told_at
            .is_none_or(|told| changed && now - told >= TELL_AFTER || now - told >= TELL_EVERY);
        if !due {
            return if changed { Told::Soon } else { Told::Already };
        }
        if role == Role::Waits && self.told.is_empty() && groups.is_empty() {
            return Told::Already;
        }
        self.sequence += 1;
        self.told.clone_from(&groups);
        self.told_at = Some(now);
        let sequence = self.sequence;
        Told::Now { sequence, groups }
    }

    /// What to say that is fetched: what was asked for, and what came lately. As much of it as may be said; who claims less may have
    /// some of it fetched twice.
    fn claims(&self, mut asked: GroupRanges) -> GroupRanges {
        self.came.iter().for_each(|came| asked.union_with(came));
        if asked.runs().len() <= MAX_CLAIMED_RUNS {
            return asked;
        }
        asked
            .runs()
            .iter()
            .take(MAX_CLAIMED_RUNS)
            .cloned()
            .collect()
    }

    fn may_ask(&self, now: Time) -> bool {
        self.is_gateway() || self.is_forsaken(now)
    }

    fn is_forsaken(&self, now: Time) -> bool {
        let lot = self.gateways.lot() % FORSAKEN_WITHIN.as_millis() as u64;
        now - self.moved > FORSAKEN_AFTER + Duration::from_millis(lot)
    }
}

impl Downloads {
    /// Takes in what a gateway of this site says of a blob; it may have been passed on by another peer of the site.
    pub fn handle_gateway(&mut self, now: Time, from: PeerKey, notice: &GatewayNotice) {
        let near = self
            .usable_slot(from)
            .filter(|&slot| !self.lies_beyond(slot));
        if near.is_none() || notice.node == self.config.me {
            return;
        }
        let Some(&at) = self.roots.get(&notice.root) else {
            return;
        };
        let Some(blob) = &mut self.blobs[at] else {
            return;
        };
        if !blob.crossing.gateways.hear(now, notice) {
            return;
        }
        let better = blob.crossing.gateways.claimed_by_better(now);
        self.yield_to(now, at, &better);
        if self.passes_on {
            let peers = self.some_of_site(from);
            let notice = notice.clone();
            self.outputs
                .push_back(Output::TellGateway { peers, notice });
        }
        self.review_crossing(now, at);
    }

    /// Says whether there are nodes of the site that are not connected to all others: notices of gateways are passed on then.
    pub fn pass_on_gateways(&mut self, pass_on: bool) {
        self.passes_on = pass_on;
    }

    /// Whether this node is a gateway for a blob just now.
    pub fn is_gateway(&self, root: &RootHash) -> bool {
        let blob = self.roots.get(root).and_then(|at| self.blobs[*at].as_ref());
        blob.is_some_and(|blob| blob.crossing.is_gateway())
    }

    /// Whether more peers of other sites had better be found for a blob: somebody there who holds all of it, for who fetches it on behalf
    /// of this site, as others there fetch it over the same links; for everybody else, somebody who holds what nobody connected does, if
    /// nobody holds anything, or nothing came for long. `None`: it is not being fetched.
    pub fn seeks_beyond(&self, now: Time, root: &RootHash) -> Option<bool> {
        let blob = self.blobs[*self.roots.get(root)?].as_ref()?;
        let answering = |slot: usize| {
            let peer = self.peers[slot].as_ref();
            peer.filter(|peer| !peer.banned && peer.backoff_until().is_none())
        };
        let holders = || {
            let providers = blob.providers().filter(|(_, view)| !view.have().is_empty());
            providers.filter_map(|(slot, view)| Some((answering(slot)?, view)))
        };
        Some(if !blob.is_active() {
            false
        } else if blob.crossing.is_gateway() {
            !holders().any(|(peer, view)| peer.is_beyond() && view.is_seeder())
        } else if holders().next().is_none() {
            true
        } else if blob.crossing.is_forsaken(now) {
            let mut lacking = blob.map.lacking().clone();
            for (_, view) in holders() {
                lacking = lacking.difference(view.have());
            }
            !lacking.is_empty()
        } else {
            false
        })
    }

    /// Whether there are peers within the site and beyond it.
    pub(super) fn is_divided(&self) -> bool {
        self.beyond > 0 && self.beyond < self.slots.len()
    }

    /// Whether this peer is beyond the site, and others are not.
    pub(super) fn is_across(&self, slot: usize) -> bool {
        self.is_divided() && self.lies_beyond(slot)
    }

    fn lies_beyond(&self, slot: usize) -> bool {
        self.peers[slot].as_ref().is_some_and(Peer::is_beyond)
    }

    /// Whether something came from this peer lately, or need not have.
    fn is_heard(&self, now: Time, slot: usize) -> bool {
        let peer = self.peers[slot].as_ref();
        peer.is_some_and(|peer| peer.silent_for(now) < LEG)
    }

    /// The peers of this site.
    fn of_site(&self) -> impl Iterator<Item = PeerKey> {
        let near = self.peers.iter().flatten();
        near.filter(|peer| !peer.is_beyond() && !peer.banned)
            .map(|peer| peer.key)
    }

    /// Whether peers beyond may be asked for a blob.
    pub(super) fn may_cross(&self, now: Time, at: usize) -> bool {
        let blob = self.blobs[at].as_ref();
        blob.is_some_and(|blob| blob.crossing.may_ask(now))
    }

    /// Whether a peer beyond is among the few that this node asks for a blob just now, or may become one of them: who holds all of it comes
    /// first, then who is asked already, and of those who gives most.
    pub(super) fn crosses_to(&self, now: Time, slot: usize, at: usize) -> bool {
        let Some(blob) = &self.blobs[at] else {
            return false;
        };
        if blob.crossing.is_forsaken(now) {
            return true;
        }
        let rank = |slot: usize, view: &View| {
            let peer = self.peers[slot].as_ref()?;
            let asked = peer.live.iter().any(|id| {
                let flight = self.flights.get(id);
                flight.is_some_and(|flight| flight.blob == at)
            });
            let rate = peer.rate_at(now).unwrap_or_default() as u64;
            // Who is neither asked nor holds all may have nothing that is lacking, and so keeps nobody back.
            let counts = peer.is_beyond() && (asked || view.is_seeder() && peer.has_room());
            Some((counts, (view.is_seeder(), asked, rate, slot)))
        };
        let own = blob.view(slot).and_then(|view| rank(slot, view));
        let Some((_, own)) = own else { return false };
        let before = blob.providers().filter(|(other, view)| {
            rank(*other, view).is_some_and(|(counts, other)| counts && other > own)
        });
        before.count() < blob.crossing.border.width()
    }

    /// What to ask a peer beyond for: what nobody of the site has or fetches. Long pieces are asked for in order; gateways begin
    /// each in their own part of the blob.
    pub(super) fn pick_beyond(
        &mut self,
        now: Time,
        slot: usize,
        at: usize,
        most: u64,
    ) -> Option<Range<u64>> {
        if !self.may_cross(now, at) {
            return None;
        }
        let blob = self.blobs[at].as_ref()?;
        let view = blob.view(slot)?;
        // Whoever is forsaken believes nobody any more.
        let others = if blob.crossing.is_forsaken(now) {
            GroupRanges::new()
        } else {
            let mut others = blob.crossing.gateways.claimed(now);
            others.union_with(&self.held_near(now, blob));
            others
        };
        let geometry = blob.map.geometry();
        let piece_groups = geometry.piece_groups();
        let goes_on = view.cursor < geometry.groups() && view.cursor % piece_groups != 0;
        let first = if goes_on {
            view.cursor
        } else {
            let (part, parts) = blob.crossing.gateways.part(now);
            let (pieces, any) = (
                u64::from(geometry.pieces()),
                self.rng.random_range(0..u64::MAX),
            );
            (pieces * part / parts + any % pieces.div_ceil(parts)) * piece_groups
        };
        let whole = 0..geometry.groups();
        let open = |run| first_crossable(blob, view, &others, run);
        let run = open(first..whole.end).or_else(|| open(0..first.min(whole.end)))?;
        Some(run.start..run.end.min(run.start + most_at_once(geometry, most)))
    }

    /// Sees to it that a blob has the gateways it needs, this node among them or not, and that the others know what it fetches.
    pub(super) fn review_crossing(&mut self, now: Time, at: usize) {
        if !self.is_divided() {
            return;
        }
        let Some(blob) = self.blobs[at].as_ref() else {
            return;
        };
        let soon = blob.crossing.looked.map(|looked| looked + LOOK_AFTER);
        if let Some(soon) = soon.filter(|soon| now < *soon) {
            self.review_at = earliest(self.review_at, Some(soon));
            return;
        }
        let lacking = blob.map.lacking().difference(&self.held_near(now, blob));
        let needed = blob.is_active() && self.is_beyond(blob, &lacking);
        let lacking = lacking.count();
        let (suffice, before) = (blob.crossing.gateways.suffice(now), blob.crossing.role);
        let role = match before {
            _ if !needed || suffice => Role::Waits,
            Role::Waits => Role::Offers(now),
            Role::Offers(since) if now - since >= GRACE => Role::Gateway,
            same => same,
        };
        let asked = self.asked_beyond(at);
        let asked: GroupRanges = asked.map(|(_, flight)| flight.groups.clone()).collect();
        let silent = !self
            .asked_beyond(at)
            .any(|(_, flight)| self.is_heard(now, flight.slot));
        let Some(blob) = &mut self.blobs[at] else {
            return;
        };
        let asks = role == Role::Gateway && !asked.is_empty();
        let told = blob.crossing.review(now, role, needed, asked);
        if asks {
            blob.crossing.border.turn(now, lacking, silent);
        } else {
            blob.crossing.border.rest();
        }
        if let Told::Now { sequence, groups } = &told {
            let notice = GatewayNotice {
                root: blob.root,
                node: self.config.me,
                sequence: *sequence,
                groups: groups.clone(),
            };
            let peers = self.of_site().collect();
            self.outputs
                .push_back(Output::TellGateway { peers, notice });
        }
        if needed {
            let wait = if told == Told::Soon {
                TELL_AFTER
            } else {
                GRACE
            };
            self.review_at = earliest(self.review_at, Some(now + wait));
        }
        if role != before || self.may_cross(now, at) {
            self.wake_providers(at);
        }
    }

    /// The same for all blobs: who is there has changed.
    pub(super) fn review_crossings(&mut self, now: Time) {
        for i in 0..self.order.len() {
            self.review_crossing(now, self.order[i]);
        }
    }

    /// Whether somebody beyond the site has something of what is lacking.
    fn is_beyond(&self, blob: &Blob, lacking: &GroupRanges) -> bool {
        !lacking.is_empty()
            && blob.providers().any(|(slot, view)| {
                let usable = self.peers[slot]
                    .as_ref()
                    .is_some_and(|peer| peer.is_beyond() && peer.is_usable());
                usable
                    && (view.is_seeder()
                        || lacking.runs().iter().any(|run| view.have().intersects(run)))
            })
    }

    /// What peers of the site hold of a blob, but for those that do not answer.
    fn held_near(&self, now: Time, blob: &Blob) -> GroupRanges {
        let mut held = GroupRanges::new();
        for (slot, view) in blob.providers() {
            let peer = self.peers[slot].as_ref();
            if peer.is_some_and(|peer| peer.gives_in_site(now)) {
                held.union_with(view.have());
            }
        }
        held
    }

    /// The open requests for a blob to peers beyond.
    fn asked_beyond(&self, at: usize) -> impl Iterator<Item = (RequestId, &Flight)> {
        let flights = self.flights.iter().map(|(&id, flight)| (id, flight));
        flights.filter(move |(_, flight)| {
            flight.blob == at && flight.live && self.lies_beyond(flight.slot)
        })
    }

    /// A better gateway fetches these: what this one asked for too, and has not begun to come, is taken back.
    fn yield_to(&mut self, now: Time, at: usize, claimed: &GroupRanges) {
        let both: Vec<_> = self
            .asked_beyond(at)
            .filter(|(_, flight)| {
                flight.arrived == 0 && !flight.demand && claimed.intersects(&flight.groups)
            })
            .map(|(id, _)| id)
            .collect();
        both.into_iter().for_each(|id| self.cancel(now, id));
    }

    /// Some peers of the site at random.
    fn some_of_site(&mut self, but: PeerKey) -> Vec<PeerKey> {
        let mut near: Vec<_> = self.of_site().filter(|&key| key != but).collect();
        for drawn in 0..near.len().min(PASS_ON) {
            let lot = self.rng.random_range(drawn..near.len());
            near.swap(drawn, lot);
        }
        near.truncate(PASS_ON);
        near
    }
}

/// The first stretch of a run that is open, that a peer holds, and that is not in `others`.
fn first_crossable(
    blob: &Blob,
    view: &View,
    others: &GroupRanges,
    run: Range<u64>,
) -> Option<Range<u64>> {
    spans::overlaps(blob.map.open(), run).find_map(|open| {
        spans::overlaps(view.have(), open)
            .find_map(|part| spans::gaps(others, part).into_iter().next())
    })
}
