//! What this node holds: announcing it, and serving it.

use std::time::Instant;

use capsule_proto::ranges::{Height, group_bytes};
use capsule_proto::wire::{Control, MAX_RUNS_PER_HAVE, Reject, RejectReason, Request};
use capsule_proto::{GroupRanges, RootHash};
use capsule_swarm_core::{Change, IncomingRequest, PeerKey, Refusal, RequestId};

use super::peer::{Peer, Serving};
use super::pool::{Job, Part};
use super::{Engine, Held};
use crate::api::{Event, ServeError};
use crate::protocol::{self, Buffer};

/// Requests of one peer that are neither answered nor refused: those that the scheduler queues, and as many that are being
/// answered. Only who asks for tiny blobs and does not read what comes has more.
const MAX_OPEN: usize = 256;

impl Engine {
    /// Takes in that the store holds groups of a blob, and announces them.
    pub(super) fn hold(&mut self, root: RootHash, size: u64, groups: &GroupRanges) {
        if groups.is_empty() {
            return;
        }
        let held = self.held.entry(root).or_insert_with(|| Held {
            size,
            groups: GroupRanges::new(),
        });
        if held.size != size {
            tracing::warn!(%root, known = held.size, size, "announced with two sizes: the first counts");
            return;
        }
        held.groups.union_with(groups);
        let now = self.now();
        self.announcements.handle_held(now, root, size, groups);
    }

    /// Takes a blob back.
    pub(super) fn withdraw(&mut self, root: RootHash) {
        let Some(held) = self.held.remove(&root) else {
            return;
        };
        let now = self.now();
        self.announcements.handle_dropped(now, root, &held.groups);
        for (key, id) in self.uploads.remove_blob(&root) {
            self.reject(key, id.0, RejectReason::NotHeld);
        }
        // Who fetches more of it lacks what was taken back, too: the store says anew what is here.
        self.ask_store_again(root);
    }

    pub(super) fn pump_announcements(&mut self) {
        let now = self.now();
        while let Some(mut announce) = self.announcements.poll_announce(now) {
            if announce.change == Change::Have {
                let runs = announce.ranges.runs().len();
                let peers = &mut self.peers;
                let is_told = |key: &PeerKey| peers.get_mut(key).is_some_and(|p| p.is_told(runs));
                announce.peers.retain(is_told);
            }
            let messages = match announce.change {
                Change::Have => haves(announce.root, announce.size, &announce.ranges),
                Change::Unhave => drops(announce.root, &announce.ranges),
            };
            for message in messages {
                let frame = protocol::control_frame(&message);
                for &key in &announce.peers {
                    self.swarm.behaviour_mut().peers.send(key, frame.clone());
                }
            }
        }
        // Whoever was new is told all by now.
        self.peers
            .values_mut()
            .for_each(|peer| peer.greeting = None);
    }

    pub(super) fn on_request(&mut self, key: PeerKey, request: Request) {
        let Some(held) = self.held.get(&request.root) else {
            return self.refuse(key, request.id, RejectReason::NotHeld);
        };
        if held.size != request.size || !held.groups.contains_run(&request.groups) {
            return self.refuse(key, request.id, RejectReason::NotHeld);
        }
        let peer = self.peers.get(&key);
        let claim = peer.and_then(|peer| peer.claims.get(&request.root));
        let holds = claim.map_or(0, |claim| claim.groups.count());
        if peer.map_or(0, |peer| peer.open.len()) >= MAX_OPEN {
            return self.refuse(key, request.id, RejectReason::Busy);
        }
        let incoming = IncomingRequest {
            id: RequestId(request.id),
            root: request.root,
            size: request.size,
            groups: request.groups,
            demand: request.demand,
            whole: held.groups == GroupRanges::all(held.size),
            holds,
        };
        let now = self.now();
        match self.uploads.handle_request(now, key, incoming) {
            Ok(()) => {
                if let Some(peer) = self.peers.get_mut(&key) {
                    peer.open.insert(request.id, request.height);
                }
            }
            Err(Refusal::Busy | Refusal::UnknownPeer) => {
                self.refuse(key, request.id, RejectReason::Busy)
            }
            Err(error @ (Refusal::Malformed | Refusal::Duplicate)) => {
                self.violation(key, &format!("its request is refused: {error}"));
            }
        }
    }

    pub(super) fn on_cancel(&mut self, key: PeerKey, id: u64) {
        let now = self.now();
        if self.uploads.handle_cancel(now, key, RequestId(id)) {
            self.reject(key, id, RejectReason::Cancelled);
        }
    }

    /// Ends a request that was taken in.
    fn reject(&mut self, key: PeerKey, id: u64, reason: RejectReason) {
        if let Some(peer) = self.peers.get_mut(&key) {
            peer.open.remove(&id);
        }
        self.refuse(key, id, reason);
    }

    fn refuse(&mut self, key: PeerKey, id: u64, reason: RejectReason) {
        self.send(key, &Control::Reject(Reject { id, reason }));
    }

    /// Has responses read, as long as the scheduler and the memory for them allow.
    pub(super) fn pump_uploads(&mut self) {
        let now = self.now();
        self.read_delayed();
        while let Some(serve) = self.uploads.poll_serve(now) {
            let bytes = group_bytes(&serve.groups, serve.size);
            let bytes = bytes.end - bytes.start;
            let Some(peer) = self.peers.get_mut(&serve.peer) else {
                continue;
            };
            if peer.serving.is_empty() {
                peer.took = Instant::now();
            }
            peer.serving.insert(
                serve.id.0,
                Serving {
                    root: serve.root,
                    bytes,
                },
            );
            let height = peer.open.get(&serve.id.0).copied();
            peer.delayed.push_back(Part {
                peer: serve.peer,
                peer_id: peer.id,
                request: serve.id.0,
                root: serve.root,
                size: serve.size,
                groups: serve.groups,
                height: height.unwrap_or(Height::ROOT),
                transfer: 0,
            });
            self.read_delayed_of(serve.peer);
        }
    }

    /// Has responses read that had to wait for memory.
    fn read_delayed(&mut self) {
        let waits = |(&key, peer): (&PeerKey, &Peer)| (!peer.delayed.is_empty()).then_some(key);
        let waiting: Vec<_> = self.peers.iter().filter_map(waits).collect();
        waiting
            .into_iter()
            .for_each(|key| self.read_delayed_of(key));
    }

    /// Has a peer's responses read as far as there is memory: its own place, or what all share.
    fn read_delayed_of(&mut self, key: PeerKey) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        while let Some(part) = peer.delayed.front() {
            let encoded = capsule_chunker::bao::encoded_len(part.size, &part.groups, part.height);
            let len = protocol::CONTENT_HEADER + encoded as usize;
            let Some(frame) = self.outbound.try_empty(&peer.place, len) else {
                return;
            };
            if let Some(part) = peer.delayed.pop_front() {
                self.pool.submit(Job::Read { part, frame });
            }
        }
    }

    pub(super) fn on_read(&mut self, part: Part, result: Result<Buffer, ServeError>) {
        let (key, request) = (part.peer, part.request);
        match result {
            Ok(frame) => self
                .swarm
                .behaviour_mut()
                .peers
                .respond(key, request, frame),
            Err(error) => {
                let now = self.now();
                self.uploads
                    .handle_finished(now, key, RequestId(request), false);
                if let Some(peer) = self.peers.get_mut(&key) {
                    peer.serving.remove(&request);
                }
                let missing = matches!(error, ServeError::Missing { .. });
                let reason = if missing {
                    RejectReason::NotHeld
                } else {
                    RejectReason::Damaged
                };
                self.reject(key, request, reason);
                if !missing {
                    // Nobody else is to ask in vain; the node finds out what is left of it and announces that.
                    self.withdraw(part.root);
                    self.tell(Event::StoreDamaged {
                        root: part.root,
                        reason: error.to_string(),
                    });
                }
            }
        }
    }

    pub(super) fn on_sent(&mut self, key: PeerKey, request: u64, bytes: usize, finished: bool) {
        let now = self.now();
        self.uploads
            .handle_sent(now, key, RequestId(request), bytes as u64);
        if let Some(peer) = self.peers.get_mut(&key) {
            // The lane takes no more than the peer makes room for: it lives, though its pongs may wait in a slow link.
            peer.pulse.heard(Instant::now());
            peer.took = Instant::now();
        }
        if !finished {
            return;
        }
        self.uploads
            .handle_finished(now, key, RequestId(request), true);
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        peer.open.remove(&request);
        if let Some(serving) = peer.serving.remove(&request) {
            peer.outgoing.bytes += serving.bytes;
            self.tally.sent(serving.root, serving.bytes);
        }
    }
}

/// The messages that announce groups of a blob, each within its bound.
pub(super) fn haves(root: RootHash, size: u64, groups: &GroupRanges) -> Vec<Control> {
    split(groups)
        .map(|groups| Control::Have { root, size, groups })
        .collect()
}

/// The messages that take groups of a blob back.
fn drops(root: RootHash, groups: &GroupRanges) -> Vec<Control> {
    split(groups)
        .map(|groups| Control::Drop {
            root,
            groups: Some(groups),
        })
        .collect()
}

fn split(groups: &GroupRanges) -> impl Iterator<Item = GroupRanges> {
    groups
        .runs()
        .chunks(MAX_RUNS_PER_HAVE)
        .map(|runs| runs.iter().cloned().collect())
}
