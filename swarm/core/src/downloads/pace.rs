//! Caps of what comes: requests are made as fast as their responses may come, and no faster.
//!
//! A response that was asked for comes at whatever rate its provider has, so the cap holds for what is asked: each request lets the
//! bytes of its response in line, and while those of before have not gone, no peer of that class is asked for more. What is demanded
//! goes first, and a little ahead of the line. Requests are short, so that what comes in one go is little beside what comes in
//! seconds.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use capsule_proto::ranges::GROUP_LEN;

use super::Downloads;
use crate::rates::{Caps, Class, Limiter, wire_bytes};
use crate::time::earliest;
use crate::{PeerKey, PieceGeometry, Time};

/// Longest time of the cap that one response may take.
const RESPONSE: Duration = Duration::from_millis(200);
/// How far ahead of the line something goes that somebody waits for.
const DEMAND_AHEAD: Duration = Duration::from_millis(250);
/// A frame's headers, and a pair of hashes in it.
const FRAME: u64 = 18;
const PAIR: u64 = 64;

/// Where requests wait for caps.
#[derive(Debug, Default)]
pub(super) struct Pace {
    pub(super) limiter: Limiter,
    /// Peers that may be given requests once caps allow it.
    pub(super) waiting: VecDeque<usize>,
    /// When that is looked at.
    pub(super) at: Option<Time>,
}

impl Downloads {
    /// Has other caps hold for what is asked from now on.
    pub fn set_caps(&mut self, now: Time, caps: Caps) {
        self.pace.limiter.set(now, caps);
        self.pace.at = Some(now);
    }

    /// Counts `bytes` on a lane that came, or will, from a peer without having been asked for here: news, say.
    pub fn charge(&mut self, now: Time, peer: PeerKey, bytes: u64) {
        let slot = self.slots.get(&peer).copied();
        if let Some(peer) = slot.and_then(|slot| self.peers[slot].as_ref()) {
            self.pace.limiter.count(now, peer.class, wire_bytes(bytes));
        }
    }

    /// Groups of a blob that a peer may be asked for at once, as far as caps go.
    pub fn most_groups(&self, peer: PeerKey) -> u64 {
        let slot = self.slots.get(&peer).copied();
        let class = slot.and_then(|slot| Some(self.peers[slot].as_ref()?.class));
        class.map_or(u64::MAX, |class| self.capped_groups(class))
    }

    /// Groups in one request to a peer of this class.
    pub(super) fn capped_groups(&self, class: Class) -> u64 {
        let bytes = self.pace.limiter.bytes_in(class, RESPONSE);
        bytes.map_or(u64::MAX, |bytes| (bytes / GROUP_LEN).max(1))
    }

    /// As much of a run as one request to a peer of this class may cover.
    pub(super) fn capped(&self, class: Class, run: Range<u64>) -> Range<u64> {
        let most = run.start.saturating_add(self.capped_groups(class));
        run.start..run.end.min(most)
    }

    /// Whether a peer may be asked for something that nobody waits for; else it waits until it may.
    pub(super) fn is_next(&mut self, now: Time, slot: usize, class: Class) -> bool {
        let may = self.may_ask(now, class, false);
        if !may && !self.pace.waiting.contains(&slot) {
            self.pace.waiting.push_back(slot);
        }
        may
    }

    /// Whether a peer of this class may be asked for something now; else it is looked at again when it may.
    pub(super) fn may_ask(&mut self, now: Time, class: Class, demand: bool) -> bool {
        let ahead = if demand { DEMAND_AHEAD } else { Duration::ZERO };
        let clear = self.pace.limiter.clear_at(now, class, ahead);
        self.pace.at = match clear {
            Some(_) => earliest(self.pace.at, clear),
            None => self.pace.at,
        };
        clear.is_none()
    }

    /// The line may have moved: asks for what waited for that, demands first.
    pub(super) fn go_on(&mut self, now: Time) {
        self.pace.at = None;
        for i in 0..self.order.len() {
            let at = self.order[i];
            self.serve_demands(now, at);
        }
        for slot in std::mem::take(&mut self.pace.waiting) {
            self.wake(slot);
        }
    }
}

/// Bytes on the link of the response to a request: content and hashes, in one frame.
pub(super) fn cost(geometry: &PieceGeometry, groups: &Range<u64>) -> u64 {
    let mut pairs = 0;
    let (mut first, mut last, mut end) = (groups.start, groups.end - 1, geometry.groups());
    while end > 1 {
        (first, last, end) = (first / 2, last / 2, end.div_ceil(2));
        pairs += last - first + 1;
    }
    wire_bytes(FRAME + pairs * PAIR + geometry.bytes(groups))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_costs_its_content_its_hashes_and_headers() {
        let geometry = PieceGeometry::of(96 << 20);
        // 6,144 groups: 13 levels.
        let one = cost(&geometry, &(7..8));
        assert_eq!(one, wire_bytes(18 + 13 * 64 + GROUP_LEN));
        // 63 pairs over 64 groups, and 7 above them.
        let many = cost(&geometry, &(64..128));
        assert_eq!(many, wire_bytes(18 + 70 * 64 + 64 * GROUP_LEN));
        assert_eq!(cost(&PieceGeometry::of(10), &(0..1)), wire_bytes(28));
    }
}
