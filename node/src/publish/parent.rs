//! What new content is published against: an older version that is here.

use std::collections::BTreeMap;
use std::sync::Arc;

use capsule_chunker::content::Content;
use capsule_chunker::layer::read::ReadOptions;
use capsule_proto::index::Space;
use capsule_proto::manifest::{Component, ComponentKind, Manifest};
use capsule_proto::{CapsuleId, RootHash};

use crate::control::{Failure, FailureCode, Holding, Publish};
use crate::held::Holdings;
use crate::layers::{lineage, open, read_directory};
use crate::node::{Node, spelled};
use crate::store::{LayerBlobs, Store};

/// Decoded frames kept of older content: it is read at many places, and near most of them more than once.
const CACHE: usize = 256 << 20;

/// Longest chain of layers that another is put upon: every reader goes through all of it.
const MAX_CHAIN: usize = 64;
/// How much of a chain that is as long as that the next is put upon: larger than a layer upon the last version, but machines that have any
/// version since then still fetch only what differs.
const HALF_CHAIN: usize = MAX_CHAIN / 2;
/// So many seconds before a version was kept, its files were not looked at any more.
const MARGIN: u64 = 60;

/// An older version.
#[derive(Debug, Clone)]
pub(super) struct Parent {
    /// What it is called.
    pub name: String,
    /// Its id.
    pub capsule: CapsuleId,
    /// What it consists of.
    pub manifest: Manifest,
    /// What was changed since then, in seconds since 1970, may not be what it was in this version.
    pub since: u64,
}

/// A component of it, as content.
pub(super) struct Old {
    /// The parent's, or an earlier version of it, where that is read through too many layers.
    pub component: Component,
    /// Both, and the layers through which each is read.
    pub known: BTreeMap<RootHash, Vec<LayerBlobs>>,
    /// The layers through which it is read, from nothing on.
    pub layers: Vec<LayerBlobs>,
    pub content: Arc<dyn Content>,
}

impl Parent {
    /// The version that the user said, or the channel's newest that is here; none where none is asked for, or none is here.
    pub fn of(node: &Node, request: &Publish) -> Result<Option<Self>, Failure> {
        if request.no_parent {
            return Ok(None);
        }
        if let Some(reference) = &request.parent {
            let resolution = node.resolve(reference)?;
            let name = spelled(&resolution);
            let manifest = node.holdings.complete(&resolution.capsule, &name)?;
            return Self::held(node, name, resolution.capsule, manifest).map(Some);
        }
        for known in node.records.names_of(&request.name.channel)? {
            let here = node.holdings.holding(&known.capsule)? == Holding::Complete;
            let manifest = node.holdings.manifest(&known.capsule);
            if let Some(manifest) = manifest.filter(|_| here && known.name != request.name) {
                return Self::held(node, known.name.to_string(), known.capsule, manifest).map(Some);
            }
        }
        Ok(None)
    }

    fn held(
        node: &Node,
        name: String,
        capsule: CapsuleId,
        manifest: Manifest,
    ) -> Result<Self, Failure> {
        let added = node.store.capsule(&capsule)?.map_or(0, |held| held.added);
        Ok(Self {
            name,
            capsule,
            manifest,
            since: added.saturating_sub(MARGIN),
        })
    }

    /// Its stream or tree that the new one is a version of: that of the same name, or the only one.
    pub fn component(&self, name: &str, kind: ComponentKind) -> Option<&Component> {
        let is_tree = |kind| kind == ComponentKind::Tree;
        let mut alike = self
            .manifest
            .components
            .iter()
            .filter(|component| is_tree(component.kind) == is_tree(kind));
        let first = alike.clone().next();
        match alike.clone().find(|component| component.name == name) {
            Some(same) => Some(same),
            None if alike.nth(1).is_none() => first,
            None => None,
        }
    }
}

impl Old {
    /// Opens a component in a space; none where it is not read through layers here, or has nothing in that space. Of one that is read
    /// through many layers, the version that half of them make; none where that is not here any more.
    pub fn open(
        store: &Store,
        component: &Component,
        space: Space,
    ) -> Result<Option<Self>, Failure> {
        let holdings = Holdings::new(store.clone());
        let layers = holdings.recipe(space, &component.root)?;
        let Some(parent_layers) = layers else {
            return Ok(None);
        };
        let mut known = BTreeMap::from([(component.root, parent_layers.clone())]);
        let is_long = parent_layers.len() >= MAX_CHAIN;
        let put_upon = match is_long {
            true => {
                let lineage = lineage(store, &parent_layers)?;
                let half = lineage.len().min(HALF_CHAIN).saturating_sub(1);
                earlier(store, component, space, &parent_layers[lineage[half]])?
            }
            false => Some((component.clone(), parent_layers)),
        };
        let Some((component, layers)) = put_upon else {
            return Ok(None);
        };
        let content = open(store, &layers, &ReadOptions { cache_len: CACHE })?;
        let expected = match space {
            Space::Stream => component.size,
            Space::Contents => component.content_size,
        };
        if content.len() != expected {
            let message = format!("component {} is not as long as it was", component.name);
            return Err(Failure::new(FailureCode::Damaged, message)
                .hint("`capsule verify` looks for damage, and repairs it from other machines"));
        }
        known.insert(component.root, layers.clone());
        Ok(Some(Self {
            component,
            known,
            layers,
            content,
        }))
    }

    /// Whether it is not the parent itself.
    pub fn is_earlier(&self) -> bool {
        self.known.len() > 1
    }
}

/// The version of a component that a layer makes, and the layers through which it is read, if it is here.
fn earlier(
    store: &Store,
    component: &Component,
    space: Space,
    layer: &LayerBlobs,
) -> Result<Option<(Component, Vec<LayerBlobs>)>, Failure> {
    let index = store.open_blob(&layer.index)?;
    let header = read_directory(&*index)?.header().clone();
    let holdings = Holdings::new(store.clone());
    let layers = holdings.recipe(space, &header.target)?;
    let layers = layers.filter(|layers| layers.len() < MAX_CHAIN);
    let (Some(layers), Some(present)) = (layers, store.present(&header.target)) else {
        return Ok(None);
    };
    let is_whole = match space {
        // Its hash tree is compared.
        Space::Stream => store.open_outboard(&header.target).is_ok(),
        // Its listing is.
        Space::Contents => holdings.is_complete(&header.target),
    };
    let earlier = || Component {
        root: header.target,
        size: present.size,
        content_size: header.target_size,
        ..component.clone()
    };
    Ok(is_whole.then(|| (earlier(), layers)))
}
