//! The engine: one task that owns the libp2p swarm and the scheduler, and carries what one says to the other.
//!
//! Nothing here waits: the stores are called by `pool`'s threads, connections run in libp2p's tasks. After an event, and those that have come
//! with it, the scheduler is asked what to do (`pump`); so all its decisions are made in one place and in one order.
//!
//! | file | what |
//! |---|---|
//! | `start` | setting all of it up |
//! | `transfers`, `sizing`, `responses` | what this node fetches |
//! | `serve` | what it serves, and announces |
//! | `claims`, `inquiries` | what peers announce; asking those that hold too much to announce it all |
//! | `records`, `status` | records, by gossip and anti-entropy; what members say of themselves |
//! | `connect`, `exchange` | who is connected: dials, bans, the dead, too many |
//! | `sites` | which peers are of this site; its gateways |
//! | `peer`, `directory`, `gossip`, `pool`, `tally`, `turnover`, `wants` | their parts that stand alone |

mod claims;
mod connect;
mod directory;
mod exchange;
mod gossip;
mod inquiries;
mod peer;
mod pool;
mod pulse;
mod records;
mod responses;
mod serve;
mod sites;
mod sizing;
mod start;
mod status;
mod tally;
mod transfers;
mod turnover;
mod wants;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use capsule_proto::wire::Control;
use capsule_proto::{CapsuleId, GroupRanges, RootHash};
use capsule_swarm_core::{Announcements, Caps, Downloads, PeerKey, Time, Uploads};
use futures::{FutureExt, StreamExt};
use libp2p::connection_limits::{self};
use libp2p::swarm::{NetworkBehaviour, Swarm, SwarmEvent};
use libp2p::{PeerId, gossipsub};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{sleep_until, timeout};

use crate::api::{Event, FetchError, FetchProgress, FetchSpec, Limits, PeerInfo, Provider, Totals};
use crate::discovery::lan::Found;
use crate::protocol::{self, Buffers, Pace};
use crate::transport::Gatekeeper;
use connect::Connector;
use gossip::Topics;
use inquiries::Inquiries;
use peer::Peer;
use pool::{Done, Pool};
use records::Records;
use sites::Site;
#[cfg(test)]
pub(crate) use start::NEVER_IDLE;
pub use start::Network;
use status::Statuses;
use tally::Tally;
use transfers::Transfer;

/// Events kept for the node while it is behind; then the oldest that can be spared are lost.
const MAX_EVENTS: usize = 4096;
/// Most events after which it is looked what is to be done: on a busy machine that many may wait.
const AT_ONCE: usize = 64;
/// How often figures are renewed while content moves, and otherwise.
const BUSY_TICK: Duration = Duration::from_millis(200);
const IDLE_TICK: Duration = Duration::from_secs(1);
/// Time that listening and shutting down may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a handle asks of the engine.
#[derive(Debug)]
pub enum Command {
    Announce {
        root: RootHash,
        size: u64,
        ranges: GroupRanges,
    },
    Withdraw {
        root: RootHash,
    },
    Fetch(FetchCommand),
    Demand {
        root: RootHash,
        groups: GroupRanges,
    },
    PublishRecord {
        bytes: Vec<u8>,
    },
    SetCapsules {
        capsules: Vec<(CapsuleId, bool)>,
    },
    AddAddress {
        address: String,
    },
    Unban {
        peer: PeerId,
    },
    SetCaps {
        upload: Caps,
        download: Caps,
    },
    Providers {
        root: RootHash,
        reply: oneshot::Sender<Vec<Provider>>,
    },
    Peers {
        reply: oneshot::Sender<Vec<PeerInfo>>,
    },
    Totals {
        reply: oneshot::Sender<Totals>,
    },
    Shutdown {
        reply: oneshot::Sender<()>,
    },
}

/// A fetch, and where to report.
#[derive(Debug)]
pub struct FetchCommand {
    pub spec: FetchSpec,
    pub progress: watch::Sender<FetchProgress>,
    pub done: oneshot::Sender<Result<FetchProgress, FetchError>>,
}

/// All that runs on a connection.
#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
struct Node {
    limits: connection_limits::Behaviour,
    gossip: gossipsub::Behaviour,
    peers: protocol::Behaviour,
}

/// What this node holds of a blob, and announces.
#[derive(Debug)]
struct Held {
    size: u64,
    groups: GroupRanges,
}

/// See the module.
struct Engine {
    start: Instant,
    unix_time: Arc<dyn Fn() -> u64 + Send + Sync>,
    limits: Limits,
    swarm: Swarm<Node>,
    gatekeeper: Arc<Gatekeeper>,
    pool: Pool,
    /// Memory for what comes, and for what is served.
    inbound: Arc<Buffers>,
    outbound: Arc<Buffers>,
    /// Caps of what is sent; those of what comes are the scheduler's.
    pace: Arc<Pace>,
    commands: mpsc::Receiver<Command>,
    /// A fetch, or the last handle, may have been dropped.
    dropped: Arc<Notify>,
    events: mpsc::Sender<Event>,
    unsent: VecDeque<Event>,
    downloads: Downloads,
    uploads: Uploads,
    announcements: Announcements,
    peers: BTreeMap<PeerKey, Peer>,
    keys: HashMap<PeerId, PeerKey>,
    held: HashMap<RootHash, Held>,
    transfers: BTreeMap<RootHash, Transfer>,
    inquiries: Inquiries,
    tally: Tally,
    next_probe: u64,
    next_transfer: u64,
    /// Our name in our credential, for people.
    machine_name: String,
    site: Site,
    topics: Topics,
    records: Records,
    status: Statuses,
    connector: Connector,
    found: mpsc::Receiver<Found>,
    ticked: Instant,
    shutdown: Option<oneshot::Sender<()>>,
}

impl Engine {
    async fn run(mut self) {
        self.load_records();
        self.connect_more();
        while self.shutdown.is_none() {
            let wake = self.wake_at();
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_swarm_event(event),
                done = self.pool.done() => match done {
                    Some(done) => self.on_done(done),
                    None => break,
                },
                command = self.commands.recv() => match command {
                    Some(command) => self.on_command(command),
                    None => break,
                },
                Some(found) = self.found.recv() => self.on_found(found),
                Some(resolved) = self.connector.resolving.join_next() => {
                    if let Ok((target, addresses)) = resolved {
                        self.dial(target, addresses, None);
                    }
                }
                () = self.dropped.notified() => self.reap_transfers(),
                () = sleep_until(wake.into()) => {}
            }
            self.take_ready();
            if self.ticked.elapsed() >= self.tick_length() {
                self.tick();
            }
            self.pump();
        }
        self.close().await;
    }

    /// Takes in what else has come by now: what follows from it is decided once for all of it.
    fn take_ready(&mut self) {
        for _ in 0..AT_ONCE {
            if let Some(Some(done)) = self.pool.done().now_or_never() {
                self.on_done(done);
            } else if let Some(Some(event)) = self.swarm.next().now_or_never() {
                self.on_swarm_event(event);
            } else {
                break;
            }
        }
    }

    /// Time as the scheduler counts it.
    fn now(&self) -> Time {
        Time::from_start(self.start.elapsed())
    }

    fn tick_length(&self) -> Duration {
        let busy =
            !self.transfers.is_empty() || self.peers.values().any(|peer| !peer.serving.is_empty());
        if busy { BUSY_TICK } else { IDLE_TICK }
    }

    fn wake_at(&self) -> Instant {
        let due = [
            self.downloads.poll_timeout(),
            self.uploads.poll_timeout(),
            self.announcements.poll_timeout(),
        ];
        let tick = self.ticked + self.tick_length();
        due.into_iter()
            .flatten()
            .map(|at| self.start + at.since_start())
            .fold(tick, Instant::min)
    }

    /// Carries out all that the scheduler wants done by now.
    fn pump(&mut self) {
        self.pump_downloads();
        self.pump_announcements();
        self.pump_uploads();
        self.send_events();
    }

    /// Renews figures, and looks at all that depends on time alone.
    fn tick(&mut self) {
        let now = Instant::now();
        let elapsed = now - self.ticked;
        self.ticked = now;
        self.tick_peers(now, elapsed);
        self.let_go_ended();
        self.tick_transfers();
        self.tick_sites();
        self.tick_inquiries(now);
        self.tick_records(now);
        self.tick_status(now);
        self.connect_more();
        if self.tick_length() == IDLE_TICK {
            self.inbound.trim();
            self.outbound.trim();
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Announce { root, size, ranges } => self.hold(root, size, &ranges),
            Command::Withdraw { root } => self.withdraw(root),
            Command::Fetch(command) => self.start_fetch(command),
            Command::Demand { root, groups } => self.demand(root, groups),
            Command::PublishRecord { bytes } => self.publish_record(bytes),
            Command::SetCapsules { capsules } => self.set_capsules(capsules),
            Command::AddAddress { address } => self.add_address(&address),
            Command::Unban { peer } => self.unban(&peer),
            Command::SetCaps { upload, download } => {
                self.pace.set(upload);
                self.downloads.set_caps(self.now(), download);
            }
            Command::Providers { root, reply } => self.find_providers(root, reply),
            Command::Peers { reply } => {
                let now = Instant::now();
                let _gone = reply.send(self.peers.values().map(|peer| peer.info(now)).collect());
            }
            Command::Totals { reply } => {
                let _gone = reply.send(self.tally.totals());
            }
            Command::Shutdown { reply } => self.shutdown = Some(reply),
        }
    }

    fn on_done(&mut self, done: Done) {
        match done {
            Done::Presence { root, presence } => self.on_presence(root, presence),
            Done::Read { part, result } => self.on_read(part, result),
            Done::Write { part, result } => self.on_written(part, result),
            Done::RecordIds { ids } => self.on_record_ids_loaded(ids),
            Done::Records { peer, records } => self.on_records_read(peer, records),
            Done::Offer { bytes, via, offer } => self.on_offered(bytes, via, offer),
        }
    }

    fn on_swarm_event(&mut self, event: SwarmEvent<NodeEvent>) {
        match event {
            SwarmEvent::Behaviour(NodeEvent::Peers(event)) => self.on_peer_event(event),
            SwarmEvent::Behaviour(NodeEvent::Gossip(event)) => self.on_gossip(event),
            SwarmEvent::ConnectionEstablished {
                connection_id,
                peer_id,
                ..
            } => {
                self.on_dialled(connection_id, peer_id);
            }
            SwarmEvent::OutgoingConnectionError {
                connection_id,
                error,
                ..
            } => {
                self.on_dial_failed(connection_id, &error);
            }
            SwarmEvent::IncomingConnectionError {
                send_back_addr,
                error,
                ..
            } => {
                self.on_refused(send_back_addr.to_string(), &error);
            }
            _ => {}
        }
    }

    fn on_peer_event(&mut self, event: protocol::Event) {
        let now = Instant::now();
        match event {
            protocol::Event::Connected(connected) => self.on_connected(connected),
            protocol::Event::Disconnected { key, peer } => self.on_disconnected(key, peer),
            protocol::Event::Control {
                key,
                message,
                bytes,
            } => {
                if let Some(peer) = self.peers.get_mut(&key) {
                    peer.pulse.heard(now);
                    let now = self.now();
                    self.downloads.charge(now, key, bytes as u64);
                    self.on_control(key, *message);
                }
            }
            protocol::Event::Content { key, response } => {
                if let Some(peer) = self.peers.get_mut(&key) {
                    peer.pulse.heard(now);
                    peer.gave = now;
                    self.on_content(key, response);
                }
            }
            protocol::Event::Sent {
                key,
                request,
                bytes,
                finished,
            } => {
                self.on_sent(key, request, bytes, finished);
            }
            protocol::Event::Fault { key, error } => self.on_lane_fault(key, &error),
        }
    }

    fn on_control(&mut self, key: PeerKey, message: Control) {
        match message {
            Control::Have { root, size, groups } => self.on_have(key, root, size, &groups),
            Control::Drop { root, groups } => self.on_drop(key, root, groups.as_ref()),
            Control::Request(request) => self.on_request(key, request),
            Control::Cancel { id } => self.on_cancel(key, id),
            Control::Reject(reject) => self.on_reject(key, reject),
            Control::RecordSummary { digest, .. } => self.on_record_summary(key, digest),
            Control::RecordIds { ids, .. } => self.on_record_ids(key, ids),
            Control::RecordWant { ids } => self.on_record_want(key, ids),
            Control::Records { records } => self.on_records(key, records),
            Control::Peers(peers) => self.on_peers(key, peers),
            Control::Ping { nonce } => self.send(key, &Control::Pong { nonce }),
            Control::Pong { nonce } => {
                if let Some(peer) = self.peers.get_mut(&key) {
                    peer.pulse.pong(Instant::now(), nonce);
                }
            }
            Control::SizeQuery { root } => self.on_size_query(key, root),
            Control::Gateway(gateway) => self.on_gateway(key, gateway),
            Control::Status(status) => self.on_status_told(key, status),
        }
    }

    /// Sends a control message to one peer.
    fn send(&mut self, key: PeerKey, message: &Control) {
        self.swarm
            .behaviour_mut()
            .peers
            .send(key, protocol::control_frame(message));
    }

    /// Keeps an event for the node.
    fn tell(&mut self, event: Event) {
        if self.unsent.len() >= MAX_EVENTS {
            let spare = self
                .unsent
                .iter()
                .position(|event| !matches!(event, Event::PeerBanned { .. }));
            tracing::warn!("the node does not take its events: one is lost");
            match spare {
                Some(at) => drop(self.unsent.remove(at)),
                None => return,
            }
        }
        self.unsent.push_back(event);
    }

    fn send_events(&mut self) {
        while !self.unsent.is_empty() {
            match self.events.try_reserve() {
                Ok(room) => {
                    if let Some(event) = self.unsent.pop_front() {
                        room.send(event);
                    }
                }
                // Behind, or not interested at all.
                Err(mpsc::error::TrySendError::Full(())) => return,
                Err(mpsc::error::TrySendError::Closed(())) => return self.unsent.clear(),
            }
        }
    }

    /// Ends fetches and connections in good order.
    async fn close(mut self) {
        for (_, transfer) in std::mem::take(&mut self.transfers) {
            transfer.fail_all(|| FetchError::Closed);
        }
        let peers: Vec<_> = self.swarm.connected_peers().copied().collect();
        for peer in peers {
            let _gone = self.swarm.disconnect_peer_id(peer);
        }
        let closing = async {
            while self.swarm.network_info().num_peers() > 0 {
                self.swarm.select_next_some().await;
            }
        };
        let _too_slow = timeout(PATIENCE, closing).await;
        drop(self.swarm);
        if let Some(reply) = self.shutdown {
            let _gone = reply.send(());
        }
    }
}

/// A generator of its own for each use, from the one seed.
fn rng(seed: u64, purpose: u64) -> SmallRng {
    SmallRng::seed_from_u64(seed ^ purpose.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
