//! What nobody waits for yields to what somebody reads. Providers serve demands first, but what is on its way already they cannot overtake:
//! over a thin link one short response takes more than a second, and with each page that a guest needs it would wait for that first.
//!
//! So, over a thin link, and while something is read, little else is asked for: one group at a time, and only when nothing was read for a while.
//! Whoever reads in one go then waits for what he reads only, and whoever reads now and then for one group at most.
//!
//! What is read is a part of a blob. Who demands all of it, as pulls do of manifests and indexes, has it then and reads nothing more.

use std::time::Duration;

use super::late::SILENCE;
use super::peer::Peer;
use super::{Downloads, Flight};
use crate::Time;
use crate::meter::Transit;
use crate::rates::Class;
use crate::time::earliest;

/// A link is thin if so many bytes take longer on it than this: below 2 Mbit/s.
const SHORT: f64 = (64 << 10) as f64;
const FELT: Duration = Duration::from_millis(250);
/// Whoever has read something will read more, as long as that is not longer ago.
const LATELY: Duration = Duration::from_secs(10);
/// Whoever has read nothing for so long is not in the middle of it.
const PAUSE: Duration = Duration::from_secs(1);
/// Even so something else is asked for this often, if its provider has room: fetches to which nothing comes are given up.
const TRICKLE: Duration = Duration::from_secs(10);
/// How often it is looked at again.
const LOOK: Duration = Duration::from_millis(250);

/// What is known of reading from the peers of one class.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// When something was last asked for that is read, or came.
    read_at: Option<Time>,
    /// When something else last was.
    besides_at: Option<Time>,
    /// What comes from all of them.
    transit: Transit,
}

/// What may be asked for that nobody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Besides {
    All,
    OneGroup,
    Nothing,
}

impl Downloads {
    /// What a peer may be asked for that nobody waits for. Where that is nothing, it is looked at again.
    pub(super) fn besides(&mut self, now: Time, slot: usize) -> Besides {
        let Some(peer) = &mut self.peers[slot] else {
            return Besides::Nothing;
        };
        let class = peer.class;
        let reading = &mut self.reading[class as usize];
        let Some(read_at) = reading.read_at.filter(|at| now - *at < LATELY) else {
            return Besides::All;
        };
        if !is_thin(now, &mut peer.transit) || !is_thin(now, &mut reading.transit) {
            return Besides::All;
        }
        let trickles_at = reading.besides_at.map_or(now, |last| last + TRICKLE);
        let rests = now - read_at >= PAUSE && !self.anything_comes(now, class);
        if rests || trickles_at <= now {
            return Besides::OneGroup;
        }
        if !self.pace.waiting.contains(&slot) {
            self.pace.waiting.push_back(slot);
        }
        let next = (now + LOOK).max(read_at + PAUSE).min(trickles_at);
        self.pace.at = earliest(self.pace.at, Some(next));
        Besides::Nothing
    }

    /// Whether a request is open to any peer of a class that is not silent.
    fn anything_comes(&self, now: Time, class: Class) -> bool {
        let answers = |peer: &Peer| peer.class == class && peer.silent_for(now) < SILENCE;
        let comes = |flight: &Flight| {
            let peer = self.peers[flight.slot].as_ref();
            flight.live && peer.is_some_and(answers)
        };
        self.flights.values().any(comes)
    }

    /// Something is asked for, or has come.
    pub(super) fn note_reading(&mut self, now: Time, slot: usize, blob: usize, demand: bool) {
        let (Some(peer), Some(blob)) = (&self.peers[slot], &self.blobs[blob]) else {
            return;
        };
        let reading = &mut self.reading[peer.class as usize];
        if !demand {
            reading.besides_at = Some(now);
        } else if blob.is_read {
            reading.read_at = Some(now);
        }
    }

    /// Bytes of a response came; `first` says that they are the first of it.
    pub(super) fn note_transit(&mut self, now: Time, slot: usize, bytes: u64, first: bool) {
        let Some(peer) = &mut self.peers[slot] else {
            return;
        };
        let of_class = &mut self.reading[peer.class as usize].transit;
        for transit in [of_class, &mut peer.transit] {
            transit.came(now, bytes);
            if first {
                transit.began(now);
            }
        }
    }

    /// A response of which something came has ended, or nothing more of it is expected.
    pub(super) fn end_transit(&mut self, now: Time, slot: usize) {
        let Some(peer) = &mut self.peers[slot] else {
            return;
        };
        self.reading[peer.class as usize].transit.ended(now);
        peer.transit.ended(now);
    }
}

/// Whether it is known to be: who answers late is not thin, and neither is who answers at once.
fn is_thin(now: Time, transit: &mut Transit) -> bool {
    let is_thin = |rate: f64| rate * FELT.as_secs_f64() < SHORT;
    transit.rate(now).is_some_and(is_thin)
}
