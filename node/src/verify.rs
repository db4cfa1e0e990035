//! Reading everything again: what no longer matches its hash is taken out of what is held, and fetched again where wanted.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use capsule_proto::{CapsuleId, RootHash};
use capsule_swarm::Priority;

use crate::control::{
    CapsuleRef, DamageInfo, Failure, FailureCode, Phase, Reporter, Verified, Verify,
};
use crate::held::kind_word;
use crate::node::{Node, spelled};
use crate::store::{BlobInfo, BlobKind, HeldCapsule};
use crate::transfer::fetch::{DEFAULT_PATIENCE, Manner, Wanted, fetch};
use crate::transfer::{fetch_capsule, manner};
use crate::work::{Task, Work, blocking};

/// Something to read again.
#[derive(Debug, Clone)]
struct Held {
    root: RootHash,
    size: u64,
    /// Bytes that are here.
    have: u64,
    /// None: a component.
    kind: Option<BlobKind>,
}

impl From<BlobInfo> for Held {
    fn from(blob: BlobInfo) -> Self {
        Self {
            root: blob.root,
            size: blob.presence.size,
            have: blob.presence.ranges.bytes(blob.presence.size),
            kind: Some(blob.kind),
        }
    }
}

/// Verifies what is held, or what a capsule takes.
pub async fn verify(
    node: &Arc<Node>,
    request: Verify,
    reporter: &Reporter,
) -> Result<Verified, Failure> {
    let started = Instant::now();
    let (asked, reference) = (node.clone(), request.capsule.clone());
    let held = blocking(move || list(&asked, reference.as_ref())).await?;
    let _guard = node.store.guard(held.iter().map(|held| held.root));
    let checked_bytes = held.iter().map(|held| held.have).sum();
    let task = Task {
        phase: Phase::Verifying,
        total: Some(checked_bytes),
        what: None,
    };
    let (store, reading) = (node.store.clone(), held.clone());
    let damaged = node
        .works
        .run(task, reporter, move |work| read_all(&store, &reading, work))
        .await?;
    let hurt = hurt_capsules(node, &damaged).await?;
    let mut answer = Verified {
        checked: held.len() as u64,
        checked_bytes,
        damaged_bytes: damaged.iter().map(|(_, bytes)| bytes).sum(),
        damaged: damaged.iter().map(describe).collect(),
        repaired_bytes: 0,
        seconds: 0.0,
    };
    if request.repair {
        let hurt = [hurt, begun_capsules(node, request.capsule.clone()).await?].concat();
        let lacking = lacking(node, &damaged, hurt.clone()).await?;
        repair(node, &damaged, hurt, reporter).await?;
        for (info, (held, bytes)) in answer.damaged.iter_mut().zip(&damaged) {
            let here = node
                .store
                .present(&held.root)
                .map_or(0, |here| here.ranges.bytes(here.size));
            info.repaired = (*bytes).min(here.saturating_sub(held.have - bytes));
            answer.repaired_bytes += info.repaired;
        }
        add_fetched(node, &lacking, &mut answer);
    }
    answer.seconds = started.elapsed().as_secs_f64();
    Ok(answer)
}

fn describe((held, bytes): &(Held, u64)) -> DamageInfo {
    let kind = held.kind.map_or("component", kind_word).to_owned();
    DamageInfo {
        root: held.root,
        kind,
        bytes: *bytes,
        repaired: 0,
    }
}

/// What is to be read: blobs first, as components are read through them.
fn list(node: &Node, reference: Option<&CapsuleRef>) -> Result<Vec<Held>, Failure> {
    let wanted: Option<BTreeSet<RootHash>> = match reference {
        Some(reference) => {
            let resolution = node.resolve(reference)?;
            if node.store.capsule(&resolution.capsule)?.is_none() {
                let message = format!("nothing of {} is here to be verified", spelled(&resolution));
                return Err(Failure::new(FailureCode::NotFound, message)
                    .hint("`capsule ls --held` lists what is here"));
            }
            Some(node.holdings.blobs_of(&resolution.capsule, &node.records)?)
        }
        None => None,
    };
    let is_wanted = |root: &RootHash| wanted.as_ref().is_none_or(|wanted| wanted.contains(root));
    let blobs = node
        .store
        .blobs()
        .into_iter()
        .filter(|blob| is_wanted(&blob.root))
        .map(Held::from);
    let mut held: Vec<Held> = blobs.collect();
    let is_blob: BTreeSet<RootHash> = held.iter().map(|held| held.root).collect();
    for (root, component) in node.store.components() {
        if is_wanted(&root) && !is_blob.contains(&root) {
            let have = node
                .store
                .present(&root)
                .map_or(0, |here| here.ranges.bytes(here.size));
            held.push(Held {
                root,
                size: component.size,
                have,
                kind: None,
            });
        }
    }
    Ok(held)
}

/// Reads all; what was damaged, and how many bytes of it.
fn read_all(
    store: &crate::store::Store,
    held: &[Held],
    work: &Work,
) -> Result<Vec<(Held, u64)>, Failure> {
    let mut damaged: Vec<(Held, u64)> = Vec::new();
    for held in held {
        work.check()?;
        // What is gone meanwhile was removed, and a component whose blobs are damaged cannot be read: both are known.
        let bad = match store.verify(&held.root) {
            Ok(bad) => bad.bytes(held.size),
            Err(crate::store::ReadError::Unknown(_)) => 0,
            Err(crate::store::ReadError::Component { .. }) if !damaged.is_empty() => held.have,
            // Damage that was taken out of its layers earlier, which a repair fetches.
            Err(crate::store::ReadError::Component { .. }) if lacks_layers(store, &held.root) => 0,
            Err(error) => return Err(error.into()),
        };
        if bad > 0 {
            damaged.push((held.clone(), bad));
        }
        work.advance(held.have);
    }
    Ok(damaged)
}

/// Whether a component cannot be read because its layers are not all here.
fn lacks_layers(store: &crate::store::Store, root: &RootHash) -> bool {
    store.component(root).is_some_and(|component| {
        let mut blobs = component.recipe.blobs().into_iter();
        blobs.any(|blob| !store.durable(&blob).is_some_and(|here| here.complete))
    })
}

/// Capsules that are no longer whole; notes that.
async fn hurt_capsules(
    node: &Arc<Node>,
    damaged: &[(Held, u64)],
) -> Result<Vec<CapsuleId>, Failure> {
    let roots: BTreeSet<RootHash> = damaged.iter().map(|(held, _)| held.root).collect();
    if roots.is_empty() {
        return Ok(Vec::new());
    }
    let shared = node.clone();
    let hurt = blocking(move || mark_hurt(&shared, &roots)).await?;
    node.tell_capsules().await?;
    Ok(hurt)
}

/// Capsules that lack something already: what was found damaged earlier, while serving it, say.
async fn begun_capsules(
    node: &Arc<Node>,
    only: Option<CapsuleRef>,
) -> Result<Vec<CapsuleId>, Failure> {
    let node = node.clone();
    blocking(move || {
        let only = only
            .map(|only| node.resolve(&only))
            .transpose()?
            .map(|found| found.capsule);
        let held = node
            .store
            .capsules()?
            .into_iter()
            .filter(|(id, held)| !held.complete && only.is_none_or(|only| only == *id));
        Ok(held.map(|(id, _)| id).collect())
    })
    .await
}

/// Blobs of capsules that lack something which was not found just now: it was taken out by whoever found it earlier.
async fn lacking(
    node: &Arc<Node>,
    damaged: &[(Held, u64)],
    hurt: Vec<CapsuleId>,
) -> Result<Vec<Held>, Failure> {
    let known: BTreeSet<RootHash> = damaged.iter().map(|(held, _)| held.root).collect();
    let node = node.clone();
    blocking(move || {
        let mut takes = BTreeSet::new();
        for capsule in &hurt {
            takes.extend(node.holdings.blobs_of(capsule, &node.records)?);
        }
        let blobs = node.store.blobs().into_iter().filter(|blob| {
            !blob.presence.complete && takes.contains(&blob.root) && !known.contains(&blob.root)
        });
        Ok(blobs.map(Held::from).collect())
    })
    .await
}

/// Adds what was fetched of blobs that lacked something: layers that were not needed stay as they are.
fn add_fetched(node: &Node, lacking: &[Held], answer: &mut Verified) {
    for held in lacking {
        let here = node
            .store
            .present(&held.root)
            .map_or(0, |here| here.ranges.bytes(here.size));
        let fetched = here.saturating_sub(held.have);
        if fetched > 0 {
            let info = describe(&(held.clone(), fetched));
            answer.damaged.push(DamageInfo {
                repaired: fetched,
                ..info
            });
            answer.damaged_bytes += fetched;
            answer.repaired_bytes += fetched;
        }
    }
}

/// Notes which capsules are no longer complete without some roots.
pub fn mark_hurt(node: &Node, roots: &BTreeSet<RootHash>) -> Result<Vec<CapsuleId>, Failure> {
    let mut hurt = Vec::new();
    for (id, held) in node.store.capsules()? {
        // A damaged manifest no longer tells what the capsule takes: it is damaged itself.
        let takes = node.holdings.blobs_of(&id, &node.records)?;
        if takes.is_disjoint(roots) {
            continue;
        }
        if held.complete {
            node.store.put_capsule(
                &id,
                &HeldCapsule {
                    complete: false,
                    ..held
                },
            )?;
        }
        hurt.push(id);
    }
    Ok(hurt)
}

/// Fetches what is missing: of capsules by pulling them, of other blobs directly.
async fn repair(
    node: &Arc<Node>,
    damaged: &[(Held, u64)],
    hurt: Vec<CapsuleId>,
    reporter: &Reporter,
) -> Result<(), Failure> {
    let hurt: BTreeSet<CapsuleId> = hurt.into_iter().collect();
    for id in hurt {
        let asked = node.clone();
        let resolution = blocking(move || asked.resolve(&CapsuleRef(id.to_string()))).await?;
        let manner = Manner {
            phase: Phase::Repairing,
            ..manner(&resolution, None, Priority::Normal)
        };
        fetch_capsule(node, resolution, manner, reporter).await?;
    }
    let left = damaged
        .iter()
        .filter_map(|(held, _)| held.kind.map(|kind| (held, kind)));
    let left = left.filter(|(held, _)| {
        node.store
            .present(&held.root)
            .is_some_and(|here| !here.complete)
    });
    let wanted: Vec<Wanted> = left
        .map(|(held, kind)| Wanted {
            root: held.root,
            size: Some(held.size),
            kind,
        })
        .collect();
    let name = "what was damaged".to_owned();
    let manner = Manner {
        phase: Phase::Repairing,
        name,
        priority: Priority::Normal,
        patience: DEFAULT_PATIENCE,
    };
    fetch(node, wanted, &manner, reporter).await?;
    Ok(())
}
