//! Whom this node could connect to, where, and when to try (again). No sockets: what to dial comes out of `due`.
//!
//! Addresses are hints from anyone in the fleet (peer exchange, status, LAN): bounded, tried with a growing wait, and
//! forgotten when they fail for long. Whoever answers at one still has to prove who it is.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use libp2p::PeerId;
use rand::RngExt;
use rand::rngs::SmallRng;

use crate::address::{self, HostPort};

/// Most peers remembered: every machine of a large fleet.
const MAX_PEERS: usize = 2048;
/// Most addresses of one peer.
const MAX_ADDRESSES: usize = 8;
/// Most bootstrap addresses.
const MAX_BOOTSTRAP: usize = 64;
/// Wait after the first failure; doubles up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));
/// A connection that lasted so long was a success.
const LASTING: Duration = Duration::from_secs(60);
/// Failures in a row after which a peer that was only heard of is forgotten.
const MAX_FAILURES: u32 = 8;

/// When something failed last, and when it may be tried again.
#[derive(Clone, Copy, Debug, Default)]
struct Attempts {
    failures: u32,
    next: Duration,
}

#[derive(Debug, Default)]
struct Known {
    addresses: Vec<SocketAddr>,
    /// Label of its site, or empty.
    site: String,
    attempts: Attempts,
    dialling: bool,
}

#[derive(Debug)]
struct Bootstrap {
    place: HostPort,
    attempts: Attempts,
    dialling: bool,
    /// Who answered there last, and whether that was in another site.
    peer: Option<PeerId>,
    beyond: Option<bool>,
}

/// Something to dial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The bootstrap address of this number, whoever is there.
    Bootstrap(usize, HostPort),
    /// This peer.
    Peer(PeerId, Vec<SocketAddr>),
}

/// See the module. Times are since an arbitrary start.
pub struct Directory {
    local: PeerId,
    bootstrap: Vec<Bootstrap>,
    peers: BTreeMap<PeerId, Known>,
    rng: SmallRng,
}

impl Attempts {
    fn fail(&mut self, now: Duration, rng: &mut SmallRng) {
        self.failures += 1;
        let wait = RETRY
            .0
            .saturating_mul(1 << self.failures.min(16))
            .min(RETRY.1);
        // Spread, so that a fleet whose gateway restarts does not come back all at once.
        self.next = now + wait.mul_f64(rng.random_range(0.5..1.0));
    }

    /// A connection lasted: what failed before it no longer counts.
    fn succeed(&mut self, now: Duration) {
        *self = Self {
            failures: 0,
            next: now + RETRY.0,
        };
    }
}

impl Directory {
    pub fn new(local: PeerId, rng: SmallRng) -> Self {
        Self {
            local,
            bootstrap: Vec::new(),
            peers: BTreeMap::new(),
            rng,
        }
    }

    /// Adds a bootstrap address; false if the text is none, or there are too many.
    pub fn add_bootstrap(&mut self, text: &str) -> bool {
        let Some(place) = address::parse(text) else {
            return false;
        };
        if self.bootstrap.iter().any(|known| known.place == place) {
            return true;
        }
        if self.bootstrap.len() >= MAX_BOOTSTRAP {
            return false;
        }
        let attempts = Attempts::default();
        self.bootstrap.push(Bootstrap {
            place,
            attempts,
            dialling: false,
            peer: None,
            beyond: None,
        });
        true
    }

    /// Remembers where a peer listens, and its site's label if that is known; the newest hints come first.
    pub fn add_peer(&mut self, peer: PeerId, addresses: &[SocketAddr], site: &str) {
        let usable = |address: &&SocketAddr| !address.ip().is_unspecified() && address.port() != 0;
        let fresh: Vec<_> = addresses
            .iter()
            .filter(usable)
            .copied()
            .take(MAX_ADDRESSES)
            .collect();
        if peer == self.local || fresh.is_empty() {
            return;
        }
        if !self.peers.contains_key(&peer) && self.peers.len() >= MAX_PEERS {
            let at = self.rng.random_range(0..self.peers.len());
            if let Some(evicted) = self.peers.keys().nth(at).copied() {
                self.peers.remove(&evicted);
            }
        }
        let known = self.peers.entry(peer).or_default();
        known.addresses.retain(|address| !fresh.contains(address));
        known.addresses.splice(0..0, fresh);
        known.addresses.truncate(MAX_ADDRESSES);
        if !site.is_empty() {
            site.clone_into(&mut known.site);
        }
    }

    /// Forgets a peer that was banned.
    pub fn remove(&mut self, peer: &PeerId) {
        self.peers.remove(peer);
    }

    /// Up to `count` bootstrap addresses to dial now: those that do not lead to a peer that is connected, and that are such by their hosts,
    /// and by whether who answered last was in another site.
    pub fn due_bootstrap(
        &mut self,
        now: Duration,
        count: usize,
        connected: impl Fn(&PeerId) -> bool,
        such: impl Fn(&str, Option<bool>) -> bool,
    ) -> Vec<Target> {
        let due = |(number, entry): (usize, &mut Bootstrap)| {
            let there = entry.peer.as_ref().is_some_and(&connected);
            if there
                || entry.dialling
                || entry.attempts.next > now
                || !such(&entry.place.host, entry.beyond)
            {
                return None;
            }
            entry.dialling = true;
            Some(Target::Bootstrap(number, entry.place.clone()))
        };
        self.bootstrap
            .iter_mut()
            .enumerate()
            .filter_map(due)
            .take(count)
            .collect()
    }

    /// How many peers are known whose site's label and addresses are such.
    pub fn count(&self, such: impl Fn(&str, &[SocketAddr]) -> bool) -> usize {
        let such = |known: &&Known| such(&known.site, &known.addresses);
        self.peers.values().filter(such).count()
    }

    /// Up to `count` peers to dial now, at random among those that are due, not connected, and whose site's label and addresses are such.
    pub fn due_peers(
        &mut self,
        now: Duration,
        count: usize,
        connected: impl Fn(&PeerId) -> bool,
        such: impl Fn(&str, &[SocketAddr]) -> bool,
    ) -> Vec<Target> {
        if count == 0 {
            return Vec::new();
        }
        let due = |known: &Known| {
            !known.dialling && known.attempts.next <= now && such(&known.site, &known.addresses)
        };
        let mut candidates: Vec<_> = self
            .peers
            .iter()
            .filter(|(peer, known)| due(known) && !connected(peer))
            .map(|(peer, _)| *peer)
            .collect();
        let mut targets = Vec::new();
        while targets.len() < count && !candidates.is_empty() {
            let peer = candidates.swap_remove(self.rng.random_range(0..candidates.len()));
            if let Some(known) = self.peers.get_mut(&peer) {
                known.dialling = true;
                targets.push(Target::Peer(peer, known.addresses.clone()));
            }
        }
        targets
    }

    /// A dial ended: with a connection to this peer, or not.
    pub fn dialled(&mut self, now: Duration, target: &Target, reached: Option<PeerId>) {
        match target {
            Target::Bootstrap(number, _) => {
                let entry = &mut self.bootstrap[*number];
                entry.dialling = false;
                match reached {
                    Some(peer) => entry.peer = Some(peer),
                    None => entry.attempts.fail(now, &mut self.rng),
                }
            }
            Target::Peer(peer, _) => {
                let Some(known) = self.peers.get_mut(peer) else {
                    return;
                };
                known.dialling = false;
                if reached.is_none() {
                    known.attempts.fail(now, &mut self.rng);
                }
                if known.attempts.failures > MAX_FAILURES {
                    self.peers.remove(peer);
                }
            }
        }
    }

    /// Whether the peer that answers at a bootstrap address is in another site.
    pub fn is_beyond(&mut self, peer: &PeerId, beyond: bool) {
        let there = |entry: &&mut Bootstrap| entry.peer.as_ref() == Some(peer);
        self.bootstrap
            .iter_mut()
            .filter(there)
            .for_each(|entry| entry.beyond = Some(beyond));
    }

    /// A bootstrap address turned out to be this node's own: it is not tried again.
    pub fn is_myself(&mut self, target: &Target) {
        if let Target::Bootstrap(number, _) = target {
            self.bootstrap[*number].attempts.next = Duration::MAX;
        }
    }

    /// A connection ended that had lasted for a while. A peer that soon lets go again and again (it is full, or is broken)
    /// is dialled ever more rarely.
    pub fn disconnected(&mut self, now: Duration, peer: &PeerId, lasted: Duration) {
        let known = self.peers.get_mut(peer).map(|known| &mut known.attempts);
        let bootstrap = self
            .bootstrap
            .iter_mut()
            .find(|entry| entry.peer == Some(*peer));
        for attempts in known
            .into_iter()
            .chain(bootstrap.map(|entry| &mut entry.attempts))
        {
            if lasted < LASTING {
                attempts.fail(now, &mut self.rng)
            } else {
                attempts.succeed(now)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn directory() -> Directory {
        Directory::new(PeerId::random(), SmallRng::seed_from_u64(1))
    }

    fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    #[test]
    fn a_dead_bootstrap_address_is_tried_ever_more_rarely_but_for_ever() {
        let mut directory = directory();
        assert!(directory.add_bootstrap("10.0.0.1:1") && !directory.add_bootstrap("nonsense"));
        let mut tries = Vec::new();
        for now in (0..3600 * 10).map(|tenths| Duration::from_millis(tenths * 100)) {
            for target in directory.due_bootstrap(now, 9, |_| false, |_, _| true) {
                tries.push(now);
                directory.dialled(now, &target, None);
            }
        }
        assert!(
            tries[3] < seconds(10) && (60..150).contains(&tries.len()),
            "{}",
            tries.len()
        );
        assert!(tries.last().unwrap() > &seconds(3500));
    }

    #[test]
    fn bootstrap_rests_while_its_peer_is_connected() {
        let mut directory = directory();
        directory.add_bootstrap("10.0.0.1:1");
        let target = directory
            .due_bootstrap(seconds(0), 9, |_| false, |_, _| true)
            .remove(0);
        assert!(
            directory
                .due_bootstrap(seconds(0), 9, |_| false, |_, _| true)
                .is_empty(),
            "being dialled"
        );
        let peer = PeerId::random();
        directory.dialled(seconds(0), &target, Some(peer));
        assert!(
            directory
                .due_bootstrap(seconds(9), 9, |id| *id == peer, |_, _| true)
                .is_empty()
        );
        assert_eq!(
            directory.due_bootstrap(seconds(9), 9, |_| false, |_, _| true),
            [target]
        );
    }

    #[test]
    fn peers_are_bounded_and_forgotten_when_they_fail() {
        let mut directory = directory();
        let address = "10.0.0.1:1".parse().unwrap();
        (0..MAX_PEERS + 100).for_each(|_| directory.add_peer(PeerId::random(), &[address; 20], ""));
        assert_eq!(directory.peers.len(), MAX_PEERS);
        directory.add_peer(directory.local, &[address], "");
        directory.add_peer(PeerId::random(), &["0.0.0.0:1".parse().unwrap()], "");
        assert_eq!(directory.peers.len(), MAX_PEERS);
        let mut now = Duration::ZERO;
        for _ in 0..=MAX_FAILURES {
            let targets = directory.due_peers(now, usize::MAX, |_| false, |_, _| true);
            targets
                .iter()
                .for_each(|target| directory.dialled(now, target, None));
            now += RETRY.1;
        }
        assert_eq!(directory.peers.len(), 0);
    }
}
