//! What a pull takes of packs, where that is not all of them: what the component is read from, by the indexes of its layers.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use capsule_proto::ranges::group_count;
use capsule_proto::record::BlobRef;
use capsule_proto::{GroupRanges, RootHash};

use super::prepare::ComponentPlan;
use super::search::{Reach, reach_of};
use crate::control::{Failure, Phase};
use crate::held::blobs_of;
use crate::layers::reached;
use crate::node::Node;
use crate::store::{BlobKind, LayerBlobs, Reached};
use crate::work::{Task, Tell, Work};

/// Notes what of its packs each component takes, by the indexes of its layers. Where all of them are here nobody need know.
pub(super) async fn with_reached(
    node: &Arc<Node>,
    components: Vec<ComponentPlan>,
    tell: &dyn Tell,
) -> Result<Vec<ComponentPlan>, Failure> {
    let is_complete = |root: &RootHash| node.holdings.is_complete(root);
    let mut blobs = components.iter().flat_map(|plan| plan.way.blobs());
    if blobs.all(|blob| is_complete(&blob)) {
        return Ok(components);
    }
    let task = Task {
        phase: Phase::Planning,
        total: None,
        what: None,
    };
    let shared = node.clone();
    let reading = move |work: &Work| {
        let mut components = components;
        // What one component takes as a whole, all of them do.
        let mut taken: BTreeMap<RootHash, Option<GroupRanges>> = BTreeMap::new();
        let mut take = |root: RootHash, part: Option<&GroupRanges>| match taken.entry(root) {
            Entry::Vacant(place) => drop(place.insert(part.cloned())),
            Entry::Occupied(mut known) => match (known.get_mut(), part) {
                (Some(known), Some(part)) => known.union_with(part),
                (known, _) => *known = None,
            },
        };
        for plan in &components {
            take(plan.component.root, None);
            for layers in plan.way.ways() {
                let reached = reached_of(&shared, layers, work)?;
                blobs_of(layers).for_each(|blob| take(blob, reached.get(&blob)));
            }
        }
        for plan in &mut components {
            let sizes = &plan.blobs;
            let is_all = |root: &RootHash, part: &GroupRanges| {
                let size = sizes.get(root).map(|(size, _)| *size);
                size.is_some_and(|size| part.contains_run(&(0..group_count(size))))
            };
            let part = |root: RootHash| Some((root, taken.get(&root)?.clone()?));
            let parts = plan.way.blobs().into_iter().filter_map(part);
            plan.reached = parts.filter(|(root, part)| !is_all(root, part)).collect();
        }
        Ok(components)
    };
    node.works.run(task, tell, reading).await
}

/// What a way takes of its packs; of those that are not named, all.
fn reached_of(node: &Node, layers: &[LayerBlobs], work: &Work) -> Result<Reached, Failure> {
    let is_complete = |root: &RootHash| node.holdings.is_complete(root);
    let has_indexes = layers.iter().all(|layer| is_complete(&layer.index));
    if layers.len() < 2 || !has_indexes || blobs_of(layers).all(|blob| is_complete(&blob)) {
        return Ok(Reached::new());
    }
    match node.store.reached(layers)? {
        Some(known) => Ok(known),
        None => reached(&node.store, layers, work),
    }
}

/// Packs of which not all that is needed is here or at connected machines, though something is.
pub(super) async fn short(node: &Node, components: &[ComponentPlan]) -> HashSet<RootHash> {
    let mut short = HashSet::new();
    for plan in components.iter().filter(|plan| !plan.held) {
        for (root, (size, kind)) in &plan.blobs {
            if *kind != BlobKind::Pack || plan.missing(node, root, *size) == 0 {
                continue;
            }
            let blob = BlobRef {
                root: *root,
                size: *size,
            };
            let all = || GroupRanges::all(*size);
            let wanted = plan.groups(root).cloned().unwrap_or_else(all);
            if reach_of(&node.network, &node.store, &blob, &wanted).await == Reach::Some {
                short.insert(*root);
            }
        }
    }
    short
}
