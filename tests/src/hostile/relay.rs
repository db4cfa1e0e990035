//! A connection that becomes slow on the way, whoever is at its ends.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A relay before a node that, once told to, passes one byte a second.
pub struct Drip {
    address: SocketAddr,
    dripping: Arc<AtomicBool>,
    ending: Arc<AtomicBool>,
}

impl Drip {
    /// Relays to the address, at full speed at first.
    pub fn before(node: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let node = node.to_owned();
        let (dripping, ending) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let relay = Self {
            address,
            dripping: dripping.clone(),
            ending: ending.clone(),
        };
        std::thread::spawn(move || {
            // A handful of connections at most: those of one test's nodes.
            for near in listener.incoming().flatten().take(64) {
                if ending.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(far) = TcpStream::connect(&node) else {
                    continue;
                };
                for (from, to) in [(near.try_clone(), far.try_clone()), (Ok(far), Ok(near))] {
                    let (Ok(from), Ok(to)) = (from, to) else {
                        continue;
                    };
                    let (dripping, ending) = (dripping.clone(), ending.clone());
                    std::thread::spawn(move || pass(from, to, &dripping, &ending));
                }
            }
        });
        relay
    }

    /// Where the relay listens.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// From now on, one byte a second.
    pub fn drip(&self) {
        self.dripping.store(true, Ordering::Relaxed);
    }
}

impl Drop for Drip {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        // Wakes the accepting thread.
        let _ = TcpStream::connect(self.address);
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, dripping: &AtomicBool, ending: &AtomicBool) {
    let mut buffer = [0; 16 << 10];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        let mut rest = &buffer[..len];
        while !rest.is_empty() {
            let now = if dripping.load(Ordering::Relaxed) {
                1
            } else {
                rest.len()
            };
            if ending.load(Ordering::Relaxed) || to.write_all(&rest[..now]).is_err() {
                return;
            }
            rest = &rest[now..];
            if dripping.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }
}
