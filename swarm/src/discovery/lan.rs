//! LAN discovery's sockets: one multicast socket and one task an interface.
//!
//! IPv4 only (a LAN without it is found by bootstrap addresses). Loopback interfaces are never used, so a node
//! that listens only on loopback sends nothing. What packets mean is in `dns`, when they are sent in `schedule`.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use libp2p::PeerId;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::dns::{self, FleetTag, MAX_PACKET, Packet};
use super::schedule::{Schedule, Send};

/// Multicast DNS's group and port.
const GROUP: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
const PORT: u16 = 5353;
/// How often interfaces are looked for: cables are plugged in, laptops move.
const RESCAN: Duration = Duration::from_secs(30);
/// Most interfaces used: a machine with many bridges does not ask on each.
const MAX_INTERFACES: usize = 16;

/// A member that said where it listens.
#[derive(Clone, Debug)]
pub struct Found {
    pub peer: PeerId,
    pub addresses: Vec<SocketAddr>,
}

/// What a node tells on the LAN.
#[derive(Clone, Debug)]
pub struct Beacon {
    pub tag: FleetTag,
    pub peer: PeerId,
    /// The addresses that it listens on; unspecified ones stand for each interface's own.
    pub listening: Vec<SocketAddr>,
    pub seed: u64,
}

impl Beacon {
    /// Whether anything beyond loopback would be told.
    pub fn is_audible(&self) -> bool {
        self.listening
            .iter()
            .any(|address| !address.ip().is_loopback())
    }

    /// Where peers on an interface with this address reach the node.
    fn addresses_on(&self, interface: Ipv4Addr) -> Vec<SocketAddr> {
        let reach = |address: &SocketAddr| match address.ip() {
            ip if ip.is_unspecified() => Some(SocketAddr::new(interface.into(), address.port())),
            ip if ip == IpAddr::V4(interface) => Some(*address),
            _ => None,
        };
        self.listening.iter().filter_map(reach).collect()
    }
}

/// Runs discovery until `search` is dropped: asks whenever its value changes, answers others, reports who is found.
pub async fn run(beacon: Beacon, mut search: watch::Receiver<u64>, found: mpsc::Sender<Found>) {
    let mut stations = JoinSet::new();
    let mut running: BTreeMap<Ipv4Addr, tokio::task::AbortHandle> = BTreeMap::new();
    loop {
        let present = interfaces();
        running.retain(|address, station| {
            let keep = present.contains(address) && !station.is_finished();
            if !keep {
                station.abort();
            }
            keep
        });
        for address in present {
            if running.len() >= MAX_INTERFACES || running.contains_key(&address) {
                continue;
            }
            match open(address) {
                Ok(socket) => {
                    let task = station(
                        beacon.clone(),
                        address,
                        socket,
                        search.clone(),
                        found.clone(),
                    );
                    running.insert(address, stations.spawn(task));
                }
                Err(error) => tracing::debug!(%address, %error, "no multicast on this interface"),
            }
        }
        let until = Instant::now() + RESCAN;
        loop {
            tokio::select! {
                () = sleep_until(until) => break,
                changed = search.changed() => if changed.is_err() { return },
                Some(_) = stations.join_next() => {}
            }
        }
    }
}

/// Addresses of the interfaces that multicast may be tried on.
fn interfaces() -> Vec<Ipv4Addr> {
    let all = if_addrs::get_if_addrs().unwrap_or_default();
    let usable = all
        .into_iter()
        .filter(|interface| !interface.is_loopback() && interface.is_oper_up());
    usable
        .filter_map(|interface| match interface.ip() {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        })
        .collect()
}

fn open(interface: Ipv4Addr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    // The port is shared with the system's own mDNS service and with other nodes on this machine.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)).into())?;
    socket.join_multicast_v4(&GROUP, &interface)?;
    socket.set_multicast_if_v4(&interface)?;
    socket.set_multicast_ttl_v4(255)?;
    socket.set_multicast_loop_v4(true)?;
    // Only what comes in on this interface, not whatever any socket of the machine has joined.
    #[cfg(target_os = "linux")]
    socket.set_multicast_all_v4(false)?;
    UdpSocket::from_std(socket.into())
}

/// One interface.
async fn station(
    beacon: Beacon,
    interface: Ipv4Addr,
    socket: UdpSocket,
    mut search: watch::Receiver<u64>,
    found: mpsc::Sender<Found>,
) {
    let start = Instant::now();
    // Apart from the seed by node and interface, so that no two of them act at the same moments.
    let identity = capsule_proto::RootHash::of(&beacon.peer.to_bytes());
    let own = u64::from_le_bytes(identity.as_bytes()[..8].try_into().expect("eight bytes"));
    let seed = beacon.seed ^ own ^ u64::from(u32::from(interface));
    let mut schedule = Schedule::new(SmallRng::seed_from_u64(seed));
    // Marks our own packets, which multicast brings back to us.
    let nonce = schedule.nonce();
    let query = dns::encode_query(&beacon.tag, nonce);
    let addresses = beacon.addresses_on(interface);
    let answer = dns::encode_answer(&beacon.tag, &beacon.peer, &addresses);
    let mut buffer = [0; MAX_PACKET + 1];
    schedule.handle_search(Duration::ZERO);
    loop {
        while let Some(send) = schedule.poll(start.elapsed()) {
            let packet = match send {
                Send::Query => &query,
                // Nothing to tell on an interface that is not listened on.
                Send::Answer if addresses.is_empty() => continue,
                Send::Answer => &answer,
            };
            if let Err(error) = socket.send_to(packet, (GROUP, PORT)).await {
                tracing::debug!(%interface, %error, "multicast not sent");
            }
        }
        let timeout = schedule.timeout().unwrap_or(start.elapsed() + RESCAN);
        tokio::select! {
            () = sleep_until(start + timeout) => {}
            changed = search.changed() => match changed {
                Ok(()) => schedule.handle_search(start.elapsed()),
                Err(_) => return,
            },
            received = socket.recv_from(&mut buffer) => {
                let Ok((len, _)) = received else { continue };
                match dns::decode(&buffer[..len], &beacon.tag) {
                    Some(Packet::Query { nonce: theirs }) if theirs != nonce => schedule.handle_query(start.elapsed()),
                    Some(Packet::Answer { peer, addresses }) if peer != beacon.peer => {
                        schedule.handle_answer();
                        // A full queue loses a hint; the next query brings it again.
                        let _lost = found.try_send(Found { peer, addresses });
                    }
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beacon(listening: &[&str]) -> Beacon {
        Beacon {
            tag: FleetTag::of(b"fleet"),
            peer: PeerId::random(),
            listening: listening.iter().map(|a| a.parse().unwrap()).collect(),
            seed: 1,
        }
    }

    #[test]
    fn loopback_is_never_told() {
        let interface = Ipv4Addr::new(10, 0, 0, 7);
        assert!(!beacon(&["127.0.0.1:4001", "[::1]:4001"]).is_audible());
        assert!(
            beacon(&["127.0.0.1:4001"])
                .addresses_on(interface)
                .is_empty()
        );
        let all = beacon(&["0.0.0.0:4001", "10.0.0.8:4002", "10.0.0.7:4003"]);
        let told = all.addresses_on(interface);
        assert_eq!(
            told,
            ["10.0.0.7:4001", "10.0.0.7:4003"].map(|a| a.parse().unwrap())
        );
    }
}
