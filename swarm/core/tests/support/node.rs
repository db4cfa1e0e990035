//! What a daemon does around the scheduler: carries messages between its three parts and the network.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::{GroupRanges, group_count};
use capsule_swarm_core::{
    Announce, AnnounceConfig, Announcements, BlobSpec, Change, DownloadConfig, Downloads, Failure,
    IncomingRequest, Output, PeerKey, PieceGeometry, Refusal, RequestId, Time, UploadConfig,
    Uploads,
};

use super::{Manner, Member};

/// A message between nodes. Responses travel in cells; this is the rest.
#[derive(Clone, Debug)]
pub enum Message {
    Request {
        id: RequestId,
        groups: Range<u64>,
        demand: bool,
    },
    Cancel {
        id: RequestId,
    },
    Failed {
        id: RequestId,
        failure: Failure,
    },
    Have {
        ranges: GroupRanges,
    },
    Unhave {
        ranges: GroupRanges,
    },
    Gone,
}

impl Message {
    /// Bytes on the wire, framing and TLS record included.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Request { .. } => 80,
            Self::Cancel { .. } | Self::Failed { .. } => 40,
            Self::Have { ranges } | Self::Unhave { ranges } => 80 + 5 * ranges.runs().len() as u64,
            Self::Gone => 0,
        }
    }
}

/// A response on its way to one peer.
#[derive(Clone, Debug)]
pub struct Response {
    pub id: RequestId,
    pub groups: Range<u64>,
    pub content: u64,
    /// Bytes on the wire: content, and the hashes of the slice.
    pub wire: u64,
    pub sent: u64,
}

/// Bytes sent to one peer that wait or are on their way.
#[derive(Debug, Default)]
pub struct Flow {
    pub waiting: VecDeque<Response>,
    pub in_network: u64,
}

pub struct Node {
    pub me: usize,
    pub member: Member,
    pub root: RootHash,
    pub geometry: PieceGeometry,
    pub downloads: Downloads,
    pub uploads: Uploads,
    pub announcements: Announcements,
    pub flows: BTreeMap<usize, Flow>,
    pub alive: bool,
    pub finished: Option<Time>,
    pub served: u64,
    pub received: u64,
    pub control: u64,
    pub requests: u64,
    pub bans: Vec<usize>,
    /// Messages to send.
    pub outbox: Vec<(usize, Message)>,
}

impl Node {
    pub fn new(me: usize, member: Member, root: RootHash, size: u64, seed: u64) -> Self {
        let mut node = Self {
            me,
            member,
            root,
            geometry: PieceGeometry::of(size),
            downloads: Downloads::new(
                DownloadConfig::default(),
                seed ^ (me as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15),
            ),
            uploads: Uploads::new(UploadConfig::default()),
            announcements: Announcements::new(AnnounceConfig::default()),
            flows: BTreeMap::new(),
            alive: true,
            finished: None,
            served: 0,
            received: 0,
            control: 0,
            requests: 0,
            bans: Vec::new(),
            outbox: Vec::new(),
        };
        let all = GroupRanges::all(size);
        if member.seeds || member.manner != Manner::Honest {
            node.announcements.handle_held(Time::ZERO, root, size, &all);
        }
        if member.manner == Manner::Honest {
            let have = if member.seeds {
                all.clone()
            } else {
                GroupRanges::new()
            };
            let spec = BlobSpec {
                root,
                size,
                have,
                want: all,
                priority: 0,
            };
            node.downloads
                .add_blob(Time::ZERO, spec)
                .expect("a first blob");
        }
        node
    }

    pub fn connect(&mut self, now: Time, other: usize) {
        let peer = PeerKey(other as u64);
        self.flows.insert(other, Flow::default());
        self.downloads.peer_connected(now, peer);
        self.uploads.peer_connected(now, peer);
        self.announcements.peer_connected(now, peer);
    }

    pub fn disconnect(&mut self, now: Time, other: usize) {
        let peer = PeerKey(other as u64);
        self.flows.remove(&other);
        self.downloads.peer_disconnected(now, peer);
        self.uploads.peer_disconnected(now, peer);
        self.announcements.peer_disconnected(now, peer);
    }

    pub fn holds(&self, groups: &Range<u64>) -> bool {
        self.downloads
            .held(&self.root)
            .is_some_and(|held| held.contains_run(groups))
    }

    /// Takes in a message.
    pub fn handle(&mut self, now: Time, from: usize, message: Message) {
        let peer = PeerKey(from as u64);
        if !self.flows.contains_key(&from) {
            return;
        }
        match message {
            Message::Request { id, groups, demand } => {
                self.handle_request(now, from, id, groups, demand)
            }
            Message::Cancel { id } => {
                if self.member.manner != Manner::Stalls && self.uploads.handle_cancel(now, peer, id)
                {
                    self.outbox.push((
                        from,
                        Message::Failed {
                            id,
                            failure: Failure::Cancelled,
                        },
                    ));
                }
            }
            Message::Failed { id, failure } => self.downloads.handle_failed(now, peer, id, failure),
            Message::Have { ranges } => {
                if ranges.contains_run(&(0..self.geometry.groups())) {
                    self.announcements
                        .set_interested(now, peer, self.root, false);
                }
                self.uploads.handle_have(now, peer, &self.root, &ranges);
                self.downloads.handle_have(now, peer, &self.root, &ranges);
            }
            Message::Unhave { ranges } => {
                self.downloads.handle_unhave(now, peer, &self.root, &ranges)
            }
            Message::Gone => self.disconnect(now, from),
        }
    }

    fn handle_request(
        &mut self,
        now: Time,
        from: usize,
        id: RequestId,
        groups: Range<u64>,
        demand: bool,
    ) {
        let fail = |failure| (from, Message::Failed { id, failure });
        match self.member.manner {
            Manner::Stalls | Manner::Drips => return,
            Manner::Refuses => return self.outbox.push(fail(Failure::NotHeld)),
            Manner::Corrupts => {}
            Manner::Honest if !self.holds(&groups) => {
                return self.outbox.push(fail(Failure::NotHeld));
            }
            Manner::Honest => {}
        }
        let whole = self.holds(&(0..self.geometry.groups()));
        let request = IncomingRequest {
            id,
            root: self.root,
            size: self.geometry.size(),
            groups,
            demand,
            whole,
        };
        match self
            .uploads
            .handle_request(now, PeerKey(from as u64), request)
        {
            Ok(()) => {}
            Err(Refusal::Busy) => self.outbox.push(fail(Failure::Busy)),
            Err(refusal) => panic!(
                "node {}: a scheduler asked for what may not be: {refusal}",
                self.me
            ),
        }
    }

    /// Takes in a part of a response; `done` with its last cell.
    pub fn handle_cell(
        &mut self,
        now: Time,
        from: usize,
        response: &Response,
        bytes: u64,
        provider: Manner,
    ) {
        let peer = PeerKey(from as u64);
        if !self.flows.contains_key(&from) {
            return;
        }
        self.downloads
            .handle_progress(now, peer, response.id, bytes);
        if response.sent < response.wire {
            return;
        }
        if provider == Manner::Corrupts {
            return self
                .downloads
                .handle_failed(now, peer, response.id, Failure::Corrupt);
        }
        self.received += response.content;
        let rare = self
            .downloads
            .handle_received(now, peer, response.id, &response.groups);
        self.announcements.handle_held(
            now,
            self.root,
            self.geometry.size(),
            &response.groups.clone().into(),
        );
        if rare {
            self.announcements.hurry(now, &self.root);
        }
    }

    /// Carries out all that the scheduler wants now. Returns whom to cut off.
    pub fn poll(&mut self, now: Time) -> Vec<usize> {
        let mut cut = Vec::new();
        while let Some(output) = self.downloads.poll_output(now) {
            match output {
                Output::Request {
                    peer,
                    id,
                    groups,
                    demand,
                    ..
                } => {
                    self.requests += 1;
                    self.outbox
                        .push((peer.0 as usize, Message::Request { id, groups, demand }));
                }
                Output::Cancel { peer, id } => {
                    self.outbox.push((peer.0 as usize, Message::Cancel { id }))
                }
                Output::Complete { .. } => {
                    assert!(
                        self.holds(&(0..group_count(self.geometry.size()))),
                        "complete, but not held"
                    );
                    self.finished.get_or_insert(now);
                }
                Output::Ban { peer, .. } => {
                    self.bans.push(peer.0 as usize);
                    cut.push(peer.0 as usize);
                }
            }
        }
        while let Some(Announce {
            peers,
            change,
            ranges,
            ..
        }) = self.announcements.poll_announce(now)
        {
            for peer in peers {
                let message = match change {
                    Change::Have => Message::Have {
                        ranges: ranges.clone(),
                    },
                    Change::Unhave => Message::Unhave {
                        ranges: ranges.clone(),
                    },
                };
                self.outbox.push((peer.0 as usize, message));
            }
        }
        while let Some(serve) = self.uploads.poll_serve(now) {
            assert!(
                self.member.manner == Manner::Corrupts || self.holds(&serve.groups),
                "served what is not held"
            );
            let content = self.geometry.bytes(&serve.groups);
            let groups = serve.groups.end - serve.groups.start;
            // Parents within the run, and on the path from the root to it.
            let depth = u64::from(
                self.geometry
                    .groups()
                    .div_ceil(groups)
                    .next_power_of_two()
                    .trailing_zeros(),
            );
            let wire = content + 64 * (groups - 1 + depth);
            let response = Response {
                id: serve.id,
                groups: serve.groups,
                content,
                wire,
                sent: 0,
            };
            if let Some(flow) = self.flows.get_mut(&(serve.peer.0 as usize)) {
                flow.waiting.push_back(response);
            }
        }
        cut
    }

    pub fn timeout(&self) -> Option<Time> {
        [
            self.downloads.poll_timeout(),
            self.uploads.poll_timeout(),
            self.announcements.poll_timeout(),
        ]
        .into_iter()
        .flatten()
        .min()
    }
}
