//! What capsules need of the store: whole blobs, and of the packs of older layers the parts that something is still read from.
//!
//! A pack is needed as a whole by who has the layer's own target, and where this node keeps the layer for others. A newer version
//! that is read through it takes only what its indexes reach; what nothing reaches is dead, and can be freed. What a way reaches is
//! read from its indexes once, and kept in the store from before anything is freed, as a way without it counts as needing all.

use std::collections::{BTreeMap, BTreeSet};

use capsule_chunker::content::Progress;
use capsule_proto::{CapsuleId, GROUP_LEN, GroupRanges, RootHash};

use crate::control::{Failure, FailureCode};
use crate::held::Takes;
use crate::layers::reached;
use crate::node::Node;
use crate::store::{DatabaseError, LayerBlobs, Reached, Store};

/// What some capsules need.
#[derive(Debug, Default)]
pub struct Needs {
    whole: BTreeSet<RootHash>,
    /// Blobs that are needed in part only: none of them is needed as a whole.
    parts: BTreeMap<RootHash, GroupRanges>,
    ways: BTreeSet<Vec<LayerBlobs>>,
    /// Whether of some capsule nobody can tell which ways it has.
    unknown: bool,
    /// What was found out of ways and is not in the store yet.
    new: Vec<(Vec<LayerBlobs>, Reached)>,
}

impl Needs {
    /// Of capsules, whether all of each is here or not. Goes through indexes where a pack may be needed in part.
    pub fn of<'a>(
        node: &Node,
        capsules: impl IntoIterator<Item = &'a CapsuleId>,
        progress: &dyn Progress,
    ) -> Result<Self, Failure> {
        let takes = |id| {
            let mut takes = node.holdings.takes(id, &node.records)?;
            takes.ways.append(&mut takes.own);
            takes.whole.append(&mut takes.begun);
            Ok(takes)
        };
        Self::of_taken(&node.store, capsules.into_iter().map(takes), progress)
    }

    /// Of capsules that are complete, what is to be here for as long as they are: what is not can be had from others.
    pub fn lasting<'a>(
        node: &Node,
        capsules: impl IntoIterator<Item = &'a CapsuleId>,
        progress: &dyn Progress,
    ) -> Result<Self, Failure> {
        let takes = |id| Ok(node.holdings.takes(id, &node.records)?);
        Self::of_taken(&node.store, capsules.into_iter().map(takes), progress)
    }

    fn of_taken(
        store: &Store,
        taken: impl Iterator<Item = Result<Takes, Failure>>,
        progress: &dyn Progress,
    ) -> Result<Self, Failure> {
        let mut needs = Self::default();
        for takes in taken {
            let takes = takes?;
            needs.whole.extend(takes.whole);
            needs.ways.extend(takes.ways);
            needs.unknown |= takes.unknown;
        }
        // An index is little, and the last pack of a way was made for it.
        for way in &needs.ways {
            needs.whole.extend(way.iter().map(|layer| layer.index));
            needs.whole.extend(way.last().and_then(|layer| layer.pack));
        }
        for way in std::mem::take(&mut needs.ways) {
            needs.add_packs(store, &way, progress)?;
            needs.ways.insert(way);
        }
        let whole = &needs.whole;
        needs.parts.retain(|pack, _| !whole.contains(pack));
        Ok(needs)
    }

    /// Adds what a way takes of the packs below its last.
    fn add_packs(
        &mut self,
        store: &Store,
        way: &[LayerBlobs],
        progress: &dyn Progress,
    ) -> Result<(), Failure> {
        let packs: BTreeSet<RootHash> = way.iter().filter_map(|layer| layer.pack).collect();
        // Small ones lie in the database: nothing is to be gained.
        let is_large = |pack: &RootHash| store.durable(pack).is_some_and(|p| p.size > GROUP_LEN);
        if !packs
            .iter()
            .any(|pack| is_large(pack) && !self.whole.contains(pack))
        {
            self.whole.extend(packs);
            return Ok(());
        }
        let reached = match store.reached(way)? {
            Some(known) => known,
            None => match reached(store, way, progress) {
                Ok(found) => {
                    self.new.push((way.to_vec(), found.clone()));
                    found
                }
                Err(failure) if failure.code == FailureCode::Cancelled => return Err(failure),
                Err(failure) => {
                    // Damaged, perhaps: as long as nobody can tell what is needed, all of it is.
                    tracing::warn!(%failure.message, "what is read of a layer's pack cannot be told");
                    self.whole.extend(packs);
                    return Ok(());
                }
            },
        };
        for pack in packs {
            match reached.get(&pack).filter(|_| is_large(&pack)) {
                Some(groups) => self.parts.entry(pack).or_default().union_with(groups),
                None => drop(self.whole.insert(pack)),
            }
        }
        Ok(())
    }

    /// Whether anything of a blob or component is needed.
    pub fn contains(&self, root: &RootHash) -> bool {
        self.whole.contains(root) || self.parts.contains_key(root)
    }

    /// The chunk groups of a blob that are needed, where not all are.
    pub fn part_of(&self, root: &RootHash) -> Option<&GroupRanges> {
        self.parts.get(root)
    }

    /// What of blobs that are here is not needed, though some of it is.
    pub fn dead(&self, store: &Store) -> BTreeMap<RootHash, GroupRanges> {
        let dead = |(pack, needed): (&RootHash, &GroupRanges)| {
            let size = store.durable(pack)?.size;
            Some((*pack, GroupRanges::all(size).difference(needed)))
        };
        self.parts.iter().filter_map(dead).collect()
    }

    /// Keeps what was found out of ways. Before anything is freed.
    pub fn note(&mut self, store: &Store) -> Result<(), DatabaseError> {
        for (way, reached) in self.new.drain(..) {
            store.put_reached(&way, reached)?;
        }
        Ok(())
    }

    /// Forgets what was noted of ways that none of the capsules has; nothing as long as it cannot be told which they have: of packs that
    /// have parts only, these notes tell that nothing is missing.
    pub fn forget_others(&self, store: &Store) -> Result<(), DatabaseError> {
        if self.unknown {
            return Ok(());
        }
        store.keep_reached(&self.ways)
    }
}
