//! What stays and what goes: pins, collection, removal.
//!
//! A capsule is wanted while somebody pins it (the user, its publication here, a followed channel) or a pull of it runs. The store
//! removes blobs; which of them are needed is decided here. What is read of packs is noted before that (`needs`), as it may take long and can
//! be stopped. All else happens while `Node::keeping` is held: what was decided is
//! still so when it is done.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use capsule_proto::{CapsuleId, GroupRanges, RootHash};

use crate::control::{
    CapsuleRef, Collected, Failure, FailureCode, Gc, Pin, Pinned, Removed, Reporter, Rm, Unpin,
};
use crate::needs::{Needs, note_ways};
use crate::node::{Node, spelled};
use crate::store::{DatabaseError, GcMode, GcReport, PinOrigin, Store};
use crate::work::{blocking, panicked};

/// A pin's owner in answers.
pub fn origin_word(origin: &PinOrigin) -> String {
    match origin {
        PinOrigin::User => "user".to_owned(),
        PinOrigin::Publication => "publication".to_owned(),
        PinOrigin::Follow(channel) => format!("follow:{channel}"),
        PinOrigin::Machine(name) => format!("machine:{name}"),
    }
}

/// Who pins a capsule.
pub fn pins_of(node: &Node, capsule: &CapsuleId) -> Result<Vec<String>, DatabaseError> {
    let pins = node.store.pins()?;
    Ok(pins
        .iter()
        .filter(|(id, _)| id == capsule)
        .map(|(_, origin)| origin_word(origin))
        .collect())
}

/// Pins a capsule for the user, or for a machine that stands on it.
pub async fn pin(node: &Arc<Node>, request: Pin) -> Result<Pinned, Failure> {
    let origin = request.machine.map_or(PinOrigin::User, PinOrigin::Machine);
    change_pins(node, request.capsule, move |node, capsule| {
        node.store.pin(capsule, &origin)
    })
    .await
}

/// Takes the user's pin and the publication's away, or a machine's; a followed channel keeps its own.
pub async fn unpin(node: &Arc<Node>, request: Unpin) -> Result<Pinned, Failure> {
    let machine = request.machine.map(PinOrigin::Machine);
    change_pins(node, request.capsule, move |node, capsule| {
        if let Some(machine) = machine {
            return node.store.unpin(capsule, &machine);
        }
        let user = node.store.unpin(capsule, &PinOrigin::User)?;
        Ok(node.store.unpin(capsule, &PinOrigin::Publication)? || user)
    })
    .await
}

async fn change_pins(
    node: &Arc<Node>,
    reference: CapsuleRef,
    change: impl FnOnce(&Node, &CapsuleId) -> Result<bool, DatabaseError> + Send + 'static,
) -> Result<Pinned, Failure> {
    node.while_keeping(move |node| {
        let capsule = node.resolve(&reference)?.capsule;
        let changed = change(node, &capsule)?;
        Ok(Pinned {
            capsule,
            changed,
            pins: pins_of(node, &capsule)?,
        })
    })
    .await
}

/// Takes away the pins of machines that were removed while no node ran.
pub fn unpin_gone_machines(node: &Node) -> Result<(), Failure> {
    for (capsule, origin) in node.store.pins()? {
        if let PinOrigin::Machine(name) = &origin
            && !node
                .home
                .machines_dir()
                .join(name)
                .join("machine.json")
                .exists()
        {
            node.store.unpin(&capsule, &origin)?;
        }
    }
    Ok(())
}

/// Removes what nobody pins.
pub async fn gc(node: &Arc<Node>, request: Gc) -> Result<Collected, Failure> {
    let dry_run = request.dry_run;
    note_ways(node, |node| Ok(split(node)?.0), &Reporter::silent()).await?;
    let collection = move |node: &Node| collect(node, dry_run);
    let (dead, report) = if dry_run {
        node.while_keeping(collection).await?
    } else {
        take_away(node, collection).await?
    };
    Ok(Collected {
        dry_run,
        capsules: dead,
        blobs: (report.blobs.len() + report.components.len()) as u64,
        punched: report.punched.len() as u64,
        punched_bytes: punched_bytes(&report),
        bytes: report.freed,
        busy: report.in_use.len() as u64,
    })
}

fn punched_bytes(report: &GcReport) -> u64 {
    report.punched.iter().map(|(_, bytes)| bytes).sum()
}

/// Frees what capsules do not need: whole blobs, and the parts of packs that nothing of theirs is read from.
fn free(
    node: &Node,
    needs: Needs,
    candidates: Option<&BTreeSet<RootHash>>,
    mode: GcMode,
) -> Result<GcReport, Failure> {
    let collect = mode == GcMode::Collect;
    let may_go = |root: &RootHash| candidates.is_none_or(|candidates| candidates.contains(root));
    if collect {
        node.components.close_all();
    }
    let live = |root: &RootHash| needs.contains(root) || !may_go(root);
    let mut report = node.store.gc(&live, mode)?;
    let dead = needs.dead(&node.store);
    let dead = dead.iter().filter(|(root, _)| may_go(root));
    node.store.punch_all(dead, mode, &mut report)?;
    if collect {
        forget_ways(node, &report)?;
        // What a pull that is under way noted belongs to nothing yet.
        if node.transfers.list().is_empty() {
            needs.forget_others(&node.store)?;
        }
    }
    Ok(report)
}

/// The capsules that stay, pinned ones of which nothing is here too, and those that nobody wants.
fn split(node: &Node) -> Result<(Vec<CapsuleId>, Vec<CapsuleId>), Failure> {
    let pinned: BTreeSet<CapsuleId> = node.store.pins()?.into_iter().map(|(id, _)| id).collect();
    let held: BTreeSet<CapsuleId> = node
        .store
        .capsules()?
        .into_iter()
        .map(|(id, _)| id)
        .collect();
    let stays = |id: &CapsuleId| pinned.contains(id) || node.transfers.is_running(id);
    Ok(held.union(&pinned).copied().partition(stays))
}

fn collect(node: &Node, dry_run: bool) -> Result<(Vec<CapsuleId>, GcReport), Failure> {
    let (mut living, doomed) = split(node)?;
    let mut dead = Vec::new();
    for id in doomed {
        // First they are not held any more, then their blobs go: the other way round, a crash would leave capsules without content.
        if dry_run || node.store.remove_unpinned(&id)? {
            dead.push(id);
        } else {
            living.push(id);
        }
    }
    let needs = Needs::of(node, &living)?;
    let mode = if dry_run {
        GcMode::DryRun
    } else {
        GcMode::Collect
    };
    Ok((dead, free(node, needs, None, mode)?))
}

/// Forgets how trees were read whose listings went, and what was offered for components that went.
fn forget_ways(node: &Node, report: &GcReport) -> Result<(), DatabaseError> {
    let blobs = report.blobs.iter().map(|(root, _, _)| root);
    node.holdings.forget_ways(blobs.chain(&report.components))
}

/// Removes one capsule; what others need stays.
pub async fn rm(node: &Arc<Node>, request: Rm) -> Result<Removed, Failure> {
    let reference = request.capsule.clone();
    let staying = move |node: &Node| {
        let capsule = node.resolve(&reference)?.capsule;
        Ok(others(node, &capsule)?)
    };
    note_ways(node, staying, &Reporter::silent()).await?;
    let (capsule, report) = take_away(node, move |node| remove(node, &request)).await?;
    Ok(Removed {
        capsule,
        blobs: (report.blobs.len() + report.components.len()) as u64,
        punched: report.punched.len() as u64,
        punched_bytes: punched_bytes(&report),
        bytes: report.freed,
        busy: report.in_use.len() as u64,
    })
}

fn remove(node: &Node, request: &Rm) -> Result<(CapsuleId, GcReport), Failure> {
    let resolution = node.resolve(&request.capsule)?;
    let (capsule, name) = (resolution.capsule, spelled(&resolution));
    let Some(_) = node.store.capsule(&capsule)? else {
        let message = format!("nothing of {name} is here");
        return Err(Failure::new(FailureCode::NotFound, message)
            .hint("`capsule ls --held` lists what is here"));
    };
    if node.transfers.is_running(&capsule) {
        let message = format!("{name} is being pulled");
        return Err(Failure::new(FailureCode::Refused, message)
            .hint("stop that pull first, or unfollow its channel"));
    }
    let pins = pins_of(node, &capsule)?;
    if !pins.is_empty() && !request.force {
        let message = format!("{name} is pinned ({})", pins.join(", "));
        let hint = format!(
            "`capsule unpin {name}` (a followed channel: `capsule unfollow`; a machine: `capsule machine rm`), or remove it all the same with --force"
        );
        return Err(Failure::new(FailureCode::Refused, message).hint(hint));
    }
    let candidates = node.holdings.blobs_of(&capsule, &node.records)?;
    let needs = Needs::of(node, &others(node, &capsule)?)?;
    node.store.remove_capsule(&capsule)?;
    // Everything lives but what this capsule alone needed.
    let report = free(node, needs, Some(&candidates), GcMode::Collect)?;
    Ok((capsule, report))
}

/// All capsules that are held but for one.
fn others(node: &Node, capsule: &CapsuleId) -> Result<Vec<CapsuleId>, DatabaseError> {
    let held = node.store.capsules()?.into_iter().map(|(id, _)| id);
    Ok(held.filter(|id| id != capsule).collect())
}

/// Removes, and withdraws what is gone, before anything else is kept: content that comes back is announced after that.
async fn take_away<T: Send + 'static>(
    node: &Arc<Node>,
    removal: impl FnOnce(&Node) -> Result<(T, GcReport), Failure> + Send + 'static,
) -> Result<(T, GcReport), Failure> {
    let node = node.clone();
    // Not stopped half-way, though who asked may go away: what is removed is also withdrawn.
    let done = tokio::spawn(async move {
        let _keeping = node.keeping.lock().await;
        let shared = node.clone();
        let (removed, less) = blocking(move || {
            let before = presence(&shared.store);
            let removed = removal(&shared);
            Ok((removed, less(&shared.store, before)))
        })
        .await?;
        // Also where it failed half-way.
        withdraw(&node, less).await?;
        removed
    });
    done.await.unwrap_or_else(|panic| Err(panicked(&panic)))
}

/// All that can be announced.
fn presence(store: &Store) -> BTreeMap<RootHash, GroupRanges> {
    let blobs = store.blobs().into_iter().map(|blob| blob.root);
    let components = store.components().into_iter().map(|(root, _)| root);
    let here = |root| Some((root, store.present(&root)?.ranges));
    blobs.chain(components).filter_map(here).collect()
}

/// Of what less is here than before.
fn less(store: &Store, before: BTreeMap<RootHash, GroupRanges>) -> Vec<RootHash> {
    let is_less = |(root, before): &(RootHash, GroupRanges)| {
        let now = store.present(root).map(|here| here.ranges);
        !before.difference(&now.unwrap_or_default()).is_empty()
    };
    let less = before.into_iter().filter(is_less);
    less.map(|(root, _)| root).collect()
}

/// Takes back what was announced, and tells the fleet.
async fn withdraw(node: &Node, less: Vec<RootHash>) -> Result<(), Failure> {
    for root in less {
        node.network.withdraw(root).await?;
        node.announce([root]).await?;
    }
    node.tell_capsules().await
}
