//! Members that misbehave: they hold a valid token and speak the real protocol, but lie, stall, or corrupt.
//!
//! They stand on the network crate with a store of their own; the shipped program has no fault switches.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use capsule_chunker::bao::{self, Tree};
use capsule_proto::RootHash;
use capsule_proto::credential::Revoked;
use capsule_proto::ranges::GroupRanges;
use capsule_proto::record::RecordId;
use capsule_swarm::{
    BlobStore, Limits, Network, NetworkConfig, NetworkHandle, Offer, RecordStore, ServeError,
    StoreError,
};

use crate::member::{self, Member};

/// How a hostile member treats requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vice {
    /// None in this: it serves what it has as it is.
    Honest,
    /// Sends the right range with one wrong bit in it.
    Corrupts,
    /// Announces the blob and then refuses every request.
    Denies,
    /// Takes requests and never answers.
    Stalls,
}

/// A hostile member, running until dropped.
pub struct Hostile {
    network: NetworkHandle,
    runtime: tokio::runtime::Runtime,
    asked: Arc<AtomicU64>,
    ending: Arc<AtomicBool>,
    records: Arc<Spread>,
}

struct HostileStore {
    vice: Vice,
    blobs: HashMap<RootHash, Held>,
    asked: Arc<AtomicU64>,
    ending: Arc<AtomicBool>,
}

/// A blob that a hostile member has.
struct Held {
    tree: Tree,
    content: Vec<u8>,
    outboard: Vec<u8>,
}

/// Records that a hostile member spreads, whatever they are, and which of them it was asked for.
#[derive(Default)]
struct Spread {
    records: Vec<Vec<u8>>,
    given: Mutex<Vec<RecordId>>,
}

impl Hostile {
    /// Joins with the token and announces the blob whole.
    pub fn start(token: &str, number: u8, vice: Vice, content: Vec<u8>) -> Self {
        let listen = vec![SocketAddr::from(([127, 0, 0, 1], 0))];
        let member = Member::of(token, number);
        Self::run(member, vice, vec![content], vec![], listen)
    }

    /// Joins at the first address of its token, and nowhere else; offers records, and serves the blobs that they speak of.
    ///
    /// It does not listen either: whoever else has one of its records has it of the node that it joined.
    pub fn with_records(member: Member, records: Vec<Vec<u8>>, blobs: Vec<Vec<u8>>) -> Self {
        Self::run(member, Vice::Honest, blobs, records, vec![])
    }

    fn run(
        member: Member,
        vice: Vice,
        blobs: Vec<Vec<u8>>,
        records: Vec<Vec<u8>>,
        listen: Vec<SocketAddr>,
    ) -> Self {
        let now = member::now();
        let hold = |content: Vec<u8>| {
            let (tree, outboard) = bao::tree_of(&content);
            let held = Held {
                tree,
                content,
                outboard,
            };
            (tree.root, held)
        };
        let blobs: HashMap<_, _> = blobs.into_iter().map(hold).collect();
        let announced: Vec<Tree> = blobs.values().map(|held| held.tree).collect();
        let (asked, ending) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let store = HostileStore {
            vice,
            blobs,
            asked: asked.clone(),
            ending: ending.clone(),
        };
        let limits = Limits {
            connections_wanted: if listen.is_empty() { 1 } else { 16 },
            ..Limits::default()
        };
        let config = NetworkConfig {
            seed: member.key.secret()[0].into(),
            credential: member.credential,
            machine: member.key,
            listen,
            bootstrap: member.addresses,
            lan_discovery: false,
            site: None,
            banned: vec![],
            limits,
            unix_time: Arc::new(move || now),
        };
        let records = Arc::new(Spread {
            records,
            ..Spread::default()
        });
        let spread = records.clone();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let network = runtime.block_on(async {
            let (network, mut events) = Network::start(config, Arc::new(store), spread)
                .await
                .expect("it starts");
            tokio::spawn(async move { while events.recv().await.is_some() {} });
            for tree in announced {
                network
                    .announce(tree.root, tree.size, GroupRanges::all(tree.size))
                    .await
                    .expect("it runs");
            }
            network
        });
        Self {
            network,
            runtime,
            asked,
            ending,
            records,
        }
    }

    /// Which of its records were taken from it, each as often as it was.
    pub fn given(&self) -> Vec<RecordId> {
        self.records.given.lock().expect("no panics").clone()
    }

    /// Sends a record to everybody as if it had just made it.
    pub fn gossip(&self, record: Vec<u8>) {
        self.runtime
            .block_on(self.network.publish_record(record))
            .expect("it runs");
    }

    /// How often it was asked for content.
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Its network id.
    pub fn peer(&self) -> String {
        self.network.local_peer().to_string()
    }

    /// How many peers it is connected to.
    pub fn peers(&self) -> usize {
        self.runtime
            .block_on(self.network.peers())
            .map_or(0, |peers| peers.len())
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        self.runtime.block_on(self.network.shutdown());
    }
}

impl BlobStore for HostileStore {
    fn presence(&self, root: &RootHash) -> Option<(u64, GroupRanges)> {
        let tree = self.blobs.get(root)?.tree;
        Some((tree.size, GroupRanges::all(tree.size)))
    }

    fn read_encoded(
        &self,
        root: &RootHash,
        groups: Range<u64>,
        out: &mut Vec<u8>,
    ) -> Result<(), ServeError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        match self.vice {
            Vice::Denies => return Err(ServeError::Missing { root: *root }),
            Vice::Stalls => {
                while !self.ending.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(50));
                }
                return Err(ServeError::Missing { root: *root });
            }
            Vice::Corrupts | Vice::Honest => {}
        }
        let held = &self.blobs[root];
        let start = out.len();
        bao::encode_range(
            &held.tree,
            groups,
            &&held.content[..],
            &&held.outboard[..],
            out,
        )
        .expect("its copy is right");
        if self.vice == Vice::Corrupts {
            let last = out.len() - 1;
            out[start + (last - start) / 2] ^= 4;
        }
        Ok(())
    }

    fn write_encoded(
        &self,
        _: &RootHash,
        _: u64,
        _: Range<u64>,
        _: &[u8],
    ) -> Result<(), StoreError> {
        Err(StoreError::Full)
    }
}

impl RecordStore for Spread {
    fn ids(&self) -> Vec<RecordId> {
        let mut ids: Vec<_> = self.records.iter().map(|record| id_of(record)).collect();
        ids.sort();
        ids
    }

    fn get(&self, id: &RecordId) -> Option<Vec<u8>> {
        self.given.lock().expect("no panics").push(*id);
        self.records
            .iter()
            .find(|record| id_of(record) == *id)
            .cloned()
    }

    fn offer(&self, _: &[u8]) -> Offer {
        Offer::Known
    }

    fn revocation_head(&self) -> Option<Vec<u8>> {
        None
    }

    fn revoked(&self) -> Revoked {
        Revoked::default()
    }
}

/// A record's name, of whatever bytes it is.
pub fn id_of(record: &[u8]) -> RecordId {
    RecordId(RootHash::of(record))
}

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
