//! Addresses in their three spellings: socket addresses, multiaddrs, and what people write.

use std::net::{IpAddr, SocketAddr};

use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;

/// A place to dial, whose name may still have to be resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    pub host: String,
    pub port: u16,
}

/// The multiaddr of a TCP socket.
pub fn to_multiaddr(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

/// The TCP socket that a multiaddr names by number; whatever follows (`/p2p/...`) does not matter.
pub fn to_socket(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip: IpAddr = match parts.next()? {
        Protocol::Ip4(ip) => ip.into(),
        Protocol::Ip6(ip) => ip.into(),
        _ => return None,
    };
    match parts.next()? {
        Protocol::Tcp(port) => Some(SocketAddr::new(ip, port)),
        _ => None,
    }
}

/// Reads `HOST:PORT` or a multiaddr text with a TCP port.
pub fn parse(text: &str) -> Option<HostPort> {
    if !text.starts_with('/') {
        let (host, port) = text.trim().rsplit_once(':')?;
        let host = host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        return (!host.is_empty()).then_some(HostPort {
            host,
            port: port.parse().ok()?,
        });
    }
    let address: Multiaddr = text.trim().parse().ok()?;
    let mut parts = address.iter();
    let host = match parts.next()? {
        Protocol::Ip4(ip) => ip.to_string(),
        Protocol::Ip6(ip) => ip.to_string(),
        Protocol::Dns(name) | Protocol::Dns4(name) | Protocol::Dns6(name) => name.into_owned(),
        _ => return None,
    };
    match parts.next()? {
        Protocol::Tcp(port) => Some(HostPort { host, port }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_spellings_are_read() {
        let read = |text| parse(text).map(|HostPort { host, port }| (host, port));
        for text in [
            "10.0.0.1:4001",
            "/ip4/10.0.0.1/tcp/4001",
            "/ip4/10.0.0.1/tcp/4001/tls",
        ] {
            assert_eq!(read(text), Some(("10.0.0.1".into(), 4001)), "{text}");
        }
        for text in ["[::1]:4001", "/ip6/::1/tcp/4001"] {
            assert_eq!(read(text), Some(("::1".into(), 4001)), "{text}");
        }
        assert_eq!(
            read("/dns4/lab.example/tcp/1"),
            Some(("lab.example".into(), 1))
        );
        for text in [
            "",
            ":1",
            "lab",
            "lab:",
            "lab:99999",
            "/ip4/10.0.0.1",
            "/ip4/10.0.0.1/udp/1",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn sockets_round_trip() {
        for text in ["10.0.0.1:4001", "[::1]:4001"] {
            let socket = text.parse().unwrap();
            assert_eq!(to_socket(&to_multiaddr(socket)), Some(socket));
        }
    }
}
