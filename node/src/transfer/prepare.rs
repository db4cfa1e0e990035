//! What a pull takes: the manifest, the cheapest way to each component, and which blobs that needs.
//!
//! Fetches manifest and indexes, and nothing else; so `plan` and the beginning of a pull are the same code, and their
//! figures agree to the byte.

use std::collections::{BTreeMap, HashSet};

use capsule_proto::RootHash;
use capsule_proto::index::Space;
use capsule_proto::manifest::{Component, ComponentKind, Manifest};
use capsule_proto::record::{BlobRef, Layer};

use super::fetch::{Fetched, Manner, Wanted, fetch};
use crate::control::{ComponentInfo, Failure, FailureCode, Phase, PlannedComponent};
use crate::graph::{Known, Way, cheapest};
use crate::held::{HeldWay, Holdings, TreeWay, blobs_of, component_info, fits, layer_blobs};
use crate::layers::read_directory;
use crate::node::Node;
use crate::records::{Records, Resolution};
use crate::store::{BlobKind, DatabaseError, LayerBlobs, Store};
use crate::work::{Tell, blocking};

/// How often other layers are tried for ones whose index is not what their record says.
const MAX_TRIES: usize = 8;
/// A component as a blob must be cheaper than its layers by this part of its bytes.
const BLOB_SURCHARGE: u64 = 8;

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
    /// The blobs that this takes, as far as no component before this one takes them.
    pub blobs: BTreeMap<RootHash, (u64, BlobKind)>,
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
        let all = self.components.iter().flat_map(|plan| &plan.blobs);
        let missing = all.filter(|(root, _)| !node.holdings.is_complete(root));
        missing
            .map(|(root, (size, kind))| Wanted {
                root: *root,
                size: Some(*size),
                kind: *kind,
            })
            .collect()
    }

    /// Bytes of the manifest and all blobs.
    pub fn total_bytes(&self) -> u64 {
        let blobs: u64 = self
            .components
            .iter()
            .flat_map(|plan| plan.blobs.values())
            .map(|(size, _)| size)
            .sum();
        blobs + self.manifest_size
    }

    /// All roots that the capsule takes here.
    pub fn roots(&self) -> Vec<RootHash> {
        self.components
            .iter()
            .flat_map(|plan| plan.blobs.keys().copied().chain([plan.component.root]))
            .collect()
    }
}

impl ComponentPlan {
    fn describe(&self, node: &Node) -> PlannedComponent {
        let (mut have, mut size) = (0, 0);
        for (root, (bytes, _)) in &self.blobs {
            have += node.holdings.bytes_here([*root]);
            size += bytes;
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
            fetch: size - have,
        }
    }
}

/// Finds out what a pull takes.
pub async fn prepare(
    node: &Node,
    resolution: &Resolution,
    manner: &Manner,
    tell: &dyn Tell,
) -> Result<Prepared, Failure> {
    let manner = Manner {
        phase: Phase::Planning,
        ..manner.clone()
    };
    let mut planning = Fetched::default();
    let manifest = manifest(node, resolution, &manner, tell, &mut planning).await?;
    let manifest_size = manifest.encode().len() as u64;
    let served = served_blobs(node, &manifest).await?;
    for _ in 0..MAX_TRIES {
        let choice = choose(node, &manifest, &served).await?;
        let indexes = choice
            .indexes
            .iter()
            .filter(|(root, _)| !node.holdings.is_complete(root));
        let wanted: Vec<Wanted> = indexes
            .map(|(root, layer)| Wanted {
                root: *root,
                size: Some(layer.index.size),
                kind: BlobKind::Index,
            })
            .collect();
        add(&mut planning, fetch(node, wanted, &manner, tell).await?);
        if check_indexes(node, choice.indexes).await? {
            return Ok(Prepared {
                manifest,
                components: choice.components,
                planning,
                manifest_size,
            });
        }
    }
    let message = format!(
        "{}: the layers known for it are not what their records say",
        manner.name
    );
    Err(Failure::new(FailureCode::Damaged, message)
        .hint("its publisher made them wrong: tell them to publish it again"))
}

/// Adds up what was fetched.
pub fn add(sum: &mut Fetched, more: Fetched) {
    sum.blobs.extend(more.blobs);
    for (peer, bytes) in more.by_peer {
        *sum.by_peer.entry(peer).or_default() += bytes;
    }
}

async fn manifest(
    node: &Node,
    resolution: &Resolution,
    manner: &Manner,
    tell: &dyn Tell,
    planning: &mut Fetched,
) -> Result<Manifest, Failure> {
    let capsule = resolution.capsule;
    if !node.holdings.is_complete(&capsule.0) {
        let wanted = Wanted {
            root: capsule.0,
            size: resolution.manifest_size,
            kind: BlobKind::Manifest,
        };
        *planning = fetch(node, vec![wanted], manner, tell).await?;
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

/// Components that may be fetched as blobs: somebody serves them under their own root, or some of it is here.
async fn served_blobs(node: &Node, manifest: &Manifest) -> Result<HashSet<RootHash>, Failure> {
    let mut served = HashSet::new();
    for component in &manifest.components {
        let begun = node
            .store
            .durable(&component.root)
            .is_some_and(|here| !here.ranges.is_empty());
        if begun || !node.network.providers(component.root).await?.is_empty() {
            served.insert(component.root);
        }
    }
    Ok(served)
}

/// The ways chosen, and the layers whose indexes they need.
struct Choice {
    components: Vec<ComponentPlan>,
    indexes: BTreeMap<RootHash, Layer>,
}

async fn choose(
    node: &Node,
    manifest: &Manifest,
    served: &HashSet<RootHash>,
) -> Result<Choice, Failure> {
    let search = Search {
        store: node.store.clone(),
        holdings: node.holdings.clone(),
        records: node.records.clone(),
        refused: node.transfers.refused(),
        served: served.clone(),
    };
    let components = manifest.components.clone();
    blocking(move || {
        let mut choice = Choice {
            components: Vec::new(),
            indexes: BTreeMap::new(),
        };
        let mut taken = HashSet::new();
        for component in components {
            search.add(component, &mut choice, &mut taken)?;
        }
        Ok(choice)
    })
    .await
}

/// Whether the indexes are what their records say; those that are not are never tried again.
async fn check_indexes(node: &Node, indexes: BTreeMap<RootHash, Layer>) -> Result<bool, Failure> {
    let store = node.store.clone();
    let wrong = blocking(move || {
        let mut wrong = Vec::new();
        for (root, layer) in indexes {
            let directory = read_directory(&*store.open_blob(&root)?);
            let pack_len = layer.pack.map_or(0, |pack| pack.size);
            let fine = directory.is_ok_and(|d| {
                fits(d.header(), &layer)
                    && d.pack_len() == pack_len
                    && d.index_len() == layer.index.size
            });
            if !fine {
                wrong.push(root);
            }
        }
        Ok(wrong)
    })
    .await?;
    wrong.iter().for_each(|root| node.transfers.refuse(*root));
    Ok(wrong.is_empty())
}

/// What the search for ways may look at.
struct Search {
    store: Store,
    holdings: Holdings,
    records: std::sync::Arc<Records>,
    /// Indexes that turned out wrong.
    refused: HashSet<RootHash>,
    served: HashSet<RootHash>,
}

impl Search {
    fn add(
        &self,
        component: Component,
        choice: &mut Choice,
        taken: &mut HashSet<RootHash>,
    ) -> Result<(), Failure> {
        let held = self.holdings.way_to(&component)?;
        let (way, blobs, held) = match held {
            Some(way) => {
                let mut blobs: Vec<RootHash> = way.blobs().into_iter().collect();
                if way == HeldWay::Blob {
                    blobs.push(component.root);
                }
                let known = |root: RootHash| {
                    let size = self.store.durable(&root).map_or(0, |here| here.size);
                    (root, (size, BlobKind::Other))
                };
                (way, blobs.into_iter().map(known).collect(), true)
            }
            None => {
                let mut blobs = BTreeMap::new();
                let way = self.way(&component, &mut blobs, &mut choice.indexes)?;
                (way, blobs, false)
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
            blobs,
        });
        Ok(())
    }

    /// The cheapest way to a component that is not held.
    fn way(
        &self,
        component: &Component,
        blobs: &mut BTreeMap<RootHash, (u64, BlobKind)>,
        indexes: &mut BTreeMap<RootHash, Layer>,
    ) -> Result<HeldWay, Failure> {
        let mut find = |space, size| {
            let way =
                cheapest(self, space, component.root, size)?.ok_or_else(|| no_way(component))?;
            Ok::<_, Failure>((self.layers_of(space, &way, blobs, indexes)?, way))
        };
        if component.kind != ComponentKind::Tree {
            let (layers, way) = find(Space::Stream, component.size)?;
            return Ok(if matches!(way, Way::Blob(_)) {
                HeldWay::Blob
            } else {
                HeldWay::Layers(layers)
            });
        }
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
        way: &Way,
        blobs: &mut BTreeMap<RootHash, (u64, BlobKind)>,
        indexes: &mut BTreeMap<RootHash, Layer>,
    ) -> Result<Vec<LayerBlobs>, Failure> {
        let new = match way {
            Way::Held => return Ok(Vec::new()),
            Way::Blob(blob) => {
                // A tree's listing is fetched as what it is.
                blobs.insert(blob.root, (blob.size, BlobKind::Other));
                return Ok(Vec::new());
            }
            Way::Layers(layers) => layers,
        };
        let below = new.first().and_then(|layer| layer.parent);
        let mut layers = below
            .map_or(Ok(None), |parent| self.recipe(space, &parent))?
            .unwrap_or_default();
        for blob in blobs_of(&layers) {
            let size = self.store.durable(&blob).map_or(0, |here| here.size);
            blobs.insert(blob, (size, BlobKind::Other));
        }
        for layer in new {
            indexes.insert(layer.index.root, layer.clone());
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

    /// The layers through which a component is read here, if it is.
    fn recipe(
        &self,
        space: Space,
        root: &RootHash,
    ) -> Result<Option<Vec<LayerBlobs>>, DatabaseError> {
        let layers = match space {
            Space::Stream => self
                .store
                .component(root)
                .map(|component| component.recipe.layers),
            Space::Contents => self.holdings.tree_way(root)?.map(|way| way.contents),
        };
        Ok(layers.filter(|layers| {
            !layers.is_empty() && blobs_of(layers).all(|blob| self.holdings.is_complete(&blob))
        }))
    }
}

impl Known for Search {
    type Error = DatabaseError;

    fn is_held(&self, space: Space, root: &RootHash) -> Result<bool, DatabaseError> {
        Ok(self.recipe(space, root)?.is_some())
    }

    fn layers_to(&self, space: Space, root: &RootHash) -> Result<Vec<Layer>, DatabaseError> {
        let known = self
            .records
            .layers_to(root)?
            .into_iter()
            .map(|known| known.layer);
        Ok(known
            .filter(|layer| layer.space == space && !self.refused.contains(&layer.index.root))
            .collect())
    }

    fn missing(&self, blob: &BlobRef) -> u64 {
        blob.size
            .saturating_sub(self.holdings.bytes_here([blob.root]))
    }

    /// A little more than its bytes: whoever serves a component decodes it for that, and it is stored as it is. What is here
    /// already was paid for.
    fn blob_cost(&self, blob: &BlobRef) -> Option<u64> {
        let missing = self.missing(blob);
        self.served
            .contains(&blob.root)
            .then(|| missing + missing / BLOB_SURCHARGE)
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
