//! How much may be in flight: enough to keep our link busy whoever takes it, and little enough that what comes next is chosen late.

use std::time::Duration;

use super::{Queue, Sending, Uploads};
use crate::Time;
use crate::time::earliest;

/// Bytes handed to the transport, and not on their way yet, are bounded by this much of the measured rate. Less is enough once some receivers are sent
/// something at the same time ([`RECEIVERS`]), so that what comes next is chosen late.
const IN_FLIGHT_SECONDS: f64 = 0.3;
/// So many: the links of a few may be full of what others send them just then. With 0.15 s, which is five such, 16 nodes of 20 Mbit/s used 84 % of their
/// uplinks, and were done at 89 % of the bound instead of 95.
const RECEIVERS: usize = 10;
/// In any case this part of the bound is in flight: enough that reading the next response leaves no gap. While more is, second copies are kept back twice as long: whoever
/// has room may ask for something new any moment, and the others for what was sent of each other (32 nodes, 4 MiB, simulated, together with
/// the rule of ten receivers: 1.15 copies are sent instead of 1.33).
const NEARLY_IDLE: u64 = 3;
/// Least bound of bytes in flight: four requests to peers of unknown rate.
const MIN_IN_FLIGHT: u64 = 256 << 10;
/// Largest bound of bytes in flight within the site, and to others: half of what responses may cost in memory.
const MAX_IN_FLIGHT: u64 = 16 << 20;
/// Bytes in flight to one peer while others wait, of this site or beyond; one response is always allowed.
const PEER_IN_FLIGHT: u64 = 32 << 10;
/// What may be in flight to other sites, as a multiple of the bound: the links to them are thin, so that what each takes lies in flight for
/// long, and says nothing about our own. While one waited for another, its link would lie idle.
const BEYOND_TIMES: u64 = 2;
/// Least bound of it.
const MIN_BEYOND: u64 = 1 << 20;
/// A response that takes longer than twice what our own rate explains, and this, is held up by the receiver: until
/// one is not, what is in flight to that receiver does not keep others from being served.
const HELD_UP: Duration = Duration::from_millis(200);
/// A response that is held up for so long is not taken at all.
const TAKES_NOTHING: Duration = Duration::from_secs(10);
/// [`HELD_UP`] before our own rate is known: two responses at 1 Mbit/s.
const UNKNOWN_HELD_UP: Duration = Duration::from_secs(1);

/// What may be sent now, by what is in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Credit {
    bound: u64,
    /// Whether anything may be sent to peers of this site, and of others.
    within: bool,
    beyond: bool,
    /// Whether little is in flight within the site: then second copies are not kept back longer than needed.
    pub(super) is_idle: bool,
}

impl Credit {
    pub(super) fn is_used_up(&self) -> bool {
        !self.within && !self.beyond
    }

    /// Whether a peer may be sent something; `lone` says that nobody else waits.
    pub(super) fn allows(&self, queue: &Queue, lone: bool) -> bool {
        let most = if lone { self.bound } else { PEER_IN_FLIGHT };
        let room = if queue.beyond {
            self.beyond
        } else {
            self.within
        };
        room && queue.in_flight() < most
    }
}

impl Uploads {
    /// What may be sent now.
    pub(super) fn credit(&mut self, now: Time) -> Credit {
        let rate = self.meter.rate().unwrap_or_default();
        let bound = ((rate * IN_FLIGHT_SECONDS) as u64).clamp(MIN_IN_FLIGHT, MAX_IN_FLIGHT);
        let (within, beyond) = self.counted_in_flight(now);
        let is_idle = within < bound / NEARLY_IDLE;
        Credit {
            bound,
            within: is_idle || within < bound && self.receivers() < RECEIVERS,
            beyond: beyond < (BEYOND_TIMES * bound).clamp(MIN_BEYOND, MAX_IN_FLIGHT),
            is_idle,
        }
    }

    /// Peers of this site that are being sent something, and take it.
    fn receivers(&self) -> usize {
        let takes = |queue: &&Queue| !queue.beyond && !queue.slow && !queue.sending.is_empty();
        self.peers.values().filter(takes).count()
    }

    /// How long a response may take before the receiver counts as slow, when so many bytes are sent at once.
    pub(super) fn held_up(&self, bytes: u64) -> Duration {
        let Some(rate) = self.meter.rate() else {
            // Patience that one member used up is not there for the next: many that do not read would add it up.
            let slow = self.peers.values().any(|queue| queue.slow);
            return if slow { HELD_UP } else { UNKNOWN_HELD_UP };
        };
        HELD_UP + Duration::from_secs_f64((2.0 * bytes as f64 / rate.max(1.0)).min(60.0))
    }

    /// Bytes in flight to this site and to others, without those that receivers hold up.
    fn counted_in_flight(&mut self, now: Time) -> (u64, u64) {
        // Who takes nothing takes nothing of our rate; who is only slow does.
        let takes = |queue: &&Queue| {
            let lately = |sending: &Sending| now - sending.since <= TAKES_NOTHING;
            !queue.slow || queue.sending.iter().all(lately)
        };
        let taking = self.peers.values().filter(takes);
        let held_up = self.held_up(taking.map(Queue::in_flight).sum());
        let (mut within, mut beyond, mut is_held_up) = (0, 0, false);
        for queue in self.peers.values_mut() {
            let Some(oldest) = queue.sending.iter().map(|sending| sending.since).min() else {
                continue;
            };
            if !queue.slow && now - oldest >= held_up {
                (queue.slow, is_held_up) = (true, true);
            }
            if !queue.slow {
                let counted = if queue.beyond {
                    &mut beyond
                } else {
                    &mut within
                };
                *counted += queue.in_flight();
                self.wake_at = earliest(self.wake_at, Some(oldest + held_up));
            }
        }
        if is_held_up {
            // Else many that take a little each and then nothing would make our rate look low, and patience with the next of them long.
            self.meter.discard(now);
        }
        self.measure(now);
        (within, beyond)
    }

    /// Time counts for the rate while something is in flight that no receiver holds up: the rate is our own.
    pub(super) fn measure(&mut self, now: Time) {
        let rests = |queue: &Queue| queue.slow || queue.sending.is_empty();
        if self.peers.values().all(rests) {
            self.meter.stop(now);
        }
    }
}
