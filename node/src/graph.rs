//! The graph of layers: components are nodes, layers lead from one to another, and the cheapest way to one is sought.
//!
//! The search goes backwards from what is wanted, as only layers that lead to it are known, until it meets nothing (every
//! first layer starts there) or a component that is held. Pure: what is known and held comes as functions.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use capsule_proto::RootHash;
use capsule_proto::index::Space;
use capsule_proto::record::{BlobRef, Layer};

/// Most components that a search looks at: longer histories are cut, and a layer from nothing is taken.
const MAX_VISITED: usize = 4096;

/// What a way counts as: its parts that no connected machine has, then its bytes.
///
/// A part that nobody has can only be waited for, so any way without such parts comes first, whatever it weighs.
pub type Cost = (u64, u64);

/// How to come to a component.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// It is held: nothing to do.
    Held,
    /// Through layers, the one that starts from nothing or from a held component first; at least one.
    Layers(Vec<Layer>),
    /// As a blob of its own.
    Blob(BlobRef),
}

/// What a search may ask.
pub trait Known {
    /// What stops a search.
    type Error;

    /// Through how many layers the component is read here, in that space, if all that leads to it is here.
    fn held(&self, space: Space, root: &RootHash) -> Result<Option<usize>, Self::Error>;

    /// The layers that lead to a component in a space.
    fn layers_to(&self, space: Space, root: &RootHash) -> Result<Vec<Layer>, Self::Error>;

    /// Bytes of a blob that are not here.
    fn missing(&self, blob: &BlobRef) -> u64;

    /// Whether all of a layer is here or at connected machines.
    fn is_reachable(&self, layer: &Layer) -> bool;

    /// What fetching a component as a blob of its own counts as; none if nobody is known to serve it so.
    fn blob_cost(&self, blob: &BlobRef) -> Option<Cost>;
}

/// The cheapest way to a component ([`Cost`]); of equals the one with the fewest layers. None: no way is known.
///
/// No way is through more than `most` layers, with those below it. `size` is the length of what the root names; only a stream's root names its bytes, so only streams come as blobs.
pub fn cheapest<K: Known>(
    known: &K,
    space: Space,
    root: RootHash,
    size: u64,
    most: usize,
) -> Result<Option<Way>, K::Error> {
    // Cost and number of layers from a node to the goal, and the layer that leads on from it.
    let mut best: HashMap<Option<RootHash>, (Cost, usize)> = HashMap::new();
    let mut onward: HashMap<Option<RootHash>, Layer> = HashMap::new();
    let mut queue = BinaryHeap::new();
    best.insert(Some(root), ((0, 0), 0));
    queue.push(Reverse((((0, 0), 0), Some(root))));
    let blob = BlobRef { root, size };
    let blob_cost = if space == Space::Stream {
        known.blob_cost(&blob)
    } else {
        None
    };
    while let Some(Reverse((cost, node))) = queue.pop() {
        if best.get(&node).is_some_and(|known| *known < cost) {
            continue;
        }
        if blob_cost.is_some_and(|blob| blob < cost.0) {
            return Ok(Some(Way::Blob(blob)));
        }
        let Some(component) = node else {
            return Ok(Some(Way::Layers(walk(&onward, None, root))));
        };
        // What would be read through too many layers in all is sought some other way.
        let held = known.held(space, &component)?;
        if held.is_some_and(|below| below.saturating_add(cost.1) <= most) {
            let layers = walk(&onward, Some(component), root);
            return Ok(Some(if layers.is_empty() {
                Way::Held
            } else {
                Way::Layers(layers)
            }));
        }
        if best.len() >= MAX_VISITED || cost.1 >= most {
            continue;
        }
        for layer in known.layers_to(space, &component)? {
            let pack = layer.pack.as_ref().map_or(0, |pack| known.missing(pack));
            let (absent, bytes) = cost.0;
            let bytes = bytes
                .saturating_add(known.missing(&layer.index))
                .saturating_add(pack);
            let absent = absent + u64::from(!known.is_reachable(&layer));
            let next = ((absent, bytes), cost.1 + 1);
            if best.get(&layer.parent).is_none_or(|known| next < *known) {
                best.insert(layer.parent, next);
                queue.push(Reverse((next, layer.parent)));
                onward.insert(layer.parent, layer);
            }
        }
    }
    Ok(blob_cost.map(|_| Way::Blob(blob)))
}

/// The layers from a node to the goal, in order.
fn walk(
    onward: &HashMap<Option<RootHash>, Layer>,
    from: Option<RootHash>,
    goal: RootHash,
) -> Vec<Layer> {
    let mut layers = Vec::new();
    let mut at = from;
    while at != Some(goal)
        && let Some(layer) = onward.get(&at)
    {
        layers.push(layer.clone());
        at = Some(layer.target);
    }
    layers
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;
    use crate::store::MAX_LAYERS;

    /// A graph of components 0..n; layer (from, to, bytes) with from 255 as nothing.
    #[derive(Debug, Default)]
    struct Graph {
        layers: Vec<(u8, u8, u64)>,
        held: HashSet<u8>,
        /// Layers whose bytes this divides are at no connected machine.
        absent: Option<u64>,
        blobs: HashSet<u8>,
        /// Through how many layers each that is held is read.
        below: usize,
    }

    fn hash(n: u8) -> RootHash {
        RootHash::from_bytes([n; 32])
    }

    fn node(root: &RootHash) -> u8 {
        root.as_bytes()[0]
    }

    fn layer((from, to, bytes): (u8, u8, u64)) -> Layer {
        let blob = |salt: u8, size| BlobRef {
            root: RootHash::of(&[from, to, salt, bytes as u8]),
            size,
        };
        Layer {
            space: Space::Stream,
            parent: (from != 255).then(|| hash(from)),
            target: hash(to),
            target_size: 1000,
            index: blob(0, 1),
            pack: Some(blob(1, bytes)),
        }
    }

    impl Graph {
        fn is_absent(&self, bytes: u64) -> bool {
            self.absent.is_some_and(|n| bytes.is_multiple_of(n))
        }
    }

    impl Known for Graph {
        type Error = Infallible;

        fn held(&self, _: Space, root: &RootHash) -> Result<Option<usize>, Infallible> {
            let below = self.below.max(1);
            Ok(self.held.contains(&node(root)).then_some(below))
        }

        fn layers_to(&self, _: Space, root: &RootHash) -> Result<Vec<Layer>, Infallible> {
            Ok(self
                .layers
                .iter()
                .filter(|(_, to, _)| *to == node(root))
                .copied()
                .map(layer)
                .collect())
        }

        fn missing(&self, blob: &BlobRef) -> u64 {
            blob.size
        }

        fn is_reachable(&self, layer: &Layer) -> bool {
            !self.is_absent(layer.pack.map_or(0, |pack| pack.size))
        }

        fn blob_cost(&self, blob: &BlobRef) -> Option<Cost> {
            self.blobs
                .contains(&node(&blob.root))
                .then_some((0, blob.size))
        }
    }

    fn find(graph: &Graph, goal: u8) -> Option<Way> {
        cheapest(graph, Space::Stream, hash(goal), 1000, MAX_LAYERS).unwrap()
    }

    fn cost(graph: &Graph, way: &Way) -> Cost {
        match way {
            Way::Held => (0, 0),
            Way::Layers(layers) => {
                let absent = layers.iter().filter(|l| !graph.is_reachable(l)).count();
                let bytes = layers
                    .iter()
                    .map(|l| l.index.size + l.pack.map_or(0, |p| p.size));
                (absent as u64, bytes.sum())
            }
            Way::Blob(blob) => (0, blob.size),
        }
    }

    #[test]
    fn the_cheapest_of_layers_chains_and_blob_is_taken() {
        let mut graph = Graph {
            layers: vec![(255, 1, 500), (1, 2, 20), (255, 2, 510)],
            ..Graph::default()
        };
        assert_eq!(
            find(&graph, 2).map(|way| cost(&graph, &way)),
            Some((0, 511)),
            "one layer: the two by way of 1 cost 522"
        );
        graph.held.insert(1);
        let Some(Way::Layers(layers)) = find(&graph, 2) else {
            panic!("a chain")
        };
        assert_eq!(layers, [layer((1, 2, 20))]);
        graph.held.insert(2);
        assert_eq!(find(&graph, 2), Some(Way::Held));
        assert_eq!(find(&graph, 9), None);
        graph.blobs.insert(9);
        assert_eq!(
            find(&graph, 9),
            Some(Way::Blob(BlobRef {
                root: hash(9),
                size: 1000
            }))
        );
    }

    #[test]
    fn what_no_connected_machine_has_comes_last_but_is_waited_for() {
        let mut graph = Graph {
            layers: vec![(255, 1, 10), (255, 1, 501)],
            absent: Some(10),
            ..Graph::default()
        };
        let taken = |graph: &Graph| find(graph, 1);
        assert_eq!(
            taken(&graph),
            Some(Way::Layers(vec![layer((255, 1, 501))])),
            "dearer, but there"
        );
        graph.layers.pop();
        assert_eq!(taken(&graph), Some(Way::Layers(vec![layer((255, 1, 10))])));
        graph.blobs.insert(1);
        assert!(matches!(taken(&graph), Some(Way::Blob(_))));
    }

    #[test]
    fn no_way_has_more_layers_than_are_followed() {
        let mut graph = Graph {
            layers: vec![(1, 2, 1), (255, 2, 500)],
            held: [1].into(),
            below: MAX_LAYERS - 1,
            ..Graph::default()
        };
        let onto = Some(Way::Layers(vec![layer((1, 2, 1))]));
        assert_eq!(find(&graph, 2), onto);
        graph.below = MAX_LAYERS;
        let anew = Some(Way::Layers(vec![layer((255, 2, 500))]));
        assert_eq!(find(&graph, 2), anew);
        graph.layers.pop();
        assert_eq!(find(&graph, 2), None);
    }

    #[test]
    fn circles_end() {
        let graph = Graph {
            layers: vec![(1, 2, 1), (2, 1, 1)],
            ..Graph::default()
        };
        assert_eq!(find(&graph, 2), None);
    }

    /// Costs by relaxing all edges until nothing changes.
    fn oracle(graph: &Graph, goal: u8) -> Option<Cost> {
        let mut cost = [None::<Cost>; 8];
        for n in 0..8 {
            cost[usize::from(n)] = graph.held.contains(&n).then_some((0, 0));
        }
        for _ in 0..8 {
            for (from, to, bytes) in &graph.layers {
                let before = if *from == 255 {
                    Some((0, 0))
                } else {
                    cost[usize::from(*from)]
                };
                let absent = u64::from(graph.is_absent(*bytes));
                let through = before.map(|before| (before.0 + absent, before.1 + bytes + 1));
                let known = &mut cost[usize::from(*to)];
                *known = known.iter().chain(&through).min().copied();
            }
        }
        let blob = graph.blobs.contains(&goal).then_some((0, 1000));
        cost[usize::from(goal)].into_iter().chain(blob).min()
    }

    proptest! {
        #[test]
        fn costs_agree_with_relaxation(
            layers in prop::collection::vec((prop_oneof![0u8..8, Just(255)], 0u8..8, 1u64..600), 0..20),
            held in prop::collection::hash_set(0u8..8, 0..3),
            absent in prop::option::of(1u64..5),
            blobs in prop::collection::hash_set(0u8..8, 0..3),
        ) {
            let graph = Graph { layers, held, absent, blobs, below: 1 };
            for goal in 0..8 {
                let found = find(&graph, goal);
                prop_assert_eq!(found.as_ref().map(|way| cost(&graph, way)), oracle(&graph, goal));
                if let Some(Way::Layers(layers)) = found {
                    prop_assert!(layers.windows(2).all(|pair| Some(pair[0].target) == pair[1].parent));
                    prop_assert!(layers[0].parent.is_none_or(|parent| graph.held.contains(&node(&parent))));
                    prop_assert_eq!(layers.last().unwrap().target, hash(goal));
                }
            }
        }
    }
}
