//! What an export that read wrong bytes means: damage on this machine's disk, which is taken out of what is held.
//!
//! Fetching it again is `capsule verify --repair`'s; an export only tells the way there.

use std::collections::BTreeSet;

use capsule_proto::RootHash;
use capsule_proto::manifest::Component;

use crate::control::{Failure, FailureCode};
use crate::held::HeldWay;
use crate::node::Node;
use crate::store::{ReadError, Store};
use crate::verify::mark_hurt;

/// Wrong bytes were read: fails as everything does that a later look at the disk explains.
pub fn unreadable(component: &Component, why: &str) -> Failure {
    let message = format!(
        "component {} does not read as its manifest says: {why}",
        component.name
    );
    Failure::new(FailureCode::Damaged, message)
}

/// Looks for the damage behind a failure, takes it out of what is held, and says what helps. Other failures stay as they are.
pub fn explain(
    node: &Node,
    name: &str,
    component: &Component,
    way: &HeldWay,
    failure: Failure,
) -> Failure {
    if failure.code != FailureCode::Damaged {
        return failure;
    }
    let found = take_out(&node.store, component, way);
    let message = match &found {
        Ok((_, bytes)) if *bytes > 0 => format!(
            "{name} cannot be exported: {bytes} bytes that component {} takes are damaged on this machine's disk; they no longer count as held",
            component.name
        ),
        // Taken out by somebody else meanwhile, or made wrong.
        Ok(_) => format!("{name} cannot be exported: {}", failure.message),
        Err(error) => format!(
            "{name} cannot be exported: {}; looking for the damage: {error}",
            failure.message
        ),
    };
    if let Ok((roots, _)) = &found
        && !roots.is_empty()
        && let Err(error) = note(node, roots)
    {
        // The damage itself is in the store, and is noted again when it is next looked for.
        tracing::warn!(%error, name, "which capsules the damage hurts could not be noted");
    }
    Failure::new(FailureCode::Damaged, message).hint(format!(
        "`capsule verify --repair {name}` fetches it again; look at the disk's health"
    ))
}

fn note(node: &Node, roots: &BTreeSet<RootHash>) -> Result<(), Failure> {
    // On a thread for long work, of which there are few.
    let _keeping = node.keeping.blocking_lock();
    mark_hurt(node, roots).map(drop)
}

/// Reads again all blobs that a component takes: those that were damaged, and how many bytes of them.
fn take_out(
    store: &Store,
    component: &Component,
    way: &HeldWay,
) -> Result<(BTreeSet<RootHash>, u64), ReadError> {
    let mut roots = way.blobs();
    if !matches!(way, HeldWay::Layers(_)) {
        // Its own blob, or a tree's listing.
        roots.insert(component.root);
    }
    let (mut damaged, mut bytes) = (BTreeSet::new(), 0);
    for root in roots {
        let bad = match store.verify(&root) {
            // Removed meanwhile, which is no damage.
            Err(ReadError::Unknown(_)) => continue,
            bad => bad?,
        };
        if !bad.is_empty() {
            bytes += store.present(&root).map_or(0, |here| bad.bytes(here.size));
            damaged.insert(root);
        }
    }
    Ok((damaged, bytes))
}
