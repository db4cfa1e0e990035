//! Pulling capsules: from a name to content that is here, checked and served.
//!
//! `prepare` finds out what is needed, `fetch` brings it, `check` proves it; here they are put in order. Pulls of the
//! same capsule join: one transfer, heard by all who wait for it, stopped when none of them does any more.

pub mod check;
pub mod fetch;
pub mod prepare;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use capsule_proto::{CapsuleId, RootHash};
use capsule_swarm::Priority;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::control::{
    CapsuleRef, Failure, FailureCode, PeerBytes, Phase, Plan, Planned, PlannedComponent, Progress,
    Pull, Pulled, Reporter,
};
use crate::node::{Node, machine_of, spelled};
use crate::records::Resolution;
use crate::store::HeldCapsule;
use crate::work::{Task, Tell, blocking, panicked};
use fetch::{DEFAULT_PATIENCE, Fetched, Manner, fetch};
use prepare::{ComponentPlan, Excluded, MAX_TRIES, Prepared, add, prepare};

/// How long a name that nobody knows is waited for, where the user said nothing.
const NAME_PATIENCE: Duration = Duration::from_secs(10);
/// A peer connected for so long has sent its records.
const SETTLED: Duration = Duration::from_secs(8);
/// A record that was signed when the name was asked for has spread through the fleet.
const SPREAD: Duration = Duration::from_millis(1500);
/// How often peers are looked at while a name is waited for.
const LOOK: Duration = Duration::from_millis(300);
/// Indexes remembered as wrong; beyond, they are found wrong again.
const MAX_REFUSED: usize = 1024;

/// Pulls under way.
#[derive(Debug, Default)]
pub struct Transfers {
    running: Mutex<HashMap<CapsuleId, Weak<Running>>>,
    refused: Mutex<HashSet<RootHash>>,
}

type Outcome = Option<Result<Pulled, Failure>>;

/// A pull that one or more wait for.
#[derive(Debug)]
struct Running {
    name: String,
    progress: watch::Receiver<Progress>,
    outcome: watch::Receiver<Outcome>,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Nobody waits any more; what is verified stays.
        self.task.abort();
    }
}

impl Transfers {
    /// Indexes that turned out not to be what their records say.
    pub fn refused(&self) -> HashSet<RootHash> {
        self.refused
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Never chooses a layer again.
    pub fn refuse(&self, index: RootHash) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.len() < MAX_REFUSED {
            refused.insert(index);
        }
    }

    /// Whether a capsule is being pulled.
    pub fn is_running(&self, capsule: &CapsuleId) -> bool {
        self.running()
            .get(capsule)
            .is_some_and(|running| running.strong_count() > 0)
    }

    /// What is being pulled, and how far it is.
    pub fn list(&self) -> Vec<(String, Progress)> {
        let running = self.running();
        let alive = running.values().filter_map(Weak::upgrade);
        alive
            .map(|running| (running.name.clone(), running.progress.borrow().clone()))
            .collect()
    }

    fn running(&self) -> MutexGuard<'_, HashMap<CapsuleId, Weak<Running>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pull of a capsule that is under way, or a new one.
    fn join(&self, node: &Arc<Node>, resolution: Resolution, manner: Manner) -> Arc<Running> {
        let capsule = resolution.capsule;
        let mut running = self.running();
        running.retain(|_, running| running.strong_count() > 0);
        let known = running.get(&capsule).and_then(Weak::upgrade);
        if let Some(known) = known.filter(|known| known.outcome.borrow().is_none()) {
            return known;
        }
        let name = manner.name.clone();
        let (progress, progress_receiver) = watch::channel(waiting(&name));
        let (outcome, outcome_receiver) = watch::channel(None);
        let node = node.clone();
        let task = tokio::spawn(async move {
            let tell = |now| drop(progress.send_replace(now));
            let result = transfer(&node, &resolution, &manner, &tell).await;
            outcome.send_replace(Some(result));
        });
        let task = task.abort_handle();
        let new = Arc::new(Running {
            name,
            progress: progress_receiver,
            outcome: outcome_receiver,
            task,
        });
        running.insert(capsule, Arc::downgrade(&new));
        new
    }
}

fn waiting(name: &str) -> Progress {
    let what = Some(name.to_owned());
    Progress {
        phase: Phase::Waiting,
        done: 0,
        total: None,
        rate: 0,
        peers: 0,
        written: 0,
        what,
    }
}

/// Says what a pull would fetch.
pub async fn plan(
    node: &Arc<Node>,
    request: Plan,
    reporter: &Reporter,
) -> Result<Planned, Failure> {
    let started = Instant::now();
    let resolution = find(node, &request.capsule, request.wait, reporter).await?;
    let manner = manner(&resolution, request.wait, Priority::Normal);
    let prepared = prepare(
        node,
        &resolution,
        &manner,
        reporter,
        &mut Excluded::default(),
    )
    .await?;
    let components = prepared.components(node);
    let fetch_bytes: u64 = components.iter().map(|component| component.fetch).sum();
    let mut roots: Vec<RootHash> = prepared.planning.blobs.keys().copied().collect();
    roots.sort();
    node.announce(roots).await?;
    Ok(Planned {
        capsule: resolution.capsule,
        name: resolution.name.as_ref().map(ToString::to_string),
        have_bytes: prepared.total_bytes().saturating_sub(fetch_bytes),
        fetch_bytes,
        planning_bytes: bytes(&prepared.planning),
        content_bytes: prepared.manifest.content_size(),
        components,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Fetches a capsule for somebody who waits.
pub async fn pull(node: &Arc<Node>, request: Pull, reporter: &Reporter) -> Result<Pulled, Failure> {
    let resolution = find(node, &request.capsule, request.wait, reporter).await?;
    let manner = manner(&resolution, request.wait, Priority::Normal);
    fetch_capsule(node, resolution, manner, reporter).await
}

/// Fetches a capsule that is known, together with whoever else does.
pub async fn fetch_capsule(
    node: &Arc<Node>,
    resolution: Resolution,
    manner: Manner,
    tell: &dyn Tell,
) -> Result<Pulled, Failure> {
    let running = node.transfers.join(node, resolution, manner);
    let (mut progress, mut outcome) = (running.progress.clone(), running.outcome.clone());
    loop {
        tokio::select! {
            biased;
            done = outcome.wait_for(Option::is_some) => {
                let outcome = done.ok().and_then(|outcome| outcome.clone());
                return outcome.unwrap_or_else(|| Err(Failure::new(FailureCode::Internal, "the transfer ended without a word")));
            }
            Ok(()) = progress.changed() => tell.tell(progress.borrow_and_update().clone()),
        }
    }
}

/// How to pull what a reference resolved to.
pub fn manner(resolution: &Resolution, wait: Option<u64>, priority: Priority) -> Manner {
    let patience = wait.map_or(DEFAULT_PATIENCE, Duration::from_secs);
    Manner {
        phase: Phase::Fetching,
        name: spelled(resolution),
        priority,
        patience,
    }
}

/// Waits until a reference means something.
async fn find(
    node: &Arc<Node>,
    reference: &CapsuleRef,
    wait: Option<u64>,
    tell: &dyn Tell,
) -> Result<Resolution, Failure> {
    let patience = wait.map_or(NAME_PATIENCE, Duration::from_secs);
    let started = Instant::now();
    let mut changes = node.records.changes();
    loop {
        changes.borrow_and_update();
        let (asked, reference) = (node.clone(), reference.clone());
        let failure = match blocking(move || asked.resolve(&reference)).await {
            Err(failure) if failure.code == FailureCode::NotFound => failure,
            other => return other,
        };
        let peers = node.network.peers().await?;
        let settled = wait.is_none()
            && started.elapsed() >= SPREAD
            && peers.iter().any(|peer| peer.connected >= SETTLED);
        if settled || started.elapsed() >= patience {
            return Err(if peers.is_empty() {
                nobody(failure)
            } else {
                failure
            });
        }
        tell.tell(waiting("the name"));
        let _ = tokio::time::timeout(LOOK, changes.changed()).await;
    }
}

fn nobody(failure: Failure) -> Failure {
    Failure { message: format!("{}, and no other machine of the fleet is connected", failure.message), ..failure }
        .hint("start `capsule node` on another machine, or join again with a token that holds its address")
}

/// What a pull has spent so far, over all attempts.
#[derive(Default)]
struct Spent {
    planning: Fetched,
    fetched: Fetched,
    planning_seconds: f64,
    fetch_seconds: f64,
    fetch_cpu_seconds: f64,
    check_seconds: f64,
}

/// What an attempt that succeeded found.
struct Attempted {
    prepared: Prepared,
    components: Vec<PlannedComponent>,
    unchanged: bool,
}

/// One pull, from manifest to checked components.
async fn transfer(
    node: &Arc<Node>,
    resolution: &Resolution,
    manner: &Manner,
    tell: &dyn Tell,
) -> Result<Pulled, Failure> {
    let started = Instant::now();
    let _manifest = node.store.guard([resolution.capsule.0]);
    let (mut excluded, mut spent) = (Excluded::default(), Spent::default());
    for _ in 0..MAX_TRIES {
        let attempt = attempt(node, resolution, manner, tell, &mut excluded, &mut spent);
        if let Some(attempted) = attempt.await? {
            return Ok(pulled(node, resolution, attempted, spent, started.elapsed()).await);
        }
    }
    Err(excluded.failure.unwrap_or_else(|| {
        let message = format!(
            "{}: what is here of it was removed again and again",
            manner.name
        );
        Failure::new(FailureCode::Busy, message).hint("try again when nothing is being removed")
    }))
}

/// One attempt; none if the next may take another way.
async fn attempt(
    node: &Arc<Node>,
    resolution: &Resolution,
    manner: &Manner,
    tell: &dyn Tell,
    excluded: &mut Excluded,
    spent: &mut Spent,
) -> Result<Option<Attempted>, Failure> {
    let begun = Instant::now();
    let prepared = prepare(node, resolution, manner, tell, excluded).await?;
    let _guard = node.store.guard(prepared.roots());
    spent.planning_seconds += begun.elapsed().as_secs_f64();
    add(&mut spent.planning, prepared.planning.clone());
    if !still_held(node, &prepared).await? {
        return Ok(None);
    }
    let unchanged = is_complete(node, resolution.capsule).await?
        && prepared.components.iter().all(|plan| plan.held);
    let components = prepared.components(node);
    let attempted = Attempted {
        prepared,
        components,
        unchanged,
    };
    if unchanged {
        return Ok(Some(attempted));
    }
    let prepared = &attempted.prepared;
    note(node, resolution.capsule, false).await?;
    let (begun, cpu) = (Instant::now(), cpu_seconds());
    let wanted = prepared.wanted(node);
    let fetched = fetch(node, wanted.clone(), manner, tell).await;
    spent.fetch_seconds += begun.elapsed().as_secs_f64();
    spent.fetch_cpu_seconds += cpu_seconds() - cpu;
    match fetched {
        Ok(fetched) => add(&mut spent.fetched, fetched),
        Err(failure) => {
            excluded.missing(node, &wanted, failure).await?;
            return Ok(None);
        }
    }
    let begun = Instant::now();
    for plan in prepared.components.iter().filter(|plan| !plan.held) {
        match check_component(node, plan, tell).await {
            Err(failure) if failure.code == FailureCode::Damaged => {
                excluded.add(plan.way.blobs(), failure)?;
                return Ok(None);
            }
            checked => checked?,
        }
    }
    spent.check_seconds += begun.elapsed().as_secs_f64();
    // Not stopped half-way: what counts as complete is also announced.
    let (node, roots, capsule) = (node.clone(), prepared.roots(), resolution.capsule);
    let done = tokio::spawn(async move { complete(&node, roots, capsule).await });
    done.await.unwrap_or_else(|panic| Err(panicked(&panic)))?;
    Ok(Some(attempted))
}

/// Whether what was held when the ways were chosen still is, now that it is guarded: it may have been removed between.
async fn still_held(node: &Node, prepared: &Prepared) -> Result<bool, Failure> {
    let holdings = node.holdings.clone();
    let plans = prepared.components.iter().filter(|plan| plan.held);
    let held: Vec<_> = plans
        .map(|plan| (plan.component.clone(), plan.way.clone()))
        .collect();
    blocking(move || {
        for (component, way) in held {
            if holdings.way_to(&component)? != Some(way) {
                return Ok(false);
            }
        }
        Ok(true)
    })
    .await
}

async fn pulled(
    node: &Node,
    resolution: &Resolution,
    attempted: Attempted,
    mut spent: Spent,
    elapsed: Duration,
) -> Pulled {
    let planning_bytes = bytes(&spent.planning);
    let fetched_bytes = planning_bytes + bytes(&spent.fetched);
    add(&mut spent.fetched, spent.planning);
    Pulled {
        capsule: resolution.capsule,
        name: resolution.name.as_ref().map(ToString::to_string),
        unchanged: attempted.unchanged,
        components: attempted.components,
        fetched_bytes,
        had_bytes: attempted
            .prepared
            .total_bytes()
            .saturating_sub(fetched_bytes),
        planning_bytes,
        content_bytes: attempted.prepared.manifest.content_size(),
        by_peer: by_peer(node, &spent.fetched).await,
        planning_seconds: spent.planning_seconds,
        fetch_seconds: spent.fetch_seconds,
        fetch_cpu_seconds: spent.fetch_cpu_seconds,
        check_seconds: spent.check_seconds,
        seconds: elapsed.as_secs_f64(),
    }
}

/// Notes that a capsule is here, and tells everybody.
async fn complete(node: &Node, roots: Vec<RootHash>, capsule: CapsuleId) -> Result<(), Failure> {
    note(node, capsule, true).await?;
    node.announce(roots.into_iter().chain([capsule.0])).await?;
    node.tell_capsules().await
}

async fn check_component(
    node: &Node,
    plan: &ComponentPlan,
    tell: &dyn Tell,
) -> Result<(), Failure> {
    let ComponentPlan { component, way, .. } = plan.clone();
    let task = Task {
        phase: Phase::Checking,
        total: Some(component.content_size),
        what: Some(component.name.clone()),
    };
    let store = node.store.clone();
    let checked = node
        .works
        .run(task, tell, move |work| {
            check::check(&store, &component, &way, work)
        })
        .await;
    if let Err(failure) = &checked
        && failure.code == FailureCode::Damaged
    {
        // Never by these layers again: perhaps there are others.
        plan.way
            .blobs()
            .into_iter()
            .for_each(|blob| node.transfers.refuse(blob));
    }
    checked
}

async fn is_complete(node: &Node, capsule: CapsuleId) -> Result<bool, Failure> {
    let store = node.store.clone();
    blocking(move || Ok(store.capsule(&capsule)?.is_some_and(|held| held.complete))).await
}

/// Notes that a capsule is here, or begun.
async fn note(node: &Node, capsule: CapsuleId, complete: bool) -> Result<(), Failure> {
    let (store, now) = (node.store.clone(), node.clock.now());
    blocking(move || {
        let added = store.capsule(&capsule)?.map_or(now, |held| held.added);
        Ok(store.put_capsule(&capsule, &HeldCapsule { complete, added })?)
    })
    .await
}

fn bytes(fetched: &Fetched) -> u64 {
    fetched.blobs.values().map(|(_, bytes)| bytes).sum()
}

async fn by_peer(node: &Node, fetched: &Fetched) -> Vec<PeerBytes> {
    if let Ok(peers) = node.network.peers().await {
        node.remember_names(&peers);
    }
    let one = |(peer, bytes): (&capsule_swarm::PeerId, &u64)| PeerBytes {
        peer: peer.to_string(),
        name: node.name_of(peer),
        machine: machine_of(peer).map(|machine| machine.to_string()),
        bytes: *bytes,
    };
    let mut by_peer: Vec<PeerBytes> = fetched.by_peer.iter().map(one).collect();
    by_peer.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.peer.cmp(&b.peer)));
    by_peer
}

/// CPU time of this process, in seconds.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
