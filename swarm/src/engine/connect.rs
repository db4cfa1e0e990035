//! Who is connected: dialling, letting go, bans, the dead.
//!
//! A node dials until it has the connections it wants, and accepts some more; beyond that one gives way to each newcomer
//! (`turnover`). Members tell each other where members are.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use capsule_proto::wire::Control;
use capsule_swarm_core::{Class, PeerKey};
use libp2p::PeerId;
use libp2p::core::transport::TransportError;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, ListenError};
use rand::RngExt;
use rand::rngs::SmallRng;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::directory::{Directory, Target};
use super::peer::Peer;
use super::pulse::Vital;
use super::turnover::{self, Standing};
use super::{Engine, rng};
use crate::address;
use crate::api::{Event, NetworkConfig};
use crate::discovery::lan::Found;
use crate::protocol::{Connected, LaneError};
use crate::transport::{self, AdmissionError};

/// Dials begun in one go.
const DIALS_AT_ONCE: usize = 8;
/// How often the LAN is asked while peers are lacking (discovery itself backs off), and one peer is told of members and records.
const SEARCH_EVERY: Duration = Duration::from_secs(5);
const EXCHANGE_EVERY: Duration = Duration::from_secs(60);
/// Newcomers beyond the bound that may wait for the next tick to be let go.
const MAX_LEAVING: usize = 8;
/// Faults that may be misunderstandings, before a peer is cut off for them.
const MAX_FAULTS: u32 = 8;
/// The same refusal at the same place is told once in a while.
const TELL_REFUSAL_EVERY: Duration = Duration::from_secs(60);
/// Refusals remembered for that.
const MAX_REFUSALS: usize = 256;

/// State of connecting.
pub(super) struct Connector {
    pub(super) directory: Directory,
    /// With whether they lead to another site, where that is known.
    dials: HashMap<ConnectionId, (Target, Option<bool>)>,
    /// Names being looked up.
    pub(super) resolving: JoinSet<(Target, Vec<SocketAddr>)>,
    search: watch::Sender<u64>,
    searched: Option<Instant>,
    exchanged: Instant,
    refusals: BTreeMap<String, Instant>,
    rng: SmallRng,
}

impl Connector {
    pub(super) fn new(local: PeerId, config: &NetworkConfig, search: watch::Sender<u64>) -> Self {
        let mut directory = Directory::new(local, rng(config.seed, 1));
        for text in &config.bootstrap {
            if !directory.add_bootstrap(text) {
                tracing::warn!(
                    "bootstrap address {text:?} is ignored: it is not HOST:PORT, or there are too many"
                );
            }
        }
        Self {
            directory,
            dials: HashMap::new(),
            resolving: JoinSet::new(),
            search,
            searched: None,
            exchanged: Instant::now(),
            refusals: BTreeMap::new(),
            rng: rng(config.seed, 2),
        }
    }

    /// How many connections are on their way, to other sites or within this one, or where that is not known.
    pub(super) fn dialling(&self, beyond: bool) -> usize {
        let may_be = |leads: &&(Target, Option<bool>)| leads.1.is_none_or(|leads| leads == beyond);
        self.dials.values().filter(may_be).count() + self.resolving.len()
    }

    pub(super) fn rng(&mut self) -> &mut SmallRng {
        &mut self.rng
    }

    /// One at random.
    pub(super) fn choose<'a>(
        &mut self,
        keys: impl ExactSizeIterator<Item = &'a PeerKey>,
    ) -> Option<PeerKey> {
        let mut keys = keys;
        if keys.len() == 0 {
            return None;
        }
        keys.nth(self.rng.random_range(0..keys.len())).copied()
    }

    /// Whether this refusal should be told (again).
    fn is_news(&mut self, refusal: &str) -> bool {
        let now = Instant::now();
        self.refusals
            .retain(|_, told| now - *told < TELL_REFUSAL_EVERY);
        let news = self.refusals.len() < MAX_REFUSALS && !self.refusals.contains_key(refusal);
        if news {
            self.refusals.insert(refusal.to_owned(), now);
        }
        news
    }
}

impl Engine {
    pub(super) fn add_address(&mut self, text: &str) {
        if self.connector.directory.add_bootstrap(text) {
            self.connect_more();
        } else {
            tracing::warn!(
                "address {text:?} is ignored: it is not HOST:PORT, or there are too many"
            );
        }
    }

    /// Dials what is due, if connections are lacking; asks the LAN, and passes on now and then what is known.
    pub(super) fn connect_more(&mut self) {
        let now = Instant::now();
        let since_start = now - self.start;
        let (near, lacking_beyond) = (self.near(), self.lacking_beyond());
        let (keys, site) = (&self.keys, &self.site);
        let connector = &mut self.connector;
        let busy = near + connector.dialling(false);
        let lacking = self
            .limits
            .connections_wanted
            .saturating_sub(busy)
            .min(DIALS_AT_ONCE);
        let lacking_beyond = lacking_beyond.min(DIALS_AT_ONCE);
        let mut targets = Vec::new();
        if lacking + lacking_beyond > 0 {
            let connected = |peer: &PeerId| keys.contains_key(peer);
            let is_beyond = |label: &str, addresses: &[SocketAddr]| {
                site.is_beyond(label, addresses.iter().map(SocketAddr::ip))
            };
            let mut due = |count: usize, beyond: bool| {
                let due =
                    connector
                        .directory
                        .due_peers(since_start, count, connected, |label, at| {
                            is_beyond(label, at) == beyond
                        });
                let found = due.len();
                targets.extend(due.into_iter().map(|target| (target, Some(beyond))));
                count - found
            };
            let (near_left, beyond_left) = (due(lacking, false), due(lacking_beyond, true));
            // Whoever all know as the way in is asked last, or it would have no peace. Where a name leads is known once somebody answered.
            let is_wanted = |host: &str, beyond: Option<bool>| {
                let by_address = || Some(site.is_beyond("", [host.parse().ok()?]));
                match beyond.or_else(by_address) {
                    Some(true) => beyond_left > 0,
                    Some(false) => near_left > 0,
                    None => near_left + beyond_left > 0,
                }
            };
            let ways_in = connector.directory.due_bootstrap(
                since_start,
                near_left.max(beyond_left),
                connected,
                is_wanted,
            );
            targets.extend(ways_in.into_iter().map(|target| (target, None)));
        }
        if lacking > 0 && connector.searched.is_none_or(|at| now - at >= SEARCH_EVERY) {
            connector.searched = Some(now);
            connector.search.send_modify(|round| *round += 1);
        }
        targets
            .into_iter()
            .for_each(|(target, beyond)| self.resolve(target, beyond));
        if now - self.connector.exchanged >= EXCHANGE_EVERY {
            self.connector.exchanged = now;
            if let Some(key) = self.connector.choose(self.peers.keys()) {
                self.send_peers(key);
                self.send_summary(key);
            }
        }
    }

    fn resolve(&mut self, target: Target, beyond: Option<bool>) {
        let place = match &target {
            Target::Peer(_, addresses) => {
                let addresses = addresses.clone();
                return self.dial(target, addresses, beyond);
            }
            Target::Bootstrap(_, place) => place.clone(),
        };
        if let Ok(ip) = place.host.parse() {
            return self.dial(target, vec![SocketAddr::new(ip, place.port)], beyond);
        }
        self.connector.resolving.spawn(async move {
            let found = tokio::net::lookup_host((place.host.as_str(), place.port)).await;
            (target, found.map(Iterator::collect).unwrap_or_default())
        });
    }

    /// Dials a target at addresses that are known by now, in another site or not.
    pub(super) fn dial(
        &mut self,
        target: Target,
        addresses: Vec<SocketAddr>,
        beyond: Option<bool>,
    ) {
        let options = match &target {
            Target::Peer(peer, _) => DialOpts::peer_id(*peer)
                .condition(PeerCondition::DisconnectedAndNotDialing)
                .addresses(addresses.into_iter().map(address::to_multiaddr).collect())
                .allocate_new_port()
                .build(),
            Target::Bootstrap(..) => {
                let since_start = self.start.elapsed();
                let Some(address) = self.pick_address(&addresses) else {
                    return self.connector.directory.dialled(since_start, &target, None);
                };
                DialOpts::unknown_peer_id()
                    .address(address::to_multiaddr(address))
                    .allocate_new_port()
                    .build()
            }
        };
        let id = options.connection_id();
        self.connector.dials.insert(id, (target, beyond));
        if let Err(error) = self.swarm.dial(options) {
            self.on_dial_failed(id, &error);
        }
    }

    /// Of several addresses of a name any one: the next attempt takes another.
    fn pick_address(&mut self, addresses: &[SocketAddr]) -> Option<SocketAddr> {
        let at =
            (!addresses.is_empty()).then(|| self.connector.rng.random_range(0..addresses.len()))?;
        Some(addresses[at])
    }

    pub(super) fn on_dialled(&mut self, id: ConnectionId, reached: PeerId) {
        if let Some((target, _)) = self.connector.dials.remove(&id) {
            self.connector
                .directory
                .dialled(self.start.elapsed(), &target, Some(reached));
            let there = self.keys.get(&reached).and_then(|key| self.peers.get(key));
            if let Some(class) = there.map(|peer| peer.class) {
                self.connector
                    .directory
                    .is_beyond(&reached, class == Class::Beyond);
            }
        }
    }

    pub(super) fn on_dial_failed(&mut self, id: ConnectionId, error: &DialError) {
        let Some((target, _)) = self.connector.dials.remove(&id) else {
            return;
        };
        self.connector
            .directory
            .dialled(self.start.elapsed(), &target, None);
        if is_myself(error) {
            self.connector.directory.is_myself(&target);
        }
        let DialError::Transport(failures) = error else {
            return tracing::debug!(?target, %error, "dial failed");
        };
        for (address, failure) in failures {
            let TransportError::Other(failure) = failure else {
                continue;
            };
            tracing::debug!(%address, %failure, "dial failed");
            self.report_refusal(address.to_string(), failure);
        }
    }

    /// An inbound connection did not come about.
    pub(super) fn on_refused(&mut self, address: String, error: &ListenError) {
        tracing::debug!(%address, %error, "connection not accepted");
        if let ListenError::Transport(TransportError::Other(error)) = error {
            self.report_refusal(address, error);
        }
    }

    /// Tells the node of refusals, ours and theirs; what is only a broken connection is nobody's news.
    fn report_refusal(&mut self, address: String, error: &std::io::Error) {
        let Some(error) = transport::admission_error(error).filter(|error| !error.is_myself())
        else {
            return;
        };
        if !matches!(
            error,
            AdmissionError::Refused { .. } | AdmissionError::RefusedByPeer(_)
        ) {
            return;
        }
        let reason = error.to_string();
        if self.connector.is_news(&reason) {
            tracing::warn!(%address, "{reason}");
            self.tell(Event::Refused { address, reason });
        }
    }

    pub(super) fn on_found(&mut self, found: Found) {
        self.connector
            .directory
            .add_peer(found.peer, &found.addresses, "");
        self.connect_more();
    }

    pub(super) fn on_connected(&mut self, connected: Connected) {
        let (key, id) = (connected.key, connected.peer);
        let now = self.now();
        let class = self.class_of(&connected.site, &connected.address);
        let taken =
            !self.gatekeeper.is_banned(&id) && self.downloads.peer_connected(now, key, class);
        if !taken {
            return self.swarm.behaviour_mut().peers.close(key);
        }
        tracing::debug!(peer = %id, address = %connected.address, ?class, "connected");
        self.connector
            .directory
            .is_beyond(&id, class == Class::Beyond);
        self.uploads.peer_connected(now, key, class);
        self.announcements.peer_connected(now, key, class);
        if let Some(address) = address::to_socket(&connected.address).filter(|_| connected.dialled)
        {
            self.connector
                .directory
                .add_peer(id, &[address], &connected.site);
        }
        connected.lanes.set_class(class);
        self.peers
            .insert(key, Peer::new(connected, class, Instant::now()));
        self.keys.insert(id, key);
        self.send_peers(key);
        self.send_summary(key);
        self.send_status(key);
        self.tell(Event::PeerConnected(id));
        self.let_go_excess(key);
    }

    pub(super) fn on_disconnected(&mut self, key: PeerKey, id: PeerId) {
        let Some(peer) = self.peers.remove(&key) else {
            return;
        };
        tracing::debug!(peer = %id, "disconnected");
        let now = self.now();
        self.keys.remove(&id);
        self.downloads.peer_disconnected(now, key);
        self.uploads.peer_disconnected(now, key);
        self.announcements.peer_disconnected(now, key);
        self.records.forget(key);
        self.forget_probes(key);
        self.forget_asked(key);
        self.connector
            .directory
            .disconnected(self.start.elapsed(), &id, peer.since.elapsed());
        self.tell(Event::PeerDisconnected(id));
    }

    /// Lets a connection go if there are too many; see `turnover`.
    fn let_go_excess(&mut self, newest: PeerKey) {
        let now = Instant::now();
        let staying = self.peers.iter().filter(|(_, peer)| !peer.leaving);
        let standings: Vec<_> = staying
            .map(|(&key, peer)| {
                let address = address::to_socket(&peer.address).map(|address| address.ip());
                Standing {
                    key,
                    token: peer.member.grant.id,
                    address: address.filter(|ip| !ip.is_loopback()),
                    age: now - peer.since,
                    good_for: peer.good_for(now, self.transfers.keys()),
                    given: peer.incoming.bytes,
                    taken: peer.outgoing.bytes,
                }
            })
            .collect();
        let max = self.limits.connections_max;
        if standings.len() <= max {
            return;
        }
        let Some(key) = turnover::gives_way(&standings, newest, max) else {
            return;
        };
        // A newcomer that cannot stay has time to read where others are.
        let waits = key == newest && self.peers.len() - standings.len() < MAX_LEAVING;
        if let Some(peer) = self.peers.get_mut(&key) {
            tracing::debug!(peer = %peer.id, newest = key == newest, "let go: too many connections");
            peer.leaving = true;
        }
        if !waits {
            self.swarm.behaviour_mut().peers.close(key);
        }
    }

    /// Renews peers' figures; pings the silent, closes the dead.
    pub(super) fn tick_peers(&mut self, now: Instant, elapsed: Duration) {
        let time = self.now();
        let fetching = !self.transfers.is_empty();
        // Of those in other sites most are asked for nothing, and links there are thin; who is alone depends on them all.
        let fetching_beyond = fetching && self.near() == 0;
        let keys: Vec<_> = self.peers.keys().copied().collect();
        for key in keys {
            let Some(peer) = self.peers.get_mut(&key) else {
                continue;
            };
            if let Some((request, bytes)) = peer.progress(now) {
                let id = capsule_swarm_core::RequestId(request);
                self.downloads.handle_progress(time, key, id, bytes);
            }
            if peer.leaving {
                self.swarm.behaviour_mut().peers.close(key);
                continue;
            }
            let wanted = match peer.class {
                Class::Beyond => fetching_beyond,
                _ => fetching,
            };
            match peer.tick(now, elapsed, wanted) {
                Vital::Fine => {}
                Vital::Ping(nonce) => self.send(key, &Control::Ping { nonce }),
                Vital::Dead => {
                    tracing::debug!(peer = %peer.id, "dead: no answer to pings");
                    self.swarm.behaviour_mut().peers.close(key);
                }
            }
        }
    }

    /// Lets go of members whose credential has ended, or was revoked, since they were let in.
    pub(super) fn let_go_ended(&mut self) {
        let members = self.peers.iter().map(|(key, peer)| (*key, &peer.member));
        for (key, why) in self.gatekeeper.ended(members) {
            self.violation(key, &why.to_string());
        }
    }

    /// A lane broke: mostly with its connection.
    pub(super) fn on_lane_fault(&mut self, key: PeerKey, error: &LaneError) {
        let Some(peer) = self.peers.get(&key) else {
            return;
        };
        if error.is_violation() {
            tracing::warn!(peer = %peer.id, "cut off: {error}");
        } else {
            tracing::debug!(peer = %peer.id, "connection ends: {error}");
        }
    }

    /// A peer did something that may be a misunderstanding; too much of it, and it is cut off.
    pub(super) fn fault(&mut self, key: PeerKey, what: &str) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        peer.faults += 1;
        tracing::debug!(peer = %peer.id, faults = peer.faults, "fault: {what}");
        if peer.faults >= MAX_FAULTS {
            self.violation(key, what);
        }
    }

    /// A peer broke the protocol: it is cut off, and may come back (perhaps upgraded).
    pub(super) fn violation(&mut self, key: PeerKey, what: &str) {
        let Some(peer) = self.peers.get(&key) else {
            return;
        };
        tracing::warn!(peer = %peer.id, "cut off: {what}");
        self.swarm.behaviour_mut().peers.close(key);
    }

    /// A peer sent wrong content: it is cut off for good.
    pub(super) fn ban(&mut self, key: PeerKey, reason: &str) {
        if let Some(id) = self.peers.get(&key).map(|peer| peer.id) {
            self.ban_id(id, reason);
        }
    }

    pub(super) fn ban_id(&mut self, id: PeerId, reason: &str) {
        let Some(lifted) = self.gatekeeper.ban(id) else {
            return;
        };
        tracing::warn!(peer = %id, "banned: {reason}");
        self.connector.directory.remove(&id);
        let node = self.swarm.behaviour_mut();
        node.gossip.blacklist_peer(&id);
        lifted
            .iter()
            .for_each(|other| node.gossip.remove_blacklisted_peer(other));
        let _gone = self.swarm.disconnect_peer_id(id);
        self.tell(Event::PeerBanned {
            peer: id,
            reason: reason.to_owned(),
        });
    }

    /// Its ban has ended: it may come again.
    pub(super) fn unban(&mut self, id: &PeerId) {
        self.gatekeeper.unban(id);
        self.swarm
            .behaviour_mut()
            .gossip
            .remove_blacklisted_peer(id);
    }
}

/// Whether a dial came back to this node itself.
fn is_myself(error: &DialError) -> bool {
    let of_admission = |failure: &TransportError<std::io::Error>| match failure {
        TransportError::Other(error) => {
            transport::admission_error(error).is_some_and(AdmissionError::is_myself)
        }
        TransportError::MultiaddrNotSupported(_) => false,
    };
    match error {
        DialError::LocalPeerId { .. } => true,
        DialError::Transport(failures) => failures.iter().any(|(_, failure)| of_admission(failure)),
        _ => false,
    }
}
