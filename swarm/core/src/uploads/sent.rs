//! How often each part of each served blob was sent: what "least-sent first" is decided by.
//!
//! Counts only. Parts are pieces, or for long pieces runs as long as the longest request.

use std::collections::BTreeMap;
use std::ops::Range;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::GroupRanges;

use crate::{MAX_REQUEST_GROUPS, PeerKey, PieceGeometry, Time};

/// Most parts of one blob; beyond, parts grow.
const MAX_PARTS_OF_BLOB: u64 = 1 << 18;
/// Most parts in all: 40 MiB. The blobs served longest ago are forgotten first.
const MAX_PARTS: usize = 1 << 20;

/// One part of a blob.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    /// Groups sent, whichever they were.
    groups: u64,
    /// To whom last, and when.
    last: Option<(PeerKey, Time)>,
}

/// What was sent of one blob.
#[derive(Debug)]
struct Log {
    root: RootHash,
    shift: u32,
    /// Groups in the blob, for the length of the last part.
    total: u64,
    parts: Vec<Part>,
    /// Groups that were sent at all: parts alone would not tell half a part sent twice from all of it sent once.
    once: GroupRanges,
    bytes: u64,
    /// Requests that wait or are being served: it is not forgotten before they end.
    users: usize,
    used: u64,
}

impl Log {
    fn new(root: RootHash, geometry: &PieceGeometry) -> Self {
        let least = geometry
            .groups()
            .div_ceil(MAX_PARTS_OF_BLOB)
            .next_power_of_two();
        let shift = geometry
            .piece_groups()
            .min(MAX_REQUEST_GROUPS)
            .max(least)
            .trailing_zeros();
        let parts = vec![Part::default(); geometry.groups().div_ceil(1 << shift) as usize];
        Self {
            root,
            shift,
            total: geometry.groups(),
            parts,
            once: GroupRanges::new(),
            bytes: 0,
            users: 0,
            used: 0,
        }
    }

    fn parts(&self, run: &Range<u64>) -> Range<usize> {
        (run.start >> self.shift) as usize..((run.end - 1) >> self.shift) as usize + 1
    }

    /// Groups in a part.
    fn len(&self, part: usize) -> u64 {
        let start = (part as u64) << self.shift;
        (start + (1 << self.shift)).min(self.total) - start
    }
}

/// What was sent of all blobs served lately.
#[derive(Debug, Default)]
pub(super) struct SentLog {
    at: BTreeMap<RootHash, usize>,
    logs: Vec<Option<Log>>,
    parts: usize,
    clock: u64,
}

impl SentLog {
    /// One request more on a blob; returns the number under which the blob is known while it has requests.
    pub(super) fn enter(&mut self, root: RootHash, geometry: &PieceGeometry) -> usize {
        self.clock += 1;
        let at = match self.at.get(&root) {
            Some(&at) => at,
            None => self.add(Log::new(root, geometry)),
        };
        if let Some(log) = &mut self.logs[at] {
            log.users += 1;
            log.used = self.clock;
        }
        at
    }

    fn add(&mut self, log: Log) -> usize {
        while self.parts + log.parts.len() > MAX_PARTS && self.forget_oldest() {}
        let at = self
            .logs
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.logs.len());
        if at == self.logs.len() {
            self.logs.push(None);
        }
        self.parts += log.parts.len();
        self.at.insert(log.root, at);
        self.logs[at] = Some(log);
        at
    }

    fn forget_oldest(&mut self) -> bool {
        let unused = self.logs.iter().flatten().filter(|log| log.users == 0);
        let Some(root) = unused.min_by_key(|log| log.used).map(|log| log.root) else {
            return false;
        };
        if let Some(log) = self.at.remove(&root).and_then(|at| self.logs[at].take()) {
            self.parts -= log.parts.len();
        }
        true
    }

    /// One request less.
    pub(super) fn leave(&mut self, at: usize) {
        if let Some(log) = &mut self.logs[at] {
            log.users -= 1;
        }
    }

    /// The run is being sent.
    pub(super) fn count(&mut self, at: usize, run: &Range<u64>, peer: PeerKey, now: Time) {
        let Some(log) = &mut self.logs[at] else {
            return;
        };
        log.once.insert(run.clone());
        for part in log.parts(run) {
            let start = (part as u64) << log.shift;
            let groups = run.end.min(start + (1 << log.shift)) - run.start.max(start);
            log.parts[part].groups += groups;
            log.parts[part].last = Some((peer, now));
        }
    }

    /// The run was sent in full.
    pub(super) fn finished(
        &mut self,
        at: usize,
        run: &Range<u64>,
        peer: PeerKey,
        now: Time,
        bytes: u64,
    ) {
        let Some(log) = &mut self.logs[at] else {
            return;
        };
        log.bytes += bytes;
        for part in log.parts(run) {
            log.parts[part].last = Some((peer, now));
        }
    }

    /// The run was not sent after all.
    pub(super) fn uncount(&mut self, at: usize, run: &Range<u64>) {
        let Some(log) = &mut self.logs[at] else {
            return;
        };
        log.once.remove(run.clone());
        for part in log.parts(run) {
            let start = (part as u64) << log.shift;
            let groups = run.end.min(start + (1 << log.shift)) - run.start.max(start);
            log.parts[part].groups -= groups.min(log.parts[part].groups);
            log.parts[part].last = None;
        }
    }

    /// How often the least-sent part of a run was sent, in whole copies.
    pub(super) fn copies(&self, at: usize, run: &Range<u64>) -> u64 {
        let Some(log) = &self.logs[at] else { return 0 };
        if !log.once.contains_run(run) {
            return 0;
        }
        log.parts(run)
            .map(|part| log.parts[part].groups / log.len(part))
            .min()
            .unwrap_or(0)
            .max(1)
    }

    /// When, and that it was to another than `peer`, the whole run was last sent; `None` if some of it was not sent
    /// yet, or to this peer last.
    pub(super) fn sent_elsewhere(
        &self,
        at: usize,
        run: &Range<u64>,
        peer: PeerKey,
    ) -> Option<Time> {
        let log = self.logs[at].as_ref()?;
        if !log.once.contains_run(run) {
            return None;
        }
        let mut oldest: Option<Time> = None;
        for part in log.parts(run) {
            let entry = &log.parts[part];
            let (last, time) = entry.last?;
            if last == peer {
                return None;
            }
            oldest = Some(oldest.map_or(time, |other| other.min(time)));
        }
        oldest
    }

    /// When the part with this group was last sent, if it was to this peer.
    pub(super) fn sent_to(&self, root: &RootHash, group: u64, peer: PeerKey) -> Option<Time> {
        let log = self.logs[*self.at.get(root)?].as_ref()?;
        let (last, time) = log.parts.get((group >> log.shift) as usize)?.last?;
        (last == peer).then_some(time)
    }

    /// Content bytes sent of a blob.
    pub(super) fn bytes(&self, root: &RootHash) -> Option<u64> {
        Some(self.logs[*self.at.get(root)?].as_ref()?.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use capsule_proto::ranges::GROUP_LEN;

    use super::*;

    #[test]
    fn copies_count_whole_parts() {
        let mut sent = SentLog::default();
        // 96 MiB: parts of 4 groups.
        let at = sent.enter(RootHash::of(b"a"), &PieceGeometry::of(96 << 20));
        let (peer, now) = (PeerKey(1), Time::from_start(Duration::from_secs(1)));
        sent.count(at, &(0..2), peer, now);
        assert_eq!(sent.copies(at, &(0..4)), 0);
        assert_eq!(sent.sent_elsewhere(at, &(0..4), PeerKey(2)), None);
        sent.count(at, &(2..4), peer, now);
        assert_eq!((sent.copies(at, &(0..4)), sent.copies(at, &(0..8))), (1, 0));
        assert_eq!(sent.sent_elsewhere(at, &(1..3), PeerKey(2)), Some(now));
        assert_eq!(sent.sent_elsewhere(at, &(1..3), peer), None);
        sent.uncount(at, &(2..4));
        assert_eq!(sent.copies(at, &(0..4)), 0);
    }

    #[test]
    fn what_was_served_longest_ago_is_forgotten_first() {
        let mut sent = SentLog::default();
        let geometry = PieceGeometry::of(MAX_PARTS_OF_BLOB * MAX_REQUEST_GROUPS * GROUP_LEN);
        let roots: Vec<_> = (0..6u8).map(|i| RootHash::of(&[i])).collect();
        for root in &roots {
            let at = sent.enter(*root, &geometry);
            if *root != roots[0] {
                sent.leave(at);
            }
        }
        assert!(sent.parts <= MAX_PARTS);
        let known = roots
            .iter()
            .map(|root| sent.bytes(root).is_some())
            .collect::<Vec<_>>();
        assert_eq!(known, [true, false, false, true, true, true]);
    }
}
