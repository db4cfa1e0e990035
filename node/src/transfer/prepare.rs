//! What a pull takes: the manifest, the cheapest way to each component, and which blobs that needs.
//!
//! Fetches manifest and indexes, and nothing else (of long indexes the beginning, for who reads while it comes); so `plan` and the beginning of a pull are the same code, and their
//! figures agree to the byte.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use capsule_chunker::layer::Tally;
use capsule_proto::manifest::{Component, Manifest};
use capsule_proto::record::{BlobRef, Layer};
use capsule_proto::{CapsuleId, GroupRanges, RootHash};

use super::fetch::{Fetched, Manner, Wanted, fetch};
use super::indexes::{check_indexes, fetch_indexes, whole_reachable};
use super::like::{Like, look};
use super::part::{short, with_reached};
use super::patience::{Mood, Patience};
use super::search::{Choice, Reach, choose, reach_of};
use super::shared::waiting;
use super::{LOOK, settled};
use crate::control::{ComponentInfo, Failure, FailureCode, Phase, PlannedComponent};
use crate::held::{HeldWay, blobs_of, check_len, component_info, layer_blobs};
use crate::layers::{Beside, beside, open_index, read_directory};
use crate::node::Node;
use crate::records::Resolution;
use crate::store::{ActiveGuard, BlobKind, LayerBlobs, Presence, Reached, Store};
use crate::work::{Tell, blocking};

/// How often other layers are tried for ones that nobody has, or that are not what their record says.
pub const MAX_TRIES: usize = 8;
/// A pull, thought through.
#[derive(Debug)]
pub struct Prepared {
    /// The manifest.
    pub manifest: Manifest,
    /// Its components and the ways to them.
    pub components: Vec<ComponentPlan>,
    /// What was fetched for this: manifest and indexes.
    pub planning: Fetched,
    /// Bytes of the manifest.
    pub manifest_size: u64,
    /// Keeps all that it takes from removal.
    _guard: (ActiveGuard, ActiveGuard),
}

/// How a component is come by.
#[derive(Debug, Clone)]
pub struct ComponentPlan {
    /// The component.
    pub component: Component,
    /// Whether all of it was here before, checked.
    pub held: bool,
    /// How it is read when all blobs are here.
    pub way: HeldWay,
    /// The layers that its way takes beside those held, as their records say them.
    pub layers: Vec<Layer>,
    /// The blobs that this takes, as far as no component before this one takes them.
    pub blobs: BTreeMap<RootHash, (u64, BlobKind)>,
    /// What those layers consist of.
    pub tally: Tally,
    /// What of its packs it takes, where that is not all of them: with what other components of the capsule take of the same.
    pub reached: Reached,
    /// What of its packs is made of what this machine has otherwise.
    pub like: Option<Arc<Like>>,
}

impl Prepared {
    /// Bytes by component that are here, and that are not.
    pub fn components(&self, node: &Node) -> Vec<PlannedComponent> {
        self.components
            .iter()
            .map(|plan| plan.describe(node))
            .collect()
    }

    /// What a pull fetches: blobs that are not all here.
    pub fn wanted(&self, node: &Node) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        for plan in &self.components {
            for (root, (size, kind)) in &plan.blobs {
                if node.holdings.is_complete(root) {
                    continue;
                }
                let groups = plan.groups(root).cloned();
                if groups.is_some() && plan.missing(node, root, *size) == 0 {
                    continue;
                }
                wanted.push(Wanted {
                    root: *root,
                    size: Some(*size),
                    kind: *kind,
                    groups,
                });
            }
        }
        wanted
    }

    /// Bytes of the manifest and all blobs that are here, but for those that this pull fetched before.
    pub fn had_bytes(&self, node: &Node, capsule: &CapsuleId, fetched: &[&Fetched]) -> u64 {
        let blobs = self.components.iter().flat_map(|plan| plan.blobs.keys());
        blobs
            .chain([&capsule.0])
            .map(|root| {
                let here = node.holdings.bytes_here([*root]);
                let came = fetched.iter().filter_map(|fetched| fetched.blobs.get(root));
                here.saturating_sub(came.sum())
            })
            .sum()
    }

    /// Bytes of the manifest and all blobs.
    pub fn total_bytes(&self) -> u64 {
        let blobs = self.components.iter().flat_map(|plan| {
            let taken = |(root, (size, _)): (&RootHash, &(u64, BlobKind))| {
                let part = plan.reached.get(root);
                part.map_or(*size, |groups| groups.bytes(*size))
            };
            plan.blobs.iter().map(taken)
        });
        blobs.sum::<u64>() + self.manifest_size
    }

    /// All roots that the capsule takes here.
    pub fn roots(&self) -> Vec<RootHash> {
        roots(&self.components).collect()
    }
}

/// All roots that components take.
fn roots(components: &[ComponentPlan]) -> impl Iterator<Item = RootHash> + '_ {
    components
        .iter()
        .flat_map(|plan| plan.blobs.keys().copied().chain([plan.component.root]))
}

impl ComponentPlan {
    /// Which chunk groups of a blob are needed, where not all are.
    pub(super) fn groups(&self, blob: &RootHash) -> Option<&GroupRanges> {
        let like = self.like.as_ref();
        let like = like.and_then(|like| like.groups.get(blob));
        like.or_else(|| self.reached.get(blob))
    }

    /// Bytes of a blob that are needed and not here.
    pub(super) fn missing(&self, node: &Node, blob: &RootHash, size: u64) -> u64 {
        match self.groups(blob) {
            Some(groups) => {
                let here = node.store.durable(blob).map(|here| here.ranges);
                groups.difference(&here.unwrap_or_default()).bytes(size)
            }
            None => size.saturating_sub(node.holdings.bytes_here([*blob])),
        }
    }

    fn describe(&self, node: &Node) -> PlannedComponent {
        let (mut have, mut fetch) = (0, 0);
        for (root, (bytes, _)) in &self.blobs {
            have += node.holdings.bytes_here([*root]);
            fetch += self.missing(node, root, *bytes);
        }
        let component: ComponentInfo = component_info(&self.component);
        let (way, layers) = match &self.way {
            HeldWay::Blob => ("blob", 0),
            HeldWay::Layers(layers) => ("layers", layers.len()),
            HeldWay::Tree(way) => ("layers", way.contents.len().max(way.listing.len())),
        };
        PlannedComponent {
            component,
            way: way.to_owned(),
            layers,
            have,
            inherited: self.tally.inherited,
            copied: self.tally.copied,
            referring: self.tally.referring,
            new: self.tally.new,
            found: self.like.as_ref().map_or(0, |like| like.saved),
            fetch,
        }
    }
}

/// What a pull tried in vain, and does not try again.
#[derive(Debug, Default)]
pub struct Excluded {
    /// Blobs that did not come.
    pub blobs: HashSet<RootHash>,
    /// Packs of which connected machines lack something that is needed.
    pub short: HashSet<RootHash>,
    /// Layers that are not what their records say.
    pub layers: HashSet<Layer>,
    /// Local data, which changed while it was read.
    pub like: bool,
    /// Why the last of them was excluded: what is said if there is nothing else.
    pub failure: Option<Failure>,
}

impl Excluded {
    /// After a fetch failed: what of it nobody has all of, or all of it if that is not why. The failure if nothing changes.
    pub async fn missing(
        &mut self,
        node: &Node,
        wanted: &[Wanted],
        failure: Failure,
    ) -> Result<(), Failure> {
        let (mut missing, mut absent) = (Vec::new(), Vec::new());
        for wanted in wanted {
            let root = &wanted.root;
            let blob = BlobRef {
                root: *root,
                size: wanted.size.unwrap_or_default(),
            };
            let groups = wanted.groups.clone();
            let groups = groups.unwrap_or_else(|| GroupRanges::all(blob.size));
            let here = node.store.durable(root);
            let has_all = |here: Presence| groups.difference(&here.ranges).is_empty();
            let is_here = wanted.size.is_some() && here.is_some_and(has_all);
            if is_here || node.holdings.is_complete(root) {
                continue;
            }
            missing.push(*root);
            if reach_of(&node.network, &node.store, &blob, &groups).await != Reach::All {
                absent.push(*root);
            }
        }
        let of_layers = matches!(
            failure.code,
            FailureCode::Unreachable | FailureCode::Damaged
        );
        match of_layers {
            true if absent.is_empty() => self.absent(missing, failure),
            true => self.absent(absent, failure),
            false => Err(failure),
        }
    }

    /// A layer that reads something to which no way is known, though it may be right.
    fn unreadable(&mut self, layer: Layer) {
        self.layers.insert(layer);
        let message = "its layers read other components, to which no layers are known";
        self.failure = Some(Failure::new(FailureCode::Unreachable, message).hint(
            "records arrive from connected peers: wait, or start the machine that published it",
        ));
    }

    /// After layers turned out wrong; the failure if nothing changes.
    pub fn wrong(&mut self, layers: &[Layer], failure: Failure) -> Result<(), Failure> {
        let before = self.layers.len();
        self.layers.extend(layers.iter().cloned());
        self.then(self.layers.len() > before, failure)
    }

    fn absent(&mut self, blobs: Vec<RootHash>, failure: Failure) -> Result<(), Failure> {
        let before = self.blobs.len();
        self.blobs.extend(blobs);
        self.then(self.blobs.len() > before, failure)
    }

    fn then(&mut self, changed: bool, failure: Failure) -> Result<(), Failure> {
        if !changed {
            return Err(failure);
        }
        self.failure = Some(failure);
        Ok(())
    }
}

/// Finds out what a pull takes.
pub async fn prepare(
    node: &Arc<Node>,
    resolution: &Resolution,
    manner: &Manner,
    patience: &Patience,
    tell: &dyn Tell,
    excluded: &mut Excluded,
) -> Result<Prepared, Failure> {
    let manner = Manner {
        phase: Phase::Planning,
        ..manner.clone()
    };
    // What comes belongs to nothing yet: without guards a collection would take it away before it is read.
    let _manifest = node.store.guard([resolution.capsule.0]);
    let mut planning = Fetched::default();
    let manifest = manifest(node, resolution, (&manner, patience), tell, &mut planning).await?;
    let manifest_size = manifest.encode().len() as u64;
    let mut in_part = manner.paged;
    for tries in (1..=MAX_TRIES).rev() {
        let choice = choose_in_time(node, &manifest, (&manner, patience), tell, excluded).await?;
        let guard = roots(&choice.components).chain([resolution.capsule.0]);
        let guard = node.store.guard(guard);
        let (plans, how) = (&choice.components, (&manner, patience));
        let fetched = fetch_indexes(node, plans, in_part, how, tell, &mut planning);
        if let Err((wanted, failure)) = fetched.await {
            excluded.missing(node, &wanted, failure).await?;
            continue;
        }
        if check_indexes(node, &choice.components).await?
            && let Some(components) = with_beside(node, choice.components, excluded).await?
        {
            let guard = (guard, node.store.guard(roots(&components)));
            let components = match in_part {
                true => components,
                false => tallied(node, components).await?,
            };
            let mut components = with_reached(node, components, tell).await?;
            // What is read of a pack may be had where not all of it is, which the choice hoped for.
            let short = short(node, &components).await;
            // Where not all of a pack can be had, only whole indexes tell whether what is needed can; if these can be had.
            if in_part && !short.is_empty() && tries > 1 && whole_reachable(node, &components).await
            {
                in_part = false;
                continue;
            }
            let found = short.difference(&excluded.short).count() > 0;
            excluded.short.extend(short);
            if found && excluded.failure.is_none() && tries > 1 {
                continue;
            }
            if !excluded.like {
                components = look(node, components, manner.like.as_deref(), tell).await?;
            }
            return Ok(Prepared {
                manifest,
                components,
                planning,
                manifest_size,
                _guard: guard,
            });
        }
    }
    if let Some(failure) = excluded.failure.take() {
        return Err(failure);
    }
    Err(not_as_recorded(&manner.name))
}

/// Puts before the layers of each component those of the other components that these read: of the same capsule, or held here. None where no way is
/// known to one; then the layer that reads it is excluded.
async fn with_beside(
    node: &Node,
    mut components: Vec<ComponentPlan>,
    excluded: &mut Excluded,
) -> Result<Option<Vec<ComponentPlan>>, Failure> {
    let (store, holdings) = (node.store.clone(), node.holdings.clone());
    let found = blocking(move || {
        for at in 0..components.len() {
            let plan = &components[at];
            let HeldWay::Layers(mut way) = plan.way.clone() else {
                continue;
            };
            if plan.held {
                continue;
            }
            while let Some(beside) = beside(&store, &way)? {
                let reader = layer_of(&components[at], &way[beside.reader]);
                let ways = components[..at].iter().map(|plan| &plan.way);
                let planned = ways.filter_map(|way| match way {
                    HeldWay::Layers(layers) => Some(layers),
                    _ => None,
                });
                // The component itself, or one upon which it was put.
                let planned = planned
                    .map(|layers| leading_to(&store, layers, &beside))
                    .find_map(Result::transpose);
                let planned = planned.transpose()?;
                let layers = match planned {
                    Some(layers) => Some(layers),
                    None => {
                        let held = holdings.recipe(beside.space, &beside.root)?;
                        let here = |root| store.durable(&root).map_or(0, |here| here.size);
                        let blobs = blobs_of(held.as_deref().unwrap_or_default());
                        let blobs = blobs.map(|root| (root, (here(root), BlobKind::Other)));
                        components[at].blobs.extend(blobs);
                        held
                    }
                };
                let first = layers.unwrap_or_default();
                let rest = way.iter().filter(|layer| !first.contains(layer));
                let whole: Vec<LayerBlobs> = first.iter().chain(rest).copied().collect();
                if whole == way || first.is_empty() || check_len(whole.len()).is_err() {
                    return Ok(Err(reader));
                }
                way = whole;
            }
            components[at].way = HeldWay::Layers(way);
        }
        Ok(Ok(components))
    });
    match found.await? {
        Ok(components) => Ok(Some(components)),
        Err(Some(reader)) => {
            excluded.unreadable(reader);
            Ok(None)
        }
        Err(None) => {
            let message = "what a component that is here is read through is not here any more";
            Err(Failure::new(FailureCode::Damaged, message)
                .hint("`capsule verify --repair` fetches what is missing"))
        }
    }
}

/// What of a way leads to a component, if it does.
fn leading_to(
    store: &Store,
    layers: &[LayerBlobs],
    wanted: &Beside,
) -> Result<Option<Vec<LayerBlobs>>, Failure> {
    for (place, layer) in layers.iter().enumerate() {
        let directory = read_directory(&*open_index(store, &layer.index)?)?;
        let header = directory.header();
        if header.space == wanted.space && header.target == wanted.root {
            return Ok(Some(layers[..=place].to_vec()));
        }
    }
    Ok(None)
}

/// The layer of a plan that has these blobs, where it is not held.
fn layer_of(plan: &ComponentPlan, blobs: &LayerBlobs) -> Option<Layer> {
    let mut layers = plan.layers.iter();
    layers.find(|layer| layer_blobs(layer) == *blobs).cloned()
}

/// Notes what the layers of each component consist of.
async fn tallied(
    node: &Node,
    mut components: Vec<ComponentPlan>,
) -> Result<Vec<ComponentPlan>, Failure> {
    let store = node.store.clone();
    blocking(move || {
        for plan in &mut components {
            for layer in &plan.layers {
                plan.tally += Tally::of(store.open_blob(&layer.index.root)?)?;
            }
        }
        Ok(components)
    })
    .await
}

/// All layers that are known turned out wrong.
pub fn not_as_recorded(name: &str) -> Failure {
    let message = format!("{name}: the layers known for it are not what their records say");
    Failure::new(FailureCode::Damaged, message)
        .hint("its publisher made them wrong: tell them to publish it again")
}

/// Chooses ways. Where none is known, the record that tells one may be on its way: a name's can come before its layers'.
async fn choose_in_time(
    node: &Node,
    manifest: &Manifest,
    (manner, patience): (&Manner, &Patience),
    tell: &dyn Tell,
    excluded: &Excluded,
) -> Result<Choice, Failure> {
    let started = Instant::now();
    let mut changes = node.records.changes();
    loop {
        changes.borrow_and_update();
        let failure = match choose(node, manifest, manner.paged, excluded).await {
            Err(failure)
                if failure.code == FailureCode::Unreachable && excluded.failure.is_none() =>
            {
                failure
            }
            chosen => return chosen,
        };
        let over = match patience.ask(Instant::now(), started) {
            Mood::Wait => false,
            Mood::Leave(leaving) => {
                leaving.tell(&failure);
                false
            }
            Mood::Over => true,
        };
        if over || settled(&node.network.peers().await?, started) {
            return Err(failure);
        }
        tell.tell(waiting("the records of its layers"));
        let _ = tokio::time::timeout(LOOK, changes.changed()).await;
    }
}

async fn manifest(
    node: &Node,
    resolution: &Resolution,
    (manner, patience): (&Manner, &Patience),
    tell: &dyn Tell,
    planning: &mut Fetched,
) -> Result<Manifest, Failure> {
    let capsule = resolution.capsule;
    if !node.holdings.is_complete(&capsule.0) {
        let wanted = Wanted {
            root: capsule.0,
            size: resolution.manifest_size,
            kind: BlobKind::Manifest,
            groups: None,
        };
        fetch(node, vec![wanted], manner, patience, tell, planning).await?;
    }
    let holdings = node.holdings.clone();
    let manifest = blocking(move || Ok(holdings.manifest(&capsule))).await?;
    manifest.ok_or_else(|| {
        let message = format!(
            "{capsule} is not a capsule: what has that hash is no manifest that this version reads"
        );
        Failure::new(FailureCode::Damaged, message).hint("check the id; or use a newer capsule")
    })
}
