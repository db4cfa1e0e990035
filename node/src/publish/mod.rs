//! Publishing: a path becomes a capsule with a name.
//!
//! Blobs are written and durable before anything names them; records come last. What fails before that leaves nothing, not even
//! space taken. Content that is here already is not stored twice, and publishing the same again does nothing. Reading and encoding live
//! in `make`, what comes of an older version in `parent` and `update`, a disk without its free space in `trim`; `rebase` adds layers to what is
//! published. A machine that was stopped is published by `capture`, what resuming it reads first in `front` of the rest; once somebody told better,
//! `reorder` adds that.

mod capture;
mod front;
mod make;
mod parent;
mod patched;
mod rebase;
mod record;
pub mod reorder;
#[cfg(test)]
pub(crate) mod tests;
mod trim;
mod update;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use capsule_proto::RootHash;
use capsule_proto::index::Space;
use capsule_proto::name::{CapsuleName, Version};
use capsule_proto::record::{BlobRef, Body, Layer, Name, RecordError};

use crate::control::{Failure, FailureCode, Phase, Publish, Published, Reporter};
use crate::encoding::DraftLayer;
use crate::held::{HeldWay, Holdings, blobs_of, component_info, layer_blobs};
use crate::node::Node;
use crate::records::{KnownName, SignError};
use crate::store::{ActiveGuard, BlobKind, GcMode, HeldCapsule, LayerBlobs, PinOrigin, Store};
use crate::transfer::check::register;
use crate::work::{Task, blocking, panicked};
pub use capture::{capture, check_name, prefetch};
pub use make::own_within;
use make::{Draft, DraftComponent, Making, make};
use parent::Parent;
pub use rebase::rebase;
pub use record::{image_key, note};

/// Publishes a path.
pub async fn publish(
    node: &Arc<Node>,
    request: Publish,
    reporter: &Reporter,
) -> Result<Published, Failure> {
    let started = Instant::now();
    let version = check_request(node, &request)?;
    let name = request.name.clone();
    let task = Task {
        phase: Phase::Publishing,
        total: None,
        what: Some(name.to_string()),
    };
    let asked = request.clone();
    let found = node.while_keeping(move |node| {
        let parent = Parent::of(node, &asked)?;
        let roots = match &parent {
            Some(parent) => node.holdings.blobs_of(&parent.capsule, &node.records)?,
            None => BTreeSet::new(),
        };
        // It must not be collected while it is read, nor before the layers upon it are kept.
        Ok((parent, node.store.guard(roots)))
    });
    let (parent, guard) = found.await?;
    // What is changed from now on may not be in it.
    let added = node.clock.now();
    let against = parent.as_ref().map(|parent| parent.name.clone());
    let (shared, teller, asked) = (node.clone(), reporter.clone(), request.clone());
    let draft = node
        .works
        .run(task, reporter, move |work| {
            make_against(&Making {
                store: &shared.store,
                home: shared.home.dir(),
                request: &asked,
                parent: parent.as_ref(),
                work,
                reporter: &teller,
                machine: false,
            })
        })
        .await?;
    // From here on it is not stopped half-way: what is kept is also named, announced and told.
    let (settling, naming) = (
        node.clone(),
        Naming {
            name: name.clone(),
            version,
            expires: request.expires,
            added,
        },
    );
    let settled = tokio::spawn(async move {
        let _parent = guard;
        settle(&settling, naming, draft).await
    });
    let (draft, unchanged) = settled
        .await
        .unwrap_or_else(|panic| Err(panicked(&panic)))?;
    if let [component] = &draft.manifest.components[..] {
        let (store, content, keys) = (node.store.clone(), component.root, draft.notes.clone());
        blocking(move || {
            note(&store, &keys, content);
            Ok(())
        })
        .await?;
    }
    Ok(answer(draft, &name, unchanged, against, started))
}

/// What is told of a draft that is kept; `against` was looked at for it.
fn answer(
    draft: Draft,
    name: &CapsuleName,
    unchanged: bool,
    against: Option<String>,
    started: Instant,
) -> Published {
    let sum = |of: fn(&DraftComponent) -> u64| draft.parts.iter().map(of).sum::<u64>();
    let (inherited, copied) = (
        sum(|part| part.stats.inherited),
        sum(|part| part.stats.copied),
    );
    let mut layers = draft.parts.iter().flat_map(|part| &part.layers);
    let is_upon_parent = layers.any(|layer| layer.parent.is_some()) || inherited + copied > 0;
    Published {
        capsule: draft.manifest.id(),
        name: name.to_string(),
        unchanged,
        components: draft
            .manifest
            .components
            .iter()
            .map(component_info)
            .collect(),
        content_bytes: draft.manifest.content_size(),
        zero_bytes: sum(|part| part.stats.zero),
        trimmed_bytes: draft.trimming.trimmed,
        trimmable_bytes: draft.trimming.trimmable,
        repeated_bytes: sum(|part| part.stats.repeated),
        parent: against.filter(|_| is_upon_parent),
        inherited_bytes: inherited,
        copied_bytes: copied,
        referring_bytes: sum(|part| part.stats.referring),
        unread_bytes: sum(|part| part.unread),
        pack_bytes: sum(|part| part.stats.pack),
        index_bytes: sum(|part| part.layers.iter().map(|made| made.index.len() as u64).sum()),
        seconds: started.elapsed().as_secs_f64(),
        warnings: draft.warnings,
    }
}

/// Makes a draft; against nothing where a parent that nobody asked for turns out to be damaged.
fn make_against(making: &Making<'_>) -> Result<Draft, Failure> {
    match make(making) {
        Err(failure)
            if failure.code == FailureCode::Damaged
                && making.parent.is_some()
                && making.request.parent.is_none() =>
        {
            let warning = format!(
                "{}: this is published against nothing; `capsule verify` repairs what is damaged",
                failure.message
            );
            making.reporter.notice(&warning);
            let mut draft = make(&Making {
                parent: None,
                ..*making
            })?;
            draft.warnings.push(warning);
            Ok(draft)
        }
        made => made,
    }
}

/// What can be refused before any work.
fn check_request(node: &Node, request: &Publish) -> Result<Version, Failure> {
    if !request.path.is_absolute() {
        let message = format!("{} is not an absolute path", request.path.display());
        return Err(Failure::new(FailureCode::Invalid, message));
    }
    check_naming(node, &request.name, request.expires)
}

/// The version that something is to be published as, if this machine may.
fn check_naming(node: &Node, name: &CapsuleName, expires: Option<u64>) -> Result<Version, Failure> {
    let invalid = |message: String| Failure::new(FailureCode::Invalid, message);
    let CapsuleName { channel, version } = name;
    let version = version.clone().ok_or_else(|| {
        invalid(format!("{channel} names no version"))
            .hint(format!("publish as CHANNEL:VERSION, such as {channel}:1"))
    })?;
    if expires.is_some_and(|end| end <= node.clock.now()) {
        return Err(invalid("the name would end before it begins".to_owned()));
    }
    let grant = node.identity.credential.grant();
    if !grant.may_publish(channel) {
        let message = format!("this machine may not publish in channel {channel}");
        return Err(Failure::new(FailureCode::NotPermitted, message).hint(
            "join with a token of `capsule fleet invite --role publisher`, for that channel or all",
        ));
    }
    Ok(version)
}

/// What a draft is to be called.
struct Naming {
    name: CapsuleName,
    version: Version,
    expires: Option<u64>,
    /// When its content was begun to be read, in seconds since 1970.
    added: u64,
}

/// What keeping a draft did.
struct Made {
    /// A guard of what was kept, until all is announced; none where it was here.
    kept: Option<ActiveGuard>,
    named: bool,
    roots: BTreeSet<RootHash>,
    records: Vec<Vec<u8>>,
}

/// Keeps, names and announces a draft; whatever is already so stays. Whether everything was.
async fn settle(node: &Arc<Node>, naming: Naming, draft: Draft) -> Result<(Draft, bool), Failure> {
    let _alone = node.naming.lock().await;
    let (draft, made) = node
        .while_keeping(move |node| keep_and_name(node, naming, draft))
        .await?;
    let unchanged = made.kept.is_none() && !made.named;
    if !unchanged {
        node.announce(made.roots).await?;
        for record in made.records {
            node.network.publish_record(record).await?;
        }
        node.tell_capsules().await?;
    }
    Ok((draft, unchanged))
}

/// Keeps, signs and pins. The caller holds `Node::keeping`: what is here already stays until it is pinned.
fn keep_and_name(node: &Node, naming: Naming, mut draft: Draft) -> Result<(Draft, Made), Failure> {
    let Naming {
        name,
        version,
        expires,
        added,
    } = naming;
    let (mut guard, mut named) = (None, false);
    let capsule = draft.manifest.id();
    let known = node.records.version(&name.channel, &version)?;
    let same = known.iter().find(|known| known.capsule == capsule);
    if let Some(other) = known.first().filter(|_| same.is_none()) {
        let message = format!(
            "{name} is published already, with other content: it is {}, this would be {capsule}",
            other.capsule
        );
        return Err(taken(message));
    }
    if known.is_empty() && has_ended(node, &name)? {
        return Err(taken(format!("{name} was published before, and has ended")));
    }
    if let Some(same) = same {
        let several = known.iter().any(|known| known.capsule != capsule);
        draft.warnings.extend(warnings_of(same, expires, several));
    }
    if !node
        .store
        .capsule(&capsule)?
        .is_some_and(|held| held.complete)
    {
        guard = Some(keep(&node.store, &mut draft, added)?);
    }
    let mut records = sign_layers(node, &draft)?;
    if known.is_empty() {
        let manifest_size = draft.manifest.encode().len() as u64;
        let body = Body::Name(Name {
            channel: name.channel.clone(),
            version,
            capsule,
            manifest_size,
        });
        let sequence = node.records.next_sequence(&name.channel)?;
        records.push(sign(node, sequence, body, expires)?);
        named = true;
    }
    node.store.pin(&capsule, &PinOrigin::Publication)?;
    let roots = node.holdings.blobs_of(&capsule, &node.records)?;
    let made = Made {
        named,
        roots,
        records,
        kept: guard,
    };
    Ok((draft, made))
}

fn taken(message: String) -> Failure {
    Failure::new(FailureCode::Exists, message)
        .hint("choose another version; a version never changes")
}

/// Whether a name is known to have ended.
fn has_ended(node: &Node, name: &CapsuleName) -> Result<bool, Failure> {
    let ended = node.records.newest_ended(&name.channel)?;
    Ok(ended.is_some_and(|ended| ended.name == *name))
}

/// What there is to say to who publishes again what has its name already.
fn warnings_of(same: &KnownName, expires: Option<u64>, several: bool) -> Vec<String> {
    let name = &same.name;
    let mut warnings = Vec::new();
    if expires.is_some() && expires != same.expires {
        let end = match same.expires {
            Some(_) => "it ends when it was first said to",
            None => "it does not end",
        };
        warnings.push(format!(
            "--expires changed nothing: {name} is published already, and {end}; publish another version with the new end"
        ));
    }
    if several {
        warnings.push(format!(
            "{name} names other content too: fetch this by its id, {}",
            same.capsule
        ));
    }
    warnings
}

/// Keeps all that a draft is made of from removal.
fn guard(store: &Store, draft: &Draft) -> ActiveGuard {
    store.guard(roots(draft))
}

/// All that a draft is made of.
fn roots(draft: &Draft) -> impl Iterator<Item = RootHash> + '_ {
    let layers = draft.parts.iter().flat_map(|part| &part.layers);
    let blobs = layers
        .flat_map(|layer| [Some(layer.blobs.index), layer.blobs.pack])
        .flatten();
    let components = draft.parts.iter().map(|part| part.component.root);
    blobs.chain(components).chain([draft.manifest.id().0])
}

/// Stores a draft's blobs, durably, and notes that the capsule is here since `added` (seconds since 1970). Where that fails,
/// what was stored goes again: it would only take room. Guards all of it; the caller keeps others from collecting until then.
fn keep(store: &Store, draft: &mut Draft, added: u64) -> Result<ActiveGuard, Failure> {
    let guard = guard(store, draft);
    let new: BTreeSet<RootHash> = roots(draft)
        .filter(|root| store.present(root).is_none())
        .collect();
    let Err(failure) = store_all(store, draft, added) else {
        return Ok(guard);
    };
    drop(guard);
    // What somebody fetches meanwhile stays theirs.
    if let Err(error) = store.gc(&|root| !new.contains(root), GcMode::Collect) {
        tracing::warn!(%error, "what was stored for it takes room until the next `capsule gc`");
    }
    Err(failure)
}

fn store_all(store: &Store, draft: &mut Draft, added: u64) -> Result<(), Failure> {
    for part in &mut draft.parts {
        store_part(store, part)?;
    }
    store.put_small(&draft.manifest.encode(), BlobKind::Manifest)?;
    store.put_capsule(
        &draft.manifest.id(),
        &HeldCapsule {
            complete: true,
            added,
        },
    )?;
    Ok(())
}

fn store_part(store: &Store, part: &mut DraftComponent) -> Result<(), Failure> {
    let (holdings, component) = (Holdings::new(store.clone()), &part.component);
    // Where the component is read through other layers already, these make nothing better.
    if holdings.way_to(component)?.is_some() {
        return Ok(());
    }
    for layer in &mut part.layers {
        layer.keep(store)?;
    }
    if let Some(listing) = &part.listing {
        store.put_small(listing, BlobKind::Listing)?;
    }
    match (&part.way, part.outboard.take()) {
        (HeldWay::Tree(way), _) => holdings.put_tree_way(&component.root, way),
        (HeldWay::Layers(layers), Some(outboard)) => register(store, component, layers, outboard),
        _ => Ok(()),
    }
}

/// Signs records of the layers by which the components are held, unless they are known.
fn sign_layers(node: &Node, draft: &Draft) -> Result<Vec<Vec<u8>>, Failure> {
    let mut records = Vec::new();
    for part in &draft.parts {
        let component = &part.component;
        let known = node.records.layers_to(&component.root)?;
        for layer in layers_held(node, part)? {
            let blobs = layer_blobs(&layer);
            let is_known = known.iter().any(|known| {
                known.layer.space == layer.space && layer_blobs(&known.layer) == blobs
            });
            if !is_known && blobs_of(&[blobs]).all(|blob| node.holdings.is_complete(&blob)) {
                // Whoever tells of a layer keeps it, though the component may be read in another way one day.
                node.holdings.offer(&component.root, blobs)?;
                records.push(sign(node, 0, Body::Layer(layer), None)?);
            }
        }
    }
    Ok(records)
}

/// The layers that were made and lead to a component; and those from nothing through which it is held, whoever made them.
fn layers_held(node: &Node, part: &DraftComponent) -> Result<Vec<Layer>, Failure> {
    let component = &part.component;
    let target_size = |space| match space {
        Space::Stream => component.size,
        Space::Contents => component.content_size,
    };
    let blob = |root: RootHash| BlobRef {
        root,
        size: node.store.durable(&root).map_or(0, |here| here.size),
    };
    let layer = |space, parent, blobs: LayerBlobs| Layer {
        space,
        parent,
        target: component.root,
        target_size: target_size(space),
        index: blob(blobs.index),
        pack: blobs.pack.map(blob),
    };
    let made = |made: &DraftLayer| layer(made.space, made.parent, made.blobs);
    let mut layers: Vec<Layer> = part.layers.iter().map(made).collect();
    let spaces: &[Space] = match node.holdings.way_to(component)? {
        Some(HeldWay::Layers(_)) => &[Space::Stream],
        Some(HeldWay::Tree(_)) => &[Space::Stream, Space::Contents],
        Some(HeldWay::Blob) | None => &[],
    };
    for &space in spaces {
        // Not the layers that only this node reads it through.
        let way = node.holdings.recipe(space, &component.root)?;
        // Of a chain, the records came with its layers.
        if let Some([only]) = way.as_deref()
            && !layers.iter().any(|layer| layer_blobs(layer) == *only)
        {
            layers.push(layer(space, None, *only));
        }
    }
    Ok(layers)
}

fn sign(node: &Node, sequence: u64, body: Body, expires: Option<u64>) -> Result<Vec<u8>, Failure> {
    let signed = node.records.sign(
        (sequence, body),
        expires,
        &node.identity.credential,
        &node.identity.machine,
    );
    signed
        .map(|record| record.as_bytes().to_vec())
        .map_err(|error| match error {
            SignError::NotAllowed(RecordError::Expired { .. }) => {
                let message = "the name ended before its content was ready".to_owned();
                Failure::new(FailureCode::Invalid, message)
                    .hint("publish again with a later `--expires`")
            }
            SignError::NotAllowed(error) => {
                Failure::new(FailureCode::NotPermitted, error.to_string())
                    .hint("join again with a token of `capsule fleet invite --role publisher`")
            }
            SignError::Malformed(error) => Failure::new(FailureCode::Invalid, error.to_string()),
            SignError::Database(error) => error.into(),
        })
}
