//! What the engine knows of one connected peer.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

use capsule_proto::credential::Member;
use capsule_proto::ranges::Height;
use capsule_proto::{GroupRanges, RootHash};
use capsule_swarm_core::Class;
use libp2p::{Multiaddr, PeerId};

use super::inquiries::Asking;
use super::pool::Part;
use super::pulse::{Pulse, Vital};
use super::turnover::Use;
use crate::api::{PeerInfo, RecordId};
use crate::protocol::{Arriving, Connected, MAX_CONTENT_FRAME, Place};

/// Most blobs remembered of what a peer announces: as many as the scheduler remembers.
pub const MAX_CLAIMS: usize = 16_384;
/// Most runs remembered of all its announcements together: 4 MiB of memory.
pub const MAX_CLAIMED_RUNS: usize = 1 << 18;
/// A request of ours that is not answered at all for so long, or content that is not taken for so long, counts as none: a busy
/// provider of 100 peers at 20 Mbit/s sends one of them something every 3 s.
const STUCK_AFTER: Duration = Duration::from_secs(10);
/// How fast measured rates follow: the weight of the newest second.
const RATE_WEIGHT: f64 = 0.4;

/// What a peer says it holds of a blob.
#[derive(Clone, Debug)]
pub struct Claim {
    pub size: u64,
    pub groups: GroupRanges,
}

/// What became of an announcement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claimed {
    Taken,
    /// More than is remembered of one peer: it may well hold it, see `inquiries`.
    TooMany,
    /// Another size than it said before.
    Contradiction,
}

/// A request that we made.
#[derive(Clone, Debug)]
pub struct Asked {
    pub root: RootHash,
    pub size: u64,
    /// What has not been answered of it.
    pub groups: Range<u64>,
    /// Made to learn a blob's size, not by the scheduler.
    pub probe: bool,
    /// Up to where its answer is proved.
    pub height: Height,
    /// The transfer that it was made for.
    pub transfer: u64,
}

/// A response that the scheduler told us to send.
#[derive(Clone, Debug)]
pub struct Serving {
    pub root: RootHash,
    /// Bytes of content in it.
    pub bytes: u64,
}

/// Bytes of content, and how fast they come or go.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meter {
    pub bytes: u64,
    counted: u64,
    rate: f64,
}

/// One connected peer.
pub struct Peer {
    pub id: PeerId,
    pub address: Multiaddr,
    pub dialled: bool,
    pub member: Member,
    /// Label of its site, or empty.
    pub site: String,
    /// Whether it is in this site.
    pub class: Class,
    pub since: Instant,
    pub arriving: Arriving,
    /// The last progress of a response that the scheduler was told of.
    pub reported: (u64, u64),
    pub claims: HashMap<RootHash, Claim>,
    /// Runs in all claims.
    pub claimed_runs: usize,
    pub asking: Asking,
    /// While it is told all that we hold: blobs and runs told so far.
    pub greeting: Option<(usize, usize)>,
    pub asked: HashMap<u64, Asked>,
    /// Its requests that are neither answered nor refused yet.
    pub open: HashMap<u64, Height>,
    pub serving: HashMap<u64, Serving>,
    /// Memory for one response to it, which no other peer can use up.
    pub place: Place,
    /// Of what it is served, that for which there was no memory yet.
    pub delayed: VecDeque<Part>,
    pub incoming: Meter,
    pub outgoing: Meter,
    /// When content last came from it, or was first asked of it; when it last took some, or was first sent some.
    pub gave: Instant,
    pub took: Instant,
    /// Its connection is being closed.
    pub leaving: bool,
    /// It told its status.
    pub told_status: bool,
    /// Where it listens, as it says.
    pub listening: Vec<SocketAddr>,
    /// Records of its that are being checked, and reads of records for it that are under way.
    pub offers: usize,
    pub record_reads: usize,
    /// What it asked for that waits for those reads.
    pub wants: VecDeque<Vec<RecordId>>,
    /// Ids of records that it told us since the minute began.
    pub ids_told: usize,
    /// Things that it did wrong that may be misunderstandings; halved each minute.
    pub faults: u32,
    pub pulse: Pulse,
}

impl Meter {
    fn tick(&mut self, elapsed: Duration) {
        let now = (self.bytes - self.counted) as f64 / elapsed.as_secs_f64().max(0.001);
        let weight = (RATE_WEIGHT * elapsed.as_secs_f64()).min(1.0);
        self.rate += weight * (now - self.rate);
        self.counted = self.bytes;
    }
}

impl Peer {
    pub fn new(connected: Connected, class: Class, now: Instant) -> Self {
        Self {
            id: connected.peer,
            address: connected.address,
            dialled: connected.dialled,
            member: connected.member,
            site: connected.site,
            class,
            since: now,
            arriving: connected.arriving,
            reported: (0, 0),
            claims: HashMap::new(),
            claimed_runs: 0,
            asking: Asking::default(),
            greeting: Some((0, 0)),
            asked: HashMap::new(),
            open: HashMap::new(),
            serving: HashMap::new(),
            place: Place::new(MAX_CONTENT_FRAME),
            delayed: VecDeque::new(),
            incoming: Meter::default(),
            outgoing: Meter::default(),
            gave: now,
            took: now,
            leaving: false,
            told_status: false,
            listening: Vec::new(),
            offers: 0,
            record_reads: 0,
            wants: VecDeque::new(),
            ids_told: 0,
            faults: 0,
            pulse: Pulse::new(now),
        }
    }

    /// Bytes of a response that came since this was last asked, with the request that they answer.
    pub fn progress(&mut self, now: Instant) -> Option<(u64, u64)> {
        let (request, bytes) = self.arriving.get();
        let (last, told) = self.reported;
        let before = if request == last { told } else { 0 };
        self.reported = (request, bytes);
        if bytes > before {
            self.pulse.heard(now);
            self.gave = now;
        }
        (bytes > before).then_some((request, bytes - before))
    }

    /// Renews rates and looks at silence; `wanted` says that what is fetched may depend on it.
    pub fn tick(&mut self, now: Instant, elapsed: Duration, wanted: bool) -> Vital {
        self.incoming.tick(elapsed);
        self.outgoing.tick(elapsed);
        let moving = !(self.asked.is_empty() && self.open.is_empty() && self.serving.is_empty());
        self.pulse.tick(now, !wanted && !moving)
    }

    /// What the connection is good for just now; `fetched` are the blobs that we fetch.
    pub fn good_for<'a>(
        &self,
        now: Instant,
        mut fetched: impl Iterator<Item = &'a RootHash>,
    ) -> Use {
        let takes =
            !self.open.is_empty() && (self.serving.is_empty() || now - self.took < STUCK_AFTER);
        if !self.asked.is_empty() && now - self.gave < STUCK_AFTER {
            Use::Gives
        } else if takes {
            Use::Takes
        } else if fetched.any(|root| self.claims.contains_key(root)) {
            Use::Offers
        } else {
            Use::Idle
        }
    }

    /// Takes in more that it holds of a blob.
    pub fn claim(&mut self, root: RootHash, size: u64, groups: &GroupRanges) -> Claimed {
        let known = self.claims.get(&root);
        if known.is_some_and(|claim| claim.size != size) {
            return Claimed::Contradiction;
        }
        // Counted as if none of the runs joined another.
        let runs = self.claimed_runs + groups.runs().len();
        if runs > MAX_CLAIMED_RUNS || (known.is_none() && self.claims.len() >= MAX_CLAIMS) {
            return Claimed::TooMany;
        }
        let claim = self.claims.entry(root).or_insert_with(|| Claim {
            size,
            groups: GroupRanges::new(),
        });
        self.claimed_runs -= claim.groups.runs().len();
        claim.groups.union_with(groups);
        self.claimed_runs += claim.groups.runs().len();
        Claimed::Taken
    }

    /// Whether it is to be told of one more blob that we hold, of so many runs. A newcomer is told all, up to a little more than it
    /// remembers: from that it knows that there is more to ask for (`inquiries`).
    pub fn is_told(&mut self, runs: usize) -> bool {
        let Some((blobs, all_runs)) = &mut self.greeting else {
            return true;
        };
        let tell = *blobs <= MAX_CLAIMS && *all_runs <= MAX_CLAIMED_RUNS;
        if tell {
            *blobs += 1;
            *all_runs += runs;
        }
        tell
    }

    /// Forgets something that it announced, to make room; nothing that is wanted.
    pub fn forget_other(
        &mut self,
        wanted: impl Fn(&RootHash) -> bool,
    ) -> Option<(RootHash, GroupRanges)> {
        let root = *self.claims.keys().find(|root| !wanted(root))?;
        Some((root, self.disclaim(&root, None)))
    }

    /// Takes in that it no longer holds some (or all) of a blob; returns what it did hold of that.
    pub fn disclaim(&mut self, root: &RootHash, groups: Option<&GroupRanges>) -> GroupRanges {
        let Some(claim) = self.claims.get_mut(root) else {
            return GroupRanges::new();
        };
        let gone = groups.map_or_else(
            || claim.groups.clone(),
            |groups| claim.groups.intersection(groups),
        );
        self.claimed_runs -= claim.groups.runs().len();
        claim.groups = claim.groups.difference(&gone);
        self.claimed_runs += claim.groups.runs().len();
        if claim.groups.is_empty() {
            self.claims.remove(root);
        }
        gone
    }

    /// What people see.
    pub fn info(&self, now: Instant) -> PeerInfo {
        PeerInfo {
            id: self.id,
            address: self.address.clone(),
            dialled: self.dialled,
            rtt: self.pulse.rtt(),
            rate_in: self.incoming.rate as u64,
            rate_out: self.outgoing.rate as u64,
            bytes_in: self.incoming.bytes,
            bytes_out: self.outgoing.bytes,
            site: self.site.clone(),
            beyond: self.class == Class::Beyond,
            member: self.member.clone(),
            blobs: self.claims.len(),
            connected: now - self.since,
        }
    }
}

#[cfg(test)]
mod tests {
    use capsule_proto::credential::{Channels, Grant, MachineId, Roles, TokenId};
    use capsule_swarm_core::PeerKey;

    use super::*;
    use crate::protocol::Pace;

    fn peer(now: Instant) -> Peer {
        let (id, roles, channels) = (TokenId([0; 8]), Roles::default(), Channels::All);
        let grant = Grant {
            id,
            roles,
            channels,
            issued: 0,
            expires: 1,
        };
        let member = Member {
            machine: MachineId([0; 32]),
            name: "pc".into(),
            grant,
        };
        let connected = Connected {
            key: PeerKey(1),
            peer: PeerId::random(),
            address: Multiaddr::empty(),
            dialled: false,
            member,
            site: String::new(),
            arriving: Arriving::default(),
            lanes: Pace::new().lanes(),
        };
        Peer::new(connected, Class::Within, now)
    }

    #[test]
    fn claims_are_bounded_and_consistent() {
        let mut peer = peer(Instant::now());
        let root = RootHash::of(b"blob");
        let groups = GroupRanges::from(0..3);
        assert_eq!(peer.claim(root, 100_000, &groups), Claimed::Taken);
        assert_eq!(peer.claim(root, 100_001, &groups), Claimed::Contradiction);
        assert_eq!(
            peer.disclaim(&root, Some(&GroupRanges::from(1..9))),
            GroupRanges::from(1..3)
        );
        assert_eq!(peer.claims[&root].groups, GroupRanges::from(0..1));
        assert_eq!(peer.disclaim(&root, None), GroupRanges::from(0..1));
        assert!(peer.claims.is_empty() && peer.claimed_runs == 0);
        let root_of = |i: usize| RootHash::of(&i.to_le_bytes());
        let all = GroupRanges::all(1);
        assert!((0..MAX_CLAIMS).all(|i| peer.claim(root_of(i), 1, &all) == Claimed::Taken));
        assert_eq!(
            peer.claim(root_of(MAX_CLAIMS), 1, &all),
            Claimed::TooMany,
            "no contradiction: a large node is not at fault"
        );
        assert_eq!(peer.claim(root_of(3), 1, &all), Claimed::Taken, "known");
        let scattered: GroupRanges = (0..MAX_CLAIMED_RUNS as u64)
            .map(|i| 2 * i..2 * i + 1)
            .collect();
        assert_eq!(peer.claim(root_of(0), 1, &scattered), Claimed::TooMany);
        assert_eq!(peer.claimed_runs, MAX_CLAIMS, "nothing of it is kept");
    }
}
