//! What the node sees of the network: its configuration, the two stores it must bring, the handle,
//! fetches, events and the figures that people read.
//!
//! Deliberately absent: anything of libp2p beyond [`PeerId`] and [`Multiaddr`]; how a transfer is
//! scheduled (`capsule-swarm-core`); what a blob means (the node).

mod fetch;
mod stores;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use capsule_proto::credential::{Credential, MachineId, MachineKey, Member};
use capsule_proto::{CapsuleId, GroupRanges, RootHash};
use capsule_swarm_core::Caps;
pub use libp2p::{Multiaddr, PeerId};
use thiserror::Error;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::engine::Command;
pub use fetch::{Fetch, FetchError, FetchProgress, FetchSpec, Priority};
pub use stores::{BlobStore, Offer, RecordId, RecordStore, ServeError, StoreError};

/// How a node takes part in its fleet's network.
#[derive(Clone)]
pub struct NetworkConfig {
    /// This machine's key: its public half is what the credential certifies, and gives the [`PeerId`].
    pub machine: MachineKey,
    /// The chain root -> token -> machine; names the fleet.
    pub credential: Credential,
    /// Where to accept connections. Port 0 takes a free one; empty accepts none.
    pub listen: Vec<SocketAddr>,
    /// Where to find the fleet: `HOST:PORT` or multiaddr texts (`/ip4/10.0.0.1/tcp/4001`). Names are resolved at
    /// every attempt.
    pub bootstrap: Vec<String>,
    /// Whether to look for the fleet by multicast on the LAN. A node that listens only on loopback never does.
    pub lan_discovery: bool,
    /// Label of the site (cheap network) that this node is in. Where either of two nodes has none, they are of one site if they share a
    /// network's prefix.
    pub site: Option<String>,
    /// Peers that once sent wrong bytes; refused from the start.
    pub banned: Vec<PeerId>,
    /// Bounds on connections, memory and threads.
    pub limits: Limits,
    /// Unix seconds now, floored by the node on the newest signed time it has seen.
    pub unix_time: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Seed of every random choice of the network (ties, jitter).
    pub seed: u64,
}

/// Bounds of one node's network.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections that the node dials up to by itself.
    pub connections_wanted: usize,
    /// Connections to nodes of other sites that it dials up to while it fetches for its site, whose other nodes have one each.
    pub connections_beyond: usize,
    /// Connections beyond which one gives way to each new one: the least useful, or the new one.
    pub connections_max: usize,
    /// Bytes of received or served content that may wait in memory, over all peers. Beside them each connection may pin one
    /// response (1 MiB) that its peer does not take, so that who does not read keeps nobody else from being served.
    pub buffered_bytes: usize,
    /// Threads that read from and write to the store.
    pub store_threads: usize,
    /// Largest blob whose size is taken from a provider's announcement.
    pub unsized_blob_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_wanted: 16,
            connections_max: 24,
            connections_beyond: 3,
            buffered_bytes: 48 << 20,
            store_threads: 2,
            unsized_blob_max: 1 << 30,
        }
    }
}

/// The network has been shut down.
#[derive(Debug, Error)]
#[error("the network has been shut down")]
pub struct NetworkClosed;

/// Why the network did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The machine's secret and the credential do not belong together, or it is malformed.
    #[error("this node's credential: {0}: run `capsule join TOKEN` again")]
    Credential(String),
    /// An address could not be listened on.
    #[error("listening on {address}: {reason}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        reason: String,
    },
    /// TLS could not be set up.
    #[error("setting up TLS: {0}")]
    Tls(String),
}

/// What the network tells the node.
#[derive(Clone, Debug)]
pub enum Event {
    /// A record that was new to the store arrived (it is stored already).
    RecordReceived {
        /// The signed record.
        bytes: Vec<u8>,
        /// Who sent it; `None` if it has left since.
        from: Option<PeerId>,
    },
    /// A member of the fleet is connected.
    PeerConnected(PeerId),
    /// It no longer is.
    PeerDisconnected(PeerId),
    /// A peer sent a wrong byte, and is refused from now on. Keep it, pass it as [`NetworkConfig::banned`], and let it come
    /// again with [`NetworkHandle::unban`].
    PeerBanned {
        /// The peer.
        peer: PeerId,
        /// What it did.
        reason: String,
    },
    /// A connection ended before the peer was let in: its fault or ours, in words for a person.
    Refused {
        /// The address at the other end.
        address: String,
        /// Why.
        reason: String,
    },
    /// The store could not read what we announce: withdraw it, and tell the person.
    StoreDamaged {
        /// The blob.
        root: RootHash,
        /// What the store said.
        reason: String,
    },
    /// Another node's status, heard by gossip.
    Status {
        /// The node.
        peer: PeerId,
        /// Its machine id.
        machine: MachineId,
        /// Its name, for people.
        name: String,
        /// Capsules that it holds; whether each is complete.
        capsules: Vec<(CapsuleId, bool)>,
    },
}

/// A connected peer.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    /// Who.
    pub id: PeerId,
    /// The address at the other end of the connection.
    pub address: Multiaddr,
    /// Whether we dialled.
    pub dialled: bool,
    /// Round trip, smoothed; `None` before the first answer.
    pub rtt: Option<Duration>,
    /// Bytes a second received from it, smoothed.
    pub rate_in: u64,
    /// Bytes a second sent to it, smoothed.
    pub rate_out: u64,
    /// Content bytes received from it over this connection.
    pub bytes_in: u64,
    /// Content bytes sent to it over this connection.
    pub bytes_out: u64,
    /// Label of its site, where it has one.
    pub site: String,
    /// Whether it is in another site than this node.
    pub beyond: bool,
    /// What its credential says: machine, its name, roles and channels.
    pub member: Member,
    /// How many blobs it announces to us.
    pub blobs: usize,
    /// How long it has been connected.
    pub connected: Duration,
}

/// A connected peer that announces a blob.
#[derive(Clone, Debug)]
pub struct Provider {
    /// Who.
    pub peer: PeerId,
    /// Size that it claims.
    pub size: u64,
    /// Groups that it claims.
    pub groups: GroupRanges,
}

/// Content bytes sent and received since the start, of one blob or of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlobTotals {
    /// Content bytes sent to peers.
    pub sent: u64,
    /// Verified content bytes received from peers.
    pub received: u64,
}

/// What was sent and received since the start.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Of all blobs together.
    pub all: BlobTotals,
    /// Of each; where there are very many, those that moved least are left out.
    pub blobs: Vec<(RootHash, BlobTotals)>,
}

/// The running network. Clones share it; it shuts down when told to, or when the last clone is dropped.
#[derive(Clone)]
pub struct NetworkHandle {
    local_peer: PeerId,
    listening: Arc<[SocketAddr]>,
    commands: mpsc::Sender<Command>,
    dropped: Arc<Notify>,
}

impl fmt::Debug for NetworkHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetworkHandle")
            .field("local_peer", &self.local_peer)
            .finish_non_exhaustive()
    }
}

impl NetworkHandle {
    pub(crate) fn new(
        local_peer: PeerId,
        listening: Arc<[SocketAddr]>,
        commands: mpsc::Sender<Command>,
        dropped: Arc<Notify>,
    ) -> Self {
        Self {
            local_peer,
            listening,
            commands,
            dropped,
        }
    }

    /// This node's id.
    pub fn local_peer(&self) -> PeerId {
        self.local_peer
    }

    /// Addresses that accept connections, with the ports that the system chose.
    pub fn listening(&self) -> &[SocketAddr] {
        &self.listening
    }

    /// Announces a blob, or more of it, to all peers: what `ranges` holds is added to what was announced.
    pub async fn announce(
        &self,
        root: RootHash,
        size: u64,
        ranges: GroupRanges,
    ) -> Result<(), NetworkClosed> {
        send(&self.commands, Command::Announce { root, size, ranges }).await
    }

    /// Takes a blob back.
    pub async fn withdraw(&self, root: RootHash) -> Result<(), NetworkClosed> {
        send(&self.commands, Command::Withdraw { root }).await
    }

    /// Starts fetching a blob. It waits for providers as long as it takes: time out by dropping it.
    pub async fn fetch(&self, spec: FetchSpec) -> Result<Fetch, FetchError> {
        let (fetch, command) = Fetch::new(spec, self.commands.clone(), self.dropped.clone());
        let sent = send(&self.commands, Command::Fetch(command)).await;
        sent.map_err(|NetworkClosed| FetchError::Closed)?;
        Ok(fetch)
    }

    /// Spreads a record that this node made and has already put into its record store.
    pub async fn publish_record(&self, bytes: Vec<u8>) -> Result<(), NetworkClosed> {
        send(&self.commands, Command::PublishRecord { bytes }).await
    }

    /// Says which capsules this node holds, and whether complete; the fleet hears it by gossip.
    pub async fn set_capsules(
        &self,
        capsules: Vec<(CapsuleId, bool)>,
    ) -> Result<(), NetworkClosed> {
        send(&self.commands, Command::SetCapsules { capsules }).await
    }

    /// Adds a bootstrap address, as in [`NetworkConfig::bootstrap`].
    pub async fn add_address(&self, address: String) -> Result<(), NetworkClosed> {
        send(&self.commands, Command::AddAddress { address }).await
    }

    /// Refuses a peer no longer that was banned.
    pub async fn unban(&self, peer: PeerId) -> Result<(), NetworkClosed> {
        send(&self.commands, Command::Unban { peer }).await
    }

    /// Has other caps of rates hold from now on; without this there are none.
    pub async fn set_caps(&self, upload: Caps, download: Caps) -> Result<(), NetworkClosed> {
        send(&self.commands, Command::SetCaps { upload, download }).await
    }

    /// Connected peers that announce a blob.
    pub async fn providers(&self, root: RootHash) -> Result<Vec<Provider>, NetworkClosed> {
        self.ask(|reply| Command::Providers { root, reply }).await
    }

    /// Connected peers.
    pub async fn peers(&self) -> Result<Vec<PeerInfo>, NetworkClosed> {
        self.ask(|reply| Command::Peers { reply }).await
    }

    /// Bytes sent and received by blob since the start.
    pub async fn totals(&self) -> Result<Totals, NetworkClosed> {
        self.ask(|reply| Command::Totals { reply }).await
    }

    /// Ends all connections and fetches; returns when the sockets are closed.
    pub async fn shutdown(&self) {
        let _closed = self.ask(|reply| Command::Shutdown { reply }).await;
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, NetworkClosed> {
        let (reply, answer) = oneshot::channel();
        send(&self.commands, command(reply)).await?;
        answer.await.map_err(|_| NetworkClosed)
    }
}

async fn send(commands: &mpsc::Sender<Command>, command: Command) -> Result<(), NetworkClosed> {
    commands.send(command).await.map_err(|_| NetworkClosed)
}
