//! What peers announce: kept for the people who ask, and told to the scheduler.
//!
//! A peer that claims another size than the fetch knows is simply not a provider of it: under a wrong size nothing
//! that it sends could verify. Where nobody knows the size yet, see `transfers`.

use capsule_proto::wire::Control;
use capsule_proto::{GroupRanges, RootHash};
use capsule_swarm_core::PeerKey;

use super::Engine;
use super::peer::Claimed;
use crate::api::Provider;

impl Engine {
    pub(super) fn on_have(
        &mut self,
        key: PeerKey,
        root: RootHash,
        size: u64,
        groups: &GroupRanges,
    ) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        match peer.claim(root, size, groups) {
            Claimed::Taken => {}
            Claimed::TooMany => {
                return tracing::debug!(peer = %peer.id, %root, "more blobs than are remembered of a peer");
            }
            Claimed::Contradiction => {
                return self.fault(key, "it announces one blob with two sizes");
            }
        }
        let holds_all = peer.claims[&root].groups == GroupRanges::all(size);
        let now = self.now();
        // What holds all needs no news of what others hold.
        self.announcements
            .set_interested(now, key, root, !holds_all);
        let known = self
            .transfers
            .get(&root)
            .and_then(|transfer| transfer.size());
        if known.is_some_and(|known| known != size) {
            return tracing::debug!(%root, known, size, "a peer claims another size");
        }
        self.uploads.handle_have(now, key, &root, groups);
        self.downloads.handle_have(now, key, &root, groups);
        self.try_probe(root);
    }

    pub(super) fn on_drop(&mut self, key: PeerKey, root: RootHash, groups: Option<&GroupRanges>) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        let gone = peer.disclaim(&root, groups);
        if !gone.is_empty() {
            let now = self.now();
            self.announcements.set_interested(now, key, root, true);
            self.downloads.handle_unhave(now, key, &root, &gone);
        }
    }

    pub(super) fn on_size_query(&mut self, key: PeerKey, root: RootHash) {
        if let Some(held) = self.held.get(&root) {
            let (size, groups) = (held.size, held.groups.clone());
            for message in super::serve::haves(root, size, &groups) {
                self.send(key, &message);
            }
        } else {
            self.send(key, &Control::Drop { root, groups: None });
        }
    }

    /// Makes the scheduler forget what peers claim of a blob under another size.
    pub(super) fn forget_other_sizes(&mut self, root: RootHash, size: u64) {
        let now = self.now();
        for (&key, peer) in &self.peers {
            if let Some(claim) = peer.claims.get(&root).filter(|claim| claim.size != size) {
                self.downloads.handle_unhave(now, key, &root, &claim.groups);
            }
        }
    }

    pub(super) fn providers(&self, root: &RootHash) -> Vec<Provider> {
        let claims = self
            .peers
            .values()
            .filter_map(|peer| Some((peer.id, peer.claims.get(root)?)));
        claims
            .map(|(peer, claim)| Provider {
                peer,
                size: claim.size,
                groups: claim.groups.clone(),
            })
            .collect()
    }
}
