//! A BitTorrent tracker just good enough to introduce clients to each other (BEP 3, BEP 23).

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;

/// When a client asks again, in seconds: as real trackers say.
const INTERVAL: u32 = 1800;
/// How long a client may take to send its request.
const PATIENCE: Duration = Duration::from_secs(2);
/// Clients remembered: as many as a lab has nodes.
const MAX_CLIENTS: usize = 300;

/// What a client told, by torrent, address and port.
type Clients = BTreeMap<(Vec<u8>, Ipv4Addr, u16), Told>;

/// How much of a torrent a client has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Not all.
    Part,
    /// All.
    All,
}

#[derive(Debug, Clone, Copy)]
struct Told {
    held: Held,
    /// When it was first told of another.
    introduced: Option<Instant>,
}

/// A tracker in a thread; it ends with the program.
#[derive(Debug)]
pub struct Tracker {
    url: String,
    clients: Arc<Mutex<Clients>>,
}

impl Tracker {
    /// Starts it on an address.
    pub fn start(address: Ipv4Addr) -> Result<Self> {
        let listener = TcpListener::bind((address, 0))?;
        let url = format!("http://{}/announce", listener.local_addr()?);
        let clients = Arc::new(Mutex::new(Clients::new()));
        let told = clients.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that went away asks again.
                let _ = serve(stream, &told);
            }
        });
        Ok(Self { url, clients })
    }

    /// Where clients announce.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Forgets all clients.
    pub fn forget(&self) {
        lock(&self.clients).clear();
    }

    /// How much the client at a port said that it has; none where it never announced itself.
    pub fn told(&self, port: u16) -> Option<Held> {
        let clients = lock(&self.clients);
        let mut found = clients.iter().filter(|((_, _, at), _)| *at == port);
        found.next().map(|(_, told)| told.held)
    }

    /// When the client at a port was first told of another.
    pub fn introduced(&self, port: u16) -> Option<Instant> {
        let clients = lock(&self.clients);
        let mut found = clients.iter().filter(|((_, _, at), _)| *at == port);
        found.find_map(|(_, told)| told.introduced)
    }
}

fn lock(clients: &Mutex<Clients>) -> MutexGuard<'_, Clients> {
    clients.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(mut stream: TcpStream, clients: &Mutex<Clients>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let IpAddr::V4(from) = stream.peer_addr()?.ip() else {
        return Ok(());
    };
    let mut request = vec![];
    let mut buffer = [0; 4096];
    while !request.ends_with(b"\r\n\r\n") && request.len() < 16 << 10 {
        match stream.read(&mut buffer)? {
            0 => break,
            len => request.extend_from_slice(&buffer[..len]),
        }
    }
    let request = String::from_utf8_lossy(&request);
    let path = request.split_whitespace().nth(1).unwrap_or("");
    let body = match path.split_once('?') {
        Some(("/announce", query)) => announce(query, from, &mut lock(clients)),
        _ => b"d14:failure reason16:announcing only!e".to_vec(),
    };
    let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(&[head.into_bytes(), body].concat())
}

/// Notes a client, and tells it of the others that share its torrent.
fn announce(query: &str, from: Ipv4Addr, clients: &mut Clients) -> Vec<u8> {
    let field = |name: &str| {
        let mut fields = query.split('&').filter_map(|field| field.split_once('='));
        fields.find_map(|(key, value)| (key == name).then_some(value))
    };
    let torrent = field("info_hash").map(decode).unwrap_or_default();
    let Some(port) = field("port").and_then(|port| port.parse().ok()) else {
        return b"d14:failure reason7:no porte".to_vec();
    };
    let me = (torrent, from, port);
    let others = clients
        .keys()
        .filter(|other| other.0 == me.0 && **other != me);
    let peers: Vec<u8> = others
        .flat_map(|(_, address, port)| [&address.octets()[..], &port.to_be_bytes()].concat())
        .collect();
    if field("event") == Some("stopped") {
        clients.remove(&me);
    } else if clients.len() < MAX_CLIENTS || clients.contains_key(&me) {
        let told = clients.entry(me).or_insert(Told {
            held: Held::Part,
            introduced: None,
        });
        told.held = match field("left") {
            Some("0") => Held::All,
            _ => Held::Part,
        };
        if !peers.is_empty() {
            told.introduced.get_or_insert_with(Instant::now);
        }
    }
    let mut body = format!("d8:intervali{INTERVAL}e5:peers{}:", peers.len()).into_bytes();
    body.extend(peers);
    body.push(b'e');
    body
}

/// Undoes percent-encoding; clients differ in what they encode.
fn decode(text: &str) -> Vec<u8> {
    let mut bytes = text.bytes();
    let mut decoded = vec![];
    while let Some(byte) = bytes.next() {
        let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        decoded.push(if byte == b'%' {
            let (high, low) = (digit(bytes.next()), digit(bytes.next()));
            (high.unwrap_or(0) * 16 + low.unwrap_or(0)) as u8
        } else {
            byte
        });
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_of_one_torrent_are_introduced_and_not_to_themselves() {
        let (a, b) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
        let mut clients = Clients::new();
        let alone = announce("info_hash=%41B&port=258&left=0", a, &mut clients);
        assert_eq!(alone, b"d8:intervali1800e5:peers0:e");
        announce("info_hash=other&port=3&left=0", b, &mut clients);
        let both = announce(
            "info_hash=A%42&port=772&left=9&event=started",
            b,
            &mut clients,
        );
        assert_eq!(both, b"d8:intervali1800e5:peers6:\x0a\0\0\x01\x01\x02e");
        assert_eq!(
            clients
                .values()
                .filter(|told| told.held == Held::All)
                .count(),
            2
        );
        announce(
            "info_hash=AB&port=258&left=0&event=stopped",
            a,
            &mut clients,
        );
        assert_eq!(clients.len(), 2);
    }
}
