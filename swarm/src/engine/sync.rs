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
use crate::address;
use crate::api::{Event, Offer, RecordId};
use crate::transport::peer_id_of;

/// Records in one message, and their bytes: well within a control message's bound.
const BATCH_RECORDS: usize = 256;
const BATCH_BYTES: usize = 512 << 10;
/// Bytes of records that one peer may have waiting to be checked: what it sends for one request of ours.
const MAX_OFFERED: usize = 8 << 20;
/// Reads of records for one peer at once.
const MAX_READS: usize = 2;
/// Records by gossip that may wait to be checked.
const MAX_GOSSIPED: usize = 256;
/// Ids that a peer may tell in a minute.
const MAX_IDS_TOLD: usize = 1 << 18;
/// Ids remembered that need not be asked for: superseded or invalid records.
const MAX_SETTLED: usize = 1 << 16;
/// Members whose newest status is remembered.
const MAX_MEMBERS: usize = 4096;
/// Least time between two readings of our set of ids; also how long a set that changes is left alone before others are told.
const RELOAD: Duration = Duration::from_millis(500);
/// How often one peer's digest is compared for no reason.
const COMPARE: Duration = Duration::from_secs(30);
/// Least time between two tellings of all ids to one peer.
const TELL_IDS: Duration = Duration::from_millis(800);
/// How long a record that was asked of one peer is not asked of another.
const ASKED: Duration = Duration::from_secs(5);
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
    asked: BTreeMap<RecordId, Instant>,
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
            asked: BTreeMap::new(),
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
    }
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
            self.peers.values_mut().for_each(|peer| peer.ids_told = 0);
        }
        let Sync {
            asked,
            ids,
            settled,
            ..
        } = &mut self.sync;
        let here = |id: &RecordId| {
            let ids = ids.as_deref().unwrap_or_default();
            settled.contains(id) || ids.binary_search(id).is_ok()
        };
        let mut missing = false;
        asked.retain(|id, at| {
            let waits = now - *at < ASKED;
            missing |= !waits && !here(id);
            waits
        });
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
            .is_some_and(|at| now - *at < TELL_IDS)
        {
            self.sync.deferred.insert(key, digest);
            return;
        }
        self.sync.deferred.remove(&key);
        self.sync.told.insert(key, now);
        let chunks: Vec<_> = ids
            .chunks(MAX_RECORD_IDS)
            .map(<[RecordId]>::to_vec)
            .collect();
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
        let now = Instant::now();
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        peer.ids_told += ids.len();
        if peer.ids_told > MAX_IDS_TOLD {
            return self.fault(key, "it tells more records than a fleet has");
        }
        let sync = &self.sync;
        // Not read yet: then what we have in truth is asked for in vain, once.
        let ours = sync.ids.as_deref().unwrap_or_default();
        let lacking = |id: &RecordId| {
            ours.binary_search(id).is_err()
                && !sync.settled.contains(id)
                && !sync.asked.contains_key(id)
        };
        let wanted: Vec<_> = ids.into_iter().filter(lacking).collect();
        if !wanted.is_empty() {
            self.sync.asked.extend(wanted.iter().map(|id| (*id, now)));
            self.send(key, &Control::RecordWant { ids: wanted });
        }
    }

    pub(super) fn on_record_want(&mut self, key: PeerKey, ids: Vec<RecordId>) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        if peer.record_reads >= MAX_READS {
            return self.fault(key, "it asks for more records before it got the last");
        }
        peer.record_reads += 1;
        self.pool.submit(Job::Records { peer: key, ids });
    }

    pub(super) fn on_records_read(&mut self, key: PeerKey, records: Vec<Vec<u8>>) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        peer.record_reads -= 1;
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
    }

    pub(super) fn on_offered(&mut self, bytes: Vec<u8>, via: Via, offer: Offer) {
        let acceptance = match offer {
            Offer::New => MessageAcceptance::Accept,
            Offer::Known => MessageAcceptance::Ignore,
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
