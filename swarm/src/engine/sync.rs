//! Records and status: by gossip as they are made, and by anti-entropy, so that whoever missed them has them later.
//!
//! Anti-entropy: peers tell each other a digest of the ids of their records, on connecting, when their set changed, and
//! one at random now and then. Where digests differ the ids follow, then records are asked for and sent. Every message
//! is bounded; who sends records that are not valid is at fault.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use capsule_proto::credential::{Credential, MachineId};
use capsule_proto::wire::{Control, HeldCapsule, MAX_RECORD_IDS, PeerAddress, Status};
use capsule_proto::{CapsuleId, RootHash};
use capsule_swarm_core::PeerKey;
use libp2p::PeerId;
use libp2p::gossipsub::{self, MessageAcceptance, MessageId, PublishError};
use rand::RngExt;

use super::Engine;
use super::gossip::Topics;
use super::pool::{Job, Via};
use super::wants::Wants;
use crate::address;
use crate::api::{Event, Offer, RecordId};
use crate::transport::peer_id_of;

/// Records in one message, and their bytes: well within a control message's bound.
const BATCH_RECORDS: usize = 256;
const BATCH_BYTES: usize = 512 << 10;
/// Bytes of records that one peer may have waiting to be checked: what it sends for one request of ours.
const MAX_OFFERED: usize = 8 << 20;
/// Reads of records for one peer at once, and its requests that may wait for them: 2 MiB of ids. An honest peer has one
/// open; what is beyond is dropped, and asked for again.
const MAX_READS: usize = 2;
const MAX_WANTS: usize = 4;
/// Records by gossip that may wait to be checked.
const MAX_GOSSIPED: usize = 256;
/// Ids that are looked at of what a peer tells in a minute.
const MAX_IDS_TOLD: usize = 1 << 18;
/// Ids told to one peer at once, from a place in the set that changes: half a control lane's queue.
const MAX_TELLING: usize = 1 << 17;
/// Ids remembered that need not be asked for: superseded or invalid records.
const MAX_SETTLED: usize = 1 << 16;
/// Members whose newest status is remembered.
const MAX_MEMBERS: usize = 4096;
/// Least time between two readings of our set of ids; also how long a set that changes is left alone before others are told.
const RELOAD: Duration = Duration::from_millis(500);
/// How often one peer's digest is compared for no reason.
const COMPARE: Duration = Duration::from_secs(30);
/// Least time between two tellings of ids to one peer: the first for a small set, the second for each
/// [`MAX_RECORD_IDS`] of a large one, so that no more are told than the peer looks at.
const TELL_IDS: Duration = Duration::from_millis(800);
const TELL_CHUNK: Duration = Duration::from_secs(4);
/// When the status is told again though nothing changed, and after a failure.
const STATUS_EVERY: Duration = Duration::from_secs(300);
const STATUS_RETRY: Duration = Duration::from_secs(3);
/// A status waits so long for further changes.
const STATUS_DELAY: Duration = Duration::from_millis(300);

/// State of the exchange of records and status.
pub(super) struct Sync {
    topics: Topics,
    /// Sorted; `None` until the store was asked.
    ids: Option<Vec<RecordId>>,
    digest: RootHash,
    loading: bool,
    dirty: bool,
    loaded_at: Instant,
    compared_at: Instant,
    minute: Instant,
    settled: HashSet<RecordId>,
    wants: Wants,
    told: BTreeMap<PeerKey, Instant>,
    /// The digest of each peer that was last answered with ours, and when.
    answered: BTreeMap<PeerKey, (RootHash, Instant)>,
    /// Peers whose digest came too soon after they were told all ids.
    deferred: BTreeMap<PeerKey, RootHash>,
    gossiped: usize,
    machine: MachineId,
    listening: Vec<SocketAddr>,
    capsules: Vec<HeldCapsule>,
    sequence: u64,
    status_at: Instant,
    heard: BTreeMap<MachineId, u64>,
}

impl Sync {
    pub(super) fn new(topics: Topics, credential: &Credential, listening: Vec<SocketAddr>) -> Self {
        let now = Instant::now();
        Self {
            topics,
            ids: None,
            digest: RootHash::of(&[]),
            loading: false,
            dirty: false,
            loaded_at: now,
            compared_at: now,
            minute: now,
            settled: HashSet::new(),
            wants: Wants::default(),
            told: BTreeMap::new(),
            answered: BTreeMap::new(),
            deferred: BTreeMap::new(),
            gossiped: 0,
            machine: credential.machine(),
            listening,
            capsules: Vec::new(),
            sequence: 0,
            status_at: now + STATUS_DELAY,
            heard: BTreeMap::new(),
        }
    }

    fn settle(&mut self, record: &[u8]) {
        if self.settled.len() >= MAX_SETTLED {
            self.settled.clear();
        }
        self.settled.insert(RecordId(RootHash::of(record)));
    }

    fn summary(&self) -> Option<Control> {
        let count = self.ids.as_ref()?.len() as u64;
        Some(Control::RecordSummary {
            count,
            digest: self.digest,
        })
    }

    /// Where this node listens, for others to dial; an unspecified address means "as you see me".
    pub(super) fn own_address(&self) -> Option<PeerAddress> {
        let text = |address: &SocketAddr| address::to_multiaddr(*address).to_string();
        let addresses: Vec<_> = self.listening.iter().map(text).collect();
        (!addresses.is_empty()).then_some(PeerAddress {
            machine: self.machine,
            addresses,
        })
    }

    pub(super) fn forget(&mut self, key: PeerKey) {
        self.told.remove(&key);
        self.answered.remove(&key);
        self.deferred.remove(&key);
        self.wants.forget(key);
    }

    /// Least time between two tellings of our ids to one peer.
    fn tell_every(&self) -> Duration {
        let told = self.ids.as_ref().map_or(0, Vec::len).min(MAX_TELLING);
        TELL_IDS.max(TELL_CHUNK.mul_f64(told as f64 / MAX_RECORD_IDS as f64))
    }
}

/// Whether a record is held, or known not to be worth asking for.
fn is_here(ids: Option<&[RecordId]>, settled: &HashSet<RecordId>, id: &RecordId) -> bool {
    // Not read yet: then what we have in truth is asked for in vain, once.
    settled.contains(id) || ids.unwrap_or_default().binary_search(id).is_ok()
}

impl Engine {
    /// Has the set of records' ids read (again).
    pub(super) fn load_records(&mut self) {
        self.sync.loading = true;
        self.sync.dirty = false;
        self.pool.submit(Job::RecordIds);
    }

    pub(super) fn on_record_ids_loaded(&mut self, ids: Vec<RecordId>) {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| *id.0.as_bytes()).collect();
        let digest = RootHash::of(&bytes);
        let changed = self.sync.ids.is_none() || self.sync.digest != digest;
        self.sync.ids = Some(ids);
        self.sync.digest = digest;
        self.sync.loading = false;
        self.sync.loaded_at = Instant::now();
        if changed {
            let keys: Vec<_> = self.peers.keys().copied().collect();
            keys.into_iter().for_each(|key| self.send_summary(key));
        }
    }

    pub(super) fn send_summary(&mut self, key: PeerKey) {
        if let Some(summary) = self.sync.summary() {
            self.send(key, &summary);
        }
    }

    pub(super) fn tick_records(&mut self, now: Instant) {
        if self.sync.dirty && !self.sync.loading && now - self.sync.loaded_at >= RELOAD {
            self.load_records();
        }
        if now - self.sync.compared_at >= COMPARE && !self.peers.is_empty() {
            self.sync.compared_at = now;
            if let Some(key) = self.connector.choose(self.peers.keys()) {
                self.send_summary(key);
            }
        }
        if now - self.sync.minute >= Duration::from_secs(60) {
            self.sync.minute = now;
            for peer in self.peers.values_mut() {
                peer.ids_told = 0;
                peer.faults /= 2;
            }
        }
        let Sync {
            wants,
            ids,
            settled,
            ..
        } = &mut self.sync;
        let missing = wants.tick(now, |id| is_here(ids.as_deref(), settled, id));
        for key in wants.peers() {
            self.want_records(key, now);
        }
        if missing {
            // Somebody did not send what it told of: whoever else has it tells so once it hears that we lack it.
            let keys: Vec<_> = self.peers.keys().copied().collect();
            keys.into_iter().for_each(|key| self.send_summary(key));
        }
        for (key, digest) in self.sync.deferred.clone() {
            self.on_record_summary(key, digest);
        }
        if now >= self.sync.status_at {
            self.publish_status(now);
        }
    }

    pub(super) fn on_record_summary(&mut self, key: PeerKey, digest: RootHash) {
        let now = Instant::now();
        tracing::trace!(
            same = digest == self.sync.digest,
            ours = self.sync.ids.as_ref().map(Vec::len),
            "summary of records"
        );
        let Some(ids) = self
            .sync
            .ids
            .as_ref()
            .filter(|_| digest != self.sync.digest)
        else {
            return;
        };
        if self
            .sync
            .told
            .get(&key)
            .is_some_and(|at| now - *at < self.sync.tell_every())
        {
            self.sync.deferred.insert(key, digest);
            return;
        }
        self.sync.deferred.remove(&key);
        self.sync.told.insert(key, now);
        let mut chunks: Vec<_> = ids
            .chunks(MAX_RECORD_IDS)
            .map(<[RecordId]>::to_vec)
            .collect();
        if chunks.len() > MAX_TELLING / MAX_RECORD_IDS {
            let from = self.connector.rng().random_range(0..chunks.len());
            chunks.rotate_left(from);
            chunks.truncate(MAX_TELLING / MAX_RECORD_IDS);
        }
        // The peer may not know that ours differs: it tells its ids when it hears so. Once for each digest of its, so
        // that two who cannot agree do not go on for ever.
        let answered = self.sync.answered.insert(key, (digest, now));
        if answered.is_none_or(|(last, at)| last != digest || now - at >= COMPARE) {
            self.send_summary(key);
        }
        let count = chunks.len();
        for (number, ids) in chunks.into_iter().enumerate() {
            self.send(
                key,
                &Control::RecordIds {
                    ids,
                    last: number + 1 == count,
                },
            );
        }
    }

    pub(super) fn on_record_ids(&mut self, key: PeerKey, ids: Vec<RecordId>) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        let looked_at = ids.len().min(MAX_IDS_TOLD - peer.ids_told);
        peer.ids_told += looked_at;
        let Sync {
            wants,
            ids: ours,
            settled,
            ..
        } = &mut self.sync;
        let told = ids.into_iter().take(looked_at);
        let lacking = told.filter(|id| !is_here(ours.as_deref(), settled, id));
        wants.add(key, lacking);
        self.want_records(key, Instant::now());
    }

    /// Asks a peer for the next records that it told of, if it has answered the last request.
    fn want_records(&mut self, key: PeerKey, now: Instant) {
        let Sync {
            wants,
            ids,
            settled,
            ..
        } = &mut self.sync;
        let here = |id: &RecordId| is_here(ids.as_deref(), settled, id);
        if let Some(ids) = wants.next(key, now, here) {
            self.send(key, &Control::RecordWant { ids });
        }
    }

    pub(super) fn on_record_want(&mut self, key: PeerKey, ids: Vec<RecordId>) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        if peer.record_reads < MAX_READS {
            peer.record_reads += 1;
            self.pool.submit(Job::Records { peer: key, ids });
        } else if peer.wants.len() < MAX_WANTS {
            peer.wants.push_back(ids);
        } else {
            tracing::debug!(peer = %peer.id, "it asks for more records before it got the last: dropped");
        }
    }

    pub(super) fn on_records_read(&mut self, key: PeerKey, records: Vec<Vec<u8>>) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        match peer.wants.pop_front() {
            Some(ids) => self.pool.submit(Job::Records { peer: key, ids }),
            None => peer.record_reads -= 1,
        }
        let (mut batch, mut bytes) = (Vec::new(), 0);
        for record in records {
            if batch.len() >= BATCH_RECORDS || bytes + record.len() > BATCH_BYTES {
                let records = std::mem::take(&mut batch);
                self.send(key, &Control::Records { records });
                bytes = 0;
            }
            bytes += record.len();
            batch.push(record);
        }
        if !batch.is_empty() {
            self.send(key, &Control::Records { records: batch });
        }
    }

    pub(super) fn on_records(&mut self, key: PeerKey, records: Vec<Vec<u8>>) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        let now = Instant::now();
        self.sync.wants.came(key, records.len(), now);
        for bytes in records {
            if peer.offers + bytes.len() > MAX_OFFERED {
                tracing::debug!(peer = %peer.id, "records lost: more than were asked for");
                break;
            }
            peer.offers += bytes.len();
            self.pool.submit(Job::Offer {
                bytes,
                via: Via::Peer(key),
            });
        }
        self.want_records(key, now);
    }

    pub(super) fn on_offered(&mut self, bytes: Vec<u8>, via: Via, offer: Offer) {
        let acceptance = match offer {
            Offer::New => MessageAcceptance::Accept,
            Offer::Known | Offer::Later(_) => MessageAcceptance::Ignore,
            Offer::Rejected(_) => MessageAcceptance::Reject,
        };
        let from = match via {
            Via::Peer(key) => {
                let Some(peer) = self.peers.get_mut(&key) else {
                    return self.after_offer(bytes, offer, None);
                };
                peer.offers -= bytes.len();
                Some(peer.id)
            }
            Via::Gossip { from, message } => {
                self.sync.gossiped -= 1;
                self.judge_message(from, &message, acceptance);
                Some(from)
            }
        };
        self.after_offer(bytes, offer, from);
    }

    fn after_offer(&mut self, bytes: Vec<u8>, offer: Offer, from: Option<PeerId>) {
        match (offer, from) {
            (Offer::New, from) => {
                self.sync.dirty = true;
                self.tell(Event::RecordReceived { bytes, from });
            }
            (Offer::Known, _) => self.sync.settle(&bytes),
            (Offer::Later(reason), _) => {
                tracing::debug!(reason, "a record is left for later");
                let id = RecordId(RootHash::of(&bytes));
                if !self.sync.wants.postpone(id, Instant::now()) {
                    self.sync.settle(&bytes);
                }
            }
            (Offer::Rejected(reason), from) => {
                self.sync.settle(&bytes);
                if let Some(&key) = from.and_then(|id| self.keys.get(&id)) {
                    self.fault(
                        key,
                        &format!("it sent a record that is not valid: {reason}"),
                    );
                }
            }
        }
    }

    /// Spreads a record that this node made.
    pub(super) fn publish_record(&mut self, bytes: Vec<u8>) {
        self.sync.dirty = true;
        let topic = self.sync.topics.records.clone();
        match self.swarm.behaviour_mut().gossip.publish(topic, bytes) {
            // Without listeners it spreads by anti-entropy.
            Ok(_) | Err(PublishError::Duplicate | PublishError::NoPeersSubscribedToTopic) => {}
            Err(error) => {
                tracing::warn!(%error, "a record could not be gossiped: it spreads more slowly")
            }
        }
    }

    pub(super) fn set_capsules(&mut self, capsules: Vec<(CapsuleId, bool)>) {
        let held = |(id, complete)| HeldCapsule { id, complete };
        self.sync.capsules = capsules.into_iter().map(held).collect();
        self.sync.status_at = self.sync.status_at.min(Instant::now() + STATUS_DELAY);
    }

    fn publish_status(&mut self, now: Instant) {
        self.sync.sequence = (self.sync.sequence + 1).max((self.unix_time)());
        let reachable = |address: &&SocketAddr| !address.ip().is_unspecified();
        let text = |address: &SocketAddr| address::to_multiaddr(*address).to_string();
        let status = Status {
            machine: self.sync.machine,
            sequence: self.sync.sequence,
            capsules: self.sync.capsules.clone(),
            addresses: self
                .sync
                .listening
                .iter()
                .filter(reachable)
                .map(text)
                .collect(),
            name: self.machine_name.clone(),
            site: String::new(),
        };
        let topic = self.sync.topics.status.clone();
        let published = self
            .swarm
            .behaviour_mut()
            .gossip
            .publish(topic, status.encode());
        let jitter = self.connector.rng().random_range(0.7..1.3);
        self.sync.status_at = match published {
            Ok(_) => now + STATUS_EVERY.mul_f64(jitter),
            Err(_) => now + STATUS_RETRY.mul_f64(jitter),
        };
    }

    pub(super) fn on_gossip(&mut self, event: gossipsub::Event) {
        let gossipsub::Event::Message {
            propagation_source: from,
            message_id,
            message,
        } = event
        else {
            return;
        };
        if message.topic == self.sync.topics.records.hash() {
            if self.sync.gossiped >= MAX_GOSSIPED {
                return self.judge_message(from, &message_id, MessageAcceptance::Ignore);
            }
            self.sync.gossiped += 1;
            let via = Via::Gossip {
                from,
                message: message_id,
            };
            self.pool.submit(Job::Offer {
                bytes: message.data,
                via,
            });
        } else {
            let acceptance = self.on_status(message.source, &message.data);
            self.judge_message(from, &message_id, acceptance);
        }
    }

    /// Takes in another member's status.
    fn on_status(&mut self, source: Option<PeerId>, bytes: &[u8]) -> MessageAcceptance {
        let Ok(status) = Status::decode(bytes) else {
            return MessageAcceptance::Reject;
        };
        let Some(peer) = source.filter(|source| peer_id_of(&status.machine) == Some(*source))
        else {
            return MessageAcceptance::Reject;
        };
        let heard = &mut self.sync.heard;
        if heard
            .get(&status.machine)
            .is_some_and(|newest| *newest >= status.sequence)
        {
            return MessageAcceptance::Ignore;
        }
        if heard.len() >= MAX_MEMBERS && !heard.contains_key(&status.machine) {
            heard.pop_first();
        }
        heard.insert(status.machine, status.sequence);
        let sockets = status
            .addresses
            .iter()
            .filter_map(|text| address::to_socket(&text.parse().ok()?));
        let usable: Vec<_> = sockets
            .filter(|address| !address.ip().is_loopback())
            .collect();
        self.connector.directory.add_peer(peer, &usable);
        let capsules = status
            .capsules
            .iter()
            .map(|held| (held.id, held.complete))
            .collect();
        self.tell(Event::Status {
            peer,
            machine: status.machine,
            name: status.name,
            capsules,
        });
        MessageAcceptance::Accept
    }

    fn judge_message(&mut self, from: PeerId, id: &MessageId, acceptance: MessageAcceptance) {
        let gossip = &mut self.swarm.behaviour_mut().gossip;
        let _expired = gossip.report_message_validation_result(id, &from, acceptance);
    }
}
