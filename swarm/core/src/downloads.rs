//! What this node fetches: the public face of the requester's side, and its inputs.
//!
//! Choosing what to ask of whom is in `picker`, how requests end in `requests`, what to do about lateness
//! in `late`, what caps allow in `pace`, what yields to readers in `yielding`, figures in `stats`. The tables are in `blob` (with `pieces` and `view`) and `peer`.

mod api;
mod audit;
mod blob;
mod border;
mod gateways;
mod late;
mod pace;
mod peer;
mod picker;
mod pieces;
mod requests;
mod site;
mod stats;
mod view;
mod yielding;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::{GroupRanges, MAX_CONTENT_LEN};
use rand::SeedableRng;
use rand::rngs::SmallRng;

pub use api::*;
pub use audit::Inconsistency;
use blob::Blob;
use pace::Pace;
use peer::Peer;
use requests::Flight;
use yielding::Reading;

use crate::rates::Class;
use crate::time::earliest;
use crate::{PeerKey, RequestId, Time, spans};

/// The requester's side: decides what is asked of whom, for many blobs at once.
///
/// # Order of calls
/// 1. Any number of inputs, each with the current time: all methods but the getters and the two polls.
/// 2. [`poll_output`](Self::poll_output) until it returns `None`, carrying out each output.
/// 3. Wait until [`poll_timeout`](Self::poll_timeout) or the next event, then step 1 or 2 again.
///
/// Every request that was output ends by exactly one of: all its groups have come
/// ([`handle_received`](Self::handle_received), once or in parts), [`handle_failed`](Self::handle_failed), or the
/// peer's disconnection. That holds for cancelled ones too: the provider answers a cancel that came in time
/// with "cancelled" ([`Failure::Cancelled`]), else with the response itself.
///
/// # Bounds
/// Blobs and peers by [`DownloadConfig`]; open requests by peer (128, so 32,768 in all by default); remembered haves
/// by peer (16,384 roots). Cost by event: logarithmic in the runs of a blob's sets, linear in its providers.
#[derive(Debug)]
pub struct Downloads {
    config: DownloadConfig,
    rng: SmallRng,
    slots: BTreeMap<PeerKey, usize>,
    peers: Vec<Option<Peer>>,
    roots: BTreeMap<RootHash, usize>,
    blobs: Vec<Option<Blob>>,
    /// The blobs by priority, then age.
    order: Vec<usize>,
    flights: BTreeMap<RequestId, Flight>,
    abandoned: BTreeSet<RequestId>,
    /// Requests taken back whose answer is awaited, and since when.
    cancelling: BTreeMap<RequestId, Time>,
    next_id: u64,
    /// Peers that may be given requests.
    ready: VecDeque<usize>,
    outputs: VecDeque<Output>,
    /// When lateness is looked at again.
    review_at: Option<Time>,
    /// Peers of other sites.
    beyond: usize,
    /// Whether notices of gateways are passed on.
    passes_on: bool,
    pace: Pace,
    /// By class.
    reading: [Reading; 2],
}

impl Downloads {
    /// No blobs, no peers; `seed` decides all random choices.
    pub fn new(config: DownloadConfig, seed: u64) -> Self {
        Self {
            config,
            rng: SmallRng::seed_from_u64(seed),
            slots: BTreeMap::new(),
            peers: Vec::new(),
            roots: BTreeMap::new(),
            blobs: Vec::new(),
            order: Vec::new(),
            flights: BTreeMap::new(),
            abandoned: BTreeSet::new(),
            cancelling: BTreeMap::new(),
            next_id: 0,
            ready: VecDeque::new(),
            outputs: VecDeque::new(),
            review_at: None,
            beyond: 0,
            passes_on: false,
            pace: Pace::default(),
            reading: Default::default(),
        }
    }

    /// Starts to fetch a blob. Haves that peers announced for it before are remembered and count.
    pub fn add_blob(&mut self, now: Time, spec: BlobSpec) -> Result<(), AddBlobError> {
        if self.roots.contains_key(&spec.root) {
            return Err(AddBlobError::Known(spec.root));
        }
        if self.roots.len() >= self.config.max_blobs {
            return Err(AddBlobError::TooMany(self.roots.len()));
        }
        if spec.size > MAX_CONTENT_LEN {
            return Err(AddBlobError::TooLarge {
                root: spec.root,
                size: spec.size,
            });
        }
        let mut blob = Blob::new(now, &spec, &self.config.me);
        for (slot, peer) in self.peers.iter_mut().enumerate() {
            let Some(peer) = peer else { continue };
            if let Some(ranges) = peer.haves.remove(&spec.root) {
                blob.add_have(slot, &ranges);
            }
        }
        let at = free_slot(&mut self.blobs, blob);
        self.roots.insert(spec.root, at);
        let blobs = &self.blobs;
        let priority = |at: usize| blobs[at].as_ref().map_or(0, |blob| blob.priority);
        let place = self
            .order
            .partition_point(|&other| priority(other) >= spec.priority);
        self.order.insert(place, at);
        self.blob_changed(now, at);
        Ok(())
    }

    /// Stops fetching a blob; its open requests are cancelled, and what comes of them is not counted.
    pub fn remove_blob(&mut self, now: Time, root: &RootHash) {
        let Some(at) = self.roots.remove(root) else {
            return;
        };
        self.order.retain(|&other| other != at);
        let ids: Vec<_> = self
            .flights
            .iter()
            .filter(|(_, flight)| flight.blob == at)
            .map(|(&id, _)| id)
            .collect();
        for id in ids {
            self.abandon(now, id);
            self.forget(id);
        }
        let Some(mut blob) = self.blobs[at].take() else {
            return;
        };
        for (slot, peer) in self.peers.iter_mut().enumerate() {
            if let (Some(peer), Some(have)) = (peer, blob.take_view(slot)) {
                peer.remember(root, &have);
            }
        }
    }

    /// Wants more of a blob.
    pub fn want(
        &mut self,
        now: Time,
        root: &RootHash,
        ranges: &GroupRanges,
    ) -> Result<(), UnknownBlob> {
        let at = self.at(root)?;
        if let Some(blob) = &mut self.blobs[at] {
            blob.extend_want(ranges);
        }
        self.blob_changed(now, at);
        Ok(())
    }

    /// Wants groups that somebody waits for: requested before everything else, and hedged when late. What is held of
    /// them is left out.
    pub fn demand(
        &mut self,
        now: Time,
        root: &RootHash,
        groups: &GroupRanges,
    ) -> Result<(), UnknownBlob> {
        let at = self.at(root)?;
        if let Some(blob) = &mut self.blobs[at] {
            blob.extend_want(groups);
            let lacking = blob.map.lacking().intersection(groups);
            blob.demanded.union_with(&lacking);
            let whole = blob.map.geometry().groups();
            blob.is_read |= blob.map.held().count() + blob.demanded.count() < whole;
        }
        self.blob_changed(now, at);
        Ok(())
    }

    /// Stops requesting a blob, keeping its state: a full disk, say. Open requests are cancelled; what still comes of
    /// them counts.
    pub fn pause_blob(
        &mut self,
        now: Time,
        root: &RootHash,
        reason: PauseReason,
    ) -> Result<(), UnknownBlob> {
        let at = self.at(root)?;
        let Some(blob) = &mut self.blobs[at] else {
            return Ok(());
        };
        blob.paused = Some(reason);
        blob.meter.stop(now);
        let ids: Vec<_> = blob.flights.by_age().collect();
        ids.into_iter().for_each(|id| self.abandon(now, id));
        Ok(())
    }

    /// Goes on with a paused blob.
    pub fn resume_blob(&mut self, now: Time, root: &RootHash) -> Result<(), UnknownBlob> {
        let at = self.at(root)?;
        if let Some(blob) = &mut self.blobs[at] {
            blob.paused = None;
            blob.meter.start(now);
        }
        self.blob_changed(now, at);
        Ok(())
    }

    /// Takes in a new peer. False if it is known already or there are too many: the caller should not use it.
    pub fn peer_connected(&mut self, now: Time, peer: PeerKey, class: Class) -> bool {
        if self.slots.contains_key(&peer) || self.slots.len() >= self.config.max_peers {
            return false;
        }
        let slot = free_slot(&mut self.peers, Peer::new(peer, class));
        self.slots.insert(peer, slot);
        self.beyond += usize::from(class == Class::Beyond);
        self.review_crossings(now);
        true
    }

    /// Forgets a peer; what was asked of it is asked of others.
    pub fn peer_disconnected(&mut self, now: Time, peer: PeerKey) {
        let Some(slot) = self.slots.remove(&peer) else {
            return;
        };
        for blob in self.blobs.iter_mut().flatten() {
            blob.take_view(slot);
            blob.received_of_gone += blob.received.remove(&peer).unwrap_or_default();
        }
        self.drop_flights_of(now, slot);
        (0..self.blobs.len()).for_each(|at| self.wake_providers(at));
        let gone = self.peers[slot].take();
        self.beyond -= usize::from(gone.is_some_and(|peer| peer.is_beyond()));
        self.review_crossings(now);
        self.ready.retain(|&other| other != slot);
        self.pace.waiting.retain(|&other| other != slot);
    }

    /// Takes in that a peer holds more of a blob, whether or not it is being fetched here.
    pub fn handle_have(&mut self, now: Time, peer: PeerKey, root: &RootHash, ranges: &GroupRanges) {
        let Some(slot) = self.usable_slot(peer) else {
            return;
        };
        match self.roots.get(root) {
            Some(&at) => {
                if let Some(blob) = &mut self.blobs[at] {
                    blob.add_have(slot, ranges);
                }
                self.rehome(now, at, slot, ranges);
                self.wake(slot);
                self.review_crossing(now, at);
                self.serve_demands(now, at);
                self.arm_review(now, at);
            }
            None => {
                if let Some(peer) = &mut self.peers[slot] {
                    peer.remember(root, ranges);
                }
            }
        }
    }

    /// Takes in that a peer no longer holds some of a blob.
    pub fn handle_unhave(
        &mut self,
        now: Time,
        peer: PeerKey,
        root: &RootHash,
        ranges: &GroupRanges,
    ) {
        let Some(slot) = self.usable_slot(peer) else {
            return;
        };
        match self.roots.get(root) {
            Some(&at) => {
                if let Some(blob) = &mut self.blobs[at] {
                    blob.remove_have(slot, ranges);
                }
                // Others may be asked for it now.
                self.wake_providers(at);
                self.review_crossing(now, at);
            }
            None => {
                let Some(peer) = &mut self.peers[slot] else {
                    return;
                };
                let left = peer
                    .haves
                    .remove(root)
                    .unwrap_or_default()
                    .difference(ranges);
                if !left.is_empty() {
                    peer.remember(root, &left);
                }
            }
        }
    }

    /// Takes in that `bytes` more of a response came, not yet verified. Feeds rates and timeouts; wanted for
    /// responses that take longer than some 10 ms. Bytes beyond the content asked for (hashes) are ignored.
    pub fn handle_progress(&mut self, now: Time, peer: PeerKey, id: RequestId, bytes: u64) {
        if let Some(slot) = self.slot_of_flight(peer, id) {
            self.count_arrival(now, id, bytes);
            self.wake(slot);
        }
    }

    /// Takes in that groups of a response are verified and stored. They need not be the whole request.
    ///
    /// True if no connected peer but seeders is known to hold them, or they came from beyond the site: others wait for them to be passed on, so
    /// they are to be announced at once ([`Announcements::hurry`](crate::Announcements::hurry)).
    pub fn handle_received(
        &mut self,
        now: Time,
        peer: PeerKey,
        id: RequestId,
        groups: &Range<u64>,
    ) -> bool {
        let Some(slot) = self.slot_of_flight(peer, id) else {
            return false;
        };
        let across = self.is_across(slot);
        let Some(flight) = self.flights.get_mut(&id) else {
            return false;
        };
        let groups = groups.start.max(flight.groups.start)..groups.end.min(flight.groups.end);
        if groups.is_empty() {
            return false;
        }
        let (at, demand) = (flight.blob, flight.demand);
        flight.got += spans::len(&groups);
        let ended = flight.got >= spans::len(&flight.groups);
        let Some(blob) = &mut self.blobs[at] else {
            return false;
        };
        let rare = blob.map.partial(blob.map.geometry().piece_of(groups.start)) == 0;
        let known = blob
            .map
            .geometry()
            .bytes(&(flight.groups.start..flight.groups.start + flight.got));
        let missed = known.saturating_sub(flight.arrived);
        blob.receive(now, peer, &groups);
        blob.crossing.received(now, &groups, across);
        self.count_arrival(now, id, missed);
        if demand {
            self.note_reading(now, slot, at, true);
        }
        if let Some(peer) = &mut self.peers[slot] {
            peer.served(now);
        }
        if ended {
            self.end(now, id);
        }
        self.cancel_superseded(now, at, &groups);
        self.report_completion(now, at);
        self.wake(slot);
        rare || across
    }

    /// Takes in that a request ended without (the rest of) its response.
    pub fn handle_failed(&mut self, now: Time, peer: PeerKey, id: RequestId, failure: Failure) {
        let Some(slot) = self.slot_of_flight(peer, id) else {
            return;
        };
        let Some(flight) = self.flights.get(&id).cloned() else {
            return;
        };
        self.end(now, id);
        let Some(peer) = &mut self.peers[slot] else {
            return;
        };
        match failure {
            Failure::Cancelled => self.hand_over(now, &flight),
            Failure::NotHeld => {
                peer.refused(now);
                if let Some(blob) = &mut self.blobs[flight.blob] {
                    blob.remove_have(slot, &flight.groups.clone().into());
                }
            }
            Failure::Busy | Failure::Lost => peer.busy(now),
            Failure::Corrupt => self.ban(now, slot, BanReason::Corrupt),
            Failure::Malformed => self.ban(now, slot, BanReason::Malformed),
            Failure::NotStored => {
                let active = self.blobs[flight.blob]
                    .as_ref()
                    .filter(|blob| blob.paused.is_none());
                if let Some(root) = active.map(|blob| blob.root) {
                    // Else the same content would be fetched in vain again and again.
                    let _ = self.pause_blob(now, &root, PauseReason::StoreFailed);
                }
            }
        }
        self.blob_changed(now, flight.blob);
        self.wake(slot);
    }

    /// The next instruction.
    pub fn poll_output(&mut self, now: Time) -> Option<Output> {
        if self.review_at.is_some_and(|at| at <= now) {
            self.review(now);
        }
        if self.pace.at.is_some_and(|at| at <= now) {
            self.go_on(now);
        }
        loop {
            if let Some(output) = self.outputs.pop_front() {
                return Some(output);
            }
            let slot = self.ready.pop_front()?;
            if let Some(peer) = &mut self.peers[slot] {
                peer.ready = false;
            }
            if self.give_request(now, slot) {
                self.wake(slot);
            }
        }
    }

    /// When to poll again if nothing else happens.
    pub fn poll_timeout(&self) -> Option<Time> {
        earliest(self.review_at, self.pace.at)
    }

    fn at(&self, root: &RootHash) -> Result<usize, UnknownBlob> {
        self.roots.get(root).copied().ok_or(UnknownBlob(*root))
    }

    fn usable_slot(&self, peer: PeerKey) -> Option<usize> {
        let slot = *self.slots.get(&peer)?;
        self.peers[slot]
            .as_ref()
            .is_some_and(|peer| !peer.banned)
            .then_some(slot)
    }

    fn report_completion(&mut self, now: Time, at: usize) {
        let Some(blob) = &mut self.blobs[at] else {
            return;
        };
        if blob.map.is_complete() && !blob.reported {
            blob.reported = true;
            blob.meter.stop(now);
            self.outputs.push_back(Output::Complete { root: blob.root });
        }
    }

    /// A blob was added or resumed, more of it is wanted, or some of it is open again.
    fn blob_changed(&mut self, now: Time, at: usize) {
        self.report_completion(now, at);
        self.serve_demands(now, at);
        self.wake_providers(at);
        self.review_crossing(now, at);
        self.arm_review(now, at);
    }

    fn ban(&mut self, now: Time, slot: usize, reason: BanReason) {
        let Some(peer) = &mut self.peers[slot] else {
            return;
        };
        peer.banned = true;
        peer.haves = BTreeMap::new();
        let key = peer.key;
        for blob in self.blobs.iter_mut().flatten() {
            blob.take_view(slot);
        }
        self.drop_flights_of(now, slot);
        self.outputs.push_back(Output::Ban { peer: key, reason });
    }
}

/// Puts a value into the first free slot.
fn free_slot<T>(slots: &mut Vec<Option<T>>, value: T) -> usize {
    let at = slots
        .iter()
        .position(Option::is_none)
        .unwrap_or(slots.len());
    if at == slots.len() {
        slots.push(None);
    }
    slots[at] = Some(value);
    at
}
