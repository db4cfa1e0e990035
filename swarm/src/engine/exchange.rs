//! Peer exchange: members tell each other where members listen.
//!
//! On connecting each says where it listens and names some others; a newcomer is introduced to all of the site who are there. A
//! loopback address is told only over loopback, where it means the same machine.

use std::net::SocketAddr;

use capsule_proto::wire::{Control, PeerAddress};
use capsule_swarm_core::{Class, PeerKey};
use rand::RngExt;

use super::Engine;
use crate::address;
use crate::protocol;
use crate::transport::peer_id_of;

/// Members told of in one message, beside oneself.
const EXCHANGED: usize = 16;
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

    /// Tells the others of the site of a newcomer, so that those who lack connections find it. Other sites hear nothing: few of them want
    /// one, and who comes is named some of theirs. In three sites of ten that were put up together, 600 KB of such words crossed the thin links.
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
        let frame = protocol::control_frame(&introduction);
        for (&other, peer) in &self.peers {
            let is_local =
                address::to_socket(&peer.address).is_some_and(|address| address.ip().is_loopback());
            let is_near = peer.class != Class::Beyond;
            if other != key && is_near && (public || is_local) {
                self.swarm.behaviour_mut().peers.send(other, frame.clone());
            }
        }
    }
}
