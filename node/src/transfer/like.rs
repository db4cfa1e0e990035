//! Hashing: what a pull need not fetch because this machine has it otherwise, in another capsule or in data that the user points at.
//!
//! Where nothing that is here leads to a component, the frame tables of its layers say by hash what their packs hold. What is found is
//! not fetched; the component is then made of both, and kept in a layer of its own (`transfer::build`), as what others
//! publish cannot be made of it byte by byte.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use capsule_chunker::content::Source;
use capsule_chunker::image::{self, ImageOptions, ReadAs};
use capsule_chunker::layer::reach::rounded;
use capsule_chunker::layer::read::{LayerCache, LayerContent, ReadOptions};
use capsule_chunker::layer::{Cuts, Storage};
use capsule_chunker::like::Likeness;
use capsule_chunker::tree::{ScanOptions, scan};
use capsule_proto::index::Space;
use capsule_proto::manifest::{Component, ComponentKind};
use capsule_proto::{GroupRanges, RootHash};

use super::prepare::ComponentPlan;
use crate::control::{Failure, FailureCode, Phase};
use crate::held::HeldWay;
use crate::layers::{no_pack, open_all, open_pack};
use crate::node::Node;
use crate::publish::own_within;
use crate::store::{BlobKind, LayerBlobs};
use crate::work::{Task, Tell, Work};

/// Packs that are shorter are fetched whole.
const WORTH_LOOKING: u64 = 256 << 10;
/// What is found must save one part in so many of what would be fetched: the rest is encoded anew for it.
const LEAST_PART: u64 = 16;
/// Most layers that are looked at for what is wanted.
const MAX_LAYERS: usize = 4096;

/// What was found of a component.
pub struct Like {
    likeness: Likeness,
    /// The layers of its content, from nothing on.
    pub layers: Vec<LayerBlobs>,
    /// By pack: what of it is to be fetched.
    pub groups: BTreeMap<RootHash, GroupRanges>,
    /// Bytes of packs that need not be.
    pub saved: u64,
}

impl fmt::Debug for Like {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Like")
            .field("layers", &self.layers)
            .field("saved", &self.saved)
            .finish_non_exhaustive()
    }
}

/// Looks for what each component takes that is not here, where it is read from nothing on.
pub(super) async fn look(
    node: &Arc<Node>,
    plans: Vec<ComponentPlan>,
    path: Option<&Path>,
    tell: &dyn Tell,
) -> Result<Vec<ComponentPlan>, Failure> {
    // What several components read is fetched whole.
    let mut users: BTreeMap<RootHash, usize> = BTreeMap::new();
    for blob in plans.iter().flat_map(|plan| plan.way.blobs()) {
        *users.entry(blob).or_default() += 1;
    }
    let is_shared = |plan: &ComponentPlan| plan.way.blobs().iter().any(|blob| users[blob] > 1);
    let worth_it: Vec<bool> = plans
        .iter()
        .map(|plan| !is_shared(plan) && is_worth_it(node, plan))
        .collect();
    if !worth_it.contains(&true) {
        return Ok(plans);
    }
    let task = Task {
        phase: Phase::Planning,
        total: None,
        what: path.map(|path| path.display().to_string()),
    };
    let (shared, path) = (node.clone(), path.map(Path::to_owned));
    let looking = move |work: &Work| {
        let mut plans = plans;
        for (plan, worth_it) in plans.iter_mut().zip(worth_it) {
            if worth_it {
                plan.like = look_for(&shared, plan, path.as_deref(), work)?.map(Arc::new);
            }
        }
        Ok(plans)
    };
    node.works.run(task, tell, looking).await
}

/// Whether local data can be looked at at all: what cannot is told before anything is done.
pub(super) fn check_path(path: &Path) -> Result<(), Failure> {
    let found = std::fs::metadata(path).map_err(|error| {
        let message = format!("cannot read {}: {error}", path.display());
        Failure::new(crate::failure::io_code(&error), message)
            .hint("check the path after --like; the node reads it, not the command")
    });
    found.map(drop)
}

/// The layers of a component's content, if all of them are to be fetched, from nothing on.
fn new_layers(plan: &ComponentPlan) -> Option<&[LayerBlobs]> {
    let (space, layers) = match &plan.way {
        HeldWay::Layers(layers) => (Space::Stream, layers),
        HeldWay::Tree(way) => (Space::Contents, &way.contents),
        HeldWay::Blob => return None,
    };
    let new = plan.layers.iter().filter(|layer| layer.space == space);
    (!plan.held && !layers.is_empty() && new.count() == layers.len()).then_some(layers)
}

/// The packs of these layers that are not all here, and long enough.
fn missing_packs(node: &Node, plan: &ComponentPlan) -> Vec<(RootHash, u64)> {
    let packs = new_layers(plan).unwrap_or_default().iter();
    let packs = packs.filter_map(|layer| {
        let pack = layer.pack?;
        let (size, kind) = *plan.blobs.get(&pack)?;
        (kind == BlobKind::Pack).then_some((pack, size))
    });
    packs
        .filter(|(pack, size)| *size >= WORTH_LOOKING && !node.holdings.is_complete(pack))
        .collect()
}

fn is_worth_it(node: &Node, plan: &ComponentPlan) -> bool {
    !missing_packs(node, plan).is_empty()
}

fn look_for(
    node: &Node,
    plan: &ComponentPlan,
    path: Option<&Path>,
    work: &Work,
) -> Result<Option<Like>, Failure> {
    let layers = new_layers(plan).unwrap_or_default().to_vec();
    let cache = LayerCache::new(&ReadOptions { cache_len: 0 });
    let opened = open_all(&node.store, &layers, &cache, &no_pack, &|_, content| {
        Ok(content)
    })?;
    let mut likeness = Likeness::new();
    for layer in &opened {
        likeness.want(layer, work)?;
    }
    look_in_held(node, &mut likeness, work)?;
    if let Some(path) = path.filter(|_| likeness.is_open()) {
        look_in_path(node, &mut likeness, path, plan.component.kind, work)?;
    }
    let missing = missing_packs(node, plan);
    let (mut groups, mut saved, mut all) = (BTreeMap::new(), 0, 0);
    for (layer, blobs) in opened.iter().zip(&layers) {
        let Some((pack, size)) = missing
            .iter()
            .find(|(pack, _)| blobs.pack == Some(*pack))
            .copied()
        else {
            continue;
        };
        let mut wanted = rounded(&likeness.local(layer, work)?.1, size);
        let mut lacking = GroupRanges::all(size);
        if let Some(reached) = plan.reached.get(&pack) {
            wanted = wanted.intersection(reached);
            lacking = reached.clone();
        }
        let here = node.store.durable(&pack).map(|here| here.ranges);
        lacking = lacking.difference(&here.unwrap_or_default());
        all += lacking.bytes(size);
        saved += lacking.difference(&wanted).bytes(size);
        groups.insert(pack, wanted);
    }
    Ok((saved > 0 && saved >= all / LEAST_PART).then_some(Like {
        likeness,
        layers,
        groups,
        saved,
    }))
}

/// Looks in all capsules that are here, by the frame tables of their layers.
fn look_in_held(node: &Node, likeness: &mut Likeness, work: &Work) -> Result<(), Failure> {
    let (mut seen, cache) = (HashSet::new(), LayerCache::new(&ReadOptions::default()));
    for (id, held) in node.store.capsules()? {
        let manifest = node.holdings.manifest(&id).filter(|_| held.complete);
        for component in manifest.iter().flat_map(|manifest| &manifest.components) {
            work.check()?;
            if !likeness.is_open() || seen.len() >= MAX_LAYERS {
                return Ok(());
            }
            let layers = node.holdings.recipe(space_of(component), &component.root)?;
            let layers = layers.unwrap_or_default();
            if layers.iter().all(|layer| seen.contains(&layer.index)) {
                continue;
            }
            // What cannot be read any more is no reason to fail: it is fetched.
            let Ok(opened) = open_held(node, &layers, &cache) else {
                continue;
            };
            for (layer, blobs) in opened.iter().zip(&layers) {
                if !seen.insert(blobs.index) {
                    continue;
                }
                let here = blobs.pack.and_then(|pack| node.store.durable(&pack));
                let part = here.filter(|here| !here.complete).map(|here| here.ranges);
                if likeness.look_in_layer(layer, part.as_ref(), work).is_err() {
                    work.check()?;
                    break;
                }
            }
        }
    }
    Ok(())
}

const fn space_of(component: &Component) -> Space {
    match component.kind {
        ComponentKind::Tree => Space::Contents,
        _ => Space::Stream,
    }
}

fn open_held(
    node: &Node,
    layers: &[LayerBlobs],
    cache: &LayerCache,
) -> Result<Vec<Arc<LayerContent>>, Failure> {
    let pack = |layer: &LayerBlobs| open_pack(&node.store, layer);
    let finish = |_: &LayerBlobs, content| Ok(content);
    open_all(&node.store, layers, cache, &pack, &finish)
}

/// Looks in local data: an image or device as its disk, a directory as its files. It may change at any time, and parts of it may be
/// unreadable: what was found before counts, and the rest is fetched.
fn look_in_path(
    node: &Node,
    likeness: &mut Likeness,
    path: &Path,
    kind: ComponentKind,
    work: &Work,
) -> Result<(), Failure> {
    let cuts = match kind {
        ComponentKind::Disk | ComponentKind::Ram => Cuts::Pages,
        _ => Cuts::Bytes,
    };
    let mut look = || -> Result<(), Failure> {
        let source: Arc<dyn Source> = if path.is_dir() {
            let options = ScanOptions {
                one_file_system: true,
                without: own_within(node.home.dir(), path)?,
            };
            Arc::new(scan(path, &options)?)
        } else {
            let read_as = match kind {
                ComponentKind::Disk => ReadAs::Auto,
                _ => ReadAs::File,
            };
            Arc::from(image::open(path, &ImageOptions { read_as })?.source)
        };
        Ok(likeness.look_in(source, cuts, work)?)
    };
    let looked = look();
    work.check()?;
    if let Err(failure) = looked {
        let path = path.display();
        node.trouble(format!(
            "{path} could not be looked at to its end: {}",
            failure.message
        ));
    }
    Ok(())
}

impl Like {
    /// The component's content: frames that were found come from where they were found, the others from what was fetched.
    pub fn open(&self, node: &crate::store::Store) -> Result<Arc<LayerContent>, Failure> {
        let pack = |layer: &LayerBlobs| -> Result<Storage, Failure> {
            Ok(match &layer.pack {
                // All of it was found: nothing of it was fetched.
                Some(pack) if self.groups.get(pack).is_some_and(GroupRanges::is_empty) => {
                    Arc::new(Vec::<u8>::new())
                }
                Some(pack) if self.groups.contains_key(pack) => node.open_partial(pack)?,
                _ => open_pack(node, layer)?,
            })
        };
        let finish = |layer: &LayerBlobs, content: LayerContent| {
            let is_partial = layer
                .pack
                .is_some_and(|pack| self.groups.contains_key(&pack));
            if !is_partial {
                return Ok(content);
            }
            let (local, _) = self.likeness.local(&content, &())?;
            Ok(content.with_local(local))
        };
        let cache = LayerCache::new(&ReadOptions::default());
        let mut all = open_all(node, &self.layers, &cache, &pack, &finish)?;
        let nothing = || Failure::new(FailureCode::Internal, "a component without layers");
        all.pop().ok_or_else(nothing)
    }
}
