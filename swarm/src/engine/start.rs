//! Setting a node's network up: credential, transport, listeners, discovery; then the engine runs by itself.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capsule_proto::credential::{CredentialError, Revoked};
use capsule_swarm_core::{
    AnnounceConfig, Announcements, DownloadConfig, Downloads, NodeId, UploadConfig, Uploads,
};
use futures::StreamExt;
use libp2p::PeerId;
use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::identity::Keypair;
use libp2p::swarm::{Swarm, SwarmEvent};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::timeout;

use super::connect::Connector;
use super::inquiries::Inquiries;
use super::pool::Pool;
use super::records::Records;
use super::sites::Site;
use super::status::Statuses;
use super::tally::Tally;
use super::{Engine, Node, PATIENCE, gossip, sizing};
use crate::address;
use crate::api::{BlobStore, Event, NetworkConfig, NetworkHandle, RecordStore, StartError};
use crate::discovery::dns::FleetTag;
use crate::discovery::lan::{self, Beacon, Found};
use crate::protocol::{self, Buffers, Pace};
use crate::transport::{self, Gatekeeper, Sockets};

/// Commands that may wait for the engine; more make their senders wait.
const MAX_COMMANDS: usize = 1024;
/// Events ready for the node.
const EVENTS_READY: usize = 256;
/// Members found on the LAN that wait to be taken in.
const MAX_FOUND: usize = 256;
/// Connections that may be in their handshake: strangers hold a place for 10 s at most.
const MAX_PENDING: u32 = 64;
/// libp2p would end idle connections; ours are never idle to it, as their lanes stay open.
pub(crate) const NEVER_IDLE: Duration = Duration::from_secs(3600);

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
            config.site.clone().unwrap_or_default(),
            config.banned.iter().copied(),
        ));
        let half = config.limits.buffered_bytes / 2;
        let inbound = Buffers::new(half.max(2 * protocol::MAX_CONTENT_FRAME));
        let outbound = Buffers::new(half.max(2 * protocol::MAX_CONTENT_FRAME));
        let pace = Pace::new();
        let sockets = Arc::new(Sockets::default());
        let transport = transport::build(&identity, gatekeeper.clone(), sockets.clone())
            .map_err(StartError::Tls)?;
        let topics = gossip::Topics::new();
        let limits = ConnectionLimits::default()
            .with_max_pending_incoming(Some(MAX_PENDING))
            .with_max_pending_outgoing(Some(MAX_PENDING));
        let node = Node {
            limits: connection_limits::Behaviour::new(limits),
            gossip: gossip::behaviour(&identity, &topics).map_err(StartError::Tls)?,
            peers: protocol::Behaviour::new(
                local,
                gatekeeper.clone(),
                inbound.clone(),
                pace.clone(),
                sockets,
            ),
        };
        let swarm_config =
            libp2p::swarm::Config::with_tokio_executor().with_idle_connection_timeout(NEVER_IDLE);
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
            inbound,
            outbound,
            pace,
            commands: command_receiver,
            dropped: dropped.clone(),
            events,
            unsent: VecDeque::new(),
            downloads: Downloads::new(download_config(&config), config.seed),
            uploads: Uploads::new(UploadConfig::default()),
            announcements: Announcements::new(AnnounceConfig::default()),
            peers: BTreeMap::new(),
            keys: HashMap::new(),
            held: HashMap::new(),
            transfers: BTreeMap::new(),
            inquiries: Inquiries::default(),
            tally: Tally::default(),
            next_probe: sizing::FIRST_PROBE,
            next_transfer: 0,
            site: Site::new(config.site.clone()),
            topics,
            records: Records::new(),
            status: Statuses::new(
                config.credential.machine(),
                listening.clone(),
                (config.unix_time)(),
            ),
            machine_name,
            connector: Connector::new(local, &config, search),
            found,
            ticked: Instant::now(),
            shutdown: None,
            swarm,
        };
        tokio::spawn(engine.run());
        Ok((
            NetworkHandle::new(local, listening.into(), commands, dropped),
            event_receiver,
        ))
    }
}

fn download_config(config: &NetworkConfig) -> DownloadConfig {
    DownloadConfig {
        me: NodeId(config.credential.machine().0),
        ..DownloadConfig::default()
    }
}

/// The identity that the credential certifies, and the name in it.
fn check_credential(config: &NetworkConfig) -> Result<(Keypair, String), StartError> {
    let refuse = |reason: &dyn ToString| StartError::Credential(reason.to_string());
    let credential = &config.credential;
    if credential.machine() != config.machine.machine() {
        return Err(refuse(&"it was made for another machine key"));
    }
    let checked = credential.verify(
        &credential.fleet(),
        (config.unix_time)(),
        &Revoked::default(),
    );
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
        let failed = |reason: &dyn ToString| StartError::Listen {
            address,
            reason: reason.to_string(),
        };
        let id = swarm
            .listen_on(address::to_multiaddr(address))
            .map_err(|error| failed(&error))?;
        let bound = timeout(PATIENCE, async {
            loop {
                match swarm.select_next_some().await {
                    SwarmEvent::NewListenAddr {
                        listener_id,
                        address,
                    } if listener_id == id => {
                        return address::to_socket(&address)
                            .ok_or_else(|| "not a TCP address".to_owned());
                    }
                    SwarmEvent::ListenerClosed {
                        listener_id,
                        reason: Err(error),
                        ..
                    } if listener_id == id => {
                        return Err(error.to_string());
                    }
                    _ => {}
                }
            }
        });
        let bound = bound
            .await
            .map_err(|_| failed(&"the system did not answer"))?
            .map_err(|error| failed(&error))?;
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
    let beacon = Beacon {
        tag,
        peer: local,
        listening: listening.to_vec(),
        seed: config.seed,
    };
    if config.lan_discovery && beacon.is_audible() {
        tokio::spawn(lan::run(beacon, search_receiver, found_sender));
    }
    (search, found)
}
