//! The running node: what its parts share, and the way from a request to the part that answers it.
//!
//! Each command lives in a module of its own. Here are only who they are, and what the node remembers while it runs.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use capsule_proto::CapsuleId;
use capsule_proto::credential::MachineId;
use capsule_proto::name::CapsuleName;
use capsule_swarm::{NetworkHandle, PeerId, PeerInfo};
use serde::Serialize;
use tokio::sync::Notify;

use crate::blobs::Blobs;
use crate::clock::Clock;
use crate::control::{CapsuleRef, Failure, FailureCode, Handler, Reporter, Request};
use crate::follow::Follower;
use crate::held::Holdings;
use crate::home::{Home, Identity, Settings};
use crate::layers::Components;
use crate::paging::ReadCache;
use crate::rates::RateKeeper;
use crate::records::{KnownName, Records, Resolution, ResolveError};
use crate::store::{DatabaseError, Store};
use crate::transfer::Transfers;
use crate::work::Works;
use crate::{export, keep, mount, nbd, paging, publish, rates, report, transfer, verify};

/// Troubles remembered for `status`.
const MAX_TROUBLES: usize = 32;
/// Peers whose names and capsules are remembered.
const MAX_PEERS: usize = 4096;
/// Capsules remembered of one peer.
const MAX_CAPSULES_OF_PEER: usize = 1024;

/// What a node is made of: what its start puts together, and everything else works with.
pub struct Parts {
    /// Its directory.
    pub home: Home,
    /// What its user set.
    pub settings: Settings,
    /// Who it is.
    pub identity: Identity,
    /// Its blobs and tables.
    pub store: Store,
    /// What the fleet says.
    pub records: Arc<Records>,
    /// The fleet's machines.
    pub network: NetworkHandle,
    /// What time it is.
    pub clock: Arc<Clock>,
    /// The store as the network sees it.
    pub blobs: Arc<Blobs>,
    /// Components open for peers.
    pub components: Arc<Components>,
    /// Caps of rates.
    pub rates: RateKeeper,
}

/// A running node: its parts, and what goes on.
pub struct Node {
    parts: Parts,
    /// What the store holds of capsules.
    pub holdings: Holdings,
    /// Long work.
    pub works: Works,
    /// Pulls under way.
    pub transfers: Transfers,
    /// Channels that are followed.
    pub follower: Follower,
    /// One publication at a time is named: names must not overtake each other.
    pub naming: tokio::sync::Mutex<()>,
    /// What is kept: held while it is read and acted upon, so that nothing is collected that is pinned meanwhile. Whoever
    /// needs `naming` too takes that first.
    pub keeping: Arc<tokio::sync::Mutex<()>>,
    /// Told whenever capsules came or went.
    pub changed: Notify,
    /// When it started.
    pub started: Instant,
    /// What is kept of capsules that are read while they come.
    pub read_cache: ReadCache,
    memory: Mutex<Memory>,
}

impl Deref for Node {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.parts
    }
}

/// What the node heard since it started.
#[derive(Debug, Default)]
struct Memory {
    troubles: VecDeque<String>,
    names: BTreeMap<PeerId, String>,
    capsules: BTreeMap<PeerId, Vec<(CapsuleId, bool)>>,
}

impl Node {
    /// Puts the parts together; nothing runs yet.
    pub fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self {
            holdings: Holdings::new(parts.store.clone()),
            parts,
            works: Works::new(),
            transfers: Transfers::default(),
            follower: Follower::default(),
            naming: tokio::sync::Mutex::new(()),
            keeping: Arc::default(),
            changed: Notify::new(),
            started: Instant::now(),
            read_cache: ReadCache::default(),
            memory: Mutex::default(),
        })
    }

    /// What a reference means, by what is known now.
    pub fn resolve(&self, reference: &CapsuleRef) -> Result<Resolution, Failure> {
        let held: Vec<CapsuleId> = self
            .store
            .capsules()?
            .into_iter()
            .map(|(id, _)| id)
            .collect();
        Ok(self.records.resolve(reference, &held)?)
    }

    /// Does short blocking work during which nobody else changes what is kept, to its end even if its caller goes away.
    pub async fn while_keeping<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let keeping = self.keeping.clone().lock_owned().await;
        let node = self.clone();
        crate::work::blocking(move || {
            let _keeping = keeping;
            work(&node)
        })
        .await
    }

    /// Tells the fleet which capsules are here.
    pub async fn tell_capsules(&self) -> Result<(), Failure> {
        self.changed.notify_one();
        self.records.look_at_reads();
        let store = self.store.clone();
        let held = crate::work::blocking(move || Ok(store.capsules()?)).await?;
        Ok(self
            .network
            .set_capsules(
                held.into_iter()
                    .map(|(id, held)| (id, held.complete))
                    .collect(),
            )
            .await?)
    }

    /// Announces all that is here of some roots; what is not here is passed over.
    pub async fn announce(
        &self,
        roots: impl IntoIterator<Item = capsule_proto::RootHash>,
    ) -> Result<(), Failure> {
        for root in roots {
            if let Some(here) = self
                .store
                .present(&root)
                .filter(|here| !here.ranges.is_empty())
            {
                self.network.announce(root, here.size, here.ranges).await?;
            }
        }
        Ok(())
    }

    /// Remembers a trouble for `status`.
    pub fn trouble(&self, text: String) {
        tracing::warn!("{text}");
        let mut memory = self.memory();
        if memory.troubles.back() == Some(&text) {
            return;
        }
        if memory.troubles.len() == MAX_TROUBLES {
            memory.troubles.pop_front();
        }
        memory.troubles.push_back(text);
    }

    /// Recent troubles, newest last.
    pub fn troubles(&self) -> Vec<String> {
        self.memory().troubles.iter().cloned().collect()
    }

    /// Remembers what peers are called.
    pub fn remember_names(&self, peers: &[PeerInfo]) {
        let mut memory = self.memory();
        for peer in peers {
            if memory.names.len() < MAX_PEERS || memory.names.contains_key(&peer.id) {
                memory.names.insert(peer.id, peer.member.name.clone());
            }
        }
    }

    /// What a peer is called, if it was ever connected.
    pub fn name_of(&self, peer: &PeerId) -> Option<String> {
        self.memory().names.get(peer).cloned()
    }

    /// Remembers what a peer calls itself, and which capsules it said to hold.
    pub fn heard(&self, peer: PeerId, name: String, mut capsules: Vec<(CapsuleId, bool)>) {
        capsules.truncate(MAX_CAPSULES_OF_PEER);
        let mut memory = self.memory();
        if memory.names.len() < MAX_PEERS || memory.names.contains_key(&peer) {
            memory.names.insert(peer, name);
        }
        if memory.capsules.len() < MAX_PEERS || memory.capsules.contains_key(&peer) {
            memory.capsules.insert(peer, capsules);
        }
    }

    /// Which peers said to hold a capsule, and whether all of it.
    pub fn holders(&self, capsule: &CapsuleId) -> Vec<(PeerId, bool)> {
        let memory = self.memory();
        let holder = |(peer, held): (&PeerId, &Vec<(CapsuleId, bool)>)| {
            held.iter()
                .find(|(id, _)| id == capsule)
                .map(|(_, complete)| (*peer, *complete))
        };
        memory.capsules.iter().filter_map(holder).collect()
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The machine of a peer: its network id is its public key.
pub fn machine_of(peer: &PeerId) -> Option<MachineId> {
    // An identity multihash of a protobuf: type Ed25519, 32 bytes (libp2p's peer id specification).
    const HEAD: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];
    let bytes = peer.to_bytes();
    bytes
        .strip_prefix(&HEAD)
        .and_then(|key| key.try_into().ok())
        .map(MachineId)
}

/// How a reference reads in messages: the name where there is one.
pub fn spelled(resolution: &Resolution) -> String {
    resolution
        .name
        .as_ref()
        .map_or_else(|| resolution.capsule.to_string(), ToString::to_string)
}

/// Versions of a channel that have several capsules.
pub fn conflicts(names: &[KnownName], name: &KnownName) -> bool {
    names.iter().any(|other| {
        let same_version = other.name == name.name;
        let same_place = other.name.channel == name.name.channel && other.sequence == name.sequence;
        (same_version || same_place) && other.capsule != name.capsule
    })
}

/// Whether each of several capsules has a name that none of the others has.
fn told_apart_by_name(candidates: &[(Option<CapsuleName>, CapsuleId)]) -> bool {
    candidates.iter().all(|(name, capsule)| {
        let shared =
            |(other, of): &(Option<CapsuleName>, CapsuleId)| other == name && of != capsule;
        name.is_some() && !candidates.iter().any(shared)
    })
}

impl From<ResolveError> for Failure {
    fn from(error: ResolveError) -> Self {
        let message = error.to_string();
        match error {
            ResolveError::UnknownName(_) => Self::new(FailureCode::NotFound, message)
                .hint("check the spelling against `capsule ls`; names arrive from connected peers: see `capsule peers`"),
            ResolveError::UnknownVersion { .. } => {
                Self::new(FailureCode::NotFound, message).hint("see the versions that there are with `capsule ls`")
            }
            ResolveError::Ended { newest, .. } => {
                let hint = match newest {
                    Some(newest) => format!("name an older one if you mean it: {newest}"),
                    None => "publish a new version".to_owned(),
                };
                Self::new(FailureCode::NotFound, message).hint(hint)
            }
            ResolveError::UnknownPrefix(_) => {
                Self::new(FailureCode::NotFound, message).hint("give all 64 digits of the id to look for it in the fleet")
            }
            ResolveError::Ambiguous { candidates, .. } => {
                let hint = if told_apart_by_name(&candidates) {
                    "give the version, or the id of the one that you mean"
                } else {
                    "give the id of the one that you mean"
                };
                Self::new(FailureCode::Ambiguous, message).hint(hint)
            }
            ResolveError::Malformed(_) => Self::new(FailureCode::Invalid, message),
            ResolveError::Database(error) => DatabaseError::into(error),
        }
    }
}

/// Answers requests for a node.
pub struct Answers(pub Arc<Node>);

impl Handler for Answers {
    type Request = Request;

    fn handle(
        &self,
        request: Request,
        reporter: Reporter,
    ) -> impl Future<Output = Result<serde_json::Value, Failure>> + Send {
        let node = self.0.clone();
        async move {
            match request {
                Request::Publish(request) => {
                    json(publish::publish(&node, request, &reporter).await)
                }
                Request::Capture(request) => {
                    json(publish::capture(&node, request, &reporter).await)
                }
                Request::Rebase(request) => json(publish::rebase(&node, request, &reporter).await),
                Request::Plan(request) => json(transfer::plan(&node, request, &reporter).await),
                Request::Pull(request) => json(transfer::pull(&node, request, &reporter).await),
                Request::Export(request) => json(export::export(&node, request, &reporter).await),
                Request::Nbd(request) => json(nbd::nbd(&node, request, &reporter).await),
                Request::Mount(request) => json(mount::mount(&node, request, &reporter).await),
                Request::Verify(request) => json(verify::verify(&node, request, &reporter).await),
                Request::Follow(request) => json(crate::follow::follow(&node, request).await),
                Request::Unfollow(request) => json(crate::follow::unfollow(&node, request).await),
                Request::Pin(request) => json(keep::pin(&node, request).await),
                Request::Unpin(request) => json(keep::unpin(&node, request).await),
                Request::Gc(request) => json(keep::gc(&node, request).await),
                Request::Rm(request) => json(keep::rm(&node, request).await),
                Request::Ls(request) => json(report::ls(&node, request).await),
                Request::Show(request) => json(report::show(&node, request).await),
                Request::Layers(request) => json(report::layers(&node, request).await),
                Request::Status(_) => json(report::status(&node).await),
                Request::Peers(request) => json(report::peers(&node, request).await),
                Request::Hashes(_) => json(report::hashes(&node).await),
                Request::Rates(request) => json(rates::rates(&node, request).await),
                Request::CheckName(request) => json(publish::check_name(&node, request).await),
                Request::Describe(request) => {
                    json(paging::describe(&node, request, &reporter).await)
                }
                Request::Prefetch(request) => json(publish::prefetch(&node, request).await),
            }
        }
    }
}

/// An answer as it travels.
pub fn json<A: Serialize>(answer: Result<A, Failure>) -> Result<serde_json::Value, Failure> {
    serde_json::to_value(answer?).map_err(|e| Failure::new(FailureCode::Internal, e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_machine_is_its_key() {
        // The peer id of an Ed25519 key is that key behind a fixed head.
        let mut bytes = vec![0x00, 0x24, 0x08, 0x01, 0x12, 0x20];
        bytes.extend([7; 32]);
        let peer = PeerId::from_bytes(&bytes).unwrap();
        assert_eq!(machine_of(&peer), Some(MachineId([7; 32])));
    }

    #[test]
    fn the_version_is_asked_for_only_where_it_tells_capsules_apart() {
        let candidate = |name: Option<&str>, n| {
            let id = CapsuleId(capsule_proto::RootHash::from_bytes([n; 32]));
            (name.map(|name| name.parse().unwrap()), id)
        };
        let hint = |candidates| {
            let error = ResolveError::Ambiguous {
                reference: "lab".to_owned(),
                candidates,
            };
            Failure::from(error).hint.unwrap()
        };
        let by_version = vec![candidate(Some("lab:1"), 1), candidate(Some("lab:2"), 2)];
        assert!(hint(by_version).contains("the version"));
        let one_version = vec![candidate(Some("lab:1"), 1), candidate(Some("lab:1"), 2)];
        assert_eq!(hint(one_version), "give the id of the one that you mean");
        let nameless = vec![candidate(None, 1), candidate(Some("lab:1"), 2)];
        assert_eq!(hint(nameless), "give the id of the one that you mean");
    }
}
