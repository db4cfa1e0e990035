//! What this node serves: bounded queues by peer, fair shares, the least-sent piece first.
//!
//! Whether the content is held is checked by the caller, before and after. Rate caps are its business
//! too: it does not poll while a cap is exhausted.

mod sent;

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use thiserror::Error;

use crate::meter::RateMeter;
use crate::time::earliest;
use crate::{MAX_REQUEST_GROUPS, PeerKey, PieceGeometry, RequestId, Time};
use sent::SentLog;

/// Bytes handed to the transport are bounded by this much of the measured rate: enough that its buffers never run
/// dry, little enough that the choice of what comes next is made late.
const IN_FLIGHT_SECONDS: f64 = 0.05;
/// Least bound of bytes in flight: two requests to peers of unknown rate.
const MIN_IN_FLIGHT: u64 = 128 << 10;
/// Largest bound of bytes in flight: what responses may cost in memory.
const MAX_IN_FLIGHT: u64 = 16 << 20;
/// Bytes in flight to one peer while others wait; one response is always allowed.
const PEER_IN_FLIGHT: u64 = 64 << 10;
/// A response that takes longer than four times what our own rate explains, and this, is held up by the receiver:
/// it no longer keeps others from being served.
const HELD_UP: Duration = Duration::from_millis(200);
/// How far a peer may be ahead of the one that was served least, before what others wait for comes first, sent
/// often or not: 8 longest requests.
const SLACK: u64 = 8 << 20;

/// Tunables of [`Uploads`].
#[derive(Clone, Debug)]
pub struct UploadConfig {
    /// Most requests queued for one peer: twice what a requester of ours asks at once.
    pub max_queue: usize,
    /// Most peers.
    pub max_peers: usize,
    /// How long a node that holds all of a blob keeps back a second copy of a piece, when it has nothing better to
    /// send: the first receiver is about to announce it, and to pass it on itself. Zero turns it off.
    pub echo: Duration,
}

impl Default for UploadConfig {
    fn default() -> Self {
        Self {
            max_queue: 128,
            max_peers: 256,
            echo: Duration::from_millis(150),
        }
    }
}

/// A request as it came from a peer, already checked against what this node holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IncomingRequest {
    /// The requester's number for it.
    pub id: RequestId,
    /// The blob.
    pub root: RootHash,
    /// Its size in bytes.
    pub size: u64,
    /// The run of groups asked for: at least one, at most [`MAX_REQUEST_GROUPS`].
    pub groups: Range<u64>,
    /// Whether somebody waits for it: served before all that is not.
    pub demand: bool,
    /// Whether this node holds all of the blob.
    pub whole: bool,
}

/// Why a request was not queued. The caller answers the peer with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The peer has too many requests queued: it should wait for some of them.
    #[error("the peer already has the most requests queued that one peer may")]
    Busy,
    /// The run is empty, longer than a request may be, or beyond the blob's end: the peer breaks the protocol.
    #[error("the run of groups is empty, too long or beyond the end")]
    Malformed,
    /// The peer used the number of a request that is still queued or being served: it breaks the protocol.
    #[error("a request of that number is still open")]
    Duplicate,
    /// The peer is not connected here (or more are than may be).
    #[error("the peer is not known")]
    UnknownPeer,
}

/// An instruction: read these groups and send them as the response to the peer's request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serve {
    /// Who asked.
    pub peer: PeerKey,
    /// The requester's number.
    pub id: RequestId,
    /// The blob.
    pub root: RootHash,
    /// Its size in bytes, as the request gave it.
    pub size: u64,
    /// The run of groups: the whole request.
    pub groups: Range<u64>,
    /// Whether somebody waits for it.
    pub demand: bool,
}

/// Figures of what was served.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UploadStats {
    /// Content bytes of responses finished, over all peers and blobs.
    pub bytes_sent: u64,
    /// Requests waiting.
    pub queued: usize,
    /// Content bytes handed to the transport and not yet sent.
    pub in_flight: u64,
    /// Measured rate of sending, bytes a second.
    pub rate: f64,
}

/// The provider's side: decides which request is served next.
///
/// Of all requests that wait, over all peers: those that somebody waits for (demand) first; then, within fair
/// shares, those for the least-sent piece, so that a publisher sends distinct pieces to different peers, who pass
/// them on; then those of the peer that was served least (start-time fair queueing, of the same family as deficit
/// round robin, but with the choice of the piece as the first key). Fair shares: a peer that is 8 MiB ahead of
/// another that waits comes after it in any case.
///
/// # Order of calls
/// 1. Any number of inputs, each with the current time.
/// 2. [`poll_serve`](Self::poll_serve) until it returns `None`, starting each response. It stops by itself when
///    enough bytes are in flight; [`handle_sent`](Self::handle_sent) and
///    [`handle_finished`](Self::handle_finished) make room.
/// 3. Wait until [`poll_timeout`](Self::poll_timeout) or the next event, then step 1 or 2 again.
///
/// # Bounds
/// Queues by peer, peers by [`UploadConfig`]; bytes in flight to 16 MiB plus one response a peer.
#[derive(Debug)]
pub struct Uploads {
    config: UploadConfig,
    peers: BTreeMap<PeerKey, Queue>,
    sent: SentLog,
    meter: RateMeter,
    bytes_sent: u64,
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
    /// Bytes served to it, never less than the virtual time when it began to wait.
    served: u64,
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

/// What is compared between requests; the least is served.
type Rank = (bool, bool, u64, u64);

impl Uploads {
    /// Nobody connected, nothing sent.
    pub fn new(config: UploadConfig) -> Self {
        Self {
            config,
            peers: BTreeMap::new(),
            sent: SentLog::default(),
            meter: RateMeter::default(),
            bytes_sent: 0,
            virtual_time: 0,
            wake_at: None,
        }
    }

    /// Takes in a new peer; beyond the bound it is ignored, and its requests are refused.
    pub fn peer_connected(&mut self, _now: Time, peer: PeerKey) {
        if self.peers.len() < self.config.max_peers {
            self.peers.entry(peer).or_default();
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
        let sending = self
            .peers
            .get_mut(&peer)
            .and_then(|queue| queue.sending.iter_mut().find(|s| s.id == id));
        let Some(sending) = sending else { return };
        let bytes = bytes.min(sending.bytes - sending.sent);
        sending.sent += bytes;
        self.meter.add(now, bytes);
    }

    /// Takes in that a response is finished: sent in full, or (`sent == false`) given up, e.g. as the local data
    /// could not be read.
    pub fn handle_finished(&mut self, now: Time, peer: PeerKey, id: RequestId, sent: bool) {
        let Some(queue) = self.peers.get_mut(&peer) else {
            return;
        };
        let Some(at) = queue.sending.iter().position(|sending| sending.id == id) else {
            return;
        };
        let sending = queue.sending.swap_remove(at);
        if sent {
            self.meter.add(now, sending.bytes - sending.sent);
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
        let bound = self.in_flight_bound();
        if self.counted_in_flight(now) >= bound {
            return None;
        }
        let (peer, at) = self.choose(now, bound)?;
        let queue = self.peers.get_mut(&peer)?;
        let Waiting {
            request,
            bytes,
            log,
        } = queue.waiting.remove(at);
        queue.served += bytes;
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

    fn in_flight_bound(&self) -> u64 {
        let rate = self.meter.rate().unwrap_or_default();
        ((rate * IN_FLIGHT_SECONDS) as u64).clamp(MIN_IN_FLIGHT, MAX_IN_FLIGHT)
    }

    /// Bytes in flight, without those that receivers hold up.
    fn counted_in_flight(&mut self, now: Time) -> u64 {
        let total: u64 = self.peers.values().map(Queue::in_flight).sum();
        let ours = self
            .meter
            .rate()
            .map_or(0.0, |rate| 4.0 * total as f64 / rate.max(1.0));
        let held_up = HELD_UP + Duration::from_secs_f64(ours.min(60.0));
        let mut counted = 0;
        for sending in self.peers.values().flat_map(|queue| &queue.sending) {
            let end = sending.since + held_up;
            if now < end {
                counted += sending.bytes - sending.sent;
                self.wake_at = earliest(self.wake_at, Some(end));
            }
        }
        counted
    }

    /// The peer and the place in its queue of the request to serve next.
    fn choose(&mut self, now: Time, bound: u64) -> Option<(PeerKey, usize)> {
        let waits = |queue: &&Queue| !queue.waiting.is_empty();
        let lone = self.peers.values().filter(waits).count() == 1;
        let credit = |queue: &&Queue| queue.in_flight() < if lone { bound } else { PEER_IN_FLIGHT };
        let least = self
            .peers
            .values()
            .filter(waits)
            .filter(credit)
            .map(|queue| queue.served)
            .min()?;
        self.virtual_time = self.virtual_time.max(least);
        let mut best: Option<(Rank, PeerKey, usize)> = None;
        for (&peer, queue) in self.peers.iter().filter(|(_, queue)| credit(queue)) {
            let ahead = queue.served > least + SLACK;
            for (at, waiting) in queue.waiting.iter().enumerate() {
                if let Some(end) = self.kept_back(peer, waiting).filter(|&end| now < end) {
                    self.wake_at = earliest(self.wake_at, Some(end));
                    continue;
                }
                let copies = self.sent.copies(waiting.log, &waiting.request.groups);
                let rank = (!waiting.request.demand, ahead, copies, queue.served);
                if best.as_ref().is_none_or(|(other, ..)| rank < *other) {
                    best = Some((rank, peer, at));
                }
            }
        }
        best.map(|(_, peer, at)| (peer, at))
    }

    /// Until when a request is kept back, as another peer was just sent the same.
    fn kept_back(&self, peer: PeerKey, waiting: &Waiting) -> Option<Time> {
        let request = &waiting.request;
        if !request.whole || request.demand {
            return None;
        }
        Some(
            self.sent
                .sent_elsewhere(waiting.log, &request.groups, peer)?
                + self.config.echo,
        )
    }

    /// Time counts for the rate while something is in flight.
    fn measure(&mut self, now: Time) {
        if self.peers.values().all(|queue| queue.sending.is_empty()) {
            self.meter.stop(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 4 << 20;

    fn at(ms: u64) -> Time {
        Time::from_start(Duration::from_millis(ms))
    }

    fn request(id: u64, group: u64) -> IncomingRequest {
        let root = RootHash::of(b"blob");
        let groups = group..group + 1;
        IncomingRequest {
            id: RequestId(id),
            root,
            size: SIZE,
            groups,
            demand: false,
            whole: true,
        }
    }

    fn uploads(peers: u64) -> Uploads {
        let mut uploads = Uploads::new(UploadConfig::default());
        (0..peers).for_each(|peer| uploads.peer_connected(at(0), PeerKey(peer)));
        uploads
    }

    /// Serves all that may be served, each response taking a millisecond; returns (peer, group) in order.
    fn drain(uploads: &mut Uploads, from: u64) -> Vec<(u64, u64)> {
        let mut served = Vec::new();
        let mut ms = from;
        while let Some(serve) = uploads.poll_serve(at(ms)) {
            served.push((serve.peer.0, serve.groups.start));
            ms += 1;
            uploads.handle_finished(at(ms), serve.peer, serve.id, true);
        }
        served
    }

    #[test]
    fn distinct_pieces_go_to_different_peers_and_second_copies_wait() {
        let mut uploads = uploads(2);
        for peer in 0..2 {
            for group in 0..4 {
                let group = if peer == 0 { group } else { group + 2 };
                uploads
                    .handle_request(at(0), PeerKey(peer), request(group, group))
                    .expect("room");
            }
        }
        let mut first = drain(&mut uploads, 0);
        first.sort_unstable_by_key(|&(_, group)| group);
        assert_eq!(
            first.iter().map(|&(_, group)| group).collect::<Vec<_>>(),
            [0, 1, 2, 3, 4, 5]
        );
        let wake = uploads.poll_timeout().expect("second copies are kept back");
        assert!(wake <= at(160), "{wake:?}");
        assert_eq!(drain(&mut uploads, 200).len(), 2);
    }

    #[test]
    fn demand_comes_first_and_is_never_kept_back() {
        let mut uploads = uploads(2);
        uploads
            .handle_request(at(0), PeerKey(0), request(1, 0))
            .expect("room");
        assert_eq!(drain(&mut uploads, 0), [(0, 0)]);
        uploads
            .handle_request(at(1), PeerKey(1), request(1, 7))
            .expect("room");
        let demand = IncomingRequest {
            demand: true,
            ..request(2, 0)
        };
        uploads
            .handle_request(at(1), PeerKey(1), demand)
            .expect("room");
        assert_eq!(drain(&mut uploads, 2), [(1, 0), (1, 7)]);
    }

    #[test]
    fn shares_are_fair_between_peers_with_equally_rare_wishes() {
        let mut uploads = uploads(2);
        for id in 0..100 {
            uploads
                .handle_request(at(0), PeerKey(0), request(id, id))
                .expect("room");
        }
        for id in 0..10 {
            uploads
                .handle_request(at(0), PeerKey(1), request(id, 100 + id))
                .expect("room");
        }
        let served = drain(&mut uploads, 0);
        assert_eq!(
            served[..20].iter().filter(|(peer, _)| *peer == 1).count(),
            10
        );
    }

    #[test]
    fn requests_that_break_the_protocol_or_the_bounds_are_refused() {
        let mut uploads = uploads(1);
        let (now, peer) = (at(0), PeerKey(0));
        let of = |groups| IncomingRequest {
            groups,
            size: 8 << 20,
            ..request(1, 0)
        };
        assert_eq!(
            uploads.handle_request(now, peer, of(3..3)),
            Err(Refusal::Malformed)
        );
        assert_eq!(
            uploads.handle_request(now, peer, of(0..65)),
            Err(Refusal::Malformed)
        );
        assert_eq!(
            uploads.handle_request(now, peer, of(511..513)),
            Err(Refusal::Malformed)
        );
        assert_eq!(
            uploads.handle_request(now, PeerKey(9), of(0..1)),
            Err(Refusal::UnknownPeer)
        );
        for id in 0..128 {
            assert_eq!(uploads.handle_request(now, peer, request(id, id)), Ok(()));
        }
        assert_eq!(
            uploads.handle_request(now, peer, request(5, 0)),
            Err(Refusal::Duplicate)
        );
        assert_eq!(
            uploads.handle_request(now, peer, request(128, 0)),
            Err(Refusal::Busy)
        );
    }

    #[test]
    fn only_what_waits_can_be_cancelled() {
        let mut uploads = uploads(1);
        (0..2).for_each(|id| {
            uploads
                .handle_request(at(0), PeerKey(0), request(id, id))
                .expect("room")
        });
        let served = uploads.poll_serve(at(0)).expect("one").id;
        assert!(!uploads.handle_cancel(at(0), PeerKey(0), served));
        assert!(uploads.handle_cancel(at(0), PeerKey(0), RequestId(1 - served.0)));
        assert_eq!(uploads.poll_serve(at(0)), None);
    }

    #[test]
    fn a_receiver_that_takes_nothing_does_not_hold_up_the_others() {
        let mut uploads = uploads(3);
        for peer in 0..3 {
            for id in 0..20 {
                let wide = IncomingRequest {
                    groups: id * 8..id * 8 + 8,
                    ..request(id, 0)
                };
                uploads
                    .handle_request(at(0), PeerKey(peer), wide)
                    .expect("room");
            }
        }
        // Peers 0 and 1 take nothing; peer 2 takes a response every 10 ms.
        let mut to_last = 0;
        for ms in 0..2000 {
            while let Some(serve) = uploads.poll_serve(at(ms)) {
                to_last += u32::from(serve.peer == PeerKey(2));
                if serve.peer == PeerKey(2) {
                    uploads.handle_finished(at(ms), serve.peer, serve.id, true);
                }
            }
        }
        assert_eq!(to_last, 20);
    }

    #[test]
    fn bytes_in_flight_are_bounded() {
        let mut uploads = uploads(1);
        for id in 0..100 {
            uploads
                .handle_request(at(0), PeerKey(0), request(id, id))
                .expect("room");
        }
        let served = std::iter::from_fn(|| uploads.poll_serve(at(0))).count();
        assert_eq!(served, 8);
        assert_eq!(uploads.stats().in_flight, MIN_IN_FLIGHT);
        uploads.handle_sent(at(1), PeerKey(0), RequestId(0), 1 << 30);
        assert_eq!(std::iter::from_fn(|| uploads.poll_serve(at(1))).count(), 1);
    }
}
