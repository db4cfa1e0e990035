//! Fetching a set of blobs: a few at a time, with one figure for all, patience, and durability at the end.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capsule_proto::RootHash;
use capsule_proto::ranges::GroupRanges;
use capsule_swarm::{FetchError, FetchProgress, FetchSpec, PeerId, Priority};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::watch;

use super::patience::{Mood, Patience};
use crate::blobs::Blobs;
use crate::control::{Failure, FailureCode, Phase, Progress};
use crate::node::Node;
use crate::store::{BlobKind, Store};
use crate::work::{Tell, blocking};

/// Blobs fetched at a time: many small ones must not wait for each other's round trips.
const AT_A_TIME: usize = 16;
/// How often progress is told and patience looked at.
const TICK: Duration = Duration::from_millis(200);

/// A blob to be fetched.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Which.
    pub root: RootHash,
    /// Its bytes, where they are known.
    pub size: Option<u64>,
    /// What it is.
    pub kind: BlobKind,
    /// Which chunk groups of it; all where none are named.
    pub groups: Option<GroupRanges>,
}

/// What fetching brought.
#[derive(Debug, Clone, Default)]
pub struct Fetched {
    /// How many bytes of each blob were fetched.
    pub blobs: BTreeMap<RootHash, u64>,
    /// Bytes by the peer that sent them.
    pub by_peer: BTreeMap<PeerId, u64>,
}

impl Fetched {
    /// Adds what another fetch brought.
    pub fn add(&mut self, more: &Self) {
        for (root, bytes) in &more.blobs {
            *self.blobs.entry(*root).or_default() += bytes;
        }
        for (peer, bytes) in &more.by_peer {
            *self.by_peer.entry(*peer).or_default() += bytes;
        }
    }
}

/// How to fetch.
#[derive(Debug, Clone)]
pub struct Manner {
    /// What is said to be done.
    pub phase: Phase,
    /// What it is for, in messages.
    pub name: String,
    /// How urgent it is.
    pub priority: Priority,
    /// Local data in which to look for what is wanted, beside the capsules that are here.
    pub like: Option<PathBuf>,
    /// Whether it is read while it comes, and so what is read first is to lie together.
    pub paged: bool,
}

/// Fetches blobs until all are here and durable. What it brought is added to `fetched`, also where it fails in the end.
pub async fn fetch(
    node: &Node,
    wanted: Vec<Wanted>,
    manner: &Manner,
    patience: &Patience,
    tell: &dyn Tell,
    fetched: &mut Fetched,
) -> Result<(), Failure> {
    let roots: Vec<RootHash> = wanted.iter().map(|wanted| wanted.root).collect();
    let whole: Vec<(RootHash, Option<GroupRanges>)> = wanted
        .iter()
        .map(|wanted| (wanted.root, wanted.groups.clone()))
        .collect();
    let _guard = node.store.guard(roots.iter().copied());
    let _kept = KeepOnDrop {
        store: node.store.clone(),
        blobs: node.blobs.clone(),
        roots: roots.clone(),
    };
    let mut state = Fetching {
        node,
        manner,
        patience,
        queue: wanted.into(),
        progress: BTreeMap::new(),
        last: (Instant::now(), 0),
    };
    let came = state.run(tell).await;
    state.account(fetched);
    came?;
    make_durable(node, whole).await
}

/// Makes what came durable, and expects nothing more, however the fetch ends: a cancelled one is resumed, perhaps after a crash.
struct KeepOnDrop {
    store: Store,
    blobs: Arc<Blobs>,
    roots: Vec<RootHash>,
}

impl Drop for KeepOnDrop {
    fn drop(&mut self) {
        let (store, roots) = (self.store.clone(), std::mem::take(&mut self.roots));
        roots.iter().for_each(|root| self.blobs.forget(root));
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        // Nothing to do for what is durable already, as after every fetch that succeeded.
        runtime.spawn_blocking(move || {
            for root in roots
                .iter()
                .filter(|root| store.durable(root).is_some_and(|here| !here.complete))
            {
                if let Err(error) = store.flush(root) {
                    tracing::warn!(%root, %error, "part of what was fetched will be fetched again");
                }
            }
        });
    }
}

struct Fetching<'a> {
    node: &'a Node,
    manner: &'a Manner,
    patience: &'a Patience,
    queue: VecDeque<Wanted>,
    progress: BTreeMap<RootHash, watch::Receiver<FetchProgress>>,
    /// When bytes arrived last, and how many had by then.
    last: (Instant, u64),
}

/// Largest manifest or index that is demanded; a larger one is spread like a pack, so that its provider sends it once.
const URGENT: u64 = 1 << 20;

impl Fetching<'_> {
    async fn run(&mut self, tell: &dyn Tell) -> Result<(), Failure> {
        let mut running = FuturesUnordered::new();
        let mut ticks = tokio::time::interval(TICK);
        loop {
            while running.len() < AT_A_TIME
                && let Some(next) = self.queue.pop_front()
            {
                let (root, mut fetch) = self.start(next).await?;
                running.push(async move { (root, fetch.done().await) });
            }
            tokio::select! {
                done = running.next() => match done {
                    Some((root, result)) => self.ended(root, result).await?,
                    None => return Ok(()),
                },
                _ = ticks.tick() => self.tick(tell).await?,
            }
        }
    }

    async fn start(&mut self, wanted: Wanted) -> Result<(RootHash, capsule_swarm::Fetch), Failure> {
        let Wanted {
            root,
            size,
            kind,
            groups,
        } = wanted;
        let store = self.node.store.clone();
        match size {
            Some(size) => blocking(move || Ok(store.create_partial(&root, size, kind)?)).await?,
            None => self.node.blobs.expect(root, kind),
        }
        // A pull stands still until these few bytes are here; behind packs that others fetch they would wait long.
        let bytes = size.map(|size| groups.as_ref().map_or(size, |groups| groups.bytes(size)));
        let urgent =
            self.manner.phase == Phase::Planning && bytes.is_none_or(|bytes| bytes <= URGENT);
        let spec = FetchSpec {
            priority: if urgent {
                Priority::Demand
            } else {
                self.manner.priority
            },
            want: groups,
            ..FetchSpec::whole(root, size)
        };
        let fetch = self.node.network.fetch(spec).await?;
        self.progress.insert(root, fetch.progress());
        Ok((root, fetch))
    }

    async fn ended(
        &mut self,
        root: RootHash,
        result: Result<FetchProgress, FetchError>,
    ) -> Result<(), Failure> {
        let last = result.map_err(|error| {
            let failure = Failure::from(error);
            Failure {
                message: format!("{}: {}", self.manner.name, failure.message),
                ..failure
            }
        })?;
        // Figures of what has ended stay for the sums.
        self.progress.insert(root, watch::channel(last).1);
        self.node.announce([root]).await
    }

    async fn tick(&mut self, tell: &dyn Tell) -> Result<(), Failure> {
        let mut sum = Progress {
            phase: self.manner.phase,
            done: 0,
            total: Some(0),
            rate: 0,
            peers: 0,
            written: 0,
            what: Some(self.manner.name.clone()),
        };
        for progress in self.progress.values() {
            let progress = progress.borrow();
            sum.done += progress.bytes_done;
            sum.total = sum
                .total
                .zip(progress.size.map(|_| progress.bytes_total))
                .map(|(sum, total)| sum + total);
            sum.rate += progress.rate;
            sum.peers = sum.peers.max(progress.providers);
        }
        let now = Instant::now();
        if sum.done != self.last.1 {
            self.last = (now, sum.done);
        }
        if sum.peers == 0 && sum.total != Some(sum.done) {
            sum.phase = Phase::Waiting;
        }
        let done = sum.done;
        tell.tell(sum);
        match self.patience.ask(now, self.last.0) {
            Mood::Wait => Ok(()),
            Mood::Leave(leaving) => {
                leaving.tell(&self.given_up(done).await);
                Ok(())
            }
            Mood::Over => Err(self.given_up(done).await),
        }
    }

    /// Why nothing arrives, as far as it can be told.
    async fn given_up(&self, done: u64) -> Failure {
        let peers = self.node.network.peers().await;
        let connected = peers.map_or(0, |peers| peers.len());
        let (name, seconds) = (&self.manner.name, self.last.0.elapsed().as_secs());
        let so_far = if done > 0 {
            "; what has come is kept, and the same command resumes"
        } else {
            ""
        };
        let (holders, nowhere) = self.holders().await;
        let missing = match nowhere {
            0 => "what is missing".to_owned(),
            bytes if done > 0 => format!("the last {bytes} bytes"),
            bytes => format!("the {bytes} bytes that are missing"),
        };
        let (message, hint) = match (connected, holders) {
            (0, _) => (
                format!("{name} cannot be fetched: no other machine of the fleet is connected"),
                "start `capsule node` on one that has it, or join again with a token that holds its address".to_owned(),
            ),
            (1, 0) => (
                format!("{name} cannot be fetched: the one connected machine has none of {missing}"),
                format!("start a machine that has it; `capsule show {name}` lists who said to"),
            ),
            (_, 0) => (
                format!("{name} cannot be fetched: none of the {connected} connected machines has {missing}"),
                format!("start a machine that has it; `capsule show {name}` lists who said to"),
            ),
            (_, holders) => {
                let have = if holders == 1 { "machine has" } else { "machines have" };
                (
                    format!("{name}: nothing arrived for {seconds} s, though {holders} connected {have} something of what is missing"),
                    "look at the network between them, and try again".to_owned(),
                )
            }
        };
        Failure::new(FailureCode::Unreachable, format!("{message}{so_far}")).hint(hint)
    }

    /// How many connected machines have something of what is missing, and how many bytes of it none of them has.
    async fn holders(&self) -> (usize, u64) {
        let (mut holders, mut nowhere) = (BTreeSet::new(), 0);
        for (root, progress) in &self.progress {
            let size = progress.borrow().size;
            let here = self.node.store.present(root).map(|here| here.ranges);
            let mut missing = size.map(GroupRanges::all).unwrap_or_default();
            missing = missing.difference(&here.unwrap_or_default());
            if size.is_some() && missing.is_empty() {
                continue;
            }
            let providers = self.node.network.providers(*root).await;
            let mut left = missing.clone();
            for provider in providers.unwrap_or_default() {
                // Of a size that nobody told yet, all is missing.
                if size.is_none() || !provider.groups.intersection(&missing).is_empty() {
                    holders.insert(provider.peer);
                }
                left = left.difference(&provider.groups);
            }
            nowhere += size.map_or(0, |size| left.bytes(size));
        }
        (holders.len(), nowhere)
    }

    /// Adds what came so far.
    fn account(&self, fetched: &mut Fetched) {
        for (root, progress) in &self.progress {
            let progress = progress.borrow();
            *fetched.blobs.entry(*root).or_default() += progress.bytes_done;
            for (peer, bytes) in &progress.by_peer {
                *fetched.by_peer.entry(*peer).or_default() += bytes;
            }
        }
    }
}

async fn make_durable(
    node: &Node,
    wanted: Vec<(RootHash, Option<GroupRanges>)>,
) -> Result<(), Failure> {
    let store = node.store.clone();
    blocking(move || {
        for (root, groups) in wanted {
            store.flush(&root)?;
            let is_here = store.durable(&root).is_some_and(|here| match &groups {
                Some(groups) => groups.difference(&here.ranges).is_empty(),
                None => here.complete,
            });
            if !is_here {
                let message = format!("{root} was fetched, but is not all in the store");
                return Err(Failure::new(FailureCode::Io, message).hint("the same command resumes"));
            }
        }
        Ok(())
    })
    .await
}
