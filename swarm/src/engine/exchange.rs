//! Peer exchange: members tell each other where members listen.
//!
//! On connecting each says where it listens and names some others; a newcomer is introduced to those who may lack it. A
//! loopback address is told only over loopback, where it means the same machine.

use std::net::SocketAddr;

use capsule_proto::wire::{Control, PeerAddress};
use capsule_swarm_core::{Class, PeerKey};
use rand::RngExt;

use super::Engine;
use super::peer::Peer;
use crate::address;
use crate::protocol;
use crate::transport::peer_id_of;

/// Members told of in one message, beside oneself.
const EXCHANGED: usize = 16;
/// Members of other sites to whom a newcomer is introduced.
const INTRODUCED_BEYOND: usize = 3;
/// Addresses of one member that are listened to.
const MAX_ADDRESSES: usize = 8;

impl Engine {
    /// Tells a peer where we listen, and where some others do.
    pub(super) fn send_peers(&mut self, key: PeerKey) {
        let Some(receiver) = self.peers.get(&key) else {
            return;
        };
        let is_local =
            address::to_socket(&receiver.address).is_some_and(|address| address.ip().is_loopback());
        let mut others: Vec<_> = self
            .peers
            .iter()
            .filter(|(other, _)| **other != key)
            .collect();
        let mut told: Vec<_> = self
            .status
            .own_address(self.site.label())
            .into_iter()
            .collect();
        while told.len() <= EXCHANGED && !others.is_empty() {
            let (_, other) = others.swap_remove(self.connector.rng().random_range(0..others.len()));
            let reachable = other
                .listening
                .iter()
                .filter(|address| is_local || !address.ip().is_loopback());
            let addresses: Vec<_> = reachable
                .map(|a| address::to_multiaddr(*a).to_string())
                .collect();
            if !addresses.is_empty() {
                told.push(PeerAddress {
                    machine: other.member.machine,
                    addresses,
                    site: other.site.clone(),
                });
            }
        }
        if !told.is_empty() {
            self.send(key, &Control::Peers(told));
        }
    }

    /// A peer told where members listen.
    pub(super) fn on_peers(&mut self, key: PeerKey, peers: Vec<PeerAddress>) {
        let Some(teller) = self.peers.get_mut(&key) else {
            return;
        };
        let was_known = !teller.listening.is_empty();
        let seen = address::to_socket(&teller.address).map(|address| address.ip());
        let is_local = seen.is_some_and(|ip| ip.is_loopback());
        for told in peers {
            let sockets = told
                .addresses
                .iter()
                .filter_map(|text| address::to_socket(&text.parse().ok()?));
            if told.machine == teller.member.machine {
                // It does not know under which of its addresses we see it.
                let own = sockets.map(|address| match seen {
                    Some(ip) if address.ip().is_unspecified() => {
                        SocketAddr::new(ip, address.port())
                    }
                    _ => address,
                });
                teller.listening = own
                    .filter(|address| is_local || !address.ip().is_loopback())
                    .take(MAX_ADDRESSES)
                    .collect();
                self.connector
                    .directory
                    .add_peer(teller.id, &teller.listening, &teller.site);
            } else if let Some(peer) = peer_id_of(&told.machine) {
                let usable: Vec<_> = sockets
                    .filter(|address| is_local || !address.ip().is_loopback())
                    .collect();
                self.connector.directory.add_peer(peer, &usable, &told.site);
            }
        }
        if !was_known {
            self.introduce(key);
        }
        self.connect_more();
    }

    /// Tells others of a newcomer, so that those who lack connections find it: all of this site, and of others a few. Those are of its own site,
    /// who may have no other way to hear of it, or as alone in theirs as it is. In three sites of ten that were put up together, 600 KB of
    /// introductions to everybody crossed the thin links.
    fn introduce(&mut self, key: PeerKey) {
        let Some(newcomer) = self.peers.get(&key) else {
            return;
        };
        let public = newcomer
            .listening
            .iter()
            .any(|address| !address.ip().is_loopback());
        let addresses: Vec<_> = newcomer
            .listening
            .iter()
            .map(|address| address::to_multiaddr(*address).to_string())
            .collect();
        if addresses.is_empty() {
            return;
        }
        let introduction = Control::Peers(vec![PeerAddress {
            machine: newcomer.member.machine,
            addresses,
            site: newcomer.site.clone(),
        }]);
        let means_the_same = |peer: &Peer| {
            let is_local =
                address::to_socket(&peer.address).is_some_and(|address| address.ip().is_loopback());
            public || is_local
        };
        let is_alone = |peer: &Peer| {
            let same = self.peers.values().filter(|other| other.site == peer.site);
            !peer.site.is_empty() && peer.class == Class::Beyond && same.count() == 1
        };
        let newcomer_is_alone = is_alone(newcomer);
        let (mut told, mut its_own, mut alone) = (Vec::new(), Vec::new(), Vec::new());
        for (&other, peer) in &self.peers {
            if other == key || !means_the_same(peer) {
                continue;
            }
            if peer.class != Class::Beyond {
                told.push(other);
            } else if may_be_of_one_site(newcomer, peer) {
                its_own.push(other);
            } else if newcomer_is_alone && is_alone(peer) {
                alone.push(other);
            }
        }
        let frame = protocol::control_frame(&introduction);
        for _ in 0..INTRODUCED_BEYOND {
            let from = if its_own.is_empty() {
                &mut alone
            } else {
                &mut its_own
            };
            if !from.is_empty() {
                told.push(from.swap_remove(self.connector.rng().random_range(0..from.len())));
            }
        }
        for other in told {
            self.swarm.behaviour_mut().peers.send(other, frame.clone());
        }
    }
}

/// Whether two peers, the second of which is of another site than this node, may be of one: without labels only they know.
fn may_be_of_one_site(one: &Peer, other: &Peer) -> bool {
    match !one.site.is_empty() && !other.site.is_empty() {
        true => one.site == other.site,
        false => one.class == Class::Beyond,
    }
}
