//! Checking what was fetched against what the manifest promises: one pass over each component.
//!
//! Every fetched byte matched its blob's hash, but only decoding shows whether the layers make the component that their record
//! says; if they do not, their publisher is at fault, whatever the peers did. The pass also makes the component's hash tree,
//! with which it is served under its own root. All functions block.

use std::io;
use std::num::NonZeroUsize;
use std::thread::available_parallelism;

use capsule_chunker::bao::{ContentHasher, Tree, TreeHasher};
use capsule_chunker::content::{Content, Progress, ReadError, check_range};
use capsule_chunker::layer::read::{LayerContent, ReadOptions};
use capsule_chunker::layer::restore::{RestoreError, Sink, restore};
use capsule_chunker::layer::{Unproved, stored_index};
use capsule_proto::index::Space;
use capsule_proto::listing::{Listing, MAX_LISTING_LEN};
use capsule_proto::manifest::Component;
use capsule_proto::{GroupRanges, RootHash};
use positioned_io::ReadAt;

use super::files::Files;
use crate::control::{Failure, FailureCode};
use crate::failure::of_hash;
use crate::held::{HeldWay, Holdings, TreeWay};
use crate::layers::open;
use crate::rehash::{Differing, RehashError, rehash, tree_of};
use crate::store::{BlobKind, ComponentRecipe, LayerBlobs, Scratch, Store};
use crate::work::Work;

/// Checks a component that came by `way`, and registers it: from then on it is held. `early`: of what was proved while it came, what is left.
pub fn check(
    store: &Store,
    component: &Component,
    way: &HeldWay,
    early: Option<Unproved>,
    work: &Work,
) -> Result<(), Failure> {
    match way {
        HeldWay::Blob => check_blob(store, component, work),
        HeldWay::Layers(layers) => check_stream(store, component, layers, early, work),
        HeldWay::Tree(way) => check_tree(store, component, way, work),
    }
}

/// Threads to decode with: all, as a person waits.
pub fn threads() -> NonZeroUsize {
    available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

fn check_size(component: &Component, found: u64) -> Result<(), Failure> {
    if found == component.size {
        return Ok(());
    }
    Err(wrong(
        component,
        &format!("it has {found} bytes, not {}", component.size),
    ))
}

/// What came as a blob of its own was verified as it came. It gets an index, so that later versions can be put upon it.
fn check_blob(store: &Store, component: &Component, work: &Work) -> Result<(), Failure> {
    let size = store.durable(&component.root).map_or(0, |here| here.size);
    check_size(component, size)?;
    let holdings = Holdings::new(store.clone());
    if size == 0 || holdings.recipe(Space::Stream, &component.root)?.is_some() {
        return Ok(());
    }
    let content = BlobContent {
        blob: store.open_blob(&component.root)?,
        size,
    };
    let Some(index) = stored_index(&content, component.root, work)? else {
        let bad = store.verify(&component.root)?;
        let message = format!(
            "{} chunk groups of {} are damaged on this machine's disk",
            bad.count(),
            component.root
        );
        let hint = "the same command fetches them again; look at the disk's health";
        return Err(Failure::new(FailureCode::Io, message).hint(hint));
    };
    let layer = LayerBlobs {
        index: RootHash::of(&index),
        pack: Some(component.root),
    };
    let _guard = store.guard([layer.index]);
    store.put_small(&index, BlobKind::Index)?;
    Ok(holdings.put_blob_way(&component.root, &[layer])?)
}

/// A blob as content.
struct BlobContent<B> {
    blob: B,
    size: u64,
}

impl<B: std::ops::Deref<Target: ReadAt> + Send + Sync> Content for BlobContent<B> {
    fn len(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(self.size, offset, buf.len())?;
        self.blob
            .read_exact_at(offset, buf)
            .map_err(|error| ReadError::io("a blob of the store", offset, error))
    }
}

fn check_stream(
    store: &Store,
    component: &Component,
    layers: &[LayerBlobs],
    early: Option<Unproved>,
    work: &Work,
) -> Result<(), Failure> {
    let content = open(store, layers, &ReadOptions::default())?;
    check_size(component, content.len())?;
    let is_pack = layers.last().and_then(|layer| layer.pack) == Some(component.root);
    if is_pack && check_pack(store, component, layers, &content, early, work)? {
        return Ok(Holdings::new(store.clone()).put_blob_way(&component.root, layers)?);
    }
    if let Some((tree, outboard)) = check_changes(store, component, layers, &content, work)? {
        if tree.root != component.root {
            return Err(wrong(component, "its bytes have another hash"));
        }
        return register(store, component, layers, outboard);
    }
    let mut hasher = TreeHasher::<Scratch>::with_storage(store.scratch()?);
    pass(
        store,
        component,
        layers,
        &content,
        &mut Nowhere,
        Some(&mut hasher),
        work,
    )?;
    let (tree, outboard) = hasher.finish().map_err(of_hash)?;
    if tree.root != component.root {
        return Err(wrong(component, "its bytes have another hash"));
    }
    register(store, component, layers, outboard)
}

/// Checks a stream that is its last layer's pack as it lies, where all of that is here: its bytes were verified as they came. But its frames' hashes
/// are its publisher's word, which later versions rest on. False where that is not how it lies.
fn check_pack(
    store: &Store,
    component: &Component,
    layers: &[LayerBlobs],
    content: &LayerContent,
    early: Option<Unproved>,
    work: &Work,
) -> Result<bool, Failure> {
    if !Holdings::new(store.clone()).is_complete(&component.root) {
        return Ok(false);
    }
    if let Some(unproved) = early {
        prove(store, component, layers, content, unproved, work)?;
        return Ok(true);
    }
    let is_its_pack = content.is_its_pack();
    let is_its_pack = is_its_pack.map_err(|error| wrong(component, &error.to_string()))?;
    if is_its_pack {
        pass(store, component, layers, content, &mut Nowhere, None, work)?;
    }
    Ok(is_its_pack)
}

/// Proves what is left of a pack.
fn prove(
    store: &Store,
    component: &Component,
    layers: &[LayerBlobs],
    content: &LayerContent,
    mut unproved: Unproved,
    work: &Work,
) -> Result<(), Failure> {
    let all = &GroupRanges::all(component.size);
    work.written(component.size.saturating_sub(unproved.left()));
    match unproved.prove(content, (all, all), u64::MAX, threads(), work) {
        Ok(_) if unproved.left() == 0 => Ok(()),
        Ok(_) => Err(wrong(component, "its frames reach beyond its end")),
        Err(error) => {
            work.check()?;
            damaged_here(store, layers)?;
            Err(wrong(component, &error.to_string()))
        }
    }
}

/// The tree of an update of content that is here and was checked by the same layers: only what the last layer changes is decoded.
/// None where there is no such content, or its tree is damaged, or most has changed.
fn check_changes(
    store: &Store,
    component: &Component,
    layers: &[LayerBlobs],
    content: &LayerContent,
    work: &Work,
) -> Result<Option<(Tree, Scratch)>, Failure> {
    let Some(((_, below), parent)) = layers.split_last().zip(content.header().parent) else {
        return Ok(None);
    };
    let by_same = |held: &crate::store::Component| held.recipe.layers == below;
    let Some(base) = store
        .component(&parent)
        .filter(by_same)
        .and_then(|_| tree_of(store, parent))
    else {
        return Ok(None);
    };
    let changes = match content.changes() {
        Ok(changes) => changes,
        Err(error) => {
            damaged_here(store, layers)?;
            return Err(wrong(component, &error.to_string()));
        }
    };
    // What changed is read by one thread mostly, all of it by all of them.
    let changed = changes.groups.bytes(component.size);
    if changed.saturating_mul(threads().get() as u64) >= component.size {
        return Ok(None);
    }
    let differing = Differing {
        base,
        changed: changes.groups,
        zero: changes.zero,
    };
    work.read(component.size - changed);
    match rehash(store, content, &differing, work) {
        Ok(hashed) => Ok(Some(hashed)),
        Err(RehashError::Base) => Ok(None),
        Err(RehashError::Failed(failure)) => Err(failure),
        Err(RehashError::Read(error)) => {
            damaged_here(store, layers)?;
            Err(wrong(component, &error.to_string()))
        }
    }
}

/// Serves a checked stream under its own root from now on.
///
/// Content that does not compress lies in its pack as it is: then the pack is the component, and needs no other way.
pub fn register(
    store: &Store,
    component: &Component,
    layers: &[LayerBlobs],
    outboard: Scratch,
) -> Result<(), Failure> {
    if crate::held::blobs_of(layers).any(|blob| blob == component.root) {
        return Ok(Holdings::new(store.clone()).put_blob_way(&component.root, layers)?);
    }
    Holdings::new(store.clone()).note_reached(layers)?;
    let recipe = ComponentRecipe {
        layers: layers.to_vec(),
    };
    Ok(store.register_component(&component.root, component.size, recipe, outboard)?)
}

/// A tree's listing, decoded where it is not here yet, and what the manifest says of it.
pub(super) fn listing(
    store: &Store,
    component: &Component,
    way: &TreeWay,
) -> Result<Listing, Failure> {
    let holdings = Holdings::new(store.clone());
    // Layers of a listing that is here need not be: they are only kept to be served.
    holdings.note_reached(&way.listing)?;
    let listing = if way.listing.is_empty() || !store.is_readable(&way.listing)? {
        holdings
            .listing(component)
            .map_err(|failure| of_disk(failure, holdings.is_complete(&component.root)))?
    } else {
        restore_listing(store, component, &way.listing)?
    };
    if listing.content_size() != component.content_size {
        return Err(wrong(
            component,
            "its files do not add up to the size in the manifest",
        ));
    }
    Ok(listing)
}

fn check_tree(
    store: &Store,
    component: &Component,
    way: &TreeWay,
    work: &Work,
) -> Result<(), Failure> {
    let holdings = Holdings::new(store.clone());
    let listing = listing(store, component, way)?;
    // Registered without its contents, a tree would lose them to the next collection.
    if component.content_size > 0 && way.contents.is_empty() {
        let message = format!(
            "no layers to the contents of component {} were chosen",
            component.name
        );
        return Err(Failure::new(FailureCode::Internal, message).hint("try again"));
    }
    if !way.contents.is_empty() {
        let content = open(store, &way.contents, &ReadOptions::default())?;
        if content.len() != component.content_size {
            return Err(wrong(
                component,
                "the layer of its contents has another length",
            ));
        }
        let mut files = Files::new(&listing, component);
        pass(
            store,
            component,
            &way.contents,
            &content,
            &mut files,
            None,
            work,
        )?;
        files.finish()?;
    }
    holdings.put_tree_way(&component.root, way)
}

/// What was damaged on this disk is not its publisher's fault: the store has taken it out by then.
fn of_disk(failure: Failure, is_still_complete: bool) -> Failure {
    if is_still_complete {
        return failure;
    }
    let hint = "the same command fetches it again; look at the disk's health";
    Failure {
        code: FailureCode::Io,
        ..failure
    }
    .hint(hint)
}

/// Decodes a listing, which becomes a blob of the component's root.
fn restore_listing(
    store: &Store,
    component: &Component,
    layers: &[LayerBlobs],
) -> Result<Listing, Failure> {
    let content = open(store, layers, &ReadOptions::default())?;
    check_size(component, content.len())?;
    if content.len() > MAX_LISTING_LEN as u64 {
        return Err(wrong(component, "its listing is longer than any may be"));
    }
    let mut bytes = vec![0; content.len() as usize];
    if let Err(error) = content.read_at(0, &mut bytes) {
        damaged_here(store, layers)?;
        return Err(wrong(component, &error.to_string()));
    }
    if RootHash::of(&bytes) != component.root {
        return Err(wrong(component, "its listing has another hash"));
    }
    let listing = Listing::decode(&bytes)
        .map_err(|e| wrong(component, &format!("its listing is malformed: {e}")))?;
    store.put_small(&bytes, BlobKind::Listing)?;
    Ok(listing)
}

/// One pass over content. A failure to decode is the disk's fault or the publisher's: the blobs' hashes tell which.
fn pass(
    store: &Store,
    component: &Component,
    layers: &[LayerBlobs],
    content: &LayerContent,
    sink: &mut dyn Sink,
    hasher: Option<&mut dyn ContentHasher>,
    work: &Work,
) -> Result<(), Failure> {
    let Err(error) = restore(content, threads(), sink, hasher, work) else {
        return Ok(());
    };
    let undecodable = matches!(error, RestoreError::Layer { .. });
    let failure = Failure::from(error);
    if undecodable {
        damaged_here(store, layers)?;
        return Err(wrong(component, &failure.message));
    }
    Err(failure)
}

/// Fails if the blobs of layers no longer are what they were when they were fetched.
fn damaged_here(store: &Store, layers: &[LayerBlobs]) -> Result<(), Failure> {
    for blob in crate::held::blobs_of(layers) {
        let bad = store.verify(&blob)?;
        if !bad.is_empty() {
            let message = format!(
                "{} chunk groups of {blob} are damaged on this machine's disk",
                bad.count()
            );
            let hint = "the same command fetches them again; look at the disk's health";
            return Err(Failure::new(FailureCode::Io, message).hint(hint));
        }
    }
    // Or something else took them out meanwhile.
    let holdings = Holdings::new(store.clone());
    holdings.note_reached(layers)?;
    if !store.is_readable(layers)? {
        let message = "what was fetched is no longer all here";
        return Err(Failure::new(FailureCode::Io, message).hint("the same command resumes"));
    }
    Ok(())
}

/// The layers do not make the component.
pub(super) fn wrong(component: &Component, why: &str) -> Failure {
    let message = format!(
        "component {} is not what the manifest says: {why}; it was refused, and nothing was replaced",
        component.name
    );
    Failure::new(FailureCode::Damaged, message)
        .hint("its publisher made it wrong, not the network: tell them to publish it again")
}

/// Only the hasher is wanted.
struct Nowhere;

impl Sink for Nowhere {
    fn data(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn zeros(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}
