//! What peers announce: kept for the people who ask, and told to the scheduler.
//!
//! A peer that claims another size than the fetch knows is simply not a provider of it: under a wrong size nothing
//! that it sends could verify. Where nobody knows the size yet, see `transfers`.

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
        match self.claim(key, root, size, groups) {
            Claimed::Taken => {}
            Claimed::TooMany => return,
            Claimed::Contradiction => {
                return self.fault(key, "it announces one blob with two sizes");
            }
        }
        self.on_answer(key, root);
        let Some(claim) = self.peers.get(&key).and_then(|peer| peer.claims.get(&root)) else {
            return;
        };
        let holds_all = claim.groups == GroupRanges::all(size);
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

    /// Remembers what a peer announces. Where that is too much, what is fetched or asked for comes first.
    fn claim(&mut self, key: PeerKey, root: RootHash, size: u64, groups: &GroupRanges) -> Claimed {
        let now = self.now();
        let Some(peer) = self.peers.get_mut(&key) else {
            return Claimed::TooMany;
        };
        let mut claimed = peer.claim(root, size, groups);
        if claimed != Claimed::TooMany {
            return claimed;
        }
        let first = !std::mem::replace(&mut peer.asking.tells_more, true);
        let (transfers, inquiries) = (&self.transfers, &self.inquiries);
        let wanted = |root: &RootHash| transfers.contains_key(root) || inquiries.contains(root);
        while wanted(&root)
            && claimed == Claimed::TooMany
            && let Some((other, forgotten)) = peer.forget_other(wanted)
        {
            self.downloads.handle_unhave(now, key, &other, &forgotten);
            claimed = peer.claim(root, size, groups);
        }
        if first {
            tracing::debug!(peer = %peer.id, "it holds more blobs than are remembered of a peer");
            self.on_tells_more();
        }
        claimed
    }

    pub(super) fn on_drop(&mut self, key: PeerKey, root: RootHash, groups: Option<&GroupRanges>) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        let gone = peer.disclaim(&root, groups);
        if groups.is_none() {
            self.on_answer(key, root);
        }
        if !gone.is_empty() {
            let now = self.now();
            self.announcements.set_interested(now, key, root, true);
            self.downloads.handle_unhave(now, key, &root, &gone);
        }
    }

    /// Makes the scheduler know what peers claim of a blob: of a peer with many it does not remember all.
    pub(super) fn remind_of_claims(&mut self, root: RootHash, size: u64) {
        let now = self.now();
        for (&key, peer) in &self.peers {
            if let Some(claim) = peer.claims.get(&root).filter(|claim| claim.size == size) {
                self.downloads.handle_have(now, key, &root, &claim.groups);
            }
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
