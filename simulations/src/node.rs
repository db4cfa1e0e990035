//! What a daemon does around the scheduler: carries messages between its three parts and the network.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::{GroupRanges, Height};
use capsule_swarm_core::{
    Announce, AnnounceConfig, Announcements, BlobSpec, Change, Class, DownloadConfig, Downloads,
    Failure, GatewayNotice, IncomingRequest, NodeId, Output, PeerKey, PieceGeometry, Refusal,
    RequestId, Serve, Time, UploadConfig, Uploads,
};

use crate::checks::Fault;
use crate::plan::{Manner, Member};

/// A message between nodes. Responses travel in cells; this is the rest.
#[derive(Clone, Debug)]
pub enum Message {
    /// Asks for groups.
    Request {
        /// The requester's number.
        id: RequestId,
        /// What is asked for.
        groups: Range<u64>,
        /// Whether somebody waits for it.
        demand: bool,
        /// Up to where the response proves them.
        height: Height,
    },
    /// Takes a request back.
    Cancel {
        /// The requester's number.
        id: RequestId,
    },
    /// Ends a request without its response.
    Failed {
        /// The requester's number.
        id: RequestId,
        /// Why.
        failure: Failure,
    },
    /// The sender holds these groups now.
    Have(Rc<GroupRanges>),
    /// What a gateway of the site fetches.
    Gateway(Rc<GatewayNotice>),
    /// The connection ended.
    Gone,
}

impl Message {
    /// Bytes on the wire, framing and TLS record included.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Request { .. } => 80,
            Self::Cancel { .. } | Self::Failed { .. } => 40,
            Self::Have(ranges) => 80 + 5 * ranges.runs().len() as u64,
            Self::Gateway(notice) => 120 + 5 * notice.groups.runs().len() as u64,
            Self::Gone => 0,
        }
    }
}

/// A response on its way to one peer.
#[derive(Clone, Debug)]
pub struct Response {
    /// The requester's number.
    pub id: RequestId,
    /// What it holds.
    pub groups: Range<u64>,
    /// Bytes on the wire: content, and the hashes of the slice.
    pub wire: u64,
    /// Of these, bytes that left.
    pub sent: u64,
}

/// A connection as one of its ends sees it.
#[derive(Clone, Copy, Debug)]
pub struct Neighbour {
    /// The node at the other end.
    pub node: usize,
    /// Number of the connection; also the scheduler's key of the peer.
    pub connection: u64,
    /// Groups that it announced.
    pub told: u64,
}

/// One node: the three parts of the scheduler, a store of which only the ranges matter, and accounts.
pub struct Node {
    /// Its number in the plan.
    pub me: usize,
    /// What the plan says of it.
    pub member: Member,
    root: RootHash,
    /// How the blob is cut.
    pub geometry: PieceGeometry,
    seed: u64,
    /// What it fetches.
    pub downloads: Downloads,
    /// What it serves.
    pub uploads: Uploads,
    announcements: Announcements,
    /// What came unspoilt and is committed: what the scheduler may count as held, and what outlives a restart.
    pub stored: GroupRanges,
    /// Up to where responses prove their groups, by connection and request.
    heights: BTreeMap<(u64, RequestId), Height>,
    /// Its connections.
    pub neighbours: Vec<Neighbour>,
    /// Whether it runs.
    pub alive: bool,
    /// Starts so far.
    pub starts: u64,
    /// When it had all.
    pub finished: Option<Time>,
    /// When something last came.
    pub heard: Time,
    /// Since when a neighbour has had something for it and nothing came.
    pub(crate) offered: Option<Time>,
    /// Content bytes of responses sent in full.
    pub served: u64,
    /// Content bytes received.
    pub received: u64,
    /// Of these, bytes that were there already.
    pub duplicate: u64,
    /// Bytes of messages sent.
    pub control: u64,
    /// Requests sent.
    pub requests: u64,
    /// Nodes that it banned.
    pub bans: Vec<usize>,
    /// Messages to send, by connection.
    pub(crate) outbox: Vec<(u64, Message)>,
    /// Responses to send, by connection.
    pub(crate) responses: Vec<(u64, Response)>,
    /// A check that failed.
    pub(crate) fault: Option<Fault>,
}

impl Node {
    /// A node that has not been started yet.
    pub fn new(me: usize, member: Member, root: RootHash, size: u64, seed: u64) -> Self {
        let seed = seed ^ (me as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self {
            me,
            member,
            root,
            geometry: PieceGeometry::of(size),
            seed,
            downloads: Downloads::new(config(me), seed),
            uploads: Uploads::new(UploadConfig::default()),
            announcements: Announcements::new(AnnounceConfig::default()),
            stored: if member.seeds {
                GroupRanges::all(size)
            } else {
                GroupRanges::new()
            },
            heights: BTreeMap::new(),
            neighbours: Vec::new(),
            alive: false,
            starts: 0,
            finished: None,
            heard: Time::ZERO,
            offered: None,
            served: 0,
            received: 0,
            duplicate: 0,
            control: 0,
            requests: 0,
            bans: Vec::new(),
            outbox: Vec::new(),
            responses: Vec::new(),
            fault: None,
        }
    }

    /// Starts, for the first time or again, with what is stored.
    pub(crate) fn start(&mut self, now: Time) {
        self.alive = true;
        (self.heard, self.offered) = (now, None);
        self.downloads = Downloads::new(config(self.me), self.seed.wrapping_add(self.starts));
        self.uploads = Uploads::new(UploadConfig::default());
        self.announcements = Announcements::new(AnnounceConfig::default());
        self.starts += 1;
        let (root, size) = (self.root, self.geometry.size());
        let all = GroupRanges::all(size);
        let claimed = if self.member.manner == Manner::Honest {
            &self.stored
        } else {
            &all
        };
        self.announcements.handle_held(now, root, size, claimed);
        if self.member.pulls() && !self.is_complete() {
            let spec = BlobSpec {
                root,
                size,
                have: self.stored.clone(),
                want: all,
                priority: 0,
            };
            if self.downloads.add_blob(now, spec).is_err() {
                self.fault = Some(Fault::Scheduler("a first blob was refused".into()));
            }
        }
    }

    /// Is killed: only what is stored remains.
    pub(crate) fn kill(&mut self) {
        self.alive = false;
        self.neighbours.clear();
        self.outbox.clear();
        self.responses.clear();
    }

    pub(crate) fn connect(&mut self, now: Time, node: usize, connection: u64, class: Class) {
        let peer = PeerKey(connection);
        self.neighbours.push(Neighbour {
            node,
            connection,
            told: 0,
        });
        self.announcements.peer_connected(now, peer, class);
        let taken = self.downloads.peer_connected(now, peer, class);
        if !taken {
            self.fault = Some(Fault::Scheduler("a new peer was refused".into()));
        }
        self.uploads.peer_connected(now, peer, class);
    }

    pub(crate) fn disconnect(&mut self, now: Time, connection: u64) {
        let peer = PeerKey(connection);
        self.neighbours.retain(|n| n.connection != connection);
        self.downloads.peer_disconnected(now, peer);
        self.uploads.peer_disconnected(now, peer);
        self.announcements.peer_disconnected(now, peer);
    }

    /// The blob.
    pub fn root(&self) -> &RootHash {
        &self.root
    }

    /// Whether it has all of the blob.
    pub fn is_complete(&self) -> bool {
        self.stored.contains_run(&(0..self.geometry.groups()))
    }

    /// Takes in a message.
    pub(crate) fn handle(&mut self, now: Time, connection: u64, message: Message) {
        let peer = PeerKey(connection);
        match message {
            Message::Request {
                id,
                groups,
                demand,
                height,
            } => {
                self.heights.insert((connection, id), height);
                self.handle_request(now, connection, id, groups, demand);
            }
            Message::Cancel { id } => {
                if self.member.manner != Manner::Stalls && self.uploads.handle_cancel(now, peer, id)
                {
                    self.heights.remove(&(connection, id));
                    let failure = Failure::Cancelled;
                    self.outbox
                        .push((connection, Message::Failed { id, failure }));
                }
            }
            Message::Failed { id, failure } => self.downloads.handle_failed(now, peer, id, failure),
            Message::Have(ranges) => {
                let groups = self.geometry.groups();
                if let Some(other) = self.neighbour(connection) {
                    other.told = (other.told + ranges.count()).min(groups);
                }
                if ranges.contains_run(&(0..self.geometry.groups())) {
                    self.announcements
                        .set_interested(now, peer, self.root, false);
                }
                self.uploads.handle_have(now, peer, &self.root, &ranges);
                self.downloads.handle_have(now, peer, &self.root, &ranges);
            }
            Message::Gateway(notice) => self.downloads.handle_gateway(now, peer, &notice),
            Message::Gone => self.disconnect(now, connection),
        }
    }

    fn neighbour(&mut self, connection: u64) -> Option<&mut Neighbour> {
        self.neighbours
            .iter_mut()
            .find(|other| other.connection == connection)
    }

    fn handle_request(
        &mut self,
        now: Time,
        connection: u64,
        id: RequestId,
        groups: Range<u64>,
        demand: bool,
    ) {
        let fail = |failure| (connection, Message::Failed { id, failure });
        match self.member.manner {
            Manner::Stalls | Manner::Drips => return,
            Manner::Refuses => return self.outbox.push(fail(Failure::NotHeld)),
            Manner::Honest if !self.stored.contains_run(&groups) => {
                return self.outbox.push(fail(Failure::NotHeld));
            }
            Manner::Corrupts | Manner::Honest => {}
        }
        let request = IncomingRequest {
            id,
            root: self.root,
            size: self.geometry.size(),
            groups,
            demand,
            whole: self.is_complete(),
            holds: self.neighbour(connection).map_or(0, |other| other.told),
        };
        match self
            .uploads
            .handle_request(now, PeerKey(connection), request)
        {
            Ok(()) => {}
            Err(Refusal::Busy) => self.outbox.push(fail(Failure::Busy)),
            Err(refusal) => {
                self.fault = Some(Fault::Scheduler(format!(
                    "it was asked for what may not be: {refusal}"
                )));
            }
        }
    }

    /// Takes in a part of a response that is not the last.
    pub(crate) fn handle_part(&mut self, now: Time, connection: u64, id: RequestId, bytes: u64) {
        (self.heard, self.offered) = (now, None);
        self.downloads
            .handle_progress(now, PeerKey(connection), id, bytes);
    }

    /// Takes in the end of a response, which tells whether it verifies.
    pub(crate) fn handle_last(
        &mut self,
        now: Time,
        connection: u64,
        id: RequestId,
        groups: &Range<u64>,
        spoilt: bool,
    ) {
        let peer = PeerKey(connection);
        if spoilt {
            return self
                .downloads
                .handle_failed(now, peer, id, Failure::Corrupt);
        }
        (self.heard, self.offered) = (now, None);
        let ranges = GroupRanges::from(groups.clone());
        let content = self.geometry.bytes(groups);
        self.received += content;
        self.duplicate += content
            - ranges
                .runs()
                .iter()
                .map(|run| self.fresh_bytes(run))
                .sum::<u64>();
        self.stored.insert(groups.clone());
        let rare = self.downloads.handle_received(now, peer, id, groups);
        self.check_held();
        self.announcements
            .handle_held(now, self.root, self.geometry.size(), &ranges);
        if rare {
            self.announcements.hurry(now, &self.root);
        }
    }

    /// Bytes of a run that are not stored.
    fn fresh_bytes(&self, run: &Range<u64>) -> u64 {
        let runs = self.stored.runs();
        let first = runs.partition_point(|r| r.end <= run.start);
        let overlapping = runs[first..].iter().take_while(|r| r.start < run.end);
        let held: u64 = overlapping
            .map(|r| {
                self.geometry
                    .bytes(&(r.start.max(run.start)..r.end.min(run.end)))
            })
            .sum();
        self.geometry.bytes(run) - held
    }

    /// Carries out all that the scheduler wants now. Returns the connections to cut off.
    pub(crate) fn poll(&mut self, now: Time) -> Vec<u64> {
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
                    self.check_window(peer);
                    let size = self.geometry.size();
                    let request = Message::Request {
                        id,
                        height: Height::known(size, &groups, &self.stored),
                        groups,
                        demand,
                    };
                    self.outbox.push((peer.0, request));
                }
                Output::Cancel { peer, id } => self.outbox.push((peer.0, Message::Cancel { id })),
                Output::Complete { .. } => {
                    if self.is_complete() {
                        self.finished.get_or_insert(now);
                        let root = self.root;
                        self.downloads.remove_blob(now, &root);
                    } else {
                        self.fault = Some(Fault::Unverified("all of the blob".into()));
                    }
                }
                Output::TellGateway { peers, notice } => {
                    let notice = Rc::new(notice);
                    for peer in peers {
                        self.outbox.push((peer.0, Message::Gateway(notice.clone())));
                    }
                }
                Output::Ban { peer, .. } => {
                    let other = self.neighbours.iter().find(|n| n.connection == peer.0);
                    self.bans.extend(other.map(|n| n.node));
                    cut.push(peer.0);
                }
            }
        }
        let is_gateway = self.downloads.is_gateway(&self.root);
        self.announcements.set_gateway(now, &self.root, is_gateway);
        self.poll_announcements(now);
        while let Some(serve) = self.uploads.poll_serve(now) {
            self.respond(serve);
        }
        cut
    }

    fn poll_announcements(&mut self, now: Time) {
        while let Some(announce) = self.announcements.poll_announce(now) {
            let Announce {
                peers,
                change,
                ranges,
                ..
            } = announce;
            if change != Change::Have {
                self.fault = Some(Fault::Scheduler("it takes back what it holds".into()));
                return;
            }
            let ranges = Rc::new(ranges);
            for peer in peers {
                self.outbox.push((peer.0, Message::Have(ranges.clone())));
            }
        }
    }

    fn respond(&mut self, serve: Serve) {
        if self.member.manner != Manner::Corrupts && !self.stored.contains_run(&serve.groups) {
            self.fault = Some(Fault::Unverified(format!(
                "groups {:?}, which it serves",
                serve.groups
            )));
        }
        let groups = serve.groups.end - serve.groups.start;
        // Parents within the run, and on the path to it from the highest that the requester lacks.
        let height = self.heights.remove(&(serve.peer.0, serve.id));
        let top = Height::of(self.geometry.groups()).min(height.unwrap_or(Height::ROOT));
        let path = top.get().saturating_sub(Height::of(groups).get());
        let wire = self.geometry.bytes(&serve.groups) + 64 * (groups - 1 + u64::from(path));
        let response = Response {
            id: serve.id,
            groups: serve.groups,
            wire,
            sent: 0,
        };
        self.responses.push((serve.peer.0, response));
    }

    /// When it has something to do if nothing else happens.
    pub(crate) fn timeout(&self) -> Option<Time> {
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

/// What a node's scheduler is told of itself.
fn config(me: usize) -> DownloadConfig {
    let mut name = [0; 32];
    name[..8].copy_from_slice(&(me as u64).to_le_bytes());
    DownloadConfig {
        me: NodeId(name),
        ..DownloadConfig::default()
    }
}
