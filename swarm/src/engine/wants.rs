//! Which records to ask of whom: what peers told of and we lack, asked for in small portions.
//!
//! A peer has one open request at a time, and the next when the records of the last have come. So a newcomer to a
//! fleet of many records overruns neither the queue of whom it asks nor its own; and nothing is asked of two peers at
//! once. What is told beyond the bounds is dropped: it is told again when digests are compared again.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use capsule_swarm_core::PeerKey;

use crate::api::RecordId;

/// Ids in one request: their records are some MiB at most, well below what a peer reads for one request.
const PORTION: usize = 2048;
/// Ids that wait to be asked for or for their answer, of all peers together: 4 MiB.
pub const MAX_WANTED: usize = 1 << 17;
/// How long a record that was asked of one peer is not asked of another, and a request that is not answered stays open.
const ASKED: Duration = Duration::from_secs(5);
/// How long a record that could not be kept is not asked for again.
const LATER: Duration = Duration::from_secs(120);
/// Most records that could not be kept.
const MAX_LATER: usize = 1 << 14;

/// See the module.
#[derive(Debug, Default)]
pub struct Wants {
    asked: BTreeMap<RecordId, Instant>,
    later: BTreeMap<RecordId, Instant>,
    peers: BTreeMap<PeerKey, Queue>,
}

/// What is wanted of one peer.
#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<RecordId>,
    /// Records that its open request lacks, and when something last came of it.
    open: Option<(usize, Instant)>,
}

impl Wants {
    /// Queues what a peer told of, up to the bound.
    pub fn add(&mut self, key: PeerKey, lacking: impl Iterator<Item = RecordId>) {
        let queued: usize = self.peers.values().map(|queue| queue.waiting.len()).sum();
        let room = MAX_WANTED.saturating_sub(queued + self.asked.len());
        let Self {
            asked,
            later,
            peers,
        } = self;
        let new = lacking.filter(|id| !asked.contains_key(id) && !later.contains_key(id));
        peers.entry(key).or_default().waiting.extend(new.take(room));
    }

    /// What to ask a peer for now, unless its last request is open; `here` says what came by other ways.
    pub fn next(
        &mut self,
        key: PeerKey,
        now: Instant,
        here: impl Fn(&RecordId) -> bool,
    ) -> Option<Vec<RecordId>> {
        let queue = self.peers.get_mut(&key)?;
        if queue.open.is_some_and(|(_, at)| now - at < ASKED) {
            return None;
        }
        queue.open = None;
        let mut portion = Vec::new();
        while portion.len() < PORTION
            && let Some(id) = queue.waiting.pop_front()
        {
            if !self.asked.contains_key(&id) && !self.later.contains_key(&id) && !here(&id) {
                self.asked.insert(id, now);
                portion.push(id);
            }
        }
        if portion.is_empty() {
            self.peers.remove(&key);
            return None;
        }
        queue.open = Some((portion.len(), now));
        Some(portion)
    }

    /// Counts records that a peer sent.
    pub fn came(&mut self, key: PeerKey, records: usize, now: Instant) {
        if let Some(queue) = self.peers.get_mut(&key) {
            let left = queue
                .open
                .map_or(0, |(left, _)| left.saturating_sub(records));
            queue.open = (left > 0).then_some((left, now));
        }
    }

    /// Notes a record that could not be kept now. False if there are too many of them.
    pub fn postpone(&mut self, id: RecordId, now: Instant) -> bool {
        let room = self.later.len() < MAX_LATER;
        if room {
            self.later.insert(id, now);
        }
        room
    }

    /// Forgets what is over; whether something that was asked for did not come.
    pub fn tick(&mut self, now: Instant, here: impl Fn(&RecordId) -> bool) -> bool {
        let Self { asked, later, .. } = self;
        later.retain(|_, at| now - *at < LATER);
        let mut missing = false;
        asked.retain(|id, at| {
            let waits = now - *at < ASKED;
            missing |= !waits && !later.contains_key(id) && !here(id);
            waits
        });
        missing
    }

    /// Peers that something is wanted of.
    pub fn peers(&self) -> Vec<PeerKey> {
        self.peers.keys().copied().collect()
    }

    /// A peer is gone.
    pub fn forget(&mut self, key: PeerKey) {
        self.peers.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use capsule_proto::RootHash;

    use super::*;

    const ONE: PeerKey = PeerKey(1);
    const TWO: PeerKey = PeerKey(2);

    fn ids(range: std::ops::Range<usize>) -> impl Iterator<Item = RecordId> {
        range.map(|i| RecordId(RootHash::of(&i.to_le_bytes())))
    }

    fn nowhere(_: &RecordId) -> bool {
        false
    }

    #[test]
    fn one_request_is_open_and_the_next_follows_its_records() {
        let (mut wants, now) = (Wants::default(), Instant::now());
        // Several messages in a row, as a large node sends them.
        (0..4).for_each(|i| wants.add(ONE, ids(i * PORTION..(i + 1) * PORTION)));
        assert_eq!(
            wants.next(ONE, now, nowhere),
            Some(ids(0..PORTION).collect())
        );
        assert_eq!(wants.next(ONE, now, nowhere), None);
        wants.came(ONE, PORTION - 1, now);
        assert_eq!(wants.next(ONE, now, nowhere), None);
        wants.came(ONE, 1, now);
        let second: Vec<_> = ids(PORTION..2 * PORTION).collect();
        assert_eq!(wants.next(ONE, now, nowhere), Some(second));
        // An answer that does not come holds nothing up for ever; what came by other ways is left out.
        let late = now + ASKED;
        let third: Vec<_> = ids(2 * PORTION..3 * PORTION).collect();
        let here = |id: &RecordId| *id == third[0];
        let asked = wants.next(ONE, late, here).unwrap();
        assert!(asked.len() == PORTION && asked[..PORTION - 1] == third[1..]);
    }

    #[test]
    fn nothing_is_asked_of_two_and_all_is_bounded() {
        let (mut wants, now) = (Wants::default(), Instant::now());
        wants.add(ONE, ids(0..10));
        wants.add(TWO, ids(0..10));
        assert!(wants.next(ONE, now, nowhere).is_some());
        assert_eq!(wants.next(TWO, now, nowhere), None);
        assert!(!wants.tick(now, nowhere));
        assert!(wants.tick(now + ASKED, nowhere), "they did not come");
        wants.add(TWO, ids(0..2 * MAX_WANTED));
        assert_eq!(wants.peers[&TWO].waiting.len(), MAX_WANTED);
        wants.forget(TWO);
        wants.forget(ONE);
        assert!(wants.peers().is_empty());
    }

    #[test]
    fn what_could_not_be_kept_is_asked_for_again_after_a_while() {
        let (mut wants, now) = (Wants::default(), Instant::now());
        wants.add(ONE, ids(0..1));
        assert!(wants.next(ONE, now, nowhere).is_some());
        wants.came(ONE, 1, now);
        assert!(wants.postpone(ids(0..1).next().unwrap(), now));
        assert!(!wants.tick(now + ASKED, nowhere), "nobody is asked for it");
        wants.add(ONE, ids(0..1));
        assert_eq!(wants.next(ONE, now + ASKED, nowhere), None);
        wants.tick(now + LATER, nowhere);
        wants.add(ONE, ids(0..1));
        assert!(wants.next(ONE, now + LATER, nowhere).is_some());
    }
}
