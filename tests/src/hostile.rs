//! Members that misbehave: they hold a valid token and speak the real protocol, but lie, stall, or corrupt.
//!
//! They stand on the network crate with a store of their own; the shipped program has no fault switches.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use capsule_chunker::bao::{self, Tree};
use capsule_proto::RootHash;
use capsule_proto::credential::{MachineKey, Revoked, Token};
use capsule_proto::ranges::GroupRanges;
use capsule_proto::record::RecordId;
use capsule_swarm::{
    BlobStore, Limits, Network, NetworkConfig, NetworkHandle, Offer, RecordStore, ServeError,
    StoreError,
};

/// How a hostile member treats requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vice {
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
}

struct HostileStore {
    vice: Vice,
    tree: Tree,
    content: Vec<u8>,
    outboard: Vec<u8>,
    asked: Arc<AtomicU64>,
    ending: Arc<AtomicBool>,
}

struct NoRecords;

impl Hostile {
    /// Joins with the token and announces the blob whole.
    pub fn start(token: &str, number: u8, vice: Vice, content: Vec<u8>) -> Self {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("the clock is set")
            .as_secs();
        let token = Token::parse(token, now).expect("the token is good");
        let machine = MachineKey::from_secret([number; 32]);
        let (tree, outboard) = bao::tree_of(&content);
        let (asked, ending) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let store = HostileStore {
            vice,
            tree,
            content,
            outboard,
            asked: asked.clone(),
            ending: ending.clone(),
        };
        let config = NetworkConfig {
            credential: token.enrol(machine.machine(), "hostile", now),
            machine,
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
            bootstrap: token.addresses().to_vec(),
            lan_discovery: false,
            banned: vec![],
            limits: Limits::default(),
            unix_time: Arc::new(move || now),
            seed: number.into(),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let network = runtime.block_on(async {
            let (network, mut events) =
                Network::start(config, Arc::new(store), Arc::new(NoRecords))
                    .await
                    .expect("it starts");
            tokio::spawn(async move { while events.recv().await.is_some() {} });
            network
                .announce(tree.root, tree.size, GroupRanges::all(tree.size))
                .await
                .expect("it runs");
            network
        });
        Self {
            network,
            runtime,
            asked,
            ending,
        }
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
        (*root == self.tree.root).then(|| (self.tree.size, GroupRanges::all(self.tree.size)))
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
            Vice::Corrupts => {}
        }
        let start = out.len();
        bao::encode_range(
            &self.tree,
            groups,
            &&self.content[..],
            &&self.outboard[..],
            out,
        )
        .expect("its copy is right");
        let last = out.len() - 1;
        out[start + (last - start) / 2] ^= 4;
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

impl RecordStore for NoRecords {
    fn ids(&self) -> Vec<RecordId> {
        vec![]
    }

    fn get(&self, _: &RecordId) -> Option<Vec<u8>> {
        None
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
