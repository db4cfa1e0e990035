//! One peer as a provider: its measured rate and delay, its request window, its backoff.
//!
//! The defaults follow from written assumptions, see the constants. Which pieces to ask it for is
//! decided elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::{GROUP_LEN, GroupRanges};

use crate::meter::{RateMeter, Transit};
use crate::rates::Class;
use crate::{MAX_REQUEST_GROUPS, PeerKey, RequestId, Time};

/// Window of a peer whose rate is not known: fills 20 Mbit/s at 50 ms, and is forgiven if it never comes.
const FIRST_WINDOW: u64 = 128 << 10;
/// First bytes that come this much later than twice the delay mean that requests queue: the window is large enough.
const RAMP_QUEUE: Duration = Duration::from_millis(50);
/// Requests wait this long at the provider, beyond the delay of the path: lets it choose the least-sent,
/// rides out the jitter of its other peers, and keeps its link busy while haves are on their way.
const QUEUE: f64 = 0.25;
/// Largest window: 1 Gbit/s at 100 ms and the queue on top, rounded down to a power of two.
const MAX_WINDOW: f64 = (32 << 20) as f64;
/// Requests that may be open in any case: one that is served, one that waits.
const MIN_REQUESTS: usize = 2;
/// Most requests open at one peer; half of what a provider queues for one peer.
const MAX_REQUESTS: usize = 64;
/// Most requests open at one peer with those that somebody waits for.
pub(crate) const MAX_OPEN: usize = 2 * MAX_REQUESTS;
/// A request is about this many seconds of the peer's rate: a response is verified and passed on as a whole.
const REQUEST_SECONDS: f64 = 0.5;
/// Up to this length a request may take longer (but not above [`SLOW_REQUEST_SECONDS`]): what goes with each, messages and at first a path of
/// hashes, would be too large a part of it otherwise.
const SHORT_REQUEST: f64 = (64 << 10) as f64;
/// Longest time that a short request may take.
const SLOW_REQUEST_SECONDS: f64 = 4.0;
/// Least time without a byte after which a peer counts as stalled. A provider of 100 peers at 20 Mbit/s sends
/// one of them 64 KiB every 2.6 s.
const MIN_PATIENCE: Duration = Duration::from_secs(5);
/// Longest patience, whatever was measured.
const MAX_PATIENCE: Duration = Duration::from_secs(30);
/// A peer of the site that is asked for something and gives nothing whole for so long does not keep others from asking beyond the site.
const GIVES_WITHIN: Duration = Duration::from_secs(10);
/// First backoff; doubles with every strike.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// Longest backoff.
const MAX_BACKOFF: Duration = Duration::from_secs(60);
/// How long a provider that said it is busy is not asked for more.
const BUSY_BACKOFF: Duration = Duration::from_millis(200);
/// Refusals in a row that count as a strike.
const REFUSALS: u32 = 4;
/// Most roots of which a peer's haves are remembered: 16,384 (about 2 MiB a peer).
const MAX_HAVES: usize = 1 << 14;

/// A provider.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) key: PeerKey,
    /// What it holds of blobs that are not being fetched.
    pub(crate) haves: BTreeMap<RootHash, GroupRanges>,
    /// Requests that are expected to be answered.
    pub(crate) live: BTreeSet<RequestId>,
    /// Whether it is in the queue of peers to be given requests.
    pub(crate) ready: bool,
    pub(crate) banned: bool,
    /// Whether it is in this site.
    pub(crate) class: Class,
    outstanding: u64,
    meter: RateMeter,
    /// How fast its responses come once they have begun to.
    pub(crate) transit: Transit,
    /// The window while it is found out how much the peer and the path can carry.
    ramp: Option<u64>,
    delay: Option<Duration>,
    /// When something was last heard from it while something was expected.
    heard: Time,
    /// When something verified last came from it, or it was first asked since.
    gave: Time,
    strikes: u32,
    /// Requests in a row that it refused although it had announced the groups.
    refusals: u32,
    backoff_until: Option<Time>,
    /// When it last looked for something to steal.
    stole: Option<Time>,
}

impl Peer {
    pub(crate) fn new(key: PeerKey, class: Class) -> Self {
        Self {
            key,
            haves: BTreeMap::new(),
            live: BTreeSet::new(),
            ready: false,
            banned: false,
            class,
            outstanding: 0,
            meter: RateMeter::default(),
            transit: Transit::default(),
            ramp: Some(FIRST_WINDOW),
            delay: None,
            heard: Time::ZERO,
            gave: Time::ZERO,
            strikes: 0,
            refusals: 0,
            backoff_until: None,
            stole: None,
        }
    }

    /// Remembers what it holds of a blob that is not being fetched; beyond the bound it is forgotten, and the peer
    /// is simply not asked for it.
    pub(crate) fn remember(&mut self, root: &RootHash, ranges: &GroupRanges) {
        if self.haves.len() < MAX_HAVES || self.haves.contains_key(root) {
            self.haves.entry(*root).or_default().union_with(ranges);
        }
    }

    pub(crate) fn outstanding(&self) -> u64 {
        self.outstanding
    }

    pub(crate) fn rate(&self) -> Option<f64> {
        self.meter.rate()
    }

    /// The rate, taking a silence into account.
    pub(crate) fn rate_at(&self, now: Time) -> Option<f64> {
        self.meter.rate_at(now)
    }

    /// Least time from a request to its first bytes.
    pub(crate) fn delay(&self) -> Option<Duration> {
        self.delay
    }

    /// A request was sent to it.
    pub(crate) fn asked(&mut self, now: Time, id: RequestId, bytes: u64) {
        if self.live.is_empty() {
            (self.heard, self.gave) = (now, now);
            self.meter.start(now);
        }
        self.live.insert(id);
        self.outstanding += bytes;
    }

    /// First bytes of a response came.
    pub(crate) fn started(&mut self, after: Duration) {
        let least = self.delay.map_or(after, |delay| delay.min(after));
        self.delay = Some(least);
        if after > 2 * least + RAMP_QUEUE {
            self.ramp = None;
        }
    }

    /// Bytes came, of a request that is live or no more.
    pub(crate) fn arrived(&mut self, now: Time, bytes: u64, live: bool) {
        self.heard = now;
        self.meter.add(now, bytes);
        if live {
            self.ramp = self
                .ramp
                .map(|window| (window + bytes).min(MAX_WINDOW as u64));
            self.outstanding -= bytes.min(self.outstanding);
        }
    }

    /// A request is no longer expected to be answered (or was, in full); `left` bytes of it did not come.
    pub(crate) fn ended(&mut self, now: Time, id: RequestId, left: u64) {
        if self.live.remove(&id) {
            self.outstanding -= left.min(self.outstanding);
        }
        if self.live.is_empty() {
            self.outstanding = 0;
            self.meter.stop(now);
        }
    }

    /// Verified content came: what it did wrong before is forgiven.
    pub(crate) fn served(&mut self, now: Time) {
        self.gave = now;
        (self.strikes, self.refusals) = (0, 0);
    }

    /// It does not hold what it announced; if that happens again and again, it is left alone for a while.
    pub(crate) fn refused(&mut self, now: Time) {
        self.refusals += 1;
        if self.refusals.is_multiple_of(REFUSALS) {
            self.strike(now);
        }
    }

    /// Whether it may look for something to steal: not more often than every so often, as looking costs.
    pub(crate) fn may_steal(&mut self, now: Time, every: Duration) -> bool {
        let may = self.stole.is_none_or(|last| now - last >= every);
        if may {
            self.stole = Some(now);
        }
        may
    }

    /// Bytes that may be asked of it at once: rate x (delay + queue). At first it doubles with every round trip, until
    /// requests are seen to queue.
    pub(crate) fn window(&self) -> u64 {
        let rate = self.meter.rate().unwrap_or_default();
        let delay = self.delay.unwrap_or_default().as_secs_f64();
        let steady = (rate * (delay + QUEUE)).min(MAX_WINDOW) as u64;
        steady.max(self.ramp.unwrap_or_default())
    }

    /// Whether it may be asked for more.
    pub(crate) fn has_room(&self) -> bool {
        !self.banned
            && self.backoff_until.is_none()
            && (self.live.len() < MIN_REQUESTS
                || self.live.len() < MAX_REQUESTS && self.outstanding < self.window())
    }

    /// Whether it is in another site.
    pub(crate) fn is_beyond(&self) -> bool {
        self.class == Class::Beyond
    }

    /// Whether it is a peer of the site that gives what it says it has, as far as is known.
    pub(crate) fn gives_in_site(&self, now: Time) -> bool {
        let gives = self.live.is_empty() || now - self.gave < GIVES_WITHIN;
        !self.is_beyond()
            && !self.banned
            && self.strikes == 0
            && self.backoff_until.is_none()
            && gives
    }

    /// Whether it may be asked at all, for something that somebody waits for: its window does not count.
    pub(crate) fn is_usable(&self) -> bool {
        !self.banned && self.backoff_until.is_none() && self.live.len() < MAX_OPEN
    }

    /// Groups to ask for in one request.
    pub(crate) fn request_groups(&self) -> u64 {
        let bytes = match self.meter.rate() {
            None => SHORT_REQUEST,
            Some(rate) => {
                (rate * REQUEST_SECONDS).max((rate * SLOW_REQUEST_SECONDS).min(SHORT_REQUEST))
            }
        };
        ((bytes / GROUP_LEN as f64) as u64).clamp(1, MAX_REQUEST_GROUPS)
    }

    /// Expected time until `bytes` that wait behind `ahead` bytes have come; long if it never served anything.
    pub(crate) fn eta(&self, now: Time, ahead: u64, bytes: u64) -> Duration {
        let rate = match self.meter.rate_at(now) {
            Some(rate) => rate.max(1.0),
            // As good as a first window a second, until it proves better.
            None => FIRST_WINDOW as f64,
        };
        let seconds = ((ahead + bytes) as f64 / rate).min(1e6);
        self.delay.unwrap_or_default() + Duration::from_secs_f64(seconds)
    }

    /// How long nothing came from it although something is expected.
    pub(crate) fn silent_for(&self, now: Time) -> Duration {
        if self.live.is_empty() {
            Duration::ZERO
        } else {
            now - self.heard
        }
    }

    /// Whether it has been silent for too long while something was expected.
    pub(crate) fn is_stalled(&self, now: Time) -> bool {
        self.silent_for(now) > self.patience()
    }

    fn patience(&self) -> Duration {
        let drain = self.meter.rate().map_or(Duration::ZERO, |rate| {
            Duration::from_secs_f64(
                (4.0 * self.outstanding as f64 / rate.max(1.0)).min(MAX_PATIENCE.as_secs_f64()),
            )
        });
        (8 * self.delay.unwrap_or_default())
            .max(drain)
            .clamp(MIN_PATIENCE, MAX_PATIENCE)
    }

    /// It stalled: left alone for a while, longer each time.
    pub(crate) fn strike(&mut self, now: Time) {
        self.backoff_until =
            Some(now + (FIRST_BACKOFF * (1 << self.strikes.min(10))).min(MAX_BACKOFF));
        self.strikes += 1;
    }

    /// It said that it is busy.
    pub(crate) fn busy(&mut self, now: Time) {
        let until = now + BUSY_BACKOFF;
        self.backoff_until = Some(self.backoff_until.map_or(until, |other| other.max(until)));
    }

    /// Ends a backoff whose time has come. True if one ended.
    pub(crate) fn end_backoff(&mut self, now: Time) -> bool {
        let ends = self.backoff_until.is_some_and(|until| until <= now);
        if ends {
            self.backoff_until = None;
        }
        ends
    }

    pub(crate) fn backoff_until(&self) -> Option<Time> {
        self.backoff_until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time::from_start(Duration::from_millis(ms))
    }

    #[test]
    fn windows_follow_rate_and_delay() {
        let mut peer = Peer::new(PeerKey(1), Class::Within);
        assert_eq!(peer.window(), FIRST_WINDOW);
        peer.asked(at(0), RequestId(1), 1 << 20);
        peer.started(Duration::from_millis(50));
        peer.arrived(at(100), 1_000_000, true);
        assert_eq!(peer.window(), 3_000_000);
        peer.arrived(at(110), 10_000_000, true);
        assert_eq!(peer.window(), FIRST_WINDOW + 11_000_000);
        peer.started(Duration::from_millis(151));
        assert_eq!(peer.window(), 3_000_000);
        assert_eq!(peer.request_groups(), MAX_REQUEST_GROUPS);
        peer.ended(at(110), RequestId(1), 0);
        assert_eq!(peer.outstanding(), 0);
    }

    #[test]
    fn a_dripping_peer_is_asked_for_single_groups() {
        let mut peer = Peer::new(PeerKey(1), Class::Within);
        peer.asked(at(0), RequestId(1), 65536);
        (1..10).for_each(|second| peer.arrived(at(second * 1000), 1, true));
        assert_eq!(peer.request_groups(), 1);
        assert!(!peer.is_stalled(at(10_000)));
        assert!(peer.eta(at(10_000), 0, 65536) > Duration::from_secs(60_000));
    }

    #[test]
    fn backoff_doubles_and_is_bounded() {
        let mut peer = Peer::new(PeerKey(1), Class::Within);
        let mut waits = Vec::new();
        for _ in 0..40 {
            peer.strike(at(0));
            waits.push(peer.backoff_until().expect("backing off") - at(0));
        }
        assert_eq!(waits[..3], [1, 2, 4].map(Duration::from_secs));
        assert_eq!(waits[39], MAX_BACKOFF);
        assert!(!peer.has_room() && !peer.end_backoff(at(1000)));
        assert!(peer.end_backoff(at(60_000)) && peer.has_room());
    }

    #[test]
    fn silence_counts_only_while_something_is_expected() {
        let mut peer = Peer::new(PeerKey(1), Class::Within);
        assert!(!peer.is_stalled(at(60_000)));
        peer.asked(at(60_000), RequestId(1), 100);
        assert!(!peer.is_stalled(at(64_000)));
        assert!(peer.is_stalled(at(66_000)));
    }
}
