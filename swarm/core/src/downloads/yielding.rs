//! What nobody waits for yields to what somebody does. Providers serve demands first, but what is on its way already they cannot
//! overtake: on a thin link one short response takes seconds, and whoever reads waits for it with each read.
//!
//! So, where a link is thin, hardly anything else is asked for while there are demands, and for a while after the last: whoever reads
//! goes on reading. A guest that runs over 384 kbit/s would otherwise wait for a second or two with each page that it needs.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Downloads;
use super::peer::{Peer, SHORT_REQUEST};
use crate::Time;
use crate::time::earliest;

/// A link is thin if a short response takes longer on it: below 2 Mbit/s.
const FELT: Duration = Duration::from_millis(250);
/// For so long after a demand, or after something came of one, another is expected.
const LATELY: Duration = Duration::from_secs(10);
/// One group of something else is asked for so often in any case: fetches to which nothing comes are given up.
const TRICKLE: Duration = Duration::from_secs(10);

impl Downloads {
    /// How many groups a peer may be asked for that nobody waits for, where `most` are asked for otherwise. None: it is looked at again in time.
    pub(super) fn most_besides(&mut self, now: Time, slot: usize, most: u64) -> u64 {
        let Some(until) = self.yields_until(now, slot) else {
            return most;
        };
        let next = self.besides_at.map_or(now, |last| last + TRICKLE);
        if next <= now {
            return 1;
        }
        if !self.pace.waiting.contains(&slot) {
            self.pace.waiting.push_back(slot);
        }
        self.pace.at = earliest(self.pace.at, Some(until.min(next)));
        0
    }

    /// Until when a peer is asked for hardly anything but demands, if it is.
    fn yields_until(&self, now: Time, slot: usize) -> Option<Time> {
        let across = self.is_across(slot);
        let (mut last, mut providers) = (None, BTreeSet::new());
        for blob in self.blobs.iter().flatten() {
            let lately = blob.demanded_at.filter(|at| now - *at < LATELY);
            if lately.is_some() {
                last = last.max(lately);
                let here = blob.providers().map(|(slot, _)| slot);
                providers.extend(here.filter(|slot| self.is_across(*slot) == across));
            }
        }
        let last = last?;
        let peers = providers
            .iter()
            .filter_map(|slot| self.peers[*slot].as_ref());
        let rate: f64 = peers.filter_map(Peer::rate).sum();
        let is_thin = rate > 0.0 && rate * FELT.as_secs_f64() < SHORT_REQUEST;
        is_thin.then_some(last + LATELY)
    }
}
