//! Proving components while they come, as far as each frame can be proved alone: at the end of a transfer, when all machines of a room are
//! done at once, there is little left to do.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capsule_chunker::layer::read::{LayerCache, LayerContent, ReadOptions};
use capsule_chunker::layer::{Storage, Unproved};
use capsule_proto::RootHash;
use capsule_proto::manifest::Component;
use tokio::time::MissedTickBehavior;

use super::prepare::{ComponentPlan, Prepared};
use crate::control::Failure;
use crate::held::HeldWay;
use crate::layers::{open_all, open_pack};
use crate::store::{LayerBlobs, Store};
use crate::work::blocking;

/// How often it is looked what has come.
const TICK: Duration = Duration::from_millis(250);
/// Compared at a time: this long, some tens of milliseconds, the end of a transfer may have to wait.
const STEP: u64 = 64 << 20;

/// The layers of a component that is one of its packs, as far as can be told without the index.
pub fn by_pack<'a>(component: &Component, way: &'a HeldWay) -> Option<&'a [LayerBlobs]> {
    match way {
        HeldWay::Layers(layers) if layers.last()?.pack == Some(component.root) => Some(layers),
        _ => None,
    }
}

/// What was proved of components of which not all was here.
#[derive(Clone, Default)]
pub struct Early(Arc<Mutex<BTreeMap<RootHash, Coming>>>);

struct Coming {
    layers: Vec<LayerBlobs>,
    /// None before its pack has begun to come.
    open: Option<(Arc<LayerContent>, Unproved)>,
    /// Chunk groups that were here at the last look.
    seen: u64,
}

impl Early {
    /// For the components of a capsule that are fetched. Their indexes are here.
    pub fn new(prepared: &Prepared) -> Self {
        let fetched = |plan: &&ComponentPlan| !plan.held && plan.like.is_none();
        let coming = |plan: &ComponentPlan| {
            let coming = Coming {
                layers: by_pack(&plan.component, &plan.way)?.to_vec(),
                open: None,
                seen: 0,
            };
            Some((plan.component.root, coming))
        };
        let all = prepared.components.iter().filter(fetched);
        Self(Arc::new(Mutex::new(all.filter_map(coming).collect())))
    }

    /// Proves what comes while it is fetched.
    pub async fn during<T>(&self, store: &Store, fetching: impl Future<Output = T>) -> T {
        let mut fetching = pin!(fetching);
        tokio::select! {
            fetched = &mut fetching => return fetched,
            Err(failure) = self.prove(store) => {
                tracing::warn!(%failure.message, "nothing more is proved while it comes");
            }
            else => {}
        }
        fetching.await
    }

    /// Until there is nothing left, or it is dropped: what was proved by then counts.
    async fn prove(&self, store: &Store) -> Result<(), Failure> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut goes_on = !self.coming().is_empty();
        while goes_on {
            ticks.tick().await;
            let (early, store) = (self.clone(), store.clone());
            goes_on = blocking(move || Ok(early.step(&store))).await?;
        }
        Ok(())
    }

    /// What is left to be proved of a component; none if nothing of it was. Blocks while a step lasts.
    pub fn take(&self, root: &RootHash) -> Option<Unproved> {
        let coming = self.coming().remove(root)?;
        Some(coming.open?.1)
    }

    fn coming(&self) -> MutexGuard<'_, BTreeMap<RootHash, Coming>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One look at each; false if there is no use in another. What fails is left to the check at the end, which says whose fault it is.
    fn step(&self, store: &Store) -> bool {
        let mut coming = self.coming();
        coming.retain(|root, coming| {
            let stepped = coming.step(root, store);
            if let Err(failure) = &stepped {
                tracing::debug!(%root, %failure.message, "not proved while it comes");
            }
            stepped.unwrap_or(false)
        });
        !coming.is_empty()
    }
}

impl Coming {
    /// False if there is no use in going on.
    fn step(&mut self, root: &RootHash, store: &Store) -> Result<bool, Failure> {
        let Some(here) = store.present(root) else {
            return Ok(true);
        };
        let (content, unproved) = match &mut self.open {
            Some(open) => open,
            closed => match open(root, &self.layers, store)? {
                Some(opened) => closed.insert(opened),
                None => return Ok(false),
            },
        };
        let count = here.ranges.count();
        if count > self.seen {
            let proved = unproved.prove(content, &here.ranges, STEP, NonZeroUsize::MIN, &())?;
            if proved < STEP {
                self.seen = count;
            }
        }
        Ok(true)
    }
}

/// Opens a component whose pack may be coming, if it is one as it lies.
fn open(
    root: &RootHash,
    layers: &[LayerBlobs],
    store: &Store,
) -> Result<Option<(Arc<LayerContent>, Unproved)>, Failure> {
    let pack = |layer: &LayerBlobs| match layer.pack {
        Some(pack) if pack == *root => Ok(store.open_coming(root)? as Storage),
        _ => open_pack(store, layer),
    };
    let cache = LayerCache::new(&ReadOptions { cache_len: 0 });
    let as_it_is = |_: &LayerBlobs, content| Ok(content);
    let top = open_all(store, layers, &cache, &pack, &as_it_is)?.pop();
    let Some(top) = top else {
        return Ok(None);
    };
    let unproved = top.unproved()?;
    Ok(unproved.map(|unproved| (top, unproved)))
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::path::Path;

    use capsule_proto::FrameHash;
    use capsule_proto::index::{Index, IndexBuilder, Space};
    use capsule_proto::ranges::{Height, group_count};
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;
    use crate::control::FailureCode;
    use crate::held::Holdings;
    use crate::publish::tests::published;
    use crate::store::{BlobKind, StoreOptions};
    use crate::transfer::check::check;
    use crate::work::Work;

    fn store(path: &Path) -> Store {
        Store::open(path, StoreOptions::default()).unwrap()
    }

    /// A store with a component that does not compress, and another that begins to fetch it.
    struct Fetching {
        from: Store,
        to: Store,
        component: Component,
        layer: LayerBlobs,
        _temp: tempfile::TempDir,
    }

    impl Fetching {
        /// `change` may make the index say something else.
        fn begin(change: impl Fn(&mut Index)) -> Self {
            let temp = tempfile::tempdir().unwrap();
            let mut bytes = vec![0; 3 << 20];
            StdRng::seed_from_u64(7).fill_bytes(&mut bytes);
            std::fs::write(temp.path().join("file"), &bytes).unwrap();
            let (from, to) = (store(&temp.path().join("a")), store(&temp.path().join("b")));
            let component = published(&from, &temp.path().join("file")).components[0].clone();
            let holdings = Holdings::new(from.clone());
            let layers = holdings.recipe(Space::Stream, &component.root);
            let layers = layers.unwrap().unwrap();
            let index = from.read_whole(&layers[0].index, 1 << 20).unwrap();
            let mut index = Index::decode(&index).unwrap();
            change(&mut index);
            let mut builder = IndexBuilder::new();
            for frame in index.frames {
                builder.push_frame(frame).unwrap();
            }
            for run in index.runs {
                builder.push_run(run).unwrap();
            }
            let index = builder.finish(index.directory.header());
            to.put_small(&index, BlobKind::Index).unwrap();
            let layer = LayerBlobs {
                index: RootHash::of(&index),
                pack: layers[0].pack,
            };
            assert_eq!(layer.pack, Some(component.root), "it does not compress");
            Self {
                from,
                to,
                component,
                layer,
                _temp: temp,
            }
        }

        fn early(&self) -> Early {
            let coming = Coming {
                layers: vec![self.layer],
                open: None,
                seen: 0,
            };
            let all = BTreeMap::from([(self.component.root, coming)]);
            Early(Arc::new(Mutex::new(all)))
        }

        fn create(&self) {
            let Component { root, size, .. } = self.component;
            self.to.create_partial(&root, size, BlobKind::Pack).unwrap();
        }

        fn fetch(&self, groups: Range<u64>) {
            let (root, height, mut encoded) = (&self.component.root, Height::ROOT, Vec::new());
            let read = self
                .from
                .read_encoded(root, groups.clone(), height, &mut encoded);
            read.unwrap();
            self.to
                .write_encoded(root, groups, height, &encoded)
                .unwrap();
        }

        fn check(&self, early: Option<Unproved>) -> Result<(), Failure> {
            self.to.flush(&self.component.root).unwrap();
            let way = HeldWay::Layers(vec![self.layer]);
            check(&self.to, &self.component, &way, early, &Work::default())
        }
    }

    #[test]
    fn what_came_is_proved_before_the_rest_comes() {
        let fetching = Fetching::begin(|_| ());
        let (early, root) = (fetching.early(), &fetching.component.root);
        let groups = group_count(fetching.component.size);
        assert!(early.step(&fetching.to), "its pack may still begin to come");
        assert!(early.take(root).is_none());

        let early = fetching.early();
        fetching.create();
        fetching.fetch(0..groups / 2);
        assert!(early.step(&fetching.to));
        fetching.fetch(groups / 2..groups);
        assert!(!early.take(root).unwrap().is_empty(), "half of it is left");

        let early = fetching.early();
        assert!(early.step(&fetching.to));
        let unproved = early.take(root).unwrap();
        assert!(unproved.is_empty());
        fetching.check(Some(unproved)).unwrap();
        let holdings = Holdings::new(fetching.to.clone());
        assert!(holdings.way_to(&fetching.component).unwrap().is_some());
    }

    #[test]
    fn a_frame_that_is_not_what_its_hash_says_is_refused_in_the_end() {
        let lie = |index: &mut Index| index.frames.last_mut().unwrap().hash = FrameHash([1; 16]);
        let fetching = Fetching::begin(lie);
        fetching.create();
        fetching.fetch(0..group_count(fetching.component.size));
        let early = fetching.early();
        assert!(!early.step(&fetching.to), "there is no use in going on");
        let unproved = early.take(&fetching.component.root);
        assert!(unproved.is_none());
        let refused = fetching.check(unproved).unwrap_err();
        assert_eq!(refused.code, FailureCode::Damaged);
        assert!(
            refused.message.contains("its content has hash"),
            "{}",
            refused.message
        );
    }
}
