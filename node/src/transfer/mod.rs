//! Pulling capsules: from a name to content that is here, checked and served.
//!
//! `prepare` finds out what is needed, by `search` the cheapest ways, and by their `indexes`; `fetch` brings it, `check` proves it; here they are put in
//! order. Pulls of the same capsule join (`shared`): one transfer, heard by all who wait for it, stopped when none of them does
//! any more. Each of them waits as long as it said (`patience`).

pub mod build;
pub mod check;
mod early;
pub mod fetch;
mod files;
mod indexes;
pub mod like;
mod part;
pub mod patience;
pub mod prepare;
mod search;
mod shared;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capsule_proto::{CapsuleId, RootHash};
use capsule_swarm::{PeerInfo, Priority};

use crate::control::{
    CapsuleRef, Failure, FailureCode, PeerBytes, Phase, Plan, Planned, PlannedComponent, Pull,
    Pulled, Reporter,
};
use crate::node::{Node, machine_of, spelled};
use crate::records::Resolution;
use crate::store::HeldCapsule;
use crate::work::{Task, Tell, blocking, panicked};
use early::Early;
use fetch::{Fetched, Manner, fetch};
use patience::Patience;
use prepare::{ComponentPlan, Excluded, MAX_TRIES, Prepared, prepare};
use shared::waiting;
pub use shared::{Transfers, fetch_capsule};

/// How long nothing may arrive before a fetch is given up, where the user said nothing: time for a provider to restart.
pub const DEFAULT_PATIENCE: Duration = Duration::from_secs(30);
/// The least, whatever the user said: the first bytes take so long where a link is thin or a provider busy.
const LEAST_PATIENCE: Duration = Duration::from_secs(3);
/// How long a name that nobody knows is waited for, where the user said nothing.
const NAME_PATIENCE: Duration = Duration::from_secs(10);
/// A peer connected for so long has sent its records.
const SETTLED: Duration = Duration::from_secs(8);
/// A record that was signed when the name was asked for has spread through the fleet.
const SPREAD: Duration = Duration::from_millis(1500);
/// How often peers are looked at while a name is waited for.
const LOOK: Duration = Duration::from_millis(300);

/// Says what a pull would fetch.
pub async fn plan(
    node: &Arc<Node>,
    request: Plan,
    reporter: &Reporter,
) -> Result<Planned, Failure> {
    let started = Instant::now();
    let resolution = find(node, &request.capsule, request.wait, reporter).await?;
    let manner = Manner {
        like: like(node, request.like_path, request.like_capsule).await?,
        ..manner(&resolution, Priority::Normal)
    };
    let asked = Arc::new(Patience::default());
    let _place = asked.wait(Instant::now(), patience(request.wait));
    let prepared = prepare(
        node,
        &resolution,
        &manner,
        &asked,
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
    let manner = Manner {
        like: like(node, request.like_path, request.like_capsule).await?,
        ..manner(&resolution, Priority::Normal)
    };
    if let Some(path) = &manner.like
        && node.transfers.is_running(&resolution.capsule)
    {
        let message = format!(
            "{} is being pulled already, without a look at {}",
            manner.name,
            path.display()
        );
        return Err(Failure::new(FailureCode::Busy, message)
            .hint("wait for that pull, or stop it first: what is verified stays"));
    }
    let patience = patience(request.wait);
    fetch_capsule(node, resolution, manner, patience, reporter).await
}

/// The local data that the user points at. A capsule only has to be here: all that are are looked at.
async fn like(
    node: &Arc<Node>,
    path: Option<PathBuf>,
    capsule: Option<CapsuleRef>,
) -> Result<Option<PathBuf>, Failure> {
    let node = node.clone();
    blocking(move || {
        if let Some(capsule) = capsule {
            let resolution = node.resolve(&capsule)?;
            node.holdings
                .complete(&resolution.capsule, &spelled(&resolution))?;
        }
        if let Some(path) = &path {
            if !path.is_absolute() {
                let message = format!("{} is not an absolute path", path.display());
                return Err(Failure::new(FailureCode::Invalid, message));
            }
            like::check_path(path)?;
        }
        Ok(path)
    })
    .await
}

/// How to pull what a reference resolved to.
pub fn manner(resolution: &Resolution, priority: Priority) -> Manner {
    Manner {
        phase: Phase::Fetching,
        name: spelled(resolution),
        priority,
        like: None,
        paged: false,
    }
}

/// How long nothing may arrive, by what the user said.
pub fn patience(wait: Option<u64>) -> Duration {
    wait.map_or(DEFAULT_PATIENCE, Duration::from_secs)
        .max(LEAST_PATIENCE)
}

/// Waits until a reference means something.
pub async fn find(
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
        let settled = wait.is_none() && settled(&peers, started);
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

/// Whether what connected peers know of something asked for at `started` has come.
fn settled(peers: &[PeerInfo], started: Instant) -> bool {
    started.elapsed() >= SPREAD && peers.iter().any(|peer| peer.connected >= SETTLED)
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
    /// Bytes that were here before the pull.
    had: u64,
    unchanged: bool,
}

/// One pull, from manifest to checked components.
async fn transfer(
    node: &Arc<Node>,
    resolution: &Resolution,
    manner: &Manner,
    patience: &Patience,
    tell: &dyn Tell,
) -> Result<Pulled, Failure> {
    let started = Instant::now();
    let (mut excluded, mut spent) = (Excluded::default(), Spent::default());
    for _ in 0..MAX_TRIES {
        let attempt = attempt(
            node,
            resolution,
            (manner, patience),
            tell,
            &mut excluded,
            &mut spent,
        );
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
    (manner, patience): (&Manner, &Patience),
    tell: &dyn Tell,
    excluded: &mut Excluded,
    spent: &mut Spent,
) -> Result<Option<Attempted>, Failure> {
    let begun = Instant::now();
    let prepared = prepare(node, resolution, manner, patience, tell, excluded).await?;
    spent.planning_seconds += begun.elapsed().as_secs_f64();
    spent.planning.add(&prepared.planning);
    if !still_held(node, &prepared).await? {
        return Ok(None);
    }
    let unchanged = is_complete(node, resolution.capsule).await?
        && prepared.components.iter().all(|plan| plan.held);
    let components = prepared.components(node);
    let had = prepared.had_bytes(
        node,
        &resolution.capsule,
        &[&spent.planning, &spent.fetched],
    );
    let attempted = Attempted {
        prepared,
        components,
        had,
        unchanged,
    };
    if unchanged {
        return Ok(Some(attempted));
    }
    let prepared = &attempted.prepared;
    begin(node, resolution.capsule).await?;
    let (begun, cpu) = (Instant::now(), cpu_seconds());
    let wanted = prepared.wanted(node);
    let early = Early::new(prepared);
    let fetching = fetch(
        node,
        wanted.clone(),
        manner,
        patience,
        tell,
        &mut spent.fetched,
    );
    let fetched = early.during(&node.store, fetching).await;
    spent.fetch_seconds += begun.elapsed().as_secs_f64();
    spent.fetch_cpu_seconds += cpu_seconds() - cpu;
    if let Err(failure) = fetched {
        excluded.missing(node, &wanted, failure).await?;
        return Ok(None);
    }
    let begun = Instant::now();
    for plan in prepared.components.iter().filter(|plan| !plan.held) {
        match check_component(node, plan, &early, tell).await {
            // Local data may have changed since it was looked at: once more, without it.
            Err(failure)
                if plan.like.is_some()
                    && matches!(
                        failure.code,
                        FailureCode::Damaged | FailureCode::Io | FailureCode::Changed
                    ) =>
            {
                tracing::warn!(%failure.message, "what was found here is fetched after all");
                excluded.like = true;
                return Ok(None);
            }
            Err(failure) if failure.code == FailureCode::Damaged => {
                excluded.wrong(&plan.layers, failure)?;
                return Ok(None);
            }
            checked => checked?,
        }
    }
    spent.check_seconds += begun.elapsed().as_secs_f64();
    // Not stopped half-way: what counts as complete is also announced. Guarded to its end, though who waits may go away.
    let (node, roots, capsule) = (node.clone(), prepared.roots(), resolution.capsule);
    let guard = node.store.guard(roots.iter().copied().chain([capsule.0]));
    let done = tokio::spawn(async move {
        let _guard = guard;
        complete(&node, roots, capsule).await
    });
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
    spent.fetched.add(&spent.planning);
    Pulled {
        capsule: resolution.capsule,
        name: resolution.name.as_ref().map(ToString::to_string),
        unchanged: attempted.unchanged,
        components: attempted.components,
        fetched_bytes,
        had_bytes: attempted.had,
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
async fn complete(
    node: &Arc<Node>,
    roots: Vec<RootHash>,
    capsule: CapsuleId,
) -> Result<(), Failure> {
    // What was open for peers before may have lacked what came.
    node.components.close_all();
    // Where nobody waits any more, a collection may have come between.
    let kept = node.while_keeping(move |node| Ok(node.store.mark_capsule(&capsule, true)?));
    if !kept.await? {
        return Err(Failure::cancelled());
    }
    node.announce(roots.into_iter().chain([capsule.0])).await?;
    node.tell_capsules().await
}

async fn check_component(
    node: &Node,
    plan: &ComponentPlan,
    early: &Early,
    tell: &dyn Tell,
) -> Result<(), Failure> {
    let ComponentPlan { component, way, .. } = plan.clone();
    let task = Task {
        phase: Phase::Checking,
        total: Some(component.content_size),
        what: Some(component.name.clone()),
    };
    let (store, like) = (node.store.clone(), plan.like.clone());
    let early = early.clone();
    let checked = node
        .works
        .run(task, tell, move |work| match like {
            Some(like) => build::build(&store, &component, &way, like.open(&store)?, work),
            None => {
                let early = early.take(&component.root, &way);
                check::check(&store, &component, &way, early, work)
            }
        })
        .await;
    if let Err(failure) = &checked
        && failure.code == FailureCode::Damaged
        && plan.like.is_none()
    {
        // Never by these layers again: perhaps there are others.
        for layer in &plan.layers {
            node.transfers.refuse(layer.clone());
        }
    }
    checked
}

async fn is_complete(node: &Node, capsule: CapsuleId) -> Result<bool, Failure> {
    let store = node.store.clone();
    blocking(move || Ok(store.capsule(&capsule)?.is_some_and(|held| held.complete))).await
}

/// Notes that a capsule is begun; not any more where nobody waits for it, as then it may be collected at any moment.
async fn begin(node: &Arc<Node>, capsule: CapsuleId) -> Result<(), Failure> {
    node.while_keeping(move |node| {
        if !node.transfers.is_running(&capsule) {
            return Err(Failure::cancelled());
        }
        let known = node.store.capsule(&capsule)?;
        let added = known.map_or_else(|| node.clock.now(), |held| held.added);
        let begun = HeldCapsule {
            complete: false,
            added,
        };
        Ok(node.store.put_capsule(&capsule, &begun)?)
    })
    .await
}

fn bytes(fetched: &Fetched) -> u64 {
    fetched.blobs.values().sum()
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
