//! Records by anti-entropy, so that whoever missed one by gossip has it later; and whatever way they come, their check.
//!
//! Peers tell each other a digest of the ids of their records, on connecting, when their set changed, and one at random now
//! and then. Where digests differ the ids follow, then records are asked for and sent. Every message is bounded; who sends
//! records that are not valid is at fault.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use capsule_proto::RootHash;
use capsule_proto::wire::{Control, MAX_RECORD_IDS};
use capsule_swarm_core::PeerKey;
use libp2p::PeerId;
use libp2p::gossipsub::{MessageAcceptance, MessageId, PublishError};
use rand::RngExt;

use super::Engine;
use super::pool::{Job, Via};
use super::wants::Wants;
use crate::api::{Event, Offer, RecordId};

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
/// Least time between two readings of our set of ids; also how long a set that changes is left alone before others are told.
const RELOAD: Duration = Duration::from_millis(500);
/// When a peer is told again that its digest differs from ours, though it is the same one as before.
const COMPARE: Duration = Duration::from_secs(30);
/// Least time between two tellings of ids to one peer: the first for a small set, the second for each
/// [`MAX_RECORD_IDS`] of a large one, so that no more are told than the peer looks at.
const TELL_IDS: Duration = Duration::from_millis(800);
const TELL_CHUNK: Duration = Duration::from_secs(4);

/// What is known of records, ours and peers'.
pub(super) struct Records {
    /// Sorted; `None` until the store was asked.
    ids: Option<Vec<RecordId>>,
    digest: RootHash,
    loading: bool,
    dirty: bool,
    loaded_at: Instant,
    minute: Instant,
    settled: HashSet<RecordId>,
    wants: Wants,
    told: BTreeMap<PeerKey, Instant>,
    /// The digest of each peer that was last answered with ours, and when.
    answered: BTreeMap<PeerKey, (RootHash, Instant)>,
    /// Peers whose digest came too soon after they were told all ids.
    deferred: BTreeMap<PeerKey, RootHash>,
    gossiped: usize,
}

impl Records {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            ids: None,
            digest: RootHash::of(&[]),
            loading: false,
            dirty: false,
            loaded_at: now,
            minute: now,
            settled: HashSet::new(),
            wants: Wants::default(),
            told: BTreeMap::new(),
            answered: BTreeMap::new(),
            deferred: BTreeMap::new(),
            gossiped: 0,
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
        self.records.loading = true;
        self.records.dirty = false;
        self.pool.submit(Job::RecordIds);
    }

    pub(super) fn on_record_ids_loaded(&mut self, ids: Vec<RecordId>) {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| *id.0.as_bytes()).collect();
        let digest = RootHash::of(&bytes);
        let changed = self.records.ids.is_none() || self.records.digest != digest;
        self.records.ids = Some(ids);
        self.records.digest = digest;
        self.records.loading = false;
        self.records.loaded_at = Instant::now();
        if changed {
            let keys: Vec<_> = self.peers.keys().copied().collect();
            keys.into_iter().for_each(|key| self.send_summary(key));
        }
    }

    pub(super) fn send_summary(&mut self, key: PeerKey) {
        if let Some(summary) = self.records.summary() {
            self.send(key, &summary);
        }
    }

    pub(super) fn tick_records(&mut self, now: Instant) {
        if self.records.dirty && !self.records.loading && now - self.records.loaded_at >= RELOAD {
            self.load_records();
        }
        if now - self.records.minute >= Duration::from_secs(60) {
            self.records.minute = now;
            for peer in self.peers.values_mut() {
                peer.ids_told = 0;
                peer.faults /= 2;
            }
        }
        let Records {
            wants,
            ids,
            settled,
            ..
        } = &mut self.records;
        let missing = wants.tick(now, |id| is_here(ids.as_deref(), settled, id));
        for key in wants.peers() {
            self.want_records(key, now);
        }
        if missing {
            // Somebody did not send what it told of: whoever else has it tells so once it hears that we lack it.
            let keys: Vec<_> = self.peers.keys().copied().collect();
            keys.into_iter().for_each(|key| self.send_summary(key));
        }
        for (key, digest) in self.records.deferred.clone() {
            self.on_record_summary(key, digest);
        }
    }

    pub(super) fn on_record_summary(&mut self, key: PeerKey, digest: RootHash) {
        let now = Instant::now();
        tracing::trace!(
            same = digest == self.records.digest,
            ours = self.records.ids.as_ref().map(Vec::len),
            "summary of records"
        );
        let Some(ids) = self
            .records
            .ids
            .as_ref()
            .filter(|_| digest != self.records.digest)
        else {
            return;
        };
        if self
            .records
            .told
            .get(&key)
            .is_some_and(|at| now - *at < self.records.tell_every())
        {
            self.records.deferred.insert(key, digest);
            return;
        }
        self.records.deferred.remove(&key);
        self.records.told.insert(key, now);
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
        let answered = self.records.answered.insert(key, (digest, now));
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
        let Records {
            wants,
            ids: ours,
            settled,
            ..
        } = &mut self.records;
        let told = ids.into_iter().take(looked_at);
        let lacking = told.filter(|id| !is_here(ours.as_deref(), settled, id));
        wants.add(key, lacking);
        self.want_records(key, Instant::now());
    }

    /// Asks a peer for the next records that it told of, if it has answered the last request.
    fn want_records(&mut self, key: PeerKey, now: Instant) {
        let Records {
            wants,
            ids,
            settled,
            ..
        } = &mut self.records;
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
        self.records.wants.came(key, records.len(), now);
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
                self.records.gossiped -= 1;
                self.judge_message(from, &message, acceptance);
                Some(from)
            }
        };
        self.after_offer(bytes, offer, from);
    }

    fn after_offer(&mut self, bytes: Vec<u8>, offer: Offer, from: Option<PeerId>) {
        match (offer, from) {
            (Offer::New, from) => {
                self.records.dirty = true;
                self.tell(Event::RecordReceived { bytes, from });
            }
            (Offer::Known, _) => self.records.settle(&bytes),
            (Offer::Later(reason), _) => {
                tracing::debug!(reason, "a record is left for later");
                let id = RecordId(RootHash::of(&bytes));
                if !self.records.wants.postpone(id, Instant::now()) {
                    self.records.settle(&bytes);
                }
            }
            (Offer::Rejected(reason), from) => {
                self.records.settle(&bytes);
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
        self.records.dirty = true;
        let topic = self.topics.records.clone();
        match self.swarm.behaviour_mut().gossip.publish(topic, bytes) {
            // Without listeners it spreads by anti-entropy.
            Ok(_) | Err(PublishError::Duplicate | PublishError::NoPeersSubscribedToTopic) => {}
            Err(error) => {
                tracing::warn!(%error, "a record could not be gossiped: it spreads more slowly")
            }
        }
    }

    /// A record came by gossip: it is checked before it is passed on.
    pub(super) fn on_record_gossiped(&mut self, from: PeerId, message: MessageId, bytes: Vec<u8>) {
        if self.records.gossiped >= MAX_GOSSIPED {
            return self.judge_message(from, &message, MessageAcceptance::Ignore);
        }
        self.records.gossiped += 1;
        let via = Via::Gossip { from, message };
        self.pool.submit(Job::Offer { bytes, via });
    }
}
