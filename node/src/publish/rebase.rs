//! Rebasing: a layer from nothing to a capsule that is here, for newcomers, who would otherwise fetch all of its history.
//!
//! Content and id stay; only records are added. Machines with an older version go on fetching what differs from it.

use std::sync::Arc;
use std::time::Instant;

use capsule_chunker::content::BytesSource;
use capsule_chunker::layer::LayerSource;
use capsule_chunker::layer::encode::EncodeOptions;
use capsule_chunker::layer::read::ReadOptions;
use capsule_proto::index::Space;
use capsule_proto::manifest::{Component, ComponentKind, Manifest};
use capsule_proto::record::{BlobRef, Body, Layer};
use capsule_proto::{CapsuleId, RootHash};

use super::make::options;
use super::sign;
use crate::control::{Failure, FailureCode, Phase, Rebase, Rebased, Reporter};
use crate::encoding::{DraftLayer, finish_layer, first_contents, first_stream};
use crate::held::{blobs_of, layer_blobs};
use crate::layers::open;
use crate::node::{Node, spelled};
use crate::work::{Task, Work};

/// Adds layers from nothing to a capsule.
pub async fn rebase(
    node: &Arc<Node>,
    request: Rebase,
    reporter: &Reporter,
) -> Result<Rebased, Failure> {
    let started = Instant::now();
    let reference = request.capsule.clone();
    let found = node.while_keeping(move |node| {
        let resolution = node.resolve(&reference)?;
        let name = spelled(&resolution);
        let manifest = node.holdings.complete(&resolution.capsule, &name)?;
        let roots = node.holdings.blobs_of(&resolution.capsule, &node.records)?;
        // Content that is read must not be collected.
        Ok((resolution, name, manifest, node.store.guard(roots)))
    });
    let (resolution, name, manifest, _guard) = found.await?;
    if let Some(channel) = resolution.name.as_ref().map(|name| &name.channel)
        && !node.identity.credential.grant().may_publish(channel)
    {
        let message = format!("this machine may not publish in channel {channel}");
        return Err(Failure::new(FailureCode::NotPermitted, message).hint(
            "join with a token of `capsule fleet invite --role publisher`, for that channel or all",
        ));
    }
    let task = Task {
        phase: Phase::Publishing,
        total: Some(manifest.content_size()),
        what: Some(name.clone()),
    };
    let shared = node.clone();
    let making = move |work: &Work| {
        let making = Making {
            node: &shared,
            request: &request,
            machine: manifest.machine.is_some(),
            work,
        };
        making.all(&manifest)
    };
    let made = node.works.run(task, reporter, making).await?;
    let (pack_bytes, index_bytes) = made.iter().fold((0, 0), |(packs, indexes), made| {
        let pack = made.layer.pack.as_ref().map_or(0, |pack| pack.size);
        (packs + pack, indexes + made.layer.index.size)
    });
    let new = made.iter().any(|made| !made.known);
    // Not stopped half-way: what is kept is also announced.
    let (settling, capsule) = (node.clone(), resolution.capsule);
    let settled = tokio::spawn(async move { settle(&settling, capsule, made).await });
    settled
        .await
        .unwrap_or_else(|panic| Err(crate::work::panicked(&panic)))?;
    Ok(Rebased {
        capsule: resolution.capsule,
        name,
        unchanged: !new,
        pack_bytes,
        index_bytes,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// A further layer to a component, which is kept.
pub(super) struct Made {
    layer: Layer,
    /// Of its record.
    sequence: u64,
    /// Whether a record tells of it already.
    known: bool,
    /// Keeps its blobs until they are noted as offered.
    _guard: crate::store::ActiveGuard,
}

/// Keeps a further layer to what is here, whose content has that length.
pub(super) fn keep(
    node: &Node,
    mut layer: DraftLayer,
    sequence: u64,
    (target, target_size): (RootHash, u64),
) -> Result<Made, Failure> {
    let guard = node.store.guard(blobs_of(&[layer.blobs]));
    let pack = layer.pack.as_ref().map(|pack| pack.blob);
    let index = BlobRef {
        root: layer.blobs.index,
        size: layer.index.len() as u64,
    };
    layer.keep(&node.store)?;
    let known = node.records.layers_to(&target)?;
    let known = known
        .iter()
        .any(|known| known.layer.space == layer.space && layer_blobs(&known.layer) == layer.blobs);
    Ok(Made {
        layer: Layer {
            space: layer.space,
            parent: layer.parent,
            target,
            target_size,
            index,
            pack,
        },
        sequence,
        known,
        _guard: guard,
    })
}

/// Signs, notes and announces; unless the capsule was removed meanwhile.
pub(super) async fn settle(
    node: &Arc<Node>,
    capsule: CapsuleId,
    made: Vec<Made>,
) -> Result<(), Failure> {
    let (roots, records, _made) = node
        .while_keeping(move |node| {
            node.holdings.complete(&capsule, &capsule.to_string())?;
            let (mut roots, mut records) = (Vec::new(), Vec::new());
            for made in &made {
                let layer = &made.layer;
                let blobs = layer_blobs(layer);
                node.holdings.offer(&layer.target, blobs)?;
                roots.extend(blobs_of(&[blobs]));
                if !made.known {
                    let body = Body::Layer(layer.clone());
                    records.push(sign(node, made.sequence, body, None)?);
                }
            }
            Ok((roots, records, made))
        })
        .await?;
    node.announce(roots).await?;
    for record in records {
        node.network.publish_record(record).await?;
    }
    Ok(())
}

struct Making<'a> {
    node: &'a Node,
    request: &'a Rebase,
    /// Whether it is of a machine.
    machine: bool,
    work: &'a Work,
}

impl Making<'_> {
    fn all(&self, manifest: &Manifest) -> Result<Vec<Made>, Failure> {
        let mut made = Vec::new();
        for component in &manifest.components {
            made.push(self.stream(component)?);
            if component.kind == ComponentKind::Tree && component.content_size > 0 {
                made.push(self.contents(component)?);
            }
        }
        Ok(made)
    }

    fn options(&self, kind: ComponentKind) -> EncodeOptions {
        options(
            kind,
            self.request.effort,
            self.request.frame_max,
            self.machine,
        )
    }

    /// The layer to a stream, or to a tree's listing.
    fn stream(&self, component: &Component) -> Result<Made, Failure> {
        let store = &self.node.store;
        let (quiet, root) = (Work::default(), component.root);
        let made = if component.kind == ComponentKind::Tree {
            let listing = self.node.holdings.listing(component)?.encode();
            let options = self.options(ComponentKind::File);
            first_stream(store, &BytesSource(listing), &options, &quiet)?
        } else {
            let source = LayerSource::new(self.content(Space::Stream, component)?, None);
            first_stream(store, &source, &self.options(component.kind), self.work)?
        };
        if made.tree.root != root {
            return Err(changed(component));
        }
        let layer = made.layer.ok_or_else(|| changed(component))?;
        keep(self.node, layer, 0, (root, component.size))
    }

    fn contents(&self, component: &Component) -> Result<Made, Failure> {
        let listing = self.node.holdings.listing(component)?;
        let lens = listing.files().map(|(_, len, _)| len).collect();
        let content = self.content(Space::Contents, component)?;
        let source = LayerSource::new(content, Some(lens));
        let options = self.options(ComponentKind::Tree);
        let made = first_contents(&self.node.store, &source, &options, self.work)?;
        if !listing.files().map(|(_, _, root)| root).eq(made.roots) {
            return Err(changed(component));
        }
        let root = component.root;
        let (layer, _) = finish_layer(made.encoded, made.import, root, None, Vec::new());
        keep(self.node, layer, 0, (root, component.content_size))
    }

    fn content(
        &self,
        space: Space,
        component: &Component,
    ) -> Result<Arc<capsule_chunker::layer::read::LayerContent>, Failure> {
        let layers = self.node.holdings.recipe(space, &component.root)?;
        let layers = layers.ok_or_else(|| {
            let message = format!(
                "component {} is held as it is, without layers: it is its own base already",
                component.name
            );
            Failure::new(FailureCode::Refused, message)
                .hint("nothing is lost: newcomers fetch it as it is")
        })?;
        open(&self.node.store, &layers, &ReadOptions::default())
    }
}

fn changed(component: &Component) -> Failure {
    let message = format!("component {} is no longer what it was", component.name);
    Failure::new(FailureCode::Damaged, message)
        .hint("`capsule verify` looks for damage, and repairs it from other machines")
}
