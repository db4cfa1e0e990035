//! What capsules need of the store: whole blobs, and of the packs of older layers the parts that something is still read from.
//!
//! A pack is needed as a whole by who has the layer's own target, and where this node keeps the layer for others. A newer version
//! that is read through it takes only what its indexes reach; what nothing reaches is dead, and can be freed. What a way reaches is
//! read from its indexes once, and noted in the store before anything is decided: whoever decides holds `Node::keeping`, and looks into the
//! database only. A way of which nothing was noted needs all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use capsule_proto::{CapsuleId, GROUP_LEN, GroupRanges, RootHash};

use crate::control::{Failure, FailureCode, Phase};
use crate::held::Takes;
use crate::layers::reached;
use crate::node::Node;
use crate::store::{DatabaseError, LayerBlobs, MAX_LAYERS, Store};
use crate::work::{Task, Tell, Work, blocking};

/// What some capsules need.
#[derive(Debug, Default)]
pub struct Needs {
    whole: BTreeSet<RootHash>,
    /// Blobs that are needed in part only: none of them is needed as a whole.
    parts: BTreeMap<RootHash, GroupRanges>,
    ways: BTreeSet<Vec<LayerBlobs>>,
    /// Whether of some capsule nobody can tell which ways it has.
    unknown: bool,
    /// Ways of which it was not noted what they take of packs that nothing else needs as a whole: all of them, until it is.
    untold: Vec<Vec<LayerBlobs>>,
}

impl Needs {
    /// Of capsules, whether all of each is here or not. Looks into the database only: see [`note_ways`].
    pub fn of<'a>(
        node: &Node,
        capsules: impl IntoIterator<Item = &'a CapsuleId>,
    ) -> Result<Self, DatabaseError> {
        let takes = |id| {
            let mut takes = node.holdings.takes(id, &node.records)?;
            takes.ways.append(&mut takes.own);
            takes.whole.append(&mut takes.begun);
            Ok(takes)
        };
        Self::of_taken(&node.store, capsules.into_iter().map(takes))
    }

    /// Of capsules that are complete, what is to be here for as long as they are: what is not can be had from others.
    pub fn lasting<'a>(
        node: &Node,
        capsules: impl IntoIterator<Item = &'a CapsuleId>,
    ) -> Result<Self, DatabaseError> {
        let takes = |id| node.holdings.takes(id, &node.records);
        Self::of_taken(&node.store, capsules.into_iter().map(takes))
    }

    fn of_taken(
        store: &Store,
        taken: impl Iterator<Item = Result<Takes, DatabaseError>>,
    ) -> Result<Self, DatabaseError> {
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
            needs.add_packs(store, &way)?;
            needs.ways.insert(way);
        }
        let whole = &needs.whole;
        needs.parts.retain(|pack, _| !whole.contains(pack));
        Ok(needs)
    }

    /// Adds what a way takes of the packs below its last.
    fn add_packs(&mut self, store: &Store, way: &[LayerBlobs]) -> Result<(), DatabaseError> {
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
        let Some(reached) = store.reached(way)? else {
            self.untold.push(way.to_vec());
            self.whole.extend(packs);
            return Ok(());
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

    /// Forgets what was noted of ways that none of the capsules has; nothing as long as it cannot be told which they have: of packs that
    /// have parts only, these notes tell that nothing is missing.
    pub fn forget_others(&self, store: &Store) -> Result<(), DatabaseError> {
        if self.unknown {
            return Ok(());
        }
        store.keep_reached(&self.ways)
    }
}

/// Notes what ways of capsules take of their packs, where that is not noted and matters. Goes through indexes, which may take long; what is
/// noted is true for ever, so nothing need be held meanwhile.
pub async fn note_ways(
    node: &Arc<Node>,
    capsules: impl FnOnce(&Node) -> Result<Vec<CapsuleId>, Failure> + Send + 'static,
    tell: &dyn Tell,
) -> Result<(), Failure> {
    let shared = node.clone();
    let untold = blocking(move || {
        let capsules = capsules(&shared)?;
        Ok(Needs::of(&shared, &capsules)?.untold)
    });
    let untold = untold.await?;
    if untold.is_empty() {
        return Ok(());
    }
    let task = Task {
        phase: Phase::Planning,
        total: None,
        what: None,
    };
    let store = node.store.clone();
    let noting = move |work: &Work| untold.iter().try_for_each(|way| note(&store, way, work));
    node.works.run(task, tell, noting).await
}

fn note(store: &Store, way: &[LayerBlobs], work: &Work) -> Result<(), Failure> {
    work.check()?;
    if way.len() > MAX_LAYERS {
        return Ok(());
    }
    match reached(store, way, work) {
        Ok(found) => Ok(store.put_reached(way, found)?),
        Err(failure) if failure.code == FailureCode::Cancelled => Err(failure),
        Err(failure) => {
            // Damaged, perhaps: as long as nobody can tell what is needed, all of it is.
            tracing::warn!(%failure.message, "what is read of a layer's pack cannot be told");
            Ok(())
        }
    }
}
