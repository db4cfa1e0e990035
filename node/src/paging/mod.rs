//! Capsules that are read while they come: planned like a pull, and then fetched as far as somebody reads.
//!
//! `paged` is such content; here a reference becomes one. What serves it to programs is `nbd` and `mount`.

mod paged;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use capsule_proto::credential::MachineId;
use capsule_proto::index::Space;
use capsule_proto::listing::{Listing, MAX_LISTING_LEN};
use capsule_proto::manifest::{Component, ComponentKind, Manifest};
use capsule_proto::record::{BlobRef, Layer};
use capsule_proto::{CapsuleId, RootHash};
use capsule_swarm::Priority;

use crate::control::{ByteRange, CapsuleRef, Describe, Described, Failure, FailureCode, ReadFirst};
use crate::disk::Disk;
use crate::held::{HeldWay, blobs_of, component_info};
use crate::node::{Node, spelled};
use crate::records::{KnownLayer, Resolution};
use crate::store::{BlobKind, LayerBlobs};
use crate::transfer::fetch::Manner;
use crate::transfer::patience::Patience;
use crate::transfer::prepare::{Excluded, MAX_TRIES, Prepared, not_as_recorded, prepare};
use crate::transfer::{find, manner, patience};
use crate::work::{Tell, blocking};
pub use paged::{Paged, ReadCache};

/// A capsule that can be read: its manifest is here, and of its indexes what tells where their pages lie.
pub struct Opened {
    node: Arc<Node>,
    /// Which it is.
    pub resolution: Resolution,
    prepared: Arc<Prepared>,
}

/// Opens a capsule, wherever it is. Its manifest and the beginnings of its indexes are fetched, and nothing else.
pub async fn open(
    node: &Arc<Node>,
    capsule: &CapsuleRef,
    wait: Option<u64>,
    tell: &dyn Tell,
) -> Result<Opened, Failure> {
    let resolution = find(node, capsule, wait, tell).await?;
    let manner = Manner {
        paged: true,
        ..manner(&resolution, Priority::Normal)
    };
    let asked = Arc::new(Patience::default());
    let _place = asked.wait(Instant::now(), patience(wait));
    // Local data that only resembles it is not looked for: that reads all of it first.
    let mut excluded = Excluded {
        like: true,
        ..Excluded::default()
    };
    for _ in 0..MAX_TRIES {
        let prepared = prepare(node, &resolution, &manner, &asked, tell, &mut excluded).await?;
        let (shared, capsule) = (node.clone(), resolution.capsule);
        let layers = prepared.components.iter().flat_map(|plan| &plan.layers);
        let layers: Vec<Layer> = layers.cloned().collect();
        let foreign = blocking(move || foreign(&shared, capsule, layers)).await?;
        if foreign.is_empty() {
            return Ok(Opened {
                node: node.clone(),
                resolution,
                prepared: Arc::new(prepared),
            });
        }
        excluded.layers.extend(foreign);
        let message = format!(
            "the layers known for {} are not by machines that publish in its channel, and a disk that is read while it comes cannot be compared with its hash",
            manner.name
        );
        let hint = format!(
            "`capsule pull {}` fetches all of it and compares",
            manner.name
        );
        excluded.failure = Some(Failure::new(FailureCode::Refused, message).hint(hint));
    }
    Err(not_as_recorded(&manner.name))
}

/// Tells what a capsule is.
pub async fn describe(
    node: &Arc<Node>,
    request: Describe,
    tell: &dyn Tell,
) -> Result<Described, Failure> {
    let opened = open(node, &request.capsule, request.wait, tell).await?;
    let (shared, manifest) = (node.clone(), opened.manifest().clone());
    let resolution = opened.resolution.clone();
    blocking(move || {
        let mut prefetch = Vec::new();
        for component in &manifest.components {
            if let Some(found) = shared.records.prefetch_of(&component.root)? {
                let fits = |(start, len): &(u64, u64)| start + len <= component.size;
                let ranges = found.ranges.into_iter().filter(fits);
                let ranges = ranges.map(|(start, length)| ByteRange { start, length });
                prefetch.push(ReadFirst {
                    component: component.name.clone(),
                    ranges: ranges.collect(),
                });
            }
        }
        Ok(Described {
            capsule: resolution.capsule,
            name: resolution.name.as_ref().map(ToString::to_string),
            components: manifest.components.iter().map(component_info).collect(),
            machine: manifest.machine,
            prefetch,
        })
    })
    .await
}

/// Layers by machines that never named a version of a channel that has the capsule. A pull compares what layers make with the root; who reads while it
/// comes cannot, and so trusts who names the capsule, and nobody else. Blocks.
fn foreign(node: &Node, capsule: CapsuleId, layers: Vec<Layer>) -> Result<Vec<Layer>, Failure> {
    let names = node.records.all_names()?;
    let of_it = names.iter().filter(|name| name.capsule == capsule);
    let channels: BTreeSet<_> = of_it.map(|name| name.name.channel.clone()).collect();
    let named_there = names
        .iter()
        .filter(|name| channels.contains(&name.name.channel));
    let trusted: BTreeSet<MachineId> = named_there.map(|name| name.signer).collect();
    let mut foreign = Vec::new();
    for layer in layers {
        let known = node.records.layers_to(&layer.target)?;
        let vouches = |known: &KnownLayer| known.layer == layer && trusted.contains(&known.signer);
        if !known.iter().any(vouches) {
            foreign.push(layer);
        }
    }
    Ok(foreign)
}

impl Opened {
    /// What it consists of.
    pub fn manifest(&self) -> &Manifest {
        &self.prepared.manifest
    }

    /// How it is called.
    pub fn name(&self) -> String {
        spelled(&self.resolution)
    }

    /// A stream among its components.
    pub async fn stream(&self, component: &Component) -> Result<Paged, Failure> {
        let size = component.size;
        match self.way(component)? {
            HeldWay::Layers(layers) => self.paged(component, layers, size).await,
            _ => self.blob(component, BlobKind::Other).await,
        }
    }

    /// A tree among its components: its listing, which is fetched whole, and what its files hold, where they hold anything.
    pub async fn tree(&self, component: &Component) -> Result<(Listing, Option<Paged>), Failure> {
        let HeldWay::Tree(way) = self.way(component)? else {
            let message = format!("component {} was planned as a stream", component.name);
            return Err(Failure::new(FailureCode::Internal, message));
        };
        let holdings = self.node.holdings.clone();
        let listing = if holdings.is_complete(&component.root) {
            let component = component.clone();
            blocking(move || holdings.listing(&component)).await?
        } else if way.listing.is_empty() {
            let paged = self.blob(component, BlobKind::Listing).await?;
            listing(component, paged).await?
        } else {
            let paged = self.paged(component, way.listing, component.size).await?;
            listing(component, paged).await?
        };
        if listing.content_size() != component.content_size {
            return Err(wrong(component, "its files do not add up to its size"));
        }
        let contents = match component.content_size {
            0 => None,
            size => Some(self.paged(component, way.contents, size).await?),
        };
        Ok((listing, contents))
    }

    /// What lies under the component's own root.
    async fn blob(&self, component: &Component, kind: BlobKind) -> Result<Paged, Failure> {
        let (node, prepared) = (self.node.clone(), self.prepared.clone());
        let (root, size) = (component.root, component.size);
        let blob = BlobRef { root, size };
        blocking(move || {
            expect(&node, &blob, kind)?;
            Ok(Paged::of_blob(&node, blob, prepared))
        })
        .await
    }

    fn way(&self, component: &Component) -> Result<HeldWay, Failure> {
        let mut plans = self.prepared.components.iter();
        let plan = plans.find(|plan| plan.component == *component);
        let plan = plan.ok_or_else(|| {
            let message = format!("component {} was not planned", component.name);
            Failure::new(FailureCode::Internal, message)
        })?;
        Ok(plan.way.clone())
    }

    async fn paged(
        &self,
        component: &Component,
        layers: Vec<LayerBlobs>,
        size: u64,
    ) -> Result<Paged, Failure> {
        let (node, prepared) = (self.node.clone(), self.prepared.clone());
        let component = component.clone();
        let space = match component.kind {
            ComponentKind::Tree => Space::Contents,
            _ => Space::Stream,
        };
        blocking(move || {
            let own = node.holdings.own_way(space, &component.root)?;
            let own = blobs_of(own.as_deref().unwrap_or_default()).collect();
            let packs = packs(&node, &prepared, &layers);
            for pack in packs.values() {
                expect(&node, pack, BlobKind::Pack)?;
            }
            let paged = Paged::of_layers(&node, &layers, &packs, own, prepared)?;
            match paged.len() == size {
                true => Ok(paged),
                false => Err(wrong(&component, "its layers make another length")),
            }
        })
        .await
    }
}

/// The packs of layers, with their sizes.
fn packs(node: &Node, prepared: &Prepared, layers: &[LayerBlobs]) -> BTreeMap<RootHash, BlobRef> {
    // What one component takes is listed with the first that takes it.
    let planned = |root: &RootHash| {
        let mut sizes = prepared.components.iter().map(|plan| plan.blobs.get(root));
        sizes.find_map(|found| found.map(|(size, _)| *size))
    };
    // Of a pack of which nothing is read nobody need know the size.
    let size = |root: &RootHash| match node.store.durable(root) {
        Some(here) => Some(here.size),
        None => planned(root).filter(|size| *size > 0),
    };
    let packs = layers.iter().filter_map(|layer| layer.pack);
    let sized = |root: RootHash| size(&root).map(|size| (root, BlobRef { root, size }));
    packs.filter_map(sized).collect()
}

/// Makes room in the books for a blob that may come.
fn expect(node: &Node, blob: &BlobRef, kind: BlobKind) -> Result<(), Failure> {
    match node.store.durable(&blob.root) {
        Some(_) => Ok(()),
        None => Ok(node.store.create_partial(&blob.root, blob.size, kind)?),
    }
}

fn wrong(component: &Component, why: &str) -> Failure {
    let message = format!(
        "component {} is not what the manifest says: {why}",
        component.name
    );
    Failure::new(FailureCode::Damaged, message)
        .hint("its publisher made it wrong: tell them to publish it again")
}

/// A listing that comes as content: all of it is read, and compared with its root.
async fn listing(component: &Component, paged: Paged) -> Result<Listing, Failure> {
    if component.size > MAX_LISTING_LEN as u64 {
        return Err(wrong(component, "its listing is longer than any may be"));
    }
    let bytes = Arc::new(paged).read(0..component.size, Vec::new()).await?;
    let component = component.clone();
    blocking(move || {
        if RootHash::of(&bytes) != component.root {
            return Err(wrong(&component, "its listing has another hash"));
        }
        Listing::decode(&bytes)
            .map_err(|error| wrong(&component, &format!("its listing is malformed: {error}")))
    })
    .await
}
