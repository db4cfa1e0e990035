//! What comes back for requests: responses to the store, the store's verdicts to the scheduler.
//!
//! Every request ends once: answered in full, rejected, or with its peer's connection. What a peer sends that does not verify
//! is its fault and bans it; what cannot be stored is ours and ends the fetch.

use capsule_proto::GroupRanges;
use capsule_proto::ranges::group_bytes;
use capsule_proto::wire::{Reject, RejectReason};
use capsule_swarm_core::{Failure, PeerKey, RequestId};

use super::Engine;
use super::pool::{Job, Part};
use super::sizing::FIRST_PROBE;
use super::transfers::Stage;
use crate::api::StoreError;
use crate::protocol::Response;

impl Engine {
    /// A response, or a part of one, came.
    pub(super) fn on_content(&mut self, key: PeerKey, response: Response) {
        let Response { header, encoded } = response;
        let (id, now) = (header.request, self.now());
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        let Some(asked) = peer.asked.get_mut(&id) else {
            return self.violation(key, "it answers what was not asked");
        };
        let groups = asked.groups.start..asked.groups.start + u64::from(header.groups);
        if groups.end > asked.groups.end || header.compressed {
            peer.asked.remove(&id);
            if id >= FIRST_PROBE {
                return self.violation(key, "it answers with more than was asked");
            }
            return self
                .downloads
                .handle_failed(now, key, RequestId(id), Failure::Malformed);
        }
        let part = Part {
            peer: key,
            peer_id: peer.id,
            request: id,
            root: asked.root,
            size: asked.size,
            groups: groups.clone(),
            height: asked.height,
            transfer: asked.transfer,
        };
        asked.groups.start = groups.end;
        if asked.groups.is_empty() {
            peer.asked.remove(&id);
        }
        // What comes next need not wait until it is written.
        let bytes = group_bytes(&groups, part.size);
        let bytes = bytes.end - bytes.start;
        self.downloads
            .handle_progress(now, key, RequestId(id), bytes);
        self.pool.submit(Job::Write { part, encoded });
    }

    /// The store took, or refused, what came.
    pub(super) fn on_written(&mut self, part: Part, result: Result<(), StoreError>) {
        let (key, id, now) = (part.peer, RequestId(part.request), self.now());
        match result {
            Ok(()) => self.on_verified(&part),
            Err(StoreError::Invalid { .. }) => {
                self.downloads.handle_failed(now, key, id, Failure::Corrupt);
                // Also where the scheduler no longer knows the request, or never did.
                self.ban_id(part.peer_id, "it sent content that does not match its hash");
                self.probe_failed(part.root, key);
            }
            Err(StoreError::Unknown) => {
                if let Some(transfer) = self.transfers.get_mut(&part.root) {
                    transfer.from_root = true;
                }
                self.downloads
                    .handle_failed(now, key, id, Failure::Cancelled);
                self.probe_failed(part.root, key);
            }
            Err(error) => {
                self.downloads
                    .handle_failed(now, key, id, Failure::NotStored);
                self.fail_transfer(&part, error);
            }
        }
    }

    fn on_verified(&mut self, part: &Part) {
        let Part {
            peer: key,
            root,
            size,
            ref groups,
            ..
        } = *part;
        let bytes = group_bytes(groups, size);
        let bytes = bytes.end - bytes.start;
        self.tally.received(root, bytes);
        if let Some(peer) = self.peers.get_mut(&key) {
            peer.incoming.bytes += bytes;
        }
        let now = self.now();
        let came = GroupRanges::from(groups.clone());
        let fresh = match self.held.get(&root) {
            Some(held) => came.difference(&held.groups).bytes(size),
            None => bytes,
        };
        self.hold(root, size, &came);
        let Some(transfer) = self.transfers.get_mut(&root) else {
            return;
        };
        // What another sent first counts as that one's.
        if fresh > 0 {
            *transfer.by_peer.entry(part.peer_id).or_default() += fresh;
        }
        if part.request >= FIRST_PROBE {
            transfer.probe = None;
            if transfer.stage != Stage::Active {
                self.activate(root, size, groups.clone().into());
            }
            return;
        }
        let partial = transfer.wants_parts();
        let rare = self
            .downloads
            .handle_received(now, key, RequestId(part.request), groups);
        if rare {
            self.announcements.hurry(now, &root);
        }
        if partial {
            self.end_complete(root);
        }
    }

    pub(super) fn on_reject(&mut self, key: PeerKey, reject: Reject) {
        let now = self.now();
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        let Some(asked) = peer.asked.remove(&reject.id) else {
            return;
        };
        let failure = match reject.reason {
            RejectReason::NotHeld | RejectReason::Damaged => Failure::NotHeld,
            RejectReason::Busy => Failure::Busy,
            RejectReason::Cancelled => Failure::Cancelled,
        };
        if failure == Failure::NotHeld {
            peer.disclaim(&asked.root, Some(&asked.groups.clone().into()));
        }
        if asked.probe {
            self.probe_failed(asked.root, key);
        } else {
            self.downloads
                .handle_failed(now, key, RequestId(reject.id), failure);
        }
    }
}
