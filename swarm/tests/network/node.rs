//! Real nodes in one process: a fleet with its keys, stores in memory that can be made to misbehave.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use capsule_chunker::bao::{self, DecodeError, Tree};
use capsule_proto::credential::{
    Channels, Credential, FleetKey, Grant, MachineKey, Revoked, Roles, Token, TokenId,
};
use capsule_proto::index::Space;
use capsule_proto::ranges::Height;
use capsule_proto::record::{BlobRef, Body, Layer, Record, RecordError, RecordId, SignedRecord};
use capsule_proto::{GroupRanges, RootHash};
use capsule_swarm::{
    BlobStore, Event, FetchProgress, FetchSpec, Limits, Network, NetworkConfig, NetworkHandle,
    Offer, RecordStore, ServeError, StoreError,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// The time in all tests: seconds since 1970.
pub const NOW: u64 = 1_000_000;
/// No step of a test takes longer, even on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A fleet, and what enrols its machines.
pub struct Fleet {
    root: FleetKey,
    machines: AtomicU64,
}

impl Fleet {
    pub fn new(secret: u8) -> Self {
        Self {
            root: FleetKey::from_secret([secret; 32]),
            machines: AtomicU64::new(0),
        }
    }

    pub fn token(&self, expires: u64) -> Token {
        let roles = Roles {
            publisher: true,
            admin: true,
        };
        let grant = Grant {
            id: TokenId([1; 8]),
            roles,
            channels: Channels::All,
            issued: 1,
            expires,
        };
        self.root.invite(grant, [2; 32], &[])
    }

    /// A new machine of the fleet.
    pub fn enrol(&self) -> Machine {
        self.enrol_until(NOW * 2)
    }

    pub fn enrol_until(&self, expires: u64) -> Machine {
        let number = self.machines.fetch_add(1, Ordering::Relaxed) + 1;
        let mut secret = self.root.secret();
        secret[..8].copy_from_slice(&number.to_le_bytes());
        let key = MachineKey::from_secret(secret);
        let credential = self
            .token(expires)
            .enrol(key.machine(), &format!("pc-{number}"), 2);
        Machine { key, credential }
    }
}

#[derive(Clone)]
pub struct Machine {
    pub key: MachineKey,
    pub credential: Credential,
}

impl Machine {
    /// A record about nothing in particular.
    pub fn record(&self, number: u64) -> SignedRecord {
        let blob = BlobRef {
            root: RootHash::of(&number.to_le_bytes()),
            size: number + 1,
        };
        let layer = Layer {
            space: Space::Stream,
            parent: None,
            target: blob.root,
            target_size: number + 1,
            index: blob,
            pack: None,
        };
        self.sign(Body::Layer(layer))
    }

    pub fn sign(&self, body: Body) -> SignedRecord {
        let record = Record {
            issued: NOW,
            expires: None,
            sequence: 1,
            body,
        };
        SignedRecord::sign(record, &self.credential, &self.key).unwrap()
    }
}

/// How a store misbehaves.
#[derive(Default)]
pub struct Faults {
    /// Serves content with a flipped bit.
    pub lies: AtomicBool,
    /// Never finishes a read, until told.
    pub stalls: AtomicBool,
    /// Has no room.
    pub full: AtomicBool,
    /// Lost the hashes above what it holds.
    pub forgets: AtomicBool,
    stall: (Mutex<()>, Condvar),
}

struct Blob {
    size: u64,
    data: Vec<u8>,
    outboard: Vec<u8>,
    groups: GroupRanges,
}

/// Blobs in memory.
#[derive(Default)]
pub struct Memory {
    blobs: Mutex<HashMap<RootHash, Blob>>,
    pub faults: Faults,
}

impl Memory {
    /// Adds a whole blob.
    pub fn add(&self, content: &[u8]) -> Tree {
        let (tree, outboard) = bao::tree_of(content);
        let groups = GroupRanges::all(tree.size);
        let blob = Blob {
            size: tree.size,
            data: content.to_vec(),
            outboard,
            groups,
        };
        self.blobs.lock().unwrap().insert(tree.root, blob);
        tree
    }

    pub fn remove(&self, root: &RootHash) {
        self.blobs.lock().unwrap().remove(root);
    }

    /// Loses some of a blob, as a disk does.
    pub fn lose(&self, root: &RootHash, groups: &GroupRanges) {
        let mut blobs = self.blobs.lock().unwrap();
        let blob = blobs.get_mut(root).unwrap();
        blob.groups = blob.groups.difference(groups);
    }

    /// A whole blob's content, checked.
    pub fn content(&self, root: &RootHash) -> Option<Vec<u8>> {
        let blobs = self.blobs.lock().unwrap();
        let blob = blobs
            .get(root)
            .filter(|blob| blob.groups == GroupRanges::all(blob.size))?;
        assert_eq!(RootHash::of(&blob.data), *root);
        Some(blob.data.clone())
    }

    pub fn held(&self, root: &RootHash) -> GroupRanges {
        self.blobs
            .lock()
            .unwrap()
            .get(root)
            .map(|blob| blob.groups.clone())
            .unwrap_or_default()
    }
}

impl BlobStore for Memory {
    fn presence(&self, root: &RootHash) -> Option<(u64, GroupRanges)> {
        self.blobs
            .lock()
            .unwrap()
            .get(root)
            .map(|blob| (blob.size, blob.groups.clone()))
    }

    fn read_encoded(
        &self,
        root: &RootHash,
        groups: Range<u64>,
        height: Height,
        out: &mut Vec<u8>,
    ) -> Result<(), ServeError> {
        if self.faults.stalls.load(Ordering::Relaxed) {
            let (lock, condition) = &self.faults.stall;
            drop(
                condition
                    .wait_timeout(lock.lock().unwrap(), PATIENCE * 2)
                    .unwrap(),
            );
        }
        let missing = || ServeError::Missing { root: *root };
        let blobs = self.blobs.lock().unwrap();
        let blob = blobs.get(root).ok_or_else(missing)?;
        let tree = Tree {
            root: *root,
            size: blob.size,
        };
        bao::encode_range(&tree, groups, height, &blob.data, &blob.outboard, out)
            .map_err(|_| missing())?;
        if self.faults.lies.load(Ordering::Relaxed) {
            *out.last_mut().unwrap() ^= 1;
        }
        Ok(())
    }

    fn write_encoded(
        &self,
        root: &RootHash,
        size: u64,
        groups: Range<u64>,
        height: Height,
        encoded: &[u8],
    ) -> Result<(), StoreError> {
        if self.faults.full.load(Ordering::Relaxed) {
            return Err(StoreError::Full);
        }
        if self.faults.forgets.load(Ordering::Relaxed) && height != Height::ROOT {
            return Err(StoreError::Unknown);
        }
        let tree = Tree { root: *root, size };
        let (mut parents, mut leaves) = (Vec::new(), Vec::new());
        let outboard = |blob: &Blob| blob.outboard.clone();
        let outboard = self.blobs.lock().unwrap().get(root).map(outboard);
        let outboard = outboard.unwrap_or_default();
        let decoded = bao::decode_range(
            &tree,
            groups.clone(),
            height,
            &outboard,
            encoded,
            |offset, pair| parents.push((offset as usize, pair)),
            |offset, leaf| leaves.push((offset as usize, leaf)),
        );
        decoded.map_err(|error| match error {
            DecodeError::Mismatch { group } => StoreError::Invalid { group },
            DecodeError::Unknown { .. } => StoreError::Unknown,
            _ => StoreError::Invalid {
                group: groups.start,
            },
        })?;
        let mut blobs = self.blobs.lock().unwrap();
        let blob = blobs.entry(*root).or_insert_with(|| Blob {
            size,
            data: vec![0; size as usize],
            outboard: vec![0; bao::outboard_len(size) as usize],
            groups: GroupRanges::new(),
        });
        parents
            .iter()
            .for_each(|(at, pair)| blob.outboard[*at..*at + pair.len()].copy_from_slice(*pair));
        leaves
            .iter()
            .for_each(|(at, leaf)| blob.data[*at..*at + leaf.len()].copy_from_slice(leaf));
        blob.groups.insert(groups);
        Ok(())
    }
}

/// Records in memory, checked as a node would.
pub struct Records {
    fleet: capsule_proto::credential::FleetId,
    records: Mutex<BTreeMap<RecordId, SignedRecord>>,
}

impl Records {
    pub fn new(machine: &Machine) -> Self {
        Self {
            fleet: machine.credential.fleet(),
            records: Mutex::default(),
        }
    }

    pub fn insert(&self, record: &SignedRecord) {
        self.records
            .lock()
            .unwrap()
            .insert(record.id(), record.clone());
    }

    pub fn len(&self) -> usize {
        self.records.lock().unwrap().len()
    }

    fn newest_revocation(&self) -> Option<SignedRecord> {
        let records = self.records.lock().unwrap();
        let revocations = records
            .values()
            .filter(|r| matches!(r.record().body, Body::Revocation(_)));
        revocations.max_by_key(|r| r.record().sequence).cloned()
    }
}

impl RecordStore for Records {
    fn ids(&self) -> Vec<RecordId> {
        self.records.lock().unwrap().keys().copied().collect()
    }

    fn get(&self, id: &RecordId) -> Option<Vec<u8>> {
        self.records
            .lock()
            .unwrap()
            .get(id)
            .map(|record| record.as_bytes().to_vec())
    }

    fn offer(&self, bytes: &[u8]) -> Offer {
        let checked = SignedRecord::decode(bytes)
            .map_err(RecordError::from)
            .and_then(|record| {
                record.verify(&self.fleet, NOW, &Revoked::default())?;
                Ok(record)
            });
        match checked {
            Err(error) => Offer::Rejected(error.to_string()),
            Ok(record) => match self.records.lock().unwrap().insert(record.id(), record) {
                None => Offer::New,
                Some(_) => Offer::Known,
            },
        }
    }

    fn revocation_head(&self) -> Option<Vec<u8>> {
        self.newest_revocation()
            .map(|record| record.as_bytes().to_vec())
    }

    fn revoked(&self) -> Revoked {
        match self
            .newest_revocation()
            .map(|record| record.record().body.clone())
        {
            Some(Body::Revocation(revoked)) => revoked,
            _ => Revoked::default(),
        }
    }
}

/// A running node.
pub struct Node {
    pub net: NetworkHandle,
    pub events: mpsc::Receiver<Event>,
    pub store: Arc<Memory>,
    pub records: Arc<Records>,
    pub machine: Machine,
}

/// How to start a node.
pub struct Start {
    pub machine: Machine,
    pub listen: Option<SocketAddr>,
    pub bootstrap: Vec<SocketAddr>,
    pub store: Arc<Memory>,
    pub limits: Limits,
    pub site: Option<String>,
}

impl Start {
    pub fn new(machine: Machine) -> Self {
        let listen = Some("127.0.0.1:0".parse().unwrap());
        Self {
            machine,
            listen,
            bootstrap: Vec::new(),
            store: Arc::default(),
            limits: Limits::default(),
            site: None,
        }
    }

    pub fn in_site(mut self, label: &str) -> Self {
        self.site = Some(label.to_owned());
        self
    }

    pub fn to(mut self, other: &Node) -> Self {
        self.bootstrap.push(other.address());
        self
    }

    pub async fn go(self) -> Node {
        let records = Arc::new(Records::new(&self.machine));
        self.go_with(records).await
    }

    pub async fn go_with(self, records: Arc<Records>) -> Node {
        let config = NetworkConfig {
            machine: self.machine.key.clone(),
            credential: self.machine.credential.clone(),
            listen: self.listen.into_iter().collect(),
            bootstrap: self.bootstrap.iter().map(ToString::to_string).collect(),
            lan_discovery: true,
            site: self.site,
            banned: Vec::new(),
            limits: self.limits,
            unix_time: Arc::new(|| NOW),
            seed: 7,
        };
        let (store, machine) = (self.store, self.machine);
        let (net, events) = Network::start(config, store.clone(), records.clone())
            .await
            .unwrap();
        Node {
            net,
            events,
            store,
            records,
            machine,
        }
    }
}

impl Node {
    pub fn address(&self) -> SocketAddr {
        self.net.listening()[0]
    }

    /// Adds a blob and announces it.
    pub async fn share(&self, content: &[u8]) -> Tree {
        let tree = self.store.add(content);
        self.net
            .announce(tree.root, tree.size, GroupRanges::all(tree.size))
            .await
            .unwrap();
        tree
    }

    /// Fetches a whole blob and checks it.
    pub async fn pull(&self, root: RootHash, size: Option<u64>) -> FetchProgress {
        let mut fetch = self.net.fetch(FetchSpec::whole(root, size)).await.unwrap();
        let done = within(fetch.done()).await.unwrap();
        assert!(self.store.content(&root).is_some());
        done
    }

    /// Waits for an event.
    pub async fn event<T>(&mut self, pick: impl Fn(Event) -> Option<T>) -> T {
        let wait = async {
            loop {
                if let Some(found) = pick(self.events.recv().await.expect("the network runs")) {
                    return found;
                }
            }
        };
        within(wait).await
    }

    /// Waits until this many peers are connected.
    pub async fn connected(&self, count: usize) {
        self.until(async || self.net.peers().await.unwrap().len() >= count)
            .await;
    }

    /// Waits until something holds.
    pub async fn until(&self, holds: impl AsyncFn() -> bool) {
        within(async {
            while !holds().await {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
    }
}

/// Fails rather than hang.
pub async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work)
        .await
        .expect("done in time")
}

/// A place that passes connections on; from the provider at so many bytes a second, once the handshake is done.
pub async fn relay(to: SocketAddr, rate: usize) -> SocketAddr {
    const STEP: Duration = Duration::from_millis(50);
    relay_by(to, rate.div_ceil(20), |_, passed| async move {
        if passed > 8 << 10 {
            tokio::time::sleep(STEP).await;
        }
    })
    .await
}

/// A place that passes connections on; from the provider so many bytes at a time, before which it tells how many they are, and how many
/// have come on their connection.
pub async fn relay_by<F>(
    to: SocketAddr,
    at_a_time: usize,
    tell: impl Fn(usize, usize) -> F + Clone + Send + 'static,
) -> SocketAddr
where
    F: Future<Output = ()> + Send,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let provider = TcpStream::connect(to).await.unwrap();
            let (mut from_client, mut to_client) = client.into_split();
            let (mut from_provider, mut to_provider) = provider.into_split();
            tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_provider).await });
            let tell = tell.clone();
            tokio::spawn(async move {
                let mut buffer = vec![0; at_a_time];
                let mut passed = 0;
                while let Ok(n @ 1..) = from_provider.read(&mut buffer).await {
                    passed += n;
                    tell(n, passed).await;
                    if to_client.write_all(&buffer[..n]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// Content that does not compress and has no two equal groups.
pub fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..len.div_ceil(8))
        .flat_map(|_| next())
        .take(len)
        .collect()
}
