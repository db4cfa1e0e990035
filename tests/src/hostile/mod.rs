//! Members that misbehave: they hold a valid token and speak the real protocol, but lie, stall, or corrupt.
//!
//! [`Hostile`] stands on the network crate with a store of its own; what that would not say is said `by_hand`. The program `hostile`
//! is all of this as a process. The shipped program has no fault switches.

pub mod by_hand;
mod relay;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use capsule_chunker::bao::{self, Tree};
use capsule_proto::RootHash;
use capsule_proto::credential::Revoked;
use capsule_proto::ranges::{GroupRanges, Height};
use capsule_proto::record::RecordId;
use capsule_swarm::{
    BlobStore, Limits, Network, NetworkConfig, NetworkHandle, Offer, RecordStore, ServeError,
    StoreError,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

pub use relay::Drip;

use crate::data;
use crate::member::{self, Member};

/// What a hostile program does: a group's `hostile` in a lab's scenario.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Deserialize, serde::Serialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// Announces all of the blobs and has nothing: answers with noise, or refuses.
    Lie,
    /// Serves wrong bytes.
    Corrupt,
    /// Takes requests and never answers.
    Stall,
    /// Answers at a few bytes a second.
    Drip,
    /// Connects, announces, and leaves again and again.
    Flap,
    /// Announces thousands of blobs, and random ranges.
    Announce,
    /// Has no credentials, and connects again and again.
    Stranger,
}

/// How a hostile member treats requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vice {
    /// None in this: it serves what it has as it is.
    Honest,
    /// Sends the right range, with one wrong bit in it in so many answers of a hundred.
    Corrupts {
        /// Of a hundred.
        percent: u8,
    },
    /// Announces the blob and has nothing of it: sends noise in so many answers of a hundred, and refuses the others.
    Lies {
        /// Of a hundred.
        percent: u8,
    },
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
    chance: Mutex<SmallRng>,
    blobs: HashMap<RootHash, Held>,
    asked: Arc<AtomicU64>,
    ending: Arc<AtomicBool>,
}

/// A blob that a hostile member has, or says so.
pub struct Held {
    /// Its root and size.
    pub tree: Tree,
    content: Vec<u8>,
    outboard: Vec<u8>,
}

impl Held {
    /// A blob of that content.
    pub fn of(content: Vec<u8>) -> Self {
        let (tree, outboard) = bao::tree_of(&content);
        Self {
            tree,
            content,
            outboard,
        }
    }

    /// Nothing of it but what is needed to announce it.
    pub fn hollow(self) -> Self {
        Self {
            tree: self.tree,
            content: vec![],
            outboard: vec![],
        }
    }

    /// Appends a run of groups as the wire has it, proved up to that height.
    pub fn encode(&self, groups: Range<u64>, height: Height, out: &mut Vec<u8>) {
        bao::encode_range(
            &self.tree,
            groups,
            height,
            &&self.content[..],
            &&self.outboard[..],
            out,
        )
        .expect("its copy is right");
    }
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
        Self::run(member, vice, vec![Held::of(content)], vec![], listen)
    }

    /// Joins as a node would: it listens, and looks for the fleet on the LAN too.
    pub fn member(member: Member, vice: Vice, blobs: Vec<Held>, listen: SocketAddr) -> Self {
        Self::run(member, vice, blobs, vec![], vec![listen])
    }

    /// Joins at the first address of its token, and nowhere else; offers records, and serves the blobs that they speak of.
    ///
    /// It does not listen either: whoever else has one of its records has it of the node that it joined.
    pub fn with_records(member: Member, records: Vec<Vec<u8>>, blobs: Vec<Vec<u8>>) -> Self {
        let blobs = blobs.into_iter().map(Held::of).collect();
        Self::run(member, Vice::Honest, blobs, records, vec![])
    }

    fn run(
        member: Member,
        vice: Vice,
        blobs: Vec<Held>,
        records: Vec<Vec<u8>>,
        listen: Vec<SocketAddr>,
    ) -> Self {
        let now = member::now();
        let hold = |held: Held| (held.tree.root, held);
        let blobs: HashMap<_, _> = blobs.into_iter().map(hold).collect();
        let announced: Vec<Tree> = blobs.values().map(|held| held.tree).collect();
        let (asked, ending) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let seed = member.key.secret()[0].into();
        let store = HostileStore {
            vice,
            chance: Mutex::new(SmallRng::seed_from_u64(seed)),
            blobs,
            asked: asked.clone(),
            ending: ending.clone(),
        };
        let limits = Limits {
            connections_wanted: if listen.is_empty() { 1 } else { 16 },
            ..Limits::default()
        };
        let config = NetworkConfig {
            seed,
            credential: member.credential,
            machine: member.key,
            lan_discovery: !listen.is_empty(),
            listen,
            bootstrap: member.addresses,
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

impl HostileStore {
    /// Whether this answer is one of so many of a hundred.
    fn hits(&self, percent: u8) -> bool {
        let mut chance = self.chance.lock().expect("no panics");
        chance.random_range(0..100) < percent
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
        height: Height,
        out: &mut Vec<u8>,
    ) -> Result<(), ServeError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let held = &self.blobs[root];
        match self.vice {
            Vice::Honest => held.encode(groups, height, out),
            Vice::Corrupts { percent } => {
                let start = out.len();
                held.encode(groups, height, out);
                if self.hits(percent) {
                    let last = out.len() - 1;
                    out[start + (last - start) / 2] ^= 4;
                }
            }
            Vice::Lies { percent } if self.hits(percent) => {
                let len = bao::encoded_len(held.tree.size, &groups, height);
                out.extend(data::noise(groups.start, len as usize));
            }
            Vice::Lies { .. } => return Err(ServeError::Missing { root: *root }),
            Vice::Stalls => {
                while !self.ending.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(50));
                }
                return Err(ServeError::Missing { root: *root });
            }
        }
        Ok(())
    }

    fn write_encoded(
        &self,
        _: &RootHash,
        _: u64,
        _: Range<u64>,
        _: Height,
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
