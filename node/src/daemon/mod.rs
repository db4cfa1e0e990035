//! The daemon: opens a home, takes part in the fleet, answers clients, and stops in order.
//!
//! Order of starting: the store (whose lock keeps a second daemon away), the records, the network, what is held is announced,
//! then the control socket. Stopping goes the other way round, and ends with what was received being durable. A daemon that is killed instead loses at
//! most what was in flight (`node/docs/store.md`).

mod events;
pub mod memory;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use capsule_proto::credential::CredentialError;
use capsule_proto::manifest::MAX_MANIFEST_LEN;
use capsule_swarm::{Event, Limits, Network, NetworkConfig, PeerId, RecordStore, StartError};
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::blobs::Blobs;
use crate::clock::Clock;
use crate::control::{self, ServerError, serve};
use crate::follow;
use crate::home::{Home, HomeError, socket};
use crate::layers::Components;
use crate::materialise;
use crate::node::{Answers, Node, Parts};
use crate::publish::reorder;
use crate::rates::{self, RateKeeper};
use crate::records::Records;
use crate::store::{
    ComponentProvider, Damage, DatabaseError, OpenError, Store, StoreOptions, WriteError,
};
use crate::verify;

/// Threads that run tasks: the network's work is on its own threads, long work on blocking ones.
const WORKER_THREADS: usize = 2;
/// Threads for blocking work: two long works and one behind them, and look-ups for as many clients as ask at a time.
const BLOCKING_THREADS: usize = 16;
/// A blocking thread without work ends after this.
const THREAD_IDLE: Duration = Duration::from_secs(5);
/// Reports of damage that may wait; beyond, the next `verify` finds it again.
const DAMAGE_QUEUE: usize = 256;
/// How long stopping may take for the network.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// What the command line sets for one run.
#[derive(Debug, Clone, Default)]
pub struct NodeOptions {
    /// Where to listen, in place of the home's setting; empty: as set.
    pub listen: Vec<SocketAddr>,
    /// More addresses where the fleet may be found.
    pub bootstrap: Vec<String>,
    /// Whether to look for the fleet on the LAN, in place of the home's setting.
    pub lan_discovery: Option<bool>,
}

/// A daemon that is ready.
#[derive(Debug, Clone)]
pub struct Ready {
    /// Addresses that accept connections, with the ports that the system chose.
    pub listening: Vec<SocketAddr>,
    /// The control socket.
    pub socket: PathBuf,
    /// This node's network id.
    pub peer: String,
    /// What opening the store found and put right, in words; empty after an orderly stop.
    pub recovered: Vec<String>,
}

/// Why the daemon did not start, or did not stop in order.
#[derive(Debug, Error)]
pub enum NodeError {
    /// The home could not be used.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// This machine is no longer a member.
    #[error("this machine may no longer take part: {0}")]
    Membership(CredentialError),
    /// The store could not be opened.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The database could not be read.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// An address cannot be listened on.
    #[error(
        "cannot listen on {address}: {source}: choose another with `--listen IP:PORT` (port 0: any free one), or `listen` in home.json"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The network did not start.
    #[error(transparent)]
    Network(#[from] StartError),
    /// The control socket could not be made.
    #[error(transparent)]
    Control(#[from] ServerError),
    /// The system gave no threads, or no signals.
    #[error("starting: {0}")]
    System(#[from] std::io::Error),
    /// Starting failed for another reason.
    #[error(transparent)]
    Failed(#[from] crate::control::Failure),
    /// What was received could not all be made durable at the end.
    #[error("stopping: {0}; what was not durable is fetched again")]
    Flush(#[from] WriteError),
    /// A part of the daemon ended while it was needed.
    #[error(
        "the node stopped, because its {part} {how}: start it again, and report this with its log"
    )]
    Part {
        /// Which.
        part: &'static str,
        /// What became of it.
        how: String,
    },
}

/// Runs a node until SIGTERM, SIGINT, or the end of one of its parts, which is an error. Blocks; makes its own threads.
pub fn run(
    home: Home,
    options: NodeOptions,
    on_ready: impl FnOnce(&Ready),
) -> Result<(), NodeError> {
    memory::limit_arenas();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(THREAD_IDLE)
        .thread_name("capsule")
        .enable_all()
        .build()?;
    let result = runtime.block_on(async {
        // Before anything else, so that no signal is lost while starting.
        let (mut terminate, mut interrupt) = (
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        );
        let daemon = Daemon::start(home, options).await?;
        on_ready(&daemon.ready);
        let serving = daemon.serve();
        let served = tokio::select! {
            failed = serving => Err(failed),
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        };
        // In order all the same: what was received must not be lost with the part that failed.
        let stopped = daemon.stop().await;
        served.and(stopped)
    });
    // Work that was told to stop ends within about a megabyte.
    runtime.shutdown_timeout(STOP_PATIENCE);
    result
}

/// A daemon that has started.
struct Daemon {
    node: Arc<Node>,
    ready: Ready,
    parts: tokio::sync::Mutex<Option<Running>>,
}

/// What a daemon listens to.
struct Running {
    clients: UnixListener,
    events: mpsc::Receiver<Event>,
    damage: mpsc::Receiver<Damage>,
}

impl Daemon {
    async fn start(home: Home, options: NodeOptions) -> Result<Self, NodeError> {
        let (settings, identity) = (home.settings()?, home.identity()?);
        let rates = RateKeeper::new(home.rates()?);
        let store_options = StoreOptions {
            quota: settings.quota,
            ..StoreOptions::default()
        };
        let store = Store::open(&home.store_dir(), store_options)?;
        let recovered = recovered(&store);
        // Its own credential was signed in the past.
        let floor = store.newest_time()?.max(identity.credential.grant().issued);
        let clock = Arc::new(Clock::new(floor));
        let fleet = identity.credential.fleet();
        let records = Arc::new(Records::open(store.clone(), fleet, clock.clone())?);
        // Nobody would let it in: said here, once, rather than by every peer.
        identity
            .credential
            .verify(&fleet, clock.now(), &records.revoked())
            .map_err(NodeError::Membership)?;
        let blobs = Arc::new(Blobs::new(store.clone()));
        let components = Arc::new(Components::new(store.clone()));
        store.set_component_provider(&(components.clone() as Arc<dyn ComponentProvider>));
        let (damaged, damage) = mpsc::channel(DAMAGE_QUEUE);
        store.on_damage(Arc::new(move |found: &Damage| {
            // Handed on: the finder holds the blob's lock.
            let _ = damaged.try_send(found.clone());
        }));

        let now = clock.clone();
        let mut bootstrap = [
            identity.addresses.clone(),
            settings.bootstrap.clone(),
            options.bootstrap,
        ]
        .concat();
        bootstrap.extend(events::known_addresses(&store));
        let mut seed = [0; 8];
        crate::home::system_entropy(&mut seed);
        let listen = if options.listen.is_empty() {
            settings.listen.clone()
        } else {
            options.listen
        };
        let listen = same_ports(&listen, &home.listening()?);
        refuse_taken(&listen)?;
        let config = NetworkConfig {
            machine: identity.machine.clone(),
            credential: identity.credential.clone(),
            listen,
            bootstrap,
            lan_discovery: options.lan_discovery.unwrap_or(settings.lan_discovery),
            site: settings.site.clone(),
            banned: banned(&store, clock.now())?,
            // Only manifests are fetched without knowing their size.
            limits: Limits {
                unsized_blob_max: MAX_MANIFEST_LEN as u64,
                ..Limits::default()
            },
            unix_time: Arc::new(move || now.now()),
            seed: u64::from_le_bytes(seed),
        };
        let (network, events) = Network::start(config, blobs.clone(), records.clone()).await?;
        let listening = network.listening().to_vec();
        // For invitations only: where the disk is full the node is needed all the same, to make room.
        if let Err(error) = home.save_listening(&reachable(&listening)) {
            tracing::warn!(%error, "invitations will not name the addresses of this run");
        }
        let socket = socket::prepare(home.dir())?;
        let peer = network.local_peer().to_string();
        let node = Node::new(Parts {
            home,
            settings,
            identity,
            store,
            records,
            network,
            clock,
            blobs,
            components,
            rates,
        });
        rates::apply(&node).await?;
        mark_lacking(&node).await?;
        node.while_keeping(crate::keep::unpin_gone_machines).await?;
        announce_all(&node).await?;
        follow::resume(&node).await?;
        let clients = control::listen(&socket)?;
        let ready = Ready {
            listening,
            socket,
            peer,
            recovered,
        };
        Ok(Self {
            node,
            ready,
            parts: tokio::sync::Mutex::new(Some(Running {
                clients,
                events,
                damage,
            })),
        })
    }

    /// Serves until dropped, or until a part ends: a node that goes on without one would look alive, and not be.
    async fn serve(&self) -> NodeError {
        let Some(Running {
            clients,
            events,
            damage,
        }) = self.parts.lock().await.take()
        else {
            let how = "was started twice".to_owned();
            return NodeError::Part {
                part: "server",
                how,
            };
        };
        let node = &self.node;
        let components = node.components.clone();
        let mut parts = RunningParts::default();
        parts.start(
            "control server",
            serve(clients, Arc::new(Answers(node.clone()))),
        );
        parts.start(
            "watch over the network",
            events::watch_network(node.clone(), events),
        );
        parts.start(
            "watch over the disk",
            events::watch_damage(node.clone(), damage),
        );
        parts.start("purge of records", events::purge_records(node.clone()));
        parts.start("end of bans", events::lift_bans(node.clone()));
        parts.start("trimming of memory", events::trim_when_quiet(node.clone()));
        parts.start("shortening of chains", materialise::run(node.clone()));
        parts.start("order of layers", reorder::run(node.clone()));
        parts.start("hours of rates", rates::follow_hours(node.clone()));
        parts.start("closing of components", async move {
            components.close_idle().await
        });
        parts.first_end().await
    }

    async fn stop(self) -> Result<(), NodeError> {
        let node = self.node;
        node.follower.stop_all();
        // What cannot be removed is replaced at the next start.
        let _ = std::fs::remove_file(&self.ready.socket);
        events::save_addresses(&node).await;
        if tokio::time::timeout(STOP_PATIENCE, node.network.shutdown())
            .await
            .is_err()
        {
            tracing::warn!("the network did not stop in time");
        }
        let store = node.store.clone();
        let flushed = tokio::task::spawn_blocking(move || store.flush_all()).await;
        flushed
            .map_err(std::io::Error::other)?
            .map_err(NodeError::from)
    }
}

/// Tasks of which none ends while the daemon serves; they end with this.
#[derive(Debug, Default)]
struct RunningParts {
    tasks: JoinSet<()>,
    names: HashMap<tokio::task::Id, &'static str>,
}

impl RunningParts {
    fn start(&mut self, name: &'static str, part: impl Future<Output = ()> + Send + 'static) {
        let task = self.tasks.spawn(part);
        self.names.insert(task.id(), name);
    }

    /// Waits until one ends; why that is an error.
    async fn first_end(&mut self) -> NodeError {
        let (id, how) = match self.tasks.join_next_with_id().await {
            Some(Ok((id, ()))) => (Some(id), "ended by itself".to_owned()),
            Some(Err(error)) => (Some(error.id()), format!("failed ({error})")),
            None => (None, "has no parts".to_owned()),
        };
        let part = id.and_then(|id| self.names.get(&id).copied());
        NodeError::Part {
            part: part.unwrap_or("server"),
            how,
        }
    }
}

/// Notes what went while nobody noted it, before anybody is told what is here.
async fn mark_lacking(node: &Arc<Node>) -> Result<(), NodeError> {
    let lacking = node.while_keeping(verify::mark_lacking).await?;
    for id in lacking {
        node.trouble(format!(
            "{id} is no longer all here: `capsule verify --repair` or `capsule pull` fetches what is missing"
        ));
    }
    Ok(())
}

/// Announces everything that is here, and tells the fleet which capsules.
async fn announce_all(node: &Node) -> Result<(), NodeError> {
    let roots = node.store.blobs().into_iter().map(|blob| blob.root);
    let components = node.store.components().into_iter().map(|(root, _)| root);
    node.announce(roots.chain(components)).await?;
    node.tell_capsules().await?;
    Ok(())
}

fn banned(store: &Store, now: u64) -> Result<Vec<PeerId>, NodeError> {
    store.lift_ended_bans(now)?;
    Ok(store
        .bans(now)?
        .into_iter()
        .filter_map(|(peer, _)| PeerId::from_bytes(&peer).ok())
        .collect())
}

fn recovered(store: &Store) -> Vec<String> {
    let recovery = store.recovery();
    let mut words = Vec::new();
    if !recovery.removed.is_empty() {
        words.push(format!(
            "removed {} files of work that was cut short",
            recovery.removed.len()
        ));
    }
    for (root, groups) in &recovery.lost {
        words.push(format!(
            "{} chunk groups of {root} are no longer on the disk: pull what needs them again",
            groups.count()
        ));
    }
    words
}

/// Where any port is right, the one of the last run is taken again if it is free: others remember it.
fn same_ports(listen: &[SocketAddr], last: &[String]) -> Vec<SocketAddr> {
    let last: Vec<SocketAddr> = last
        .iter()
        .filter_map(|address| address.parse().ok())
        .collect();
    let same = |address: &SocketAddr| {
        let same_ip =
            |known: &&SocketAddr| address.ip().is_unspecified() || known.ip() == address.ip();
        let known = last.iter().filter(|_| address.port() == 0).find(same_ip)?;
        let again = SocketAddr::new(address.ip(), known.port());
        std::net::TcpListener::bind(again).ok().map(|_| again)
    };
    listen
        .iter()
        .map(|address| same(address).unwrap_or(*address))
        .collect()
}

/// Refuses what somebody else listens on: the network's own sockets would share a port with any other node of this user,
/// and the system then deals connections out between the two.
fn refuse_taken(listen: &[SocketAddr]) -> Result<(), NodeError> {
    for &address in listen {
        std::net::TcpListener::bind(address)
            .map_err(|source| NodeError::Listen { address, source })?;
    }
    Ok(())
}

/// Addresses to put into tokens: of sockets that listen everywhere, each interface's; loopback only where there is nothing else.
fn reachable(listening: &[SocketAddr]) -> Vec<String> {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for address in listening {
        if !address.ip().is_unspecified() {
            addresses.push(*address);
            continue;
        }
        let same_kind = interfaces
            .iter()
            .filter(|i| i.ip().is_ipv4() == address.is_ipv4());
        // Link-local addresses mean nothing without the interface, which differs from machine to machine.
        let usable = same_kind.filter(|i| !i.is_link_local());
        addresses.extend(usable.map(|interface| SocketAddr::new(interface.ip(), address.port())));
    }
    if addresses.iter().any(|address| !address.ip().is_loopback()) {
        addresses.retain(|address| !address.ip().is_loopback());
    }
    addresses.iter().map(ToString::to_string).collect()
}
