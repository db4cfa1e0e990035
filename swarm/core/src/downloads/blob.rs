//! One blob being fetched: its piece map, the views of its providers, the runs in flight, its figures.
//!
//! Keeps these consistent with each other; decides nothing about whom to ask.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::GroupRanges;

use super::api::{BlobSpec, PauseReason};
use super::pieces::PieceMap;
use super::site::Crossing;
use super::view::View;
use crate::meter::RateMeter;
use crate::{MAX_REQUEST_GROUPS, NodeId, PeerKey, PieceGeometry, RequestId, Time, spans};

/// A blob being fetched.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    pub(crate) root: RootHash,
    pub(crate) priority: u8,
    pub(crate) map: PieceMap,
    /// By the slot of the peer.
    views: Vec<Option<Box<View>>>,
    pub(crate) flights: Flights,
    /// What somebody waits for and is not held.
    pub(crate) demanded: GroupRanges,
    /// Whether somebody demanded a part of it.
    pub(crate) is_read: bool,
    pub(crate) paused: Option<PauseReason>,
    /// Whether its completion was reported.
    pub(crate) reported: bool,
    pub(crate) received: BTreeMap<PeerKey, u64>,
    pub(crate) received_of_gone: u64,
    pub(crate) duplicate: u64,
    pub(crate) meter: RateMeter,
    /// Fetching it from beyond the site.
    pub(super) crossing: Crossing,
}

impl Blob {
    pub(crate) fn new(now: Time, spec: &BlobSpec, me: &NodeId) -> Self {
        let mut meter = RateMeter::default();
        meter.start(now);
        Self {
            root: spec.root,
            priority: spec.priority,
            map: PieceMap::new(PieceGeometry::of(spec.size), &spec.have, &spec.want),
            views: Vec::new(),
            flights: Flights::default(),
            demanded: GroupRanges::new(),
            is_read: false,
            paused: None,
            reported: false,
            received: BTreeMap::new(),
            received_of_gone: 0,
            duplicate: 0,
            meter,
            crossing: Crossing::new(now, spec.root, me),
        }
    }

    pub(crate) fn size(&self) -> u64 {
        self.map.geometry().size()
    }

    /// Whether something of it is to be asked for.
    pub(crate) fn is_active(&self) -> bool {
        self.paused.is_none() && !self.map.is_complete()
    }

    pub(crate) fn view(&self, slot: usize) -> Option<&View> {
        self.views.get(slot)?.as_deref()
    }

    pub(crate) fn view_and_map(&mut self, slot: usize) -> Option<(&mut View, &PieceMap)> {
        Some((self.views.get_mut(slot)?.as_deref_mut()?, &self.map))
    }

    /// The peers in these slots hold something of it.
    pub(crate) fn providers(&self) -> impl Iterator<Item = (usize, &View)> {
        self.views
            .iter()
            .enumerate()
            .filter_map(|(slot, view)| Some((slot, view.as_deref()?)))
    }

    /// A peer holds more.
    pub(crate) fn add_have(&mut self, slot: usize, ranges: &GroupRanges) {
        if self.views.len() <= slot {
            self.views.resize_with(slot + 1, || None);
        }
        let view = self.views[slot].get_or_insert_with(|| Box::new(View::new(&self.map)));
        view.add(&mut self.map, ranges);
    }

    /// A peer holds less.
    pub(crate) fn remove_have(&mut self, slot: usize, ranges: &GroupRanges) {
        if let Some(view) = self.views.get_mut(slot).and_then(Option::as_mut) {
            view.remove(&mut self.map, ranges);
        }
    }

    /// A peer left; returns what it held.
    pub(crate) fn take_view(&mut self, slot: usize) -> Option<GroupRanges> {
        let mut view = self.views.get_mut(slot)?.take()?;
        view.leave(&mut self.map);
        Some(view.have().clone())
    }

    /// A run goes into a request.
    pub(crate) fn take(&mut self, id: RequestId, run: &Range<u64>) {
        self.map.take(run);
        self.flights.insert(id, run);
    }

    /// A request ended; what of it is lacking and in no other request is open again.
    pub(crate) fn release(&mut self, id: RequestId, run: &Range<u64>) {
        self.flights.remove(id, run);
        let covered: GroupRanges = self.flights.touching(run).map(|(_, other)| other).collect();
        for part in spans::gaps(&covered, run.clone()) {
            self.map.release(&part);
        }
        self.relist(self.map.geometry().pieces_touching(run));
    }

    /// Wants more of it.
    pub(crate) fn extend_want(&mut self, more: &GroupRanges) {
        let touched = self.map.extend_want(more);
        self.reported &= self.map.is_complete();
        self.relist(touched);
    }

    /// Makes pieces candidates with all that hold something of them.
    fn relist(&mut self, pieces: impl IntoIterator<Item = u32>) {
        for piece in pieces {
            for view in self.views.iter_mut().flatten() {
                view.list(&self.map, piece);
            }
        }
    }

    /// Verified content came; returns the bytes of it that were new.
    pub(crate) fn receive(&mut self, now: Time, peer: PeerKey, run: &Range<u64>) -> u64 {
        let geometry = *self.map.geometry();
        let fresh: u64 = self
            .map
            .receive(run)
            .iter()
            .map(|part| geometry.bytes(part))
            .sum();
        let all = geometry.bytes(run);
        *self.received.entry(peer).or_default() += all;
        self.duplicate += all - fresh;
        self.demanded.remove(run.clone());
        self.meter.add(now, fresh);
        fresh
    }
}

/// The runs of a blob that are in requests, in the order of their groups and of their age.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flights {
    by_start: BTreeMap<(u64, RequestId), u64>,
    /// Requests are numbered upwards: the oldest comes first.
    by_age: BTreeSet<RequestId>,
}

impl Flights {
    fn insert(&mut self, id: RequestId, run: &Range<u64>) {
        self.by_start.insert((run.start, id), run.end);
        self.by_age.insert(id);
    }

    fn remove(&mut self, id: RequestId, run: &Range<u64>) {
        self.by_start.remove(&(run.start, id));
        self.by_age.remove(&id);
    }

    /// The requests that touch a run, and their runs. No request is longer than [`MAX_REQUEST_GROUPS`], which bounds the search.
    pub(crate) fn touching(
        &self,
        run: &Range<u64>,
    ) -> impl Iterator<Item = (RequestId, Range<u64>)> + use<'_> {
        let run = run.clone();
        let first = run.start.saturating_sub(MAX_REQUEST_GROUPS);
        self.by_start
            .range((first, RequestId(0))..(run.end, RequestId(0)))
            .map(|(&(start, id), &end)| (id, start..end))
            .filter(move |(_, other)| other.end > run.start)
    }

    /// All requests, the oldest first.
    pub(crate) fn by_age(&self) -> impl Iterator<Item = RequestId> + use<'_> {
        self.by_age.iter().copied()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_age.is_empty()
    }

    /// What is in requests, as a set.
    pub(crate) fn groups(&self) -> GroupRanges {
        self.by_start
            .iter()
            .map(|(&(start, _), &end)| start..end)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flights_are_found_by_what_they_touch() {
        let mut flights = Flights::default();
        flights.insert(RequestId(7), &(0..64));
        flights.insert(RequestId(3), &(100..101));
        flights.insert(RequestId(9), &(63..70));
        let touching = |flights: &Flights, run| {
            flights
                .touching(&run)
                .map(|(id, _)| id.0)
                .collect::<Vec<_>>()
        };
        assert_eq!(touching(&flights, 63..64), [7, 9]);
        assert_eq!(touching(&flights, 64..100), [9]);
        assert_eq!(touching(&flights, 70..100), [0; 0]);
        assert_eq!(flights.by_age().next(), Some(RequestId(3)));
        flights.remove(RequestId(9), &(63..70));
        assert_eq!(touching(&flights, 63..101), [7, 3]);
    }
}
