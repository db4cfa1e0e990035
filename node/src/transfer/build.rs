//! Making a component of what was found here and what was fetched: it is encoded anew, in one layer that only this node has.
//!
//! Encoding hashes the content, so this is the check too. From then on the component is held and served like any other.

use std::sync::Arc;

use capsule_chunker::layer::LayerSource;
use capsule_chunker::layer::encode::{Effort, EncodeOptions};
use capsule_chunker::layer::read::LayerContent;
use capsule_proto::listing::Listing;
use capsule_proto::manifest::{Component, ComponentKind};

use super::check::{register, wrong};
use crate::control::Failure;
use crate::encoding::{MadeLayer, finish_layer, first_contents, first_stream};
use crate::held::{HeldWay, Holdings, TreeWay};
use crate::store::{ActiveGuard, LayerBlobs, Store};
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
    let (mut made, _guard) = encode_stream(store, component, content, options, work)?;
    match made.outboard.take() {
        Some(outboard) => register(store, component, &made.way, outboard),
        None => Err(crate::encoding::unexpected("a stream without a hash tree")),
    }
}

/// Encodes a stream in one layer from nothing and keeps that, guarded. Nothing is read through it yet.
pub fn encode_stream(
    store: &Store,
    component: &Component,
    content: Arc<LayerContent>,
    options: &EncodeOptions,
    work: &Work,
) -> Result<(MadeLayer, ActiveGuard), Failure> {
    let source = LayerSource::new(content, None);
    let mut made = first_stream(store, &source, options, work)?;
    if made.tree.root != component.root || made.tree.size != component.size {
        return Err(wrong(component, "its bytes have another hash"));
    }
    let guard = store.guard(crate::held::blobs_of(&made.way));
    if let Some(layer) = &mut made.layer {
        layer.keep(store)?;
    }
    Ok((made, guard))
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
    let (contents, _guard) = encode_contents(store, component, &listing, content, options, work)?;
    let way = TreeWay {
        listing: way.listing.clone(),
        contents,
    };
    Holdings::new(store.clone()).put_tree_way(&component.root, &way)
}

/// The same of a tree's contents.
pub fn encode_contents(
    store: &Store,
    component: &Component,
    listing: &Listing,
    content: Arc<LayerContent>,
    options: &EncodeOptions,
    work: &Work,
) -> Result<(Vec<LayerBlobs>, ActiveGuard), Failure> {
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
    let contents = vec![layer.blobs];
    let guard = store.guard(crate::held::blobs_of(&contents));
    layer.keep(store)?;
    Ok((contents, guard))
}
