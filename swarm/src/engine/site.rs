//! Whether a peer is in this node's site: what caps of rates go by.
//!
//! By its address, as long as peers do not tell each other the labels of their sites: on this machine, or in the network of one of our
//! interfaces, if that is nobody else's (private or link-local).

use std::net::IpAddr;

use capsule_swarm_core::Class;
use libp2p::Multiaddr;

use super::peer::Peer;
use crate::address;

/// Bits that two addresses of one LAN have in common: those of an office's network, whatever the interface's own mask is.
const PREFIX_V4: u32 = 24;
const PREFIX_V6: u32 = 64;

/// The class of a peer.
pub(super) fn class_of(peer: &Peer) -> Class {
    if is_in_site(&peer.address) {
        Class::Within
    } else {
        Class::Beyond
    }
}

fn is_in_site(remote: &Multiaddr) -> bool {
    let Some(remote) = address::to_socket(remote).map(|socket| socket.ip().to_canonical()) else {
        return false;
    };
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    remote.is_loopback() || is_near(remote, interfaces.iter().map(if_addrs::Interface::ip))
}

fn is_near(remote: IpAddr, mut ours: impl Iterator<Item = IpAddr>) -> bool {
    is_local(remote) && ours.any(|own| share_prefix(remote, own))
}

fn is_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_private() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

fn share_prefix(a: IpAddr, b: IpAddr) -> bool {
    match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() >= PREFIX_V4,
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() >= PREFIX_V6,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(remote: &str) -> bool {
        let ours = ["127.0.0.1", "10.1.2.3", "8.8.8.8", "fd00:1::5", "fe80::1"];
        is_near(
            remote.parse().unwrap(),
            ours.iter().map(|own| own.parse().unwrap()),
        )
    }

    #[test]
    fn who_shares_a_private_network_with_us_is_in_our_site() {
        for remote in ["10.1.2.200", "fd00:1::77", "fe80::2"] {
            assert!(near(remote), "{remote}");
        }
        for remote in [
            "10.1.3.3",
            "192.168.2.3",
            "8.8.8.9",
            "fd00:2::5",
            "2001:db8::1",
        ] {
            assert!(!near(remote), "{remote}");
        }
    }

    #[test]
    fn this_machine_is_in_our_site_whatever_it_is_called() {
        for address in [
            "/ip4/127.0.0.1/tcp/1",
            "/ip6/::1/tcp/1",
            "/ip6/::ffff:127.0.0.1/tcp/1",
        ] {
            assert!(is_in_site(&address.parse().unwrap()), "{address}");
        }
        assert!(!is_in_site(&"/ip4/192.0.2.1/tcp/1".parse().unwrap()));
        assert!(!is_in_site(&"/dns4/lab.example/tcp/1".parse().unwrap()));
    }
}
