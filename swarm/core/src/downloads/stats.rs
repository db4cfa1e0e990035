//! Getters: where transfers stand.

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::GroupRanges;

use super::blob::Blob;
use super::{BlobStats, BlobStatus, Downloads, PeerStats, ProviderStats};
use crate::PeerKey;

/// Pieces with this many providers and more are counted together.
const HISTOGRAM: usize = 32;

impl Downloads {
    /// The state of a blob; `None` if it is not being fetched.
    pub fn status(&self, root: &RootHash) -> Option<BlobStatus> {
        self.blob(root).map(|blob| self.status_of(blob))
    }

    /// What is held of a blob, verified and stored.
    pub fn held(&self, root: &RootHash) -> Option<&GroupRanges> {
        self.blob(root).map(|blob| blob.map.held())
    }

    /// Figures of a blob's transfer. Linear in its pieces and providers: for people, not for every event.
    pub fn blob_stats(&self, root: &RootHash) -> Option<BlobStats> {
        let blob = self.blob(root)?;
        let (map, size) = (&blob.map, blob.size());
        let gone = (blob.received_of_gone > 0).then_some((None, blob.received_of_gone));
        let providers = blob.providers().filter_map(|(slot, view)| {
            let peer = self.peers[slot].as_ref()?.key;
            Some(ProviderStats {
                peer,
                holds: view.have().bytes(size),
                seeder: view.is_seeder(),
            })
        });
        Some(BlobStats {
            status: self.status_of(blob),
            wanted: map.want().bytes(size),
            held: map.want().intersection(map.held()).bytes(size),
            in_flight: blob.flights.groups().bytes(size),
            duplicate: blob.duplicate,
            received: blob
                .received
                .iter()
                .map(|(&peer, &bytes)| (Some(peer), bytes))
                .chain(gone)
                .collect(),
            availability: availability(blob),
            providers: providers.collect(),
            rate: blob.meter.rate().unwrap_or_default(),
        })
    }

    /// Figures of a peer; `None` if it is not connected.
    pub fn peer_stats(&self, peer: PeerKey) -> Option<PeerStats> {
        let peer = self.peers[*self.slots.get(&peer)?].as_ref()?;
        Some(PeerStats {
            rate: peer.rate(),
            delay: peer.delay(),
            window: peer.window(),
            outstanding: peer.outstanding(),
            backing_off: peer.backoff_until().is_some(),
        })
    }

    /// The blobs being fetched (complete ones included, until removed), in order of their hashes.
    pub fn blobs(&self) -> impl Iterator<Item = &RootHash> {
        self.roots.keys()
    }

    /// Connected peers that announced something of the blob, whether or not it is being fetched here.
    pub fn providers(&self, root: &RootHash) -> Vec<PeerKey> {
        let holds = |slot: usize| match self.blob(root) {
            Some(blob) => blob.view(slot).is_some_and(|view| !view.have().is_empty()),
            None => self.peers[slot]
                .as_ref()
                .is_some_and(|peer| peer.haves.contains_key(root)),
        };
        self.slots
            .iter()
            .filter(|&(_, &slot)| holds(slot))
            .map(|(&peer, _)| peer)
            .collect()
    }

    fn blob(&self, root: &RootHash) -> Option<&Blob> {
        self.blobs[*self.roots.get(root)?].as_ref()
    }

    fn status_of(&self, blob: &Blob) -> BlobStatus {
        if let Some(reason) = blob.paused {
            return BlobStatus::Paused(reason);
        }
        if blob.map.is_complete() {
            return BlobStatus::Complete;
        }
        let usable = |slot: usize| {
            self.peers[slot]
                .as_ref()
                .is_some_and(|peer| peer.is_usable())
        };
        let held = |have: &GroupRanges| !have.intersection(blob.map.lacking()).is_empty();
        if blob
            .providers()
            .any(|(slot, view)| usable(slot) && held(view.have()))
        {
            BlobStatus::Active
        } else {
            BlobStatus::Starved
        }
    }
}

/// How many pieces that are not held have 0, 1, 2 ... providers.
fn availability(blob: &Blob) -> Vec<u32> {
    let map = &blob.map;
    let seeders = blob
        .providers()
        .filter(|(_, view)| view.is_seeder())
        .count();
    let mut histogram = vec![0; HISTOGRAM + 1];
    for piece in 0..map.geometry().pieces() {
        if map.lacking().intersects(&map.geometry().groups_of(piece)) {
            histogram[(usize::from(map.partial(piece)) + seeders).min(HISTOGRAM)] += 1;
        }
    }
    histogram
}
