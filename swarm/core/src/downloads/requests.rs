//! The life of a request after it was output: progress, end, cancelling, giving up.
//!
//! Keeps peers' and blobs' accounts of what is in flight in line; decides nothing about whom to ask next.

use std::collections::BTreeSet;
use std::ops::Range;

use super::{Downloads, Output};
use crate::{PeerKey, RequestId, Time};

/// Requests given up whose answer may still come: remembered so that it is not wasted, up to this number.
const MAX_ABANDONED: usize = 4096;

/// A request that was output and has not ended.
#[derive(Clone, Debug)]
pub(super) struct Flight {
    pub(super) slot: usize,
    pub(super) blob: usize,
    pub(super) groups: Range<u64>,
    pub(super) bytes: u64,
    /// What the response was expected to be on the link.
    pub(super) cost: u64,
    pub(super) issued: Time,
    /// When its first bytes came.
    pub(super) began: Option<Time>,
    /// Bytes of it that came, verified or not.
    pub(super) arrived: u64,
    /// Groups of it that came verified.
    pub(super) got: u64,
    pub(super) demand: bool,
    /// Whether it still is expected to be answered, and its groups count as in flight.
    pub(super) live: bool,
    /// Who gets the groups if the provider takes the request back.
    pub(super) heir: Option<usize>,
}

impl Flight {
    /// Whether some of its bytes have come, and more are expected.
    fn is_coming(&self) -> bool {
        self.live && self.began.is_some() && self.arrived < self.bytes
    }

    /// The part of the cost that so many of its bytes have.
    fn cost_of(&self, bytes: u64) -> u64 {
        let part = u128::from(self.cost) * u128::from(bytes) / u128::from(self.bytes.max(1));
        part as u64
    }
}

impl Downloads {
    /// The slot of the peer, if the request was asked of it and has not ended.
    pub(super) fn slot_of_flight(&self, peer: PeerKey, id: RequestId) -> Option<usize> {
        let slot = *self.slots.get(&peer)?;
        self.flights
            .get(&id)
            .is_some_and(|flight| flight.slot == slot)
            .then_some(slot)
    }

    /// Counts bytes of a response that came.
    pub(super) fn count_arrival(&mut self, now: Time, id: RequestId, bytes: u64) {
        let Some(flight) = self.flights.get_mut(&id) else {
            return;
        };
        let Some(peer) = &mut self.peers[flight.slot] else {
            return;
        };
        let bytes = bytes.min(flight.bytes - flight.arrived);
        let first = flight.arrived == 0 && bytes > 0;
        let begins = first && flight.live;
        let came = begins || flight.is_coming();
        if first {
            peer.started(now - flight.issued);
            flight.began = Some(now);
        }
        flight.arrived += bytes;
        let ends = came && !flight.is_coming();
        if !flight.live {
            // Taken out of line when it was given up.
            self.pace
                .limiter
                .reserve(now, peer.class, flight.cost_of(bytes));
        }
        peer.arrived(now, bytes, flight.live);
        let slot = flight.slot;
        self.note_transit(now, slot, bytes, begins);
        if ends {
            self.end_transit(now, slot);
        }
    }

    /// A request ended: its groups that are lacking are open again, unless in another request.
    pub(super) fn end(&mut self, now: Time, id: RequestId) {
        self.stop_expecting(now, id);
        self.forget(id);
    }

    /// Takes a request back and does not wait for it any more; its answer still counts if it comes.
    pub(super) fn abandon(&mut self, now: Time, id: RequestId) {
        let Some(flight) = self.flights.get(&id) else {
            return;
        };
        if flight.live {
            self.cancel(now, id);
        }
        self.stop_expecting(now, id);
        self.abandoned.insert(id);
        if self.abandoned.len() > MAX_ABANDONED
            && let Some(&oldest) = self.abandoned.first()
        {
            self.forget(oldest);
        }
    }

    pub(super) fn stop_expecting(&mut self, now: Time, id: RequestId) {
        self.cancelling.remove(&id);
        let Some(flight) = self.flights.get_mut(&id) else {
            return;
        };
        let (slot, was_coming) = (flight.slot, flight.is_coming());
        if !std::mem::take(&mut flight.live) {
            return;
        }
        if let Some(peer) = &mut self.peers[flight.slot] {
            let left = flight.bytes - flight.arrived;
            self.pace.limiter.refund(peer.class, flight.cost_of(left));
            peer.ended(now, id, left);
        }
        if let Some(blob) = &mut self.blobs[flight.blob] {
            blob.release(id, &flight.groups);
        }
        if was_coming {
            self.end_transit(now, slot);
        }
    }

    pub(super) fn forget(&mut self, id: RequestId) {
        self.flights.remove(&id);
        self.abandoned.remove(&id);
        self.cancelling.remove(&id);
    }

    /// Asks the provider to take a request back, once.
    pub(super) fn cancel(&mut self, now: Time, id: RequestId) {
        let Some(flight) = self.flights.get(&id) else {
            return;
        };
        let Some(peer) = &self.peers[flight.slot] else {
            return;
        };
        let key = peer.key;
        self.cancelling.entry(id).or_insert_with(|| {
            self.outputs.push_back(Output::Cancel { peer: key, id });
            now
        });
    }

    /// Cancels other requests for what has come.
    pub(super) fn cancel_superseded(&mut self, now: Time, at: usize, groups: &Range<u64>) {
        let Some(blob) = &self.blobs[at] else { return };
        let superseded: Vec<_> = blob
            .flights
            .touching(groups)
            .filter(|(_, run)| !blob.map.lacking().intersects(run))
            .map(|(id, _)| id)
            .collect();
        superseded.into_iter().for_each(|id| self.cancel(now, id));
    }

    /// Forgets all requests to a peer that will not answer any more, and that holds nothing for us any more.
    pub(super) fn drop_flights_of(&mut self, now: Time, slot: usize) {
        let key = self.peers[slot].as_ref().map(|peer| peer.key);
        self.outputs.retain(|output| match output {
            Output::Request { peer, .. } | Output::Cancel { peer, .. } => Some(*peer) != key,
            Output::Complete { .. } | Output::TellGateway { .. } | Output::Ban { .. } => true,
        });
        let ids: Vec<_> = self
            .flights
            .iter()
            .filter(|(_, flight)| flight.slot == slot)
            .map(|(&id, _)| id)
            .collect();
        let mut touched = BTreeSet::new();
        for id in ids {
            touched.extend(self.flights.get(&id).map(|flight| flight.blob));
            self.end(now, id);
        }
        touched
            .into_iter()
            .for_each(|at| self.blob_changed(now, at));
    }
}
