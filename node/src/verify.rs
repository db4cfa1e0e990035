//! Reading everything again: what no longer matches its hash is taken out of what is held, and fetched again where wanted.
//!
//! A capsule counts as complete as long as all that it takes is here. What ends that is noted by whoever finds it
//! ([`mark_hurt`]); what was not noted (a crash came between, files were removed by hand) is found by [`mark_lacking`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use capsule_proto::ranges::group_count;
use capsule_proto::{CapsuleId, GroupRanges, RootHash};
use capsule_swarm::Priority;

use crate::control::{
    CapsuleRef, DamageInfo, Failure, FailureCode, Phase, Reporter, Verified, Verify,
};
use crate::held::{blobs_of, kind_word, layer_blobs};
use crate::needs::{Needs, note_ways};
use crate::node::{Node, spelled};
use crate::store::{BlobInfo, BlobKind, DatabaseError, LayerBlobs, ReadError, Store};
use crate::transfer::fetch::{Fetched, Manner, Wanted, fetch};
use crate::transfer::patience::Patience;
use crate::transfer::{DEFAULT_PATIENCE, fetch_capsule, manner};
use crate::work::{Task, Work, blocking};

/// Chunk groups read at a time: 64 MiB, a moment's work.
const PART: u64 = 4096;

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
    let hurt = hurt_capsules(node, &damaged, reporter).await?;
    let mut answer = Verified {
        checked: held.len() as u64,
        checked_bytes,
        damaged_bytes: damaged.iter().map(|(_, bytes)| bytes).sum(),
        damaged: damaged.iter().map(describe).collect(),
        repaired_bytes: 0,
        seconds: 0.0,
    };
    if request.repair {
        let (asked, begun) = asked_capsules(node, request.capsule.clone()).await?;
        let hurt: BTreeSet<CapsuleId> = hurt.into_iter().chain(begun).collect();
        let asked: BTreeSet<CapsuleId> = hurt.iter().copied().chain(asked).collect();
        let lacking = lacking(node, &damaged, asked.clone()).await?;
        repair(node, hurt, asked, reporter).await?;
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
fn read_all(store: &Store, held: &[Held], work: &Work) -> Result<Vec<(Held, u64)>, Failure> {
    let mut damaged: Vec<(Held, u64)> = Vec::new();
    for held in held {
        let bad = match read_one(store, held, work)? {
            Ok(bad) => bad,
            // What is gone meanwhile was removed, and a component whose blobs are damaged cannot be read: both are known.
            Err(ReadError::Unknown(_)) => 0,
            Err(ReadError::Component { .. }) if !damaged.is_empty() => held.have,
            // Damage that was taken out of its layers earlier, which a repair fetches.
            Err(ReadError::Component { .. }) if lacks_layers(store, &held.root) => 0,
            Err(error) => return Err(error.into()),
        };
        if bad > 0 {
            damaged.push((held.clone(), bad));
        }
    }
    Ok(damaged)
}

/// Reads one in parts, between which it can be stopped; how many bytes of it were damaged.
fn read_one(store: &Store, held: &Held, work: &Work) -> Result<Result<u64, ReadError>, Failure> {
    let (mut bad, count) = (0, group_count(held.size));
    for start in (0..count).step_by(PART as usize) {
        work.check()?;
        match store.verify_part(&held.root, start..count.min(start + PART)) {
            Ok(checked) => {
                bad += checked.bad.bytes(held.size);
                work.advance(checked.read.bytes(held.size));
            }
            Err(error) => return Ok(Err(error)),
        }
    }
    Ok(Ok(bad))
}

/// Whether a component cannot be read because its layers are not all here.
fn lacks_layers(store: &Store, root: &RootHash) -> bool {
    let layers = store.component(root).map(|known| known.recipe.layers);
    layers.is_some_and(|layers| !store.is_readable(&layers).unwrap_or(false))
}

/// Capsules that are no longer whole; notes that, also of what nobody noted when it went.
async fn hurt_capsules(
    node: &Arc<Node>,
    damaged: &[(Held, u64)],
    reporter: &Reporter,
) -> Result<Vec<CapsuleId>, Failure> {
    let roots: BTreeSet<RootHash> = damaged.iter().map(|(held, _)| held.root).collect();
    let noted = node.while_keeping(move |node| {
        let hurt = if roots.is_empty() {
            Vec::new()
        } else {
            mark_hurt(node, &roots)?
        };
        Ok((hurt, mark_lacking(node)?))
    });
    let (hurt, lacking) = noted.await?;
    for id in &lacking {
        reporter.notice(format!(
            "{id} is no longer all here: `capsule verify --repair` or `capsule pull` fetches what is missing"
        ));
    }
    if !hurt.is_empty() || !lacking.is_empty() {
        node.tell_capsules().await?;
    }
    Ok(hurt)
}

/// The capsules that are meant, and those of them that lack something already: what was found damaged earlier, while serving it, say.
async fn asked_capsules(
    node: &Arc<Node>,
    only: Option<CapsuleRef>,
) -> Result<(Vec<CapsuleId>, Vec<CapsuleId>), Failure> {
    let node = node.clone();
    blocking(move || {
        let only = only
            .map(|only| node.resolve(&only))
            .transpose()?
            .map(|found| found.capsule);
        let mut held = node.store.capsules()?;
        held.retain(|(id, _)| only.is_none_or(|only| only == *id));
        let begun = held.iter().filter(|(_, held)| !held.complete);
        let begun = begun.map(|(id, _)| *id).collect();
        Ok((held.into_iter().map(|(id, _)| id).collect(), begun))
    })
    .await
}

/// Blobs of capsules that lack something which was not found just now: it was taken out by whoever found it earlier.
async fn lacking(
    node: &Arc<Node>,
    damaged: &[(Held, u64)],
    capsules: BTreeSet<CapsuleId>,
) -> Result<Vec<Held>, Failure> {
    let known: BTreeSet<RootHash> = damaged.iter().map(|(held, _)| held.root).collect();
    let node = node.clone();
    blocking(move || {
        let mut takes = BTreeSet::new();
        for capsule in &capsules {
            takes.extend(node.holdings.takes(capsule, &node.records)?.lasting());
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

/// Notes which capsules are no longer complete without some roots. The caller holds `Node::keeping`: what is removed
/// meanwhile would come back.
///
/// A way of this node's own is forgotten instead, and made again: the capsule is as complete without it. So are further orders of a layer, which
/// perhaps nobody else has.
pub fn mark_hurt(node: &Node, roots: &BTreeSet<RootHash>) -> Result<Vec<CapsuleId>, Failure> {
    let mut hurt = Vec::new();
    for (id, held) in node.store.capsules()? {
        drop_own_ways(node, &id, |component, own| {
            Ok(roots.contains(component) || blobs_of(own).any(|blob| roots.contains(&blob)))
        })?;
        drop_orders(node, &id, roots)?;
        // A damaged manifest no longer tells what the capsule takes: it is damaged itself.
        let takes = node.holdings.takes(&id, &node.records)?.lasting();
        if takes.is_disjoint(roots) {
            continue;
        }
        if !held.complete || node.store.mark_capsule(&id, false)? {
            hurt.push(id);
        }
    }
    Ok(hurt)
}

/// Notes which capsules count as complete and are not. The caller holds `Node::keeping`.
pub fn mark_lacking(node: &Node) -> Result<Vec<CapsuleId>, Failure> {
    let mut lacking = Vec::new();
    for (id, held) in node.store.capsules()? {
        drop_own_ways(node, &id, |_, own| Ok(!node.store.is_readable(own)?))?;
        if held.complete && !is_whole(node, &id)? && node.store.mark_capsule(&id, false)? {
            lacking.push(id);
        }
    }
    Ok(lacking)
}

/// Notes that a capsule is whole again, where what the disk had damaged has come. What is in the way is only told: a pull notes it too.
pub async fn note_whole(node: &Arc<Node>, capsule: CapsuleId) {
    let noted = node.while_keeping(move |node| {
        let held = node.store.capsule(&capsule)?;
        let is_begun = held.is_some_and(|held| !held.complete);
        Ok(is_begun && is_whole(node, &capsule)? && node.store.mark_capsule(&capsule, true)?)
    });
    let told = match noted.await {
        Ok(true) => node.tell_capsules().await,
        other => other.map(drop),
    };
    if let Err(failure) = told {
        tracing::debug!(%failure, %capsule, "it is whole again, which is not noted");
    }
}

/// Forgets ways of this node's own to a capsule's components, where they are bad.
fn drop_own_ways(
    node: &Node,
    capsule: &CapsuleId,
    is_bad: impl Fn(&RootHash, &[LayerBlobs]) -> Result<bool, DatabaseError>,
) -> Result<(), DatabaseError> {
    let manifest = node.holdings.manifest(capsule);
    let components = manifest
        .into_iter()
        .flat_map(|manifest| manifest.components);
    let mut dropped = false;
    for root in components.map(|component| component.root) {
        dropped |= node
            .holdings
            .drop_own_ways(&root, |own| is_bad(&root, own))?;
    }
    if dropped {
        node.components.close_all();
        // Whoever makes such ways looks again.
        node.changed.notify_one();
    }
    Ok(())
}

/// No longer keeps further orders of a capsule's layers, where they are bad.
fn drop_orders(
    node: &Node,
    capsule: &CapsuleId,
    roots: &BTreeSet<RootHash>,
) -> Result<(), DatabaseError> {
    let manifest = node.holdings.manifest(capsule);
    let components = manifest
        .into_iter()
        .flat_map(|manifest| manifest.components);
    for root in components.map(|component| component.root) {
        let known = node.records.layers_to(&root)?;
        let orders = known.iter().filter(|known| known.sequence > 0);
        let orders: Vec<_> = orders.map(|known| layer_blobs(&known.layer)).collect();
        node.holdings.take_back(&root, |layer| {
            let is_bad = blobs_of(std::slice::from_ref(layer)).any(|blob| roots.contains(&blob));
            is_bad && orders.contains(layer)
        })?;
    }
    Ok(())
}

fn is_whole(node: &Node, capsule: &CapsuleId) -> Result<bool, DatabaseError> {
    let Some(manifest) = node.holdings.manifest(capsule) else {
        return Ok(false);
    };
    for component in &manifest.components {
        if node.holdings.way_to(component)?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Fetches what is missing: of hurt capsules by pulling them; then, of all that are meant and complete, what nothing is read from just now.
async fn repair(
    node: &Arc<Node>,
    hurt: BTreeSet<CapsuleId>,
    asked: BTreeSet<CapsuleId>,
    reporter: &Reporter,
) -> Result<(), Failure> {
    let mut failed = Ok(());
    for id in hurt {
        let asked = node.clone();
        let found = blocking(move || match asked.store.capsule(&id)? {
            Some(_) => asked.resolve(&CapsuleRef(id.to_string())).map(Some),
            // Removed meanwhile, and stays so.
            None => Ok(None),
        });
        let Some(resolution) = found.await? else {
            continue;
        };
        let manner = Manner {
            phase: Phase::Repairing,
            ..manner(&resolution, Priority::Normal)
        };
        let fetched = fetch_capsule(node, resolution, manner, DEFAULT_PATIENCE, reporter);
        // One that nobody has keeps no other from being repaired.
        failed = failed.and(fetched.await.map(drop));
    }
    let meant: Vec<CapsuleId> = asked.iter().copied().collect();
    note_ways(node, move |_| Ok(meant), reporter).await?;
    let shared = node.clone();
    let wanted = blocking(move || wanted(&shared, &asked)).await?;
    let name = "what was damaged".to_owned();
    let manner = Manner {
        phase: Phase::Repairing,
        name,
        priority: Priority::Normal,
        like: None,
        paged: false,
    };
    let patience = Arc::new(Patience::default());
    let _place = patience.wait(Instant::now(), DEFAULT_PATIENCE);
    let mut fetched = Fetched::default();
    let left = fetch(node, wanted, &manner, &patience, reporter, &mut fetched).await;
    // What is open for peers may lack what came.
    node.components.close_all();
    failed.and(left)
}

/// What of capsules that count as complete is not here though it should be: a layer that is kept for others, say. What only this node's own
/// ways took, nobody else has; of capsules that are not complete, a pull looked for all.
fn wanted(node: &Node, capsules: &BTreeSet<CapsuleId>) -> Result<Vec<Wanted>, Failure> {
    let held = node.store.capsules()?.into_iter();
    let complete = held.filter(|(id, held)| held.complete && capsules.contains(id));
    let complete: Vec<CapsuleId> = complete.map(|(id, _)| id).collect();
    let needs = Needs::lasting(node, &complete)?;
    let blobs = node.store.blobs().into_iter();
    let wanted = blobs.filter(|blob| needs.contains(&blob.root));
    let wanted = wanted.filter_map(|blob| {
        let size = blob.presence.size;
        let groups = needs.part_of(&blob.root).cloned();
        let needed = groups.clone().unwrap_or_else(|| GroupRanges::all(size));
        let here = node.store.durable(&blob.root)?.ranges;
        (!needed.difference(&here).is_empty()).then_some(Wanted {
            root: blob.root,
            size: Some(size),
            kind: blob.kind,
            groups,
        })
    });
    Ok(wanted.collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::store::StoreOptions;

    #[test]
    fn reading_a_large_blob_can_be_stopped_half_way() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(temp.path(), StoreOptions::default()).unwrap();
        let root = store
            .put_small(&vec![7; 65 << 20], BlobKind::Other)
            .unwrap();
        let name = root.to_string();
        let file = temp
            .path()
            .join("blobs")
            .join(&name[..2])
            .join(name + ".data");
        let file = std::fs::File::options().write(true).open(file).unwrap();
        file.write_all_at(b"damage", 100_000).unwrap();
        let work = Arc::new(Work::default());
        let stopping = work.clone();
        store.on_damage(Arc::new(move |_| stopping.cancel()));
        let held: Vec<Held> = store.blobs().into_iter().map(Held::from).collect();
        let stopped = read_all(&store, &held, &work).unwrap_err();
        assert_eq!(stopped.code, FailureCode::Cancelled);
        // Nothing is lost of what was found: it no longer counts.
        let here = store.present(&root).unwrap();
        assert_eq!(here.ranges.bytes(here.size), (65 << 20) - (16 << 10));
    }
}
