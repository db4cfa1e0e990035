//! What this node holds of capsules: manifests, the layers through which each component is read here, and the blobs
//! that all of it takes.
//!
//! A stream's layers are its recipe in the store. A tree has two ways: to its listing, which is held as a blob, and to
//! its contents, which no hash names; both are kept as a value of the store's. Records may go (ended, revoked): what is
//! held stays readable.

mod ways;

pub use ways::check_len;

use std::collections::BTreeSet;

use capsule_proto::index::{IndexHeader, Space};
use capsule_proto::listing::{Listing, MAX_LISTING_LEN};
use capsule_proto::manifest::{Component, ComponentKind, MAX_MANIFEST_LEN, Manifest};
use capsule_proto::record::Layer;
use capsule_proto::{CapsuleId, RootHash};

use crate::control::{ComponentInfo, Failure, FailureCode, Holding};
use crate::records::Records;
use crate::store::{BlobKind, DatabaseError, LayerBlobs, Presence, Store};

/// How a component is read here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeldWay {
    /// A stream, through its layers.
    Layers(Vec<LayerBlobs>),
    /// A stream, as a blob of its own.
    Blob,
    /// A tree.
    Tree(TreeWay),
}

/// The layers of a tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TreeWay {
    /// To its listing, kept to be served; the listing itself is a blob.
    pub listing: Vec<LayerBlobs>,
    /// To its contents.
    pub contents: Vec<LayerBlobs>,
}

/// What a capsule takes here.
#[derive(Debug, Clone, Default)]
pub struct Takes {
    /// Blobs of which it takes all.
    pub whole: BTreeSet<RootHash>,
    /// Layers, from nothing on, through which something is read: all of their indexes, and of their packs what that takes.
    pub ways: BTreeSet<Vec<LayerBlobs>>,
    /// Ways that were made here, which nobody else has: when they are lost, they are made again.
    pub own: BTreeSet<Vec<LayerBlobs>>,
    /// Blobs of layers that a pull may have begun to fetch: what is here of them is taken.
    pub begun: BTreeSet<RootHash>,
    /// Whether nobody can tell what it takes: it is held, and its manifest cannot be read.
    pub unknown: bool,
}

/// Most layers walked to find what a begun pull takes: those that a search looks at.
const MAX_WALKED: usize = 4096;

/// The blobs of layers.
pub fn blobs_of(layers: &[LayerBlobs]) -> impl Iterator<Item = RootHash> + '_ {
    layers
        .iter()
        .flat_map(|layer| [Some(layer.index), layer.pack])
        .flatten()
}

/// The blobs of a layer as a record names them.
pub fn layer_blobs(layer: &Layer) -> LayerBlobs {
    LayerBlobs {
        index: layer.index.root,
        pack: layer.pack.map(|pack| pack.root),
    }
}

/// Whether two layers make the same of the same, each with a pack: as orders of one do.
pub fn make_the_same(a: &Layer, b: &Layer) -> bool {
    (a.space, a.parent, a.target) == (b.space, b.parent, b.target)
        && a.pack.is_some()
        && b.pack.is_some()
}

impl HeldWay {
    /// Its layers, from nothing on: a tree has two ways.
    pub fn ways(&self) -> impl Iterator<Item = &[LayerBlobs]> {
        let (one, two) = match self {
            Self::Blob => (None, None),
            Self::Layers(layers) => (Some(layers), None),
            Self::Tree(way) => (Some(&way.listing), Some(&way.contents)),
        };
        let ways = one.into_iter().chain(two).map(Vec::as_slice);
        ways.filter(|layers| !layers.is_empty())
    }

    /// All blobs that it needs, but for a listing, which goes by the component's root.
    pub fn blobs(&self) -> BTreeSet<RootHash> {
        match self {
            Self::Blob => BTreeSet::new(),
            Self::Layers(layers) => blobs_of(layers).collect(),
            Self::Tree(way) => blobs_of(&way.listing)
                .chain(blobs_of(&way.contents))
                .collect(),
        }
    }
}

/// Looks into the store for what it holds of capsules. Calls block.
#[derive(Debug, Clone)]
pub struct Holdings {
    store: Store,
}

impl Holdings {
    /// Of a store.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// A capsule's manifest, if it is here and fine.
    pub fn manifest(&self, capsule: &CapsuleId) -> Option<Manifest> {
        let bytes = self
            .store
            .read_whole(&capsule.0, MAX_MANIFEST_LEN as u64)
            .ok()?;
        Manifest::decode(&bytes).ok()
    }

    /// The manifest of a capsule that must be here completely.
    pub fn complete(&self, capsule: &CapsuleId, name: &str) -> Result<Manifest, Failure> {
        match (self.holding(capsule)?, self.manifest(capsule)) {
            (Holding::Complete, Some(manifest)) => Ok(manifest),
            (holding, _) => {
                let what = if holding == Holding::Absent {
                    "is not here"
                } else {
                    "is here only in part"
                };
                let message = format!("{name} {what}");
                Err(Failure::new(FailureCode::Refused, message)
                    .hint(format!("fetch it with `capsule pull {name}`")))
            }
        }
    }

    /// How much of a capsule is here.
    pub fn holding(&self, capsule: &CapsuleId) -> Result<Holding, DatabaseError> {
        Ok(match self.store.capsule(capsule)? {
            Some(held) if held.complete => Holding::Complete,
            Some(_) => Holding::Partial,
            None => Holding::Absent,
        })
    }

    /// How a component is read here; none if not all of it is here, checked.
    pub fn way_to(&self, component: &Component) -> Result<Option<HeldWay>, DatabaseError> {
        let root = &component.root;
        let is_blob = self.is_complete(root);
        if component.kind == ComponentKind::Tree {
            let way = self.tree_way(root)?;
            let held = |way: &TreeWay| {
                is_blob && (component.content_size == 0 || !way.contents.is_empty())
            };
            let Some(way) = way.filter(held) else {
                return Ok(None);
            };
            let contents = self.shortest(Space::Contents, root, way.contents)?;
            let listing = way.listing;
            let held = |contents| HeldWay::Tree(TreeWay { listing, contents });
            return Ok(contents.map(held));
        }
        if let Some(known) = self.store.component(root)
            && let Some(layers) = self.shortest(Space::Stream, root, known.recipe.layers)?
        {
            return Ok(Some(HeldWay::Layers(layers)));
        }
        Ok(is_blob.then_some(HeldWay::Blob))
    }

    /// The way through which something is best read here: its own, or that of others; none if neither is all here.
    pub fn shortest(
        &self,
        space: Space,
        root: &RootHash,
        others: Vec<LayerBlobs>,
    ) -> Result<Option<Vec<LayerBlobs>>, DatabaseError> {
        for layers in self.own_way(space, root)?.into_iter().chain([others]) {
            if self.store.is_readable(&layers)? {
                return Ok(Some(layers));
            }
        }
        Ok(None)
    }

    /// The layers through which something is read here, from nothing on, if all of them are here: what an update can be put
    /// upon. A component that came as a blob of its own has none.
    pub fn recipe(
        &self,
        space: Space,
        root: &RootHash,
    ) -> Result<Option<Vec<LayerBlobs>>, DatabaseError> {
        let tree = || self.tree_way(root);
        let layers = match space {
            Space::Contents => tree()?.map(|way| way.contents),
            Space::Stream => match self.store.component(root) {
                Some(component) => Some(component.recipe.layers),
                None => match self.blob_way(root)? {
                    Some(layers) => Some(layers),
                    None => tree()?.map(|way| way.listing),
                },
            },
        };
        Ok(match layers.filter(|layers| !layers.is_empty()) {
            Some(layers) if self.store.is_readable(&layers)? => Some(layers),
            _ => None,
        })
    }

    /// A tree's listing.
    pub fn listing(&self, component: &Component) -> Result<Listing, Failure> {
        let bytes = self
            .store
            .read_whole(&component.root, MAX_LISTING_LEN as u64)?;
        Listing::decode(&bytes).map_err(|e| {
            Failure::new(
                FailureCode::Damaged,
                format!("the listing of tree {} is malformed: {e}", component.root),
            )
            .hint("its publisher made it wrong: publish it again with this version of capsule")
        })
    }

    /// Every blob that a capsule takes here, whether all of it is here or not.
    pub fn blobs_of(
        &self,
        capsule: &CapsuleId,
        records: &Records,
    ) -> Result<BTreeSet<RootHash>, DatabaseError> {
        Ok(self.takes(capsule, records)?.blobs())
    }

    /// What a capsule takes here.
    ///
    /// Of a capsule that is held, but whose manifest cannot be read (damaged, or being fetched again), nobody can tell what
    /// it takes: everything here counts, so that nothing of it is collected before the manifest is whole again.
    pub fn takes(&self, capsule: &CapsuleId, records: &Records) -> Result<Takes, DatabaseError> {
        let mut takes = Takes {
            whole: [capsule.0].into(),
            ..Takes::default()
        };
        let Some(manifest) = self.manifest(capsule) else {
            takes.unknown = self.store.capsule(capsule)?.is_some();
            if takes.unknown {
                takes.whole.extend(self.everything());
            }
            return Ok(takes);
        };
        let Takes {
            whole,
            ways,
            own,
            begun,
            ..
        } = &mut takes;
        for component in &manifest.components {
            whole.insert(component.root);
            // Damaged in one place, they are as needed as before: that place is all that is to be fetched again.
            let recipe = self.store.component(&component.root);
            ways.extend(recipe.map(|known| known.recipe.layers));
            ways.extend(self.blob_way(&component.root)?);
            for space in [Space::Stream, Space::Contents] {
                own.extend(self.own_way(space, &component.root)?);
            }
            if let Some(way) = self.tree_way(&component.root)? {
                ways.extend([way.listing, way.contents]);
            }
            // Who asks for these may want to make anything of them.
            whole.extend(blobs_of(&self.offered(&component.root)?));
            match self.way_to(component)? {
                Some(HeldWay::Layers(_) | HeldWay::Tree(_)) => {}
                // Begun, or its own pack: whatever layers are known to lead there.
                Some(HeldWay::Blob) | None => {
                    let layers = leading_to(&component.root, records)?;
                    begun.extend(blobs_of(&layers));
                }
            }
        }
        Ok(takes)
    }

    fn everything(&self) -> impl Iterator<Item = RootHash> {
        let blobs = self.store.blobs().into_iter().map(|blob| blob.root);
        let components = self.store.components().into_iter().map(|(root, _)| root);
        blobs.chain(components)
    }

    /// Bytes of these blobs that are here, durable or about to be: what a fetch does not fetch.
    pub fn bytes_here(&self, blobs: impl IntoIterator<Item = RootHash>) -> u64 {
        let bytes = |here: Presence| here.ranges.bytes(here.size);
        let here = |root| match self.store.durable(&root) {
            // A component's root is no blob: its bytes are its layers'.
            None => 0,
            Some(durable) => self
                .store
                .present(&root)
                .map_or_else(|| bytes(durable), bytes),
        };
        blobs.into_iter().map(here).sum()
    }

    /// Whether a blob is here, all of it.
    pub fn is_complete(&self, blob: &RootHash) -> bool {
        self.store.durable(blob).is_some_and(|here| here.complete)
    }
}

impl Takes {
    /// All of it.
    pub fn blobs(mut self) -> BTreeSet<RootHash> {
        self.ways.append(&mut self.own);
        self.lasting()
    }

    /// All of it but what only its own ways take.
    pub fn lasting(self) -> BTreeSet<RootHash> {
        let of_ways = self.ways.iter().flat_map(|layers| blobs_of(layers));
        let mut blobs: BTreeSet<RootHash> = of_ways.collect();
        blobs.extend(self.whole);
        blobs.extend(self.begun);
        blobs
    }
}

/// The layers that lead to a component, and to where they start, as far as records tell: whichever of them a pull has begun
/// to fetch.
fn leading_to(root: &RootHash, records: &Records) -> Result<Vec<LayerBlobs>, DatabaseError> {
    let (mut layers, mut seen, mut next) = (Vec::new(), BTreeSet::new(), vec![*root]);
    while let Some(root) = next.pop() {
        if layers.len() >= MAX_WALKED || !seen.insert(root) {
            continue;
        }
        for known in records.layers_to(&root)? {
            layers.push(layer_blobs(&known.layer));
            next.extend(known.layer.parent);
        }
    }
    Ok(layers)
}

/// A component in answers.
pub fn component_info(component: &Component) -> ComponentInfo {
    ComponentInfo {
        name: component.name.clone(),
        kind: component.kind.word().to_owned(),
        root: component.root,
        size: component.size,
        content_size: component.content_size,
    }
}

/// A blob's kind in answers.
pub const fn kind_word(kind: BlobKind) -> &'static str {
    match kind {
        BlobKind::Manifest => "manifest",
        BlobKind::Listing => "listing",
        BlobKind::Index => "index",
        BlobKind::Pack => "pack",
        BlobKind::Other => "other",
    }
}

/// A space in answers.
pub const fn space_word(space: Space) -> &'static str {
    match space {
        Space::Stream => "stream",
        Space::Contents => "contents",
    }
}

/// Whether an index makes what its record says.
pub fn fits(header: &IndexHeader, layer: &Layer) -> bool {
    header.space == layer.space
        && header.parent == layer.parent
        && header.target == layer.target
        && header.target_size == layer.target_size
}
