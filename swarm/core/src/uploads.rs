//! What this node serves: bounded queues by peer, fair shares, the least-sent piece first.
//!
//! Whether the content is held is checked by the caller, before and after. Caps of rates are its business
//! too: to what is chosen here they look like a slow link, or a receiver that holds up what it is sent.

mod api;
mod credit;
mod sent;

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::{GroupRanges, group_count};

use crate::meter::RateMeter;
use crate::rates::Class;
use crate::time::earliest;
use crate::{MAX_REQUEST_GROUPS, PeerKey, PieceGeometry, RequestId, Time};
pub use api::*;
use credit::Credit;
use sent::SentLog;

/// Weight of one announcement in the mean time from sending a piece to hearing that its receiver has it.
const HEARD_WEIGHT: f64 = 0.125;
/// A second copy is kept back for so many of these mean times: most announcements have come by then.
const HEARD_TIMES: f64 = 2.0;
/// Runs of one announcement that are looked at: one tells as much as many.
const HEARD_RUNS: usize = 4;
/// How far a peer may be ahead of the one that was served least, before what others wait for comes first, sent
/// often or not: 8 longest requests.
const SLACK: u64 = 8 << 20;
/// What a peer is served counts by the fourth power of its progress with the blob, as a part of that of the peer that has come
/// furthest: with fewer connections than others, it would otherwise be the last by far.
const PROGRESS_POWER: i32 = 4;
/// But not less than this part, whatever it claims to lack.
const LEAST_COUNTED: f64 = 0.25;
/// Who is behind the one that has come furthest by more than this part of the blob is served first, sent often or not; but not by who
/// holds all of it, as what only that one has must get out.
const BEHIND: f64 = 0.04;
/// And until it is so many bytes ahead of the one that was served least: anybody can say that it lacks everything.
const BEHIND_SLACK: u64 = 1 << 20;
/// Progress that everybody is given, so that the first pieces decide nothing.
const HEAD_START: f64 = 1.0 / 64.0;

/// The provider's side: decides which request is served next.
///
/// Of all requests that wait, over all peers: those that somebody waits for (demand) first; then, within fair
/// shares, those of peers that have fallen behind the others with their blob, unless this node holds all of it; then those for
/// the least-sent piece, so that a publisher sends distinct pieces to different peers, who pass
/// them on; then those of the peer that was served least (start-time fair queueing, of the same family as deficit
/// round robin, but with the choice of the piece as the first key). Fair shares: a peer that is 8 MiB ahead of
/// another that waits comes after it in any case. What is served to peers that hold less of their blob than others counts less.
///
/// # Order of calls
/// 1. Any number of inputs, each with the current time.
/// 2. [`poll_serve`](Self::poll_serve) until it returns `None`, starting each response. It stops by itself when
///    enough bytes are in flight; [`handle_sent`](Self::handle_sent) and
///    [`handle_finished`](Self::handle_finished) make room.
/// 3. Wait until [`poll_timeout`](Self::poll_timeout) or the next event, then step 1 or 2 again.
///
/// # Bounds
/// Queues by peer, peers by [`UploadConfig`]; bytes in flight within the site, and to others, to 16 MiB plus one
/// response a peer.
#[derive(Debug)]
pub struct Uploads {
    config: UploadConfig,
    peers: BTreeMap<PeerKey, Queue>,
    sent: SentLog,
    meter: RateMeter,
    bytes_sent: u64,
    /// Mean seconds from sending a piece to hearing that its receiver has it.
    heard: Option<f64>,
    /// What the least-served waiting peer had been served when last somebody was.
    virtual_time: u64,
    /// When a piece kept back may be sent, or a response counts as held up.
    wake_at: Option<Time>,
}

/// One peer's requests.
#[derive(Debug, Default)]
struct Queue {
    waiting: Vec<Waiting>,
    sending: Vec<Sending>,
    /// Bytes served to it, as they count, never less than the virtual time when it began to wait.
    served: u64,
    /// Whether it held up its last response: it takes less than we could send.
    slow: bool,
    /// Whether it is in another site.
    beyond: bool,
}

#[derive(Debug)]
struct Waiting {
    request: IncomingRequest,
    bytes: u64,
    log: usize,
}

#[derive(Debug)]
struct Sending {
    id: RequestId,
    groups: Range<u64>,
    bytes: u64,
    sent: u64,
    since: Time,
    log: usize,
}

impl Queue {
    fn in_flight(&self) -> u64 {
        self.sending
            .iter()
            .map(|sending| sending.bytes - sending.sent)
            .sum()
    }
}

/// What is compared between requests; the least is served: not demanded, ahead of its share, not behind the others,
/// copies sent, bytes served.
type Rank = (bool, bool, bool, u64, u64);

impl Uploads {
    /// Nobody connected, nothing sent.
    pub fn new(config: UploadConfig) -> Self {
        Self {
            config,
            peers: BTreeMap::new(),
            sent: SentLog::default(),
            meter: RateMeter::default(),
            bytes_sent: 0,
            heard: None,
            virtual_time: 0,
            wake_at: None,
        }
    }

    /// Takes in a new peer; beyond the bound it is ignored, and its requests are refused.
    pub fn peer_connected(&mut self, _now: Time, peer: PeerKey, class: Class) {
        if self.peers.len() < self.config.max_peers {
            self.peers.entry(peer).or_default().beyond = class == Class::Beyond;
        }
    }

    /// Forgets a peer and its requests.
    pub fn peer_disconnected(&mut self, now: Time, peer: PeerKey) {
        let Some(queue) = self.peers.remove(&peer) else {
            return;
        };
        queue
            .waiting
            .iter()
            .for_each(|waiting| self.sent.leave(waiting.log));
        for sending in queue.sending {
            self.sent.uncount(sending.log, &sending.groups);
            self.sent.leave(sending.log);
        }
        self.measure(now);
    }

    /// Takes in that a peer announced groups of a blob: tells how long announcements take.
    pub fn handle_have(&mut self, now: Time, peer: PeerKey, root: &RootHash, groups: &GroupRanges) {
        for run in groups.runs().iter().take(HEARD_RUNS) {
            let Some(sent) = self.sent.sent_to(root, run.start, peer) else {
                continue;
            };
            let sample = now.since(sent).as_secs_f64();
            let mean = self.heard.get_or_insert(sample);
            *mean += (sample - *mean) * HEARD_WEIGHT;
        }
    }

    /// How long a second copy is kept back.
    fn echo(&self) -> Duration {
        let wanted = self.heard.unwrap_or_default() * HEARD_TIMES;
        let UploadConfig { echo, echo_max, .. } = self.config;
        Duration::try_from_secs_f64(wanted)
            .unwrap_or(echo_max)
            .clamp(echo.min(echo_max), echo_max)
    }

    /// Queues a request, or says why not.
    pub fn handle_request(
        &mut self,
        _now: Time,
        peer: PeerKey,
        request: IncomingRequest,
    ) -> Result<(), Refusal> {
        let geometry = PieceGeometry::of(request.size);
        let length = request.groups.end.saturating_sub(request.groups.start);
        if length == 0 || length > MAX_REQUEST_GROUPS || request.groups.end > geometry.groups() {
            return Err(Refusal::Malformed);
        }
        let queue = self.peers.get_mut(&peer).ok_or(Refusal::UnknownPeer)?;
        let open = queue.waiting.iter().map(|waiting| waiting.request.id);
        if open
            .chain(queue.sending.iter().map(|sending| sending.id))
            .any(|id| id == request.id)
        {
            return Err(Refusal::Duplicate);
        }
        if queue.waiting.len() >= self.config.max_queue {
            return Err(Refusal::Busy);
        }
        if queue.waiting.is_empty() {
            // Nobody saves up a share by not asking.
            queue.served = queue.served.max(self.virtual_time);
        }
        let log = self.sent.enter(request.root, &geometry);
        let bytes = geometry.bytes(&request.groups);
        queue.waiting.push(Waiting {
            request,
            bytes,
            log,
        });
        Ok(())
    }

    /// Takes a request back. True if it was still queued: the caller then answers that it was cancelled. False if it
    /// is unknown or already handed out by `poll_serve`: its response (sent in full) is the answer.
    pub fn handle_cancel(&mut self, _now: Time, peer: PeerKey, id: RequestId) -> bool {
        let Some(queue) = self.peers.get_mut(&peer) else {
            return false;
        };
        let Some(at) = queue
            .waiting
            .iter()
            .position(|waiting| waiting.request.id == id)
        else {
            return false;
        };
        let waiting = queue.waiting.remove(at);
        self.sent.leave(waiting.log);
        true
    }

    /// Takes in that the transport accepted `bytes` more of a response. Encoding overhead may be counted: what
    /// exceeds the content is ignored.
    pub fn handle_sent(&mut self, now: Time, peer: PeerKey, id: RequestId, bytes: u64) {
        let Some(queue) = self.peers.get_mut(&peer) else {
            return;
        };
        let slow = queue.slow;
        let Some(sending) = queue.sending.iter_mut().find(|s| s.id == id) else {
            return;
        };
        let bytes = bytes.min(sending.bytes - sending.sent);
        sending.sent += bytes;
        if !slow {
            self.meter.add(now, bytes);
        }
    }

    /// Takes in that a response is finished: sent in full, or (`sent == false`) given up, e.g. as the local data
    /// could not be read.
    pub fn handle_finished(&mut self, now: Time, peer: PeerKey, id: RequestId, sent: bool) {
        // By all that is in flight: so that after a trouble of our own link those that take what they are sent count as such again.
        let held_up = self.held_up(self.peers.values().map(Queue::in_flight).sum());
        let Some(queue) = self.peers.get_mut(&peer) else {
            return;
        };
        let Some(at) = queue.sending.iter().position(|sending| sending.id == id) else {
            return;
        };
        let sending = queue.sending.swap_remove(at);
        if sent {
            let was_slow = std::mem::replace(&mut queue.slow, now - sending.since > held_up);
            if !was_slow {
                self.meter.add(now, sending.bytes - sending.sent);
            }
            self.bytes_sent += sending.bytes;
            self.sent
                .finished(sending.log, &sending.groups, peer, now, sending.bytes);
        } else {
            self.sent.uncount(sending.log, &sending.groups);
        }
        self.sent.leave(sending.log);
        self.measure(now);
    }

    /// Drops all queued requests for a blob that is no longer held; returns them, to be answered as not held.
    pub fn remove_blob(&mut self, root: &RootHash) -> Vec<(PeerKey, RequestId)> {
        let mut dropped = Vec::new();
        for (&peer, queue) in &mut self.peers {
            queue.waiting.retain(|waiting| {
                let keep = waiting.request.root != *root;
                if !keep {
                    dropped.push((peer, waiting.request.id));
                    self.sent.leave(waiting.log);
                }
                keep
            });
        }
        dropped
    }

    /// The next response to send, if the transport has credit for it.
    pub fn poll_serve(&mut self, now: Time) -> Option<Serve> {
        self.wake_at = None;
        let credit = self.credit(now);
        if credit.is_used_up() {
            return None;
        }
        let furthest = self.furthest();
        let (peer, at) = self.choose(now, credit, &furthest)?;
        let queue = self.peers.get_mut(&peer)?;
        let Waiting {
            request,
            bytes,
            log,
        } = queue.waiting.remove(at);
        let part = (progress(&request) / furthest[&log]).powi(PROGRESS_POWER);
        queue.served += (bytes as f64 * part.clamp(LEAST_COUNTED, 1.0)) as u64;
        let (id, groups) = (request.id, request.groups);
        self.sent.count(log, &groups, peer, now);
        queue.sending.push(Sending {
            id,
            groups: groups.clone(),
            bytes,
            sent: 0,
            since: now,
            log,
        });
        self.meter.start(now);
        Some(Serve {
            peer,
            id,
            root: request.root,
            size: request.size,
            groups,
            demand: request.demand,
        })
    }

    /// When to call `poll_serve` again if nothing else happens.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.wake_at
    }

    /// Figures over all peers and blobs.
    pub fn stats(&self) -> UploadStats {
        UploadStats {
            bytes_sent: self.bytes_sent,
            queued: self.peers.values().map(|queue| queue.waiting.len()).sum(),
            in_flight: self.peers.values().map(Queue::in_flight).sum(),
            rate: self.meter.rate().unwrap_or_default(),
        }
    }

    /// Content bytes sent of a blob, to all peers; `None` if none is remembered.
    pub fn bytes_sent(&self, root: &RootHash) -> Option<u64> {
        self.sent.bytes(root)
    }

    /// The peer and the place in its queue of the request to serve next.
    fn choose(
        &mut self,
        now: Time,
        credit: Credit,
        furthest: &BTreeMap<usize, f64>,
    ) -> Option<(PeerKey, usize)> {
        let waits = |queue: &&Queue| !queue.waiting.is_empty();
        let lone = self.peers.values().filter(waits).count() == 1;
        let may_be_sent = |queue: &&Queue| credit.allows(queue, lone);
        let least = self
            .peers
            .values()
            .filter(waits)
            .filter(may_be_sent)
            .map(|queue| queue.served)
            .min()?;
        self.virtual_time = self.virtual_time.max(least);
        let mut best: Option<(Rank, PeerKey, usize)> = None;
        for (&peer, queue) in self.peers.iter().filter(|(_, queue)| may_be_sent(queue)) {
            let ahead = queue.served > least + SLACK;
            let may_be_first = queue.served <= least + BEHIND_SLACK;
            for (at, waiting) in queue.waiting.iter().enumerate() {
                // What was sent to another site is no nearer to this one.
                if !queue.beyond
                    && let Some(end) = self.kept_back(peer, waiting, credit.is_idle)
                    && now < end
                {
                    self.wake_at = earliest(self.wake_at, Some(end));
                    continue;
                }
                let request = &waiting.request;
                let copies = self.sent.copies(waiting.log, &request.groups);
                let behind = may_be_first
                    && !request.whole
                    && progress(request) + BEHIND < furthest[&waiting.log];
                let rank = (!request.demand, ahead, !behind, copies, queue.served);
                if best.as_ref().is_none_or(|(other, ..)| rank < *other) {
                    best = Some((rank, peer, at));
                }
            }
        }
        best.map(|(_, peer, at)| (peer, at))
    }

    /// How far the peer has come that has come furthest, of those that wait; by blob.
    fn furthest(&self) -> BTreeMap<usize, f64> {
        let mut furthest = BTreeMap::new();
        for waiting in self.peers.values().flat_map(|queue| &queue.waiting) {
            let most = furthest.entry(waiting.log).or_insert(HEAD_START);
            *most = progress(&waiting.request).max(*most);
        }
        furthest
    }

    /// Until when a request is kept back, as another peer was just sent the same: twice as long while the link is busy with something else.
    fn kept_back(&self, peer: PeerKey, waiting: &Waiting, is_idle: bool) -> Option<Time> {
        let request = &waiting.request;
        if !request.whole || request.demand {
            return None;
        }
        let sent = self
            .sent
            .sent_elsewhere(waiting.log, &request.groups, peer)?;
        let long = if is_idle { 1 } else { 2 };
        Some(sent + (long * self.echo()).min(self.config.echo_max))
    }
}

/// How far a peer has come with the blob that it asks for.
fn progress(request: &IncomingRequest) -> f64 {
    let groups = group_count(request.size);
    HEAD_START + request.holds.min(groups) as f64 / groups as f64
}
