//! Finding out the size of a blob of which only the root hash is known.
//!
//! A peer that claims to hold the last group is asked for it, under the size that it claims. If that verifies, the size is
//! proved: the last group's place in the tree, and its length, are in the hash. Else that peer lied, and the next is asked.

use std::ops::Range;
use std::time::{Duration, Instant};

use capsule_proto::ranges::{Height, group_bytes, group_count};
use capsule_proto::wire::Request;
use capsule_proto::{GroupRanges, RootHash};
use capsule_swarm_core::{MAX_REQUEST_GROUPS, PeerKey};

use super::Engine;
use super::transfers::Stage;

/// Numbers of requests that do not come from the scheduler, which counts from 0.
pub(super) const FIRST_PROBE: u64 = 1 << 63;
/// Time that a peer has to prove the size that it claims.
const PATIENCE: Duration = Duration::from_secs(4);

impl Engine {
    /// Asks a peer to prove the size that it claims.
    pub(super) fn try_probe(&mut self, root: RootHash) {
        let Some(transfer) = self.transfers.get_mut(&root) else {
            return;
        };
        if transfer.stage != Stage::Sizing || transfer.probe.is_some() {
            return;
        }
        let bound = self.limits.unsized_blob_max;
        let candidate = self.peers.iter().find_map(|(&key, peer)| {
            let claim = peer.claims.get(&root)?;
            let last = group_count(claim.size) - 1;
            let most = self.downloads.most_groups(key).min(MAX_REQUEST_GROUPS);
            let usable = claim.size <= bound
                && !transfer.unproved.contains(&key)
                && claim.groups.contains(last);
            usable.then_some((
                key,
                claim.size,
                probe_groups(claim.size, &claim.groups, most),
            ))
        });
        let Some((key, size, groups)) = candidate else {
            return;
        };
        transfer.probe = Some((key, Instant::now()));
        let bytes = group_bytes(&groups, size);
        let now = self.now();
        self.downloads.charge(now, key, bytes.end - bytes.start);
        let id = self.next_probe;
        self.next_probe += 1;
        self.ask(
            key,
            Request {
                id,
                root,
                size,
                groups,
                demand: true,
                compress: false,
                height: Height::ROOT,
            },
            true,
        );
    }

    /// A peer did not prove the size that it claims: another is asked.
    pub(super) fn probe_failed(&mut self, root: RootHash, key: PeerKey) {
        let Some(transfer) = self.transfers.get_mut(&root) else {
            return;
        };
        if transfer.probe.is_some_and(|(asked, _)| asked == key) {
            transfer.probe = None;
            transfer.unproved.insert(key);
            self.try_probe(root);
        }
    }

    /// A peer is gone: nobody waits for its proofs.
    pub(super) fn forget_probes(&mut self, key: PeerKey) {
        let roots: Vec<_> = self.transfers.keys().copied().collect();
        for root in roots {
            self.probe_failed(root, key);
            if let Some(transfer) = self.transfers.get_mut(&root) {
                transfer.unproved.remove(&key);
            }
        }
    }

    /// Gives up on a proof that does not come.
    pub(super) fn tick_probe(&mut self, root: RootHash) {
        let Some(transfer) = self.transfers.get_mut(&root) else {
            return;
        };
        match transfer.probe {
            Some((key, since)) if since.elapsed() > PATIENCE => self.probe_failed(root, key),
            Some(_) => {}
            None => {
                // All were asked: perhaps one of them is better by now.
                transfer.unproved.clear();
                self.try_probe(root);
            }
        }
    }
}

/// What proves a size: all of a blob of `most` groups at most, else its last group.
fn probe_groups(size: u64, claimed: &GroupRanges, most: u64) -> Range<u64> {
    let count = group_count(size);
    let all = count <= most && claimed.contains_run(&(0..count));
    if all { 0..count } else { count - 1..count }
}
