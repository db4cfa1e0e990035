//! The peers: which connections there are, one per peer, each under a key of its own for the scheduler.
//!
//! Two nodes that dial each other at the same moment get two connections; both keep the one dialled by the lower
//! peer id. A new connection from a peer that has had one for longer replaces it: the peer has probably restarted, and the old
//! one is dead without knowing it. The engine sees one connection a peer, always: the loser's end before the winner's start.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use capsule_proto::credential::Member;
use capsule_proto::wire::Control;
use capsule_swarm_core::PeerKey;
use libp2p::core::transport::PortUse;
use libp2p::core::{ConnectedPoint, Endpoint};
use libp2p::swarm::{
    CloseConnection, ConnectionClosed, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour,
    NotifyHandler, ToSwarm, behaviour::ConnectionEstablished,
};
use libp2p::{Multiaddr, PeerId};
use thiserror::Error;

use super::buffers::{Buffer, Buffers};
use super::frame::{Arriving, LaneError, Response};
use super::handler::{FromBehaviour, Handler, ToBehaviour};
use super::pace::{Lanes, Pace};
use crate::address;
use crate::transport::{Gatekeeper, Sockets};

/// Connections of one peer this close together were opened by both sides at once.
const SIMULTANEOUS: Duration = Duration::from_secs(5);
/// Handshakes under way from one address: a quarter of all, so that no single stranger keeps the fleet out.
const MAX_ARRIVALS: usize = 16;

/// A connection that came up.
#[derive(Debug)]
pub struct Connected {
    pub key: PeerKey,
    pub peer: PeerId,
    pub address: Multiaddr,
    pub dialled: bool,
    pub member: Member,
    /// Label of its site, or empty.
    pub site: String,
    /// What of a content frame has come so far.
    pub arriving: Arriving,
    /// Where what is sent to it waits for caps.
    pub lanes: Lanes,
}

/// What happened among the peers.
#[derive(Debug)]
pub enum Event {
    Connected(Connected),
    Disconnected {
        key: PeerKey,
        peer: PeerId,
    },
    /// A control message came.
    Control {
        key: PeerKey,
        message: Box<Control>,
        /// Length of its frame.
        bytes: usize,
    },
    /// Content came.
    Content {
        key: PeerKey,
        response: Response,
    },
    /// The connection took more of a response.
    Sent {
        key: PeerKey,
        request: u64,
        bytes: usize,
        finished: bool,
    },
    /// The connection is unusable; it is being closed.
    Fault {
        key: PeerKey,
        error: LaneError,
    },
}

#[derive(Debug)]
struct Link {
    key: PeerKey,
    peer: PeerId,
    arriving: Arriving,
    lanes: Lanes,
    established: Option<Established>,
}

#[derive(Clone, Debug)]
struct Established {
    since: Instant,
    dialled: bool,
    address: Multiaddr,
}

/// A connection whose credential went astray between the gate and here: a bug, or a flood of dials.
#[derive(Debug, Error)]
#[error("no credential is remembered for this peer")]
struct NotAdmitted;

/// Somebody opens connections faster than they can be let in.
#[derive(Debug, Error)]
#[error("{MAX_ARRIVALS} connections from {0} are in their handshake: try again in a moment")]
struct TooManyArrivals(IpAddr);

/// See the module.
pub struct Behaviour {
    local: PeerId,
    gatekeeper: Arc<Gatekeeper>,
    inbound: Arc<Buffers>,
    pace: Arc<Pace>,
    sockets: Arc<Sockets>,
    next_key: u64,
    links: HashMap<ConnectionId, Link>,
    /// The connection in use of each peer.
    active: HashMap<PeerId, ConnectionId>,
    keys: HashMap<PeerKey, ConnectionId>,
    /// Where handshakes under way come from; as few as `connection_limits` lets begin.
    arrivals: HashMap<ConnectionId, IpAddr>,
    /// Bounded by the calls between two polls of the swarm.
    actions: VecDeque<ToSwarm<Event, FromBehaviour>>,
}

impl Behaviour {
    pub fn new(
        local: PeerId,
        gatekeeper: Arc<Gatekeeper>,
        inbound: Arc<Buffers>,
        pace: Arc<Pace>,
        sockets: Arc<Sockets>,
    ) -> Self {
        Self {
            local,
            gatekeeper,
            inbound,
            pace,
            sockets,
            next_key: 0,
            links: HashMap::new(),
            active: HashMap::new(),
            keys: HashMap::new(),
            arrivals: HashMap::new(),
            actions: VecDeque::new(),
        }
    }

    /// Sends a control frame.
    pub fn send(&mut self, key: PeerKey, frame: Bytes) {
        self.notify(key, FromBehaviour::Control(frame));
    }

    /// Sends a content frame.
    pub fn respond(&mut self, key: PeerKey, request: u64, frame: Buffer) {
        self.notify(key, FromBehaviour::Content { request, frame });
    }

    /// Closes a connection.
    pub fn close(&mut self, key: PeerKey) {
        if let Some(&id) = self.keys.get(&key) {
            self.close_connection(id);
        }
    }

    fn notify(&mut self, key: PeerKey, event: FromBehaviour) {
        let Some(&id) = self.keys.get(&key) else {
            return;
        };
        let peer_id = self.links[&id].peer;
        self.actions.push_back(ToSwarm::NotifyHandler {
            peer_id,
            handler: NotifyHandler::One(id),
            event,
        });
    }

    fn close_connection(&mut self, id: ConnectionId) {
        if let Some(link) = self.links.get(&id) {
            let (peer_id, connection) = (link.peer, CloseConnection::One(id));
            self.actions.push_back(ToSwarm::CloseConnection {
                peer_id,
                connection,
            });
        }
    }

    fn new_handler(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
    ) -> Result<Handler, ConnectionDenied> {
        if self.gatekeeper.admitted(&peer).is_none() {
            return Err(ConnectionDenied::new(NotAdmitted));
        }
        let (arriving, lanes) = (Arriving::default(), self.pace.lanes());
        let key = PeerKey(self.next_key);
        self.next_key += 1;
        let link = Link {
            key,
            peer,
            arriving: arriving.clone(),
            lanes: lanes.clone(),
            established: None,
        };
        self.links.insert(id, link);
        let outgoing = self.sockets.of(address::to_socket(address));
        Ok(Handler::new(
            self.inbound.clone(),
            arriving,
            lanes,
            outgoing,
        ))
    }

    fn established(&mut self, event: ConnectionEstablished<'_>) {
        let (id, peer) = (event.connection_id, event.peer_id);
        let Some(link) = self.links.get_mut(&id) else {
            return;
        };
        let (dialled, address) = match event.endpoint {
            ConnectedPoint::Dialer { address, .. } => (true, address.clone()),
            ConnectedPoint::Listener { send_back_addr, .. } => (false, send_back_addr.clone()),
        };
        let new = Established {
            since: Instant::now(),
            dialled,
            address,
        };
        link.established = Some(new.clone());
        let old = self.active.get(&peer).copied();
        let old_established = old.and_then(|old| self.links.get(&old)?.established.clone());
        match (old, old_established) {
            (Some(old), Some(held)) if self.prefers_old(&peer, &held, &new) => {
                tracing::debug!(%peer, %old, %id, "second connection at once: keeping the first");
                self.close_connection(id);
            }
            (Some(old), Some(_)) => {
                self.deactivate(old);
                self.close_connection(old);
                self.activate(id);
            }
            _ => self.activate(id),
        }
    }

    /// Both sides must decide alike: by who dialled, where both opened one at once.
    fn prefers_old(&self, peer: &PeerId, old: &Established, new: &Established) -> bool {
        let at_once = new.since.duration_since(old.since) < SIMULTANEOUS;
        let ours_wins = self.local.to_bytes() < peer.to_bytes();
        at_once && old.dialled != new.dialled && old.dialled == ours_wins
    }

    fn activate(&mut self, id: ConnectionId) {
        let link = &self.links[&id];
        let (Some(established), Some(admitted)) = (
            link.established.clone(),
            self.gatekeeper.admitted(&link.peer),
        ) else {
            return self.close_connection(id);
        };
        self.active.insert(link.peer, id);
        self.keys.insert(link.key, id);
        self.actions
            .push_back(ToSwarm::GenerateEvent(Event::Connected(Connected {
                key: link.key,
                peer: link.peer,
                address: established.address,
                dialled: established.dialled,
                member: admitted.member,
                site: admitted.site,
                arriving: link.arriving.clone(),
                lanes: link.lanes.clone(),
            })));
    }

    fn deactivate(&mut self, id: ConnectionId) {
        let link = &self.links[&id];
        let (key, peer) = (link.key, link.peer);
        if self.active.get(&peer) == Some(&id) {
            self.active.remove(&peer);
            self.keys.remove(&key);
            self.actions
                .push_back(ToSwarm::GenerateEvent(Event::Disconnected { key, peer }));
        }
    }

    fn closed(&mut self, event: ConnectionClosed<'_>) {
        if self.links.contains_key(&event.connection_id) {
            self.deactivate(event.connection_id);
            self.links.remove(&event.connection_id);
        }
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = Event;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        _local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        // From this machine many nodes may come, and strangers may not.
        let ip = address::to_socket(remote).map(|address| address.ip());
        let Some(ip) = ip.filter(|ip| !ip.is_loopback()) else {
            return Ok(());
        };
        if self.arrivals.values().filter(|other| **other == ip).count() >= MAX_ARRIVALS {
            return Err(ConnectionDenied::new(TooManyArrivals(ip)));
        }
        self.arrivals.insert(id, ip);
        Ok(())
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        _local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<Handler, ConnectionDenied> {
        self.arrivals.remove(&id);
        self.new_handler(id, peer, remote)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        _role: Endpoint,
        _port: PortUse,
    ) -> Result<Handler, ConnectionDenied> {
        self.new_handler(id, peer, address)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(event) => self.established(event),
            FromSwarm::ConnectionClosed(event) => self.closed(event),
            // A handler made for a connection that another behaviour then denied.
            FromSwarm::DialFailure(event) => drop(self.links.remove(&event.connection_id)),
            FromSwarm::ListenFailure(event) => {
                self.arrivals.remove(&event.connection_id);
                self.links.remove(&event.connection_id);
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, id: ConnectionId, event: ToBehaviour) {
        // Nothing counts that comes over a connection not, or no longer, in use.
        if self.active.get(&peer) != Some(&id) {
            return;
        }
        let key = self.links[&id].key;
        let event = match event {
            ToBehaviour::Control(message, bytes) => Event::Control {
                key,
                message,
                bytes,
            },
            ToBehaviour::Content(response) => Event::Content { key, response },
            ToBehaviour::Sent {
                request,
                bytes,
                finished,
            } => Event::Sent {
                key,
                request,
                bytes,
                finished,
            },
            ToBehaviour::Fault(error) => {
                self.close_connection(id);
                Event::Fault { key, error }
            }
        };
        self.actions.push_back(ToSwarm::GenerateEvent(event));
    }

    fn poll(&mut self, _cx: &mut Context<'_>) -> Poll<ToSwarm<Event, FromBehaviour>> {
        match self.actions.pop_front() {
            Some(action) => Poll::Ready(action),
            None => {
                // A burst must not keep its memory for ever.
                if self.actions.capacity() > 1024 {
                    self.actions.shrink_to(64);
                }
                Poll::Pending
            }
        }
    }
}
