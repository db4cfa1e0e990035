//! The search for ways: by what is here, what the records say, and what connected machines have, how each component of a
//! capsule is best come by.
//!
//! `graph` finds the cheapest way; here is what it asks, and what its answer takes in blobs.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use capsule_chunker::layer::Tally;
use capsule_proto::RootHash;
use capsule_proto::index::Space;
use capsule_proto::manifest::{Component, ComponentKind, Manifest};
use capsule_proto::ranges::GroupRanges;
use capsule_proto::record::{BlobRef, Layer};
use capsule_swarm::{NetworkHandle, PeerId};
use tokio::runtime::Handle;

use super::prepare::{ComponentPlan, Excluded, not_as_recorded};
use crate::control::{Failure, FailureCode};
use crate::graph::{Cost, Known, Way, cheapest};
use crate::held::{HeldWay, Holdings, TreeWay, blobs_of, check_len, layer_blobs, make_the_same};
use crate::node::Node;
use crate::records::{KnownLayer, Records};
use crate::store::{BlobKind, DatabaseError, LayerBlobs, MAX_LAYERS, Reached, Store};
use crate::work::blocking;

/// A component as a blob must be cheaper than its layers by this part of its bytes.
const BLOB_SURCHARGE: u64 = 8;

/// Of a pack in several orders, that of which most is here is gone on with, counted in so many parts of it. Much less than what makes another order worth
/// it, so that who has read what that was made for goes on with it.
const BEGUN: u64 = 512;

/// The ways chosen.
pub(super) struct Choice {
    pub components: Vec<ComponentPlan>,
    /// Whether nobody who is connected has some of it.
    absent: bool,
}

/// Chooses ways, for who reads it while it comes or pulls it. After a failure only ones that need not be waited for: patience was spent on
/// what failed.
pub(super) async fn choose(
    node: &Node,
    manifest: &Manifest,
    paged: bool,
    excluded: &Excluded,
) -> Result<Choice, Failure> {
    let chosen = choose_any(node, manifest, paged, excluded).await;
    match (chosen, &excluded.failure) {
        (Ok(choice), Some(_)) if !choice.absent => Ok(choice),
        (_, Some(failure)) => Err(failure.clone()),
        (chosen, None) => chosen,
    }
}

async fn choose_any(
    node: &Node,
    manifest: &Manifest,
    paged: bool,
    excluded: &Excluded,
) -> Result<Choice, Failure> {
    let components = manifest.components.clone();
    let streams = components
        .iter()
        .map(|c| ((Space::Stream as u8, c.root), c.size));
    let trees = components
        .iter()
        .filter(|c| c.kind == ComponentKind::Tree)
        .map(|c| ((Space::Contents as u8, c.root), c.content_size));
    let mut refused = node.transfers.refused();
    refused.extend(excluded.layers.iter().cloned());
    let peers = node.network.peers().await?;
    let near = peers.iter().filter(|peer| !peer.beyond);
    let search = Search {
        store: node.store.clone(),
        holdings: node.holdings.clone(),
        records: node.records.clone(),
        network: node.network.clone(),
        runtime: Handle::current(),
        paged,
        refused,
        absent: excluded.blobs.clone(),
        short: excluded.short.clone(),
        sizes: streams.chain(trees).collect(),
        near: near.map(|peer| peer.id).collect(),
        found: RefCell::default(),
    };
    blocking(move || {
        let mut choice = Choice {
            components: Vec::new(),
            absent: false,
        };
        let mut taken = HashSet::new();
        for component in components {
            search.add(component, &mut choice, &mut taken)?;
        }
        Ok(choice)
    })
    .await
}

/// What the search for ways may look at.
struct Search {
    store: Store,
    holdings: Holdings,
    records: Arc<Records>,
    network: NetworkHandle,
    /// For asking the network from a thread that may block.
    runtime: Handle,
    /// Whether it is read while it comes.
    paged: bool,
    /// Layers that turned out wrong.
    refused: HashSet<Layer>,
    /// Blobs that this pull tried in vain.
    absent: HashSet<RootHash>,
    /// Packs of which something that is needed is nowhere.
    short: HashSet<RootHash>,
    /// What the manifest says of lengths, by space.
    sizes: HashMap<(u8, RootHash), u64>,
    /// Connected machines of this site.
    near: HashSet<PeerId>,
    /// What the network said of blobs.
    found: RefCell<HashMap<RootHash, Found>>,
}

/// How much of a blob can be had.
#[derive(Debug, Clone, Copy)]
struct Found {
    reach: Reach,
    /// Bytes that are here or at connected machines.
    bytes: u64,
    /// Whether all of it is here or in this site.
    near: bool,
}

/// How much of a blob is here or at connected machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    Nothing,
    Some,
    All,
}

/// How much of some chunk groups of a blob is here or at connected machines; nothing only where nothing of all of it is.
pub(super) async fn reach_of(
    network: &NetworkHandle,
    store: &Store,
    blob: &BlobRef,
    wanted: &GroupRanges,
) -> Reach {
    let (all, _) = available(network, store, blob, |_| true).await;
    reach_by(wanted, &all)
}

fn reach_by(wanted: &GroupRanges, available: &GroupRanges) -> Reach {
    match available.is_empty() {
        true => Reach::Nothing,
        false if wanted.difference(available).is_empty() => Reach::All,
        false => Reach::Some,
    }
}

/// The chunk groups of a blob that are here or at connected machines; and those that are here or at such as are near.
async fn available(
    network: &NetworkHandle,
    store: &Store,
    blob: &BlobRef,
    is_near: impl Fn(&PeerId) -> bool,
) -> (GroupRanges, GroupRanges) {
    let here = store.durable(&blob.root);
    let here = here.map_or_else(GroupRanges::new, |here| here.ranges);
    let (mut all, mut near) = (here.clone(), here);
    // A closing network has no providers; whoever fetches hears of it.
    for provider in network.providers(blob.root).await.unwrap_or_default() {
        if provider.size == blob.size {
            all.union_with(&provider.groups);
            if is_near(&provider.peer) {
                near.union_with(&provider.groups);
            }
        }
    }
    (all, near)
}

impl Search {
    fn add(
        &self,
        component: Component,
        choice: &mut Choice,
        taken: &mut HashSet<RootHash>,
    ) -> Result<(), Failure> {
        let held = self.holdings.way_to(&component)?;
        let (way, layers, blobs, held) = match held {
            Some(way) => {
                let mut blobs: Vec<RootHash> = way.blobs().into_iter().collect();
                if way == HeldWay::Blob {
                    blobs.push(component.root);
                }
                let known = |root: RootHash| {
                    let size = self.store.durable(&root).map_or(0, |here| here.size);
                    (root, (size, BlobKind::Other))
                };
                (
                    way,
                    Vec::new(),
                    blobs.into_iter().map(known).collect(),
                    true,
                )
            }
            None => {
                let (mut layers, mut blobs) = (Vec::new(), BTreeMap::new());
                let way = self.way(&component, &mut layers, &mut blobs, choice)?;
                (way, layers, blobs, false)
            }
        };
        let blobs = blobs
            .into_iter()
            .filter(|(root, _)| taken.insert(*root))
            .collect();
        choice.components.push(ComponentPlan {
            component,
            held,
            way,
            layers,
            blobs,
            tally: Tally::default(),
            reached: Reached::new(),
            like: None,
        });
        Ok(())
    }

    /// The cheapest way to a component that is not held.
    fn way(
        &self,
        component: &Component,
        taken: &mut Vec<Layer>,
        blobs: &mut BTreeMap<RootHash, (u64, BlobKind)>,
        choice: &mut Choice,
    ) -> Result<HeldWay, Failure> {
        let mut find = |space, size| {
            let Some(way) = cheapest(self, space, component.root, size, MAX_LAYERS)? else {
                // None at all, or none that is followed?
                if let Some(way) = cheapest(self, space, component.root, size, usize::MAX)? {
                    let layers = self.layers_of(space, component, &way, blobs, choice)?;
                    check_len(layers.len())?;
                }
                return Err(self.no_way(space, component)?);
            };
            if let Way::Layers(layers) = &way {
                taken.extend(layers.iter().cloned());
            }
            Ok::<_, Failure>((self.layers_of(space, component, &way, blobs, choice)?, way))
        };
        if component.kind != ComponentKind::Tree {
            let (layers, way) = find(Space::Stream, component.size)?;
            return Ok(if matches!(way, Way::Blob(_)) {
                HeldWay::Blob
            } else {
                HeldWay::Layers(layers)
            });
        }
        // A listing that is here needs no layers; those through which it came stay known, to be served.
        let listing = if self.holdings.is_complete(&component.root) {
            self.holdings
                .tree_way(&component.root)?
                .unwrap_or_default()
                .listing
        } else {
            find(Space::Stream, component.size)?.0
        };
        let contents = if component.content_size == 0 {
            Vec::new()
        } else {
            find(Space::Contents, component.content_size)?.0
        };
        Ok(HeldWay::Tree(TreeWay { listing, contents }))
    }

    /// The layers of a way, with those below it that are held; notes the blobs of all.
    fn layers_of(
        &self,
        space: Space,
        component: &Component,
        way: &Way,
        blobs: &mut BTreeMap<RootHash, (u64, BlobKind)>,
        choice: &mut Choice,
    ) -> Result<Vec<LayerBlobs>, Failure> {
        let (below, new) = match way {
            Way::Held => (Some(component.root), &[][..]),
            Way::Blob(blob) => {
                choice.absent |= self.reach(blob) != Reach::All;
                // A tree's own root names its listing, which is fetched as what it is.
                let kind = match component.kind {
                    ComponentKind::Tree => BlobKind::Listing,
                    _ => BlobKind::Other,
                };
                blobs.insert(blob.root, (blob.size, kind));
                return Ok(Vec::new());
            }
            Way::Layers(layers) => (layers.first().and_then(|layer| layer.parent), &layers[..]),
        };
        let mut layers = below
            .map_or(Ok(None), |parent| self.holdings.recipe(space, &parent))?
            .unwrap_or_default();
        for blob in blobs_of(&layers) {
            let size = self.store.durable(&blob).map_or(0, |here| here.size);
            blobs.insert(blob, (size, BlobKind::Other));
        }
        for layer in new {
            choice.absent |= !self.is_reachable(layer);
            blobs.insert(layer.index.root, (layer.index.size, BlobKind::Index));
            blobs.extend(
                layer
                    .pack
                    .map(|pack| (pack.root, (pack.size, BlobKind::Pack))),
            );
            layers.push(layer_blobs(layer));
        }
        Ok(layers)
    }

    /// Why nothing leads to a component: that its layers were found wrong says more than that there are none.
    fn no_way(&self, space: Space, component: &Component) -> Result<Failure, DatabaseError> {
        let known = self.records.layers_to(&component.root)?;
        let is_known = known.iter().any(|known| known.layer.space == space);
        Ok(if is_known {
            not_as_recorded(&format!("component {}", component.name))
        } else {
            no_way(component)
        })
    }

    fn reach(&self, blob: &BlobRef) -> Reach {
        self.found(blob).reach
    }

    fn found(&self, blob: &BlobRef) -> Found {
        if self.holdings.is_complete(&blob.root) {
            return Found {
                reach: Reach::All,
                bytes: blob.size,
                near: true,
            };
        }
        if let Some(known) = self.found.borrow().get(&blob.root) {
            return *known;
        }
        let is_near = |peer: &PeerId| self.near.contains(peer);
        let available = available(&self.network, &self.store, blob, is_near);
        let (all, near) = self.runtime.block_on(available);
        let whole = GroupRanges::all(blob.size);
        let found = Found {
            reach: reach_by(&whole, &all),
            bytes: all.bytes(blob.size),
            near: reach_by(&whole, &near) == Reach::All,
        };
        self.found.borrow_mut().insert(blob.root, found);
        found
    }

    /// Whether what machines have of a pack may be what is needed of it: until the indexes tell otherwise. A component that is
    /// sought as a blob is needed as a whole.
    fn may_do_in_part(&self, blob: &BlobRef) -> bool {
        let as_blob = self.sizes.contains_key(&(Space::Stream as u8, blob.root));
        !as_blob && !self.short.contains(&blob.root)
    }

    /// Of layers that are orders of one, one that can be had: that of which most is here; else one that this site has; of those, for
    /// who reads while it comes the last, as what is read first lies together there, and for who pulls all the first, which most others have. Where none can be
    /// had, most is here of the best.
    fn one_order_each(&self, mut known: Vec<KnownLayer>) -> Vec<Layer> {
        known.sort_by_cached_key(|known| {
            let layer = &known.layer;
            let can_be_had = self.is_reachable(layer);
            let begun = match can_be_had {
                true => layer.pack.map_or(0, |pack| self.begun(&pack)),
                false => self.holdings.bytes_here(blobs_of(&[layer_blobs(layer)])),
            };
            let place = Place {
                can_be_had,
                begun,
                near: layer.pack.is_some_and(|pack| self.found(&pack).near),
                order: known.sequence,
            };
            (place.rank(self.paged), layer.index.root)
        });
        let mut first: Vec<KnownLayer> = Vec::new();
        for known in known {
            // What others say of orders is theirs; and two that are both first are two layers.
            let is_it = |first: &KnownLayer| {
                first.signer == known.signer
                    && first.sequence != known.sequence
                    && make_the_same(&first.layer, &known.layer)
            };
            if !first.iter().any(is_it) {
                first.push(known);
            }
        }
        first.into_iter().map(|known| known.layer).collect()
    }

    /// How much of a pack is here, in parts of it. A little binds nobody, unless it is in use: a guest that reads it goes on with it.
    fn begun(&self, pack: &BlobRef) -> u64 {
        let here = self.holdings.bytes_here([pack.root]);
        let in_use = here > 0 && self.store.is_active(&pack.root);
        (here.saturating_mul(BEGUN) / pack.size.max(1)).max(in_use.into())
    }

    /// Whether a layer may make what its record says, as far as can be told before any of it is fetched.
    fn is_usable(&self, layer: &Layer) -> bool {
        let size = self.sizes.get(&(layer.space as u8, layer.target));
        let mut blobs = [Some(&layer.index), layer.pack.as_ref()]
            .into_iter()
            .flatten();
        size.is_none_or(|size| *size == layer.target_size)
            && !self.refused.contains(layer)
            && blobs.all(|blob| !self.absent.contains(&blob.root) && self.agrees(blob))
    }

    /// Whether a blob's size is that of the one here. One of which nothing came has only the size that somebody said: it goes.
    fn agrees(&self, blob: &BlobRef) -> bool {
        self.store.durable(&blob.root).is_none_or(|here| {
            let begun = || {
                self.store
                    .present(&blob.root)
                    .is_some_and(|p| !p.ranges.is_empty())
            };
            here.size == blob.size || (!begun() && self.store.remove(&blob.root).is_ok())
        })
    }
}

impl Known for Search {
    type Error = DatabaseError;

    fn held(&self, space: Space, root: &RootHash) -> Result<Option<usize>, DatabaseError> {
        let layers = self.holdings.recipe(space, root)?;
        Ok(layers.map(|layers| layers.len()))
    }

    fn layers_to(&self, space: Space, root: &RootHash) -> Result<Vec<Layer>, DatabaseError> {
        let mut known = self.records.layers_to(root)?;
        known.retain(|known| known.layer.space == space && self.is_usable(&known.layer));
        Ok(self.one_order_each(known))
    }

    fn missing(&self, blob: &BlobRef) -> u64 {
        let found = self.found(blob);
        let size = match found.reach {
            // No more than that can come, and it may do.
            Reach::Some if self.may_do_in_part(blob) => found.bytes,
            _ => blob.size,
        };
        size.saturating_sub(self.holdings.bytes_here([blob.root]))
    }

    /// A little more than its bytes: whoever serves a component decodes it for that, and it is stored as it is. What is here
    /// already was paid for.
    fn blob_cost(&self, blob: &BlobRef) -> Option<Cost> {
        let (reach, missing) = (self.reach(blob), self.missing(blob));
        let served = reach != Reach::Nothing && !self.absent.contains(&blob.root);
        let absent = u64::from(reach != Reach::All);
        served.then(|| (absent, missing.saturating_add(missing / BLOB_SURCHARGE)))
    }

    /// A pack of which some machine has a part may do: what is needed of it the indexes tell, once they are here.
    fn is_reachable(&self, layer: &Layer) -> bool {
        let pack_may_do = |pack: &BlobRef| match self.reach(pack) {
            Reach::All => true,
            Reach::Some => self.may_do_in_part(pack),
            Reach::Nothing => false,
        };
        self.reach(&layer.index) == Reach::All && layer.pack.as_ref().is_none_or(pack_may_do)
    }
}

/// What counts in the choice of one of several orders.
#[derive(Debug, Clone, Copy)]
struct Place {
    can_be_had: bool,
    /// How much of it is here: in parts where it can be had, else in bytes.
    begun: u64,
    /// Whether all of it is here or in this site.
    near: bool,
    order: u64,
}

impl Place {
    /// The least is taken, by who reads while it comes or pulls all.
    fn rank(self, paged: bool) -> (bool, Reverse<u64>, bool, u64) {
        let order = match paged {
            true => u64::MAX - self.order,
            false => self.order,
        };
        (!self.can_be_had, Reverse(self.begun), !self.near, order)
    }
}

fn no_way(component: &Component) -> Failure {
    let message = format!(
        "no layer is known that leads to component {} ({})",
        component.name, component.root
    );
    Failure::new(FailureCode::Unreachable, message)
        .hint("records arrive from connected peers: wait, or start the machine that published it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_orders_one_that_can_be_had_is_taken_then_what_is_begun_then_what_is_near() {
        let first = Place {
            can_be_had: true,
            begun: 0,
            near: false,
            order: 0,
        };
        let last = Place { order: 2, ..first };
        let taken = |of: [Place; 2], paged| {
            let least = of.into_iter().min_by_key(|place| place.rank(paged));
            least.unwrap().order
        };
        assert_eq!(
            [true, false].map(|paged| taken([first, last], paged)),
            [2, 0]
        );
        for paged in [true, false] {
            let near = |order| Place {
                near: true,
                ..[first, last][order]
            };
            assert_eq!(taken([near(0), last], paged), 0);
            assert_eq!(taken([first, near(1)], paged), 2);
            let begun = Place { begun: 1, ..last };
            assert_eq!(taken([near(0), begun], paged), 2);
            // Who had it has left.
            let gone = Place {
                can_be_had: false,
                ..begun
            };
            assert_eq!(taken([first, gone], paged), 0);
        }
    }
}
