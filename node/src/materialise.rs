//! Making what has become dear to read cheap again: content that is read through a long chain of layers is encoded anew, in one layer
//! that only this node has.
//!
//! Runs in the background, on one core, one component at a time, whenever what is held changed, and at the start. What is begun is lost when
//! the node stops, and begun again; what failed, or had no room, is tried again when something changes a while later. A version upon one that was made cheap takes that one's layers in place of the chain: of a line of versions
//! one in [`DEAR_LAYERS`] is encoded. On a machine that publishes, the layers that all others have stay the component's way too; on others they are
//! no longer needed, and go with the next collection.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capsule_chunker::content::Source;
use capsule_chunker::layer::LayerSource;
use capsule_chunker::layer::encode::{Effort, EncodeOptions};
use capsule_chunker::layer::reach::Reach;
use capsule_chunker::layer::read::{LayerCache, LayerContent, ReadOptions};
use capsule_proto::index::Space;
use capsule_proto::manifest::{Component, ComponentKind};
use capsule_proto::{CapsuleId, RootHash};

use crate::control::{Failure, Phase};
use crate::held::{HeldWay, TreeWay, blobs_of};
use crate::layers::{beside, no_pack, open, open_all};
use crate::node::Node;
use crate::store::{ActiveGuard, LayerBlobs, Store};
use crate::transfer::build::{encode_contents, encode_stream};
use crate::work::{Task, Work, blocking};

/// From so many layers on a way is dear: each is two open files and a cache's share, and every read of a megabyte looks into each.
/// Measured in `chunker/docs/layer.md`.
pub const DEAR_LAYERS: usize = 16;
/// A way is dear that decodes more than so many times the bytes that its content has.
const DEAR_DECODING: u64 = 4;
/// Ways remembered; beyond, they are looked at again.
const MAX_SEEN: usize = 4096;
/// After what was tried and left dear, the next try: what stood in the way (a full disk, damage) may be gone.
pub const RETRY: Duration = Duration::from_secs(900);

/// A component that may be dear to read.
#[derive(Debug, Clone)]
struct Candidate {
    capsule: CapsuleId,
    component: Component,
    space: Space,
    layers: Vec<LayerBlobs>,
}

/// Looks whenever something changed; for ever.
pub async fn run(node: Arc<Node>) {
    // By way, when it is looked at again: a cheap one never.
    let mut seen: BTreeMap<Vec<LayerBlobs>, Option<Instant>> = BTreeMap::new();
    loop {
        node.changed.notified().await;
        let shared = node.clone();
        let found = match blocking(move || candidates(&shared)).await {
            Ok(found) => found,
            Err(failure) => {
                node.trouble(format!(
                    "looking for long chains of layers: {}",
                    failure.message
                ));
                continue;
            }
        };
        for candidate in found {
            let is_due = |at: &Option<Instant>| at.is_some_and(|at| at <= Instant::now());
            let layers = candidate.layers.clone();
            if seen.get(&layers).is_some_and(|at| !is_due(at)) {
                continue;
            }
            if seen.len() >= MAX_SEEN {
                seen.clear();
            }
            let name = candidate.component.name.clone();
            let outcome = make_cheap(&node, candidate).await;
            if let Err(failure) = &outcome {
                let message = &failure.message;
                node.trouble(format!(
                    "component {name} is read through a long chain, and could not be encoded anew: {message}"
                ));
            }
            // What was made may be lost again, and then this way is what it is read through.
            let again = !matches!(outcome, Ok(Outcome::Cheap));
            seen.insert(layers, again.then(|| Instant::now() + RETRY));
        }
    }
}

/// What became of a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It costs little as it is.
    Cheap,
    /// It is read otherwise from now on, by whomever.
    Changed,
    /// It stays dear until there is room.
    NoRoom,
}

/// What is read through several layers, of what is held completely; the shortest chains first, as others may stand on them.
fn candidates(node: &Node) -> Result<Vec<Candidate>, Failure> {
    let mut found = Vec::new();
    for (capsule, held) in node.store.capsules()? {
        let manifest = node.holdings.manifest(&capsule).filter(|_| held.complete);
        for component in manifest
            .into_iter()
            .flat_map(|manifest| manifest.components)
        {
            let (space, layers) = match node.holdings.way_to(&component)? {
                Some(HeldWay::Layers(layers)) => (Space::Stream, layers),
                Some(HeldWay::Tree(way)) => (Space::Contents, way.contents),
                Some(HeldWay::Blob) | None => continue,
            };
            if layers.len() > 1 {
                found.push(Candidate {
                    capsule,
                    component,
                    space,
                    layers,
                });
            }
        }
    }
    found.sort_by_key(|candidate| candidate.layers.len());
    Ok(found)
}

async fn make_cheap(node: &Arc<Node>, candidate: Candidate) -> Result<Outcome, Failure> {
    let task = Task {
        phase: Phase::Checking,
        total: None,
        what: Some(candidate.component.name.clone()),
    };
    let shared = node.clone();
    let making = move |work: &Work| {
        // Not removed while it is read, nor what comes of it before that is noted.
        let _old = shared.store.guard(blobs_of(&candidate.layers));
        match cheaper(&shared, &candidate, work)? {
            Cheaper::None(outcome) => Ok(outcome),
            Cheaper::Way(layers, _new) => {
                adopt(&shared, &candidate, layers)?;
                Ok(Outcome::Changed)
            }
        }
    };
    node.works.run_behind(task, making).await
}

/// A cheaper way, kept from removal, or why there is none.
enum Cheaper {
    Way(Vec<LayerBlobs>, ActiveGuard),
    None(Outcome),
}

/// A cheaper way to what is dear: through what was made cheap before, or a new layer.
fn cheaper(node: &Node, candidate: &Candidate, work: &Work) -> Result<Cheaper, Failure> {
    let Candidate {
        component,
        space,
        layers,
        ..
    } = candidate;
    if !node.store.is_readable(layers)? {
        return Ok(Cheaper::None(Outcome::Changed));
    }
    if !is_dear(&node.store, layers, work)? {
        return Ok(Cheaper::None(Outcome::Cheap));
    }
    if let Some(shorter) = shorter(node, *space, layers)?
        && !is_dear(&node.store, &shorter, work)?
    {
        let guard = node.store.guard(blobs_of(&shorter));
        return Ok(Cheaper::Way(shorter, guard));
    }
    if !has_room(&node.store, node.home.dir(), layers) {
        tracing::info!(name = component.name, "no room to encode it anew");
        return Ok(Cheaper::None(Outcome::NoRoom));
    }
    let options = EncodeOptions {
        // Whoever waits for something else needs the other cores.
        threads: NonZeroUsize::MIN,
        ..EncodeOptions::new(component.kind, Effort::Fast)
    };
    let content = open(&node.store, layers, &ReadOptions::default())?;
    let (layer, guard) = match component.kind {
        ComponentKind::Tree => {
            let listing = node.holdings.listing(component)?;
            encode_contents(&node.store, component, &listing, content, &options, work)?
        }
        _ => {
            let (made, guard) = encode_stream(&node.store, component, content, &options, work)?;
            (made.way, guard)
        }
    };
    Ok(Cheaper::Way(layer, guard))
}

/// Whether there is room for a new layer, twice over: it takes about as much as those that it stands for, and nobody who wants to keep
/// something is to find the store full of it.
pub fn has_room(store: &Store, dir: &Path, layers: &[LayerBlobs]) -> bool {
    let blobs: BTreeSet<RootHash> = blobs_of(layers).collect();
    let here = blobs.iter().filter_map(|blob| store.durable(blob));
    let needed: u64 = here.map(|here| here.ranges.bytes(here.size)).sum();
    has_room_for(store, dir, needed)
}

/// Whether there is room for so many bytes twice over.
pub fn has_room_for(store: &Store, dir: &Path, needed: u64) -> bool {
    let (needed, usage) = (needed.saturating_mul(2), store.usage());
    let within = |quota: u64| quota.saturating_sub(usage.used) >= needed;
    // Where it cannot be told, writing tells.
    let free = rustix::fs::statvfs(dir)
        .map_or(u64::MAX, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    usage.quota.is_none_or(within) && free >= needed
}

/// Whether reading through layers costs much more than it would through one.
fn is_dear(store: &Store, layers: &[LayerBlobs], work: &Work) -> Result<bool, Failure> {
    if layers.len() >= DEAR_LAYERS {
        return Ok(true);
    }
    let Some(top) = indexes(store, layers)?.pop() else {
        return Ok(false);
    };
    let decoded = Reach::of(&top, work)?.decoded();
    let mut data = 0;
    for extent in LayerSource::new(top, None).extents() {
        work.check()?;
        let extent = extent?;
        data += match extent.zero {
            true => 0,
            false => extent.range.end - extent.range.start,
        };
    }
    Ok(decoded > data.saturating_mul(DEAR_DECODING))
}

/// The shortest way that leads over a component that is held and read through fewer layers than in this one.
fn shorter(
    node: &Node,
    space: Space,
    layers: &[LayerBlobs],
) -> Result<Option<Vec<LayerBlobs>>, Failure> {
    let mut best: Option<Vec<LayerBlobs>> = None;
    for (position, layer) in indexes(&node.store, layers)?.iter().enumerate() {
        let rest = &layers[position + 1..];
        if rest.is_empty() {
            break;
        }
        let target = layer.header().target;
        let below = match node.holdings.own_way(space, &target)? {
            Some(own) if node.store.is_readable(&own)? => Some(own),
            _ => node.holdings.recipe(space, &target)?,
        };
        let len = best.as_ref().map_or(layers.len(), Vec::len);
        if let Some(below) = below.filter(|below| below.len() + rest.len() < len) {
            let way = [&below[..], rest].concat();
            // What the rest reads beside that may have been made by what is left out.
            if beside(&node.store, &way)?.is_none() {
                best = Some(way);
            }
        }
    }
    Ok(best)
}

/// The indexes of layers, without their packs.
fn indexes(store: &Store, layers: &[LayerBlobs]) -> Result<Vec<Arc<LayerContent>>, Failure> {
    let cache = LayerCache::new(&ReadOptions { cache_len: 0 });
    open_all(store, layers, &cache, &no_pack, &|_, content| Ok(content))
}

/// Reads the component through other layers from now on, if all is still as it was.
fn adopt(node: &Node, candidate: &Candidate, layers: Vec<LayerBlobs>) -> Result<(), Failure> {
    // On a thread for long work, of which there are few.
    let _keeping = node.keeping.blocking_lock();
    let (holdings, root) = (&node.holdings, &candidate.component.root);
    let held = node.store.capsule(&candidate.capsule)?;
    let way = holdings.way_to(&candidate.component)?;
    let is_same = match &way {
        Some(HeldWay::Layers(now)) => *now == candidate.layers,
        Some(HeldWay::Tree(now)) => now.contents == candidate.layers,
        Some(HeldWay::Blob) | None => false,
    };
    if held.is_none() || !is_same {
        return Ok(());
    }
    let instead = (candidate.layers.len(), layers.len());
    // Who publishes upon it counts, and tells of, the layers that all others have.
    let publishes = node.identity.credential.grant().roles.publisher;
    if publishes || holdings.is_offered(root)? {
        holdings.put_own_way(candidate.space, root, &layers)?;
    } else {
        holdings.note_reached(&layers)?;
        match way {
            Some(HeldWay::Tree(way)) => {
                let contents = layers;
                holdings.put_tree_way(root, &TreeWay { contents, ..way })?;
            }
            _ => node.store.set_recipe(root, layers)?,
        }
    }
    node.components.close_all();
    let (name, (before, after)) = (&candidate.component.name, instead);
    tracing::info!(name, before, after, "read through fewer layers from now on");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{BlobKind, StoreOptions};

    #[test]
    fn nothing_is_begun_without_room_for_it_twice_over() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(temp.path(), StoreOptions::default()).unwrap();
        let [index, pack] = [1, 2].map(|n| store.put_small(&[n; 5000], BlobKind::Other).unwrap());
        let pack = Some(pack);
        let layers = [LayerBlobs { index, pack }; 2];
        let has_room = || has_room(&store, temp.path(), &layers);
        assert!(has_room(), "no quota");
        let used = store.usage().used;
        store.set_quota(Some(used + 20_000));
        assert!(has_room());
        store.set_quota(Some(used + 19_999));
        assert!(!has_room());
    }
}
