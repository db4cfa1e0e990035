//! Indexes, as a plan takes them: whole; or, for who reads while it comes, of a long one only what tells where its pages lie.
//!
//! An index begins with its directory and the pages of runs; behind lie the pages of frames, which are most of it. Of a machine's disk a guest reads
//! here and there, so that few of them are wanted before it answers: those come with what is read through them.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use capsule_proto::index::Directory;
use capsule_proto::ranges::{group_count, groups_touching};
use capsule_proto::record::{BlobRef, Layer};
use capsule_proto::{GroupRanges, RootHash};

use super::fetch::{Fetched, Manner, Wanted, fetch};
use super::patience::Patience;
use super::prepare::ComponentPlan;
use super::search::{Reach, reach_of};
use crate::control::{Failure, FailureCode};
use crate::held::fits;
use crate::layers::{open_index, read_directory, read_up_to};
use crate::node::Node;
use crate::store::{BlobKind, Store};
use crate::work::{Tell, blocking};

/// Up to so many bytes an index comes whole in any case: its parts would cost more in words than they save.
const SHORT: u64 = 64 << 10;

/// How often it is looked what has to come of an index: the head, the directory, the runs, once more what was found damaged meanwhile; and then nothing.
const ROUNDS: usize = 5;

/// Fetches the indexes of the components' layers that are not here, in part where that is wanted. If that fails, with what was being fetched.
pub(super) async fn fetch_indexes(
    node: &Node,
    components: &[ComponentPlan],
    in_part: bool,
    (manner, patience): (&Manner, &Patience),
    tell: &dyn Tell,
    planning: &mut Fetched,
) -> Result<(), (Vec<Wanted>, Failure)> {
    let is_long = |size: u64| in_part && size > SHORT;
    let (long, short): (Indexes, Indexes) = lacking(node, components)
        .into_iter()
        .partition(|(_, size)| is_long(*size));
    let short = short.iter().map(|(root, size)| wanted(*root, *size, None));
    let mut short: Vec<Wanted> = short.collect();
    // What is here tells what else is needed: the head, how long the directory is; that, where the pages of frames begin.
    for _ in 0..ROUNDS {
        let (store, known) = (node.store.clone(), long.clone());
        let more = blocking(move || more_of(&store, &known)).await;
        let mut more = more.map_err(|failure| (Vec::new(), failure))?;
        more.append(&mut short);
        if more.is_empty() {
            return Ok(());
        }
        let fetched = fetch(node, more.clone(), manner, patience, tell, planning);
        if let Err(failure) = fetched.await {
            return Err((more, failure));
        }
    }
    let message = "the indexes of its layers came, and are not here";
    let failure = Failure::new(FailureCode::Io, message);
    let hint = "the same command fetches them again; look at the disk's health";
    Err((Vec::new(), failure.hint(hint)))
}

/// Whether all of every index can be had that is not all here.
pub(super) async fn whole_reachable(node: &Node, components: &[ComponentPlan]) -> bool {
    for (root, size) in lacking(node, components) {
        let (blob, all) = (BlobRef { root, size }, GroupRanges::all(size));
        if reach_of(&node.network, &node.store, &blob, &all).await != Reach::All {
            return false;
        }
    }
    true
}

/// Indexes, with their sizes.
type Indexes = BTreeMap<RootHash, u64>;

/// The indexes of the components' layers that are not all here.
fn lacking(node: &Node, components: &[ComponentPlan]) -> Indexes {
    let layers = components.iter().flat_map(|plan| &plan.layers);
    let indexes = layers.map(|layer| (layer.index.root, layer.index.size));
    indexes
        .filter(|(root, _)| !node.holdings.is_complete(root))
        .collect()
}

fn wanted(root: RootHash, size: u64, groups: Option<Range<u64>>) -> Wanted {
    Wanted {
        root,
        size: Some(size),
        kind: BlobKind::Index,
        groups: groups.map(Into::into),
    }
}

/// What of these indexes has to come next. Blocks.
fn more_of(store: &Store, indexes: &Indexes) -> Result<Vec<Wanted>, Failure> {
    let mut more = Vec::new();
    for (root, size) in indexes {
        let here = store.durable(root).map(|here| here.ranges);
        let here = here.unwrap_or_default();
        if !here.contains_run(&(0..1)) {
            more.push(wanted(*root, *size, Some(0..1)));
            continue;
        }
        let mut head = [0; Directory::HEAD_LEN];
        let index = open_index(store, root)?;
        // One that is none is found when it is checked.
        let needed = read_up_to(&*index, &mut head).ok();
        let Some(Ok(needed)) = needed.map(|len| Directory::needed(&head[..len])) else {
            continue;
        };
        let within = |end: u64| groups_touching(&(0..end)).end.min(group_count(*size));
        let mut end = within(needed as u64);
        if here.contains_run(&(0..end)) {
            let Ok(directory) = read_directory(&*index) else {
                continue;
            };
            end = within(directory.frames_at());
        }
        if !here.contains_run(&(0..end)) {
            more.push(wanted(*root, *size, Some(0..end)));
        }
    }
    Ok(more)
}

/// Whether the indexes are what the layers' records say, and can be read here; layers of which they are not what was said are
/// never tried again, by no pull. What the disk has damaged is to come again.
pub(super) async fn check_indexes(
    node: &Node,
    components: &[ComponentPlan],
) -> Result<bool, Failure> {
    let layers = components.iter().flat_map(|plan| &plan.layers);
    let layers: HashSet<Layer> = layers.cloned().collect();
    let store = node.store.clone();
    let (wrong, fine) = blocking(move || {
        let (mut wrong, mut all_fine) = (Vec::new(), true);
        for layer in layers {
            if !is_as_recorded(&store, &layer) {
                all_fine = false;
                if is_wrong(&store, &layer)? {
                    wrong.push(layer);
                }
            }
        }
        Ok((wrong, all_fine))
    })
    .await?;
    wrong
        .into_iter()
        .for_each(|layer| node.transfers.refuse(layer));
    Ok(fine)
}

/// Whether what is here of a layer's index is what its record says.
fn is_as_recorded(store: &Store, layer: &Layer) -> bool {
    let index = open_index(store, &layer.index.root);
    let directory = index.and_then(|index| read_directory(&*index));
    let pack_len = layer.pack.map_or(0, |pack| pack.size);
    directory.is_ok_and(|directory| {
        fits(directory.header(), layer)
            && directory.pack_len() == pack_len
            && directory.index_len() == layer.index.size
    })
}

/// Whether the index of a layer is not what its record says, though the disk has damaged nothing of it, and nobody took it out or had it come again meanwhile.
fn is_wrong(store: &Store, layer: &Layer) -> Result<bool, Failure> {
    let root = &layer.index.root;
    let present = || store.present(root).map(|here| here.ranges);
    let before = present();
    let has_head = before
        .as_ref()
        .is_some_and(|here| here.contains_run(&(0..1)));
    let is_sound = store.verify(root)?.is_empty() && present() == before;
    Ok(has_head && is_sound && !is_as_recorded(store, layer))
}
