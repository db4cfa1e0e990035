//! Lateness: moving requests to better providers, stealing, endgame, hedged demands, timeouts.
//!
//! A provider that has not begun to serve a request takes it back when asked, and says so: moving a
//! request then costs a round trip and no duplicate. Only what is on its way already is asked for twice.

use std::ops::Range;
use std::time::Duration;

use capsule_proto::ranges::GroupRanges;

use super::peer::Peer;
use super::{Downloads, Flight};
use crate::rates::Class;
use crate::time::earliest;
use crate::{RequestId, Time, spans};

/// How often lateness is looked at.
const REVIEW: Duration = Duration::from_millis(100);
/// How often while something is demanded, or all that is lacking is in requests (the endgame).
const EAGER_REVIEW: Duration = Duration::from_millis(20);
/// How many of a blob's oldest requests are looked at for one to steal.
const STEAL_LOOK: usize = 32;
/// A request is stolen if it is expected to take twice as long where it is, and this much longer at least.
const STEAL_MARGIN: Duration = Duration::from_millis(20);
/// The same for one that is on its way already, whose rest will be received twice in part.
const COPY_MARGIN: Duration = Duration::from_millis(200);
/// What a peer beyond the site takes over from one within it must be so much later there: a copy crosses a dear link.
const DEAR_MARGIN: Duration = Duration::from_secs(5);
/// How long a response is watched before its own pace is taken for what the rest of it will take.
const COPY_WATCH: Duration = Duration::from_millis(250);
/// Least time that a provider has to answer a cancel.
const CANCEL_PATIENCE: Duration = Duration::from_millis(250);
/// Longest time for which it may be that the answer is the response itself, and still in the provider's buffers.
const MAX_CANCEL_PATIENCE: Duration = Duration::from_millis(1500);
/// A provider that was silent for so long does not have the response on its way.
pub(super) const SILENCE: Duration = Duration::from_secs(2);
/// Least time that a demanded group is waited for before it is asked of another provider too.
const HEDGE_AFTER: Duration = Duration::from_millis(50);
/// What somebody waits for is asked of a peer beyond the site if that brings it so much sooner.
const DEAR_DEMAND: Duration = Duration::from_millis(500);
/// Most requests open at once for one demanded group.
const MAX_COPIES: usize = 3;
/// Groups in one demanded request at most: 128 KiB, so that what is waited for is not behind what is not.
const DEMAND_GROUPS: u64 = 8;

impl Downloads {
    /// Sees to it that lateness is looked at, if there may be any: not while nothing is asked for, as what is missing
    /// then comes with the next have, or the end of a backoff.
    pub(super) fn arm_review(&mut self, now: Time, at: usize) {
        let Some(blob) = self.blobs[at]
            .as_ref()
            .filter(|blob| blob.is_active() && !blob.flights.is_empty())
        else {
            return;
        };
        let eager = !blob.demanded.is_empty() || blob.map.open().is_empty();
        let wait = if eager { EAGER_REVIEW } else { REVIEW };
        self.review_at = earliest(self.review_at, Some(now + wait));
    }

    /// Looks at all that may be late.
    pub(super) fn review(&mut self, now: Time) {
        self.review_at = None;
        self.review_peers(now);
        self.review_cancelled(now);
        for i in 0..self.order.len() {
            let at = self.order[i];
            self.serve_demands(now, at);
            self.review_crossing(now, at);
            self.arm_review(now, at);
        }
        for slot in 0..self.peers.len() {
            self.wake(slot);
        }
        let backoffs = self
            .peers
            .iter()
            .flatten()
            .filter_map(|peer| peer.backoff_until());
        self.review_at = backoffs.fold(self.review_at, |at, end| earliest(at, Some(end)));
    }

    /// Ends backoffs; gives up on what was asked of peers that are silent.
    fn review_peers(&mut self, now: Time) {
        for slot in 0..self.peers.len() {
            let Some(peer) = &mut self.peers[slot] else {
                continue;
            };
            peer.end_backoff(now);
            if peer.is_stalled(now) {
                peer.strike(now);
                let ids: Vec<_> = peer.live.iter().copied().collect();
                self.give_up(now, ids);
            }
        }
    }

    /// Gives up on requests whose cancel was not answered in time.
    fn review_cancelled(&mut self, now: Time) {
        let overdue = |(id, since): (&RequestId, &Time)| {
            let flight = self.flights.get(id)?;
            let patience = cancel_patience(now, self.peers[flight.slot].as_ref()?);
            // On its way is as good as an answer; if it is slow, another is asked for a copy.
            (flight.arrived == 0 && now - *since > patience).then_some(*id)
        };
        let ids: Vec<_> = self.cancelling.iter().filter_map(overdue).collect();
        self.give_up(now, ids);
    }

    fn give_up(&mut self, now: Time, ids: Vec<RequestId>) {
        for id in ids {
            let Some(flight) = self.flights.get(&id).cloned() else {
                continue;
            };
            self.abandon(now, id);
            self.hand_over(now, &flight);
            self.wake_providers(flight.blob);
        }
    }

    /// Asks the heir of a request for what is open of it.
    pub(super) fn hand_over(&mut self, now: Time, flight: &Flight) {
        let Some(slot) = flight.heir else { return };
        let (Some(Some(peer)), Some(blob)) = (self.peers.get(slot), &self.blobs[flight.blob])
        else {
            return;
        };
        let class = peer.class;
        let Some(view) = blob
            .view(slot)
            .filter(|_| blob.is_active() && peer.has_room())
        else {
            return;
        };
        let open = spans::first_in_both(blob.map.open(), view.have(), flight.groups.clone());
        // Where the line is full it stays open, for whoever is next.
        if let Some(run) = open
            && self.may_ask(now, class, flight.demand)
        {
            let run = self.capped(class, run);
            self.issue(now, slot, flight.blob, run, flight.demand);
        }
    }

    /// A partial provider announced groups: what waits for them at a seeder is taken back, if the seeder can be
    /// asked for what nobody else holds instead, or the partial provider has room.
    pub(super) fn rehome(&mut self, now: Time, at: usize, slot: usize, ranges: &GroupRanges) {
        let (Some(blob), Some(peer)) = (&self.blobs[at], &self.peers[slot]) else {
            return;
        };
        let divided = self.is_divided();
        let Some(view) = blob
            .view(slot)
            .filter(|view| (!view.is_seeder() || divided) && !blob.flights.is_empty())
        else {
            return;
        };
        if !peer.has_room() && !blob.map.has_unspread() && !divided || self.is_across(slot) {
            return;
        }
        let mut moves = Vec::new();
        for run in ranges.runs() {
            for (id, groups) in blob.flights.touching(run) {
                let Some(flight) = self.flights.get(&id) else {
                    continue;
                };
                let waits =
                    flight.arrived == 0 && !flight.demand && !self.cancelling.contains_key(&id);
                let seeder = blob.view(flight.slot).is_some_and(|view| view.is_seeder());
                let dearer = self.is_across(flight.slot) && !self.is_across(slot);
                let spared = seeder && !view.is_seeder();
                if waits && (spared || dearer) && view.have().contains(groups.start) {
                    moves.push(id);
                }
            }
        }
        for id in moves {
            if let Some(flight) = self.flights.get_mut(&id) {
                flight.heir = Some(slot);
            }
            self.cancel(now, id);
        }
    }

    /// A peer has room and nothing is open that it holds: takes over what would come late from another. True if it
    /// was given a request.
    pub(super) fn steal(&mut self, now: Time, slot: usize) -> bool {
        let Some(peer) = self.peers[slot].as_mut() else {
            return false;
        };
        if !peer.may_steal(now, EAGER_REVIEW) {
            return false;
        }
        let class = peer.class;
        for i in 0..self.order.len() {
            let at = self.order[i];
            match self.theft(now, slot, at) {
                Some(Theft::Move(id)) => {
                    if let Some(flight) = self.flights.get_mut(&id) {
                        flight.heir = Some(slot);
                    }
                    self.cancel(now, id);
                    return false;
                }
                Some(Theft::Copy(run)) => {
                    let run = self.capped(class, run);
                    self.issue(now, slot, at, run, false);
                    return true;
                }
                None => {}
            }
        }
        false
    }

    /// The request of a blob that this peer would improve most.
    fn theft(&self, now: Time, slot: usize, at: usize) -> Option<Theft> {
        let blob = self.blobs[at].as_ref().filter(|blob| blob.is_active())?;
        let across = self.is_across(slot);
        if across && !self.may_cross(now, at) {
            return None;
        }
        let (view, thief) = (blob.view(slot)?, self.peers[slot].as_ref()?);
        let mut best: Option<(Duration, Theft)> = None;
        for id in blob.flights.by_age().take(STEAL_LOOK) {
            let Some(flight) = self.flights.get(&id) else {
                continue;
            };
            let Some(owner) = self.peers[flight.slot].as_ref() else {
                continue;
            };
            let waits = flight.arrived == 0;
            if flight.slot == slot || flight.heir.is_some() && waits {
                continue;
            }
            let left = flight.bytes - flight.arrived;
            let here = thief.eta(now, thief.outstanding(), left);
            let (there, margin) = if waits {
                let answer = 2 * owner.delay().unwrap_or_default();
                let there = owner.eta(now, 0, owner.outstanding());
                (there, STEAL_MARGIN + answer)
            } else {
                (flight.rest(now), COPY_MARGIN)
            };
            // Of one that was silent before nothing is known by which to wait for it.
            let dear = across && owner.gives_in_site(now);
            let margin = margin + if dear { DEAR_MARGIN } else { Duration::ZERO };
            let gains = there > 2 * here + margin
                && best.as_ref().is_none_or(|(gain, _)| there - here > *gain);
            // What costs a search comes last.
            if !gains || blob.flights.touching(&flight.groups).count() != 1 {
                continue;
            }
            let Some(run) =
                spans::first_in_both(blob.map.lacking(), view.have(), flight.groups.clone())
            else {
                continue;
            };
            let theft = if waits {
                Theft::Move(id)
            } else {
                Theft::Copy(run)
            };
            best = Some((there - here, theft));
        }
        best.map(|(_, theft)| theft)
    }

    /// Asks for what is demanded and open, and once more for what is late.
    pub(super) fn serve_demands(&mut self, now: Time, at: usize) {
        let Some(blob) = self.blobs[at].as_ref().filter(|blob| blob.is_active()) else {
            return;
        };
        if blob.demanded.is_empty() {
            return;
        }
        let (mut open, mut late) = (Vec::new(), Vec::new());
        for run in blob.demanded.runs() {
            open.extend(spans::overlaps(blob.map.open(), run.clone()));
            for (id, groups) in blob.flights.touching(run) {
                let part = groups.start.max(run.start)..groups.end.min(run.end);
                if self.is_late_demand(now, id, at, &part) {
                    late.push(part);
                }
            }
        }
        for mut part in open {
            while let Some(run) = self.demand_from_best(now, at, &part) {
                part.start = run.end;
            }
        }
        for part in late {
            self.demand_from_best(now, at, &part);
        }
    }

    fn is_late_demand(&self, now: Time, id: RequestId, at: usize, part: &Range<u64>) -> bool {
        let (Some(flight), Some(blob)) = (self.flights.get(&id), &self.blobs[at]) else {
            return false;
        };
        let Some(owner) = self.peers[flight.slot].as_ref() else {
            return false;
        };
        // The newest of several copies decides.
        let copies: Vec<_> = blob.flights.touching(part).map(|(id, _)| id).collect();
        if copies.len() >= MAX_COPIES || copies.iter().max() != Some(&id) {
            return false;
        }
        let left = flight.bytes - flight.arrived;
        if !flight.demand && flight.arrived == 0 {
            // It waits among others that nobody waits for.
            return owner.eta(now, 0, owner.outstanding()) > HEDGE_AFTER;
        }
        let expected = owner.eta(now, 0, left);
        now - flight.issued > HEDGE_AFTER.max(2 * owner.eta(flight.issued, 0, flight.bytes))
            || expected > 20 * HEDGE_AFTER
    }

    /// Asks the provider from which the first part of a run should come soonest, among those not asked for it yet that caps allow.
    fn demand_from_best(&mut self, now: Time, at: usize, run: &Range<u64>) -> Option<Range<u64>> {
        let may = [Class::Within, Class::Beyond].map(|class| self.may_ask(now, class, true));
        let blob = self.blobs[at].as_ref()?;
        let run = run.start..run.end.min(run.start + DEMAND_GROUPS);
        let asked: Vec<_> = blob
            .flights
            .touching(&run)
            .filter_map(|(id, _)| self.flights.get(&id).map(|flight| flight.slot))
            .collect();
        let usable = |peer: &&Peer| peer.is_usable() && may[peer.class as usize];
        let best = blob
            .providers()
            .filter(|(slot, view)| !asked.contains(slot) && view.have().contains(run.start))
            .filter_map(|(slot, view)| {
                Some((self.peers[slot].as_ref().filter(usable)?, slot, view))
            })
            .min_by_key(|(peer, slot, _)| {
                let dear = if self.is_across(*slot) {
                    DEAR_DEMAND
                } else {
                    Duration::ZERO
                };
                dear + peer.eta(now, 0, blob.map.geometry().bytes(&run))
            });
        let (peer, slot, view) = best?;
        let run = self.capped(peer.class, run);
        let groups = spans::first_in_both(blob.map.lacking(), view.have(), run)?;
        self.issue(now, slot, at, groups.clone(), true);
        Some(groups)
    }
}

/// How long the answer to a cancel is waited for: it may be the response itself, behind others.
fn cancel_patience(now: Time, peer: &Peer) -> Duration {
    let answer = CANCEL_PATIENCE.max(4 * peer.delay().unwrap_or_default());
    if peer.silent_for(now) > SILENCE {
        return answer;
    }
    answer.max((2 * peer.eta(now, 0, peer.outstanding())).min(MAX_CANCEL_PATIENCE))
}

impl Flight {
    /// How long the rest of the response will take at the pace of what came of it.
    fn rest(&self, now: Time) -> Duration {
        let pace = now - self.began.unwrap_or(now);
        if pace < COPY_WATCH || self.arrived == 0 {
            return Duration::ZERO;
        }
        let left = (self.bytes - self.arrived) as f64 / self.arrived as f64;
        Duration::from_secs_f64((pace.as_secs_f64() * left).min(1e6))
    }
}

/// How to take over a request.
enum Theft {
    /// Its provider has not begun: it is asked to take the request back.
    Move(RequestId),
    /// It is on its way, slowly: what is lacking of it is asked for once more.
    Copy(Range<u64>),
}
