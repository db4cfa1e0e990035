//! Layers that this machine told of are put in another order when somebody tells what is read first of what they make.
//!
//! When a capture is published, that is known only as far as one before it told. The layer in the new order is a further one to the same
//! component, by a record of its own. Who reads while it comes takes it; whoever pulls all takes the first, which others have.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capsule_chunker::bao::Tree;
use capsule_chunker::layer::encode::Hashed;
use capsule_proto::index::Space;
use capsule_proto::manifest::Component;
use capsule_proto::ranges::group_count;
use capsule_proto::record::{BlobRef, Layer};
use capsule_proto::{CapsuleId, RootHash};
use positioned_io::ReadAt;

use super::capture::stored;
use super::front::{InFront, Resumed};
use super::rebase::{Made, keep, settle};
use crate::control::{Failure, FailureCode, Phase};
use crate::encoding::DraftLayer;
use crate::held::{blobs_of, layer_blobs, make_the_same};
use crate::materialise::{RETRY, has_room_for};
use crate::node::Node;
use crate::records::KnownLayer;
use crate::store::LayerBlobs;
use crate::work::{Task, Work, blocking};

/// How often a layer is put in another order: each is a pack of its own.
const MAX_ORDERS: u64 = 2;
/// That is worth it if so many bytes less are fetched of what is read first: some seconds of a thin link;
const LEAST_SAVED: u64 = 128 << 10;
/// if that is this part of what is fetched, and this part of the pack, which is kept once more.
const LEAST_PART: u64 = 8;
const LEAST_PART_OF_PACK: u64 = 64;
/// Longest index that is put in another order: it is held whole.
const MAX_INDEX: u64 = 64 << 20;
/// What is told comes by several records, one after the other.
const PAUSE: Duration = Duration::from_secs(2);
/// For so many words on one layer this is tried while the node runs: each may take seconds of a core.
const MAX_WORDS: u64 = 8;
/// What was looked at and is remembered; beyond, it is looked at again.
const MAX_SEEN: usize = 4096;
/// Chunk groups of a pack that are verified at a time.
const VERIFIED_AT_ONCE: u64 = 1024;

/// A layer as it is, and what is read first of the component that it makes.
struct Candidate {
    capsule: CapsuleId,
    component: Component,
    layer: Layer,
    /// The number of the next order of it.
    order: u64,
    reads: Vec<Range<u64>>,
}

/// Looks whenever somebody told; for ever.
pub async fn run(node: Arc<Node>) {
    // By the layer's index.
    let mut seen: BTreeMap<RootHash, Seen> = BTreeMap::new();
    node.records.look_at_reads();
    loop {
        node.records.told_of_reads().await;
        tokio::time::sleep(PAUSE).await;
        let shared = node.clone();
        let found = match blocking(move || candidates(&shared)).await {
            Ok(found) => found,
            Err(failure) => {
                let why = failure.message;
                node.trouble(format!("looking for what is read first: {why}"));
                continue;
            }
        };
        for candidate in found {
            let layer = candidate.layer.index.root;
            if seen.len() >= MAX_SEEN && !seen.contains_key(&layer) {
                seen.clear();
            }
            let last = seen.entry(layer).or_default();
            if !last.is_due(candidate.key()) {
                continue;
            }
            let name = candidate.component.name.clone();
            let outcome = put_in_order(&node, candidate).await;
            if let Err(failure) = &outcome {
                // It is as it was, only slower to resume from.
                let why = &failure.message;
                tracing::info!(name, why, "what is read first lies where it was");
            }
            last.again = outcome.is_err().then(|| Instant::now() + RETRY);
        }
    }
}

/// What was last done of a layer.
#[derive(Default)]
struct Seen {
    /// The hash of what was to be read first.
    reads: Option<RootHash>,
    /// When it is to be done again: what is in order, or not worth it, never.
    again: Option<Instant>,
    /// For how many different words.
    words: u64,
}

impl Seen {
    /// Whether something is to be done for what is told of the layer; that is noted. Whatever is told, there is an end of it.
    fn is_due(&mut self, reads: RootHash) -> bool {
        if self.reads == Some(reads) {
            return self.again.is_some_and(|at| at <= Instant::now());
        }
        (self.reads, self.again) = (Some(reads), None);
        self.words += 1;
        self.words <= MAX_WORDS
    }
}

impl Candidate {
    /// The same for as long as there is nothing new to do.
    fn key(&self) -> RootHash {
        let bytes = |range: &Range<u64>| [range.start.to_le_bytes(), range.end.to_le_bytes()];
        let reads: Vec<u8> = self.reads.iter().flat_map(bytes).flatten().collect();
        RootHash::of(&reads)
    }
}

/// The layers of this machine to what is here and of which it is told what is read first.
fn candidates(node: &Node) -> Result<Vec<Candidate>, Failure> {
    let mut found = Vec::new();
    if !node.identity.credential.grant().roles.publisher {
        return Ok(found);
    }
    for (capsule, held) in node.store.capsules()? {
        let manifest = node.holdings.manifest(&capsule).filter(|_| held.complete);
        let components = manifest
            .into_iter()
            .flat_map(|manifest| manifest.components);
        for component in components {
            let reads = node.records.first_reads_of(&component.root)?;
            if reads.is_empty() {
                continue;
            }
            let layers = own_layers(node, &component)?.into_iter();
            found.extend(layers.map(|(layer, order)| Candidate {
                capsule,
                component: component.clone(),
                layer,
                order,
                reads: reads.clone(),
            }));
        }
    }
    Ok(found)
}

/// The layers to a component that this machine told of, each in the newest order that it has, and the number of the next; without those
/// that have enough of them.
fn own_layers(node: &Node, component: &Component) -> Result<Vec<(Layer, u64)>, Failure> {
    let mut known = node.records.layers_to(&component.root)?;
    let own = node.identity.machine.machine();
    known.retain(|known| {
        let is_stream = known.layer.space == Space::Stream && known.layer.pack.is_some();
        known.signer == own && is_stream
    });
    known.sort_by_key(|known| (Reverse(known.sequence), known.layer.index.root));
    let mut newest: Vec<(Layer, u64)> = Vec::new();
    for KnownLayer { layer, .. } in &known {
        let blobs = layer_blobs(layer);
        let is_here = blobs_of(&[blobs]).all(|blob| node.holdings.is_complete(&blob));
        if !is_here || newest.iter().any(|(of, _)| make_the_same(of, layer)) {
            continue;
        }
        // Also of those that were lost: what was told of stays told.
        let of_it = known.iter().filter(|of| make_the_same(&of.layer, layer));
        let highest = of_it.map(|of| of.sequence).max().unwrap_or_default();
        if highest < MAX_ORDERS {
            newest.push((layer.clone(), highest + 1));
        }
    }
    Ok(newest)
}

/// Makes the layer in another order, keeps and announces it, if that is worth it.
async fn put_in_order(node: &Arc<Node>, candidate: Candidate) -> Result<(), Failure> {
    let task = Task {
        phase: Phase::Publishing,
        total: None,
        what: Some(candidate.component.name.clone()),
    };
    let (shared, capsule) = (node.clone(), candidate.capsule);
    let making = move |work: &Work| reordered(&shared, &candidate, work);
    match node.works.run_behind(task, making).await? {
        Some(made) => settle(node, capsule, vec![made]).await,
        None => Ok(()),
    }
}

fn reordered(node: &Node, candidate: &Candidate, work: &Work) -> Result<Option<Made>, Failure> {
    let Candidate {
        component,
        layer,
        reads,
        ..
    } = candidate;
    let Some(pack) = layer.pack.filter(|_| layer.index.size <= MAX_INDEX) else {
        return Ok(None);
    };
    let (store, blobs) = (&node.store, layer_blobs(layer));
    // Not removed while it is read.
    let _old = store.guard(blobs_of(&[blobs]));
    let index = store.read_whole(&blobs.index, MAX_INDEX)?;
    let content = stored(store, component)?;
    let outboard = store.open_outboard(&component.root)?;
    let resumed = Resumed {
        kind: component.kind,
        content: &*content,
        hashed: Hashed {
            tree: Tree {
                root: component.root,
                size: component.size,
            },
            outboard: &*outboard,
        },
        reads,
        behind: true,
    };
    let least = LEAST_SAVED.max(pack.size / LEAST_PART_OF_PACK);
    let room = |len| match has_room_for(store, node.home.dir(), len) {
        true => Ok(()),
        false => Err(Failure::new(FailureCode::Full, "there is no room for it")),
    };
    // Before the work; what is made may be longer.
    room(pack.size)?;
    let front = InFront::of(&index, pack.size, &resumed, least, work);
    let front = front.map_err(|failure| match failure.code {
        FailureCode::Changed => damaged(&component.root),
        _ => failure,
    })?;
    let Some(front) = front else {
        return Ok(None);
    };
    let (saved, scattered) = (front.saved(), front.scattered());
    // Who has begun it may fetch all of it.
    if saved
        < least
            .max(scattered / LEAST_PART)
            .max(front.growth(pack.size))
    {
        return Ok(None);
    }
    room(front.pack_len())?;
    check_pack(node, &pack, work)?;
    let bytes = store.open_blob(&pack.root)?;
    let read = |at, into: &mut [u8]| {
        let read = bytes.read_exact_at(at, into);
        read.map_err(|error| Failure::new(FailureCode::Io, error.to_string()))
    };
    let (index, pack) = front.write(store, read, work)?;
    let draft = DraftLayer {
        space: layer.space,
        parent: layer.parent,
        blobs: LayerBlobs {
            index: RootHash::of(&index),
            pack: Some(pack.blob.root),
        },
        index,
        pack: Some(pack),
    };
    let name = &component.name;
    tracing::info!(
        name,
        scattered,
        saved,
        "what is read first lies in front from now on"
    );
    let target = (layer.target, layer.target_size);
    keep(node, draft, candidate.order, target).map(Some)
}

/// Fails where the disk has damaged a pack: that must not get a name of its own.
fn check_pack(node: &Node, pack: &BlobRef, work: &Work) -> Result<(), Failure> {
    let end = group_count(pack.size);
    for first in (0..end).step_by(VERIFIED_AT_ONCE as usize) {
        work.check()?;
        let part = first..(first + VERIFIED_AT_ONCE).min(end);
        if !node.store.verify_part(&pack.root, part)?.bad.is_empty() {
            return Err(damaged(&pack.root));
        }
    }
    Ok(())
}

fn damaged(what: &RootHash) -> Failure {
    Failure::new(FailureCode::Damaged, format!("{what} is damaged"))
        .hint("`capsule verify --repair` fetches what is missing")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_word_is_heard_once_and_of_others_only_so_many() {
        let word = |n: u64| RootHash::of(&n.to_le_bytes());
        let mut seen = Seen::default();
        assert!(seen.is_due(word(0)) && !seen.is_due(word(0)));
        seen.again = Some(Instant::now());
        assert!(seen.is_due(word(0)), "it has failed");
        for n in 1..MAX_WORDS {
            assert!(seen.is_due(word(n)), "{n}");
        }
        seen.again = Some(Instant::now());
        assert!(!seen.is_due(word(MAX_WORDS)) && !seen.is_due(word(MAX_WORDS)));
    }
}
