//! Choosing the next request for a peer that has room: which blob, which piece, how much of it.
//!
//! What to do about requests that are late (stealing, hedging, timeouts) is in `late`.

use std::ops::Range;

use rand::RngExt;
use rand::rngs::SmallRng;

use super::blob::Blob;
use super::peer::Peer;
use super::view::View;
use super::yielding::Besides;
use super::{Downloads, Flight, Output, pace};
use crate::{PieceGeometry, RequestId, Time, spans};

/// How many pieces of one rarity are looked at for one that a seeder should be asked for.
const SEEDER_TRIES: usize = 3;
/// How many pieces of all rarities: bounds the search where a seeder is spared nearly everything.
const SEEDER_TRIES_IN_ALL: usize = 16;
/// A partial provider delivers if its rate is at least this part of the mean of those that send anything: well below
/// what fair shares and jitter make of equals, well above what a dripping peer sends.
const FAIR_PART: f64 = 0.25;
/// A request over several short pieces covers at most one part in this many of the blob, so that a small
/// blob is still spread over all peers.
const STRETCH: u64 = 256;

impl Downloads {
    /// Gives a peer one request, if it has room and there is something to ask it for.
    pub(super) fn give_request(&mut self, now: Time, slot: usize) -> bool {
        let Some(peer) = self.peers[slot].as_ref().filter(|peer| peer.has_room()) else {
            return false;
        };
        let (class, most) = (peer.class, peer.request_groups());
        if !self.is_next(now, slot, class) {
            return false;
        }
        let besides = self.besides(now, slot);
        let most = match besides {
            Besides::All => most.min(self.capped_groups(class)),
            Besides::OneGroup => 1,
            Besides::Nothing => return false,
        };
        let (across, mut waits) = (self.is_across(slot), false);
        for i in 0..self.order.len() {
            let at = self.order[i];
            let Some(blob) = self.blobs[at].as_mut().filter(|blob| blob.is_active()) else {
                continue;
            };
            let run = if across {
                let is_open = !blob.map.open().is_empty();
                let may = self.may_cross(now, at);
                let crosses = may && self.crosses_to(now, slot, at);
                // Nothing is taken over while something may be left to ask for.
                waits |= may && !crosses && is_open;
                crosses
                    .then(|| self.pick_beyond(now, slot, at, most))
                    .flatten()
            } else {
                pick(now, blob, &self.peers, slot, most, &mut self.rng)
            };
            if let Some(run) = run {
                self.issue(now, slot, at, run, false);
                return true;
            }
        }
        !waits && besides == Besides::All && self.steal(now, slot)
    }

    /// Outputs a request.
    pub(super) fn issue(
        &mut self,
        now: Time,
        slot: usize,
        at: usize,
        groups: Range<u64>,
        demand: bool,
    ) {
        let (Some(blob), Some(peer)) = (&mut self.blobs[at], &mut self.peers[slot]) else {
            return;
        };
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let bytes = blob.map.geometry().bytes(&groups);
        let cost = pace::cost(blob.map.geometry(), &groups);
        self.pace.limiter.reserve(now, peer.class, cost);
        blob.take(id, &groups);
        if let Some((view, _)) = blob.view_and_map(slot) {
            view.cursor = groups.end;
        }
        peer.asked(now, id, bytes);
        let (root, size) = (blob.root, blob.size());
        let full = !peer.has_room() && blob.view(slot).is_some_and(|view| !view.is_seeder());
        self.outputs.push_back(Output::Request {
            peer: peer.key,
            id,
            root,
            size,
            groups: groups.clone(),
            demand,
        });
        let flight = Flight {
            slot,
            blob: at,
            groups,
            bytes,
            cost,
            issued: now,
            began: None,
            arrived: 0,
            got: 0,
            demand,
            live: true,
            heir: None,
        };
        self.flights.insert(id, flight);
        self.note_reading(now, slot, at, demand);
        if self.is_across(slot) {
            self.review_crossing(now, at);
        }
        if full {
            self.wake_seeders(at);
        }
        self.arm_review(now, at);
    }

    /// Queues all that hold something of a blob, if something of it is open.
    pub(super) fn wake_providers(&mut self, at: usize) {
        let Some(blob) = &self.blobs[at] else { return };
        if blob.is_active() && !blob.map.open().is_empty() {
            let slots: Vec<_> = blob.providers().map(|(slot, _)| slot).collect();
            slots.into_iter().for_each(|slot| self.wake(slot));
        }
    }

    /// Queues a peer to be given requests, if it has room for one.
    pub(super) fn wake(&mut self, slot: usize) {
        if let Some(peer) = &mut self.peers[slot]
            && !peer.ready
            && peer.has_room()
        {
            peer.ready = true;
            self.ready.push_back(slot);
        }
    }

    /// A partial provider is full: seeders may now be asked for what it holds too.
    fn wake_seeders(&mut self, at: usize) {
        let Some(blob) = &self.blobs[at] else { return };
        let seeders: Vec<_> = blob
            .providers()
            .filter(|(_, view)| view.is_seeder())
            .map(|(slot, _)| slot)
            .collect();
        seeders.into_iter().for_each(|slot| self.wake(slot));
    }
}

/// The next run to ask a peer for.
fn pick(
    now: Time,
    blob: &mut Blob,
    peers: &[Option<Peer>],
    slot: usize,
    most: u64,
    rng: &mut SmallRng,
) -> Option<Range<u64>> {
    let start = if blob.view(slot)?.is_seeder() {
        let partial = Partial::of(now, blob, peers, slot);
        continued_by_seeder(blob, slot, &partial)
            .or_else(|| rarest_for_seeder(blob, &partial, rng))?
    } else if let Some(start) = continued(blob, slot) {
        start
    } else {
        let (view, map) = blob.view_and_map(slot)?;
        let piece = view.rarest_candidate(map, rng)?;
        view.first_open(map, piece)?.start
    };
    stretch(blob, slot, start, most)
}

/// Where the last run asked of this peer ended, if that is within a piece: a long piece is finished first.
fn continued(blob: &Blob, slot: usize) -> Option<u64> {
    let view = blob.view(slot)?;
    let (geometry, start) = (blob.map.geometry(), view.cursor);
    let inside = start < geometry.groups() && start % geometry.piece_groups() != 0;
    (inside && blob.map.open().contains(start) && view.have().contains(start)).then_some(start)
}

/// The same for a seeder: unless it has something better to do.
fn continued_by_seeder(blob: &Blob, slot: usize, partial: &Partial<'_>) -> Option<u64> {
    let start = continued(blob, slot)?;
    let spread = blob.map.partial(blob.map.geometry().piece_of(start)) > 0;
    let better = blob.map.has_unspread() || partial.are_enough && partial.deliver(start);
    (!spread || !better).then_some(start)
}

/// An open group of the rarest open piece, ties broken at random, that a seeder should be asked for: of one that no
/// partial provider holds, or else that none of them will deliver.
fn rarest_for_seeder(blob: &Blob, partial: &Partial<'_>, rng: &mut SmallRng) -> Option<u64> {
    let mut tries = SEEDER_TRIES_IN_ALL;
    for (rarity, bucket) in blob.map.buckets().iter().enumerate() {
        if bucket.is_empty() {
            continue;
        }
        for _ in 0..SEEDER_TRIES.min(tries) {
            let piece = bucket[rng.random_range(0..bucket.len())];
            let start = spans::overlaps(blob.map.open(), blob.map.geometry().groups_of(piece))
                .next()?
                .start;
            if rarity == 0 || !partial.deliver(start) {
                return Some(start);
            }
            tries -= 1;
        }
    }
    None
}

/// The partial providers of a blob, beside one seeder.
///
/// A seeder is spared what they hold while they deliver more than it does, all together: a publisher among equals so
/// sends each piece about once, and one that is much faster than they are helps them out. Otherwise they are preferred
/// only as long as they have room. What would come late from them is asked of the seeder in any case (see `late`).
struct Partial<'a> {
    blob: &'a Blob,
    peers: &'a [Option<Peer>],
    now: Time,
    seeder: usize,
    /// Whether the seeder is spared.
    are_enough: bool,
    /// Rate of one that counts as delivering: claims alone must not keep the seeder from being asked.
    fair: f64,
}

impl<'a> Partial<'a> {
    fn of(now: Time, blob: &'a Blob, peers: &'a [Option<Peer>], seeder: usize) -> Self {
        let rates = || partial(blob, peers, seeder).map(|(slot, _)| rate(now, peers, slot));
        let total: f64 = rates().sum();
        // Of a seeder that was hardly asked nothing is known: spared, it would stay unknown, whatever drips from the others.
        let known = peers[seeder].as_ref().and_then(|peer| peer.rate_at(now));
        let working = rates().filter(|rate| *rate > 0.0).count().max(1);
        Self {
            blob,
            peers,
            now,
            seeder,
            are_enough: known.is_some_and(|rate| total > rate),
            fair: total / working as f64 * FAIR_PART,
        }
    }

    /// Whether this group is better asked of one of them.
    fn deliver(&self, start: u64) -> bool {
        let mut holders = partial(self.blob, self.peers, self.seeder)
            .filter(|(_, view)| view.have().contains(start));
        holders.any(|(slot, _)| {
            if self.are_enough {
                rate(self.now, self.peers, slot) >= self.fair
            } else {
                self.peers[slot].as_ref().is_some_and(Peer::has_room)
            }
        })
    }
}

/// The partial providers on the seeder's side of the site's border.
fn partial<'a>(
    blob: &'a Blob,
    peers: &'a [Option<Peer>],
    seeder: usize,
) -> impl Iterator<Item = (usize, &'a View)> {
    let beyond = |slot: usize| peers[slot].as_ref().map(|peer| peer.is_beyond());
    let here = beyond(seeder);
    blob.providers()
        .filter(move |(slot, view)| !view.is_seeder() && beyond(*slot) == here)
}

/// What a peer delivers, in bytes a second; nothing if it may not be asked.
fn rate(now: Time, peers: &[Option<Peer>], slot: usize) -> f64 {
    let peer = peers[slot].as_ref().filter(|peer| peer.is_usable());
    peer.and_then(|peer| peer.rate_at(now)).unwrap_or_default()
}

/// How many groups a request may cover, where the peer may be asked for `most`.
pub(super) fn most_at_once(geometry: &PieceGeometry, most: u64) -> u64 {
    most.min((geometry.groups() / STRETCH).max(geometry.piece_groups()))
}

/// The run from an open group that the peer holds: to the end of the piece, and on through whole pieces that are no
/// less rare.
fn stretch(blob: &Blob, slot: usize, start: u64, most: u64) -> Option<Range<u64>> {
    let (view, geometry) = (blob.view(slot)?, blob.map.geometry());
    let piece = geometry.piece_of(start);
    let most = most_at_once(geometry, most);
    let mut run = spans::first_in_both(blob.map.open(), view.have(), start..start + most)?;
    let first = geometry.groups_of(piece);
    if run.end <= first.end {
        return Some(run);
    }
    let rarity = blob.map.partial(piece);
    let whole = geometry
        .pieces_touching(&(first.end..run.end))
        .take_while(|&other| {
            blob.map.partial(other) <= rarity && geometry.groups_of(other).end <= run.end
        });
    // Half a piece would be of as little use to the next peer as to us.
    run.end = whole
        .last()
        .map_or(first.end, |last| geometry.groups_of(last).end);
    Some(run)
}
