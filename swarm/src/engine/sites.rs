//! Which peers are of this node's site, how many of other sites it wants and keeps, and what a site's gateways say to each other.
//!
//! A site is configured as a label, or else what shares a LAN's prefix. Who asks beyond it, and for what, is the scheduler's
//! business.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use capsule_proto::RootHash;
use capsule_proto::credential::MachineId;
use capsule_proto::wire::{Control, Gateway};
use capsule_swarm_core::{Class, GatewayNotice, NodeId, PeerKey};
use libp2p::Multiaddr;
use rand::RngExt;

use super::Engine;
use super::peer::Peer;
use super::turnover::Use;
use crate::address;
use crate::protocol;

/// Most networks of this machine that are looked at.
const MAX_NETWORKS: usize = 64;
/// How often they are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// A node that has found nobody of its site for so long is alone there. Nodes that are switched on together would otherwise all connect to many of
/// other sites before they find each other: 125 connections across a thin link within a second, for three sites of ten; with this, 45.
const ALONE_AFTER: Duration = Duration::from_secs(5);
/// How long a connection to another site stays in any case, and how long at most without use.
const SPARED_FOR: Duration = Duration::from_secs(30);
const TURNS_AFTER: Duration = Duration::from_secs(600);

/// Where this node is.
#[derive(Debug)]
pub(super) struct Site {
    label: String,
    networks: Vec<Prefix>,
    looked: Instant,
    began: Instant,
    /// This node looks in other sites for what it fetches.
    searches: bool,
}

/// A network: an address in it, and how many of its bits are the network's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Prefix {
    address: IpAddr,
    bits: u32,
}

impl Site {
    /// The site of this label, or none; and of the networks that this machine is in now.
    pub(super) fn new(label: Option<String>) -> Self {
        let mut site = Self {
            label: label.unwrap_or_default(),
            networks: Vec::new(),
            looked: Instant::now(),
            began: Instant::now(),
            searches: false,
        };
        site.look();
        site
    }

    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// Looks at the networks that the machine is in: cables are plugged in, laptops move. Whether they are others than before.
    fn look(&mut self) -> bool {
        let all = if_addrs::get_if_addrs().unwrap_or_default();
        let prefix = |interface: &if_addrs::Interface| match &interface.addr {
            if_addrs::IfAddr::V4(v4) => Prefix {
                address: v4.ip.into(),
                bits: v4.netmask.to_bits().leading_ones(),
            },
            if_addrs::IfAddr::V6(v6) => Prefix {
                address: v6.ip.into(),
                // By DHCPv6 an address comes alone; a LAN's prefix has 64 bits.
                bits: v6.netmask.to_bits().leading_ones().min(64),
            },
        };
        let shared = all.iter().filter(|interface| !interface.is_loopback());
        let shared = shared.map(prefix).filter(|network| network.bits > 0);
        let networks: Vec<_> = shared.take(MAX_NETWORKS).collect();
        let changed = networks != self.networks;
        self.networks = networks;
        self.looked = Instant::now();
        changed
    }

    /// Whether a node with this label, if it has one, at one of these addresses is in another site. Nothing known of either: it is not.
    pub(super) fn is_beyond(
        &self,
        label: &str,
        addresses: impl IntoIterator<Item = IpAddr>,
    ) -> bool {
        if !self.label.is_empty() && !label.is_empty() {
            return self.label != label;
        }
        let mut addresses = addresses.into_iter().peekable();
        let known = addresses.peek().is_some() && !self.networks.is_empty();
        known && !addresses.any(|address| self.shares_network(address))
    }

    fn shares_network(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        let link_local = match address {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        address.is_loopback()
            || link_local
            || self
                .networks
                .iter()
                .any(|network| network.contains(address))
    }
}

impl Prefix {
    fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                let differs = own.to_bits() ^ other.to_bits();
                differs.leading_zeros() >= self.bits
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                let differs = own.to_bits() ^ other.to_bits();
                differs.leading_zeros() >= self.bits
            }
            _ => false,
        }
    }
}

impl Engine {
    /// A gateway of this site said what it fetches, or a peer passed its word on.
    pub(super) fn on_gateway(&mut self, key: PeerKey, gateway: Gateway) {
        let now = self.now();
        let notice = GatewayNotice {
            root: gateway.root,
            node: NodeId(gateway.machine.0),
            sequence: gateway.sequence,
            groups: gateway.groups,
        };
        self.downloads.handle_gateway(now, key, &notice);
    }

    /// Tells peers of the site what one of its gateways fetches.
    pub(super) fn tell_gateway(&mut self, peers: Vec<PeerKey>, notice: GatewayNotice) {
        let message = Control::Gateway(Gateway {
            root: notice.root,
            machine: MachineId(notice.node.0),
            sequence: notice.sequence,
            groups: notice.groups,
        });
        let frame = protocol::control_frame(&message);
        for key in peers {
            self.swarm.behaviour_mut().peers.send(key, frame.clone());
        }
    }

    /// Says to the parts of the scheduler for which blobs this node is a gateway, and whether all of the site are connected.
    pub(super) fn tick_sites(&mut self) {
        let now = self.now();
        for root in self.transfers.keys() {
            let gateway = self.downloads.is_gateway(root);
            self.announcements.set_gateway(now, root, gateway);
        }
        if self.site.looked.elapsed() >= LOOK_EVERY && self.site.look() {
            self.let_go_moved();
        }
        self.tick_search();
        self.let_go_beyond(Instant::now());
        if self.transfers.is_empty() {
            return;
        }
        let site = &self.site;
        let known = self
            .connector
            .directory
            .count(|label, addresses| !site.is_beyond(label, addresses.iter().map(SocketAddr::ip)));
        self.downloads.pass_on_gateways(known > self.near());
    }

    /// How many peers of this site are connected.
    pub(super) fn near(&self) -> usize {
        let peers = self.peers.values();
        peers.filter(|peer| peer.class == Class::Within).count()
    }

    /// How many connections to other sites are lacking. Those that others opened do not count: whoever opens one to every node of a site
    /// must not cut it off from the rest.
    pub(super) fn lacking_beyond(&self) -> usize {
        let has = self.own_beyond().count() + self.connector.dialling(true);
        self.wanted_beyond().saturating_sub(has)
    }

    /// The connections to other sites that this node opened, and keeps.
    fn own_beyond(&self) -> impl Iterator<Item = (PeerKey, &Peer)> {
        let own = |peer: &Peer| peer.class == Class::Beyond && peer.dialled && !peer.leaving;
        let peers = self.peers.iter().map(|(key, peer)| (*key, peer));
        peers.filter(move |(_, peer)| own(peer))
    }

    /// How many connections to other sites this node wants. Each costs a dear link something, so it is one, by which what is new becomes
    /// known; more for who fetches from there on behalf of its site; and many for who has to find somebody who has what is fetched, or
    /// is alone.
    fn wanted_beyond(&self) -> usize {
        let is_alone = self.near() == 0;
        if self.site.searches || is_alone && self.site.began.elapsed() > ALONE_AFTER {
            self.limits.connections_wanted
        } else if is_alone
            || self
                .transfers
                .keys()
                .any(|root| self.downloads.is_gateway(root))
        {
            self.limits.connections_beyond
        } else {
            self.limits.connections_beyond.min(1)
        }
    }

    /// Decides whether this node searches other sites. Where none of its peers has what it fetches, about one node of the site begins with
    /// it at each tick, and tells the others what it finds; gateways do for themselves.
    fn tick_search(&mut self) {
        if self.transfers.is_empty() {
            self.site.searches = false;
            return;
        }
        let (now, members) = (self.now(), self.near() as f64 + 1.0);
        let begins = self.site.searches || self.connector.rng().random_bool(1.0 / members);
        let peers = || self.peers.values();
        // Before its size is known a blob is not yet the scheduler's.
        let is_unknown = |root: &RootHash| !peers().any(|peer| peer.claims.contains_key(root));
        let searches_for = |root: &RootHash| {
            let seeks = self.downloads.seeks_beyond(now, root);
            seeks.unwrap_or_else(|| is_unknown(root)) && (begins || self.downloads.is_gateway(root))
        };
        self.site.searches = self.transfers.keys().any(searches_for);
    }

    /// Lets one connection to another site go that this node opened and that is good for nothing just now: where there are more than it
    /// wants, and where one is old, so that another takes its place, and no group of sites stays apart from the others.
    fn let_go_beyond(&mut self, now: Instant) {
        let too_many = self.own_beyond().count() > self.wanted_beyond();
        let turns = self.near() > 0;
        let spare = self.own_beyond().find(|(_, peer)| {
            let age = now - peer.since;
            (too_many && age >= SPARED_FOR || turns && age >= TURNS_AFTER)
                && peer.good_for(now, self.transfers.keys()) == Use::Idle
        });
        let Some((key, _)) = spare else { return };
        if let Some(peer) = self.peers.get_mut(&key) {
            tracing::debug!(peer = %peer.id, "let go: one fewer between sites");
            // Closed at the next tick.
            peer.leaving = true;
        }
    }

    /// Lets go of peers that are elsewhere than they seemed before the networks changed: they come again.
    fn let_go_moved(&mut self) {
        let peers = self.peers.iter();
        let moved =
            peers.filter(|(_, peer)| self.class_of(&peer.site, &peer.address) != peer.class);
        let moved: Vec<_> = moved.map(|(key, _)| *key).collect();
        for key in moved {
            self.swarm.behaviour_mut().peers.close(key);
        }
    }

    /// Whether the node at the other end of a connection is in this site.
    pub(super) fn class_of(&self, label: &str, address: &Multiaddr) -> Class {
        let ip = address::to_socket(address).map(|address| address.ip());
        if self.site.is_beyond(label, ip) {
            Class::Beyond
        } else {
            Class::Within
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(label: &str, networks: &[(&str, u32)]) -> Site {
        let networks = networks.iter().map(|(address, bits)| Prefix {
            address: address.parse().unwrap(),
            bits: *bits,
        });
        Site {
            label: label.into(),
            networks: networks.collect(),
            looked: Instant::now(),
            began: Instant::now(),
            searches: false,
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn labels_decide_where_both_have_one() {
        let site = site("lab", &[("10.1.2.3", 24)]);
        assert!(!site.is_beyond("lab", [ip("192.0.2.1")]));
        assert!(site.is_beyond("office", [ip("10.1.2.4")]));
    }

    #[test]
    fn else_the_network_does() {
        let site = site(
            "lab",
            &[("127.0.0.1", 8), ("10.1.2.3", 24), ("2001:db8::1", 64)],
        );
        for near in [
            "10.1.2.200",
            "127.9.9.9",
            "::1",
            "169.254.3.4",
            "fe80::1",
            "2001:db8::ffff",
            "::ffff:10.1.2.9",
        ] {
            assert!(!site.is_beyond("", [ip(near)]), "{near}");
        }
        for far in ["10.1.3.3", "192.0.2.1", "2001:db8:0:1::1"] {
            assert!(site.is_beyond("", [ip(far)]), "{far}");
        }
        assert!(
            !site.is_beyond("", [ip("192.0.2.1"), ip("10.1.2.7")]),
            "one of its addresses"
        );
        assert!(!site.is_beyond("", []), "nothing known");
    }
}
