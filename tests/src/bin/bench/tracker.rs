//! A BitTorrent tracker just good enough to introduce two clients to each other (BEP 3, BEP 23).

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::sync::{Arc, Mutex};

use anyhow::Result;

/// Starts a tracker on an address; returns its announce URL. It ends with the program.
pub fn start(address: Ipv4Addr) -> Result<String> {
    let listener = TcpListener::bind((address, 0))?;
    let url = format!("http://{}/announce", listener.local_addr()?);
    let peers = Arc::new(Mutex::new(BTreeSet::<(Ipv4Addr, u16)>::new()));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 4096];
            let len = stream.read(&mut request).unwrap_or(0);
            let text = String::from_utf8_lossy(&request[..len]).into_owned();
            let port = text
                .split(['?', '&', ' '])
                .find_map(|field| field.strip_prefix("port=")?.parse().ok());
            let mut peers = peers.lock().expect("no thread panics with it");
            if let (Some(port), Ok(IpAddr::V4(from))) = (port, stream.peer_addr().map(|a| a.ip())) {
                if text.contains("event=stopped") {
                    peers.remove(&(from, port))
                } else {
                    peers.insert((from, port))
                };
            }
            let compact: Vec<u8> = peers
                .iter()
                .flat_map(|(ip, port)| [&ip.octets()[..], &port.to_be_bytes()].concat())
                .collect();
            let mut body =
                format!("d8:intervali2e12:min intervali1e5:peers{}:", compact.len()).into_bytes();
            body.extend(compact);
            body.push(b'e');
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            // A client that went away asks again.
            let _ = stream.write_all(&[head.into_bytes(), body].concat());
        }
    });
    Ok(url)
}
