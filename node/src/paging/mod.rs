//! Capsules that are read while they come: planned like a pull, and then fetched as far as somebody reads.
//!
//! `paged` is such content; here a reference becomes one. What serves it to programs is `nbd`.

mod paged;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use capsule_proto::manifest::{Component, ComponentKind};
use capsule_proto::record::BlobRef;
use capsule_swarm::Priority;

use crate::control::{CapsuleRef, Failure, FailureCode};
use crate::export::pick;
use crate::node::Node;
use crate::records::Resolution;
use crate::store::BlobKind;
use crate::transfer::patience::Patience;
use crate::transfer::prepare::{Excluded, Prepared, prepare};
use crate::transfer::{find, manner, patience};
use crate::work::{Tell, blocking};
pub use paged::Paged;

/// A component that can be read.
pub struct Opened {
    /// Of what it is.
    pub resolution: Resolution,
    /// What it is.
    pub component: Component,
    /// Its bytes.
    pub content: Arc<Paged>,
}

/// Opens a stream of a capsule, wherever it is. Its manifest and indexes are fetched, and nothing else.
pub async fn open(
    node: &Arc<Node>,
    capsule: &CapsuleRef,
    component: Option<&str>,
    wait: Option<u64>,
    tell: &dyn Tell,
) -> Result<Opened, Failure> {
    let resolution = find(node, capsule, wait, tell).await?;
    let manner = manner(&resolution, Priority::Normal);
    let asked = Arc::new(Patience::default());
    let _place = asked.wait(Instant::now(), patience(wait));
    // Local data that only resembles it is not looked for: that reads all of it first.
    let mut excluded = Excluded {
        like: true,
        ..Excluded::default()
    };
    let prepared = prepare(node, &resolution, &manner, &asked, tell, &mut excluded).await?;
    let component = pick(&prepared.manifest, component, &manner.name)?.clone();
    if component.kind == ComponentKind::Tree {
        let message = format!(
            "component {} of {} is a directory tree",
            component.name, manner.name
        );
        return Err(Failure::new(FailureCode::Invalid, message).hint(format!(
            "write it with `capsule export {} --to DIR`",
            manner.name
        )));
    }
    let (shared, opened) = (node.clone(), component.clone());
    let content = blocking(move || content(&shared, &opened, prepared)).await?;
    Ok(Opened {
        resolution,
        component,
        content: Arc::new(content),
    })
}

/// The content of a component that was planned, which it keeps from removal. Blocks.
fn content(node: &Arc<Node>, component: &Component, prepared: Prepared) -> Result<Paged, Failure> {
    let plan = prepared.components.iter().find(|plan| {
        plan.component.root == component.root && plan.component.name == component.name
    });
    let plan = plan.ok_or_else(|| {
        Failure::new(
            FailureCode::Internal,
            "a component of the manifest was not planned",
        )
    })?;
    let way = plan.way.clone();
    // What one component takes is listed with the first that takes it.
    let mut packs: BTreeMap<_, u64> = BTreeMap::new();
    for plan in &prepared.components {
        packs.extend(plan.blobs.iter().map(|(root, (size, _))| (*root, *size)));
    }
    for root in way.blobs() {
        if let Some(here) = node.store.durable(&root) {
            packs.insert(root, here.size);
        }
    }
    let packs: BTreeMap<_, _> = packs
        .into_iter()
        .map(|(root, size)| (root, BlobRef { root, size }))
        .collect();
    for blob in packs.values() {
        let kind = match blob.root == component.root {
            true => BlobKind::Other,
            false => BlobKind::Pack,
        };
        if node.store.durable(&blob.root).is_none() {
            node.store.create_partial(&blob.root, blob.size, kind)?;
        }
    }
    Paged::open(node, component, &way, &packs, prepared)
}
