//! Making a component of what was found here and what was fetched: it is encoded anew, in one layer that only this node has.
//!
//! Encoding hashes the content, so this is the check too. From then on the component is held and served like any other.

use std::sync::Arc;

use capsule_chunker::layer::LayerSource;
use capsule_chunker::layer::encode::{Effort, EncodeOptions};
use capsule_chunker::layer::read::LayerContent;
use capsule_proto::manifest::{Component, ComponentKind};

use super::check::{register, wrong};
use crate::control::Failure;
use crate::encoding::{finish_layer, first_contents, first_stream};
use crate::held::{HeldWay, Holdings, TreeWay};
use crate::store::Store;
use crate::work::Work;

/// Encodes a component's content in one layer from nothing, and keeps that. `way` is how it would be read through what was published.
pub fn build(
    store: &Store,
    component: &Component,
    way: &HeldWay,
    content: Arc<LayerContent>,
    work: &Work,
) -> Result<(), Failure> {
    // Nobody but this node stores it: time is worth more than room.
    let options = EncodeOptions::new(component.kind, Effort::Fast);
    match way {
        HeldWay::Tree(way) => build_tree(store, component, way, content, &options, work),
        HeldWay::Layers(_) | HeldWay::Blob => {
            build_stream(store, component, content, &options, work)
        }
    }
}

fn build_stream(
    store: &Store,
    component: &Component,
    content: Arc<LayerContent>,
    options: &EncodeOptions,
    work: &Work,
) -> Result<(), Failure> {
    let source = LayerSource::new(content, None);
    let mut made = first_stream(store, &source, options, work)?;
    if made.tree.root != component.root || made.tree.size != component.size {
        return Err(wrong(component, "its bytes have another hash"));
    }
    let _guard = store.guard(crate::held::blobs_of(&made.way));
    if let Some(layer) = &mut made.layer {
        layer.keep(store)?;
    }
    match made.outboard.take() {
        Some(outboard) => register(store, component, &made.way, outboard),
        None => Err(crate::encoding::unexpected("a stream without a hash tree")),
    }
}

fn build_tree(
    store: &Store,
    component: &Component,
    way: &TreeWay,
    content: Arc<LayerContent>,
    options: &EncodeOptions,
    work: &Work,
) -> Result<(), Failure> {
    debug_assert_eq!(component.kind, ComponentKind::Tree);
    let listing = super::check::listing(store, component, way)?;
    let files: Vec<_> = listing.files().collect();
    let lens = files.iter().map(|(_, len, _)| *len).collect();
    let source = LayerSource::new(content, Some(lens));
    let made = first_contents(store, &source, options, work)?;
    let other = made
        .roots
        .iter()
        .zip(&files)
        .find(|(made, (_, _, root))| *made != root);
    if let Some((_, (entry, ..))) = other {
        let path = &listing.entries()[*entry].path;
        let why = format!("file {path} has another hash than in the listing");
        return Err(wrong(component, &why));
    }
    let (mut layer, _) = finish_layer(made.encoded, made.import, component.root, None, Vec::new());
    let way = TreeWay {
        listing: way.listing.clone(),
        contents: vec![layer.blobs],
    };
    let _guard = store.guard(crate::held::blobs_of(&way.contents));
    layer.keep(store)?;
    Holdings::new(store.clone()).put_tree_way(&component.root, &way)
}
