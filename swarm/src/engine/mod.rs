//! The engine: one task that owns the libp2p swarm and the scheduler, and carries what one says to the other.
//!
//! Nothing here waits: the stores are called by `pool`'s threads, connections run in libp2p's tasks. After every
//! event the scheduler is asked what to do (`pump`); so all its decisions are made in one place and in one order.
//!
//! | file | what |
//! |---|---|
//! | `transfers` | what this node fetches |
//! | `serve` | what it serves, and announces |
//! | `claims` | what peers announce |
//! | `sync` | records and status, by gossip and anti-entropy |
//! | `connect` | who is connected: dials, bans, the dead, too many |
//! | `peer`, `directory`, `gossip`, `pool` | their parts that stand alone |

mod claims;
mod connect;
mod directory;
mod gossip;
mod peer;
mod pool;
mod serve;
mod sync;
mod transfers;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capsule_proto::credential::CredentialError;
use capsule_proto::wire::Control;
use capsule_proto::{CapsuleId, GroupRanges, RootHash};
use capsule_swarm_core::{
    AnnounceConfig, Announcements, DownloadConfig, Downloads, PeerKey, Time, UploadConfig, Uploads,
};
use futures::StreamExt;
use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::identity::Keypair;
use libp2p::swarm::{NetworkBehaviour, Swarm, SwarmEvent};
use libp2p::{PeerId, gossipsub};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{sleep_until, timeout};

use crate::address;
use crate::api::{
    BlobStore, BlobTotals, Event, FetchError, FetchProgress, FetchSpec, Limits, NetworkConfig,
    NetworkHandle, PeerInfo, Provider, RecordStore, StartError,
};
use crate::discovery::dns::FleetTag;
use crate::discovery::lan::{self, Beacon, Found};
use crate::protocol::{self, Buffers};
use crate::transport::{self, Gatekeeper};
use connect::Connector;
use peer::Peer;
use pool::{Done, Pool};
use sync::Sync;
use transfers::Transfer;

/// Commands that may wait for the engine; more make their senders wait.
const MAX_COMMANDS: usize = 1024;
/// Events ready for the node, and kept for it while it is behind; then the oldest that can be spared are lost.
const EVENTS_READY: usize = 256;
const MAX_EVENTS: usize = 4096;
/// Members found on the LAN that wait to be taken in.
const MAX_FOUND: usize = 256;
/// How often figures are renewed while content moves, and otherwise.
const BUSY_TICK: Duration = Duration::from_millis(200);
const IDLE_TICK: Duration = Duration::from_secs(1);
/// Connections that may be in their handshake: strangers hold a place for 10 s at most.
const MAX_PENDING: u32 = 64;
/// Time that listening and shutting down may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a handle asks of the engine.
#[derive(Debug)]
pub enum Command {
    Announce { root: RootHash, size: u64, ranges: GroupRanges },
    Withdraw { root: RootHash },
    Fetch(FetchCommand),
    Demand { root: RootHash, groups: GroupRanges },
    PublishRecord { bytes: Vec<u8> },
    SetCapsules { capsules: Vec<(CapsuleId, bool)> },
    AddAddress { address: String },
    Providers { root: RootHash, reply: oneshot::Sender<Vec<Provider>> },
    Peers { reply: oneshot::Sender<Vec<PeerInfo>> },
    Totals { reply: oneshot::Sender<Vec<(RootHash, BlobTotals)>> },
    Shutdown { reply: oneshot::Sender<()> },
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

/// The network of a node; see [`Network::start`].
pub struct Network;

impl Network {
    /// Starts listening, looking for the fleet and serving; returns when the listeners are bound.
    ///
    /// Must be called within a tokio runtime, whose threads then carry the network. It runs until
    /// [`NetworkHandle::shutdown`], or until all handles are dropped.
    pub async fn start(
        config: NetworkConfig,
        store: Arc<dyn BlobStore>,
        records: Arc<dyn RecordStore>,
    ) -> Result<(NetworkHandle, mpsc::Receiver<Event>), StartError> {
        let (identity, machine_name) = check_credential(&config)?;
        let local = identity.public().to_peer_id();
        let gatekeeper = Arc::new(Gatekeeper::new(
            local,
            &config.credential,
            records.clone(),
            config.unix_time.clone(),
            config.banned.iter().copied(),
        ));
        let half = config.limits.buffered_bytes / 2;
        let inbound = Buffers::new(half.max(2 * protocol::MAX_CONTENT_FRAME));
        let outbound = Buffers::new(half.max(2 * protocol::MAX_CONTENT_FRAME));
        let transport = transport::build(&identity, gatekeeper.clone()).map_err(StartError::Tls)?;
        let topics = gossip::Topics::new();
        let limits = ConnectionLimits::default()
            .with_max_pending_incoming(Some(MAX_PENDING))
            .with_max_pending_outgoing(Some(MAX_PENDING));
        let node = Node {
            limits: connection_limits::Behaviour::new(limits),
            gossip: gossip::behaviour(&identity, &topics).map_err(StartError::Tls)?,
            peers: protocol::Behaviour::new(local, gatekeeper.clone(), inbound),
        };
        let swarm_config = libp2p::swarm::Config::with_tokio_executor()
            .with_idle_connection_timeout(Duration::from_secs(3600));
        let mut swarm = Swarm::new(transport, node, local, swarm_config);
        let listening = listen(&mut swarm, &config.listen).await?;

        let (commands, command_receiver) = mpsc::channel(MAX_COMMANDS);
        let (events, event_receiver) = mpsc::channel(EVENTS_READY);
        let dropped = Arc::new(Notify::new());
        let pool = Pool::start(config.limits.store_threads, store, records);
        let (search, found) = start_lan(&config, local, &listening);
        let engine = Engine {
            start: Instant::now(),
            unix_time: config.unix_time.clone(),
            limits: config.limits.clone(),
            gatekeeper,
            pool,
            outbound,
            commands: command_receiver,
            dropped: dropped.clone(),
            events,
            unsent: VecDeque::new(),
            downloads: Downloads::new(DownloadConfig::default(), config.seed),
            uploads: Uploads::new(UploadConfig::default()),
            announcements: Announcements::new(AnnounceConfig::default()),
            peers: BTreeMap::new(),
            keys: HashMap::new(),
            held: HashMap::new(),
            transfers: BTreeMap::new(),
            totals: BTreeMap::new(),
            next_probe: transfers::FIRST_PROBE,
            next_transfer: 0,
            sync: Sync::new(topics, &config.credential, listening.clone()),
            machine_name,
            connector: Connector::new(local, &config, search),
            found,
            ticked: Instant::now(),
            shutdown: None,
            swarm,
        };
        tokio::spawn(engine.run());
        Ok((NetworkHandle::new(local, listening.into(), commands, dropped), event_receiver))
    }
}

/// The identity that the credential certifies, and the name in it.
fn check_credential(config: &NetworkConfig) -> Result<(Keypair, String), StartError> {
    let refuse = |reason: &dyn ToString| StartError::Credential(reason.to_string());
    let credential = &config.credential;
    if credential.machine() != config.machine.machine() {
        return Err(refuse(&"it was made for another machine key"));
    }
    let checked = credential.verify(&credential.fleet(), (config.unix_time)(), &Default::default());
    let name = match checked {
        Ok(member) => member.name,
        // The node still serves its own machine; peers refuse it, and say why.
        Err(error @ CredentialError::Expired { .. }) => {
            tracing::warn!("{error}");
            String::new()
        }
        Err(error) => return Err(refuse(&error)),
    };
    let identity = Keypair::ed25519_from_bytes(config.machine.secret());
    Ok((identity.map_err(|error| refuse(&error))?, name))
}

/// Binds all addresses; returns them with the ports that the system chose.
async fn listen(swarm: &mut Swarm<Node>, on: &[SocketAddr]) -> Result<Vec<SocketAddr>, StartError> {
    let mut listening = Vec::new();
    for &address in on {
        let failed = |reason: &dyn ToString| StartError::Listen { address, reason: reason.to_string() };
        let id = swarm.listen_on(address::to_multiaddr(address)).map_err(|error| failed(&error))?;
        let bound = timeout(PATIENCE, async {
            loop {
                match swarm.select_next_some().await {
                    SwarmEvent::NewListenAddr { listener_id, address } if listener_id == id => {
                        return address::to_socket(&address).ok_or_else(|| "not a TCP address".to_owned());
                    }
                    SwarmEvent::ListenerClosed { listener_id, reason: Err(error), .. } if listener_id == id => {
                        return Err(error.to_string());
                    }
                    _ => {}
                }
            }
        });
        let bound = bound.await.map_err(|_| failed(&"the system did not answer"))?.map_err(|error| failed(&error))?;
        // For an unspecified address libp2p tells each interface's; we keep the one that means them all.
        listening.push(SocketAddr::new(address.ip(), bound.port()));
    }
    Ok(listening)
}

/// Starts LAN discovery where it is wanted and would be heard.
fn start_lan(
    config: &NetworkConfig,
    local: PeerId,
    listening: &[SocketAddr],
) -> (watch::Sender<u64>, mpsc::Receiver<Found>) {
    let (search, search_receiver) = watch::channel(0);
    let (found_sender, found) = mpsc::channel(MAX_FOUND);
    let tag = FleetTag::of(&config.credential.fleet().0);
    let beacon = Beacon { tag, peer: local, listening: listening.to_vec(), seed: config.seed };
    if config.lan_discovery && beacon.is_audible() {
        tokio::spawn(lan::run(beacon, search_receiver, found_sender));
    }
    (search, found)
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
    unix_time: Arc<dyn Fn() -> u64 + Send + std::marker::Sync>,
    limits: Limits,
    swarm: Swarm<Node>,
    gatekeeper: Arc<Gatekeeper>,
    pool: Pool,
    /// Memory for what is served.
    outbound: Arc<Buffers>,
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
    totals: BTreeMap<RootHash, BlobTotals>,
    next_probe: u64,
    next_transfer: u64,
    /// Our name in our credential, for people.
    machine_name: String,
    sync: Sync,
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
                        self.dial(target, addresses);
                    }
                }
                () = self.dropped.notified() => self.reap_transfers(),
                () = sleep_until(wake.into()) => {}
            }
            if self.ticked.elapsed() >= self.tick_length() {
                self.tick();
            }
            self.pump();
        }
        self.close().await;
    }

    /// Time as the scheduler counts it.
    fn now(&self) -> Time {
        Time::from_start(self.start.elapsed())
    }

    fn tick_length(&self) -> Duration {
        let busy = !self.transfers.is_empty() || self.peers.values().any(|peer| !peer.serving.is_empty());
        if busy { BUSY_TICK } else { IDLE_TICK }
    }

    fn wake_at(&self) -> Instant {
        let due = [self.downloads.poll_timeout(), self.uploads.poll_timeout(), self.announcements.poll_timeout()];
        let tick = self.ticked + self.tick_length();
        due.into_iter().flatten().map(|at| self.start + at.since_start()).fold(tick, Instant::min)
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
        self.tick_transfers();
        self.tick_records(now);
        self.connect_more();
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
            Command::Providers { root, reply } => {
                let _gone = reply.send(self.providers(&root));
            }
            Command::Peers { reply } => {
                let now = Instant::now();
                let _gone = reply.send(self.peers.values().map(|peer| peer.info(now)).collect());
            }
            Command::Totals { reply } => {
                let _gone = reply.send(self.totals.iter().map(|(root, totals)| (*root, *totals)).collect());
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
            SwarmEvent::ConnectionEstablished { connection_id, peer_id, .. } => {
                self.on_dialled(connection_id, peer_id);
            }
            SwarmEvent::OutgoingConnectionError { connection_id, error, .. } => {
                self.on_dial_failed(connection_id, &error);
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, error, .. } => {
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
            protocol::Event::Control { key, message } => {
                if let Some(peer) = self.peers.get_mut(&key) {
                    peer.heard(now);
                    self.on_control(key, *message);
                }
            }
            protocol::Event::Content { key, response } => {
                if let Some(peer) = self.peers.get_mut(&key) {
                    peer.heard(now);
                    self.on_content(key, response);
                }
            }
            protocol::Event::Sent { key, request, bytes, finished } => {
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
                    peer.pong(Instant::now(), nonce);
                }
            }
            Control::SizeQuery { root } => self.on_size_query(key, root),
        }
    }

    /// Sends a control message to one peer.
    fn send(&mut self, key: PeerKey, message: &Control) {
        self.swarm.behaviour_mut().peers.send(key, protocol::control_frame(message));
    }

    /// Keeps an event for the node.
    fn tell(&mut self, event: Event) {
        if self.unsent.len() >= MAX_EVENTS {
            let spare = self.unsent.iter().position(|event| !matches!(event, Event::PeerBanned { .. }));
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
