//! Exporting: a held component becomes a file or a directory.
//!
//! Nothing that exists is touched without `--force`, and a file takes its name only when all of it is on the disk and hashes
//! to the component's root: the store's files are read as they lie, and disks decay. How a file is written lives in `file`,
//! what wrong bytes lead to in `damage`; trees are the chunker's, which hashes each file.

mod damage;
mod file;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use capsule_chunker::bao::RootHasher;
use capsule_chunker::layer::read::ReadOptions;
use capsule_chunker::layer::restore::restore;
use capsule_chunker::tree::{self, RestoreOptions, Restored, TreeWriter};
use capsule_proto::RootHash;
use capsule_proto::manifest::{Component, Manifest};

use crate::control::{Export, Exported, Failure, FailureCode, Phase, Reporter};
use crate::held::{HeldWay, Holdings, TreeWay, component_info};
use crate::layers::open;
use crate::node::{Node, spelled};
use crate::publish::{image_key, note};
use crate::store::{LayerBlobs, Store};
use crate::transfer::check::threads;
use crate::work::{Task, Work};
use file::Target;

/// Writes a component of a capsule to a path.
pub async fn export(
    node: &Arc<Node>,
    request: Export,
    reporter: &Reporter,
) -> Result<Exported, Failure> {
    let started = Instant::now();
    if !request.to.is_absolute() {
        return Err(Failure::new(
            FailureCode::Invalid,
            format!("{} is not an absolute path", request.to.display()),
        ));
    }
    let (reference, wanted) = (request.capsule.clone(), request.component.clone());
    // The way may be another the next moment, and the old one collected.
    let chosen = node.while_keeping(move |node| {
        let resolution = node.resolve(&reference)?;
        let name = spelled(&resolution);
        let manifest = node.holdings.complete(&resolution.capsule, &name)?;
        let component = pick(&manifest, wanted.as_deref(), &name)?.clone();
        let way = node.holdings.way_to(&component)?.ok_or_else(|| {
            Failure::new(
                FailureCode::Damaged,
                format!(
                    "component {} of {name} is not all here any more",
                    component.name
                ),
            )
            .hint(format!(
                "`capsule verify --repair {name}` or `capsule pull {name}` fetches what is missing"
            ))
        })?;
        let capsule = resolution.capsule;
        let blobs = way.blobs().into_iter().chain([component.root, capsule.0]);
        let guard = node.store.guard(blobs);
        Ok((capsule, name, component, way, guard))
    });
    let (capsule, name, component, way, guard) = chosen.await?;
    let task = Task {
        phase: Phase::Exporting,
        total: Some(component.content_size),
        what: Some(component.name.clone()),
    };
    let (shared, exported, to, force) = (
        node.clone(),
        component.clone(),
        request.to.clone(),
        request.force,
    );
    let restored = node
        .works
        .run(task, reporter, move |work| {
            let _guard = guard;
            let store = &shared.store;
            let written = match &way {
                HeldWay::Tree(way) => write_tree(store, &exported, way, &to, force, work).map(Some),
                stream => write_stream(store, &exported, stream, &to, force, work).map(|()| None),
            };
            written.map_err(|failure| damage::explain(&shared, &name, &exported, &way, failure))
        })
        .await?;
    Ok(Exported {
        capsule,
        bytes: component.content_size,
        component: component_info(&component),
        to: request.to,
        files: restored
            .as_ref()
            .map(|restored| restored.files_written + restored.files_kept),
        seconds: started.elapsed().as_secs_f64(),
        warnings: restored
            .map(|restored| restored.warnings())
            .unwrap_or_default(),
    })
}

/// The component that is meant.
pub fn pick<'a>(
    manifest: &'a Manifest,
    wanted: Option<&str>,
    name: &str,
) -> Result<&'a Component, Failure> {
    let names = || {
        manifest
            .components
            .iter()
            .map(|c| c.name.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    };
    match (wanted, &manifest.components[..]) {
        (Some(wanted), _) => manifest.component(wanted).ok_or_else(|| {
            Failure::new(
                FailureCode::NotFound,
                format!("{name} has no component {wanted}; it has: {}", names()),
            )
        }),
        (None, [only]) => Ok(only),
        (None, _) => {
            let message = format!("{name} has several components: {}", names());
            Err(Failure::new(FailureCode::Invalid, message).hint("say which with --component"))
        }
    }
}

fn write_tree(
    store: &Store,
    component: &Component,
    way: &TreeWay,
    to: &Path,
    force: bool,
    work: &Work,
) -> Result<Restored, Failure> {
    let listing = Arc::new(Holdings::new(store.clone()).listing(component)?);
    let options = RestoreOptions { force };
    if !force {
        let bytes = file::data_bytes(store, &way.contents)?.min(component.content_size);
        // An empty directory may be another file system's than the one above it.
        let place = if to.is_dir() { Some(to) } else { to.parent() };
        file::check_space(place.unwrap_or(to), bytes)?;
    }
    if way.contents.is_empty() {
        return Ok(TreeWriter::new(to, listing, &options, work)?.finish()?);
    }
    let contents = open(store, &way.contents, &ReadOptions::default())?;
    if force {
        // Only what differs is decoded.
        return Ok(tree::restore(to, listing, &*contents, &options, work)?);
    }
    let mut writer = TreeWriter::new(to, listing, &options, work)?;
    restore(&contents, threads(), &mut writer, None, work)?;
    Ok(writer.finish()?)
}

fn write_stream(
    store: &Store,
    component: &Component,
    way: &HeldWay,
    to: &Path,
    force: bool,
    work: &Work,
) -> Result<(), Failure> {
    // The target first: what is in the way is known at once.
    let mut target = Target::create(to, force)?;
    let found = match way {
        HeldWay::Layers(layers) => {
            let data = file::data_bytes(store, layers)?.min(component.size);
            file::check_space(target.dir(), data)?;
            restore_stream(store, component, layers, &mut target, work)?
        }
        _ => {
            file::check_space(target.dir(), component.size)?;
            let blob = store.open_blob(&component.root)?;
            target.copy(&*blob, component, work)?
        }
    };
    if found != component.root {
        return Err(damage::unreadable(component, "its bytes have another hash"));
    }
    let stamp = target.finish(component.size)?;
    if let Some(stamp) = stamp {
        // An image upon it is then published without being read where it changed nothing.
        note(store, &[image_key(&stamp, false)], component.root);
    }
    Ok(())
}

/// Writes what layers make; the hash of it. Nothing is written to the store, which may be full.
fn restore_stream(
    store: &Store,
    component: &Component,
    layers: &[LayerBlobs],
    target: &mut Target,
    work: &Work,
) -> Result<RootHash, Failure> {
    let content = open(store, layers, &ReadOptions::default())?;
    let mut hasher = RootHasher::new();
    restore(&content, threads(), target, Some(&mut hasher), work)?;
    hasher
        .finish()
        .map_err(|e| Failure::new(FailureCode::Io, format!("hashing {}: {e}", component.name)))
}
