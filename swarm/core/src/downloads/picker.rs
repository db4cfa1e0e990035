//! Choosing the next request for a peer that has room: which blob, which piece, how much of it.
//!
//! What to do about requests that are late (stealing, hedging, timeouts) is in `late`.

use std::ops::Range;

use rand::RngExt;
use rand::rngs::SmallRng;

use super::blob::Blob;
use super::peer::Peer;
use super::view::View;
use super::{Downloads, Flight, Output};
use crate::{RequestId, Time, spans};

/// How many pieces of one rarity are looked at for one that a seeder should be asked for.
const SEEDER_TRIES: usize = 3;
/// A request over several short pieces covers at most one part in this many of the blob, so that a small
/// blob is still spread over all peers.
const STRETCH: u64 = 256;

impl Downloads {
    /// Gives a peer one request, if it has room and there is something to ask it for.
    pub(super) fn give_request(&mut self, now: Time, slot: usize) -> bool {
        let Some(peer) = self.peers[slot].as_ref().filter(|peer| peer.has_room()) else {
            return false;
        };
        let most = peer.request_groups();
        for i in 0..self.order.len() {
            let at = self.order[i];
            let Some(blob) = self.blobs[at].as_mut().filter(|blob| blob.is_active()) else {
                continue;
            };
            if let Some(run) = pick(blob, &self.peers, slot, most, &mut self.rng) {
                self.issue(now, slot, at, run, false);
                return true;
            }
        }
        self.steal(now, slot)
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
            issued: now,
            began: None,
            arrived: 0,
            got: 0,
            demand,
            live: true,
            heir: None,
        };
        self.flights.insert(id, flight);
        if full {
            self.wake_seeders(at);
        }
        self.arm_review(now, at);
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
    blob: &mut Blob,
    peers: &[Option<Peer>],
    slot: usize,
    most: u64,
    rng: &mut SmallRng,
) -> Option<Range<u64>> {
    let view = blob.view(slot)?;
    if let Some(run) = continued(blob, slot, most) {
        return Some(run);
    }
    let start = if view.is_seeder() {
        rarest_for_seeder(blob, peers, rng)?
    } else {
        let (view, map) = blob.view_and_map(slot)?;
        let piece = view.rarest_candidate(map, rng)?;
        view.first_open(map, piece)?.start
    };
    stretch(blob, slot, start, most)
}

/// The run after the last one asked of this peer, if that ended within a piece: a long piece is finished first.
fn continued(blob: &Blob, slot: usize, most: u64) -> Option<Range<u64>> {
    let view = blob.view(slot)?;
    let (geometry, start) = (blob.map.geometry(), view.cursor);
    let inside = start < geometry.groups() && start % geometry.piece_groups() != 0;
    if !inside || !blob.map.open().contains(start) || !view.have().contains(start) {
        return None;
    }
    let spread = blob.map.partial(geometry.piece_of(start)) > 0;
    if view.is_seeder() && spread && blob.map.has_unspread() {
        return None;
    }
    stretch(blob, slot, start, most)
}

/// An open group of the rarest open piece, ties broken at random, that a seeder should be asked for: of one that no
/// partial provider holds; or else one that none with room holds. So a publisher sends each piece about once.
fn rarest_for_seeder(blob: &Blob, peers: &[Option<Peer>], rng: &mut SmallRng) -> Option<u64> {
    let has_room = |slot: usize| peers[slot].as_ref().is_some_and(Peer::has_room);
    let with_room = |(slot, view): &(usize, &View)| !view.is_seeder() && has_room(*slot);
    for (rarity, bucket) in blob
        .map
        .buckets()
        .iter()
        .enumerate()
        .filter(|(_, bucket)| !bucket.is_empty())
    {
        for _ in 0..SEEDER_TRIES {
            let piece = bucket[rng.random_range(0..bucket.len())];
            let start = spans::overlaps(blob.map.open(), blob.map.geometry().groups_of(piece))
                .next()?
                .start;
            if rarity == 0
                || !blob
                    .providers()
                    .filter(with_room)
                    .any(|(_, view)| view.have().contains(start))
            {
                return Some(start);
            }
        }
    }
    None
}

/// The run from an open group that the peer holds: to the end of the piece, and on through whole pieces that are no
/// less rare.
fn stretch(blob: &Blob, slot: usize, start: u64, most: u64) -> Option<Range<u64>> {
    let (view, geometry) = (blob.view(slot)?, blob.map.geometry());
    let piece = geometry.piece_of(start);
    let most = most.min((geometry.groups() / STRETCH).max(geometry.piece_groups()));
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
